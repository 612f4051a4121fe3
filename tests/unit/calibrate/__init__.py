"""Tests of spectral_dist/calibrate.py."""
