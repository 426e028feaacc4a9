"""What to run in the first ten minutes on a GPU: is all as it should be? One table; the exit status is 1 if something is not.

    python benchmarks/first_gpu.py [--profile paper]

Rows appear on stderr as they are found, the table on stdout at the end. The images are the built-in shapes. Without a GPU
all of it is rehearsed on a tiny model, compiled without kernels; what only a GPU can tell is skipped.
"""

import argparse
import contextlib
import copy
import gc
import itertools
import re
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch._dynamo.utils import counters

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vitgan_nb as v

DEVICE = v.best_device()
GPU = DEVICE.type == "cuda"
ROUNDINGS = 16  # so many of its format's rounding errors may a result be off; mistakes are of order 1
table = []


def row(what: str, found: str, right: bool | None):
    """One more row; `right` is None for what is only to be read, or was skipped."""
    table.append({"what": what, "found": found, "as it should be?": {True: "yes", False: "NO", None: "-"}[right]})
    print(*table[-1].values(), sep=" | ", file=sys.stderr, flush=True)


def differentiated(form, module: torch.nn.Module, h: torch.Tensor, seed: torch.Tensor) -> list[torch.Tensor]:
    """What `form`, made of `module`, gives for `h`, and the gradients of `h` and all weights."""
    h = h.detach().requires_grad_()
    y = form(h)  # (B, N, D)
    return [y, *torch.autograd.grad(y, [h, *module.parameters()], seed.to(y.dtype))]


def attention_kernels(names: Iterable[str]) -> list[str]:
    """Those of all kernels' `names` that are of attention, without their arguments."""
    kernels = {re.split("[<(]", name)[0] for name in names}
    return sorted(kernel for kernel in kernels if re.search("fmha|flash|cudnn", kernel, re.IGNORECASE))


def attention(config: v.Config):
    """Both kinds of attention in each precision beside the formula in float64; the kernels that did it."""
    old = GPU and torch.cuda.get_device_capability() < (8, 0)  # no bfloat16 units, and "auto" does not take it there
    precisions = ["float32", "float16"] + ["bfloat16"] * (not old)
    for kind, tokens, precision in itertools.product((v.SelfAttention, v.L2Attention), (64, 65), precisions):
        torch.manual_seed(0)
        module, h = kind(config.dim, config.heads), torch.randn(16, tokens, config.dim)
        exact, seed, dtype = copy.deepcopy(module).double(), torch.randn_like(h), getattr(torch, precision)

        def formula(h, exact=exact):
            values = exact.value(h) if hasattr(exact, "value") else exact.qkv(h).chunk(3, dim=-1)[2]  # (B, N, D)
            return exact.out(v.merge_heads(exact.weights(h) @ v.split_heads(values, exact.heads)))  # (B, N, D)

        right = differentiated(formula, exact, h.double(), seed.double())
        watched, autocast = contextlib.nullcontext(), torch.autocast(DEVICE.type, dtype, precision != "float32")
        if GPU:
            watched = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        with watched, autocast:
            found = differentiated(module.to(DEVICE), module, h.to(DEVICE), seed.to(DEVICE))
        errors = [((a.double().cpu() - b).norm() / b.norm()).item() for a, b in zip(found, right, strict=True)]
        close = all(error <= ROUNDINGS * torch.finfo(dtype).eps for error in errors)  # one by one: none is NaN
        what = f"{kind.__name__}, {tokens} tokens, {precision}"
        row(what, f"relative error: values {errors[0]:.1e}, gradients {max(errors[1:]):.1e}", close)
        if GPU:
            names = ", ".join(attention_kernels(event.key for event in watched.key_averages()))
            row(f"{what}: kernels", names, bool(names) and "cudnn" not in names.lower())
    if not GPU:
        row("names of the kernels", "skipped: no GPU", None)


def waiting(config: v.Config):
    """30 plain steps in which the CPU may not wait for the GPU."""
    watch = torch.cuda.set_sync_debug_mode if GPU else lambda mode: None
    for optimizer, precision in itertools.product(("adam", "muon"), ("auto", "float16")):
        what = f"30 plain steps that never wait, {optimizer}, {precision}"
        run = v.Training(replace(config, compile=False, optimizer=optimizer, precision=precision))
        if optimizer == "muon":
            for muon in (run.optimizer_g, run.optimizer_d):
                muon.each[1].orthogonalize = v.orthogonalize_all  # not compiled: recording a graph waits
        for _ in range(3):
            run.train_step()  # libraries start, and may wait
        watch("error")
        try:
            for _ in range(30):
                run.train_step()
        finally:
            watch("default")
        row(
            what, "none waited" if GPU else "skipped: no GPU; the steps ran", run.is_sound() and (True if GPU else None)
        )


