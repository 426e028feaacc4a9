"""How long a folder of images takes to load, and how much memory.

    python benchmarks/folder.py FOLDER        # the first time it writes 20,000 JPEGs of 320 x 240 into it
    python benchmarks/folder.py FOLDER        # loads, for image_size 64: decodes them
    python benchmarks/folder.py FOLDER        # loads what was decoded

Loading prints seconds, and the peak of the memory before and after, the program's own and PyTorch's included.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vitgan_nb as v


def write(folder: Path):
    """Shapes on a rough ground, a tenth in each of ten subfolders."""
    for k, image in enumerate(v.draw_shapes(20_000, 32)):
        large = torch.nn.functional.interpolate(v.to_float(image[None]), (240, 320), mode="bicubic")
        path = folder / str(k % 10) / f"{k:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        torchvision.io.write_jpeg(v.to_uint8(large + 0.1 * torch.randn(large.shape))[0], str(path))


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if not folder.exists():
        write(folder)
        return
    before, start = peak(), time.perf_counter()
    images, _ = v.read_folder(folder, 64)
    seconds, after = time.perf_counter() - start, peak()
    print(
        f"{len(images):,} images, {images.nbytes >> 20} MB: {seconds:.1f} s, peak {before} MB before, {after} MB after"
    )


if __name__ == "__main__":
    main()
