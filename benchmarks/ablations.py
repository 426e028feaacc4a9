"""Train `smoke` with one technique taken out, or put in, at a time, and leave samples of each to be measured.

    python benchmarks/ablations.py [--only NAME …] [--images 50000] [--seeds 0 1] [--small] [--out runs/ablations]

A run takes 18 to 20 minutes of one CPU core, of the small model half of that. Each leaves OUT/NAME-IMAGES-SEED.npz,
10,000 samples as uint8 (N, 32, 32, 3) for `benchmarks/frd.py`, and prints one line of JSON. Runs whose samples are there
already are skipped. In the end OUT/ablations.png shows 30 samples of each, of the first seed.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vitgan_nb as v


class SeparatePatchEmbedding(v.OverlappingPatchEmbedding):
    """Patches of P × P that do not touch."""

    def __init__(self, patch_size: int, dim: int):
        super().__init__(patch_size, dim)
        self.linear = v.EqualizedLinear(3 * patch_size**2, dim)

    def cut(self, images: Tensor) -> Tensor:
        return F.unfold(images, kernel_size=self.patch_size, stride=self.patch_size).transpose(1, 2)


class PlainSpectralNorm(v.ImprovedSpectralNorm):
    """W / σ(W) (Miyato et al. 2018): every layer, its gain included, is as steep as 1."""

    def __init__(self, weight: Tensor):
        super().__init__(weight)
        self.sigma_init.fill_(math.sqrt(weight.shape[1]))  # undoes the gain 1 / √in of `EqualizedLinear`


class PlainLayerNorm(nn.LayerNorm):
    """LayerNorm with a scale and a shift of its own, blind to the style."""

    def __init__(self, dim: int, w_dim: int):
        super().__init__(dim)

    def forward(self, h: Tensor, w: Tensor) -> Tensor:
        return super().forward(h)


class StyleAddedGenerator(v.Generator):
    """The style is added to the tokens at the start."""

    def tokens(self, w: Tensor) -> Tensor:
        h = torch.sin(self.position(v.patch_centres(self.config.grid, w.device))) + w[:, None]  # (B, N, D)
        for block in self.blocks:
            h = block(h, w)
        return self.norm(h, w)


class LinearDecoder(nn.Module):
    """All pixels of a patch by one linear layer, which begins near grey as the SIREN does."""

    def __init__(self, y_dim: int, dim: int, depth: int, omega_0: float, demodulate: bool):
        super().__init__()
        self.linear = v.EqualizedLinear(y_dim, 4 * 4 * 3)
        nn.init.normal_(self.linear.weight, std=0.1)

    def forward(self, y: Tensor, positions: Tensor) -> Tensor:
        return self.linear(y).unflatten(-1, (len(positions), 3))


ABLATIONS = {  # name: (what takes the place of what in the notebook, changes of the configuration)
    "as it is": ({}, {}),
    "dot-product attention": ({"L2Attention": v.SelfAttention}, {}),
    "plain spectral norm": ({"ImprovedSpectralNorm": PlainSpectralNorm}, {}),
    "no spectral norm": ({"improved_spectral_norm": lambda module: module}, {}),
    "no overlap": ({"OverlappingPatchEmbedding": SeparatePatchEmbedding}, {}),
    "no bCR": ({}, {"bcr_real": 0.0, "bcr_fake": 0.0}),  # as DiffAugment is off in `smoke`, then nothing is transformed
    "DiffAugment": ({}, {"diff_augment": True}),  # in the adversarial losses, and bCR, as in the paper
    "DiffAugment, no bCR": ({}, {"diff_augment": True, "bcr_real": 0.0, "bcr_fake": 0.0}),
    "LayerNorm, w added": ({"SelfModulatedLayerNorm": PlainLayerNorm, "Generator": StyleAddedGenerator}, {}),
    "linear patch decoder": ({"Siren": LinearDecoder}, {}),
}


def train_changed(
    config: v.Config, changed: dict, images: list[int], minutes: float = 0.0, n: int = 2000
) -> Iterator[tuple[dict, np.ndarray]]:
    """Train by `config` with parts of the notebook `changed`, {name: what takes its place}.

    At each number of `images`, or once after so many `minutes`, gives what the run came to, and `n` samples
    (N, H, W, 3), uint8. Minutes are of the processor, all threads together, or of the clock on a GPU.
    """
    kept = {attribute: getattr(v, attribute) for attribute in changed}
    for attribute, value in changed.items():
        setattr(v, attribute, value)
    try:
        run = v.Training(config)
        seconds, limit = 0.0, 60 * minutes or math.inf
        clock = time.process_time if minutes and run.device.type == "cpu" else time.perf_counter
        for mark in [math.inf] if minutes else images:
            start = clock()
            while run.step * run.config.batch_size < mark and clock() - start < limit:
                run.train_step()
            entry = run.record()
            seconds += clock() - start
            logits = {key: round(entry[key], 2) for key in v.LOGITS}
            samples = v.sample(run.average.module, n).permute(0, 2, 3, 1).numpy()
            yield {"seed": config.seed, "images": entry["images"], "seconds": round(seconds), **logits}, samples
    finally:
        for attribute, value in kept.items():
            setattr(v, attribute, value)


def samples_of(name: str, flags: argparse.Namespace, seed: int) -> Path:
    """Where the samples of a run are, or will be."""
    return flags.out / f"{'small-' * flags.small}{name.replace(' ', '-').replace(',', '')}-{flags.images}-{seed}.npz"


def save(samples: np.ndarray, path: Path):
    with v.written_whole(path) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, images=samples)


def draw(names: list[str], flags: argparse.Namespace):
    """30 samples of every run with the first seed."""
    rows = math.ceil(len(names) / 3)
    figure, axes = plt.subplots(rows, 3, figsize=(9, 2.8 * rows), squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        images = torch.from_numpy(np.load(samples_of(name, flags, flags.seeds[0]))["images"][:30]).permute(0, 3, 1, 2)
        v.show_images(images, name, columns=6, axis=axis)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(flags.out / "ablations.png", dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=ABLATIONS, nargs="+")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--small", action="store_true", help="96 × 2, two heads, a SIREN 64 wide, in place of `smoke`")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    small = dict(dim=96, depth=2, heads=2, siren_dim=64) if flags.small else {}
    names = flags.only or list(ABLATIONS)
    for seed in flags.seeds:
        for name in names:
            path = samples_of(name, flags, seed)
            if path.exists():
                continue
            changed, fields = ABLATIONS[name]
            config = replace(v.PROFILES["smoke"], dataset="cifar10", compile=True, seed=seed, **small, **fields)
            ((line, samples),) = train_changed(config, changed, [flags.images], n=10_000)
            save(samples, path)
            print(json.dumps({"name": name} | line), flush=True)
    draw(names, flags)


if __name__ == "__main__":
    main()
