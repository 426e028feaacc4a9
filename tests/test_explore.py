"""What the sliders draw, called without a notebook; and what is shown while a run trains."""

import inspect
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

import vitgan_nb
from vitgan_nb import TINY, Generator, Training, load_images, run_folder, train

MOVES = {  # one move of a slider each: the picture must change
    "diff_augment_on_one_image": [{"image": 3}, {"strength": 0.0}],
    "overlapping_patches_on_a_real_image": [{"image": 1}, {"row": 1}, {"column": 0}, {"overlap": 0}],
    "latent_walk": [{"first": 5}, {"second": 5}],
    "truncation": [{"psi": 0.0}, {"seed": 4}],
    "one_block_of_another_style": [{"one": 7}, {"other": 7}],
    "attention_of_a_token": [{"image": 1}, {"row": 0}, {"column": 1}, {"block": 1}],
    "nearest_training_images": [{"seed": 1}],
    "above_the_training_resolution": [{"seed": 1}],
}


@pytest.fixture(scope="module")
def live():
    """The module as a notebook has it at its end: images, a run, and a generator to explore."""
    config = replace(TINY, image_size=16, dim=16)
    vitgan_nb.config, vitgan_nb.run = config, Training(config, "cpu")
    vitgan_nb.train_images, vitgan_nb.held_out_images = load_images(config)
    torch.manual_seed(1)
    vitgan_nb.explored = Generator(config).eval()
    yield vitgan_nb
    vitgan_nb.training_thumbnails.cache_clear()
    for name in ("config", "run", "train_images", "held_out_images", "explored"):
        delattr(vitgan_nb, name)


def drawn(function, **moved):
    """The picture that a slider's function draws, as pixels, and what stands above its parts."""
    plt.close("all")
    function(**moved)
    (figure,) = map(plt.figure, plt.get_fignums())
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba()).copy(), [axis.get_title() for axis in figure.axes]


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg")
@pytest.mark.parametrize("name", MOVES)
def test_every_slider_moves_the_picture(live, name):
    function = getattr(live, name)
    still, _ = drawn(function)
    assert (drawn(function)[0] == still).all()  # the same slider, the same picture
    assert {key for move in MOVES[name] for key in move} == {*inspect.signature(function).parameters}
    for move in MOVES[name]:
        moved, _ = drawn(function, **move)
        assert moved.shape != still.shape or (moved != still).any(), move


@pytest.mark.parametrize("other", [{"classes": True}, {"discriminator": "stylegan2", "decoder": "conv"}])
def test_every_picture_of_another_model(live, other, monkeypatch):
    config = replace(live.config, **other)
    for name, value in (("config", config), ("run", Training(config, "cpu")), ("explored", Generator(config).eval())):
        monkeypatch.setattr(live, name, value)
    for name in MOVES:
        plt.close("all")
        getattr(live, name)()
    live.draw_progress(plt.figure(), live.run)


def test_a_walk_starts_and_ends_at_its_seeds_and_stays_on_the_sphere(live, monkeypatch):
    walked, seen = [], {}
    monkeypatch.setattr(vitgan_nb, "show_walks", seen.update)
    monkeypatch.setattr(live.explored, "forward", lambda z: walked.append(z) or Generator.forward(live.explored, z))
    for second in (1, 0):  # 0: nowhere to go
        live.latent_walk(first=0, second=second)
        (z,), ends = walked, [live.latents(live.explored, 1, seed) for seed in (0, second)]
        torch.testing.assert_close(z[[0, -1]], torch.cat(ends), rtol=1e-3, atol=1e-3)
        assert (
            z.norm(dim=1) / torch.lerp(*(end.norm() for end in ends), torch.linspace(0, 1, 12)) - 1
        ).abs().max() < 0.2
        for images in seen.values():
            torch.testing.assert_close(images[[0, -1]], live.explored(torch.cat(ends)), rtol=1e-2, atol=1e-2)
        walked.clear()


