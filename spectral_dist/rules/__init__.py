"""One optimizer's mathematics per file, on whole matrices."""
