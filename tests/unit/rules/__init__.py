"""Tests of spectral_dist/rules."""
