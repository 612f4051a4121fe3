"""Classes of optimizers, made of registered rules: signature, documentation and an example."""

from __future__ import annotations

import inspect
import sys
from dataclasses import fields
from functools import cache
from typing import Any

from spectral_dist._error_help import explained
from spectral_dist.core.optimizer import SpectralOptimizer
from spectral_dist.rules import registry
from spectral_dist.rules.fields import specs_of
from spectral_dist.rules.registry import Entry

_COMMON = """\
    params: ``spectral_dist.param_groups(model)``; or parameters, or groups of them, that
        ``spectral_dist.tag(model)`` has tagged.
    process_group: the ranks that hold replicas of plain parameters. None: those of the
        DistributedDataParallel that ``param_groups`` was given, or this process alone.
    placement: where parameters live, from a framework's integration; None: as torch has them."""


@cache
def class_of(entry: Entry) -> type[SpectralOptimizer]:
    """Return the torch optimizer of a rule, one class for each.

    Args:
        entry: an optimizer that has a rule.
    """
    assert entry.rule is not None
    options = entry.options
    self_parameter = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)

    def __init__(self: SpectralOptimizer, params: Any, *args: Any, **kwargs: Any) -> None:
        with explained:
            super(made, self).__init__(params, *args, **kwargs)

    signature = signature_of(entry)
    __init__.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[self_parameter, *signature.parameters.values()]
    )
    __init__.__doc__ = "Build the optimizer; see the class."
    namespace = {
        "__module__": "spectral_dist.optimizers",
        "__qualname__": entry.title,
        "__doc__": documentation(entry),
        "__init__": __init__,
        "rule": entry.rule(),
        "options_type": options,
    }
    made: type[SpectralOptimizer] = type(entry.title, (SpectralOptimizer,), namespace)
    return made


def signature_of(entry: Entry) -> inspect.Signature:
    """Return the signature of an optimizer's class: params, lr, and every option by keyword."""
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    keyword = inspect.Parameter.KEYWORD_ONLY
    defaults = {each.name: each.default for each in fields(entry.options)}
    hints = {each.name: each.type for each in fields(entry.options)}
    parameters = [
        inspect.Parameter("params", positional, annotation="Iterable[Any]"),
        inspect.Parameter("lr", positional, default=defaults["lr"], annotation=hints["lr"]),
        inspect.Parameter("process_group", keyword, default=None, annotation="Group"),
        inspect.Parameter("placement", keyword, default=None, annotation="Placement | None"),
    ]
    parameters += [
        inspect.Parameter(name, keyword, default=defaults[name], annotation=hints[name])
        for name in specs_of(entry.options)
        if name != "lr"
    ]
    return inspect.Signature(parameters, return_annotation=None)


def documentation(entry: Entry) -> str:
    """Return the docstring of an optimizer's class: its rule's, arguments and an example."""
    assert entry.rule is not None
    rule = inspect.cleandoc(entry.rule.__doc__ or f"{entry.title}.")
    described = "\n".join(
        f"    {name}: {spec.doc}" for name, spec in specs_of(entry.options).items() if spec.doc
    )
    example = entry.rule.example or "lr=1e-3"
    return (
        f"{rule}\n\nWhat is no matrix is trained by AdamW. Numbers do not depend on how the model"
        f" is sharded.\n\nArgs:\n{_COMMON}\n{described}\n\nRaises:\n"
        "    ValueError: unknown or bad options, frozen or untagged parameters.\n\nExample:\n"
        f"    >>> groups = spectral_dist.param_groups(model)\n"
        f"    >>> optimizer = spectral_dist.{entry.title}(groups, {example})\n"
    )


def stub() -> str:
    """Return ``spectral_dist/optimizers.pyi``: the classes of this package's rules, for editors.

    ``python -m spectral_dist.core.named > spectral_dist/optimizers.pyi`` writes it anew.
    """
    entries = sorted(registry.builtin_entries(), key=lambda e: (not e.title.isupper(), e.title))
    lines = [
        '"""Made by `python -m spectral_dist.core.named`: the optimizers, as editors see them."""',
        "from collections.abc import Iterable, Mapping, Sequence",
        "from typing import Any",
        "from spectral_dist.core.optimizer import SpectralOptimizer",
        "from spectral_dist.placement.base import Placement",
        "from spectral_dist.sharding.collectives import Group",
        f"__all__ = {[entry.title for entry in entries]!r}",
    ]
    for entry in entries:
        lines += [f"class {entry.title}(SpectralOptimizer):", "    def __init__(self, "]
        parameters = list(signature_of(entry).parameters.values())
        for before, each in zip([None, *parameters], parameters, strict=False):
            if each.kind is each.KEYWORD_ONLY and before and before.kind is not before.KEYWORD_ONLY:
                lines.append("        *,")
            default = "" if each.default is each.empty else f" = {each.default!r}"
            lines.append(f"        {each.name}: {each.annotation}{default},")
        lines.append("    ) -> None: ...")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(stub())
