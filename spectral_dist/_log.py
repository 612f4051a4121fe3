"""The logger of this package: ``logging.getLogger("spectral_dist")``."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("spectral_dist")


class _StderrUnlessConfigured(logging.Handler):
    """Write to stderr until the program sets up logging of its own.

    Python drops INFO where nobody has configured logging, and which parameters are matrices is
    something that every user should see.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, unless the root or this logger has another handler."""
        if not logging.getLogger().handlers and logger.handlers == [self]:
            sys.stderr.write(self.format(record) + "\n")


if not logger.handlers:
    _handler = _StderrUnlessConfigured()
    _handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logger.addHandler(_handler)
if logger.level == logging.NOTSET:
    logger.setLevel(logging.INFO)
