"""What errors say under other trainers."""

TEXTS: dict[str, tuple[str, ...]] = {
    "keeps-state-at-the-owners-of-matrices-alone-and-the-trainer-saves-that-of-rank-0": (
        r"keeps state at the owners of matrices alone, and the Trainer saves that of rank 0",
    ),
    "spectralcallback-the-deepspeed-json-names-an-optimizer": (
        r"SpectralCallback: the DeepSpeed JSON names an optimizer",
    ),
    "spectralcallback-the-optimizer-is": (r"SpectralCallback: the optimizer is a ",),
    "optim_args": (r"optim_args: ",),
    "spectral-in-a-trainers-yaml": (
        r"spectral is .*; write \{optimizer: muon",
        r"spectral has .*; write .* beside spectral",
        r"the arguments are .*; write the YAML first",
    ),
    "beside-the-trainers-optimizer": (
        r"names an optimizer, and so does DeepSpeed's JSON",
        r"optimizer is .*, and spectral names another",
        r"has no effect on (spectral's optimizer|--optimizer )",
        r"relora resets AdamW's state",
        r"(adapter|finetuning_type|--tuner_type|lora_rank) is .*, but POET rotates the weights",
        r"qat\.enable is True, but POET rotates the weights",
        r" is .* beside spectral: leave one of them out",
        r"spectral runs (under the trainers of transformers alone|in )",
    ),
    "a-trainers-config-of-an-optimizer": (
        r"trains the rotations of a (model that is built with converters|converted model; write)",
        r"POET does not run under torchtitan's tensor parallelism",
        r"PoetConverter.Config: settings has init",
        r"has init, but W is what verl has loaded",
        r"is of torchtitan's own optimizers; leave it out",
        r"param_group_overrides is of Automodel's own optimizers",
        r"options has .*; write it beside",
        r"Automodel's scheduler keeps",
        r"pipeline parallelism is not supported under Automodel",
        r"; give the same matrices and scalars in options",
    ),
    "this-optimizers-param_groups-are-not-the-that-it-was-built-with": (
        r"this optimizer's param_groups, .*, are not the",
    ),
    "came-in-place-of-the-layers-extra-state": (r"came in place of the layer's extra state",),
    "and-verlmodel_merger-would-write-weights-without-their-rotations": (
        r"and verl\.model_merger would write weights without their rotations",
    ),
    "export_on_save": (r"export_on_save: ",),
}
