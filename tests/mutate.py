"""Mistakes by machine: one small edit of `vitgan_nb.py` at a time, and whether a test notices it.

    python tests/mutate.py [--part teaching|engine] [--only NAME] [--sample N --seed S]

An edit changes a number, an operator, a comparison or a condition, drops a keyword, a minus, a statement or a `with`, or
swaps two arguments, in the code that teaches and in the engine; texts, pictures and checks stay as they are. A first
run of all tests notes which lines each of them executes. Then every edit meets the tests that execute its line, the
fastest first, until one fails, for `SECONDS` of tests at most. Each runs in a fork of this process, in which PyTorch
is already loaded.

A line for each edit that nobody noticed, and a table at the end. The exit status is 1 where a share is under its goal.
`SAME` lists the edits that cannot be noticed, because they mean the same: these are not counted. `LEFT` lists those
that could be, and why they are left: they count as missed.
"""

import argparse
import ast
import collections
import contextlib
import gc
import importlib
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import conftest
import pytest
import torch

ROOT, SCRIPT = conftest.ROOT, conftest.SCRIPT
SOURCE = SCRIPT.read_bytes()  # columns in `ast` are of bytes
GOALS = {"teaching": 0.95, "engine": 0.85}
SECONDS = {"teaching": 10, "engine": 60}  # of tests for one edit; the first one runs however long it takes
TESTS = {
    "teaching": ["vitgan_nb.py", "tests/test_reference.py", "tests/test_fast.py"],
    "engine": [
        f"tests/test_{name}.py"
        for name in (
            *("engine", "processes", "never_lose_a_run", "command_line", "bad_input", "classes", "folder"),
            "gpu_rehearsal",
        )
    ],
}
# Long, or random, or processes that fork: left out. So is every test that starts a process, whose program is not edited.
LEFT_OUT = (
    "not bfloat16_trains and not gelu_after and not killed_at and not any_value and not any_bytes and not two_proc"
)

ENGINE = {
    "load_images",
    "written_whole",
    "room_for_images",
    "epoch_order",
    "batch_indices",
    "Run",
    "sample",
    "kid_of_thumbnails",
}  # beside section 18
NOT_EDITED = {  # drawings, file formats, messages, what only a picture uses, what is sent to a GPU
    "draw_shapes", "read_image", "decode", "read_folder", "read_cifar10", "sent", "learn_by_heart", "shape_walk", "gelu_after_the_head",
    "real_images_from_zero_to_one", "neither_diffaugment_nor_bcr", "train_small", "keep_freed_memory",
    "draw_progress", "save_progress", "save_picture", "save_film", "save_program", "plan", "duration", "evaluate", "Weaker",
    "Keeper.draw",
    "Training.images_for_all", "Training.any_process",  # for several processes
}  # fmt: skip
MESSAGES = {"print", "say", "BadInput", "ValueError"}

