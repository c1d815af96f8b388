"""Whether a run can succeed on these machines: `dino2 doctor`, and the first seconds of every training."""
