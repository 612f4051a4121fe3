"""Versions of trainers that an integration reaches into, and therefore knows or refuses."""

from __future__ import annotations


def require(
    title: str,
    package: str,
    installed: str,
    known: str,
    instead: str = "a release of spectral_dist that knows this one",
) -> None:
    """Raise unless the installed version of a trainer is the known one.

    Args:
        title: of the trainer.
        package: its name, for pip.
        installed: its version.
        known: the version that the tests run.
        instead: what else to do than to install that one.

    Raises:
        ImportError: says which version works.
    """
    if installed != known:
        raise ImportError(
            f"this release of spectral_dist works with {title} {known}, and {installed} is"
            f" installed: install that one (pip install '{package}=={known}'), or {instead}"
        )
