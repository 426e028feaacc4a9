"""Where is the discriminator's limit? Freeze a generator, and let fresh discriminators learn to tell its images from real ones.

    python benchmarks/limit.py NAME … [--weights weights/vitgan-cifar10.safetensors] [--images 16000 32000] [--seed 0]

Ranks discriminators without the noise of a GAN: each begins anew, learns by its own half of `smoke`'s step (its loss,
DiffAugment and consistency, Muon), with 50,000 training images of CIFAR-10 against as many samples, and is asked about the
10,000 test images and 10,000 samples that it never saw. Prints one line of JSON at each number of real images: the loss on
those (1.386: a mere guess), and the area under the ROC curve: how often a real image gets a higher logit than a sample.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vitgan_nb as v
from benchmarks.ablations import SeparatePatchEmbedding


class ConvolutionalStem(nn.Module):
    """Three convolutions of 3 × 3, two of them at stride 2, in place of the patches' linear layer; for P = 4."""

    def __init__(self, patch_size: int, dim: int):
        super().__init__()
        channels = (3, dim // 4, dim // 2, dim)
        layers = []
        for before, after, stride in zip(channels[:-1], channels[1:], (1, 2, 2), strict=True):
            layers += [nn.Conv2d(before, after, 3, stride, 1), nn.GELU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten(2).transpose(1, 2)  # (B, N, D)


VARIANTS = {  # name: (what takes the place of what in the notebook, changes of the configuration)
    "as-it-is": ({}, {}),
    "no-bcr": ({}, {"bcr_real": 0.0, "bcr_fake": 0.0}),
    "no-diffaugment": ({}, {"bcr_real": 0.0, "bcr_fake": 0.0, "augment": ""}),
    "translation-only": ({}, {"bcr_real": 0.0, "bcr_fake": 0.0, "augment": "translation"}),
    "colour-only": ({}, {"bcr_real": 0.0, "bcr_fake": 0.0, "augment": "color"}),
    "depth-6": ({}, {"depth": 6}),
    "width-192": ({}, {"dim": 192}),
    "patches-of-2": ({}, {"patch_size": 2}),
    "no-overlap": ({"OverlappingPatchEmbedding": SeparatePatchEmbedding}, {}),
    "convolutional-stem": ({"OverlappingPatchEmbedding": ConvolutionalStem}, {}),
    "no-spectral-norm": ({"improved_spectral_norm": lambda module: module}, {}),
    "dot-product-attention": ({"L2Attention": v.SelfAttention}, {}),
    "4-heads": ({}, {"heads": 4}),
    "adam": ({}, {"optimizer": "adam"}),
    "rate-0.002": ({}, {"learning_rate": 0.002}),
}


def variant(name: str, seed: int) -> tuple[v.Config, nn.Module]:
    """The configuration of `smoke` and a fresh discriminator with what VARIANTS says under `name`."""
    changed, fields = VARIANTS[name]
    config = replace(v.PROFILES["smoke"], dataset="cifar10", seed=seed, **fields)
    torch.manual_seed(seed)
    with mock.patch.dict(vars(v), changed):
        return config, v.Discriminator(config)


def logits_of(discriminator: nn.Module, images: Tensor, dtype: torch.dtype) -> Tensor:
    """The logits of uint8 `images` (M, 3, H, W), (M,)."""
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        return torch.cat([discriminator(v.to_float(part)).float() for part in images.split(500)])


def area(real: Tensor, fake: Tensor) -> float:
    """How often a logit of `real` is above one of `fake` (Mann and Whitney), equal ones counted by half."""
    return (real[:, None].gt(fake).float().mean() + 0.5 * real[:, None].eq(fake).float().mean()).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=VARIANTS, metavar="NAME", help=", ".join(VARIANTS))
    parser.add_argument("--weights", default="weights/vitgan-cifar10.safetensors")
    parser.add_argument("--images", type=int, nargs="+", default=[16_000, 32_000], help="in ascending order")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    real, real_test = v.load_images(replace(v.PROFILES["smoke"], dataset="cifar10"))
    samples = v.sample(v.load_generator(flags.weights), 60_000, seed=1)
    fake, fake_test = samples[:50_000], samples[50_000:]
    dtype = v.number_format("auto", torch.device("cpu"))
    for name in flags.names:
        config, d = variant(name, flags.seed)
        optimizer = (v.Muon if config.optimizer == "muon" else v.adam)(d.parameters(), config)
        step, seconds = 0, 0.0
        for mark in flags.images:
            start = time.process_time()
            while step * config.batch_size < mark:
                at = [v.batch_indices(50_000, config.batch_size, step, config.seed + part) for part in (0, 1)]
                x = torch.cat([v.real_batch(part, i) for part, i in zip((real, fake), at, strict=True)])
                weights = config.bcr_real, config.bcr_fake
                with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                    images = [v.diff_augment(x, config.augment)] + [x] * (max(weights) > 0)
                    logits = d(torch.cat(images)).float().chunk(2 * len(images))
                loss = v.discriminator_loss(*logits[:2])
                for augmented, plain, weight in zip(logits[:2], logits[2:], weights, strict=False):
                    loss = loss + v.balanced_consistency(plain, augmented, weight)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
            seconds += time.process_time() - start
            d.eval()
            on_real, on_fake = (logits_of(d, images, dtype) for images in (real_test, fake_test))
            d.train()
            held_out = F.softplus(-on_real).mean() + F.softplus(on_fake).mean()
            line = {"name": name, "seed": flags.seed, "images": mark, "weights": sum(p.numel() for p in d.parameters())}
            line |= {"loss": round(held_out.item(), 3), "auc": round(area(on_real, on_fake), 4)}
            print(json.dumps(line | {"seconds": round(seconds)}), flush=True)


if __name__ == "__main__":
    try:
        main()
    except v.BadInput as error:
        sys.exit(f"error: {error}")