# (function, before, after): why no test can tell. Not counted.
SPEED = "the same numbers, sooner or later"
SQUARE = "images are square"
ORDER = "the same either way round"
MEMORY = "the same numbers, with more memory"
SAME = {
    (
        "real_batch",
        "torch.rand(len(batch), 1, 1, 1, device=batch.device) < 0.5",
        "(torch.rand(len(batch), 1, 1, 1, device=batch.device) <= 0.5)",
    ): "exactly one half is one draw in sixteen million",
    (
        "real_points",
        "torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(n, 2)",
        "(torch.stack([angle.cos(), angle.sin()], 1) - 0.05 * torch.randn(n, 2))",
    ): "a normal number and its negative are distributed alike",
    ("train", "run.any_process(False)", "run.any_process(True)"): "all wait; the answer is not asked for",
    ("MappingNetwork.forward", "truncation == 1", "truncation == 2"): "at 1 both branches give w, but for rounding",
    (
        "patch_centres",
        'torch.meshgrid(centre, centre, indexing="ij")',
        "torch.meshgrid(centre, centre)",
    ): "the default, which warns",
    ("attend", "k.transpose(-1, -2)", "k.transpose(-1, (2))"): "of four axes, 2 is -2",
    ("SelfAttention.weights", "k.transpose(-1, -2)", "k.transpose(-1, (2))"): "of four axes, 2 is -2",
    (
        "random_translation",
        "torch.arange(x.shape[1], device=x.device)",
        "torch.arange(x.shape[1])",
    ): "an index may lie on the CPU",
    ("random_translation", "torch.arange(b, device=x.device)", "torch.arange(b)"): "an index may lie on the CPU",
    ("random_translation", "x.shape[2]", "x.shape[3]"): SQUARE,
    ("random_cutout", "x.shape[2]", "x.shape[3]"): SQUARE,
    (
        "ImprovedSpectralNorm.__init__",
        "torch.linalg.svd(weight.detach(), full_matrices=False)",
        "torch.linalg.svd(weight.detach())",
    ): "only the first vectors are used",
    ("ImprovedSpectralNorm.__init__", "full_matrices=False", "full_matrices=True"): "only the first vectors are used",
    (
        "ImprovedSpectralNorm.__init__",
        "self.power_step(weight.detach())",
        "pass",
    ): "turns vectors that are exact but for rounding",
    (
        "ImprovedSpectralNorm.forward",
        "self.u.clone() @ (weight @ self.v.clone())",
        "(weight @ self.v.clone() @ self.u.clone())",
    ): ORDER,
    (
        "Discriminator.tokens",
        "self.class_token.expand(len(h), -1, -1)",
        "self.class_token.expand(len(h), (1), -1)",
    ): "that axis is 1 long",
    ("update_average", "min(half_life, 0.05 * images)", "min(0.05 * images, half_life)"): ORDER,
    (
        "plain_step",
        "balanced_consistency(d_real, d_real_t, config.bcr_real)",
        "balanced_consistency(d_real_t, d_real, config.bcr_real)",
    ): "a difference is squared",
    (
        "plain_step",
        "balanced_consistency(d_fake, d_fake_t, config.bcr_fake)",
        "balanced_consistency(d_fake_t, d_fake, config.bcr_fake)",
    ): "a difference is squared",
    (
        "MatrixMuon.step",
        "torch._foreach_lerp(gradients, momenta, 0.5)",
        "torch._foreach_lerp(momenta, gradients, 0.5)",
    ): "half-way, from either end",
    (
        "Muon",
        "_step_supports_amp_scaling = True",
        "_step_supports_amp_scaling = False",
    ): "the scaler then divides and skips by itself, and waits for the GPU",
    ("Muon", "found_inf, grad_scale = None, 1", "found_inf, grad_scale = None, 2"): "the scaler sets both or neither",
    ("kid", "k(a, b)", "k(b, a)"): "the mean over all pairs",
    ("thumbnails", "images.split(1000)", "images.split(1001)"): SPEED,
    ("enough_images", "min(len(samples), len(real))", "min(len(real), len(samples))"): ORDER,
    ("kid_of_thumbnails", "enough_images(samples, real)", "enough_images(real, samples)"): ORDER,
    (
        "ClassMapping.forward",
        "torch.arange(z.shape[0], device=z.device)",
        "torch.arange(z.shape[0])",
    ): "a CPU has no other",
    (
        "ClassEmbedding.__init__",
        "super().__init__(kinds, dim, bias=False)",
        "super().__init__(kinds, dim)",
    ): "no use of it",
    ("ClassEmbedding.__init__", "bias=False", "bias=True"): "no use of it",
    ("kid_of_thumbnails", "kid(x, y)", "kid(y, x)"): ORDER,
    ("Training.__init__", "keep_freed_memory()", "pass"): SPEED,
    (
        "Run.autocast",
        "torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)",
        "torch.autocast(self.device.type, dtype=self.dtype)",
    ): "autocast to float32 switches itself off, with a warning",
    ("Run.count", "terms[0]", "terms[1]"): "each is one number",
    ("OneStream.__init__", "super().__init__()", "pass"): "it does nothing there",
    ("Run.record", "torch.no_grad()", ""): MEMORY,
    ("Run.samples", "torch.no_grad()", ""): MEMORY,
    ("Run.class_rows", "torch.no_grad()", ""): MEMORY,
    ("Run.samples", "64", "65"): "there are 64",
    ("steepness", "torch.no_grad()", ""): MEMORY,
    ("kid_of_thumbnails", "zip(a, b, strict=True)", "zip(b, a, strict=True)"): ORDER,
    ("kid_of_thumbnails", "min(len(samples), len(real))", "min(len(real), len(samples))"): ORDER,
    (
        "sample",
        "torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)",
        "torch.autocast(device.type, enabled=dtype != torch.float32)",
    ): "bfloat16 is a CPU's default",
    ("sample", "generator.config.image_size**2", "generator.config.image_size**3"): SPEED,
    ("sample", "generator.config.image_size**2", "(generator.config.image_size * 2)"): SPEED,
    ("sample", "32**2", "32**3"): SPEED,
    ("sample", "100 * 32**2", "101 * 32**2"): SPEED,
    ("sample", "100 * 32**2", "(100 / 32 ** 2)"): SPEED,
    (
        "sample",
        "max(1, 100 * 32**2 // generator.config.image_size**2)",
        "max(2, 100 * 32**2 // generator.config.image_size**2)",
    ): SPEED,
    ("sample", "32**2", "33**2"): SPEED,
    ("sample", "32**2", "(32 * 2)"): SPEED,
    ("steepness", "n.u @ (layers[name].weight @ n.v)", "(layers[name].weight @ n.v @ n.u)"): ORDER,
    (
        "sample",
        "torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)",
        "torch.autocast(device.type, dtype=dtype)",
    ): "autocast to float32 switches itself off, with a warning",
    (
        "load_generator",
        'kinds = weights["mapping.embedding.weight"].shape[1] if config.get("classes") else 0',
        'kinds = weights["mapping.embedding.weight"].shape[1] if config.get("classes") else 1',
    ): "no use of it without classes",
    (
        "Training.discriminator_objective",
        "balanced_consistency(d_real, d_real_t, config.bcr_real)",
        "balanced_consistency(d_real_t, d_real, config.bcr_real)",
    ): "a difference is squared",
    (
        "Training.discriminator_objective",
        "balanced_consistency(d_fake, d_fake_t, config.bcr_fake)",
        "balanced_consistency(d_fake_t, d_fake, config.bcr_fake)",
    ): "a difference is squared",
    ("discard_old", "path.stem[-9:]", "path.stem[-10:]"): "a minus before the number, which has as many bits",
    (
        "load_checkpoint",
        'torch.load(path, map_location="cpu", weights_only=True)',
        "torch.load(path, map_location='cpu')",
    ): "the default since PyTorch 2.6",
}
# (function, before, after) of what could be noticed: why nobody minds. Counted as missed.
ANY_SMALL = "only against a division by 0: any small number serves"
AS_GOOD = "other random numbers, as good"
GPU = "on a GPU only"
LEFT = {
    ("epoch_order", "seed * 1_000_003 + epoch", "(seed * 1000003 - epoch)"): AS_GOOD,
    ("latent_stream", "2**32", "3**32"): AS_GOOD,
    ("latent_stream", "2**32", "2**33"): AS_GOOD,
    ("latent_stream", "2**32 - 1", "2**32 - 2"): AS_GOOD,
    ("epoch_order", "seed * 1_000_003", "seed * 1000004"): AS_GOOD,
    ("Run.__init__", "torch.randn(64, config.latent_dim)", "torch.randn(65, config.latent_dim)"): AS_GOOD,
    (
        "Run.random_labels",
        "torch.randint(0, len(self.images), (n, 1), device=self.device)",
        "torch.randint(0, len(self.images), (n, 2), device=self.device)",
    ): AS_GOOD,
    ("Training.__init__", "torch.manual_seed(config.seed)", "pass"): AS_GOOD,
    ("Training.__init__", "torch.cuda.set_device(device)", "pass"): GPU,
    ("Training.__init__", 'config.optimizer == "muon"', "(config.optimizer != 'muon')"): GPU,
    (
        "Training.__init__",
        'torch.compile(orthogonalize_all, mode="reduce-overhead", dynamic=False)',
        "torch.compile(orthogonalize_all, dynamic=False)",
    ): GPU,
    (
        "Training.__init__",
        'torch.compile(orthogonalize_all, mode="reduce-overhead", dynamic=False)',
        "torch.compile(orthogonalize_all, mode='reduce-overhead')",
    ): GPU,
    ("Training.__init__", "optimizer.each[1]", "optimizer.each[2]"): GPU,
    (
        "Training.__init__",
        "functools.partial(self.orthogonalize, quick, optimizer.each[1])",
        "functools.partial(quick, self.orthogonalize, optimizer.each[1])",
    ): GPU,
    (
        "Training.__init__",
        "functools.partial(self.orthogonalize, quick, optimizer.each[1])",
        "functools.partial(self.orthogonalize, optimizer.each[1], quick)",
    ): GPU,
    ("Training.__init__", "dynamic=False", "dynamic=True"): GPU,  # of Muon's products; of the objectives it is noticed
    ("Run.__init__", "x.nbytes > room", "(x.nbytes >= room)"): "images that fill the memory to the last byte",
    ("Training.descend", "self.compiles", "(not self.compiles)"): GPU,
    ("Training.descend", "torch.compiler.cudagraph_mark_step_begin()", "pass"): GPU,
    ("Run.class_rows", "torch.arange(kinds, device=self.device)", "torch.arange(kinds)"): GPU,
    ("state_of", 'rng["cuda"] = torch.cuda.get_rng_state(run.device)', "pass"): GPU,
    ("restore", "torch.manual_seed(run.config.seed + 104_729 * run.step)", "pass"): GPU,
    ("restore", "run.config.seed + 104_729 * run.step", "(run.config.seed - 104729 * run.step)"): GPU,
    ("restore", "104_729 * run.step", "104730 * run.step"): GPU,
    (
        "restore",
        'run.device.type == "cuda" and "cuda" in state["rng"]',
        "(run.device.type == 'cuda' or 'cuda' in state['rng'])",
    ): GPU,
    ("restore", 'run.device.type == "cuda"', "(run.device.type != 'cuda')"): GPU,
    ("restore", '"cuda" in state["rng"]', "('cuda' not in state['rng'])"): GPU,
    ("restore", 'torch.cuda.set_rng_state(state["rng"]["cuda"], run.device)', "pass"): GPU,
    (
        "restore",
        'torch.cuda.set_rng_state(state["rng"]["cuda"], run.device)',
        "torch.cuda.set_rng_state(run.device, state['rng']['cuda'])",
    ): GPU,
    (
        "load_checkpoint",
        'torch.load(path, map_location="cpu", weights_only=True)',
        "torch.load(path, weights_only=True)",
    ): GPU,
    ("orthogonalized", "min=1e-30", "min=1.5e-30"): ANY_SMALL,
    ("orthogonalized", "min=1e-7", "min=1.5e-07"): ANY_SMALL,
    ("Generator.__init__", "10", "11"): "a default that all who have images replace",
    ("Discriminator.__init__", "10", "11"): "a default that all who have images replace",
    ("batch_indices", "epoch_order(n, seed, e)", "epoch_order(n, e, seed)"): AS_GOOD,
    (
        "Keeper.take_back",
        "run.config.seed + 104_729 * run.step + 15_485_863 * self.taken_back",
        "(run.config.seed + 104729 * run.step - 15485863 * self.taken_back)",
    ): AS_GOOD,
    (
        "Keeper.take_back",
        "run.config.seed + 104_729 * run.step",
        "(run.config.seed - 104729 * run.step)",
    ): AS_GOOD,
    ("Keeper.take_back", "104_729 * run.step", "104730 * run.step"): AS_GOOD,
    ("Keeper.take_back", "15_485_863 * self.taken_back", "15485864 * self.taken_back"): AS_GOOD,
    (
        "Keeper.take_back",
        "15_485_863 * self.taken_back",
        "(15485863 / self.taken_back)",
    ): AS_GOOD,
    ("load_generator", "str(error).splitlines()[0][:120]", "str(error).splitlines()[0][:121]"): "a choice",
    (
        "train",
        "before - keeper.saved_at > 60 * CHECKPOINT_MINUTES",
        "(before - keeper.saved_at >= 60 * CHECKPOINT_MINUTES)",
    ): "minutes that are up to the last bit of a clock",
    ("train", "60 * CHECKPOINT_MINUTES", "61 * CHECKPOINT_MINUTES"): "a choice",
    ("train", "run.any_process(False)", "pass"): "several processes wait for each other there",
    ("Keeper.record", "refresh=False", "refresh=True"): "how often the bar is drawn",
    (
        "Keeper.record",
        "self.bar.set_postfix_str(f\"logits real {entry['real']:+.2f} fake {entry['fake']:+.2f}\", refresh=False)",
        "self.bar.set_postfix_str(f\"logits real {entry['real']:+.2f} fake {entry['fake']:+.2f}\")",
    ): "how often the bar is drawn",
    **dict.fromkeys(
        [
            ("Keeper.start", "LIVE", "(not LIVE)"),
            ("Keeper.start", "plt.ioff()", "if True"),
            ("Keeper.start", "self.figure = plt.figure()", "pass"),
            ("Keeper.start", "draw_progress(self.figure, run)", "pass"),
            ("Keeper.start", "draw_progress(self.figure, run)", "draw_progress(run, self.figure)"),
            ("Keeper.start", "self.handle = display(self.figure, display_id=True)", "pass"),
            ("Keeper.start", "display(self.figure, display_id=True)", "display(self.figure)"),
            ("Keeper.start", "display_id=True", "display_id=False"),
            (
                "Keeper.after_step",
                "time.monotonic() - self.drawn > self.pause",
                "(time.monotonic() - self.drawn >= self.pause)",
            ),
            (
                "Keeper.after_step",
                "time.monotonic() - self.drawn > self.pause",
                "(time.monotonic() - self.drawn <= self.pause)",
            ),
            ("Keeper.after_step", "time.monotonic() - self.drawn", "(time.monotonic() + self.drawn)"),
            ("Keeper.after_step", "self.draw()", "pass"),
            ("Keeper.close", "self.draw()", "pass"),
            ("Keeper.close", "plt.close(self.figure)", "pass"),
            ("train", "LIVE", "(not LIVE)"),
            ("train", "draw_progress(plt.figure(), run)", "pass"),
            ("train", "draw_progress(plt.figure(), run)", "draw_progress(run, plt.figure())"),
            ("train", "plt.show()", "pass"),
        ],
        "the live figure, in a notebook only",
    ),
}

