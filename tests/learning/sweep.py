"""What the settings of a small run are worth: a preset with one setting changed at a time, over seeds.

A table in Markdown a setting, of the k-NN scores at the end of each run. Every run has a folder of its own under OUT;
those that have ended are not run again, so that the sweep can be stopped and go on. Values that change nothing of the
preset share its runs, OUT/as-it-is.

usage: python tests/learning/sweep.py OUT [SETTING ...] [--seeds N ...] [--preset NAME] [--with a.b=value ...]
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from dinov2cli.config import load_config

SETTINGS: dict[str, tuple[str, ...]] = {
    "momentum": tuple(f"teacher.momentum_teacher={value}" for value in (0.8, 0.9, 0.95, 0.98, 0.992)),
    "prototypes": tuple(f"dino.head_n_prototypes={value}" for value in (16, 64, 256, 1024)),
    "temperature": tuple(
        f"teacher.warmup_teacher_temp={first} teacher.teacher_temp={last}"
        for first, last in ((0.005, 0.005), (0.01, 0.01), (0.02, 0.02), (0.04, 0.05), (0.04, 0.07))
    ),
    "learning-rate": tuple(f"optim.base_lr={value}" for value in (0.003, 0.006, 0.012, 0.024)),
    "batch": tuple(  # the same number of images
        f"train.batch_size_per_gpu={size} optim.epochs={256 // size} teacher.momentum_teacher={momentum}"
        for size, momentum in ((32, 0.95), (64, 0.9), (128, 0.8))
    ),
    "layerscale": tuple(f"student.layerscale={value}" for value in (0.00001, 0.1, 1.0)),
    "koleo": tuple(f"dino.koleo_loss_weight={value}" for value in (0, 0.1, 0.3)),
    "ibot": tuple(f"ibot.loss_weight={value}" for value in (0, 1)),
    "patch-embedding-rate": tuple(f"optim.patch_embed_lr_mult={value}" for value in (0.2, 1.0)),
    "warmup": tuple(f"optim.warmup_epochs={value}" for value in (0, 1, 2)),
    "crops": (
        "crops.global_crops_scale=[0.32,1.0] crops.local_crops_scale=[0.05,0.32]",
        "crops.global_crops_scale=[0.5,1.0] crops.local_crops_scale=[0.15,0.5]",
        "crops.global_crops_scale=[0.7,1.0] crops.local_crops_scale=[0.3,0.7]",
    ),
}
"""Its values, each as the words that set it."""


def score(folder: Path, preset: str, overrides: list[str], seed: int) -> float:
    """k-NN top-1 in percent of the teacher at the end of a run, which is trained unless it has been."""
    command = [sys.executable, "-m", "dinov2cli", "train", "--preset", preset, "--output-dir", str(folder), "--cpu"]
    if not (folder / "ended").exists():
        print("$", *command[1:], *overrides, f"train.seed={seed}", file=sys.stderr, flush=True)
        with (folder.parent / f"{folder.name}.log").open("w") as log:
            subprocess.run([*command, *overrides, f"train.seed={seed}"], check=True, stdout=log, stderr=log)
        (folder / "ended").touch()
    return float(json.loads((folder / "knn_metrics.json").read_text().splitlines()[-1])["knn_top1"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=", ".join(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    parser.add_argument("--preset", default="demo", metavar="NAME")
    parser.add_argument("--with", nargs="+", default=[], dest="always", metavar="a.b=value")
    words = parser.parse_args()
    if unknown := set(words.settings) - set(SETTINGS):
        parser.error(f"no setting {', '.join(sorted(unknown))}; there are {', '.join(SETTINGS)}")
    as_it_is = load_config(words.preset, overrides=words.always)
    for setting in words.settings or SETTINGS:
        print(f"| {setting} | {' | '.join(f'seed {seed}' for seed in words.seeds)} | mean |")
        print("|---" * (len(words.seeds) + 2) + "|")
        for value in SETTINGS[setting]:
            folder = words.out / setting / value.replace(" ", "+").replace("[", "").replace("]", "")
            if load_config(words.preset, overrides=[*words.always, *value.split()]) == as_it_is:
                folder = words.out / "as-it-is"
            folder.mkdir(parents=True, exist_ok=True)
            scores = [
                score(folder / f"seed-{seed}", words.preset, [*words.always, *value.split()], seed)
                for seed in words.seeds
            ]
            cells = " | ".join(f"{top1:.1f}" for top1 in scores)
            print(f"| {' '.join(f'`{word}`' for word in value.split())} | {cells} | {statistics.mean(scores):.1f} |")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
