"""Wrong input: one sentence that names the value, exit status 2, no traceback, nothing left behind."""

import hashlib
import http.server
import math
import pickle
import shutil
import struct
import threading
import time
import zlib
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import vitgan_nb
from vitgan_nb import BadInput, Config, evaluate, read_cifar10, read_folder

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
    ("--optimizer sgd", "optimizer is 'sgd', but must be one of adam, muon"),
    ("--learning-rate inf", "learning_rate is inf"),
    ("--betas 0 1", "betas is [0.0, 1.0]"),
    ("--omega-0 0", "omega_0 is 0.0"),
    ("--bcr-real -1", "bcr_real is -1.0"),
    ("--r1 -1", "r1 is -1.0"),
    ("--decoder mlp", "decoder is 'mlp', but must be one of siren, conv"),
    ("--decoder conv --image-size 18 --patch-size 6", "patch_size is 6, but must be a power of 2 for decoder conv"),
    ("--discriminator cnn", "discriminator is 'cnn', but must be one of vit, stylegan2"),
    ("--discriminator stylegan2 --image-size 24", "image_size is 24, but must be a power of 2, 8 or more"),
    ("--discriminator stylegan2 --image-size 4", "image_size is 4, but must be a power of 2, 8 or more"),
    ("--discriminator stylegan2 --batch-size 6", "batch_size is 6, but must be a multiple of 4"),
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
    ("--resume-from .", ". is damaged or not a checkpoint"),
    ("--heads 0", "heads is 0"),
    ("--mlp-ratio 0", "mlp_ratio is 0"),
    ("--latent-dim -2", "latent_dim is -2"),
    ("--mapping-depth 0", "mapping_depth is 0"),
    ("--siren-dim 0", "siren_dim is 0"),
    ("--siren-depth 0", "siren_depth is 0"),
    ("--omega-0 nan", "omega_0 is nan"),
    ("--bcr-fake inf", "bcr_fake is inf"),
    ("--learning-rate -0.1", "learning_rate is -0.1"),
    ("--betas 0.5 -0.1", "betas is [0.5, -0.1]"),
    ("--betas 0.5", "expected 2 arguments"),
    ("--ema-half-life 0", "ema_half_life is 0"),
    ("--seed -1", "seed is -1"),
    ("--seed 4294967296", "seed is 4294967296, but must be below 2³²"),
    ("--minutes -3", "minutes is -3.0"),
    ("--augment color;cutout", "augment is 'color;cutout'"),
    ("--batch-size 1.5", "invalid int value: '1.5'"),
    ("--dataset folder --data-root vitgan_nb.py", "vitgan_nb.py is not a folder"),
]