OPPOSITE = {
    ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult], ast.FloorDiv: [ast.Div],
    ast.Mod: [ast.FloorDiv], ast.Pow: [ast.Mult], ast.BitAnd: [ast.BitOr], ast.And: [ast.Or], ast.Or: [ast.And],
    ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE], ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is], ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
}  # fmt: skip


LOADED = ("torch", "matplotlib", "PIL", "safetensors", "tqdm", "_pytest", "hypothesis", "reference")  # before a fork

SWAPPED = ast.Name | ast.Attribute | ast.Call | ast.BinOp | ast.Subscript  # two of one kind: else it fails at once

STARTS = [0]  # of the lines, in bytes
for one_line in SOURCE.splitlines(keepends=True):
    STARTS.append(STARTS[-1] + len(one_line))


class Edit(NamedTuple):
    part: str
    section: str
    function: str
    lines: range  # a test that executes one of them may notice
    start: int  # bytes of SOURCE
    end: int
    new: str
    before: str
    after: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.function, self.before, self.after

    def __str__(self) -> str:
        return f"{self.function}, line {self.lines.start}: {self.before}  ->  {self.after}"


# ------------------------------------------------------------------------------------------------------- what is edited


def edits() -> list[Edit]:
    """All edits of `vitgan_nb.py`, in the order of its lines."""
    headings = [(n, line[5:]) for n, line in enumerate(SOURCE.decode().splitlines(), 1) if line.startswith("# ## ")]
    found = []
    for node in ast.parse(SOURCE).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name in NOT_EDITED:
            continue
        section = [heading for n, heading in [(0, ""), *headings] if n < node.lineno][-1].split(":")[0]
        number = section.split(".")[0]
        decorators = {called(each) or ast.unparse(each) for each in node.decorator_list}
        if decorators & {"check", "demo", "sliders"} or not number.isdigit() or not 2 <= int(number) <= 20:
            continue
        part = "engine" if node.name in ENGINE or number == "18" else "teaching"
        finder = Finder(part, section)
        finder.visit(node)
        found += finder.found
    return found


