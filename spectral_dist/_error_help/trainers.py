"""What errors say under other trainers."""

TEXTS: dict[str, tuple[str, ...]] = {
    "keeps-state-at-the-owners-of-matrices-alone-and-the-trainer-saves-that-of-rank-0": (
        r"keeps state at the owners of matrices alone, and the Trainer saves that of rank 0",
    ),
    "spectralcallback-the-optimizer-is": (r"SpectralCallback: the optimizer is a ",),
    "optim_args": (r"optim_args: ",),
    "export_on_save": (r"export_on_save: ",),
}
