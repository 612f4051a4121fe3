"""launch/pretrain.py for --engine megatron where there is no GPU: VERSION, then its arguments."""

import sys

from spectral_dist.launch import megatron_config, pretrain
from tests.support import megatron_cpu

if __name__ == "__main__":  # a multiprocessing manager imports this again
    megatron_cpu.install(sys.argv.pop(1))
    megatron_config.prepare = lambda: None
    pretrain.app()
