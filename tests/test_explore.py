"""What the sliders draw, called without a notebook; and what is shown while a run trains."""

import inspect
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import vitgan_nb
from PIL import Image
from vitgan_nb import PROFILES, TINY, Config, Generator, Training, load_images, run_folder, train

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
    assert {key for move in MOVES[name] for key in move} == {*inspect.signature(function).parameters} - {"steps"}
    for move in MOVES[name]:
        moved, _ = drawn(function, **move)
        assert moved.shape != still.shape or (moved != still).any(), move
