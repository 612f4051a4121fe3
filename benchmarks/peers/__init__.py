"""Compares Muons of other packages with ours: ``python -m benchmarks.peers`` (see ``__main__``)."""