@pytest.mark.parametrize("flags, sentence", CONFIGURATIONS, ids=[flags for flags, _ in CONFIGURATIONS])
def test_wrong_flags(flags, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert vitgan_nb.main(["train", *TINY, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_value_is_taken_or_named(data):
    """Whatever is put into a field: a sound `Config`, or one sentence with the field's name and the value."""
    name = data.draw(st.sampled_from([f.name for f in fields(Config)]))
    value = data.draw(
        st.one_of(st.integers(), st.floats(), st.text(max_size=9), st.booleans(), st.none(), st.lists(st.floats()))
    )
    try:
        config = Config(**{name: value})
    except BadInput as error:
        related = {"image_size": "patch_size", "dim": "heads"}
        assert str(error).count("\n") == 0 and str(error).endswith(".")
        assert name in str(error) or any(name == b and a in str(error) for a, b in related.items()), error
        assert repr(value) in str(error) or name in related.values()
    else:
        assert config.image_size % config.patch_size == 0 and config.dim % config.heads == 0
        assert config == replace(config) and isinstance(hash(config), int)


@settings(max_examples=60, deadline=None)
@given(cut=st.floats(0, 1), flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=4))
def test_a_damaged_checkpoint_is_refused_or_whole(cut, flips, finished_run, tmp_path_factory):
    """Cut anywhere, bytes changed anywhere: refused in one sentence, or what it holds loads; never anything else."""
    whole = max(finished_run[0].glob("runs/*/checkpoint-*.pt")).read_bytes()
    damaged = bytearray(whole[: int(cut * len(whole)) or 1] if cut < 0.9 else whole)
    for place, change in flips:
        damaged[int(place * (len(damaged) - 1))] ^= change
    path = tmp_path_factory.mktemp("damaged") / "checkpoint-000000001.pt"
    path.write_bytes(damaged)
    try:
        state = vitgan_nb.load_checkpoint(path)
    except BadInput as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert isinstance(state["step"], int)


@settings(max_examples=60, deadline=None)
@given(
    content=st.binary(max_size=300),
    head=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM"]),
)
def test_any_bytes_are_an_image_or_named(content, head, tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "picture.png"
    path.write_bytes(head + content)
    with pytest.raises(BadInput, match="picture.png cannot be read as an image"):
        vitgan_nb.read_image(path, 16)


def test_groups_of_four_in_every_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = replace(vitgan_nb.TINY, discriminator="stylegan2", batch_size=12)
    with pytest.raises(BadInput, match="batch_size is 12, but must be a multiple of 8 .*in 2 processes"):
        vitgan_nb.Training(config, "cpu")


def test_what_other_networks_cannot_show_is_told(monkeypatch, capsys):
    config = replace(vitgan_nb.TINY, discriminator="stylegan2", decoder="conv")
    generator = vitgan_nb.Generator(config)
    for name, value in (("explored", generator), ("config", config)):
        monkeypatch.setattr(vitgan_nb, name, value, raising=False)
    vitgan_nb.above_the_training_resolution()
    vitgan_nb.attention_of_a_token()
    assert len(capsys.readouterr().out.splitlines()) == 2
    with pytest.raises(BadInput, match="4 × 4 pixels a patch and no others"):
        generator.paint(torch.randn(1, 24), 8)


@pytest.mark.parametrize("wrong", [dict(dim=96.0), dict(demodulate=1), dict(dataset=None), dict(betas=0.5)])
def test_wrong_types(wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        Config(**wrong)


def test_cifar10_without_data_and_network(tmp_path, monkeypatch, capsys):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("VITGAN_DATA", "")
    monkeypatch.chdir(tmp_path)
    assert vitgan_nb.main(["train", "--dataset", "cifar10"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "VITGAN_DATA" in error and list(tmp_path.iterdir()) == []


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host on the loopback that serves a small archive as CIFAR-10's; `ways` says how, for each of the two addresses."""
    from torchvision.datasets import CIFAR10

    files = tmp_path / "made" / CIFAR10.base_folder
    files.mkdir(parents=True)

    def put(name, content):
        (files / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((files / name).read_bytes()).hexdigest()]

    image = {"data": np.arange(3 * 32 * 32, dtype=np.uint8)[None]}
    monkeypatch.setattr(CIFAR10, "train_list", [put("data_batch_1", image | {"labels": [7]})])
    monkeypatch.setattr(CIFAR10, "test_list", [put("test_batch", image | {"labels": [5]})])
    name, md5 = put("batches.meta", {"label_names": ["noise"]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    archive = Path(shutil.make_archive(tmp_path / "made" / "archive", "gztar", tmp_path / "made", CIFAR10.base_folder))
    whole, ways, asked = archive.read_bytes(), {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            way = ways[self.path.split("/")[1]]
            head = self.command == "HEAD" or self.headers.get("Method") == "HEAD"  # torchvision looks for redirections
            if not head:
                asked.append(way)
            self.send_response(404 if way == "gone" else 200)
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            if head or way == "gone":
                return
            half = len(whole) // 2
            self.wfile.write(b"x" * half if way == "wrong" else whole[:half])
            if way == "stops":
                time.sleep(1.5)
            elif way != "cut":
                time.sleep(0.2 * (way == "slow"))
                self.wfile.write(whole[half:])

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(whole).hexdigest())
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/own/cifar-10-python.tar.gz")
    monkeypatch.setattr(vitgan_nb, "CIFAR10_MIRROR", CIFAR10.url.replace("/own/", "/mirror/"))
    monkeypatch.setattr(vitgan_nb, "PATIENCE", 0.5)
    yield ways, asked
    server.shutdown()


@pytest.mark.parametrize("mirror", ["sound", "slow", "wrong", "gone", "cut", "stops"])
def test_cifar10_comes_from_the_mirror_or_else_from_its_own_host(mirror, host, tmp_path, capsys):
    ways, asked = host
    ways |= {"mirror": mirror, "own": "sound"}
    train, test, *labels = read_cifar10(tmp_path / "data")
    expected = {"sound": ["sound"], "slow": ["slow"], "gone": ["sound"]}  # what is gone is not asked for the file
    assert asked == expected.get(mirror, [mirror, "sound"])
    assert train.shape == test.shape == (1, 3, 32, 32) and train.flatten()[:3].tolist() == [0, 1, 2]
    assert [its.tolist() for its in labels] == [[7], [5]]
    assert "100%" in capsys.readouterr().err  # how far it is


def test_half_a_download_is_cleared_away_and_nothing_else(host, tmp_path):
    host[0].update(mirror="wrong", own="cut")
    (tmp_path / "mine.tar.gz").touch()
    before = {path.name for path in tmp_path.iterdir()}
    for root in (tmp_path, tmp_path / "new"):
        with pytest.raises(BadInput, match="could not be downloaded"):
            read_cifar10(root)
        assert {path.name for path in tmp_path.iterdir()} == before


def test_inception_that_cannot_be_fetched_or_read(tmp_path, monkeypatch):
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(BadInput, match="could not be fetched or read.*extractor thumbnails"):
        evaluate(images, images)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for content in (b"", b"half of it", b"PK" + bytes(1000)):
        (folder / "weights-inception-2015-12-05-6726825d.pth").write_bytes(content)
        with pytest.raises(BadInput, match=f"could not be fetched or read.*in {folder}") as caught:
            evaluate(images, images)
        assert "\n" not in str(caught.value)
    assert torch.backends.cudnn.allow_tf32


def test_too_few_images_to_measure():
    images = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(BadInput, match="3 images are too few"):
        evaluate(images, images)
    with pytest.raises(BadInput, match="3 images are too few"):
        vitgan_nb.kid_of_thumbnails(images, images)


def test_folder_of_odd_images_is_read(tmp_path, cache, capsys):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "a.png")
    Image.new("L", (40, 40), 200).save(tmp_path / "b grey.png")
    Image.fromarray(torch.full((40, 40), 51 * 257, dtype=torch.int32).numpy().astype("uint16")).save(
        tmp_path / "c 16 bit.png"
    )
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(tmp_path / "d clear.png")
    Image.new("RGB", (3, 3), "blue").save(tmp_path / "e tiny.png")
    Image.new("CMYK", (40, 40), (0, 0, 0, 255)).save(tmp_path / "f.jpg")
    images, labels = read_folder(tmp_path, 16)
    assert images.shape == (6, 3, 16, 16) and labels.tolist() == [-1] * 6
    colours = sorted(images[:, :, 8, 8].tolist(), key=lambda colour: (max(colour) >= 10, colour))
    assert colours[1:] == [[0, 0, 255], [51, 51, 51], [200, 200, 200], [255, 0, 0], [255, 255, 255]]
    assert max(colours[0]) < 10  # the black of the CMYK image
    assert capsys.readouterr().out == (
        "Converted: 1 × mode CMYK; 1 × mode I;16; 1 × mode L; 1 × smaller than 16 pixels, enlarged; 1 × transparent.\n"
    )


def test_folder_with_broken_images_names_them(tmp_path, cache):
    Image.new("RGB", (40, 40)).save(tmp_path / "fine.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "fine.png").read_bytes()[:60])
    with pytest.raises(BadInput, match="broken.png cannot be read as an image"):
        read_folder(tmp_path, 16)
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(BadInput, match="broken.png cannot be.*1 more cannot be read either: text.jpg"):
        read_folder(tmp_path, 16)


def png_header(width, height):
    """The start of a PNG file that says it is this large."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


@pytest.mark.parametrize(
    "name, content",
    [
        ("huge.png", png_header(20_000, 20_000)),
        ("large and cut off.png", png_header(14_000, 14_000)),
        ("empty.png", b""),
        ("nothing but a header.png", png_header(8, 8)),
        ("no width.png", png_header(0, 8)),
        ("text.gif", b"GIF89a but not really"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_hostile_images_are_named(name, content, tmp_path, cache, monkeypatch, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    assert vitgan_nb.main(["train", *TINY, "--dataset", "folder", "--data-root", "images"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and name in error and [path.name for path in tmp_path.iterdir()] == ["images"]


def test_more_odd_images_are_read(tmp_path, cache):
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "a palette.png")
    palette.save(tmp_path / "b clear palette.png", transparency=1)
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("green", "blue")]
    frames[0].save(tmp_path / "c animated.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (1, 1), "blue").save(tmp_path / "d one pixel.png")
    Image.new("RGB", (400, 2), "red").save(tmp_path / "e strip.png")
    Image.new("1", (20, 20), 1).save(tmp_path / "f bilevel.png")
    colours = read_folder(tmp_path, 16)[0][:, :, 8, 8].tolist()
    assert sorted(colours) == [[0, 0, 255], [0, 128, 0], *[[255, 0, 0]] * 2, *[[255, 255, 255]] * 2]


@pytest.mark.parametrize(
    "name, values, accepted",
    [
        ("n", (0, -1, 2.0, True), (1,)),
        ("seed", (-1, 2**32, 1.5), (0, 2**32 - 1)),
        ("truncation", (-0.1, 1.1, math.nan, "1"), (0, 1, 0.5)),
        ("label", (0, -1, 1.0), (None,)),  # this generator has learned no classes
    ],
)
def test_wrong_arguments_of_sample(name, values, accepted):
    generator = vitgan_nb.Generator(vitgan_nb.TINY)
    for value in values:
        with pytest.raises(BadInput, match=f"{name} is {value!r}"):
            vitgan_nb.sample(generator, **({"n": 2} | {name: value}))
    for value in accepted:
        assert vitgan_nb.sample(generator, **({"n": 2} | {name: value})).shape[1:] == (3, 16, 16)


def test_one_image_is_too_few_and_two_are_enough(tmp_path, cache):
    config = replace(vitgan_nb.TINY, dataset="folder", data_root=str(tmp_path))
    for k, colour in enumerate(("red", "blue")):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{k}.png")
        if k == 0:
            with pytest.raises(BadInput, match="holds one image"):
                vitgan_nb.load_images(config)
    assert [len(part) for part in vitgan_nb.load_images(config)] == [1, 1]


@pytest.mark.parametrize(
    "data_root, variable, expected", [("here", "there", "here"), ("", "there", "there"), ("", "", "data")]
)
def test_where_cifar10_is_looked_for(data_root, variable, expected, monkeypatch):
    monkeypatch.setattr(vitgan_nb, "read_cifar10", lambda root: (root, root))
    monkeypatch.setenv("VITGAN_DATA", variable)
    assert vitgan_nb.load_images(replace(vitgan_nb.PROFILES["paper"], data_root=data_root)) == (Path(expected),) * 2


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
        ("--n -3", "n is -3"),
        ("--n 0 --out new/samples.npz", "n is 0"),
        ("--n many", "invalid int value: 'many'"),
        ("--truncation -0.1", "truncation is -0.1"),
        ("--truncation nan", "truncation is nan"),
        ("--seed -1", "seed is -1"),
        ("--label 0", "this generator has learned no classes"),
        ("--out damaged.pt/grid.png", "damaged.pt"),
        ("--weights empty.safetensors", "holds no ViTGAN generator"),
        ("--weights another.safetensors", "holds no ViTGAN generator"),
    ],
)
def test_wrong_sample_arguments(arguments, sentence, finished_run, tmp_path, monkeypatch, capsys):
    (weights,) = finished_run[0].glob("runs/*/generator.safetensors")
    for name in ("damaged.safetensors", "damaged.pt"):
        (tmp_path / name).write_bytes(weights.read_bytes()[:999])
    (tmp_path / "empty.safetensors").touch()
    save_file({"weight": torch.ones(2)}, tmp_path / "another.safetensors")
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    assert vitgan_nb.main(["sample", "--weights", str(weights), *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_other_data_is_not_looked_for_where_the_training_images_were(tmp_path, monkeypatch):
    config = Config(image_size=32, dim=16, depth=1, heads=2, siren_dim=8, dataset="folder", data_root="pictures")
    vitgan_nb.save_generator(vitgan_nb.Generator(config), tmp_path / "generator.safetensors")
    asked = []

    def load_images(config):
        asked.append((config.dataset, config.data_root))
        raise BadInput("no images.")

    monkeypatch.setattr(vitgan_nb, "load_images", load_images)
    for more in ("", "--dataset folder", "--dataset shapes", "--data-root more", "--dataset cifar10 --data-root more"):
        assert vitgan_nb.main(["evaluate", "--weights", str(tmp_path / "generator.safetensors"), *more.split()]) == 2
    folder = ("folder", "pictures")
    assert asked == [folder, folder, ("shapes", ""), ("folder", "more"), ("cifar10", "more")]


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(vitgan_nb, "best_device", lambda: torch.device("cuda", 2))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(BadInput, match="--nproc-per-node=2"):
        vitgan_nb.Training(vitgan_nb.TINY)


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
