"""Train `smoke` with other settings, and leave samples on the way: the runs by which settings are decided.

    python benchmarks/forks.py NAME [--images 25000 50000 100000 200000] [--seed 0] [--out runs/forks]

Leaves OUT/NAME-IMAGES-SEED.npz, 2,000 samples as uint8 (N, 32, 32, 3) for `benchmarks/frd.py`, and prints one line of JSON
at each number of images.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vitgan_nb as v
from benchmarks.ablations import save, train_changed


class Muon:
    """Muon for the matrices of a network, Adam for all else. Needs PyTorch 2.9.

    Adam moves every weight by about the learning rate; Muon (Jordan et al. 2024) moves a matrix as a whole, equally far
    in all its directions, here by 0.02 · 0.2 in the root mean square, which is about Adam's 0.004.
    """

    def __init__(self, network: nn.Module, config: v.Config):
        groups = [], []
        for weight in network.parameters():
            groups[weight.ndim == 2 and min(weight.shape) > 10].append(weight)
        self.rest = torch.optim.Adam(groups[0], lr=config.learning_rate, betas=config.betas, fused=True)
        self.matrices = torch.optim.Muon(
            groups[1], lr=5 * config.learning_rate, momentum=0.5, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        )

    def zero_grad(self):
        self.rest.zero_grad()
        self.matrices.zero_grad()

    def step(self):
        self.rest.step()
        self.matrices.step()


class MuonTraining(v.Training):
    def __init__(self, config: v.Config):
        super().__init__(config)
        self.optimizer_g, self.optimizer_d = (Muon(network, config) for network in (self.generator, self.discriminator))


LARGE = {"dim": 128, "depth": 3, "heads": 8, "siren_dim": 128}
FORKS = {  # name: (what takes the place of what in the notebook, changes of the configuration)
    "bcr-1": ({}, {"bcr_real": 1.0, "bcr_fake": 1.0}),
    "cutout": ({}, {"augment": "color,translation,cutout"}),
    "rate-0.002": ({}, {"learning_rate": 0.002}),
    "batch-32": ({}, {"batch_size": 32}),
    "128x3": ({}, LARGE),
    "muon": ({"Training": MuonTraining}, {"heads": 6}),
    "muon-128x3": ({"Training": MuonTraining}, LARGE),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=FORKS)
    parser.add_argument("--images", type=int, nargs="+", default=[25_000, 50_000, 100_000, 200_000], help="ascending")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/forks"))
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    for line, samples in train_changed(*FORKS[flags.name], flags.images, flags.seed):
        save(samples, flags.out / f"{flags.name}-{line['images']}-{flags.seed}.npz")
        print(json.dumps({"name": flags.name} | line), flush=True)


if __name__ == "__main__":
    main()
