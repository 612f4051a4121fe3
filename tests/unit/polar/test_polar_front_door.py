"""Options, dtypes, shapes and error texts of polar()."""

import json
import math

import pytest
import torch

from spectral_dist.polar import METHODS, check, newton_schulz, polar, resolve_dtype
from spectral_dist.polar import api as door
from spectral_dist.polar.scaling import unit_frobenius
from spectral_dist.polar.schedules import rows
from tests.reference import polar as reference

CPU, OTHER = torch.device("cpu"), torch.device("meta")
X = reference.gaussian(4, 6)
JORDAN = [[3.4445, -4.7750, 2.0315]] * 5
TWO = [[3.4445, -4.7750, 2.0315], [2, -1.5, 0.5]]
CANS = [list(row) for row in rows("cans")]


def refuses(match, x=X, **options):
    with pytest.raises(ValueError, match=match):
        polar(x, **options)


def test_methods():
    assert sorted(METHODS) == sorted(
        reference.NAMES
        + ["gram_" + name for name in reference.NAMES]
        + ["qdwh", "zolo", "svd", "eigh"]
    )


def test_jordan_is_the_default():
    assert torch.equal(polar(X), polar(X, method="jordan", steps=5))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("jordn", "jordan"), ("Jordan", "jordan"), ("polarexpress", "polar_express"),
     ("gram-jordan", "gram_jordan"), ("cubic", "cubic5"), ("deepseek_v4", "deepseekv4")],
)  # fmt: skip
def test_unknown_method_names_the_nearest_and_the_list(wrong, right):
    refuses(
        f"unknown polar method '{wrong}'; did you mean '{right}'\\? Known: jordan, ", method=wrong
    )
    with pytest.raises(ValueError, match=", ".join(METHODS)):
        check(wrong)


@pytest.mark.parametrize("method", [None, 3, "", {1.5: 2}, {"a"}])
def test_what_is_neither_a_name_nor_a_schedule(method):
    refuses(r"unknown polar method .*\. Known: jordan.*Or a schedule of your own", method=method)


@pytest.mark.parametrize("steps", [0, -3, 2.5, "5", True, False, [5]])
def test_steps_must_be_a_positive_integer(steps):
    for method in ("jordan", "gram_cans", TWO):
        # 1 and 5 are remembered as good; True and 5.0 are equal to them, but not good
        polar(X, method=method, steps=1)
        refuses("it must be a whole number, at least 1", method=method, steps=steps)
        with pytest.raises(ValueError, match="it must be a whole number, at least 1"):
            check(method, steps)


@pytest.mark.parametrize("method", ["cubic5", "gram_cubic5"])
def test_cubic5_is_five_steps(method):
    refuses("steps is 6; cubic5 has exactly 5 steps", method=method, steps=6)
    assert torch.equal(polar(X, method=method, steps=5), polar(X, method=method))


@pytest.mark.parametrize("method", ["svd", "eigh", "qdwh", "zolo"])
def test_steps_of_a_method_that_takes_none_would_be_ignored(method):
    why = "is exact" if method in ("svd", "eigh") else "takes the steps that it converges in"
    for steps in (1, 2, 0, "5"):
        refuses(f"steps={steps!r} would have no effect: polar method '{method}' {why}",
                method=method, steps=steps)  # fmt: skip


@pytest.mark.parametrize("name", reference.NAMES)
def test_which_schedules_refuse_half_precision(name):
    gram = f"gram_{name}"
    if name == "cans":
        for method in (name, gram):
            for dtype in ("bfloat16", torch.float16):
                why = f"'{method}' does not work in {str(dtype).removeprefix('torch.')}: .* float32"
                refuses(why, method=method, compute_dtype=dtype)
        return
    for dtype in ("bfloat16", torch.bfloat16):
        refuses(f"'{gram}' does not work in bfloat16.*float32 or float16, or take '{name}'",
                method=gram, compute_dtype=dtype)  # fmt: skip
    for method, dtype in ((name, "bfloat16"), (name, "float16"), (gram, "float16")):
        check(method, None, dtype)


