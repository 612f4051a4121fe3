"""What errors say of DeepSpeed, Megatron-core and their versions."""

TEXTS: dict[str, tuple[str, ...]] = {
    "spectral-optimizers-do-not-support": (r"spectral optimizers do not support ",),
    "autotp-has-cut-a-model-in-a-way-that-does-not-fit": (
        r"AutoTP has cut .* in a way that is not supported",
        r"has parts for .* ranks only",
        r"after AutoTP had cut it",
        r"has cut this model by AutoTP",
        r"which AutoTP has cut, and",
        r"as AutoTP has cut other matrices unevenly",
        r"POET rotates whole weights, and AutoTP",
    ),
    "this-model-is-already-wrapped-by-a-deepspeed-engine": (
        r"this model is already wrapped by a DeepSpeed engine",
    ),
    "has-taken-this-engines-model-over": (r"has taken this engine's model over",),
    "this-optimizer-already-belongs-to-a-deepspeed-engine": (
        r"this optimizer already belongs to a DeepSpeed engine",
    ),
    "has-been-replaced-by-which-has-got-its-parameter-groups": (
        r"has been replaced by .*, which has got its parameter groups",
    ),
    "is-the-optimizer-that-deepspeed-builds-from-its-json": (
        r"is the optimizer that DeepSpeed builds from its JSON",
    ),
    "model_parameters-leaves-out": (r"model_parameters leaves out ",),
    "has-no-matrix-state": (r"has no matrix state",),
    "so-zero-3-applies-that-of-an-earlier-step-again": (
        r"so ZeRO-3 applies that of an earlier step again",
    ),
    "holds-no-checkpoint-of-deepspeed": (r"holds no checkpoint of DeepSpeed",),
    "which-is-no-checkpoint-in": (r", which is no checkpoint in ",),
    "exclude_frozen_parameters-leaves-out-w": (r"exclude_frozen_parameters leaves out W",),
    "enginebackward-multiplies-the-loss-by": (
        r"engine\.backward multiplies the loss by",
        r"engine\.backward\(loss\) has not gone through",
    ),
    "was-imported-before-spectral_distintegrationsmegatron": (
        r"was imported before spectral_dist\.integrations\.megatron",
    ),
    "would-have-no-effect-with-optimizer": (r"would have no effect with --optimizer",),
    "is-megatrons-own-setting": (
        r"is Megatron's own setting",
        r"OptimizerConfig has no lr",
    ),
    "config_overrides-has-optimizer": (r"config_overrides has optimizer=",),
    "each-stage-would-fit-coefficients-of-its-own": (
        r"each stage would fit coefficients of its own",
    ),
    "model_chunks-must-be-wrapped-by-megatroncoredistributeddistributeddataparallel": (
        r"model_chunks must be wrapped by megatron\.core",
    ),
    "the-attributes-of-its-parameters-are-not-those-of-a-known-megatron-core": (
        r"the attributes of its parameters are not those of a known megatron-core",
        r"no parameter of the model is marked as",
        r"but no parameter is marked as one",
    ),
    "a-layer-of-megatrons-packs-matrices-in-a-way-that-is-not-supported": (
        r"packs parts of different sizes",
        r"Megatron's GroupedMLP packs all experts",
        r"gate and up interleaved in blocks are not supported",
        r"columns cut with stride",
    ),
    "so-their-states-could-not-be-told-apart": (r"so their states could not be told apart",),
    "written-without-the-other-ranks": (r"written without the other ranks",),
    "works-with-deepspeed-or-works-with-megatron-core": (
        r"works with deepspeed ",
        r"works with megatron-core ",
        r"works with .* is installed: install that one \(pip",
        r"works with Axolotl ",
        r"DeepSpeedEngine\..* takes .* in place of",
        r"where spectral_dist looks for it",
    ),
    "its-layout-is-not-this-release-knows": (
        r"its layout is not (?:one that|the one) this release knows",
        r"is no view of its ZeRO group's flat buffer",
    ),
}
"""Anchor -> regular expressions of the texts that it explains."""
