"""The notebook beside `reference.py`, which is written from the formulas alone: values and every gradient to 1e-9."""

import contextlib
import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import reference
import torch

import vitgan_nb
from vitgan_nb import Config, Discriminator, Generator, Training

# No two axes are equally long, so that none passes for another: 36 patches of 16 pixels, heads 11 wide, batches of 7.
SIZES = Config(
    dataset="shapes", image_size=24, patch_size=4, dim=22, depth=2, heads=2, mlp_ratio=5, latent_dim=10,
    mapping_depth=3, siren_dim=13, siren_depth=3, omega_0=1.5, batch_size=7, bcr_real=2.0, bcr_fake=3.0,
    ema_half_life=1, precision="float32",
)  # fmt: skip


@pytest.fixture(autouse=True)
def in_float64(monkeypatch):
    """Everything in float64, also what the notebook computes in float32 on purpose; from one seed."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def drawn(monkeypatch):
    """Every call of torch.rand, randn and randint from here on: (name, what it gave)."""
    calls = []
    for draw in (torch.rand, torch.randn, torch.randint):

        def recorded(*args, draw=draw, **kwargs):
            numbers = draw(*args, **kwargs)
            calls.append((draw.__name__, numbers.clone()))
            return numbers

        monkeypatch.setattr(torch, draw.__name__, recorded)
    return calls


def assert_same(ours, theirs, atol=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=atol)


def test_styles_of_classes():
    generator = stirred(Generator(replace(SIZES, classes=True), kinds=3))
    weights, z = named(generator), torch.randn(7, SIZES.latent_dim)
    for labels in ([2, 0, 2, 1, 1, 0, 2], None):  # without labels the classes come in turn
        y = {} if labels is None else {"labels": torch.tensor(labels)}
        expected = reference.mapping(weights, reference.joined(weights, z, labels or [0, 1, 2, 0, 1, 2, 0]))
        assert_same(generator.mapping(z, **y), expected)


def named(state):
    """A network's state, or its gradients, under the names of `reference.py`, copied."""
    state = state.state_dict() if isinstance(state, torch.nn.Module) else state
    return {name.replace("normalise.", ""): value.detach().clone() for name, value in state.items()}