def test_exact_methods_refuse_what_they_would_not_compute_in():
    refuses("'eigh' computes in float64, not in float32", method="eigh", compute_dtype="float32")
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        refuses(f"'svd' computes in float32 or float64, not in {name}",
                method="svd", compute_dtype=dtype)  # fmt: skip
        refuses(f"'qdwh' computes in float32 or float64, not in {name}; write 'float32', or 'auto'",
                method="qdwh", compute_dtype=dtype)  # fmt: skip
    for name in ("float32", "float16", "bfloat16"):
        refuses(f"'zolo' computes in float64, not in {name}; write 'float64', or 'auto'",
                method="zolo", compute_dtype=name)  # fmt: skip
    for name in ("float32", "float64"):
        polar(X, method="qdwh", compute_dtype=name)
    polar(X, method="zolo", compute_dtype=torch.float64)
    polar(X, method="eigh", compute_dtype="float64")
    polar(X, method="svd", compute_dtype=torch.float32)


@pytest.mark.parametrize("dtype", ["bf16", "Float32", "int32", torch.int32, torch.complex64, 32])
def test_unknown_compute_dtype(dtype):
    refuses(r"unknown compute_dtype .* Known: auto, float16, bfloat16", compute_dtype=dtype)


def test_unknown_compute_dtype_names_the_nearest():
    refuses("'bfloat'; did you mean 'bfloat16'", compute_dtype="bfloat")


def test_what_is_no_matrix():
    for shape in ((), (3,)):
        refuses("polar takes matrices, \\(..., m, n\\)", x=torch.zeros(shape))
    for dtype in (torch.int64, torch.bool, torch.complex64):
        refuses(f"x is {dtype}; polar takes floating-point", x=torch.zeros(3, 4, dtype=dtype))


def test_empty_is_checked_all_the_same():
    refuses("unknown polar method", x=torch.empty(0, 3), method="nope")


def test_automatic_dtype():
    for method, x, device, expected in [
        ("jordan", torch.float32, CPU, torch.float32),
        ("jordan", torch.bfloat16, CPU, torch.float32),
        ("jordan", torch.float16, CPU, torch.float32),
        ("jordan", torch.float64, CPU, torch.float64),
        ("jordan", torch.float32, OTHER, torch.bfloat16),
        ("jordan", torch.float16, OTHER, torch.bfloat16),
        ("jordan", torch.float64, OTHER, torch.float64),
        ("gram_jordan", torch.float32, CPU, torch.float32),
        ("gram_jordan", torch.bfloat16, OTHER, torch.float32),
        ("gram_jordan", torch.float64, OTHER, torch.float64),
        ("cans", torch.bfloat16, OTHER, torch.float32),
        ("polar_express", torch.bfloat16, OTHER, torch.bfloat16),
        ("svd", torch.bfloat16, OTHER, torch.float64),
        ("eigh", torch.float32, CPU, torch.float64),
        ("qdwh", torch.bfloat16, CPU, torch.float32),
        ("qdwh", torch.float16, OTHER, torch.float32),
        ("qdwh", torch.float32, OTHER, torch.float32),
        ("qdwh", torch.float64, OTHER, torch.float64),
        ("zolo", torch.bfloat16, OTHER, torch.float64),
        ("zolo", torch.float32, CPU, torch.float64),
        ([[2, -1.5, 0.5]], torch.bfloat16, CPU, torch.float32),
        ([[2, -1.5, 0.5]], torch.bfloat16, OTHER, torch.bfloat16),
        ([[2, -1.5, 0.5]], torch.float64, OTHER, torch.float64),
        (CANS, torch.bfloat16, OTHER, torch.float32),
        (CANS, torch.float32, CPU, torch.float32),
    ]:
        for auto in (None, "auto"):
            assert resolve_dtype(method, auto, x, device) == expected, (method, x, device)


def test_dtype_as_text_or_as_dtype():
    for name in ("float16", "bfloat16", "float32", "float64"):
        dtype = getattr(torch, name)
        assert resolve_dtype("jordan", name, torch.float32, OTHER) == dtype
        assert resolve_dtype("jordan", dtype, torch.float32, CPU) == dtype
        assert torch.equal(polar(X, compute_dtype=name), polar(X, compute_dtype=dtype))


def test_float64_is_computed_on_request_for_float32():
    x = reference.gaussian(12, 20).float()
    u = polar(x, compute_dtype="float64")
    assert u.dtype == torch.float32
    assert torch.equal(u, reference.newton_schulz("jordan", 5, x).float())


