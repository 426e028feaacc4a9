"""The textbook form of a training step beside the fast form of the notebook, timed in turns in one run.

    python benchmarks/side_by_side.py [--profile paper] [--batch-size 16] [--repeats 5]

The classes below are the textbook forms. They hold the same weights as the fast ones, and `tests/test_fast.py` checks
that the networks of both give the same values and gradients, the notebook that the fast step is the plain one.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vitgan_nb as fast


class TextbookModulatedLinear(fast.ModulatedLinear):
    """One weight matrix for each patch of each image, applied as a grouped convolution (Karras et al. 2020)."""

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        (b, n), m = style.shape[:2], x.shape[2]
        s = self.scale(style)  # (B, N, in)
        w = self.linear.weight * self.linear.weight_gain * s[:, :, None]  # (B, N, out, in)
        if self.demodulate:
            w = w * torch.rsqrt(w.square().sum(-1, keepdim=True) + 1e-8)
        pixels = x.expand(b, n, m, -1).reshape(1, b * n, m, -1).transpose(2, 3).flatten(1, 2)  # (1, B · N · in, M)
        y = F.conv1d(pixels, w.flatten(0, 1).flatten(0, 1)[..., None], groups=b * n)  # (1, B · N · out, M)
        y = y.view(b, n, -1, m).transpose(2, 3)  # (B, N, M, out)
        return y + self.linear.bias


class TextbookSiren(fast.Siren):
    """Fourier features computed anew for every patch of every image."""

    def forward(self, y: Tensor, v: Tensor) -> Tensor:
        x = self.fourier(v.expand(*y.shape[:2], -1, -1).contiguous())  # (B, N, M, dim)
        for layer in self.layers:
            x = torch.sin(self.omega_0 * layer(x, y))
        return self.rgb(x, y)


class TextbookL2Attention(fast.L2Attention):
    """Softmax of minus the pairwise distance, all distances formed."""

    def forward(self, h: Tensor) -> Tensor:
        v = fast.split_heads(self.value(h), self.heads)
        return self.out(fast.merge_heads(self.weights(h).to(v.dtype) @ v))


TEXTBOOK = {
    fast.ModulatedLinear: TextbookModulatedLinear,
    fast.Siren: TextbookSiren,
    fast.L2Attention: TextbookL2Attention,
}


def as_textbook(network: nn.Module) -> nn.Module:
    """The same network with the same weights, every part that has a textbook form computing in that; returns it."""
    for module in network.modules():
        module.__class__ = TEXTBOOK.get(type(module), type(module))
    return network


class TextbookTraining(fast.Run):
    """A run whose step is the notebook's plain one: four passes, float32, textbook parts, loops over the weights."""

    def __init__(self, config: fast.Config):
        super().__init__(config, *fast.load_images(config), device=fast.best_device())
        as_textbook(self.generator)
        as_textbook(self.discriminator)
        self.optimizer_g, self.optimizer_d = (
            torch.optim.Adam(n.parameters(), lr=config.learning_rate, betas=config.betas, foreach=False)
            for n in (self.generator, self.discriminator)
        )

    def train_step(self):
        fast.plain_step(self)


@torch.no_grad()
def textbook_average(average: nn.Module, network: nn.Module, decay: float):
    for old, new in zip(
        (*average.parameters(), *average.buffers()), (*network.parameters(), *network.buffers()), strict=True
    ):
        old.copy_(decay * old + (1 - decay) * new)


def in_turns(textbook: Callable, quick: Callable, repeats: int) -> dict:
    """Seconds of both, called alternately after one warm-up each, and the ratio: median, least and largest."""
    times = []
    for _ in range(repeats + 1):
        for function in (textbook, quick):
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    pairs = np.array(times).reshape(-1, 2)[1:]
    ratio = pairs[:, 0] / pairs[:, 1]
    return {
        "textbook_s": round(float(np.median(pairs[:, 0])), 4),
        "fast_s": round(float(np.median(pairs[:, 1])), 4),
        "ratio": round(float(np.median(ratio)), 2),
        "from": round(float(ratio.min()), 2),
        "to": round(float(ratio.max()), 2),
    }


