"""What errors of any option or file say, where no other text fits."""

TEXTS: dict[str, tuple[str, ...]] = {
    "a-setting-is-out-of-its-range": (
        r"; it must be ",
        r"; write two numbers",
        r": write true or false",
        r"; here that is ",
        r"; write 'float32' or 'bfloat16'",
        r"; write numbers by name",
    ),
    "is-unknown": (r" is .*; unknown",),
    "cannot-write": (r"cannot write .*: ",),
    "is-missing": (r": \S+ is missing$",),
}
"""Anchor -> regular expressions of the texts that it explains."""