def compiled(config: v.Config):
    """60 compiled steps: seconds of compiling, graphs, what was compiled again or not replayed."""
    torch._dynamo.reset()
    counters.clear()
    run, start = v.Training(replace(config, compile=True)), time.perf_counter()
    for _ in range(3):
        run.train_step()
    run.record()  # waits for the GPU
    row("compiling, the first 3 steps", f"{time.perf_counter() - start:.0f} s", None)
    graphs = counters["stats"]["unique_graphs"]
    for _ in range(57):
        run.train_step()
    run.record()
    v.Training(replace(config, compile=True, steps=9)).train_step()
    again, skips = counters["stats"]["unique_graphs"] - graphs, counters["inductor"]["cudagraph_skips"]
    row("objectives that stayed compiled", ", ".join(run.quick) or str(run.notes), len(run.quick) == 2)
    row("graph breaks", str(sum(counters["graph_break"].values())), not counters["graph_break"])
    row("compiled again, after step 3 or for a second run", str(again), again == 0)
    row("graphs not replayed (CUDA graph skips)", str(skips) if GPU else "skipped: no GPU", skips == 0 if GPU else None)


def losses(config: v.Config):
    """Compiled losses beside plain ones, randomness off: a compiled program may draw in another order."""
    runs = [v.Training(replace(config, augment="color", compile=compile)) for compile in (False, True)]
    z = torch.randn(config.batch_size, config.latent_dim).to(DEVICE)
    rand = patch.object(torch, "rand", lambda *size, device=None, dtype=None: torch.full(size, 0.3, device=device))
    with rand, patch.object(v.Training, "latents", lambda run, n: z[:n]):
        for run in runs:
            run.train_step()
    plain, quick = (run.record() for run in runs)
    for name in v.STATISTICS:
        error = abs(quick[name] / plain[name] - 1)
        close = len(runs[1].quick) == 2 and error <= ROUNDINGS * torch.finfo(runs[1].dtype).eps
        row(f"{name}: plain, compiled", f"{plain[name]:.4f}, {quick[name]:.4f}; relative error {error:.1e}", close)


def keeping(config: v.Config):
    """A run whose weights are spoilt at step 12; its checkpoint; a second run that goes on from that."""
    step, spoilt = v.Training.train_step, []

    def train_step(run):
        step(run)
        if run.step == 12 and not spoilt:
            spoilt.append(run.step)
            next(run.generator.parameters()).data.fill_(float("nan"))

    often, spoiling = patch.object(v, "RECORD_EVERY", 2), patch.object(v.Training, "train_step", train_step)
    with tempfile.TemporaryDirectory() as folder, often, spoiling:
        config = replace(config, compile=False, out_dir=folder, steps=20, minutes=0.0)
        run, other = v.train(config), v.Training(config)
        taken_back = len(run.notes)
        row("spoilt at step 12", f"taken back {taken_back}, on to {run.step}", (taken_back, run.step) == (1, 20))
        v.restore(other, v.load_checkpoint(v.checkpoints(v.run_folder(config))[0]))
        parts = ("generator", "discriminator", "average")
        states = ([getattr(r, part).state_dict() for part in parts] for r in (run, other))
        same = all(torch.equal(a[k], b[k]) for a, b in zip(*states, strict=True) for k in a)
        row("networks and average restored", "every bit" if same else "they differ", same)
        run = v.train(replace(config, steps=25))
        row("goes on from its checkpoint", f"step {run.step}", run.step == 25 and run.is_sound())


def speed(config: v.Config):
    """`benchmark` for both optimizers, and for a batch of 512."""
    for optimizer, batch in (("adam", config.batch_size), ("muon", config.batch_size), ("adam", 512 if GPU else 8)):
        found = v.benchmark(replace(config, compile=True, optimizer=optimizer, batch_size=batch))
        rates = f"{found['train_images_per_s']} images/s, {found['matrix_share']:.0%} of the matrix rate"
        peak = f"{found['peak_bytes'] / 2**30:.1f} GiB at most, {found['precision']}"
        row(f"benchmark, {optimizer}, batch {batch}", f"{rates}, {peak}", None)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", choices=v.PROFILES, default="paper", help="what is run on a GPU")
    flags = parser.parse_args(argv)
    config = replace(v.PROFILES[flags.profile], dataset="shapes") if GPU else v.TINY
    if not GPU:
        compile = torch.compile
        torch.compile = lambda function, **_: compile(function, backend="aot_eager", dynamic=False)
    with contextlib.redirect_stdout(sys.stderr):
        row("device", torch.cuda.get_device_name() if GPU else "no GPU: a rehearsal on a tiny model", None)
        for part in (attention, waiting, compiled, losses, keeping, speed):
            try:
                part(config)
            except Exception as error:  # one failure does not stop the other parts
                row(part.__name__, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", False)
            gc.collect()
    lines = [list(table[0]), *(list(r.values()) for r in table)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print(" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return int(any(r["as it should be?"] == "NO" for r in table))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