def comparisons(config: fast.Config):
    """(name, textbook, fast) for each technique alone, in the number format of `config`, then for the whole step."""
    run = fast.Training(config)
    device, grid, d = run.device, config.grid, run.discriminator
    images = torch.rand(config.batch_size, 3, config.image_size, config.image_size, device=device) * 2 - 1

    def both_ways(function: Callable, *inputs: Tensor) -> Callable:
        """Forward and backward of `function`, gradients of its inputs included."""

        def work():
            leaves = [x.detach().requires_grad_() for x in inputs]
            with run.autocast():
                y = function(*leaves)
            y.float().square().sum().backward()

        return work

    four = [images] * 4
    yield (
        "one pass of the discriminator over 4B images, not four over B",
        both_ways(lambda *parts: torch.cat([d(part) for part in parts]), *four),
        both_ways(lambda *parts: d(torch.cat(parts)), *four),
    )
    layers = [m for m in d.modules() if isinstance(m, fast.EqualizedLinear)]

    def normalise(times: int):
        for layer in layers * times:
            layer.normalise(layer.weight)

    yield (
        "weights normalised once for the four batches of the discriminator's step, not four times",
        lambda: normalise(4),
        lambda: normalise(1),
    )

    style = torch.randn(config.batch_size, grid**2, config.dim, device=device)
    pixels = torch.randn(config.batch_size, grid**2, config.patch_size**2, config.siren_dim, device=device)
    layer = fast.ModulatedLinear(config.siren_dim, config.siren_dim, config.dim).to(device)
    slow_layer = as_textbook(fast.ModulatedLinear(config.siren_dim, config.siren_dim, config.dim)).to(device)
    yield (
        "modulated layer: inputs scaled, not a matrix for every patch",
        both_ways(slow_layer, pixels, style),
        both_ways(layer, pixels, style),
    )
    fourier = fast.FourierFeatures(config.siren_dim).to(device)
    v = fast.patch_centres(config.patch_size).to(device)
    everywhere = v.expand(config.batch_size, grid**2, -1, -1).contiguous()
    yield (
        "Fourier features once, not for every patch",
        both_ways(lambda y: fourier(everywhere) * y, style[:, :, None]),
        both_ways(lambda y: fourier(v) * y, style[:, :, None]),
    )
    h = torch.randn(4 * config.batch_size, grid**2 + 1, config.dim, device=device)
    l2 = fast.L2Attention(config.dim, config.heads).to(device)
    slow_l2 = as_textbook(fast.L2Attention(config.dim, config.heads)).to(device)
    yield "L2 attention by a dot product, not all distances", both_ways(slow_l2, h), both_ways(l2, h)
    if device.type == "cpu":
        q, k, w = (
            torch.randn(4 * config.batch_size, config.heads, grid**2 + 1, config.dim // config.heads) for _ in range(3)
        )
        q, k, w = q.to(run.dtype), k.to(run.dtype), w.to(run.dtype)
        bias = torch.randn(4 * config.batch_size, config.heads, 1, grid**2 + 1).to(run.dtype)
        yield (
            "attention on a CPU: product, softmax, product, not the library's fused kernel",
            both_ways(
                lambda q, k, v: F.scaled_dot_product_attention(q, k, v, bias.expand(-1, -1, q.shape[2], -1)), q, k, w
            ),
            both_ways(lambda q, k, v: fast.attend(q, k, v, q.shape[-1] ** -0.5, bias), q, k, w),
        )
    looped = torch.optim.Adam(run.generator.parameters(), foreach=False, lr=0.0)
    for parameter in run.generator.parameters():
        parameter.grad = torch.randn_like(parameter)

    def looped_update():
        looped.step()
        textbook_average(run.average.module, run.generator, 0.99)

    def fused_update():
        run.optimizer_g.step()
        fast.update_average(run.average, run.generator, 500_000, config.batch_size, 10**6)

    yield "fused Adam and average, not a loop over the weights", looped_update, fused_update

    single = fast.Training(replace(config, precision="float32"))
    if run.dtype != torch.float32:
        name = str(run.dtype).removeprefix("torch.")
        yield f"the fast step in {name}, not in float32", single.train_step, run.train_step
    textbook = TextbookTraining(config)
    yield "the whole step, float32", textbook.train_step, single.train_step
    yield (
        f"the whole step, {str(run.dtype).removeprefix('torch.')} against float32",
        textbook.train_step,
        run.train_step,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="paper", choices=fast.PROFILES)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args()
    config = replace(fast.PROFILES[flags.profile], dataset="shapes", optimizer="adam", batch_size=flags.batch_size)
    print("| technique | textbook, ms | fast, ms | ratio | least – largest |\n|---|---|---|---|---|", flush=True)
    for name, textbook, quick in comparisons(config):
        found = in_turns(textbook, quick, flags.repeats)
        milliseconds = [f"{1000 * found[key]:,.1f}" for key in ("textbook_s", "fast_s")]
        print(
            f"| {name} | {' | '.join(milliseconds)} | {found['ratio']} | {found['from']} – {found['to']} |", flush=True
        )


if __name__ == "__main__":
    main()
