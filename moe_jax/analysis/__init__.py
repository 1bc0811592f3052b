"""FLOPs, memory and cost; statistics and plots of runs."""
