"""What breaks: bad options, killed ranks, damaged files, preemption."""
