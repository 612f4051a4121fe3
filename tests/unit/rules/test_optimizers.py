"""The classes that users name: made of the registry, and what editors are told of them."""

from __future__ import annotations

import ast
import inspect

import pytest

import spectral_dist
from spectral_dist import optimizers
from spectral_dist.core import named
from spectral_dist.rules import registry
from spectral_dist.rules.fields import specs_of

OWN = registry.builtin_entries()


def test_the_stub_is_that_of_the_registry() -> None:
    """Else write it anew: python -m spectral_dist.core.named > spectral_dist/optimizers.pyi"""
    path = inspect.getfile(optimizers) + "i"
    with open(path, encoding="utf-8") as file:
        assert ast.dump(ast.parse(file.read())) == ast.dump(ast.parse(named.stub()))


@pytest.mark.parametrize("entry", OWN, ids=lambda entry: entry.name)
def test_signature_and_help(entry: registry.Entry) -> None:
    cls = getattr(spectral_dist, entry.title)
    parameters = inspect.signature(cls).parameters
    options = entry.options()
    for name, spec in specs_of(entry.options).items():
        assert parameters[name].default == getattr(options, name)
        assert f"{name}: {spec.doc}" in cls.__doc__
    assert "W <- " in cls.__doc__
    assert "arXiv" in cls.__doc__
    assert f"spectral_dist.{entry.title}(groups, " in cls.__doc__
    assert cls.__name__ == entry.title


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Muoon'"):
        spectral_dist.Muoon  # noqa: B018
