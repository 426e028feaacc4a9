"""Train peers of ViTGAN on one CPU core for the same minutes, and leave samples of each to be measured.

    python benchmarks/peers.py NAME --minutes 4 8 15 30 [--seed 0] [--out runs/peers]

NAME is one of
    dcgan     DCGAN as PyTorch's tutorial builds it (Radford et al. 2016), one level less: 32 × 32
    vit-dcgan the notebook's generator against DCGAN's discriminator
    sngan     SNGAN's residual networks for 32 × 32 (Miyato et al. 2018, appendix), about half as wide
    flow      a rectified flow (Liu et al. 2022) through a small U-Net, sampled in 25 Euler steps
    smoke     the notebook's profile of that name
    mistakes  the same with published mistakes put back, `MISTAKES` below

Same for all: CIFAR-10, half of it mirrored; one thread; the notebook's number format; samples from the moving average of
the weights by the notebook's rule, also where a paper has none. Convolutions run channels last, faster here. Batch normalisation takes its statistics from the batch,
in sampling too, as the tutorial does.

The clock counts the processor's time in training steps: neither loading nor sampling, nor what else the core does. At each
of the --minutes leaves OUT/NAME-SEED-MINUTES.npz, 10,000 samples as uint8 (N, 32, 32, 3) for `benchmarks/frd.py`, and
prints one line of JSON. Interrupted, it goes on where it stopped: training from OUT/NAME-SEED.pt, and samples that are
there stay.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vitgan_nb as v

SAVE_EVERY = 120  # seconds of training between two checkpoints
CPU = torch.device("cpu")


def autocast():
    dtype = v.number_format("auto", CPU)
    return torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)


class Peer:
    """A run of one peer, used like `vitgan_nb.Training`.

    `recipe` holds the fields of the configuration that are the peer's own. A step sees `batches` batches of real images.
    """

    recipe: dict
    batches = 1

    def __init__(self, config: v.Config):
        v.keep_freed_memory()
        self.config = replace(config, **self.recipe)
        self.images, _ = v.load_images(config)
        torch.manual_seed(config.seed)
        self.generator, self.discriminator = (part.to(memory_format=torch.channels_last) for part in self.networks())
        self.average = v.moving_average(self.generator)
        self.optimizer_g, self.optimizer_d = (
            torch.optim.Adam(part.parameters(), self.config.learning_rate, self.config.betas, fused=True)
            if [*part.parameters()]
            else None
            for part in (self.generator, self.discriminator)
        )
        self.step = 0

    def real(self, batch: int) -> Tensor:
        """Batch number `batch` of this step, (B, 3, 32, 32)."""
        index = self.step * self.batches + batch
        indices = v.batch_indices(len(self.images), self.config.batch_size, index, self.config.seed)
        return v.real_batch(self.images, indices).contiguous(memory_format=torch.channels_last)

    def latents(self) -> Tensor:
        return torch.randn(self.config.batch_size, self.config.latent_dim)

    def descend(self, loss: Tensor, optimizer: torch.optim.Optimizer):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def train_step(self):
        """One step of the peer, and of the average."""
        self.update()
        self.step += 1
        seen = self.config.batch_size * self.batches
        v.update_average(self.average, self.generator, self.config.ema_half_life, seen, self.step * seen)


def batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, track_running_stats=False)


class DCGANGenerator(nn.Sequential):
    """Latents (B, 100) to images (B, 3, 32, 32) (Radford et al. 2016, Figure 1), `n` channels before the last layer."""

    def __init__(self, latent_dim: int, n: int):
        layers = [nn.Unflatten(1, (latent_dim, 1, 1))]  # (B, 100, 1, 1)
        for channels_in, channels, stride, padding in (
            (latent_dim, 4 * n, 1, 0),
            (4 * n, 2 * n, 2, 1),
            (2 * n, n, 2, 1),
        ):
            layers += [nn.ConvTranspose2d(channels_in, channels, 4, stride, padding, bias=False)]
            layers += [batch_norm(channels), nn.ReLU(inplace=True)]  # (B, 4n, 4, 4), (B, 2n, 8, 8), (B, n, 16, 16)
        super().__init__(*layers, nn.ConvTranspose2d(n, 3, 4, 2, 1, bias=False), nn.Tanh())  # (B, 3, 32, 32)


class DCGANDiscriminator(nn.Sequential):
    """Images (B, 3, 32, 32) to logits (B,) (Radford et al. 2016), `n` channels after the first layer."""

    def __init__(self, n: int):
        layers = [nn.Conv2d(3, n, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]  # (B, n, 16, 16)
        for channels in (2 * n, 4 * n):
            layers += [nn.Conv2d(channels // 2, channels, 4, 2, 1, bias=False)]
            layers += [batch_norm(channels), nn.LeakyReLU(0.2, inplace=True)]  # (B, 2n, 8, 8), (B, 4n, 4, 4)
        super().__init__(*layers, nn.Conv2d(4 * n, 1, 4, 1, 0, bias=False), nn.Flatten(0))  # (B,)


class DCGAN(Peer):
    """Loss, step and settings of the tutorial; the sigmoid is in the loss, which changes nothing but rounding."""

    recipe = {"latent_dim": 100, "batch_size": 128, "learning_rate": 2e-4, "betas": (0.5, 0.999)}

    def networks(self) -> tuple[nn.Module, nn.Module]:
        networks = DCGANGenerator(self.config.latent_dim, 64), DCGANDiscriminator(64)
        for module in (module for network in networks for module in network):
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1, 0.02)
            elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(module.weight, 0, 0.02)
        return networks

    def update(self):
        real = self.real(0)
        with autocast():
            fake = self.generator(self.latents())
            logits = self.discriminator(real), self.discriminator(fake.detach())  # each with statistics of its own
        self.descend(v.discriminator_loss(*(x.float() for x in logits)), self.optimizer_d)
        self.discriminator.requires_grad_(False)
        with autocast():
            logits = self.discriminator(fake)
        self.descend(v.generator_loss(logits.float()), self.optimizer_g)  # the same fakes, as in the tutorial
        self.discriminator.requires_grad_(True)


class ViTOverDCGAN(DCGAN):
    """The notebook's generator, which learns with Muon, against DCGAN's discriminator, by its loss; smaller batches."""

    recipe = {"batch_size": 64, "learning_rate": 2e-4, "betas": (0.5, 0.999)}

    def __init__(self, config: v.Config):
        super().__init__(config)
        self.optimizer_g = v.Muon(self.generator.parameters(), config)

    def networks(self) -> tuple[nn.Module, nn.Module]:
        _, discriminator = super().networks()
        return v.Generator(self.config), discriminator


def glorot(layer: nn.Module, gain: float = 1.0) -> nn.Module:
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class UpBlock(nn.Module):
    """(B, C, H, W) to (B, C, 2H, 2W) (Miyato et al. 2018, appendix, Figure 5 (b))."""

    def __init__(self, n: int):
        super().__init__()
        self.norm1, self.norm2 = batch_norm(n), batch_norm(n)
        self.conv1, self.conv2 = (glorot(nn.Conv2d(n, n, 3, 1, 1), math.sqrt(2)) for _ in range(2))
        self.shortcut = glorot(nn.Conv2d(n, n, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = F.interpolate(F.relu(self.norm1(x)), scale_factor=2)  # (B, C, 2H, 2W)
        h = self.conv2(F.relu(self.norm2(self.conv1(h))))  # (B, C, 2H, 2W)
        return h + F.interpolate(self.shortcut(x), scale_factor=2)  # (B, C, 2H, 2W): 1 × 1 before is 1 × 1 after


class SNGANGenerator(nn.Module):
    """Latents (B, 128) to images (B, 3, 32, 32) (Miyato et al. 2018, appendix, Table 4 (a)); there `n` is 256."""

    def __init__(self, latent_dim: int, n: int):
        super().__init__()
        self.linear = glorot(nn.Linear(latent_dim, 16 * n))
        self.blocks = nn.Sequential(*(UpBlock(n) for _ in range(3)))
        self.norm, self.conv = batch_norm(n), glorot(nn.Conv2d(n, 3, 3, 1, 1))

    def forward(self, z: Tensor) -> Tensor:
        h = self.linear(z).unflatten(1, (-1, 4, 4))  # (B, C, 4, 4)
        h = self.blocks(h.contiguous(memory_format=torch.channels_last))  # (B, C, 32, 32)
        return torch.tanh(self.conv(F.relu(self.norm(h))))  # (B, 3, 32, 32)


class DownBlock(nn.Module):
    """(B, C, H, W) to (B, n, H/2, W/2), or (B, n, H, W) if not `down` (Miyato et al. 2018, appendix, Figure 5 (a))."""

    def __init__(self, channels: int, n: int, down: bool):
        super().__init__()
        self.conv1 = spectral_norm(glorot(nn.Conv2d(channels, n, 3, 1, 1), math.sqrt(2)))
        self.conv2 = spectral_norm(glorot(nn.Conv2d(n, n, 3, 1, 1), math.sqrt(2)))
        self.resize = nn.AvgPool2d(2) if down else nn.Identity()
        self.shortcut = spectral_norm(glorot(nn.Conv2d(channels, n, 1))) if down else nn.Identity()
        self.before = nn.Identity() if channels == 3 else nn.ReLU()  # no ReLU on the image itself

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(self.before(x))))  # (B, n, H, W)
        return self.resize(h) + self.shortcut(self.resize(x))  # (B, n, H/2, W/2)


class SNGANDiscriminator(nn.Module):
    """Images (B, 3, 32, 32) to logits (B,) (Miyato et al. 2018, appendix, Table 4 (b)); there `n` is 128."""

    def __init__(self, n: int):
        super().__init__()
        down = DownBlock(3, n, True), DownBlock(n, n, True), DownBlock(n, n, False), DownBlock(n, n, False)
        self.blocks, self.head = nn.Sequential(*down), spectral_norm(glorot(nn.Linear(n, 1)))

    def forward(self, images: Tensor) -> Tensor:
        h = F.relu(self.blocks(images)).sum((2, 3))  # (B, n)
        return self.head(h)[:, 0]  # (B,)


class SNGAN(Peer):
    """Hinge loss, five steps of the discriminator for one of the generator; the rate does not fall, as nothing ends."""

    recipe = {"latent_dim": 128, "batch_size": 64, "learning_rate": 2e-4, "betas": (0.0, 0.9)}
    batches = 5

    def networks(self) -> tuple[nn.Module, nn.Module]:
        return SNGANGenerator(self.config.latent_dim, 112), SNGANDiscriminator(64)

    def update(self):
        for batch in range(self.batches):
            real = self.real(batch)
            with autocast():
                with torch.no_grad():
                    fake = self.generator(self.latents())
                real_logits, fake_logits = self.discriminator(torch.cat([real, fake])).float().chunk(2)
            self.descend(F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean(), self.optimizer_d)
        self.discriminator.eval().requires_grad_(False)  # in eval mode no power step is made
        with autocast():
            logits = self.discriminator(self.generator(self.latents()))
        self.descend(-logits.float().mean(), self.optimizer_g)
        self.discriminator.train().requires_grad_(True)


class TimedBlock(nn.Module):
    """A residual block of the U-Net, (B, C, H, W) to (B, n, H, W), scaled and shifted by the time's features (B, T)."""

    def __init__(self, channels: int, n: int, time_dim: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, channels), nn.Conv2d(channels, n, 3, 1, 1)
        self.norm2, self.conv2 = nn.GroupNorm(8, n), nn.Conv2d(n, n, 3, 1, 1)
        self.time, self.shortcut = nn.Linear(time_dim, 2 * n), nn.Conv2d(channels, n, 1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)  # (B, n, 1, 1) each
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))  # (B, n, H, W)
        return self.shortcut(x) + self.conv2(F.silu(h * (1 + scale) + shift))  # (B, n, H, W)


