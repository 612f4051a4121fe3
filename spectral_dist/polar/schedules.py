"""Named Newton-Schulz schedules: the (a, b, c) of every step of x <- a x + b x^3 + c x^5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Row = tuple[float, float, float]
"""(a, b, c) of one step."""

GROWTH = 50.0
"""The most that small singular values may grow between two restarts of the Gram form.

Rounding moves the eigenvalues of R = X X^T by eps, and n steps multiply that by (a_1 ... a_n)^2.
At 50 the Gram form's error in float16 and float32 is at most 6 times that of the standard form
(measured at the natural step counts, decaying and Gaussian spectra; without a restart 50 times and
more), and they get one restart: after 2 steps of polar_express and quintic, after 3 of jordan.
deepseekv4 and longer runs get further ones.
"""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The rows of one schedule, and what a step past the last row does.

    Attributes:
        name: as ``method`` of ``polar`` takes it.
        rows: (a, b, c) of each step.
        default_steps: number of steps if a user asks for none.
        past_end: what follows the last row: the last row again, the first row, or an error.
        safety: X starts from ||X||_F * safety, so singular values up to ``safety`` do not diverge.
        stable_in_half: whether singular values stay bounded under the rounding of float16 and
            bfloat16, too.
    """

    name: str
    rows: tuple[Row, ...]
    default_steps: int
    past_end: Literal["repeat", "cycle", "error"] = "repeat"
    safety: float = 1.0
    stable_in_half: bool = True


_JORDAN: Row = (3.4445, -4.7750, 2.0315)

_POLAR_EXPRESS: tuple[Row, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
_POLAR_EXPRESS_SAFETY = 1.01


def _widen(rows: Sequence[Row], safety: float) -> tuple[Row, ...]:
    """Return the rows of p(x / safety) for every row but the last, which stays p(x).

    Without it a singular value above 1 by rounding diverges. "Last" is the last row of the table,
    not of a run: that one repeats for ever, so its fixed point must stay exactly 1.
    """
    return (*((a / safety, b / safety**3, c / safety**5) for a, b, c in rows[:-1]), rows[-1])


SCHEDULES: dict[str, Schedule] = {
    schedule.name: schedule
    for schedule in (
        # Keller Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024
        Schedule("jordan", (_JORDAN,), default_steps=5),
        # source: You (the author's name)
        Schedule(
            "quintic",
            (
                (4.0848, -6.8946, 2.9270),
                (3.9505, -6.3029, 2.6377),
                (3.7418, -5.5913, 2.3037),
                (2.8769, -3.1427, 1.2046),
                (2.8366, -3.0525, 1.2012),
            ),
            default_steps=5,
            past_end="cycle",
        ),
        # arXiv 2506.10935; every row spans exactly the range of the row before, so a singular value
        # .2% beyond it, which is less than bfloat16 rounds by, ends above 1e6. In bfloat16 one
        # Gaussian matrix in ten came out 100 times too large
        Schedule(
            "cans",
            (
                (8.4703, -25.1081, 18.6293),
                (4.1828, -3.1087, 0.5806),
                (3.9619, -2.9541, 0.5630),
                (3.2866, -2.4647, 0.5074),
                (2.2737, -1.6447, 0.4162),
            ),
            default_steps=5,
            stable_in_half=False,
        ),
        # cubics: c = 0 saves one product in three (standard form)
        Schedule(
            "cubic5",
            (
                (3.3656576, -3.3420992, 0.0),
                (2.5744352, -1.4957376, 0.0),
                (2.5368962, -1.4312570, 0.0),
                (2.4418906, -1.2764040, 0.0),
                (2.2230472, -0.9630650, 0.0),
            ),
            default_steps=5,
            past_end="error",
        ),
        # jordan never converges; (2, -1.5, 0.5) has fixed point 1 with slope 0
        Schedule("deepseekv4", (_JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2, default_steps=10),
        # arXiv 2505.16932
        Schedule(
            "polar_express",
            _widen(_POLAR_EXPRESS, _POLAR_EXPRESS_SAFETY),
            default_steps=5,
            safety=_POLAR_EXPRESS_SAFETY,
        ),
    )
}


MOST_STEPS = 100
"""Far more than any schedule needs to converge, and few enough to be written out."""


def check_steps(steps: object) -> None:
    """Raise a ValueError for what is no number of Newton-Schulz steps."""
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MOST_STEPS:
        raise ValueError(
            f"steps is {steps!r}; it must be a whole number, at least 1 and at most {MOST_STEPS}"
        )


def rows(name: str, steps: int | None = None) -> tuple[Row, ...]:
    """Return the (a, b, c) of each step of a named schedule; ``steps`` None is its default number.

    Fewer steps than rows take the first rows, so deepseekv4 up to 8 steps is jordan.

    Raises:
        ValueError: steps < 1, not an int, or not exactly 5 for cubic5.
        KeyError: the name is unknown.
    """
    schedule = SCHEDULES[name]
    table = schedule.rows
    if steps is None:
        steps = schedule.default_steps
    check_steps(steps)
    if schedule.past_end == "error" and steps != len(table):
        raise ValueError(f"steps is {steps}; {name} has exactly {len(table)} steps")
    if schedule.past_end == "cycle":
        return tuple(table[i % len(table)] for i in range(steps))
    return tuple(table[min(i, len(table) - 1)] for i in range(steps))


def restarts(rows: Sequence[Row]) -> tuple[int, ...]:
    """Return the step counts after which the Gram form multiplies Q into X and starts afresh.

    ``GROWTH`` decides: a restart comes before small singular values have grown by more.
    """
    points: list[int] = []
    growth = 1.0
    for steps_done, (a, _, _) in enumerate(rows):
        if steps_done and growth * a > GROWTH:
            points.append(steps_done)
            growth = 1.0
        growth *= a
    return tuple(points)
