"""Wrong input: one sentence that names the value, exit status 2, no traceback, nothing left behind."""

import pytest
import torch
from conftest import TINY, run_script
from PIL import Image

import vitgan_nb
from vitgan_nb import BadInput, Config, read_folder

CONFIGURATIONS = [
    ("--image-size 30", "image_size is 30, but must be a multiple of patch_size"),
    ("--dim 20 --heads 3", "dim is 20, but must be a multiple of heads"),
    ("--dim 0", "dim is 0, but must be 1 or more"),
    ("--depth -1", "depth is -1"),
    ("--batch-size -4", "batch_size is -4"),
    ("--patch-size 0", "patch_size is 0"),
    ("--patch-size 1", "patch_size is 1, but must be even"),
    ("--image-size 0", "image_size is 0"),
    ("--steps -1", "steps is -1"),
    ("--minutes nan", "minutes is nan"),
    ("--learning-rate 0", "learning_rate is 0.0"),
    ("--learning-rate inf", "learning_rate is inf"),
    ("--betas 0 1", "betas is [0.0, 1.0]"),
    ("--omega-0 0", "omega_0 is 0.0"),
    ("--bcr-real -1", "bcr_real is -1.0"),
    ("--augment colour", "augment is 'colour'"),
    ("--precision half", "precision is 'half'"),
    ("--dataset mnist", "dataset is 'mnist', but must be one of cifar10, shapes, folder"),
    ("--dataset cifar10", "image_size is 16, but must be 32 for cifar10"),
    ("--dataset folder", "data_root is ''"),
    ("--dataset folder --data-root nowhere", "nowhere is not a folder"),
    ("--profile huge", "profile is 'huge', but must be one of auto, smoke, lesson, paper"),
    ("--dim many", "invalid int value: 'many'"),
    ("--colour red", "unrecognized arguments: --colour red"),
    ("--resume-from nowhere.pt", "nowhere.pt does not exist"),
]


@pytest.mark.parametrize("flags, sentence", CONFIGURATIONS, ids=[flags for flags, _ in CONFIGURATIONS])
def test_wrong_flags(flags, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert vitgan_nb.main(["train", *TINY, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [dict(dim=96.0), dict(demodulate=1), dict(dataset=None), dict(betas=0.5)])
def test_wrong_types(wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        Config(**wrong)


def test_cifar10_without_data_and_network(tmp_path):
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    process = run_script("train", "--dataset", "cifar10", cwd=tmp_path, VITGAN_DATA="", **nowhere)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1 and "VITGAN_DATA" in process.stderr
    assert list(tmp_path.iterdir()) == []


def test_folder_of_odd_images_is_read(tmp_path, capsys):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "a.png")
    Image.new("L", (40, 40), 200).save(tmp_path / "b grey.png")
    Image.fromarray(torch.full((40, 40), 51 * 257, dtype=torch.int32).numpy().astype("uint16")).save(
        tmp_path / "c 16 bit.png"
    )
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(tmp_path / "d clear.png")
    Image.new("RGB", (3, 3), "blue").save(tmp_path / "e tiny.png")
    Image.new("CMYK", (40, 40), (0, 0, 0, 255)).save(tmp_path / "f.jpg")
    images = read_folder(tmp_path, 16)
    assert images.shape == (6, 3, 16, 16)
    colours = images[:, :, 8, 8].tolist()
    assert colours[:5] == [[255, 0, 0], [200, 200, 200], [51, 51, 51], [255, 255, 255], [0, 0, 255]]
    assert max(colours[5]) < 10
    assert capsys.readouterr().out == (
        "Converted: 1 × mode CMYK; 1 × mode I;16; 1 × mode L; 1 × smaller than 16 pixels, enlarged; 1 × transparent.\n"
    )


def test_folder_with_broken_images_names_them(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "fine.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "fine.png").read_bytes()[:60])
    with pytest.raises(BadInput, match="broken.png cannot be read as an image"):
        read_folder(tmp_path, 16)
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(BadInput, match="1 more cannot be read either"):
        read_folder(tmp_path, 16)


def test_empty_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("no images here")
    with pytest.raises(BadInput, match="holds no image"):
        read_folder(tmp_path, 16)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("--n 0", "n is 0"),
        ("--truncation 1.5", "truncation is 1.5"),
        ("--out samples.bmp", "must end in .npz or .png"),
        ("--weights nowhere.safetensors", "nowhere.safetensors does not exist"),
        ("--weights damaged.safetensors", "holds no ViTGAN generator"),
        ("--weights damaged.pt", "is damaged or not a checkpoint"),
        ("--weights .", "holds no checkpoint"),
    ],
)
def test_wrong_sample_arguments(arguments, sentence, finished_run, tmp_path, monkeypatch, capsys):
    (weights,) = finished_run[0].glob("runs/*/generator.safetensors")
    for name in ("damaged.safetensors", "damaged.pt"):
        (tmp_path / name).write_bytes(weights.read_bytes()[:999])
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    assert vitgan_nb.main(["sample", "--weights", str(weights), *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_run_of_another_configuration_is_not_continued(finished_run, tmp_path, monkeypatch, capsys):
    checkpoint = max(finished_run[0].glob("runs/*/checkpoint-*.pt"))
    monkeypatch.chdir(tmp_path)
    assert vitgan_nb.main(["train", *TINY, "--seed", "3", "--resume-from", str(checkpoint)]) == 2
    assert "another configuration: seed 0 ≠ 3" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_results_cannot_be_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a file where the folder should be")
    assert vitgan_nb.main(["train", *TINY, "--steps", "2"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "runs" in error and [path.name for path in tmp_path.iterdir()] == ["runs"]
