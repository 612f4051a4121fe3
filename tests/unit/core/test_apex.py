"""scalar_backend "apex": what is said when NVIDIA's is not there, and what is handed to it.

The real apex cannot be installed here: it is built from source with nvcc for a GPU, and this
machine has neither. So its kernels are not run by any test; one stand-in, written from FusedAdam's
interface, checks what it would be given.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

import spectral_dist

ERROR = "scalar_backend is 'apex', but {}.*github.com/NVIDIA/apex.*on PyPI is an unrelated.*'torch'"


@pytest.fixture(autouse=True)
def no_apex(monkeypatch):
    """Whatever a test imports as apex is forgotten afterwards."""
    for name in ("apex", "apex.optimizers", "amp_C"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    for name in [n for n in sys.modules if n == "apex" or n.startswith("apex.")]:
        del sys.modules[name]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6))


def build(found=None, **options):
    groups = spectral_dist.param_groups(found or model())
    return spectral_dist.Muon(groups, **{"lr": 0.02, "scalar_backend": "apex", **options})


def package(folder, monkeypatch, name, text):
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    return folder / name


def test_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(ValueError, match=ERROR.format("apex is not installed")):
        build()


@pytest.mark.parametrize(
    "text",
    ["", "def main(settings): pass", "from pyramid_of_2013 import Configurator", "print 'Python 2'",
     "raise RuntimeError('no settings')"],
)  # fmt: skip
def test_the_unrelated_package_of_pypi(text, tmp_path, monkeypatch):
    package(tmp_path, monkeypatch, "apex", text)
    with pytest.raises(ValueError, match=ERROR.format("the installed apex is not NVIDIA's")):
        build()


def test_without_cuda_extensions(tmp_path, monkeypatch):
    """Installed by pip from NVIDIA's source without --cuda_ext: Python files, but no kernels."""
    inside = package(tmp_path, monkeypatch, "apex", "")
    (inside / "optimizers.py").write_text("class FusedAdam: pass\n")
    with pytest.raises(ValueError, match=ERROR.format("its CUDA extensions do not load .*amp_C")):
        build()


def test_nothing_is_asked_of_apex_unless_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    assert build(scalar_backend="torch").options.scalar_backend == "torch"


class FusedAdam(torch.optim.Optimizer):
    """NVIDIA's interface: one step count per group, moments under Adam's names, decoupled decay."""

    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8,
                 adam_w_mode=True, weight_decay=0.0):  # fmt: skip
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps,
                                  "weight_decay": weight_decay,
                                  "bias_correction": bias_correction})  # fmt: skip

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = t = group.get("step", 0) + 1
            a, b = group["betas"]
            assert group["bias_correction"]
            for p in group["params"]:
                m, v = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
                g = p.grad
                m.mul_(a).add_(g, alpha=1 - a)
                v.mul_(b).add_(g * g, alpha=1 - b)
                u = (m / (1 - a**t)) / ((v / (1 - b**t)).sqrt() + group["eps"])
                p.sub_(group["lr"] * (u + group["weight_decay"] * p))


def test_what_fused_adam_is_given(monkeypatch):
    """States and results are those of the torch backend, also after different numbers of steps."""
    apex, optimizers = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    for module, name in ((apex, "apex"), (optimizers, "apex.optimizers")):
        module.__spec__ = types.SimpleNamespace(name=name)
        monkeypatch.setitem(sys.modules, name, module)
    optimizers.FusedAdam = FusedAdam
    monkeypatch.setitem(sys.modules, "amp_C", types.ModuleType("amp_C"))
    options = {"scalar_lr": 0.005, "scalar_weight_decay": 0.2, "betas": (0.8, 0.9), "eps": 1e-7}
    models = model(), model()
    fused, plain = (
        build(models[0], **options),
        build(models[1], **options, scalar_backend="torch"),
    )
    for step in range(4):
        for m in models:
            generator = torch.Generator().manual_seed(step)
            for name, p in m.named_parameters():
                g = torch.randn(p.shape, generator=generator)
                p.grad = None if step == 1 and name == "2.bias" else g
        for optimizer in (fused, plain):
            if step == 1:
                with pytest.warns(UserWarning, match=r"2\.bias has no gradient"):
                    optimizer.step()
            else:
                optimizer.step()
        for group in fused.param_groups + plain.param_groups:
            group["lr"] *= 0.5  # a scheduler
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6, msg=name)
        assert fused.state[p].keys() == plain.state[q].keys()
        for key, value in fused.state[p].items():
            torch.testing.assert_close(value, plain.state[q][key], rtol=1e-5, atol=1e-7, msg=key)
    assert float(fused.state[models[0][2].bias]["step"]) == 3
    assert float(fused.state[models[0][2].weight]["step"]) == 4
