"""Work-arounds for faults of Lightning; each file names the fault and when it can be deleted."""
