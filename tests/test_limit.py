"""`benchmarks/limit.py`: each of its discriminators is the one that its name says, and its measure is what it says."""

import itertools
import sys
import time

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import limit
from ablations import train_changed

import vitgan_nb as v


def test_a_run_can_stop_after_minutes(monkeypatch):
    monkeypatch.setattr(time, "process_time", itertools.count(0, 10).__next__)  # a look at the clock takes 10 seconds
    ((line, samples),) = train_changed(v.TINY, {}, [4, 8], minutes=1.0)
    assert line["images"] == 20 and line["seconds"] == 70 and samples.shape == (2000, 16, 16, 3)


def test_area_is_the_share_of_pairs_in_order():
    real, fake = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])  # of four pairs three in order, one equal
    assert limit.area(real, fake) == 0.875 and limit.area(fake, real) == 0.125


@pytest.mark.parametrize("name", limit.VARIANTS)
def test_a_variant_takes_the_place_of_its_part_and_leaves_the_notebook_alone(name):
    changed, fields = limit.VARIANTS[name]
    before = {attribute: getattr(v, attribute) for attribute in changed}
    config, d = limit.variant(name, 0)
    logits = d(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert logits.shape == (2,) and logits.isfinite().all()
    assert all(getattr(config, field) == value for field, value in fields.items()) and len(d.blocks) == config.depth
    for attribute, part in changed.items():
        assert getattr(v, attribute) is before[attribute]
        if attribute == "improved_spectral_norm":
            assert not any(isinstance(module, v.ImprovedSpectralNorm) for module in d.modules())
        else:
            assert any(type(module) is part for module in d.modules())
