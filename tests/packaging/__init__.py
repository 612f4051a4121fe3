"""Tests of the project itself: layers, pages, the wheel, benchmarks, the tests' tools."""
