"""`benchmarks/noise.py`: its shares are what they are called, on gradients made up for it and on a small run."""

import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from torch import nn

sys.path.insert(0, str(ROOT / "benchmarks"))
import noise

import vitgan_nb as v


def test_signal_is_the_share_that_all_batches_have_in_common():
    common, own = torch.randn(10_000), torch.randn(4, 10_000)
    for scale, share in ((0.0, 1.0), (1.0, 0.5), (1000.0, 0.0)):  # the square of the mean of four would have 0.25 for 0
        assert noise.signal(common + scale * own) == pytest.approx(share, abs=0.05)


def test_gradients_are_those_of_the_matrices_one_row_a_batch():
    network, batches = nn.Sequential(nn.Linear(11, 12), nn.Linear(12, 3)), iter(torch.eye(11)[:2])
    rows = noise.gradients(network, lambda: (network[0](next(batches)).sum(),), 2)
    expected = torch.zeros(2, 12, 11)  # the gradient of the sum of Wx in each row of W is x
    expected[0, :, 0] = expected[1, :, 1] = 1
    torch.testing.assert_close(rows.unflatten(1, (12, 11)), expected)


def test_moved_is_the_length_of_the_change_over_that_of_the_weights():
    first = {
        "blocks.0.weight": torch.tensor([3.0]),
        "blocks.1.weight": torch.tensor([4.0]),
        "blocks.1.bias": torch.ones(1),
    }
    now = {
        "blocks.0.weight": torch.tensor([3.0]),
        "blocks.1.weight": torch.tensor([5.0]),
        "blocks.1.bias": torch.zeros(1),
    }
    lengths = noise.moved({"generator": first, "discriminator": {}}, {"generator": now, "discriminator": {}})
    assert lengths == {"generator.blocks": pytest.approx(1 / 5)}


@pytest.mark.parametrize("classes", [False, True])
def test_a_run_is_taken_apart(classes, tmp_path):
    config = replace(v.TINY, augment="", classes=classes, out_dir=str(tmp_path))
    v.train(config)
    line = noise.measure(v.checkpoints(v.run_folder(config))[0], batches=4)
    variance = line["variance_g"]
    assert variance["augmented anew"] == 0 < min(variance["colour anew"], variance["translation anew"])
    assert variance["all new"] > 0 and variance["latents anew, not augmented"] > 0  # the configuration augments nothing
    assert min(line["moved"].values()) > 0 and {"generator.mapping", "discriminator.head"} < {*line["moved"]}
    assert {"signal_g", "signal_d"} < {*line}


def test_a_file_that_is_no_checkpoint_gets_a_sentence(tmp_path):
    with pytest.raises(v.BadInput, match="does not exist"):
        noise.measure(tmp_path / "checkpoint-000000001.pt", batches=2)


def test_one_batch_cannot_differ_and_gets_a_sentence(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["noise.py", "checkpoint-000000001.pt", "--batches", "1"])
    with pytest.raises(v.BadInput, match="--batches is 1, but must be at least 2"):
        noise.main()
