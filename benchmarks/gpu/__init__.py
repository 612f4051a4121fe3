"""Measures what a step costs on one GPU: ``python -m benchmarks.gpu`` (see ``__main__``)."""
