"""What errors say of state dicts and checkpoints."""

TEXTS: dict[str, tuple[str, ...]] = {
    "under-distributeddataparallel-a-matrixs-momentum-is-on-its-owner-alone": (
        r"under DistributedDataParallel a matrix's momentum is on its owner alone",
    ),
    "keeps-its-state-at-the-owners-of-matrices": (r"keeps its state at the owners of matrices",),
    "this-state-dict-lacks-matrix-state": (r"this state dict lacks matrix state",),
    "was-saved-with-another-optimizer": (
        r"was saved with another optimizer(?!, load it)",
        r"this state dict was saved by another optimizer than",
        r"this state was saved by .*, and neither can take",
        r"the checkpoint's optimizer is not spectral_poet",
    ),
    "this-is-no-optimizers-state-dict": (r"this is no optimizer's state dict",),
    "parameter-groups-are-other-than-in-the-checkpoint": (
        r"this state dict's groups are of",
        r"is of kind .* here, but .* in the checkpoint",
        r"are in one parameter group here, but in two",
        r"parameter groups, but there are .* here: build the optimizer",
    ),
    "the-state-of-a-parameter-in-a-state-dict-is-damaged": (
        r"its state is .*, and no dict",
        r"which is no number of steps",
        r"steps and has no .*: this state dict is of another optimizer",
        r"and no tensor of numbers",
        r"this state dict is of another model",
        r"is NaN or infinite(?: in the checkpoint)?$",
        r", and no tensor$",
    ),
    "write-the-rank-that-it-was-saved-with": (
        r"write the .* that it was saved with",
        r"or with another rank of this one",
    ),
    "it-is-of-another-model": (
        r"it is of another model",
        r"it was saved of another model",
        r"has a state of .*, which this optimizer does not train",
    ),
    "holds-no-checkpoint": (
        r"holds no checkpoint: there is no",
        r"there is no folder .* for ",
        r"^there is no ",
    ),
    "is-not-complete-or-is-not-what-was-saved": (
        r"is not complete: there is no",
        r"is not what was saved",
        r"the list of the checkpoint's files, is damaged",
        r"bytes in place of",
        r" cannot be read: ",
        r"is damaged, or no file of torch\.save",
        r"its own sha256 is another one",
        r"it does not list the files of this folder",
        r"it is not the metadata of torch",
        r"out of its folder",
        r"was not loaded",
    ),
    "was-not-saved": (
        r"was not saved: ",
        r" cannot be written: ",
    ),
    "is-no-plain-data": (
        r"is no plain data",
        r"which no checkpoint of tensors needs",
    ),
    "of-what-is-spread-over-ranks-and-only-to-be-saved": (
        r"of what is spread over ranks, and only to be saved",
    ),
    "is-of-another-save": (r"is of another save than",),
    "is-rotated-by-poet-in-and-not-here": (
        r"is rotated by POET (?:in .*, and not )?here",
        r"the checkpoint is of a model without rotations",
        r"was not saved with POET",
        r"was saved with POET, whose weights",
    ),
    "convert-the-model-with-the-settings-it-was-saved-with": (
        r"convert the model with the settings it was saved with",
    ),
    "is-poets-whose-rotations-no-other-optimizer-goes-on-with": (
        r"is POET's, whose rotations no other optimizer goes on with",
    ),
    "is-no-format-known": (r"is no format; known",),
    "exists-already-give-another-name": (r"exists already; give another name",),
    "is-no-checkpoint-of-the-format": (
        r"is no checkpoint of the format",
        r"is nothing that spectral_dist saves",
        r"is no universal checkpoint",
        r"has no .*: it must be \{",
        r"unknown key .*; put what else there is under 'extra'",
        r"has no fp32\.pt",
        r"groups do not make up its .* parts",
        r"is of a parameter that .* does not know",
    ),
    "holds-matrix-state": (r"holds matrix state",),
    "the-content-of-a-checkpoint-contradicts-itself": (
        r": .* is in two groups$",
        r": .* is not in the model$",
        r"has a state, but is in no group",
        r"has an optimizer state, but is not in the model",
        r": .* is .*, but its .* is ",
        r": (?:no \w+|unknown state \S+) of ",
    ),
    "does-not-know-its-parameters-names": (r"does not know its parameters' names",),
    "ours-knows-only": (
        r"; ours knows .* only",
        r"has Muon only, and the run is another rule's",
        r"has no scale ",
        r"is trained by .*, not by Muon",
    ),
    "what-torchoptimmuon-cannot-take": (
        r"torch\.optim\.Muon takes 2-D parameters",
        r"torch\.optim\.Muon has one \(a, b, c\)",
    ),
    "what-a-universal-checkpoint-cannot-hold": (
        r"DeepSpeed keeps float32 only",
        r"counts steps once for all of these",
        r"would overwrite what DeepSpeed keeps",
        r"only checkpoints without tensor and pipeline parallelism",
    ),
    "which-engines-would-no-longer-load": (r"which engines would no longer load",),
    "was-not-written": (r" was not written",),
}
"""Anchor -> regular expressions of the texts that it explains."""