class UNet(nn.Module):
    """The velocity (B, 3, 32, 32) at `x` (B, 3, 32, 32) and time `t` (B,), and the flow along it (Liu et al. 2022)."""

    euler_steps = 25

    def __init__(self, n: int):
        super().__init__()
        time_dim = 4 * n
        self.time = nn.Sequential(nn.Linear(2 * n, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim), nn.SiLU())
        self.register_buffer("frequencies", torch.logspace(0, 3, n), persistent=False)  # radians from t = 0 to 1
        self.enter, self.norm, self.leave = nn.Conv2d(3, n, 3, 1, 1), nn.GroupNorm(8, n), nn.Conv2d(n, 3, 3, 1, 1)
        widths = (n, n), (n, 2 * n), (2 * n, 4 * n), (4 * n, 4 * n), (6 * n, 2 * n), (3 * n, n)
        self.down1, self.down2, self.low1, self.low2, self.up2, self.up1 = (
            TimedBlock(*width, time_dim) for width in widths
        )

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies  # (B, n)
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))  # (B, 4n)
        h1 = self.down1(self.enter(x), time)  # (B, n, 32, 32)
        h2 = self.down2(F.avg_pool2d(h1, 2), time)  # (B, 2n, 16, 16)
        h = self.low2(self.low1(F.avg_pool2d(h2, 2), time), time)  # (B, 4n, 8, 8)
        h = self.up2(torch.cat([F.interpolate(h, scale_factor=2), h2], dim=1), time)  # (B, 2n, 16, 16)
        h = self.up1(torch.cat([F.interpolate(h, scale_factor=2), h1], dim=1), time)  # (B, n, 32, 32)
        return self.leave(F.silu(self.norm(h)))  # (B, 3, 32, 32)

    def forward(self, z: Tensor) -> Tensor:
        x = z.unflatten(1, (3, 32, 32)).contiguous(memory_format=torch.channels_last)  # (B, 3, 32, 32)
        for i in range(self.euler_steps):
            t = torch.full((len(z),), i / self.euler_steps)  # (B,)
            x = x + self.velocity(x, t).float() / self.euler_steps  # (B, 3, 32, 32)
        return x  # (B, 3, 32, 32)


