"""Train with a term of one's own: patches of an image shall not all be alike (the variance term of VICReg).

python examples/own_loss.py DATASET RUN [a.b=value ...]
"""

import sys
from pathlib import Path

from torch import Tensor

from dinov2cli import TrainRequest, run
from dinov2cli.losses.term import Batch, LossTerm, Tokens
from dinov2cli.train.objective import TERMS, Term


class PatchVariance(LossTerm):
    """max(0, 1 - standard deviation over an image's patches), mean over images and features."""

    reads = frozenset({"patches"})  # of the student; `reads_of_follower` names what targets are made of

    def forward(self, tokens: Tokens, targets: None, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        spread = tokens["patches"].float().var(dim=1).add(1e-4).sqrt()  # [2B, N, D] -> [2B, D]
        value = (1 - spread).relu().mean()
        return value, {"patch_variance_loss": value}


def main(dataset: str, run_folder: str, *overrides: str) -> None:
    # The weight may be a function of the iteration. The name is that of the term in what is saved and logged.
    TERMS["patch_variance"] = lambda config: Term(PatchVariance(), weight=0.5, follower=None)
    run(TrainRequest(preset="demo", data=dataset, output_dir=Path(run_folder), overrides=overrides))


if __name__ == "__main__":
    main(*sys.argv[1:])
