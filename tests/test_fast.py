"""The networks' fast forms give what their textbook forms give, in float64; and bfloat16 trains as float32."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SCRIPT, module_from

import vitgan_nb
from benchmarks.side_by_side import as_textbook
from vitgan_nb import TINY, Discriminator, Generator, ModulatedLinear, Training


@pytest.fixture
def in_float64(monkeypatch):
    """All of a run in float64, also what it computes in float32 on purpose."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def assert_same(fast, textbook, *inputs):
    """Equal outputs, and equal gradients of the inputs and of all weights."""
    for a, b in zip(gradients(fast, *inputs), gradients(textbook, *inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def gradients(network, *inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = network(*inputs)
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return [y, *torch.autograd.grad(y, [*inputs, *network.parameters()], seed)]


def pair(make):
    """The same module twice, the second in its textbook form."""
    both = []
    for _ in range(2):
        torch.manual_seed(0)
        both.append(make())
    for network in both:
        for parameter in network.parameters():  # biases that start at 0 would hide a mistake in them
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
    return both[0], as_textbook(both[1])


@pytest.mark.parametrize("demodulate", [False, True])
def test_modulated_linear_equals_grouped_convolution(in_float64, demodulate):
    fast, textbook = pair(lambda: ModulatedLinear(6, 5, y_dim=7, demodulate=demodulate))
    assert_same(fast, textbook, torch.randn(2, 3, 4, 6), torch.randn(2, 3, 7))


@pytest.mark.parametrize(
    "check",
    ["test_attention_is_the_libraries_attention", "test_generator_block_is_its_two_equations",
     "test_l2_attention_is_its_formula"],
)  # fmt: skip
def test_attention_as_a_gpu_computes_it(check):
    """The notebook's own checks, with the branch for a GPU taken here."""
    source, condition = SCRIPT.read_text(), 'if q.device.type != "cpu":'
    assert source.count(condition) == 1
    getattr(module_from(source.replace(condition, "if True:")), check)()


def test_norms_stay_in_float32_where_products_are_bfloat16():
    """Demodulation and spectral norm: sums over a thousand products, which bfloat16 gives to two or three digits."""
    layer = ModulatedLinear(1000, 50, y_dim=7, demodulate=True)
    normalised = vitgan_nb.improved_spectral_norm(vitgan_nb.EqualizedLinear(1000, 50))
    x, style = torch.randn(1, 1, 4, 1000), torch.randn(1, 1, 7)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        s, y = layer.scale(style)[:, :, None].double(), layer(x, style)
        layer.demodulate = False
        factor = y / layer(x, style)
        weight = normalised.normalise(normalised.weight)
    w = (layer.linear.weight * layer.linear.weight_gain).double()
    expected = 1 / ((w * s[0, 0]).square().sum(1) + 1e-8).sqrt()  # (out,)
    torch.testing.assert_close(factor, expected.expand(1, 1, 4, -1).float(), rtol=1e-4, atol=0)
    torch.testing.assert_close(weight, normalised.weight.detach(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("network", [Generator, Discriminator])
def test_networks_equal_their_textbook_forms(in_float64, network):
    config = replace(TINY, demodulate=True, siren_depth=3)
    fast, textbook = pair(lambda: network(config).eval())
    x = torch.randn(3, config.latent_dim) if network is Generator else torch.rand(3, 3, 16, 16)
    assert_same(fast, textbook, x)


def test_r1_passes_through_attention_as_a_gpu_computes_it():
    """A fused kernel has no second derivative: R1's gradients are those of the other branch."""
    source, condition = SCRIPT.read_text(), 'if q.device.type != "cpu":'
    found = []
    for module in (vitgan_nb, module_from(source.replace(condition, "if True:"))):
        torch.manual_seed(0)
        discriminator = module.Discriminator(module.TINY).eval()
        module.slope_penalty(discriminator, torch.rand(4, 3, 16, 16), 2.0).backward()
        found.append([weight.grad for weight in discriminator.parameters() if weight.grad is not None])
    torch.testing.assert_close(*found)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch before 2.9")
def test_muon_equals_the_librarys():
    for shape in (64, 64), (64, 128), (128, 64):
        weight = torch.nn.Parameter(torch.randn(shape))
        other = torch.nn.Parameter(weight.detach().clone())
        ours = vitgan_nb.MatrixMuon([weight], 0.004, torch.bfloat16)
        theirs = torch.optim.Muon([other], 0.02, 0.0, 0.5, adjust_lr_fn="match_rms_adamw")
        for _ in range(4):
            weight.grad = torch.randn(shape)
            other.grad = weight.grad.clone()
            ours.step()
            theirs.step()
        torch.testing.assert_close(weight, other, rtol=0, atol=1e-4)  # a step moves a weight by 0.004


def test_samples_and_records_are_in_the_format_of_the_run():
    run = Training(replace(TINY, precision="bfloat16"))
    network, z = run.average.module, torch.randn(100, 12, generator=vitgan_nb.latent_stream(5))[:3]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected, half = (
            vitgan_nb.to_uint8(network(z)),
            run.discriminator.eval()(network(run.fixed_z[:32]).float()).float(),
        )
    assert torch.equal(vitgan_nb.sample(network, 3, seed=5), expected)
    torch.testing.assert_close(run.record()["fake"], half.mean().item())
    network.config = replace(TINY, precision="float32")
    full = vitgan_nb.sample(network, 3, seed=5)
    assert torch.equal(full, vitgan_nb.to_uint8(network(z))) and not torch.equal(full, expected)


def test_muon_in_float16_sees_small_gradients():
    gradient = torch.randn(2, 32, 64)
    for dtype in (torch.float16, torch.bfloat16):
        small, plain = (vitgan_nb.orthogonalized(gradient * scale, dtype) for scale in (2.0**-27, 1.0))
        assert torch.equal(small, plain)
    beside = gradient * torch.tensor([1.0, 2.0**-20])[:, None, None]  # a small one in the stack of a large one
    alone, together = (vitgan_nb.orthogonalized(g, torch.float16) for g in (gradient[1:], beside))
    torch.testing.assert_close(alone[0], together[1], rtol=0, atol=0.02)


def curves(precision, seed, steps, **size):
    """The losses of a run of `smoke`, each the mean over a tenth of the steps: (10, 3)."""
    run = Training(replace(vitgan_nb.PROFILES["smoke"], precision=precision, seed=seed, **size))
    means = []
    for _ in range(10):
        run.sums.zero_()
        for _ in range(steps // 10):
            run.train_step()
        means.append((run.sums[:-1] / run.sums[-1]).tolist())
    return np.array(means)


def distance_in_spreads(steps, **size):
    """How far the mean losses in bfloat16 lie from those in float32, in seed-to-seed spreads; three seeds each."""
    full, half = (np.stack([curves(p, seed, steps, **size) for seed in range(3)]) for p in ("float32", "bfloat16"))
    spread = np.sqrt((full.std(0, ddof=1) ** 2 + half.std(0, ddof=1) ** 2).mean(0))  # (3,), over the whole curve
    return np.abs(full.mean(0) - half.mean(0)).mean(0) / spread


@pytest.mark.skipif(
    vitgan_nb.number_format("auto", torch.device("cpu")) != torch.bfloat16,
    reason="takes minutes where the processor does not multiply bfloat16",
)
def test_bfloat16_trains_as_float32():
    """The loss curves over 200 steps of a smaller `smoke` differ by less than two seeds do."""
    distance = distance_in_spreads(200, image_size=16, dim=48, depth=2, heads=2, siren_dim=48, batch_size=16)
    assert (distance < 1).all(), distance


@pytest.mark.slow
def test_bfloat16_trains_as_float32_at_full_size():
    """The same over 300 steps of `smoke` itself."""
    distance = distance_in_spreads(300)
    assert (distance < 1).all(), distance
