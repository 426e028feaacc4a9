"""Folders of images: decoded once into a mapped file, whatever the pictures and the disk are like."""

import os
import shutil
import threading
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import vitgan_nb
from vitgan_nb import BadInput, read_folder, read_image


@pytest.fixture
def pictures(tmp_path, cache):
    """A folder of 30 pictures of noise in two subfolders."""
    for k in range(30):
        (tmp_path / "pictures" / "ba"[k % 2]).mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(k).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "pictures" / "ba"[k % 2] / f"{k}.png")
    return tmp_path / "pictures"


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that are decoded."""
    names, original = [], vitgan_nb.read_image

    def read(path, size):
        names.append(path.name)
        return original(path, size)

    monkeypatch.setattr(vitgan_nb, "read_image", read)
    return names


def file_of(tensor: Tensor) -> str:
    """The file that is mapped where `tensor` lies; "" if none is."""
    for line in open("/proc/self/maps"):
        addresses, *_, name = line.split(maxsplit=5)
        start, end = (int(x, 16) for x in addresses.split("-"))
        if start <= tensor.data_ptr() < end:
            return name.strip() if name.startswith("/") else ""


# ------------------------------------------------------------------------------------------------------- kept on disk


def test_decoded_once(pictures, decoded, cache, monkeypatch):
    first = read_folder(pictures, 8)
    assert len(decoded) == 30
    monkeypatch.chdir(pictures.parent)
    for path in (pictures, pictures.relative_to(pictures.parent)):  # by another name it is the same folder
        again = read_folder(path, 8)
        assert len(decoded) == 30 and all(map(torch.equal, first, again))
    assert read_folder(pictures, 4)[0].shape == (30, 3, 4, 4) and len(decoded) == 60
    assert len(list(cache.glob("*.u8"))) == 2


@pytest.mark.parametrize("change", ["content", "time", "new", "gone", "renamed"])
def test_a_changed_folder_is_decoded_anew(change, pictures, decoded, cache):
    read_folder(pictures, 8)
    picture = pictures / "b" / "0.png"
    status = picture.stat()
    if change == "content":
        Image.new("RGB", (9, 9), "red").save(picture)
        os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "time":
        os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    elif change == "new":
        shutil.copy(picture, pictures / "a")
    elif change == "gone":
        picture.unlink()
    else:
        picture.rename(pictures / "a" / "0.png")
    images, labels = read_folder(pictures, 8)
    n = 30 + {"new": 1, "gone": -1}.get(change, 0)
    assert len(decoded) == 30 + n and len(images) == len(labels) == n
    assert (images == torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1)).flatten(1).all(1).any() == (
        change == "content"
    )
    assert len(list(cache.glob("*.u8"))) == 1  # that of the folder as it was is gone


def test_images_are_mapped_privately(pictures, cache):
    train, held_out = vitgan_nb.load_images(
        replace(vitgan_nb.TINY, dataset="folder", data_root=str(pictures), image_size=8)
    )
    (kept,) = cache.glob("*.u8")
    before = kept.read_bytes()
    assert file_of(train) == file_of(held_out) == str(kept) and file_of(torch.zeros(9)) == ""
    train.zero_()
    assert kept.read_bytes() == before and len(before) == 30 * (3 * 8 * 8 + 8)
    assert (len(train), len(held_out)) == (27, 3) and held_out.any()
    assert train.data_ptr() == held_out.data_ptr() + held_out.nbytes  # views: nothing is copied


def test_mapping_does_not_ask_for_the_memory(pictures):
    images, _ = read_folder(pictures, 8)
    maps = open("/proc/self/smaps").read().split("VmFlags:")
    name = file_of(images)
    at = next(k for k, part in enumerate(maps) if name in part)
    assert "nr" in maps[at + 1].splitlines()[0].split()  # no memory is reserved


def test_two_programs_at_once_decode_once(pictures, decoded):
    found = []
    threads = [threading.Thread(target=lambda: found.append(read_folder(pictures, 8))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(decoded) == 30 and all(torch.equal(found[0][0], images) for images, _ in found)


def test_a_full_disk_is_told_before_decoding(pictures, decoded, cache, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 30 * (3 * 8 * 8 + 8) - 1))
    images, _ = read_folder(pictures, 8)
    assert f"Could not write to {cache} (No space left on device)" in capsys.readouterr().out
    assert len(decoded) == 30 and file_of(images) == "" and not list(cache.glob("*.u8"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 30 * (3 * 8 * 8 + 8)))
    kept = read_folder(pictures, 8)[0]
    assert torch.equal(images, kept) and file_of(kept) and capsys.readouterr().out == ""


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(pictures, cache, monkeypatch, capsys):
    monkeypatch.setattr(os, "fsync", lambda file: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    images, labels = read_folder(pictures, 8)
    assert len(images) == len(labels) == 30 and "(No space left on device)" in capsys.readouterr().out
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written(pictures, cache, capsys):
    cache.write_text("a file where the folder should be")
    assert len(read_folder(pictures, 8)[0]) == 30
    assert capsys.readouterr().out.count("\n") == 1


def test_interrupted_leaves_nothing(pictures, cache, monkeypatch):
    def read(path, size):
        raise KeyboardInterrupt

    monkeypatch.setattr(vitgan_nb, "read_image", read)
    with pytest.raises(KeyboardInterrupt):
        read_folder(pictures, 8)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


# ------------------------------------------------------------------------------------------------------ what is in it


def test_labels_count_the_subfolders_in_order(pictures):
    images, labels = read_folder(pictures, 8)
    for image, label in zip(images, labels, strict=True):
        (k,) = (k for k in range(30) if torch.equal(image, picture_of(k)))
        assert label == 1 - k % 2  # even ones are in b
    (pictures / "c" / "deeper").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(pictures / "c" / "deeper" / "red.png")
    assert read_folder(pictures, 8)[1].bincount().tolist() == [15, 15, 1]
    Image.new("RGB", (8, 8), "blue").save(pictures / "blue.png")
    assert (read_folder(pictures, 8)[1] + 1).bincount().tolist() == [1, 15, 15, 1]  # −1 in no subfolder
    assert read_folder(pictures / "a", 8)[1].tolist() == [-1] * 15


def picture_of(k: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(k).integers(0, 256, (8, 8, 3), dtype=np.uint8)).permute(2, 0, 1)


def test_order_is_random_and_follows_from_the_names(pictures, tmp_path):
    images, labels = read_folder(pictures, 8)
    shutil.copytree(pictures, tmp_path / "copy")
    assert all(map(torch.equal, (images, labels), read_folder(tmp_path / "copy", 8)))
    assert 1 <= labels[:6].sum() <= 5  # a part holds both classes


@pytest.mark.parametrize("sound, broken, told", [(99, 1, False), (100, 1, True), (198, 2, False), (199, 2, True)])
def test_one_percent_may_be_unreadable(sound, broken, told, tmp_path, cache, capsys):
    for k in range(sound + broken):
        path = tmp_path / str(k % 2) / f"{k}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"damaged")
        if k < sound:
            Image.new("RGB", (2, 2), (k, 0, 0)).save(path)
    if not told:
        with pytest.raises(BadInput, match=f"{sound}.png cannot be read .* remove or repair it"):
            read_folder(tmp_path, 2)
        assert not list(cache.glob("*.u8"))
        return
    images, labels = read_folder(tmp_path, 2)
    red = images[:, 0, 0, 0].long()  # the number of the file
    assert sorted(red.tolist()) == list(range(sound)) and torch.equal(labels, red % 2)
    out = capsys.readouterr().out
    assert (
        f"Left out: {broken} of {sound + broken} files." in out
        and f"{sound}.png" in out
        and f"{sound + broken - 1}.png" in out
    )


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_pictures_are_turned_as_their_exif_says(kind, tmp_path):
    picture, exif = Image.new("RGB", (32, 32), "blue"), Image.Exif()
    picture.paste("red", (0, 0, 32, 16))  # the upper half
    exif[0x0112] = 6  # to be turned by 90° clockwise: up goes to the right
    picture.save(tmp_path / f"turned.{kind}", exif=exif)
    left, right = read_image(tmp_path / f"turned.{kind}", 32)[0].float().mean(1).T.split(16)  # (16 columns, 3) each
    torch.testing.assert_close(left.mean(0), torch.tensor([0.0, 0.0, 255.0]), rtol=0, atol=16)
    torch.testing.assert_close(right.mean(0), torch.tensor([255.0, 0.0, 0.0]), rtol=0, atol=16)


def test_a_dark_grey_of_16_bits_keeps_its_upper_byte(tmp_path):
    for level in (200, 700):
        Image.fromarray(np.full((8, 8), level, dtype=np.uint16)).save(tmp_path / "grey.png")
        assert (read_image(tmp_path / "grey.png", 8)[0] == level // 256).all()


@pytest.mark.parametrize("high", [False, True])
def test_the_square_in_the_middle_is_taken(high, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (20, 50, 3), dtype=np.uint8)
    noise = noise.swapaxes(0, 1) if high else noise
    Image.fromarray(np.ascontiguousarray(noise)).save(tmp_path / "strip.png")
    middle = torch.from_numpy(np.ascontiguousarray(noise[15:35] if high else noise[:, 15:35])).permute(2, 0, 1)
    assert torch.equal(read_image(tmp_path / "strip.png", 20)[0], middle)


def test_scaling_is_antialiased(tmp_path):
    """A fine chequered pattern becomes grey, not a coarser pattern."""
    board = np.indices((90, 90)).sum(0) % 2 * 255
    Image.fromarray(board.astype(np.uint8)).save(tmp_path / "board.png")
    image, note = read_image(tmp_path / "board.png", 26)
    assert note == "mode L" and (image.int() - 127).abs().max() < 12


def test_a_link_that_leads_nowhere_is_named(tmp_path, cache):
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(BadInput, match="link.png cannot be read"):
        read_folder(tmp_path, 2)


# ------------------------------------------------------------------------------------------------- larger than the GPU


def test_a_quarter_of_the_free_memory_is_room_for_images(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (400, 10**6))
    assert vitgan_nb.room_for_images(torch.device("cuda", 0)) == 100
    assert vitgan_nb.room_for_images(torch.device("cpu")) == float("inf")
