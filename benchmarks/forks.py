"""Train one model with a single thing changed, and leave samples on the way: the runs by which settings are decided.

    python benchmarks/forks.py NAME [--profile small] [--images 24000 36000 48000 | --minutes M] [--seed 0]
        [--n 2000] [--out runs/forks]

`small` is `smoke` at 96 x 2, with 6 heads and a SIREN of depth 2, and its position embedding starts with waves of a turn
across the image, where no other is named. Leaves OUT/PROFILE-NAME-SEED-IMAGES.npz, N samples as uint8
(N, 32, 32, 3) for `benchmarks/frd.py`, and prints one line of JSON at each number of images. With `--minutes` it stops
after so long, samples and measuring not counted, and leaves samples once, with the images seen in their name: what is
slower has seen fewer. Minutes are of the processor, or of the clock on a GPU. What is there already is not trained again.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vitgan_nb as v
from benchmarks.ablations import save, train_changed
from benchmarks.limit import ConvolutionalStem


class ScaledByGamma(v.SelfModulatedLayerNorm):
    """The scale is gamma as the paper prints it, not 1 + gamma."""

    def forward(self, h: Tensor, w: Tensor) -> Tensor:
        gamma, beta = self.gamma_beta(w)[:, None].chunk(2, dim=-1)  # (B, 1, D) each
        return gamma * self.norm(h) + beta  # (B, N, D)


class CentredTokens(v.SelfModulatedLayerNorm):
    """What all tokens of an image have in common is taken off before the norm; the style comes in by gamma and beta."""

    def forward(self, h: Tensor, w: Tensor) -> Tensor:
        return super().forward(h - h.mean(1, keepdim=True), w)  # (B, N, D)


def positions_from(turns: float) -> type[v.Generator]:
    """A generator whose position embedding starts with waves of about so many turns across the image, not half a one."""

    class Positions(v.Generator):
        def __init__(self, config: v.Config, *kinds: int):
            super().__init__(config, *kinds)
            with torch.no_grad():
                self.position.weight.mul_(2 * turns)

    return Positions


class WithoutBlocks(positions_from(1 / 2)):
    """No attention and no MLP: the position embedding goes to the last norm as it is."""

    def __init__(self, config: v.Config):
        super().__init__(config)
        self.blocks = torch.nn.ModuleList()


class WavesDiscriminator(v.Discriminator):
    """The position embedding starts as plane waves of amplitude 1, not as noise of 0.02."""

    def __init__(self, config: v.Config):
        super().__init__(config)
        with torch.no_grad():
            self.position[1:] = v.waves(config.dim, torch.pi)(v.patch_centres(config.grid)).sin()


def fourier_features_from(scale: float) -> type[v.FourierFeatures]:
    """Fourier features whose waves start `scale` times as fast."""

    class Features(v.FourierFeatures):
        def __init__(self, out_features: int):
            super().__init__(out_features)
            with torch.no_grad():
                self.wave.weight.mul_(scale)

    return Features


def contrast_from(scale: float) -> type[v.Siren]:
    """A patch decoder whose layer to RGB starts at `scale` times the usual size; the notebook's starts at 0.1."""

    class Painter(v.Siren):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            torch.nn.init.normal_(self.rgb.linear.weight, std=scale)

    return Painter


class WarmedUpTraining(v.Training):
    """The learning rate grows to its value over the first 1,000 steps."""

    def train_step(self):
        for optimizer in (self.optimizer_g, self.optimizer_d):
            for group in optimizer.param_groups:
                group.setdefault("full", group["lr"])
                group["lr"] = group["full"] * min(1.0, (self.step + 1) / 1000)
        super().train_step()


