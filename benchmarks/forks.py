"""Train a profile with other settings, and leave samples on the way: the runs by which settings are decided.

    python benchmarks/forks.py NAME [--profile smoke] [--images 25000 50000 100000 200000] [--seed 0] [--out runs/forks]

Leaves OUT/PROFILE-NAME-SEED-IMAGES.npz, 2,000 samples as uint8 (N, 32, 32, 3) for `benchmarks/frd.py`, and prints
one line of JSON at each number of images.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vitgan_nb as v
from benchmarks.ablations import SMALL, save, train_changed

FORKS = {  # name: changes of the configuration
    "adam": {"optimizer": "adam"},
    "muon": {"optimizer": "muon"},
    "96x2": SMALL | {"heads": 6, "optimizer": "muon"},
    "96x2-adam": SMALL,
    "bcr-1": {"bcr_real": 1.0, "bcr_fake": 1.0},
    "cutout": {"augment": "color,translation,cutout"},
    "rate-0.002": {"learning_rate": 0.002},
    "batch-32": {"batch_size": 32},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=FORKS)
    parser.add_argument("--profile", choices=v.PROFILES, default="smoke")
    parser.add_argument("--images", type=int, nargs="+", default=[25_000, 50_000, 100_000, 200_000], help="ascending")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/forks"))
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    config = replace(v.PROFILES[flags.profile], dataset="cifar10", seed=flags.seed, **FORKS[flags.name])
    for line, samples in train_changed(config, {}, flags.images):
        save(samples, flags.out / f"{flags.profile}-{flags.name}-{flags.seed}-{line['images']:09d}.npz")
        print(json.dumps({"profile": flags.profile, "name": flags.name} | line), flush=True)


if __name__ == "__main__":
    main()
