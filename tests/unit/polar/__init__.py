"""Tests of spectral_dist/polar."""
