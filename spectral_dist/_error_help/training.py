"""What errors say while a model trains, is sharded or is converted for POET."""

TEXTS: dict[str, tuple[str, ...]] = {
    "the-gradient-of-is-nan-or-infinite": (r"the gradient of .* is NaN or infinite",),
    "the-last-step-was-not-applied": (
        r"the last step was not applied",
        r"so the step was not applied",
    ),
    "the-gradient-of-is-sparse": (r"the gradient of .* is sparse",),
    "no-parameter-has-a-gradient-call-backward-before-step": (
        r"no parameter has a gradient; call backward",
    ),
    "has-no-gradient-on-rank-but-has-one-on-rank": (
        r"has no gradient on rank .*, but has one on rank",
        r"no parameter has a gradient on rank",
    ),
    "so-the-step-would-differ-between-ranks-write-the-same-on-every-rank": (
        r"so the step would differ between ranks; write the same on every rank",
        r"the parameter groups begin with ",
        r"the monitor's every is ",
    ),
    "the-ranks-do-not-agree-where-the-matrices-live": (r"the ranks do not agree ",),
    "is-now-n-but-was-m-n": (r"when the optimizer was built, so something shards it",),
    "is-not-the-parameter-that-this-optimizer-has": (
        r"is not the parameter that this optimizer has",
    ),
    "this-optimizer-has-taken-steps-or-a-checkpoint-where-its-parameters-lived-before": (
        r"this optimizer has taken steps, or a checkpoint, where",
    ),
    "is-not-contiguous": (r"is not contiguous; call",),
    "the-model-is-inside-of-torchs-join": (r"the model is inside of torch's Join",),
    "cannot-be-copied-or-pickled": (
        r"cannot be copied or pickled",
        r"was pickled by a release that left most of it out",
    ),
    "parameters-of-poet-cannot-be-averaged": (
        r"parameters of POET cannot be averaged",
        r"something averages the parameters of this model",
    ),
    "poet-at-the-merge-after-step": (r"POET: at the merge after step",),
    "project_gradients": (
        r"project_gradients: ",
        r"project_gradients is for ",
    ),
    "reduce_to_owners": (
        r"reduce_to_owners: ",
        r"reduce_to_owners is for ",
        r"reduce_to_owners has no effect",
        r"and must be the DistributedDataParallel itself",
        r"is not of this model$",
        r"is channels_last; leave the model contiguous",
        r"is for parameters that every rank of the DistributedDataParallel holds whole",
        r"the model has a communication hook already",
    ),
    "the-loss-of-step-is": (r"the loss of step ",),
    "is-a-tile-that-distributeddataparallel-has-made-of-a-dtensor": (
        r"is a tile that DistributedDataParallel has made of a DTensor",
    ),
    "is-not-reduced-by-distributeddataparallel-which-was-made-before-it": (
        r"is not reduced by DistributedDataParallel, which was made before it",
    ),
    "fsdp2-takes-one-dtype-of-all-that-trains-in-a-module": (
        r"FSDP2 takes one dtype of all that trains in a module",
    ),
    "is-replicated-by-its-mesh-and-by-process_group": (
        r"is replicated by its mesh .* and by process_group",
    ),
    "does-not-number-its-ranks-upwards": (r"does not number its ranks upwards",),
    "a-dtensors-placements-are-not-supported": (
        r"on mesh dimension .*; shard or replicate it",
        r"this order of shardings is not supported",
        r"is cut beyond its second dimension",
    ),
    "poet-knows-no-tensor-parallelism-by-dtensors": (
        r"POET knows no tensor parallelism by DTensors",
    ),
    "frozen-and-only-spectral_distpoet": (r"frozen, and only spectral_dist\.POET",),
    "trains-the-rotations-of-a-model-that-has-converted-this-one-has-none": (
        r"trains the rotations of a model",
        r"POET orthogonalizes no matrix; it trains",
    ),
    "does-not-divide-its-dimension": (r"does not divide its dimension",),
    "a-size-of-block-blocks-or-segments": (
        r"at least 2, or two of them for",
        r"write from 2 to its dimension",
        r"cannot be cut into .* equal segments",
        r"the fully stochastic form draws from whole dimensions",
        r"is a part of the outputs, and its inputs are the layer's",
        r"write patterns and sizes, as in",
    ),
    "no-multiple-of-the-ranks-that-this-dimension-is-cut-over": (
        r"is no multiple of the .* ranks that this dimension is cut over",
        r"the optimizer's segments, .*, are no multiple of it",
    ),
    "convert-the-model-before-it-is-wrapped-or-compiled": (
        r"convert the model before it is wrapped or compiled",
        r"is sharded already; convert the model first",
        r"the model is wrapped in .* already; call it on the GPTModel",
    ),
    "has-been-converted-already": (
        r"this model has been converted already",
        r"the model has been converted by spectral_dist\.poet\.convert already",
        r"has converted this model with other settings",
    ),
    "matches-no-nnlinear": (
        r"matches .*, no nn\.Linear",
        r"only hidden layers that are a ColumnParallelLinear",
    ),
    "the-model-has-no-to-rotate": (
        r"has no nn\.Linear to rotate",
        r"has no ColumnParallelLinear or RowParallelLinear to rotate",
    ),
    "have-one-weight-which-cannot-be-rotated-in-two-layers": (
        r"have one weight, which cannot be rotated in two layers",
    ),
    "is-on-the-meta-device": (r"is on the meta device",),
    "megatrons-layers-that-poet-cannot-rotate": (
        r"poet\.convert: .* is .*; or leave it out: scalars=",
        r"of linear_qkv are no whole query groups",
        r"a rotated layer multiplies by its own weight only",
    ),
    "poets-weights-stored-in-8-bits-or-on-nvme": (r"POET under DeepSpeed: ",),
}
"""Anchor -> regular expressions of the texts that it explains."""