class RectifiedFlow(Peer):
    """From noise z at t = 0 to an image x at t = 1 the velocity is x - z (Liu et al. 2022, Equation 1)."""

    recipe = {"latent_dim": 3 * 32 * 32, "batch_size": 128, "learning_rate": 1e-3, "betas": (0.9, 0.999)}

    def networks(self) -> tuple[nn.Module, nn.Module]:
        return UNet(32), nn.Identity()

    def update(self):
        x, z = self.real(0), self.latents().unflatten(1, (3, 32, 32))  # (B, 3, 32, 32) each
        t = torch.rand(len(x))  # (B,)
        between = torch.lerp(z, x, t[:, None, None, None]).contiguous(memory_format=torch.channels_last)
        with autocast():
            velocity = self.generator.velocity(between, t)
        self.descend(F.mse_loss(velocity.float(), x - z), self.optimizer_g)


MISTAKES = [  # of tests/test_mistakes.py; the others there change the same lines, or no result
    "the MLP's output is thrown away",
    "one norm shared by both halves of a block",
    "scaled by the full width instead of the head's",
    "softmax of plus the distance",
    "the first sigma from one power step off a random vector",
    "a GELU after the last layer",
    "real images in [0, 1]",
]


def with_mistakes(config: v.Config):
    """A `Training` of the notebook's program with `MISTAKES` in it."""
    sys.path.insert(0, str(Path(v.__file__).parent / "tests"))
    import test_mistakes
    from conftest import module_from

    source, edits_of = test_mistakes.SOURCE, {name: edits for name, _, edits in test_mistakes.MISTAKES}
    for name in MISTAKES:
        for old, new in edits_of[name]:
            if source.count(old) != 1:
                raise v.BadInput(f"the edits of the mistake {name!r} no longer fit.")
            source = source.replace(old, new)
    changed = module_from(source)
    return changed.Training(changed.Config(**asdict(config)))


