"""Whole training steps on real ranks, compared with one process."""
