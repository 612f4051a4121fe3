"""Slow, obvious polar factors, written from the formulas and sharing nothing with the package.

Everything is float64 and one matrix at a time. Coefficients are typed in again on purpose.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

JORDAN = [3.4445, -4.7750, 2.0315]
QUINTIC = [
    [4.0848, -6.8946, 2.9270],
    [3.9505, -6.3029, 2.6377],
    [3.7418, -5.5913, 2.3037],
    [2.8769, -3.1427, 1.2046],
    [2.8366, -3.0525, 1.2012],
]
CANS = [
    [8.4703, -25.1081, 18.6293],
    [4.1828, -3.1087, 0.5806],
    [3.9619, -2.9541, 0.5630],
    [3.2866, -2.4647, 0.5074],
    [2.2737, -1.6447, 0.4162],
]
CUBIC5 = [
    [3.3656576, -3.3420992, 0],
    [2.5744352, -1.4957376, 0],
    [2.5368962, -1.4312570, 0],
    [2.4418906, -1.2764040, 0],
    [2.2230472, -0.9630650, 0],
]
# unscaled; before use rows 1 to 7 are divided by (s, s^3, s^5), s = 1.01
POLAR_EXPRESS = [
    [8.28721201814563, -23.595886519098837, 17.300387312530933],
    [4.107059111542203, -2.9478499167379106, 0.5448431082926601],
    [3.9486908534822946, -2.908902115962949, 0.5518191394370137],
    [3.3184196573706015, -2.488488024314874, 0.51004894012372],
    [2.300652019954817, -1.6689039845747493, 0.4188073119525673],
    [1.891301407787398, -1.2679958271945868, 0.37680408948524835],
    [1.8750014808534479, -1.2500016453999487, 0.3750001645474248],
    [1.875, -1.25, 0.375],
]
NATURAL_STEPS = {
    "jordan": 5,
    "quintic": 5,
    "cans": 5,
    "cubic5": 5,
    "deepseekv4": 10,
    "polar_express": 5,
}
NAMES = list(NATURAL_STEPS)


def coefficients(name: str, step: int) -> tuple[float, float, float]:
    """(a, b, c) of step 0, 1, 2, ... of a schedule, however many."""
    if name == "jordan":
        a, b, c = JORDAN
    elif name == "quintic":
        a, b, c = QUINTIC[step % 5]
    elif name == "cans":
        a, b, c = CANS[step] if step < 5 else CANS[4]
    elif name == "cubic5":
        a, b, c = CUBIC5[step]
    elif name == "deepseekv4":
        a, b, c = JORDAN if step < 8 else [2, -1.5, 0.5]
    elif name == "polar_express" and step < 7:
        a, b, c = POLAR_EXPRESS[step]
        a, b, c = a / 1.01, b / 1.01**3, c / 1.01**5
    elif name == "polar_express":
        a, b, c = POLAR_EXPRESS[7]
    else:
        raise AssertionError(name)
    return a, b, c


def start_norm(name: str) -> float:
    """What X is divided by before the first step, over ||X||_F."""
    return 1.01 if name == "polar_express" else 1.0


def scalar_map(name: str, steps: int, s: Tensor) -> Tensor:
    """p_T(s): what ``steps`` steps make of singular values that were already normalised."""
    s = s.double()
    for step in range(steps):
        a, b, c = coefficients(name, step)
        s = a * s + b * s**3 + c * s**5
    return s


def newton_schulz(name: str, steps: int, x: Tensor) -> Tensor:
    """The iteration on one matrix (m, n), tall ones transposed, in float64."""
    x = x.double()
    if x.shape[0] > x.shape[1]:
        return newton_schulz(name, steps, x.T).T
    largest = x.abs().max()
    if largest == 0:
        return x
    x = x / largest
    x = x / (math.sqrt((x**2).sum().item()) * start_norm(name))
    for step in range(steps):
        a, b, c = coefficients(name, step)
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def exact(x: Tensor) -> Tensor:
    """U V^T of one matrix (m, n) of full rank, by SVD in float64."""
    u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return u @ vh


def optimal_quintics(lower: float, steps: int, cushion: float) -> list[tuple[float, float, float]]:
    """The generator of the Polar Express table: minimax odd quintics on [lower, 1], composed."""
    table = []
    low, high = lower, 1.0
    for _ in range(steps):
        a, b, c = _optimal_quintic(max(low, cushion * high), high)
        # where the cushion raised the lower end, centre p around 1 on the true interval again
        centre = 2 / (sum(k * low**i for k, i in ((a, 1), (b, 3), (c, 5)))
                      + sum(k * high**i for k, i in ((a, 1), (b, 3), (c, 5))))  # fmt: skip
        a, b, c = a * centre, b * centre, c * centre
        table.append((a, b, c))
        low = a * low + b * low**3 + c * low**5
        high = 2 - low
    return table


def _optimal_quintic(low: float, high: float) -> tuple[float, float, float]:
    if low / high > 1 - 5e-6:
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    inner = [(3 * low + high) / 4, (low + 3 * high) / 4]
    error = math.inf
    while True:
        points = torch.tensor([low, *inner, high], dtype=torch.float64)
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        system = torch.stack([points, points**3, points**5, signs], dim=1)
        a, b, c, e = torch.linalg.solve(system, torch.ones(4, dtype=torch.float64)).tolist()
        root = math.sqrt(9 * b * b - 20 * a * c)
        inner = [math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))]
        if abs(error - e) < 1e-15:
            return a, b, c
        error = e


def with_singular_values(s: Tensor, m: int, n: int, seed: int = 0) -> Tensor:
    """An m x n float64 matrix with singular values s (min(m, n) of them) and random bases."""
    return (
        random_orthogonal(m, seed)[:, : len(s)]
        * s.double()
        @ random_orthogonal(n, seed + 1)[: len(s)]
    )


def random_orthogonal(n: int, seed: int) -> Tensor:
    """An n x n float64 orthogonal matrix."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    """Independent standard normal numbers, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)
