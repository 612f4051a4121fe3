"""Plain torch: what is beside placement/dtensor.py, which is part of the core."""
