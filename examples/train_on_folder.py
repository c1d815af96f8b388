"""Train on a folder with a subfolder for each class, then score the teacher by its nearest neighbours.

python examples/train_on_folder.py PHOTOS RUN [a.b=value ...]
"""

import sys
from pathlib import Path

from dinov2cli import KnnRequest, TrainRequest, run


def main(photos: str, run_folder: str, *overrides: str) -> float:
    # A request is what a command would do; its fields are the command's options.
    run(TrainRequest(preset="demo", data=photos, output_dir=Path(run_folder), overrides=overrides))
    # Train and val images are the same here: each is classified by the others.
    knn = run(KnnRequest(checkpoint=run_folder, train_dataset=photos, val_dataset=photos, nb_knn=(5,)))
    score: float = knn.rows[0].top1
    print(f"k-NN top-1 of the teacher: {score:.1f} %")
    return score


if __name__ == "__main__":
    main(*sys.argv[1:])
