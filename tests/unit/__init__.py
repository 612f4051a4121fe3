"""One module or class at a time, most in one process; folders as in spectral_dist/."""
