"""Train on a folder of images, cell by cell: open this file as a notebook (VS Code, PyCharm, Jupytext), or run it.

python examples/train_on_folder.py PHOTOS RUN [a.b=value ...]
"""

# %%
import sys

import dinov2cli

photos, run, *overrides = sys.argv[1:]  # in a notebook: photos, run, overrides = "photos", "runs/photos", {}

# %% Train. The stop button, or Ctrl-C, saves; this cell then goes on from there.
fit = dinov2cli.train(photos, preset="demo", output_dir=run, overrides=overrides)

# %% The losses, the rates and what the monitors saw, as a table of numbers and as curves
last = fit.metrics[-1]
print(f"{fit}: loss {last['total_loss']:.3f}, prototypes in use {last['prototypes_in_use']:.1f}")
curves = fit.plot()
curves.savefig(f"{run}/curves.png")  # in a notebook the last line of a cell, fit.plot(), shows them

# %% Features of images: paths, PIL images, arrays, a folder
print(fit.embed(photos).shape)

# %% The score of its features: is an image's nearest neighbour of its class? Each is classified by the others.
request = dinov2cli.KnnRequest(checkpoint=run, train_dataset=photos, val_dataset=photos, nb_knn=(5,))
print(f"k-NN top-1 of the teacher: {dinov2cli.run(request).rows[0].top1:.1f} %")
