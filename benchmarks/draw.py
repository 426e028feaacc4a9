"""Draw FRD, precision and recall against images seen, from what `benchmarks/frd.py` printed for files NAME-SEED-IMAGES.npz.

python benchmarks/draw.py docs/curve.jsonl docs/curve.png
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path)
    parser.add_argument("figure", type=Path)
    flags = parser.parse_args()
    runs = {}
    for line in map(json.loads, flags.lines.read_text().splitlines()):
        name, seed, images = Path(line["samples"]).stem.rsplit("-", 2)
        runs.setdefault(name, {}).setdefault(seed, []).append((int(images) / 1000, line))
    figure, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
    for color, (name, seeds) in enumerate(runs.items()):
        for points in seeds.values():
            images, lines = zip(*sorted(points, key=lambda point: point[0]), strict=True)
            for axis, metric in zip(axes, ("frd", "precision", "recall"), strict=True):
                axis.plot(images, [line[metric] for line in lines], ".-", color=f"C{color}", linewidth=1)
        axes[0].plot([], color=f"C{color}", label=name)
    axes[0].set(yscale="log")
    axes[0].yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator(), major_formatter="{x:,.0f}")
    for axis, metric in zip(axes, ("FRD", "precision", "recall"), strict=True):
        axis.set(xlabel="images seen, thousands", title=metric, xscale="log")
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.grid(alpha=0.3)
    for axis in axes[1:]:
        axis.set_ylim(0)
    figure.legend(loc="outside upper center", ncols=4)
    figure.savefig(flags.figure, dpi=110)


if __name__ == "__main__":
    main()
