"""A generator as a program: ONNX and PyTorch's .pt2 give what it gives."""

import errno
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vitgan_nb


@pytest.fixture
def weights(tmp_path):
    """A generator, styles running around a mean that is not 0, in a file."""
    torch.manual_seed(0)
    generator = vitgan_nb.Generator(replace(vitgan_nb.TINY, demodulate=True))
    generator(torch.randn(64, vitgan_nb.TINY.latent_dim))
    generator.mapping.w_mean.mul_(100)
    vitgan_nb.save_generator(generator, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def runs(path: Path, *inputs: Tensor) -> tuple[Tensor, dict]:
    """The images that a program paints, and what it says of itself."""
    if path.suffix == ".pt2":
        about = {"config": "", "about": ""}
        return torch.export.load(path, extra_files=about).module()(*inputs), about
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    named = {name: x.numpy() for name, x in zip(("z", "labels"), inputs, strict=False)}
    (images,) = session.run(["images"], named)
    return torch.from_numpy(images), session.get_modelmeta().custom_metadata_map


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("truncation", [1.0, 0.5])
def test_a_program_paints_what_the_generator_paints(suffix, truncation, weights, tmp_path, capsys):
    out = tmp_path / f"program{suffix}"
    flags = ["--weights", str(weights), "--out", str(out), "--truncation", str(truncation), "--about", "measured"]
    assert vitgan_nb.main(["export", *flags]) == 0
    assert f"{out}: " in capsys.readouterr().out and sorted(tmp_path.iterdir()) == [out, weights]
    generator = vitgan_nb.load_generator(weights)
    for batch in (1, 2, 5):
        z = torch.randn(batch, generator.config.latent_dim)
        with torch.no_grad():
            expected, other = generator(z, truncation), generator(z, 1.5 - truncation)
        images, about = runs(out, z)
        assert images.shape == expected.shape and images.dtype == torch.float32
        assert (images - expected).abs().max() <= 1e-4 < 1e-2 < (images - other).abs().max()
    assert (
        json.loads(about["config"]) == json.loads(json.dumps(asdict(generator.config))) and about["about"] == "measured"
    )


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_program_takes_labels_where_classes_were_learned(suffix, tmp_path):
    """And its patches may be painted by convolutions."""
    generator = vitgan_nb.Generator(replace(vitgan_nb.TINY, classes=True, decoder="conv"), kinds=3).eval()
    out = tmp_path / f"program{suffix}"
    vitgan_nb.save_program(generator, out)
    for labels in ([2], [0, 0, 1, 2, 2]):
        z, labels = torch.randn(len(labels), generator.config.latent_dim), torch.tensor(labels)
        images, _ = runs(out, z, labels)
        assert (images - generator(z, labels=labels)).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--out g.pth", "out is 'g.pth', but must end in .safetensors, .onnx or .pt2"),
        ("--out g", "out is 'g', but must end in"),
        ("--out g.onnx --truncation 1.1", "truncation is 1.1, but must be from 0 to 1"),
        ("--out g.pt2 --truncation nan", "truncation is nan"),
        ("--out g.safetensors --truncation 0.5", "truncation is fixed in a program (.onnx, .pt2), not in weights"),
        ("--out g.onnx", "pip install onnx onnxscript onnxruntime"),
        ("--out weights.safetensors/g.pt2", "weights.safetensors"),
    ],
)
def test_wrong_export_arguments(flags, sentence, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # not installed
    monkeypatch.chdir(tmp_path)
    assert vitgan_nb.main(["export", "--weights", str(weights), *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [weights]


def test_a_full_disk_leaves_the_program_that_was_there(weights, tmp_path, monkeypatch, capsys):
    def write_bytes(path, content):
        path.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "g.pt2").write_text("before")
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    assert vitgan_nb.main(["export", "--weights", str(weights), "--out", str(tmp_path / "g.pt2")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert (tmp_path / "g.pt2").read_text() == "before" and len(list(tmp_path.iterdir())) == 2