PEERS = {
    "dcgan": DCGAN,
    "vit-dcgan": ViTOverDCGAN,
    "sngan": SNGAN,
    "flow": RectifiedFlow,
    "smoke": v.Training,
    "mistakes": with_mistakes,
}


def stateful(run) -> dict:
    """The networks, their average and the optimizers of a run, by name."""
    return {name: part for name, part in vars(run).items() if hasattr(part, "state_dict")}


def save(run, clock: dict, path: Path):
    """Write all that `restore` needs; `clock` holds the seconds trained, and those before the last step."""
    state = {name: part.state_dict() for name, part in stateful(run).items()}
    with v.written_whole(path) as partial, open(partial, "wb") as file:
        torch.save({"step": run.step, "clock": clock, "rng": torch.get_rng_state(), "parts": state}, file)


def restore(run, path: Path) -> dict:
    """Bring `run` to where it was saved; returns its clock."""
    state = torch.load(path, weights_only=True)
    for name, part in stateful(run).items():
        part.load_state_dict(state["parts"][name])
    run.step = state["step"]
    torch.set_rng_state(state["rng"])
    return state["clock"]


@torch.no_grad()
def sample(run, name: str, n: int) -> np.ndarray:
    """`n` images of the average, uint8 (n, 32, 32, 3)."""
    rng, batches = v.latent_stream(0), []
    for start in range(0, n, 100):
        z = torch.randn(min(100, n - start), run.config.latent_dim, generator=rng)  # (100, latent_dim)
        with autocast():
            images = run.average.module(z).float()  # (100, 3, 32, 32)
        if name == "mistakes":
            images = 2 * images - 1  # its real images were in [0, 1]
        batches.append(v.to_uint8(images).permute(0, 2, 3, 1))  # (100, 32, 32, 3)
    return torch.cat(batches).numpy()


