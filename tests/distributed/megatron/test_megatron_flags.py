"""Flags of the Megatron integration, in Megatron's own parsers and in others."""

from __future__ import annotations

import argparse
import dataclasses
import importlib

import pytest

from tests.distributed.megatron import megatron_runs as runs
from tests.support import harness, megatron_cpu
from tests.support import megatron_model as models

NEW = "0.19.2"


def flags(arguments, late):
    """The optimizer that a script with our flags gets, whether it trains with Megatron's name."""
    runs.build(NEW, "adam")
    from megatron.core import optimizer as module

    from spectral_dist.integrations.megatron import add_spectral_args
    from spectral_dist.integrations.megatron.arguments import forget

    parser = argparse.ArgumentParser()
    parser.add_argument("--optimizer", default="adam", choices=["adam", "sgd"])
    args = add_spectral_args(parser).parse_args(arguments)
    ddp = models.wrap(models.gpt())
    config = models.optimizer_config(ddp, optimizer=args.optimizer)
    build = module.get_megatron_optimizer
    try:
        built = (build.__wrapped__ if late else build)(config, [ddp])
    except ValueError as error:
        return str(error)
    finally:
        forget()
    found = runs.inner(built)[0]
    options = dataclasses.asdict(found.options) if hasattr(found, "options") else {}
    return args.optimizer, getattr(args, "spectral_optimizer", None), type(found).__name__, options


def test_flags_choose_and_configure():
    arguments = ["--optimizer", "spectral_muon", "--spectral-momentum", "0.9",
                 "--spectral-polar", "polar_express", "--spectral-scalars", '["linear_proj"]',
                 "--spectral-nesterov", "false"]  # fmt: skip
    megatrons, ours, cls, options = harness.run(1, flags, arguments, False, pool=NEW)[0]
    assert (megatrons, ours, cls) == ("adam", "spectral_muon", "SpectralMuon")
    assert (options["momentum"], options["polar"]) == (0.9, "polar_express")
    assert options["nesterov"] is False
    assert options["betas"] == (0.9, 0.999)
    assert "imported before" in harness.run(1, flags, arguments, True, pool=NEW)[0]
    plain = harness.run(1, flags, ["--optimizer", "adam"], False, pool=NEW)[0]
    assert plain[:3] == ("adam", None, "AdamW")


def test_flags_of_another_optimizer_are_errors():
    arguments = ["--optimizer", "spectral_muon", "--spectral-quantile", "0.9"]
    text = harness.run(1, flags, arguments, False, pool=NEW)[0]
    assert "unknown option 'quantile'" in text
    arguments = ["--optimizer", "adam", "--spectral-momentum", "0.9"]
    text = harness.run(1, flags, arguments, False, pool=NEW)[0]
    assert "--spectral-momentum" in text


def own_flag(parser):
    """A script's own extra_args_provider, as modelopt's."""
    parser.add_argument("--own-flag", type=int)
    return parser


def real_parser(order, arguments, providers):
    """What Megatron-LM's own parser, of the 0.19.2 wheel, makes of it with each provider.

    ``order``: whether ours is imported before megatron.training, or after it.
    """
    import sys
    import typing

    import typing_extensions

    typing.override = typing_extensions.override  # Python 3.12's
    megatron_cpu.install(NEW)
    if order == "last":
        importlib.import_module("megatron.training.arguments")
    from spectral_dist.integrations.megatron import add_spectral_args
    from spectral_dist.integrations.megatron.arguments import forget, parsed

    known = {"none": None, "ours": add_spectral_args, "own": own_flag}
    import megatron.training.arguments as module

    before, sys.argv = sys.argv, ["pretrain_gpt.py", *arguments]
    found = []
    try:
        for provider in providers:
            args = module.parse_args(known[provider], ignore_unknown_args=True)
            kept = args.optimizer, args.use_distributed_optimizer, getattr(args, "own_flag", None)
            found.append((*kept, args.spectral_optimizer, parsed()))
    finally:
        sys.argv = before
        forget()
    return found


@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.slow
def test_the_import_is_enough_for_every_parse_of_megatrons(order):
    arguments = ["--optimizer", "spectral_muon", "--use-distributed-optimizer",
                 "--spectral-scale", "spectral", "--spectral-momentum", ".9",
                 "--own-flag", "3"]  # fmt: skip
    options = {"scale": "spectral", "momentum": 0.9}
    providers = ["none", "ours", "own", "none"]
    found = harness.run(1, real_parser, order, arguments, providers, pool=f"parser, {order}")[0]
    for provider, given in zip(providers, found, strict=True):
        own = 3 if provider == "own" else None
        assert given == ("adam", True, own, "spectral_muon", ("spectral_muon", options))


def numbers(texts):
    """What --spectral-momentum and --spectral-polar-steps make of each text."""
    megatron_cpu.install(NEW)
    from spectral_dist.integrations.megatron import add_spectral_args
    from spectral_dist.integrations.megatron.arguments import forget

    parser = add_spectral_args(add_spectral_args(argparse.ArgumentParser()))  # twice is once
    try:
        return [parser.parse_args(["--optimizer", "spectral_muon", f"--spectral-momentum={text}"])
                .spectral_momentum for text in texts]  # fmt: skip
    finally:
        forget()


def test_a_number_is_what_python_takes_for_one():
    texts = {".95": 0.95, "1.": 1.0, "+0.9": 0.9, "1e-3": 0.001, "-.5": -0.5, "+5": 5, "5": 5,
             "[0.5, 1]": [0.5, 1], "true": True, "null": None, "svd": "svd"}  # fmt: skip
    found = harness.run(1, numbers, list(texts), pool=NEW)[0]
    assert found == list(texts.values())
    assert [type(value) for value in found] == [type(value) for value in texts.values()]


def restored(arguments):
    """The arguments, and what ours is told, after a checkpoint of spectral_muon's was read."""
    megatron_cpu.install(NEW)
    from spectral_dist.integrations.megatron import add_spectral_args
    from spectral_dist.integrations.megatron.arguments import forget, parsed, restore

    def parser():
        plain = argparse.ArgumentParser()
        plain.add_argument("--optimizer", default="adam", choices=["adam", "sgd"])
        return add_spectral_args(plain)

    try:
        saved = parser().parse_args(
            ["--optimizer", "spectral_muon", "--spectral-momentum=.9", "--spectral-polar-steps=6"]
        )
        args = parser().parse_args(arguments)
        restore(args, saved)
        parser().parse_args(arguments)  # Megatron parses again, later
        return args.optimizer, vars(args).get("spectral_optimizer"), parsed()
    finally:
        forget()


@pytest.mark.parametrize(
    ("arguments", "optimizer", "options"),
    [
        ([], "spectral_muon", {"momentum": 0.9, "polar_steps": 6}),
        (["--spectral-momentum", ".8"], "spectral_muon", {"momentum": 0.8, "polar_steps": 6}),
        (["--optimizer", "spectral_muon"], "spectral_muon", {"momentum": 0.9, "polar_steps": 6}),
        (["--optimizer", "spectral_root"], "spectral_root", {}),
        (["--optimizer", "adam"], None, {}),
    ],
)
def test_arguments_of_a_checkpoint_are_ours_too_unless_flags_say_otherwise(
    arguments, optimizer, options
):
    found = harness.run(1, restored, arguments, pool=NEW)[0]
    assert found == ("adam", optimizer, (optimizer, options))
