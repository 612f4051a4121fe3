"""Tests of spectral_dist/params."""
