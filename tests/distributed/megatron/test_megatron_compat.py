"""Which versions of megatron-core work, and that these have every name that is not documented."""

from __future__ import annotations

import pytest

from tests.support import harness, megatron_cpu


def contract(version):
    """Names that are missing; and what is said of other versions, None if they may be imported."""
    megatron_cpu.install(version)
    from spectral_dist.integrations.megatron import _compat

    said = {}
    for number in ("0.15.3", "0.16.0", "0.16.1", "0.17.0rc0", "0.18.2", "0.19.2+abc123", "0.20.0"):
        try:
            _compat.check(number)
            said[number] = None
        except ImportError as error:
            said[number] = str(error)
    try:
        _compat.check(version, ["megatron.core.optimizer.moved"])
    except ImportError as error:
        said["moved"] = str(error)
    return _compat.missing(), said


@pytest.mark.parametrize("version", megatron_cpu.VERSIONS)
def test_versions_are_known_or_refused(version):
    missing, said = harness.run(1, contract, version, pool=version)[0]
    assert missing == []
    assert [number for number, text in said.items() if text is None] == [
        "0.16.1", "0.17.0rc0", "0.18.2", "0.19.2+abc123",
    ]  # fmt: skip
    for number in ("0.15.3", "0.16.0", "0.20.0"):
        assert f"0.16.1 to 0.19.x, and {number} is installed" in said[number]
    assert f"{version} calls itself one, but has no megatron.core.optimizer.moved" in said["moved"]


def gone(version):
    """Names that are missing where two have been taken away."""
    megatron_cpu.install(version)
    from megatron.core import optimizer
    from megatron.core.transformer import transformer_layer

    from spectral_dist.integrations.megatron import _compat

    function, layer = optimizer._get_param_groups, transformer_layer.TransformerLayer
    try:
        del optimizer._get_param_groups
        transformer_layer.TransformerLayer = lambda config, number: None
        return _compat.missing()
    finally:
        optimizer._get_param_groups, transformer_layer.TransformerLayer = function, layer


def test_what_has_moved_is_listed():
    version = megatron_cpu.VERSIONS[0]
    assert harness.run(1, gone, version, pool=version)[0] == [
        "megatron.core.optimizer._get_param_groups",
        "megatron.core.transformer.transformer_layer.TransformerLayer(layer_number=)",
    ]
