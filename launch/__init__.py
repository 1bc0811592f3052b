"""Where a run runs: several processes on this machine, TPU slices, Kubernetes, SLURM; and what to check before."""
