"""ms-swift: the file that --external_plugins names; it puts our optimizers into swift's map.

NPROC_PER_NODE=2 swift sft --model MODEL --dataset DATA --external_plugins ms_swift_plugin.py
--optimizer spectral_muon --optim_args scalar_lr=0.003 --learning_rate 0.01; or in place of swift

torchrun --nproc_per_node 2 -m swift.cli.sft --external_plugins examples/ms_swift_plugin.py
"""

import spectral_dist.integrations.ms_swift  # noqa: F401
