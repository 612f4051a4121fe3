"""Tests of spectral_dist/checkpoint."""
