"""Tests of spectral_dist/sharding."""
