"""Of the project itself: its layers, its pages, its wheel, its benchmarks, its tests' own tools."""
