"""Draw FRD and recall against minutes of training, from what `benchmarks/frd.py` printed for files NAME-SEED-MINUTES.npz.

    python benchmarks/draw_peers.py docs/peers.jsonl docs/peers.png [SAMPLES.npz …]

Below them the first 18 samples of each SAMPLES.npz, a row each.
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path)
    parser.add_argument("figure", type=Path)
    parser.add_argument("samples", type=Path, nargs="*")
    flags = parser.parse_args()
    runs = {}
    for line in map(json.loads, flags.lines.read_text().splitlines()):
        name, seed, minutes = Path(line["samples"]).stem.rsplit("-", 2)
        runs.setdefault(name, {}).setdefault(seed, {})[int(minutes)] = line
    n = len(flags.samples)
    figure = plt.figure(figsize=(9, 3.4 + 0.45 * n), layout="constrained")
    top, *rows = figure.subfigures(1 + n, 1, height_ratios=[3.4, *[0.45] * n], squeeze=False)[:, 0]
    axes = top.subplots(1, 2)
    for color, (name, seeds) in enumerate(runs.items()):
        for marks in seeds.values():
            for axis, metric in zip(axes, ("frd", "recall"), strict=True):
                axis.plot(
                    sorted(marks), [marks[m][metric] for m in sorted(marks)], ".-", color=f"C{color}", linewidth=1
                )
        axes[1].plot([], color=f"C{color}", label=name)
    ticks = sorted({minutes for seeds in runs.values() for marks in seeds.values() for minutes in marks})
    for axis, title in zip(axes, ("FRD, less is better", "recall, more is better"), strict=True):
        axis.set(xlabel="minutes on one core", title=title, xscale="log", ylim=0)
        axis.minorticks_off()
        axis.set_xticks(ticks, ticks)
        axis.grid(alpha=0.3)
    axes[1].legend()
    for row, path in zip(rows, flags.samples, strict=True):
        name, _, minutes = path.stem.rsplit("-", 2)
        label, strip = row.subplots(1, 2, width_ratios=[1.2, 7.8])
        label.text(0, 0.5, f"{name}, {int(minutes)} minutes", fontsize=7, va="center")
        strip.imshow(np.concatenate(np.load(path)["images"][:18], axis=1))
        label.axis("off")
        strip.axis("off")
    figure.savefig(flags.figure, dpi=110)


if __name__ == "__main__":
    main()