def test_a_walk_stays_within_one_class(live, monkeypatch):
    seen, other = {}, Generator(replace(live.config, classes=True)).eval()
    monkeypatch.setattr(vitgan_nb, "show_walks", seen.update)
    monkeypatch.setattr(live, "explored", other)
    live.latent_walk(first=0, second=0)  # nowhere to go
    for images in seen.values():
        assert images.diff(dim=0).abs().max() < 1e-4


def test_one_block_gets_the_other_style_and_the_shares_run_from_nothing_to_all(live, monkeypatch):
    rows = {}
    monkeypatch.setattr(vitgan_nb, "show_shares", rows.update)
    live.one_block_of_another_style()
    assert len(rows) == TINY.depth + 3 and not any(part._forward_pre_hooks for part in live.explored.modules())
    images = list(rows.values())
    assert all((a != b).any() for a, b in zip(images[:-1], images[1:], strict=True))
    monkeypatch.undo()
    titles = drawn(live.one_block_of_another_style)[1]
    assert titles[0].endswith(" 0% of the way") and titles[-1].endswith(" 100% of the way")


def test_a_copy_is_found_mirrored_too(live):
    copies = live.train_images[10:16].clone()
    copies[3:] = copies[3:].flip(3)
    plt.close("all")
    live.show_nearest(copies, live.held_out_images[:6])
    copied, held_out = ([text.get_text() for text in axis.texts] for axis in plt.gcf().axes)
    assert copied == ["0.000"] * 6 and len(held_out) == 6 and "0.000" not in held_out


def test_seams_are_seen(live):
    smooth = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    stairs = smooth.unflatten(3, (8, 8)).mean(4).repeat_interleave(8, 3) + 0.01 * smooth
    plt.close("all")
    live.show_resolutions({"smooth": [smooth] * 4, "stairs": [stairs] * 4}, grid=8)
    titles = [axis.get_title() for axis in plt.gcf().axes]
    assert titles[0].endswith(": 1.0 × at seams") and float(titles[-2].split()[-4]) > 100
    assert plt.gcf().axes[-1].images[0].get_array().shape == (16, 16, 3)  # two patches each way


def test_weaker_augmentation_is_none_at_0_and_all_at_1(live):
    images = torch.rand(4, 3, 16, 16)
    with live.Weaker(0.0):
        torch.testing.assert_close(live.diff_augment(images, "color,translation"), images)
    torch.manual_seed(0)
    expected = live.diff_augment(images, "color,translation,cutout")
    torch.manual_seed(0)
    with live.Weaker(1.0):
        torch.testing.assert_close(live.diff_augment(images, "color,translation,cutout"), expected)


def test_attention_caught_is_that_of_the_network(live):
    image, d = live.to_float(live.held_out_images[:1]), live.run.discriminator.eval()
    h = d.blocks[0](d.tokens(image))
    expected = d.blocks[1].attention.weights(d.blocks[1].norm1(h))[0].mean(0)
    torch.testing.assert_close(live.caught(d, image, d.blocks[1].attention)[1], expected)
    d.train()


def test_the_frame_is_around_the_pixels_of_the_token(live):
    plt.close("all")
    grid, p = live.config.grid, live.config.patch_size
    live.attention_of_a_token(row=grid - 1, column=1, block=1)
    for axis, side in zip(plt.gcf().axes[:2], (p, 1), strict=True):  # the image, and the map of its tokens
        (left, right, bottom, top), (frame,) = axis.images[0].get_extent(), axis.patches  # pixel 0 begins at -0.5
        assert frame.get_xy() == (left + side, bottom - side) and top < frame.get_y() and frame.get_x() + side < right


