"""Estimates of what a job's ranks keep, send and compute, without running it."""

from spectral_dist.estimate.estimate import QUANTITIES, Estimate, estimate
from spectral_dist.estimate.job import ENGINES, Job

__all__ = ["ENGINES", "QUANTITIES", "Estimate", "Job", "estimate"]
