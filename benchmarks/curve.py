"""Train up to each of several image counts and leave samples at each, to be measured: how quality grows with images seen.

    python benchmarks/curve.py --images 25000 50000 100000 200000 [--name NAME] [--n 10000] [--profile smoke] [--seed 0 …]

The further flags are the settings that `python vitgan_nb.py train` has; whatever they change deserves a NAME (else the
profile's). Leaves OUT/NAME-SEED-IMAGES.npz, N samples of the average as uint8 (N, 32, 32, 3), and prints one line of JSON
for each. Interrupted, it goes on where it stopped: training from its checkpoint, and samples that are there stay.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vitgan_nb as v
from benchmarks.ablations import save


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", required=True, help="in ascending order")
    parser.add_argument("--name", help="of the samples' files")
    parser.add_argument("--n", type=int, default=10_000)
    v.add_settings(parser)
    parser.set_defaults(profile="smoke", dataset="cifar10", out_dir="runs/curve", minutes=0.0)
    flags = parser.parse_args()
    if flags.steps is not None:
        parser.error("--images says how far to train, not --steps")
    try:
        config, name = v.config_from_flags(flags), flags.name or flags.profile
    except v.BadInput as error:
        parser.error(str(error))
    if min(flags.images) < config.batch_size:
        parser.error(f"--images must be {config.batch_size}, which is one batch, or more")
    run = True  # the first time from its checkpoint, if there is one
    for images in flags.images:
        path = Path(config.out_dir) / f"{name}-{config.seed}-{images:09d}.npz"
        if path.exists():
            continue
        run = v.train(replace(config, steps=images // config.batch_size), resume=run)
        if run.step != images // config.batch_size:
            sys.exit(f"stopped at step {run.step:,}, which is not that of {images:,} images")
        save(v.sample(run.average.module, flags.n).permute(0, 2, 3, 1).numpy(), path)
        line = {"images": run.step * config.batch_size, "seconds": round(run.seconds), "samples": str(path)}
        print(json.dumps(line | {name: round(run.history[-1][name], 2) for name in v.LOGITS}), flush=True)


if __name__ == "__main__":
    try:
        main()
    except v.BadInput as error:
        sys.exit(f"error: {error}")