class Finder(ast.NodeVisitor):
    """Collects the edits of one function or class in `found`."""

    def __init__(self, part: str, section: str):
        self.part, self.section, self.found = part, section, []
        self.names, self.lines, self.bound, self.shown = [], range(0), set(), None

    def edit(self, node: ast.AST, new: str, shown: ast.AST | None = None, start: int | None = None):
        """`node`, or all from `start` to its end, becomes `new`; told by what becomes of `shown`."""
        (first, last), (here, end) = place(shown or node), place(node)
        start = here if start is None else start
        before, after = SOURCE[first:last], SOURCE[first:start] + new.encode() + SOURCE[end:last]
        before, after = (" ".join(text.decode().split()) for text in (before, after))
        name = ".".join(self.names)
        self.found.append(Edit(self.part, self.section, name, self.lines, start, end, new, before, after))

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.ClassDef):
        outer = self.lines, self.bound
        self.names.append(node.name)
        if ".".join(self.names) in NOT_EDITED:
            self.names.pop()
            return
        self.lines, self.bound, self.in_function = lines_of(node), set(), isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call):
                self.edit(decorator, "", start=place(decorator)[0] - 1)
        if self.in_function:
            self.bound = {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
            for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
                self.shown = default
                self.visit(default)
        for statement in node.body:
            self.in_function = isinstance(node, ast.FunctionDef)
            self.visit(statement)
        self.names.pop()
        self.lines, self.bound = outer

    visit_ClassDef = visit_FunctionDef

    def generic_visit(self, node: ast.AST):
        outer = self.lines, self.shown
        if isinstance(node, ast.stmt):
            if self.in_function:
                body = getattr(node, "body", None)
                self.lines = range(node.lineno, body[0].lineno) if body else lines_of(node)
                self.lines = self.lines or lines_of(node)  # on one line
            self.statement(node)
        if isinstance(node, ast.stmt | ast.Call | ast.BinOp | ast.Compare | ast.Subscript | ast.keyword):
            self.shown = None if hasattr(node, "body") else node
        if isinstance(node, ast.keyword) and node.arg == "strict":
            return  # of zip: a guard that nothing sets off
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not (is_text or isinstance(node, ast.Raise | ast.JoinedStr) or called(node) in MESSAGES):
            for new in replacements(node):
                self.edit(node, new, self.shown if isinstance(node, ast.Constant | ast.UnaryOp) else node)
            for field, child in ast.iter_fields(node):
                for each in child if isinstance(child, list) else [child]:
                    if isinstance(each, ast.AST) and field != "annotation":
                        if field in ("test", "ifs") and isinstance(
                            each, ast.Name | ast.Attribute | ast.Call | ast.BinOp
                        ):
                            self.edit(each, f"(not {ast.unparse(each)})")
                        self.visit(each)
        if isinstance(node, ast.Assign):
            self.bound |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
        self.lines, self.shown = outer

    def statement(self, node: ast.stmt):
        """The statement dropped; of a `with` its head."""
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        again = isinstance(target, ast.Name) and target.id in self.bound  # else the name would be missing
        kept = isinstance(target, ast.Subscript) or isinstance(target, ast.Attribute) and self.names[-1] != "__init__"
        action = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and called(node.value) not in MESSAGES
        if again or kept or action or isinstance(node, ast.AugAssign | ast.Raise | ast.Continue | ast.Break):
            self.edit(node, "pass")
        if isinstance(node, ast.With):
            last = node.items[-1]
            self.edit(last.optional_vars or last.context_expr, "if True", start=place(node)[0])


def place(node: ast.AST) -> tuple[int, int]:
    """Start and end of a node in SOURCE."""
    return STARTS[node.lineno - 1] + node.col_offset, STARTS[node.end_lineno - 1] + node.end_col_offset


def lines_of(node: ast.AST) -> range:
    return range(node.lineno, node.end_lineno + 1)


def called(node: ast.AST) -> str:
    """The name of the function or method that `node` calls."""
    function = getattr(node, "func", None)
    return getattr(function, "attr", getattr(function, "id", ""))


def replacements(node: ast.AST) -> Iterator[str]:
    """What an expression may be mistaken for."""
    if isinstance(node, ast.Constant):
        value = node.value
        if isinstance(value, bool):
            yield str(not value)
        elif isinstance(value, int):
            yield str(value + 1)
        elif isinstance(value, float):
            yield str(float(f"{1.5 * value:.3g}") or 1.0)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        yield f"({ast.unparse(ast.BinOp(node.right, node.op, node.left))})"
    elif isinstance(node, ast.BinOp):
        if not {type(node.left), type(node.right)} & {ast.JoinedStr} and not is_text(node.left) | is_text(node.right):
            for other in OPPOSITE.get(type(node.op), ()):
                yield f"({ast.unparse(ast.BinOp(node.left, other(), node.right))})"
    elif isinstance(node, ast.AugAssign):
        for other in OPPOSITE.get(type(node.op), ()):
            yield ast.unparse(ast.AugAssign(node.target, other(), node.value))
    elif isinstance(node, ast.BoolOp):
        yield f"({ast.unparse(ast.BoolOp(OPPOSITE[type(node.op)][0](), node.values))})"
    elif isinstance(node, ast.Compare):
        for other in OPPOSITE[type(node.ops[0])]:
            yield f"({ast.unparse(ast.Compare(node.left, [other(), *node.ops[1:]], node.comparators))})"
    elif isinstance(node, ast.UnaryOp):
        yield f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.Call):
        for k, keyword in enumerate(node.keywords):
            if keyword.arg not in (None, "strict"):
                yield ast.unparse(ast.Call(node.func, node.args, node.keywords[:k] + node.keywords[k + 1 :]))
        for k, (a, b) in enumerate(zip(node.args, node.args[1:], strict=False)):
            if ast.dump(a) != ast.dump(b) and isinstance(a, SWAPPED) and isinstance(b, SWAPPED):
                args = [*node.args[:k], b, a, *node.args[k + 2 :]]
                yield ast.unparse(ast.Call(node.func, args, node.keywords))


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


