"""What tests and benchmarks share: no tests, and nothing that imports one."""
