"""Tests of spectral_dist/poet."""
