"""``swift sft`` on CPUs: torchrun starts it.

Args: where each rank's records go, and swift's own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.support import recorded


def main(records: str, *words: str) -> None:
    recorded.record(Path(f"{records}{os.environ['RANK']}.pt"))
    from swift import sft_main

    sft_main(list(words))


if __name__ == "__main__":
    main(*sys.argv[1:])
