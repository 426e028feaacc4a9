"""Where classes are learned: labels come with their images, and a run with them is safe as any other."""

import functools
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import TINY
from PIL import Image

import vitgan_nb
from vitgan_nb import BadInput, Training

CONFIG = replace(vitgan_nb.TINY, classes=True)


def test_shapes_know_their_kind(monkeypatch):
    _, held_out, labels, held_out_labels = vitgan_nb.load_images(CONFIG)
    assert labels[:12].tolist() == [*range(10), 0, 1] and len(labels) == 10_000
    for label, shape in enumerate([*vitgan_nb.SHAPES.values()]):
        monkeypatch.setattr(vitgan_nb, "SHAPES", dict.fromkeys(range(10), shape))  # the same drawings, all of one kind
        same = (vitgan_nb.draw_shapes(1000, 16, seed=1) == held_out).flatten(1).all(1)
        assert torch.equal(same, held_out_labels == label)


@pytest.fixture
def folder(tmp_path):
    """Twenty red, ten green and ten blue images, in subfolders named against the order in which they are made."""
    for count, (name, colour) in zip((20, 10, 10), (("z/deep", "red"), ("a", "lime"), ("m", "blue")), strict=True):
        (tmp_path / "images" / name).mkdir(parents=True)
        for k in range(count):
            Image.new("RGB", (16, 16), colour).save(tmp_path / "images" / name / f"{k}.png")
    return tmp_path / "images"


def test_a_folder_has_a_class_in_each_subfolder(folder):
    config = replace(CONFIG, dataset="folder", data_root=str(folder))
    images, held_out, *labels = vitgan_nb.load_images(config)
    assert [len(its) for its in labels] == [36, 4]
    for part, its in zip((images, held_out), labels, strict=True):
        colours = part[:, :, 8, 8].tolist()
        assert colours == [([0, 255, 0], [0, 0, 255], [255, 0, 0])[label] for label in its.tolist()]
    assert len(vitgan_nb.load_images(replace(config, classes=False))) == 2
    run = Training(config, "cpu")
    run.train_step()
    assert run.class_rows(2).shape == (6, 3, 16, 16)
    shutil.rmtree(folder / "z")
    assert {*vitgan_nb.load_images(config)[2].tolist()} == {0, 1}  # two are enough


@pytest.mark.parametrize("wrong", ["none", "one", "outside"])
def test_a_folder_without_classes(wrong, folder, tmp_path, monkeypatch, capsys):
    if wrong == "outside":
        (folder / "a" / "0.png").rename(folder / "0.png")
    root = {"none": folder / "a", "one": folder / "z", "outside": folder}[wrong]
    monkeypatch.chdir(tmp_path)
    assert vitgan_nb.main(["train", *TINY, "--classes", "--dataset", "folder", "--data-root", str(root)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "subfolder" in error and [p.name for p in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_fast_step_is_the_plain_step_with_classes(optimizer, monkeypatch):
    config = replace(CONFIG, optimizer=optimizer)
    monkeypatch.setattr(vitgan_nb, "TINY", config)
    vitgan_nb.test_fast_step_is_the_plain_step()
    vitgan_nb.test_resumed_run_equals_unbroken_run()


def test_compiled_objectives_take_labels(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    run = Training(replace(CONFIG, optimizer="adam", compile=True), "cpu")
    run.train_step()
    assert run.quick.keys() == {"discriminator_objective", "generator_objective"}  # nothing fell back


def test_the_command_line_paints_one_class(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert vitgan_nb.main(["train", *TINY, "--steps", "3", "--classes"]) == 0
    (run,) = tmp_path.glob("runs/*")
    assert Image.open(run / "classes.png").size == (10 * 17 + 1, 10 * 17 + 1)
    generator = vitgan_nb.load_generator(run)
    assert vitgan_nb.load_generator(run / "generator.safetensors").mapping.kinds == 10
    for label in (0, 9):
        assert vitgan_nb.main(f"sample --weights {run} --n 3 --label {label} --out {label}.npz".split()) == 0
    painted = vitgan_nb.np.load(tmp_path / "9.npz")["images"]
    expected = vitgan_nb.sample(generator, 3, label=9).permute(0, 2, 3, 1).numpy()
    assert (painted == expected).all() and (painted != vitgan_nb.np.load(tmp_path / "0.npz")["images"]).any()
    with pytest.raises(BadInput, match="label is 10, but must be from 0 to 9"):
        vitgan_nb.sample(generator, 3, label=10)
    in_turn = vitgan_nb.sample(generator, 120)
    assert (in_turn[19].int() - vitgan_nb.sample(generator, 120, label=9)[19].int()).abs().max() <= 1  # rounding


def test_a_record_and_the_rows_of_samples_judge_and_paint_with_labels():
    run = Training(replace(CONFIG, precision="bfloat16"), "cpu")
    entry, z, g, d = run.record(), run.fixed_z, run.generator.eval(), run.discriminator.eval()
    formats, painted = [], run.average.module
    painted.register_forward_pre_hook(lambda *_: formats.append(torch.is_autocast_enabled("cpu")))
    with torch.no_grad(), run.autocast():
        in_turn = torch.arange(32) % 10
        expected = d(g(z[:32], labels=in_turn).float(), labels=in_turn).float().mean()
        assert entry["fake"] == pytest.approx(expected.item(), abs=1e-6)
        for name, images, labels in zip(("real", "held_out"), (run.images, run.held_out), run.labels, strict=True):
            expected = d(vitgan_nb.to_float(images[:32]), labels=labels[:32]).float().mean()
            assert entry[name] == pytest.approx(expected.item(), abs=1e-6)
        rows = [vitgan_nb.to_uint8(painted(z[:3], labels=torch.full((3,), kind))) for kind in range(10)]
    formats.clear()
    assert (run.class_rows(3).int() - torch.cat(rows).int()).abs().max() <= 1  # rounding
    assert len(run.class_rows()) == 100 and len(run.samples()) == 64 and formats == [True] * 3
    run.class_rows(11)
    assert len(formats) == 5  # a hundred at a time, however many classes there are


def test_every_label_is_painted_as_often_as_it_occurs():
    run = Training(CONFIG, "cpu")
    run.images, run.labels[0] = run.images[:4], torch.tensor([1, 0, 0, 0])
    assert 500 < run.random_labels(4000)["labels"].bincount()[1] < 1500