# ------------------------------------------------------------------------------------------------------ who notices what


class Recorder:
    """A plugin for pytest: of each test how long it takes, which lines of SCRIPT it executes, how it ends."""

    def __init__(self):
        self.seconds, self.lines, self.ends = {}, {}, {}

    def trace(self, frame, event, _):
        if frame.f_code.co_filename not in (str(SCRIPT), "changed.py"):  # of `conftest.module_from`
            return None
        if event == "line":
            self.now.add(frame.f_lineno)
        return self.trace

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        self.now, start = set(), time.process_time()
        sys.settrace(self.trace)
        yield
        sys.settrace(None)
        self.lines[item.nodeid], self.seconds[item.nodeid] = self.now, time.process_time() - start

    def pytest_runtest_logreport(self, report):
        if report.outcome != "passed" or report.when == "call":
            self.ends.setdefault(report.nodeid, report.outcome)


class Edited:
    """A plugin for pytest: tests that edit the text themselves get the edited one."""

    def __init__(self, source: bytes, path: Path):
        self.path = path
        path.write_bytes(source)

    def pytest_collection(self):
        sys.modules["conftest"].SCRIPT = self.path  # pytest has loaded it anew


class Limited:
    """A plugin for pytest: a test that takes far longer than it did, as where an edit never ends, kills the process."""

    def __init__(self, seconds: dict[str, float]):
        self.seconds = seconds

    def pytest_runtest_setup(self, item):
        limit = time.process_time() + 10 + 3 * self.seconds[item.nodeid]
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit), resource.RLIM_INFINITY))


