"""Each peer of `benchmarks/peers.py` trains, goes on from its checkpoint as if never interrupted, and leaves samples."""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "benchmarks"))
import peers

import vitgan_nb as v


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for peer in (peers.DCGAN, peers.ViTOverDCGAN, peers.SNGAN, peers.RectifiedFlow):
        monkeypatch.setitem(peer.recipe, "batch_size", 4)
    monkeypatch.setattr(peers.UNet, "euler_steps", 2)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Twenty images of noise in a folder, which is quicker to load than CIFAR-10."""
    folder = tmp_path_factory.mktemp("images")
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)):
        Image.fromarray(image).save(folder / f"{i}.png")
    return replace(v.PROFILES["smoke"], dataset="folder", data_root=str(folder))


@pytest.mark.parametrize("name", peers.PEERS)
def test_peer_goes_on_as_if_never_interrupted(name, config, tmp_path):
    path, run = tmp_path / "run.pt", peers.PEERS[name](config)
    before = {key: tensor.clone() for key, tensor in run.generator.state_dict().items()}
    run.train_step()
    peers.save(run, {"before": 0.0, "now": 1.0}, path)
    run.train_step()
    other = peers.PEERS[name](config)
    assert peers.restore(other, path) == {"before": 0.0, "now": 1.0} and other.step == 1
    other.train_step()
    for part in ("generator", "discriminator", "average"):
        unbroken, resumed = (getattr(each, part).state_dict() for each in (run, other))
        for key in unbroken:
            assert torch.equal(unbroken[key], resumed[key]), f"{part} {key}"
    assert any(not torch.equal(before[key], tensor) for key, tensor in run.generator.state_dict().items())
    samples = peers.sample(run, name, 3)
    assert samples.shape == (3, 32, 32, 3) and samples.dtype == np.uint8
    assert len(np.unique(samples, axis=0)) == 3


def test_each_network_against_the_others_learns_at_its_own_rate(config):
    run = peers.ViTOverDCGAN(config)
    weights = run.generator.blocks[0].mlp.up.weight, run.discriminator[0].weight
    before = [weight.detach().clone() for weight in weights]
    run.train_step()
    g, d = [(weight - old).square().mean().sqrt().item() for weight, old in zip(weights, before, strict=True)]
    assert config.learning_rate / 2 < g < 1.25 * config.learning_rate  # Muon; less where directions are hardly there
    assert d == pytest.approx(2e-4, rel=0.05)  # Adam's first step


def test_samples_at_each_mark_and_none_made_twice(config, tmp_path, capsys, monkeypatch):
    clock = itertools.count(0, 30)  # a step takes half a minute
    monkeypatch.setattr(peers.time, "process_time", lambda: next(clock))
    peers.train("dcgan", config, [1, 2], tmp_path, n=4)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    batch = peers.DCGAN.recipe["batch_size"]
    assert [(line["minutes"], line["images"]) for line in lines] == [(1, 2 * batch), (2, 4 * batch)]
    early, late = (np.load(line["samples"])["images"] for line in lines)
    assert early.shape == (4, 32, 32, 3) and early.dtype == np.uint8 and (early != late).any()

    peers.train("dcgan", config, [1, 2], tmp_path, n=4)
    assert capsys.readouterr().out == ""
    Path(lines[1]["samples"]).unlink()  # as if stopped between the checkpoint and the samples
    peers.train("dcgan", config, [1, 2], tmp_path, n=4)
    assert np.array_equal(np.load(lines[1]["samples"])["images"], late)
    Path(lines[0]["samples"]).unlink()
    with pytest.raises(v.BadInput, match="past 1 minute"):
        peers.train("dcgan", config, [1, 2], tmp_path, n=4)
