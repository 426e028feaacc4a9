"""How close samples are to CIFAR-10 on a classifier of CIFAR-10 itself: FRD, KRD, precision, recall, classes, nearest.

    python benchmarks/frd.py SAMPLES.npz [MORE.npz …] [--weights resnet56-4bfd9763.th] [--n 10000]

FRD is the formula of FID, KRD that of KID, on the 112 pooled outputs of the three stages of a ResNet-56 (93.4 % of the
test images right); × 100 and × 1,000. Like FID, FRD is biased by the number of samples: it means nothing without it. It
cannot be compared with FID. Precision and recall (k = 3) are of at most 5,000 samples and as many training images.
`classes` is the entropy of the mean prediction, in bits: 3.32 when all ten classes are alike. `nearest` is how far a
sample is from the nearest training image, over the same for test images, medians of 1,000: well under 1, training images
are being copied.

The network is Y. Idelbayev's (https://github.com/akamaster/pytorch_resnet_cifar10), downloaded once, or the file that
--weights names. CIFAR-10 is found as `vitgan_nb.py` finds it. Prints one line of JSON for each file.
"""

import argparse
import hashlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torch_fidelity
from torch import Tensor, nn
from torch.utils.data import Subset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id_cached

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vitgan_nb as v

URL = "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/resnet56-4bfd9763.th"


class Residual(nn.Module):
    """Two convolutions and a shortcut (He et al. 2016, Section 4.2), which fills new channels with zeros."""

    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        self.new, self.stride = (channels - channels_in) // 2, channels // channels_in  # on each side; 1 or 2
        self.conv1 = nn.Conv2d(channels_in, channels, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new, self.new))
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


class ResNet56(nn.Module):
    """Images (B, 3, 32, 32), normalised -> the pooled outputs of the three stages, (B, 112)."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = [16] * 10 + [32] * 9 + [64] * 9
        blocks = [Residual(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)]
        self.layer1, self.layer2, self.layer3 = (nn.Sequential(*blocks[i : i + 9]) for i in (0, 9, 18))
        self.linear = nn.Linear(64, 10)  # for `classes` alone

    def forward(self, x: Tensor) -> Tensor:
        first = self.layer1(F.relu(self.bn1(self.conv1(x))))
        second = self.layer2(first)
        return torch.cat([stage.mean((2, 3)) for stage in (first, second, self.layer3(second))], dim=1)


class Features(FeatureExtractorBase):
    """What torch-fidelity asks: uint8 images (B, 3, 32, 32) -> features."""

    weights: Path | None = None

    def __init__(self, name, features_list, **_):
        super().__init__(name, features_list)
        if self.weights:
            state = torch.load(self.weights, map_location="cpu", weights_only=True)
        else:
            state = torch.hub.load_state_dict_from_url(URL, map_location="cpu", check_hash=True, weights_only=True)
        self.network = ResNet56()
        self.network.load_state_dict({k.removeprefix("module."): w for k, w in state["state_dict"].items()})
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])

    @staticmethod
    def get_provided_features_list():
        return ("pooled",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "pooled"

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.network((images.float() / 255 - self.mean) / self.std),)


torch_fidelity.register_feature_extractor("cifar10-resnet56", Features)


@torch.no_grad()
def closeness(samples: Tensor, real: Tensor, test: Tensor) -> dict:
    """How close `samples` are to the `real` training images, all uint8 (·, 3, 32, 32); `test` images for `nearest`."""
    settings = {"cuda": torch.cuda.is_available(), "verbose": False, "save_cpu_ram": True, "batch_size": 250}
    network = create_feature_extractor("cifar10-resnet56", ["pooled"], **settings)

    def measured(a: Tensor, b: Tensor, **metrics) -> dict:
        return torch_fidelity.calculate_metrics(
            input1=Subset(a, range(len(a))), input2=Subset(b, range(len(b))), feature_extractor="cifar10-resnet56",
            kid_subset_size=min(1000, len(a)), **settings, **metrics,
        )  # fmt: skip

    def features(images: Tensor, cache: str | None = None) -> Tensor:
        images = Subset(images, range(len(images)))
        found = extract_featuresdict_from_input_id_cached(
            1, network, input1=images, input1_cache_name=cache, **settings
        )
        return found["pooled"].float()  # (·, 112)

    cache = "cifar10-" + hashlib.sha256(real.contiguous().numpy()).hexdigest()[:16]
    if Features.weights:
        cache += "-" + hashlib.sha256(Features.weights.read_bytes()).hexdigest()[:16]
    few = min(5000, len(samples))
    shuffled = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[:few]]
    found = measured(samples, real, fid=True, kid=True, input2_cache_name=cache)  # those of `real` are computed once
    found |= measured(samples[:few], shuffled, prc=True)
    near = [torch.cdist(features(x[:1000]), features(real, cache)).amin(1).median() for x in (samples, test)]
    classes = network.network.linear.cpu()(features(samples)[:, -64:]).softmax(1).mean(0)  # (10,)
    return {
        "n": len(samples),
        "frd": round(100 * float(found["frechet_inception_distance"])),
        "krd": round(1000 * float(found["kernel_inception_distance_mean"]), 1),
        "precision": round(float(found["precision"]), 3),
        "recall": round(float(found["recall"]), 3),
        "classes": round(float(torch.special.entr(classes).sum() / math.log(2)), 2),
        "nearest": round(float(near[0] / near[1]), 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path, nargs="+", help="uint8 `images` (N, 32, 32, 3)")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--n", type=int, help="only the first N")
    flags = parser.parse_args()
    Features.weights = flags.weights
    torch.backends.cudnn.allow_tf32 = False  # features in full float32
    real, test = v.load_images(replace(v.PROFILES["smoke"], dataset="cifar10"))
    for path in flags.samples:
        samples = torch.from_numpy(np.load(path)["images"][: flags.n]).permute(0, 3, 1, 2)
        print(json.dumps({"samples": str(path)} | closeness(samples, real, test)), flush=True)


if __name__ == "__main__":
    main()
