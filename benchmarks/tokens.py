"""What do a generator's tokens say: the same in every image, which patch, which style, or which patch of which image?

    python benchmarks/tokens.py GENERATOR.safetensors | RUN_FOLDER/checkpoint-….pt … [--n 512] [--seed 0]

For each file (of a checkpoint its average) one line of JSON: the root mean square of four parts, after each block in
`stream`, and of what the patch decoder gets in `norm`. With t the tokens (B, N, D) of B styles:
    common   the mean over patches and styles
    patches  of each patch its mean over styles, less `common`
    styles   of each style its mean over patches, less `common`
    both     what is left: what only this patch of this image has
The squares of the four add up to that of t.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vitgan_nb as v


def parts(t: Tensor) -> dict[str, float]:
    """Root mean squares of the four parts of tokens (B, N, D)."""
    common = t.mean((0, 1), keepdim=True)  # (1, 1, D)
    patches, styles = t.mean(0, keepdim=True) - common, t.mean(1, keepdim=True) - common  # (1, N, D), (B, 1, D)
    each = {"common": common, "patches": patches, "styles": styles, "both": t - common - patches - styles}
    return {name: round(part.square().mean().sqrt().item(), 2) for name, part in each.items()}


@torch.no_grad()
def measure(generator: v.Generator, n: int = 512, seed: int = 0) -> dict:
    """The parts after each block and after the last norm, for `n` styles."""
    seen = []
    hooks = [block.register_forward_hook(lambda *call: seen.append(parts(call[-1]))) for block in generator.blocks]
    z = torch.randn(n, generator.config.latent_dim, generator=v.latent_stream(seed))  # (B, latent_dim)
    last = generator.tokens(generator.mapping(z))  # (B, N, D)
    for hook in hooks:
        hook.remove()
    return {"stream": seen, "norm": parts(last)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--n", type=int, default=512, help="styles")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    if flags.n < 2:
        parser.error("--n must be 2 or more, for parts that differ between styles")
    for path in flags.files:
        print(json.dumps({"file": str(path)} | measure(v.load_generator(path), flags.n, flags.seed)), flush=True)


if __name__ == "__main__":
    try:
        main()
    except v.BadInput as error:
        sys.exit(f"error: {error}")
