"""Options, dtypes, shapes and error texts of polar()."""

import pytest
import torch

from spectral_dist.polar import METHODS, check, polar, resolve_dtype
from tests.reference import polar as reference

CPU, OTHER = torch.device("cpu"), torch.device("meta")
X = reference.gaussian(4, 6)


def refuses(match, x=X, **options):
    with pytest.raises(ValueError, match=match):
        polar(x, **options)


def test_methods():
    assert sorted(METHODS) == sorted(
        reference.NAMES + ["gram_" + name for name in reference.NAMES] + ["svd", "eigh"]
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


@pytest.mark.parametrize("method", ["qdwh", "zolo", None, 3])
def test_methods_of_later_releases_are_unknown(method):
    with pytest.raises(ValueError, match=r"unknown polar method .*\. Known: jordan") as error:
        polar(X, method=method)
    assert str(error.value).count("qdwh") == (method == "qdwh")
    assert str(error.value).count("zolo") == (method == "zolo")


@pytest.mark.parametrize("steps", [0, -3, 2.5, "5", True, False])
@pytest.mark.parametrize("method", ["jordan", "gram_cans"])
def test_steps_must_be_a_positive_integer(method, steps):
    refuses("it must be a whole number, at least 1", method=method, steps=steps)


@pytest.mark.parametrize("method", ["cubic5", "gram_cubic5"])
def test_cubic5_is_five_steps(method):
    refuses("steps is 6; cubic5 has exactly 5 steps", method=method, steps=6)
    assert torch.equal(polar(X, method=method, steps=5), polar(X, method=method))


@pytest.mark.parametrize("method", ["svd", "eigh"])
def test_steps_of_an_exact_method_would_be_ignored(method):
    refuses(
        f"steps=5 would have no effect: polar method '{method}' is exact", method=method, steps=5
    )


@pytest.mark.parametrize("method", ["gram_" + name for name in reference.NAMES if name != "cans"])
@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_gram_refuses_bfloat16(method, dtype):
    refuses(f"'{method}' does not work in bfloat16.*float32 or float16, or take '{method[5:]}'",
            method=method, compute_dtype=dtype)  # fmt: skip


@pytest.mark.parametrize("method", ["cans", "gram_cans"])
@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_cans_refuses_half_precision(method, dtype):
    name = str(dtype).removeprefix("torch.")
    refuses(f"'{method}' does not work in {name}: .* float32", method=method, compute_dtype=dtype)


def test_exact_methods_refuse_what_they_would_not_compute_in():
    refuses("'eigh' computes in float64, not in float32", method="eigh", compute_dtype="float32")
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        refuses(f"'svd' computes in float32 or float64, not in {name}",
                method="svd", compute_dtype=dtype)  # fmt: skip
    polar(X, method="eigh", compute_dtype="float64")
    polar(X, method="svd", compute_dtype=torch.float32)


@pytest.mark.parametrize("dtype", ["bf16", "Float32", "int32", torch.int32, torch.complex64, 32])
def test_unknown_compute_dtype(dtype):
    refuses(r"unknown compute_dtype .* Known: auto, float16, bfloat16", compute_dtype=dtype)


def test_unknown_compute_dtype_names_the_nearest():
    refuses("'bfloat'; did you mean 'bfloat16'", compute_dtype="bfloat")


@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_vector_is_not_a_matrix(shape):
    refuses("polar takes matrices, \\(..., m, n\\)", x=torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_numbers_must_be_floating(dtype):
    refuses(f"x is {dtype}; polar takes floating-point", x=torch.zeros(3, 4, dtype=dtype))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 4, 6), (4, 0), (0, 6), (2, 0, 3, 5), (3, 4, 0)])
def test_empty(method, shape):
    x = torch.empty(shape, dtype=torch.bfloat16)
    u = polar(x, method=method)
    assert (u.shape, u.dtype) == (x.shape, x.dtype)


def test_empty_is_checked_all_the_same():
    refuses("unknown polar method", x=torch.empty(0, 3), method="nope")


@pytest.mark.parametrize("auto", [None, "auto"])
@pytest.mark.parametrize(
    ("method", "x", "device", "expected"),
    [
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
    ],
)
def test_automatic_dtype(auto, method, x, device, expected):
    assert resolve_dtype(method, auto, x, device) == expected


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_dtype_as_text_or_as_dtype(name):
    dtype = getattr(torch, name)
    assert resolve_dtype("jordan", name, torch.float32, OTHER) == dtype
    assert resolve_dtype("jordan", dtype, torch.float32, CPU) == dtype
    assert torch.equal(polar(X, compute_dtype=name), polar(X, compute_dtype=dtype))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_result_has_the_dtype_of_x_and_is_new_and_contiguous(method, dtype):
    wide = torch.arange(60, dtype=torch.float64).cos().to(dtype)
    for x in (wide.view(6, 10), wide.view(6, 10).mT, wide.view(2, 5, 6)[:, ::2], wide.view(1, 60)):
        before = x.clone()
        u = polar(x, method=method)
        assert (u.shape, u.dtype) == (x.shape, dtype)
        assert u.is_contiguous()
        assert torch.equal(x, before)
        assert u.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        assert torch.equal(u, polar(x.contiguous(), method=method))


def test_float64_is_computed_on_request_for_float32():
    x = reference.gaussian(12, 20).float()
    u = polar(x, compute_dtype="float64")
    assert u.dtype == torch.float32
    assert torch.equal(u, reference.newton_schulz("jordan", 5, x).float())


def test_parameters_need_no_no_grad():
    x = torch.nn.Parameter(X)
    for method in METHODS:
        assert not polar(x, method=method).requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_autocast_changes_nothing(method):
    x = X.float()
    compute_dtype = "float32" if method == "svd" else None
    expected = polar(x, method=method, compute_dtype=compute_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(polar(x, method=method, compute_dtype=compute_dtype), expected)
