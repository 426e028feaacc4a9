"""Draw FRD and recall against minutes of training, from what `benchmarks/frd.py` printed for files NAME-SEED-MINUTES.npz.

python benchmarks/draw_peers.py docs/peers.jsonl docs/peers.png
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path)
    parser.add_argument("figure", type=Path)
    flags = parser.parse_args()
    runs = {}
    for line in map(json.loads, flags.lines.read_text().splitlines()):
        name, seed, minutes = Path(line["samples"]).stem.rsplit("-", 2)
        runs.setdefault(name, {}).setdefault(seed, {})[int(minutes)] = line
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
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
    figure.tight_layout()
    figure.savefig(flags.figure, dpi=110)


if __name__ == "__main__":
    main()
