"""Jobs and processes: sweeps, SLURM, several devices, the record of a run."""
