"""`benchmarks/tokens.py`: each part is what it is called, and a checkpoint gives its average."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import vitgan_nb as v

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import tokens


def test_each_part_is_found_where_it_was_put():
    torch.manual_seed(0)
    put = {"common": torch.randn(1, 1, 48), "patches": torch.randn(1, 400, 48), "styles": torch.randn(300, 1, 48)}
    put = {name: (k + 1) * part for k, (name, part) in enumerate(put.items())} | {"both": 4 * torch.randn(300, 400, 48)}
    found = tokens.parts(sum(put.values()))
    for name, part in put.items():
        assert found[name] == pytest.approx(part.square().mean().sqrt().item(), rel=0.05), name


@pytest.mark.parametrize("classes", [False, True])
def test_a_line_is_of_the_average(tmp_path, classes):
    run = v.Training(replace(v.TINY, out_dir=str(tmp_path), classes=classes), "cpu")
    with torch.no_grad():
        run.average.module.blocks[0].mlp.down.weight.mul_(2)
    line = tokens.measure(v.load_generator(v.save_checkpoint(run, tmp_path)))
    assert line == tokens.measure(run.average.module)
    assert line != tokens.measure(run.generator.eval())
    assert len(line["stream"]) == v.TINY.depth
    v.save_generator(run.average.module, tmp_path / "g.safetensors")
    assert line == tokens.measure(v.load_generator(tmp_path / "g.safetensors"))


def test_one_style_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tokens.py", "g.safetensors", "--n", "1"])
    with pytest.raises(SystemExit):
        tokens.main()
    assert "--n must be 2 or more" in capsys.readouterr().err