def without_processes(event: str, _):
    if event == "subprocess.Popen":
        pytest.skip("starts a process, whose program is not edited")


def run_tests(source: bytes, tests: list[str], folder: Path, plugin, *selection: str) -> int:
    """pytest on `source` as the module vitgan_nb; its exit status."""
    signal.alarm(900)
    os.environ.pop("VITGAN_DATA", None)
    os.environ["MPLBACKEND"] = "agg"
    os.chdir(folder)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # a start takes a moment
    module = types.ModuleType("vitgan_nb")
    module.__file__ = str(SCRIPT)
    sys.modules["vitgan_nb"] = module
    exec(compile(source, str(SCRIPT), "exec"), module.__dict__)
    options = ["-x", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "--basetemp", str(folder / "tmp"),
               "--assert=plain", "-W", "ignore", "-o", "addopts=-q -p no:cacheprovider -m 'not slow'"]  # fmt: skip
    plugins = [Edited(source, folder / "edited.py"), plugin]
    return pytest.main([*(str(ROOT / test) for test in tests), *options, *selection], plugins=plugins)


def in_fork(function, *arguments) -> int:
    """Call `function` in a fork, in a folder of its own, silently; its exit status, or another one if it was killed."""
    folder = Path(tempfile.mkdtemp())
    process = os.fork()
    if not process:
        status = 99
        try:
            silence = os.open(folder / "output", os.O_CREAT | os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            status = function(*arguments, folder)
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    shutil.rmtree(folder)
    return status


def record(parts: set[str], result: Path, folder: Path) -> int:
    """The first run: all tests of `parts` on the unedited program, what they did into `result`."""
    sys.addaudithook(without_processes)
    recorder = Recorder()
    tests = TESTS["teaching"] + (TESTS["engine"] if "engine" in parts else [])
    status = run_tests(SOURCE, tests, folder, recorder, "-k", LEFT_OUT)
    shutil.copy(folder / "output", result.with_suffix(".txt"))
    tests = [test for test, end in recorder.ends.items() if end == "passed"]
    tests.sort(key=recorder.seconds.get)
    modules = [name for name in sys.modules if name.startswith(LOADED)]
    result.write_bytes(pickle.dumps(([(t, recorder.seconds[t], recorder.lines[t]) for t in tests], modules)))
    return int(status)


def try_edit(edit: Edit, tests: dict[str, float], folder: Path) -> int:
    source = SOURCE[: edit.start] + edit.new.encode() + SOURCE[edit.end :]
    return int(run_tests(source, [*tests], folder, Limited(tests)))


def chosen(edit: Edit, recorded: list) -> dict[str, float]:
    """The fastest tests that execute a line of the edit, of SECONDS together, and how long each took."""
    tests = {}
    for name, seconds, lines in recorded:
        if not lines.isdisjoint(edit.lines):
            if tests and sum(tests.values()) + seconds > SECONDS[edit.part]:
                break
            tests[name] = seconds
    return tests


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--part", choices=list(GOALS))
    parser.add_argument("--only", help="a function or class, or a method as Class.method")
    parser.add_argument("--sample", type=int, help="as many edits, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    todo = edits()
    counts = collections.Counter(edit.key for edit in todo)
    stale = [key for key in SAME | LEFT if key not in counts]
    if flags.part:
        todo = [edit for edit in todo if edit.part == flags.part]
    if flags.only:
        todo = [edit for edit in todo if f"{edit.function}.".startswith(f"{flags.only}.")]
    if flags.sample and flags.sample < len(todo):
        todo = sorted(random.Random(flags.seed).sample(todo, flags.sample), key=lambda edit: edit.start)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "recorded")
        if in_fork(record, {edit.part for edit in todo}, result):
            sys.exit("The tests fail as they are:\n" + result.with_suffix(".txt").read_text())
        recorded, modules = pickle.loads(result.read_bytes())
    for name in modules:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else every fork goes through all of it
    print(f"{len(todo)} edits, {len(recorded)} tests; the first run took {time.monotonic() - start:.0f} s", flush=True)
    table = collections.defaultdict(collections.Counter)

    def attempt(edit: Edit) -> tuple[dict[str, float], bool]:
        tests = chosen(edit, recorded)
        return tests, bool(tests) and in_fork(try_edit, edit, tests) != 0

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads that wait for forks
        for edit, (tests, noticed) in zip(todo, pool.map(attempt, todo), strict=True):
            end = "noticed" if noticed else "same" if edit.key in SAME else "missed"
            if noticed and edit.key in SAME | LEFT and counts[edit.key] == 1:  # some edits look alike
                stale.append(edit.key)
            if end == "missed":
                print(f"{edit}  ({LEFT.get(edit.key, 'missed' if tests else 'no test')})", flush=True)
            table[edit.part, edit.section][end] += 1
            table[edit.part, "all"][end] += 1
    print(f"\n{'part':9s} {'section':60s} edits same noticed share")
    low = False
    for (part, section), ends in sorted(table.items(), key=lambda row: (row[0][0], row[0][1] == "all")):
        share = ends["noticed"] / max(1, ends["noticed"] + ends["missed"])
        print(f"{part:9s} {section:60.60s} {ends.total():5d} {ends['same']:4d} {ends['noticed']:7d} {share:5.1%}")
        low |= section == "all" and share < GOALS[part]
    for key in stale:
        print("listed in SAME or LEFT, but noticed or no longer an edit:", key)
    print(f"{time.monotonic() - start:.0f} s")
    return int(low or bool(stale))


if __name__ == "__main__":
    sys.exit(main())