class PenalisedTraining(v.Training):
    """R1 (Mescheder et al. 2018) of weight 0.1 beside the consistency."""

    def discriminator_objective(self, real: Tensor) -> tuple[Tensor, Tensor]:
        loss, consistency = super().discriminator_objective(real)
        real = real.requires_grad_()
        with self.autocast():
            logits = self.discriminator(real).float()
        (gradient,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
        return loss, consistency + 0.05 * gradient.square().sum((1, 2, 3)).mean()


class PenalisedWarmedUpTraining(PenalisedTraining, WarmedUpTraining):
    pass


def paired(weight: float) -> type[v.Training]:
    """Real and generated images compared pair by pair (Jolicoeur-Martineau 2018), with R1 and R2 of `weight`; bCR stays.

    R1 and R2 (R3GAN, arXiv:2501.05441): the squared slope of the discriminator at real and at generated images, here how
    far noise of σ = 0.1 moves the logits of a quarter of them, over σ.
    """

    class PairedTraining(v.Training):
        def discriminator_objective(self, real: Tensor) -> tuple[Tensor, Tensor]:
            self.real = real
            with torch.no_grad(), self.autocast():
                fake = self.generator(self.latents(len(real))).float()
            plain = torch.cat([real, fake])  # (2B, 3, H, W)
            augmented = v.diff_augment(plain, self.config.augment)  # (2B, 3, H, W)
            moved = augmented[::4] + 0.1 * torch.randn_like(augmented[::4])  # (B/2, 3, H, W)
            with self.autocast():
                logits = self.discriminator(torch.cat([plain, augmented, moved])).float()
            plain, augmented, moved = logits.split([len(plain), len(augmented), len(moved)])
            (real_plain, fake_plain), (real, fake) = plain.chunk(2), augmented.chunk(2)
            penalty = weight * ((moved - augmented[::4]) / 0.1).square().mean()
            penalty = penalty + v.balanced_consistency(real_plain, real, self.config.bcr_real)
            penalty = penalty + v.balanced_consistency(fake_plain, fake, self.config.bcr_fake)
            return F.softplus(fake - real).mean(), penalty

        def generator_objective(self) -> tuple[Tensor]:
            with self.autocast():
                fake = self.generator(self.latents(self.config.batch_size)).float()
                images = v.diff_augment(torch.cat([self.real, fake]), self.config.augment)
                real, fake = self.discriminator(images).float().chunk(2)
            return (F.softplus(real - fake).mean(),)

    return PairedTraining


class QuarterTraining(v.Training):
    """The consistency is of a quarter of the images, so that the discriminator's step has 2.5B of them, not 4B."""

    def discriminator_objective(self, real: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), self.autocast():
            fake = self.generator(self.latents(len(real))).float()
        images = torch.cat([real, fake])  # (2B, 3, H, W)
        others = v.diff_augment(images, self.config.augment)  # (2B, 3, H, W)
        if self.config.diff_augment:
            images, others = others, images
        with self.autocast():
            logits = self.discriminator(torch.cat([images, others[::4]])).float()  # (2.5B,)
        (real, fake), (real_o, fake_o) = (part.chunk(2) for part in logits.split([len(images), len(images) // 4]))
        consistency = v.balanced_consistency(real_o, real[::4], self.config.bcr_real)
        consistency = consistency + v.balanced_consistency(fake_o, fake[::4], self.config.bcr_fake)
        return v.discriminator_loss(real, fake), consistency


AS_MEASURED = {"diff_augment": True}  # as all of these were measured; today's `smoke` has it off
SMALL = replace(v.PROFILES["smoke"], dim=96, depth=2, heads=6, siren_dim=96, siren_depth=2)
HALF_A_TURN = {"Generator": positions_from(1 / 2)}
FORKS = {  # name: (what takes the place of what in the notebook, changes of the configuration)
    "as-it-is": ({}, {}),
    "adam": ({}, {"optimizer": "adam", "siren_depth": 2}),
    "muon": ({}, {"optimizer": "muon"}),
    "gamma": ({"SelfModulatedLayerNorm": ScaledByGamma}, {}),
    "no-flips": ({"real_batch": lambda images, indices, device: v.to_float(images[indices].to(device))}, {}),
    "omega-3": ({}, {"omega_0": 3.0}),
    "siren-depth-2": ({}, {"siren_depth": 2}),
    "siren-depth-3": ({}, {"siren_depth": 3}),
    "siren-depth-4": ({}, {"siren_depth": 4}),
    "siren-depth-5": ({}, {"siren_depth": 5}),
    "half-a-turn": (HALF_A_TURN, {"siren_depth": 4}),
    "a-quarter-turn": ({"Generator": positions_from(1 / 4)}, {"siren_depth": 4}),
    "half-a-turn-depth-3": (HALF_A_TURN, {"siren_depth": 3}),
    "half-a-turn-rate-0.008": (HALF_A_TURN, {"siren_depth": 4, "learning_rate": 0.008}),
    "fast-fourier": ({"FourierFeatures": fourier_features_from(4)}, {"siren_depth": 4}),
    "full-contrast": (HALF_A_TURN | {"Siren": contrast_from(1)}, {"siren_depth": 4}),
    "greyer": (HALF_A_TURN | {"Siren": contrast_from(0.01)}, {"siren_depth": 4}),
    "slow-fourier": ({"FourierFeatures": fourier_features_from(1 / 4)}, {"siren_depth": 4}),
    "demodulate": ({}, {"siren_depth": 4, "demodulate": True}),
    "siren-width-192": ({}, {"siren_dim": 192}),
    "bcr-1": ({}, {"bcr_real": 1.0, "bcr_fake": 1.0}),
    "bcr-10": ({}, {"bcr_real": 10.0, "bcr_fake": 10.0}),
    "cutout": ({}, {"augment": "color,translation,cutout"}),
    "rate-0.002": ({}, {"learning_rate": 0.002}),
    "rate-0.008": ({}, {"learning_rate": 0.008}),
    "batch-32": ({}, {"batch_size": 32}),
    "warm-up": ({"Training": WarmedUpTraining}, {}),
    "waves-in-D": ({"Discriminator": WavesDiscriminator}, {}),
    "r1": ({"Training": PenalisedTraining}, {}),
    "r1-bcr-1-warm-up": (
        {"Training": PenalisedWarmedUpTraining},
        {"bcr_real": 1.0, "bcr_fake": 1.0},
    ),  # the authors', but for 3,000 steps of warm-up
    "centred-tokens": (HALF_A_TURN | {"SelfModulatedLayerNorm": CentredTokens}, {"siren_depth": 4}),
    "no-blocks": ({"Generator": WithoutBlocks}, {"siren_depth": 4}),
    "convolutional-stem": (HALF_A_TURN | {"OverlappingPatchEmbedding": ConvolutionalStem}, {"siren_depth": 4}),
    "pairs": (HALF_A_TURN | {"Training": paired(0)}, {"siren_depth": 4}),
    "pairs-0.1": (HALF_A_TURN | {"Training": paired(0.1)}, {"siren_depth": 4}),
    "pairs-1": (HALF_A_TURN | {"Training": paired(1)}, {"siren_depth": 4}),
    "cheaper": (HALF_A_TURN | {"Training": QuarterTraining}, {"siren_depth": 4, "heads": 2, "siren_dim": 64}),
    "cheaper-plain": (
        HALF_A_TURN | {"Training": QuarterTraining},
        {"diff_augment": False, "siren_depth": 4, "heads": 2, "siren_dim": 64},
    ),  # the same with images as they are in the losses, as `smoke` has it since
    "stylegan2": ({}, {"discriminator": "stylegan2", "r1": 0.1}),
    "conv-decoder": ({}, {"decoder": "conv"}),
    "classes": ({}, {"classes": True}),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=FORKS)
    parser.add_argument("--profile", choices=["small", *v.PROFILES], default="small")
    parser.add_argument("--images", type=int, nargs="+", default=[24_000, 36_000, 48_000], help="in ascending order")
    parser.add_argument("--minutes", type=float, default=0.0, help="stop after so many, in place of --images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=2000, help="samples to leave")
    parser.add_argument("--out", type=Path, default=Path("runs/forks"))
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    stem = f"{flags.profile}-{flags.name}-{flags.seed}-" + f"{flags.minutes:g}min-" * bool(flags.minutes)

    def path(images: int) -> Path:
        return flags.out / f"{stem}{images:09d}.npz"

    if any(flags.out.glob(f"{stem}*.npz")) if flags.minutes else all(path(images).exists() for images in flags.images):
        return
    changed, fields = FORKS[flags.name]
    changed, fields = {"Generator": positions_from(1)} | changed, AS_MEASURED | fields
    config = replace((v.PROFILES | {"small": SMALL})[flags.profile], dataset="cifar10", seed=flags.seed, **fields)
    runs = train_changed(config, changed, flags.images, flags.minutes, flags.n)
    for mark, (line, samples) in zip(flags.images, runs, strict=not flags.minutes):
        save(samples, path(line["images"] if flags.minutes else mark))
        print(json.dumps({"profile": flags.profile, "name": flags.name} | line), flush=True)


if __name__ == "__main__":
    main()
