"""Draws the README's picture from the run that examples/01_shared_mlp.py wrote: python docs/picture.py RUN_FOLDER docs/shared_mlp.png."""

import sys

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.colors import LogNorm

import paramwatch

run = paramwatch.load(sys.argv[1])
norms = run.frame("grad_norm", aliases=True)
ratios = run.frame("update_ratio", parameters="*.weight")

figure, (above, below) = plt.subplots(2, 1, figsize=(9, 5.4), sharex=True, height_ratios=(3, 2), layout="constrained")
edges = [*norms.index, norms.index[-1] + 1]
image = above.pcolormesh(edges, range(len(norms.columns) + 1), norms.T, norm=LogNorm(), cmap="magma", rasterized=True)
above.set_yticks([i + 0.5 for i in range(len(norms.columns))], norms.columns)
above.invert_yaxis()
above.set_title("Gradient norm of every parameter at every step; 2 and 4 are one shared layer", loc="left", fontsize=11)
figure.colorbar(image, ax=above, label="grad_norm", pad=0.01)

for name in ratios:
    below.plot(ratios.index, ratios[name], linewidth=0.9, label=" = ".join((name, *run.parameters.loc[name, "aliases"])))
below.set_yscale("log")
below.set_title("How far each step moves a weight: update_ratio", loc="left", fontsize=11)
below.set_xlabel("optimizer step")
below.grid(alpha=0.3)
below.legend(frameon=False, fontsize=9, loc="lower left", ncols=len(ratios.columns))
figure.savefig(sys.argv[2], dpi=110)
