"""How much of a gradient is noise, where does it come from, and how far have the weights moved?

    python benchmarks/noise.py RUN_FOLDER/checkpoint-….pt … [--batches 48] [--seed 0]

For each checkpoint of a run one line of JSON, of the weights that are matrices:
    signal_g, signal_d  |mean gradient|² over the mean |gradient of a batch|²: 1 without noise. The mean's square is the
                        product of the means of two halves of the batches, which noise does not enlarge
    variance_g          the generator's summed variance between batches: all new; the same latents, augmented anew by all,
                        by colour or by translation; new latents, not augmented
    moved               the change of each part's weights since the folder's first checkpoint, over their size there
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vitgan_nb as v


def matrices(network: nn.Module) -> list[nn.Parameter]:
    return [p for p in network.parameters() if p.ndim == 2 and min(p.shape) > 10]


def gradients(network: nn.Module, objective: Callable, batches: int) -> Tensor:
    """The gradient of `objective()` in the matrices of `network`, for each of some batches: (batches, weights)."""
    rows = []
    for _ in range(batches):
        network.zero_grad()
        sum(objective()).backward()
        rows.append(torch.cat([p.grad.flatten() for p in matrices(network)]))
    return torch.stack(rows)


def signal(rows: Tensor) -> float:
    """The share of the square of a gradient, one in each of the `rows`, that all have in common."""
    one, other = (half.mean(0) for half in rows.chunk(2))
    return (one @ other / rows.square().sum(1).mean()).item()


def measure(path: Path, batches: int) -> dict:
    """What a line says about the checkpoint at `path`. Raises `BadInput` for a file that is none."""
    state = v.load_checkpoint(path)
    config = replace(v.Config(**state["config"]), compile=False)
    run = v.Training(config, "cpu")
    v.restore(run, state)
    run.discriminator.eval()  # spectral normalisation stays where it is

    def discriminator_objective() -> tuple[Tensor, ...]:
        indices = torch.randint(len(run.images), (config.batch_size,))
        c = {"labels": run.labels[0][indices]} if run.labels else {}
        return run.discriminator_objective(v.real_batch(run.images, indices), **c)

    line = {"signal_d": signal(gradients(run.discriminator, discriminator_objective, batches))}
    run.discriminator.requires_grad_(False)
    z, c, variance = run.latents(config.batch_size), run.random_labels(config.batch_size), {}
    fixed = {"latents": lambda n: z, "random_labels": lambda n: c}
    for name, same, augment in (
        ("all new", False, config.augment),
        ("augmented anew", True, config.augment),
        ("colour anew", True, "color"),
        ("translation anew", True, "translation"),
        ("latents anew, not augmented", False, ""),
    ):
        run.config = replace(config, augment=augment)
        with mock.patch.multiple(run, **fixed) if same else contextlib.nullcontext():
            rows = gradients(run.generator, run.generator_objective, batches)
        variance[name] = rows.var(0).sum().item()
        if name == "all new":
            line["signal_g"] = signal(rows)
    return line | {
        "variance_g": variance,
        "moved": moved(v.load_checkpoint(min(path.parent.glob("checkpoint-*.pt"))), state),
    }


def moved(first: dict, state: dict) -> dict[str, float]:
    """How far the weights of each part are from those in the state `first`, over their size there."""
    parts = {}
    for kind in ("generator", "discriminator"):
        for name, now in state[kind].items():
            if name.endswith("weight"):
                pairs = parts.setdefault(f"{kind}.{name.split('.')[0]}", [])
                pairs.append((first[kind][name].flatten(), now.flatten()))
    lengths = {}
    for part, pairs in parts.items():
        before, now = (torch.cat(side) for side in zip(*pairs, strict=True))
        lengths[part] = ((now - before).norm() / before.norm()).item()
    return lengths


def rounded(x: dict | float) -> dict | float:
    return {key: rounded(value) for key, value in x.items()} if isinstance(x, dict) else float(f"{x:.3g}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--batches", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    if flags.batches < 2:
        raise v.BadInput(f"--batches is {flags.batches}, but must be at least 2: noise is what differs between them.")
    for path in flags.checkpoints:
        torch.manual_seed(flags.seed)
        print(json.dumps({"checkpoint": str(path)} | rounded(measure(path, flags.batches))), flush=True)


if __name__ == "__main__":
    try:
        main()
    except v.BadInput as error:
        sys.exit(f"error: {error}")