def stirred(network, amount=0.5):
    """`network` with every weight moved: a bias at 0, or u and v at their fixed point, would hide a mistake."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += amount * torch.randn_like(parameter)
    return network.double()


def gradients(y, network, *inputs):
    """Those of a random weighting of y, for the inputs and by name for the weights."""
    weighting = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    leaves = dict(network.named_parameters()) if isinstance(network, torch.nn.Module) else network
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad(y, [*inputs, *leaves.values()], weighting)
    return list(found[: len(inputs)]), named(dict(zip(leaves, found[len(inputs) :], strict=True)))


def painting(config):
    """The settings that `reference.generator` takes."""
    return {key: getattr(config, key) for key in ("image_size", "patch_size", "heads", "omega_0", "demodulate")}


def augmentation_numbers(calls, image_size):
    """What `reference.augment` takes, from the draws of one or more calls of `diff_augment`, images one after another.

    The notebook draws a shift as 0 to a quarter of the side, an eighth standing for none.
    """
    color = [numbers for name, numbers in calls if name == "rand" and numbers.ndim == 5]
    whole = [numbers for name, numbers in calls if name == "randint"]
    return {
        "color": torch.cat(color, 1).reshape(3, -1),
        "translation": torch.cat(whole[0::2], 1).reshape(2, -1) - round(image_size / 8),
        "cutout": torch.cat(whole[1::2], 1).reshape(2, -1),
    }


# Networks


@pytest.mark.parametrize("demodulate", [False, True])
def test_generator(demodulate):
    config = replace(SIZES, demodulate=demodulate)
    generator = stirred(Generator(config))
    z = torch.randn(3, 10)
    with torch.no_grad():
        z[0] *= 1e-4  # as small as the 1e-8 beside its square
        generator.siren.layers[0].linear.weight[0] *= 1e-4  # likewise
    weights = reference.with_gradients(named(generator))
    z, other = z.requires_grad_(), z.clone().requires_grad_()
    assert [len(part) for part in (generator.mapping.layers, generator.blocks, generator.siren.layers)] == [3, 2, 2]
    images = generator(z)
    w = reference.mapping(weights, other)
    expected = reference.generator(weights, w, **painting(config))
    assert_same(images, expected)
    assert_same(gradients(images, generator, z), gradients(expected, weights, other))
    w_mean = reference.mean_style(weights["mapping.w_mean"], w)
    assert_same(named(generator)["mapping.w_mean"], w_mean)
    generator.eval()
    w = reference.truncated(w_mean, w, 0.3)
    assert_same(generator(z, truncation=0.3), reference.generator(weights, w, **painting(config)))
    assert_same(named(generator)["mapping.w_mean"], w_mean)  # at rest in eval mode


def test_discriminator():
    discriminator = stirred(Discriminator(SIZES))
    weights = named(discriminator)
    for training in (True, True, False):
        discriminator.train(training)
        if training:
            weights = reference.power_iteration(weights)
        weights = reference.with_gradients(weights)
        x = torch.randn(3, 3, 24, 24, requires_grad=True)
        other = x.detach().clone().requires_grad_()
        logits, expected = discriminator(x), reference.discriminator(weights, other, patch_size=4, heads=2)
        assert_same(logits, expected)
        assert_same(gradients(logits, discriminator, x), gradients(expected, weights, other))
        assert_same(named(discriminator), {name: value.detach() for name, value in weights.items()})
    assert len(discriminator.blocks) == 2 and discriminator.head.weight.shape == (1, 22)


def test_gradients_of_the_reference_are_slopes():
    """Both implementations leave the derivatives to PyTorch; so here they meet a difference quotient."""
    networks = [stirred(Generator(replace(SIZES, demodulate=True)), 0.1), stirred(Discriminator(SIZES))]
    z, settings = torch.randn(2, 10), painting(replace(SIZES, demodulate=True))

    def loss(g, d):
        images = reference.generator(g, reference.mapping(g, z), **settings)
        logits = reference.discriminator(d, images, patch_size=4, heads=2)
        return reference.generator_loss(logits) + reference.consistency(logits, logits.flip(0), 2.0)

    leaves = [reference.with_gradients(named(network)) for network in networks]
    for k in range(2):
        slopes = reference.gradients_of(loss(*leaves), leaves[k])
        direction = {name: torch.randn_like(slope) for name, slope in slopes.items()}
        slope = sum((direction[name] * slopes[name]).sum() for name in slopes)
        ends = []
        for step in (1e-5, -1e-5):
            there = [{name: leaf.detach() for name, leaf in weights.items()} for weights in leaves]
            there[k] |= {name: there[k][name] + step * direction[name] for name in slopes}
            ends.append(loss(*there))
        torch.testing.assert_close((ends[0] - ends[1]) / 2e-5, slope, rtol=1e-6, atol=0)


# Augmentation and losses


def test_diff_augment(drawn):
    x = torch.randn(40, 3, 24, 24, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    ours = vitgan_nb.diff_augment(x, "color,translation,cutout")
    expected = reference.augment(other, augmentation_numbers(drawn, 24))
    assert_same(ours, expected)
    assert_same(gradients(ours, {}, x), gradients(expected, {}, other))
    assert vitgan_nb.diff_augment(x.half(), "color,translation,cutout").dtype == torch.float16


def test_ranges_of_the_augmentations():
    """As published: brightness ±0.5, saturation 0 to 2, contrast 0.5 to 1.5, shift an eighth, zeros, cutout a half."""
    n = 2000

    def fills(found, low, high):
        """All within [low, high], and evenly: no tenth of the range holds far from a tenth of them."""
        assert low <= found.min() and found.max() <= high, (found.min(), found.max())
        tenths = torch.histc(found, 10, low, high) / n
        assert (tenths - 0.1).abs().max() < 5 * math.sqrt(0.09 / n), tenths

    x = torch.randn(1, 3, 16, 16).expand(n, -1, -1, -1)
    y = vitgan_nb.diff_augment(x, "color")
    middle, grey = (lambda x: x.mean((1, 2, 3))), (lambda x: x.mean(1, keepdim=True))
    contrast = grey(y).std((1, 2, 3)) / grey(x).std((1, 2, 3))
    fills(middle(y) - middle(x), -0.5, 0.5)
    fills(contrast, 0.5, 1.5)
    fills((y - grey(y)).std((1, 2, 3)) / (x - grey(x)).std((1, 2, 3)) / contrast, 0, 2)

    for side in (16, 18, 40):
        most, where = side // 8, torch.arange(1.0, side + 1)
        image = (100 * where[:, None] + where).expand(n, 3, -1, -1)  # a pixel's value tells where it was; none is 0
        y = vitgan_nb.diff_augment(image, "translation")
        shifts = []
        for before, after in zip(image[:, 0], y[:, 0], strict=True):
            row, column = ((after - before)[side // 2, side // 2] / torch.tensor([100.0, 1.0])).round().long().tolist()
            column -= 100 * row
            shifts.append((row, column))
        for b, shift in enumerate(shifts[:100]):
            assert_same(y[b : b + 1], reference.translation(image[b : b + 1], torch.tensor([shift]).T))
        assert set(shifts) == {(i, j) for i in range(-most, most + 1) for j in range(-most, most + 1)}

        cut = vitgan_nb.diff_augment(torch.ones(n, 3, side, side), "cutout")[:, 0] == 0
        rows, columns = cut.any(2), cut.any(1)
        assert torch.equal(cut, rows[:, :, None] & columns[:, None, :])  # a rectangle
        centred = {centre: (where > centre - side // 4) & (where <= centre + side // 4) for centre in range(side + 1)}
        for found in (rows, columns):  # centred anywhere, both borders included, equally often
            share = torch.stack([(found == span).all(1).double().mean() for span in centred.values()])
            assert (share.sum() - 1).abs() < 1e-9
            assert (share - 1 / (side + 1)).abs().max() < 5 * math.sqrt(1 / (side + 1) / n)


def test_losses():
    for scale in (1.0, 10.0):
        logits = [(scale * torch.randn(7)).requires_grad_() for _ in range(2)]
        for ours, theirs, inputs in (
            (vitgan_nb.discriminator_loss(*logits), reference.discriminator_loss(*logits), logits),
            (vitgan_nb.generator_loss(logits[0]), reference.generator_loss(logits[0]), logits[0]),
            (vitgan_nb.balanced_consistency(*logits, 3.0), reference.consistency(*logits, 3.0), logits),
        ):
            assert_same(ours, theirs)
            assert_same(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs))


def test_real_points():
    """Eight places on the circle of radius 1, equally often, with a spread of 0.05."""
    n = 8000
    points = vitgan_nb.real_points(n)
    places = torch.tensor([[math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)] for k in range(8)])
    off, nearest = (points[:, None] - places).norm(dim=2).min(1)
    assert (nearest.bincount(minlength=8) / n - 1 / 8).abs().max() < 5 * math.sqrt(7 / 64 / n)
    assert abs(off.square().mean().sqrt() / (0.05 * math.sqrt(2)) - 1) < 5 / math.sqrt(4 * n)


@pytest.mark.parametrize("saturating", [False, True])
def test_turns_of_the_game(saturating, drawn, monkeypatch):
    """Two turns of each player: loss, gradients, and a step of Adam, from the same points."""
    real, draw = [], vitgan_nb.real_points
    monkeypatch.setattr(vitgan_nb, "real_points", lambda n: real.append(draw(n)) or real[-1])
    game, states = vitgan_nb.Game(), {}
    game.saturating = saturating
    for network in (game.G, game.D):
        assert [type(layer).__name__ for layer in network] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    for turn, name in 2 * [(game.turn_of_D, "D"), (game.turn_of_G, "G")]:
        del drawn[:]
        G, D = copy.deepcopy(game.G), copy.deepcopy(game.D)
        loss, mine = turn(), {"D": D, "G": G}[name]
        fake = D(G(drawn[0][1]))
        assert fake.shape == (128, 1)
        if name == "D":
            expected = reference.discriminator_loss(D(real[-1])[:, 0], fake[:, 0])
        else:
            expected = -reference.softplus(fake).mean() if saturating else reference.generator_loss(fake[:, 0])
        assert_same(torch.tensor(loss), expected.detach())
        gradients = torch.autograd.grad(expected, list(mine.parameters()))
        for k, (before, gradient, after) in enumerate(
            zip(mine.parameters(), gradients, getattr(game, name).parameters(), strict=True)
        ):
            assert_same(after.grad, gradient)
            moved = reference.adam(before.detach(), gradient, states.setdefault((name, k), {}), 0.002, (0.0, 0.99))
            assert_same(after.detach(), moved, atol=1e-10)


# The training step


@pytest.mark.parametrize("shape", [(11, 22), (22, 11), (13, 13)])
def test_muon(shape):
    weight, state = torch.nn.Parameter(torch.randn(shape)), {}
    optimizer, expected = vitgan_nb.MatrixMuon([weight], 0.004, torch.float64), weight.detach().clone()
    for _ in range(3):
        weight.grad = torch.randn(shape)
        optimizer.step()
        expected = reference.muon(expected, weight.grad, state, 0.004)
        assert_same(weight.detach(), expected)


@pytest.mark.parametrize("overflow", [False, True])
def test_muon_with_a_loss_scaler(overflow):
    """Gradients 8 times too large are divided by 8; those of which one overflowed move nothing, momenta included."""
    shapes = (11, 12), (10, 12), (12,)  # of these Muon takes the first, Adam the others
    scaled, plain = (vitgan_nb.Muon([torch.nn.Parameter(torch.ones(s)) for s in shapes], SIZES) for _ in range(2))
    assert [len(optimizer.param_groups[0]["params"]) for optimizer in scaled.each] == [2, 1]
    weights, others = ([w for group in each.param_groups for w in group["params"]] for each in (scaled, plain))
    for step in range(3):
        overflowed = overflow and step == 1
        for weight, other in zip(weights, others, strict=True):
            gradient = torch.randn(weight.shape)
            weight.grad, other.grad = torch.full_like(gradient, math.inf) if overflowed else 8 * gradient, gradient
        scaled.found_inf, scaled.grad_scale = torch.tensor([overflowed, 8], dtype=torch.float32)  # as the scaler does
        scaled.step()
        if not overflowed:
            plain.step()
        assert_same([w.detach() for w in weights], [w.detach() for w in others])
        assert_same(scaled.each[1].state[weights[2]]["momentum"], plain.each[1].state[others[2]]["momentum"])


@pytest.fixture
def run(monkeypatch, request):
    """A run of `SIZES` on a hundred shapes."""
    images = vitgan_nb.draw_shapes(100, 24)
    monkeypatch.setattr(vitgan_nb, "load_images", lambda config: (images[:80], images[80:]))
    return Training(replace(SIZES, **getattr(request, "param", {"optimizer": "adam"})))


def noted(run, network, optimizer, monkeypatch):
    """A list to which every step of `optimizer` adds the gradients of `network` that it is given."""
    found, step = [], optimizer.step

    def noting(*args, **kwargs):
        found.append(named({name: parameter.grad for name, parameter in network.named_parameters()}))
        return step(*args, **kwargs)

    monkeypatch.setattr(optimizer, "step", noting)
    return found


@pytest.mark.parametrize(
    "run",
    [{"optimizer": "adam"}, {"optimizer": "muon"}, {"optimizer": "adam", "diff_augment": False}],
    ids=str,
    indirect=True,
)
@pytest.mark.parametrize("step_of", [Training.train_step, vitgan_nb.plain_step], ids=["fast", "plain"])
def test_two_training_steps(step_of, run, drawn, monkeypatch):
    """Losses, gradients, weights of both networks and of the average, buffers too, from the same random numbers."""
    for network in (run.generator, run.discriminator, run.average):
        stirred(network, 0.1)
    for part in (run.optimizer_g, run.optimizer_d):
        for one in getattr(part, "each", ()):
            if isinstance(one, vitgan_nb.MatrixMuon):
                one.dtype = torch.float64
    assert run.step == 0 and run.seconds == 0
    run.step = 1  # the half-life of one image is not yet reached in this step, and is in the next
    theirs = {"generator": named(run.generator), "discriminator": named(run.discriminator),
              "average": named(run.average.module), "state_g": {}, "state_d": {}, "images": 7}  # fmt: skip
    settings = {"generator": painting(SIZES), "discriminator": {"patch_size": 4, "heads": 2},
                "optimizer": run.config.optimizer, "rate": 0.002, "betas": (0.0, 0.99),
                "bcr_real": 2.0, "bcr_fake": 3.0, "half_life": 1}  # fmt: skip
    power_steps = []
    if step_of is vitgan_nb.plain_step:  # four passes, a power step in each: so u and v are left alone here
        monkeypatch.setattr(vitgan_nb.ImprovedSpectralNorm, "power_step", lambda *_: power_steps.append(1))
        monkeypatch.setattr(reference, "power_iteration", dict)
    gradients_d = noted(run, run.discriminator, run.optimizer_d, monkeypatch)
    gradients_g = noted(run, run.generator, run.optimizer_g, monkeypatch)
    for step in range(2):
        del drawn[:]
        run.sums.zero_()
        step_of(run)
        (mirror,) = (k for k, (name, x) in enumerate(drawn) if name == "rand" and x.ndim == 4)
        first, second = (k for k, (name, _) in enumerate(drawn) if name == "randn")
        indices = vitgan_nb.batch_indices(len(run.images), 7, step + 1, SIZES.seed)
        draws = {
            "real": reference.real_batch(run.images[indices], drawn[mirror][1].flatten() < 0.5),
            "z_d": drawn[first][1],
            "augment_d": augmentation_numbers(drawn[first + 1 : second], 24),
            "z_g": drawn[second][1],
            "augment_g": augmentation_numbers(drawn[second + 1 :], 24) if run.config.diff_augment else None,
        }
        expected = reference.training_step(theirs, draws, settings)
        assert_same(list(run.sums), [*expected["losses"], torch.tensor(1.0)])
        assert_same(gradients_d[step], expected["discriminator"])
        assert_same(gradients_g[step], expected["generator"])
        # A step is 2e-3. Adam divides a gradient that is 0 but for rounding, of the bias of the keys, by about 1e-8.
        assert_same(named(run.generator), theirs["generator"], atol=1e-10)
        assert_same(named(run.discriminator), theirs["discriminator"], atol=1e-10)
        assert_same(named(run.average.module), theirs["average"], atol=1e-10)
    assert run.generator.training and run.discriminator.training and not run.average.training
    if step_of is vitgan_nb.plain_step:
        layers = sum(name.endswith(".u") for name in theirs["discriminator"])
        assert len(power_steps) == 2 * 4 * layers  # none in the generator's half


def test_record(run):
    """The means of the losses since the last record, and those of the logits of now, both networks at rest meanwhile."""
    for network in (run.generator, run.discriminator):
        stirred(network, 0.1)
    run.count(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0))
    run.count(torch.tensor(2.0), torch.tensor(4.0), torch.tensor(9.0))
    run.count(torch.tensor(7.0), torch.tensor(math.nan), torch.tensor(7.0))  # such a step does not count
    run.seconds = 1.26
    g, d = named(run.generator), named(run.discriminator)
    entry = run.record()
    fake = reference.generator(g, reference.mapping(g, run.fixed_z[:32]), **painting(SIZES))
    real, held_out = (2 * images[:32].double() / 255 - 1 for images in (run.images, run.held_out))
    expected = {"step": 3, "images": 21, "seconds": 1.3, "loss_d": 1.5, "consistency": 3.0, "loss_g": 6.0}
    for name, images in (("real", real), ("held_out", held_out), ("fake", fake)):
        expected[name] = reference.discriminator(d, images, patch_size=4, heads=2).mean().item()
    assert_same(entry, expected)
    assert run.history == [entry] and not run.sums.any()
    assert run.generator.training and run.discriminator.training
    assert_same([named(run.generator), named(run.discriminator)], [g, d])


# Initial weights, sampling, data


# How weights begin, by the end of the name, the first that fits: normal with a spread, uniform up to, constant at.
STATED = {
    Generator: {
        "w_mean": ("constant", 0),
        "position.weight": ("normal", math.pi / 2 * math.sqrt(2)),  # in use divided by √2: half a turn
        "wave.weight": ("normal", math.pi / 8 * math.sqrt(2)),  # an eighth
        "position.bias": ("uniform", math.pi),
        "wave.bias": ("uniform", math.pi),
        "scale.bias": ("constant", 1),
        "rgb.linear.weight": ("normal", 0.1),
        "mapping.layers.0.weight": ("normal", 100),  # 1 over the multiplier
        "mapping.layers.1.weight": ("normal", 100),
        "mapping.layers.2.weight": ("normal", 100),
        ".bias": ("constant", 0),
        ".weight": ("normal", 1),
    },
    Discriminator: {
        "class_token": ("constant", 0),
        "position": ("normal", 0.02),
        "norm.weight": ("constant", 1),
        "norm1.weight": ("constant", 1),
        "norm2.weight": ("constant", 1),
        ".bias": ("constant", 0),
        ".weight": ("normal", 1),
    },
}


@pytest.mark.parametrize("kind", [Generator, Discriminator])
def test_initial_weights(kind):
    """Every weight: mean and spread within five standard errors; normal or uniform by the share within one spread."""
    network = kind(replace(SIZES, dim=96, heads=4, latent_dim=80, siren_dim=64))
    weights = named(network)
    for name, w in weights.items():
        if name.split(".")[-1] in ("u", "v", "sigma_init"):
            continue
        shape, value = next(start for end, start in STATED[kind].items() if name.endswith(end))
        if shape == "constant":
            assert (w == value).all(), name
            continue
        spread, within = (value, 0.6827) if shape == "normal" else (value / math.sqrt(3), 1 / math.sqrt(3))
        n = w.numel()
        assert n > 60 and w.mean().abs() < 5 * spread / math.sqrt(n), name
        assert abs(w.square().mean().sqrt() / spread - 1) < 5 / math.sqrt(2 * n), name
        assert abs((w.abs() < spread).double().mean() - within) < 5 * math.sqrt(within * (1 - within) / n), name
        assert shape == "normal" or w.abs().max() <= value, name
    normalised = [
        name.removesuffix(".weight") for name, w in weights.items() if name.endswith(".weight") and w.ndim == 2
    ]
    if kind is Generator:
        assert not any(name.endswith(".u") for name in weights)
        return
    for layer in normalised:  # the singular vectors of the initial weight are exact
        w, u, v, sigma = (weights[f"{layer}.{part}"].numpy() for part in ("weight", "u", "v", "sigma_init"))
        assert_same(torch.tensor(np.linalg.norm(w, 2)), torch.tensor(sigma))
        assert_same(torch.from_numpy(w @ v), torch.from_numpy(sigma * u))
        assert_same(torch.from_numpy(w.T @ u), torch.from_numpy(sigma * v))


def painted(weights, z, truncation=1.0):
    """What the reference paints for z with the mean style at rest, as whole numbers from 0 to 255."""
    w = reference.truncated(weights["mapping.w_mean"], reference.mapping(weights, z), truncation)
    x = reference.generator(weights, w, **painting(SIZES))
    return torch.clamp(torch.round(255 * (x + 1) / 2), 0, 255).to(torch.uint8)


@pytest.mark.parametrize("training", [True, False])
def test_sample(training, drawn):
    generator = stirred(Generator(SIZES)).train(training)
    before = named(generator)
    before["mapping.w_mean"] += 0.3
    generator.mapping.w_mean += 0.3
    del drawn[:]
    images = vitgan_nb.sample(generator, 3, seed=5, truncation=0.7)
    assert torch.equal(images, painted(before, drawn[0][1][:3], 0.7))
    assert generator.training == training
    assert_same(named(generator), before)


def test_samples_of_a_run_are_of_the_average(run, tmp_path):
    stirred(run.average)
    average = named(run.average.module)
    assert torch.equal(run.samples(3), painted(average, run.fixed_z[:3]))
    now = named(run.generator)
    assert torch.equal(run.samples(3, of_now=True), painted(now, run.fixed_z[:3])) and run.generator.training
    assert_same(named(run.generator), now)
    with pytest.raises(vitgan_nb.BadInput, match="holds no checkpoint"):
        vitgan_nb.load_generator(tmp_path)
    for path in (vitgan_nb.save_checkpoint(run, tmp_path), tmp_path):
        loaded = vitgan_nb.load_generator(path)
        assert not loaded.training
        assert_same(named(loaded), average)


def test_average_starts_as_the_generator(run):
    assert_same(named(run.average.module), named(run.generator))
    assert not any(parameter.requires_grad for parameter in run.average.parameters())


def test_held_out_images_are_not_trained_on(tmp_path, cache):
    from PIL import Image

    for k in range(30):
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(
            tmp_path / f"{k}.png"
        )
    folder = vitgan_nb.load_images(replace(SIZES, dataset="folder", data_root=str(tmp_path)))
    assert (len(folder[0]), len(folder[1])) == (27, 3)  # a tenth
    for train, held_out in (vitgan_nb.load_images(replace(SIZES, image_size=8)), folder):
        assert len(held_out) and not {x.numpy().tobytes() for x in train} & {x.numpy().tobytes() for x in held_out}


# Measuring, and where tensors lie


def test_thumbnails():
    """The mean colour of each 3 × 3 pixels, from 0 to 1, colour by colour."""
    images = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    found = vitgan_nb.thumbnails(images).reshape(2, 3, 8, 8)
    for row in range(8):
        for column in range(8):
            field = images[:, :, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3].double()
            assert_same(found[:, :, row, column], field.sum((2, 3)) / 9 / 255)


def test_kid_of_thumbnails():
    """The mean over lots of equal size, and its standard error; four images are enough."""
    a, b = (torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8) for n in (250, 320))
    found, x, y = vitgan_nb.kid_of_thumbnails(a, b), vitgan_nb.thumbnails(a), vitgan_nb.thumbnails(b)
    lots = [1000 * vitgan_nb.kid(x[k : k + 100], y[k : k + 100]).item() for k in (0, 100)]
    assert_same(found["kid"], (lots[0] + lots[1]) / 2)
    assert_same(found["error"], abs(lots[0] - lots[1]) / 2)  # of two: √2 / 2 of the difference, over √2
    assert vitgan_nb.kid_of_thumbnails(a[:4], b)["samples"] == 4
    with pytest.raises(vitgan_nb.BadInput, match="3 images are too few"):
        vitgan_nb.kid_of_thumbnails(a[:3], b)


def test_no_tensor_is_left_on_the_cpu(monkeypatch):
    """On the meta device, which keeps shapes and no numbers, tensors of two devices do not add up."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it knows no such device
    config = replace(SIZES, demodulate=True)
    generator, discriminator = Generator(config).to("meta"), Discriminator(config).to("meta")
    real = torch.zeros(7, 3, 24, 24, dtype=torch.uint8, device="meta")
    for images in (generator(torch.randn(7, 10, device="meta")), vitgan_nb.real_batch(real, torch.arange(7))):
        for policy in vitgan_nb.AUGMENTATIONS:
            images = vitgan_nb.diff_augment(images, policy)
            assert images.device.type == "meta"
        assert discriminator(images).shape == (7,)


def test_batches_follow_from_seed_and_step():
    """In another process too, which remembers no epoch and has drawn other numbers."""
    orders = []
    for _ in range(2):
        vitgan_nb.epoch_order.cache_clear()
        torch.rand(3)
        orders.append(vitgan_nb.batch_indices(10, 4, 2, seed=7))
    assert torch.equal(*orders)