def test_the_figure_shows_what_guessing_leads_to_and_how_steep_the_layers_are(live):
    run = Training(TINY, "cpu")
    for _ in range(3):
        run.train_step()
    run.record()
    found = vitgan_nb.steepness(run.discriminator)
    assert len(found) == 2 + 5 * TINY.depth and all(0.9 < value < 1.1 for value in found.values())
    with torch.no_grad():
        run.discriminator.head.weight *= 3
    assert vitgan_nb.steepness(run.discriminator)["head"] == pytest.approx(3 * found["head"])
    figure = plt.figure()
    vitgan_nb.draw_progress(figure, run)
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    lines = [line.get_ydata()[0] for line in figure.axes[0].lines[-2:]]
    assert texts[-2:] == ["loss_d 1.386", "loss_g 0.693"]
    assert lines == pytest.approx([1.386, 0.693], abs=1e-3)
    assert len(figure.axes) == 5


def test_the_figure_takes_less_than_a_hundredth_of_the_time(live, monkeypatch):
    """By a clock on which drawing takes 4 seconds: the next one is due after 600."""
    clock, drawn = {"now": 0.0}, []

    def slow(*_):
        clock["now"] += 4
        drawn.append(clock["now"])

    monkeypatch.setattr(vitgan_nb.time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(vitgan_nb, "draw_progress", slow)
    keeper = vitgan_nb.Keeper(live.run, None, False)
    keeper.figure = keeper.bar = keeper.by_time = keeper.write = type("Any", (), {"n": 0, "update": lambda *_: None})()
    keeper.handle, live.run.step = keeper.bar, 9  # no step at which samples are left
    for _ in range(2000):
        clock["now"] += 1
        keeper.after_step()
    live.run.step = 0
    assert drawn[0] == 35 and {b - a for a, b in zip(drawn[:-1], drawn[1:], strict=True)} == {605}


def test_a_film_of_the_run(tmp_path):
    config = replace(TINY, steps=18, out_dir=str(tmp_path))
    run = train(config)
    film = run_folder(config) / "samples.webp"
    names = "samples-000000000.png", "samples-000000016.png", "samples.png"
    size = Image.open(film.with_name(names[0])).size
    files = [Image.new("RGB", size, colour) for colour in ("red", "lime", "blue")]  # real grids are much alike so early
    for name, file in zip(names, files, strict=True):
        assert Image.open(film.with_name(name)).size == size
        file.save(film.with_name(name))
    vitgan_nb.save_film(run, film.parent)
    with Image.open(film) as frames:
        assert frames.n_frames == 3 and frames.size == files[0].size
        for number in range(3):
            frames.seek(number)
            shown = np.asarray(frames.convert("RGB"), float)
            off = [abs(shown - np.asarray(file.convert("RGB"), float)).mean() for file in files]
            assert off[number] == min(off), off
    train(replace(config, steps=10), resume=film.with_name("checkpoint-000000000.pt"))
    with Image.open(film) as frames:
        assert frames.n_frames == 2  # what lies after step 10 is of another run


def test_tensorboard_logs_what_the_log_has(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(TINY, out_dir=str(tmp_path))
    run = train(config, tensorboard=True)
    events = EventAccumulator(str(run_folder(config) / "tensorboard"))
    events.Reload()
    assert events.Images("samples")[0].step == TINY.steps
    for kind, names in (("loss", vitgan_nb.STATISTICS), ("logit", vitgan_nb.LOGITS)):
        for name in names:
            (event,) = events.Scalars(f"{kind}/{name}")
            assert event.step == TINY.steps and event.value == pytest.approx(run.history[0][name])
    assert events.Scalars("steepness/head")


def test_tensorboard_that_is_missing_is_told_before_anything_is_written(tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert vitgan_nb.main(["train", "--profile", "smoke", "--tensorboard", "--out-dir", str(tmp_path / "runs")]) == 2
    assert (
        capsys.readouterr().err
        == "error: tensorboard is not installed; run pip install tensorboard, or train without it.\n"
    )
    assert not (tmp_path / "runs").exists()