# Schedules of one's own


@pytest.mark.parametrize("compute_dtype", [None, "float16", "bfloat16", "float32", "float64"])
def test_the_rows_of_a_name_are_the_name(compute_dtype):
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for shape in ((6, 20), (20, 6), (3, 6, 7)):
            x = reference.gaussian(*shape).to(dtype)
            named = polar(x, method="jordan", compute_dtype=compute_dtype)
            own = polar(x, method=JORDAN, compute_dtype=compute_dtype)
            assert torch.equal(own, named)
            assert own.dtype == dtype


def test_lists_tuples_json_and_whole_numbers_are_one():
    u = polar(X, method=TWO)
    for same in (tuple(map(tuple, TWO)), [tuple(row) for row in TWO], json.loads(json.dumps(TWO)),
                 [TWO[0], [2.0, -1.5, 0.5]]):  # fmt: skip
        assert torch.equal(polar(X, method=same), u)


def test_steps_past_the_end_repeat_the_last_row():
    for steps in (1, 2, 3, 7):
        table = [TWO[min(step, 1)] for step in range(steps)]
        assert torch.equal(polar(X, method=TWO, steps=steps), _own_reference(table))


def test_all_rows_are_the_default_and_in_order():
    assert torch.equal(polar(X, method=TWO), _own_reference(TWO))


def _own_reference(table):
    """Bitwise: the very loop, on X over its Frobenius norm."""
    start = unit_frobenius(X[None], torch.float64, 1.0)
    u = newton_schulz.standard(start, [tuple(row) for row in table])[0]
    s = torch.linalg.svdvals(X)
    s = s / s.norm()
    for a, b, c in table:
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(
        torch.linalg.svdvals(u), s.sort(descending=True).values, rtol=0, atol=1e-12
    )
    return u


@pytest.mark.parametrize(
    ("method", "match"),
    [
        ([], "at least one"),
        ([1.0, 2.0, 3.0], "row 1"),
        ([[1.0, 2.0]], "row 1"),
        ([TWO[0], [2, -1.5, 0.5, 0.1]], "row 2"),
        ([TWO[0], [2, -1.5, "x"]], "row 2"),
        ([TWO[0], [2, -1.5, [0.5]]], "row 2"),
        ([TWO[0], [2, -1.5, math.nan]], "row 2"),
        ([TWO[0], None], "row 2"),
        (["jordan"], "row 1"),
        ([[9.0, -1.0, 1.0]] * 5, "unstable: step "),
        ([TWO[0], [4.0, 1.0, 1.0]], "unstable: step 2"),
    ],
)
def test_schedules_that_are_refused(method, match):
    for _ in range(2):
        refuses(match, method=method)
        with pytest.raises(ValueError, match=match):
            check(method)


def test_the_check_runs_once_and_not_at_every_step(monkeypatch):
    calls = []
    monkeypatch.setattr(door, "check_rows", lambda *rows, **margin: calls.append(rows))
    monkeypatch.setattr(door, "_check_converged", lambda *options: calls.append(options))
    for function in (door._check, door._rows_of):
        function.cache_clear()
    for _ in range(3):
        polar(X, method=[[2, -1.5, 0.5]], steps=4)
        check([(2, -1.5, 0.5)], 4)
        polar(X, method="qdwh")
    assert calls.count((((2, -1.5, 0.5),),)) == 2  # for the options, and for the rows
    assert calls.count(("qdwh", None, None)) == 1
    assert len(calls) == 3
    for function in (door._check, door._rows_of):
        function.cache_clear()


def test_half_precision_of_ones_own_schedule_is_refused_where_it_diverges():
    for dtype in ("bfloat16", torch.float16):
        refuses("this schedule does not work in b?float16: it diverges", method=CANS,
                compute_dtype=dtype)  # fmt: skip
    check(CANS, None, "float32")
    check(TWO, None, "bfloat16")


def test_unknown_dtype_with_ones_own_schedule():
    refuses("unknown compute_dtype", method=TWO, compute_dtype="bf16")
    with pytest.raises(ValueError, match="unknown compute_dtype"):
        check(TWO, None, "bf16")
