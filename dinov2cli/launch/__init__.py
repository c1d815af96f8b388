"""Starting a command in several processes: on this machine, or as a Slurm job. Nothing here imports torch on import."""