def train(name: str, config: v.Config, minutes: list[int], out: Path, n: int = 10_000):
    """Train a peer, leave `n` samples at each of the `minutes` where there are none, and print a line for each."""
    run, checkpoint, clock = PEERS[name](config), out / f"{name}-{config.seed}.pt", {"before": 0.0, "now": 0.0}
    if checkpoint.exists():
        clock = restore(run, checkpoint)
    parts = {"g": run.generator, "d": run.discriminator}
    weights = {f"weights_{key}": sum(p.numel() for p in part.parameters()) for key, part in parts.items()}
    saved = clock["now"]
    for mark in minutes:
        path = out / f"{name}-{config.seed}-{mark:04d}.npz"
        if path.exists():
            continue
        if clock["before"] >= 60 * mark:
            raise v.BadInput(
                f"{checkpoint} is past {mark} minutes, of which there are no samples; delete it to begin anew."
            )
        while clock["now"] < 60 * mark:
            start = time.process_time()
            run.train_step()
            clock = {"before": clock["now"], "now": clock["now"] + time.process_time() - start}
            if clock["now"] - saved > SAVE_EVERY:
                save(run, clock, checkpoint)
                saved = clock["now"]
        if not all(p.isfinite().all() for p in run.average.parameters()):
            raise v.BadInput(f"the weights of {name} are no longer finite before {mark} minutes.")
        save(run, clock, checkpoint)
        start = time.process_time()
        images = sample(run, name, n)
        seconds = time.process_time() - start
        with v.written_whole(path) as partial, open(partial, "wb") as file:
            np.savez_compressed(file, images=images)
        seen = run.step * run.config.batch_size * getattr(run, "batches", 1)  # a `Training` sees one batch a step
        line = {"name": name, "seed": config.seed, "minutes": mark, "images": seen, **weights}
        print(json.dumps(line | {"sampling_seconds": round(seconds, 1), "samples": str(path)}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("--minutes", type=int, nargs="+", required=True, help="in ascending order")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/peers"))
    flags = parser.parse_args()
    torch.set_num_threads(1)
    config = replace(v.PROFILES["smoke"], dataset="cifar10", seed=flags.seed)
    train(flags.name, config, sorted(flags.minutes), flags.out)


if __name__ == "__main__":
    try:
        main()
    except v.BadInput as error:
        sys.exit(f"error: {error}")
