"""Tests of spectral_dist/core."""
