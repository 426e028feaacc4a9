"""What a GPU will do with a step, rehearsed without one: on the meta device, through Dynamo and AOT, and by counting.

The meta device computes shapes only. As on a GPU, a number read back from there cannot be had for nothing: it raises.
"""

import contextlib
import os
import signal
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import SCRIPT, module_from
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._guards import TracingContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import vitgan_nb
from vitgan_nb import PROFILES, TINY, MatrixMuon, Training, restore, state_of, train

READ_BACK = "aten._local_scalar_dense.default"  # what `.item()`, `.tolist()`, `bool()` and `if` on a tensor become


class Operations(TorchDispatchMode):
    """Counts the operations that PyTorch dispatches, by name, and those of them that touch a tensor on the CPU."""

    def __init__(self):
        super().__init__()
        self.all, self.on_cpu = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.all[str(function)] += 1
        self.on_cpu[str(function)] += any(
            x.device.type == "cpu" for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)
        )
        return out


@pytest.fixture
def few_images(monkeypatch):
    def load_images(config):
        images = [torch.zeros(300, 3, config.image_size, config.image_size, dtype=torch.uint8) for _ in range(2)]
        return images + [torch.arange(300) % 10] * 2 * config.classes

    monkeypatch.setattr(vitgan_nb, "load_images", load_images)


@pytest.fixture
def on_meta(few_images, monkeypatch):
    """A function that makes a `Training` on the meta device, which has neither autocast nor an index for its images."""
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda _, **settings: autocast("cpu", **settings))
    optimizer = sys.modules["torch.optim.optimizer"]  # the package hides it
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(vitgan_nb, "batch_indices", lambda n, batch, *_: torch.zeros(batch, dtype=int, device="meta"))
    return lambda config: Training(replace(config, compile=False), "meta")


# ----------------------------------------------------------------------------------------------------------- the step


OTHER = {"discriminator": "stylegan2", "decoder": "conv", "r1": 0.1}  # section A


STEPS = [(optimizer, precision, {}) for optimizer in ("adam", "muon") for precision in ("float32", "float16")]
STEPS += [("muon", "float16", other) for other in (OTHER, {"r1": 0.1}, {"classes": True})]


@pytest.mark.parametrize("optimizer, precision, other", STEPS, ids=str)
def test_a_step_stays_on_the_gpu(on_meta, optimizer, precision, other):
    """Data, objectives, scaler, optimizers, average, statistics: no tensor on the CPU, nothing read back."""
    run = on_meta(replace(PROFILES["lesson"], optimizer=optimizer, precision=precision, **other))
    with Operations() as operations:
        run.train_step()
    assert operations.all["aten._fused_adam_.default"] == 2
    assert operations.all[READ_BACK] == 0 == operations.on_cpu.total(), +operations.on_cpu


@pytest.mark.parametrize("classes", [False, True])
def test_of_images_too_large_for_the_gpu_only_a_batch_goes_there(on_meta, monkeypatch, classes):
    """Sets above the room for them stay on the CPU; uint8 is moved, and all the rest happens on the GPU."""
    monkeypatch.setattr(vitgan_nb, "batch_indices", lambda n, batch, *_: torch.arange(batch))
    monkeypatch.setattr(Tensor, "tolist", lambda numbers: [0.0] * len(numbers))  # for `record`
    size = 300 * 3 * TINY.image_size**2
    for room, device in ((size - 1, "cpu"), (size, "meta")):
        monkeypatch.setattr(vitgan_nb, "room_for_images", lambda _, room=room: room)
        run = on_meta(replace(TINY, optimizer="adam", classes=classes))
        assert run.images.device.type == run.held_out.device.type == device
        with Operations() as operations:
            run.train_step()
        assert operations.all[READ_BACK] == 0
        moved = {"aten.arange.default", "aten.slice.Tensor", "aten._to_copy.default", "aten.index.Tensor"}
        assert set(+operations.on_cpu) <= moved and operations.on_cpu["aten.index.Tensor"] == (device == "cpu")
        with Operations() as operations:  # the logits of both sets are found there too
            assert run.record()["loss_d"] == 0
        assert set(+operations.on_cpu) <= moved, +operations.on_cpu


def test_the_rehearsal_sees_the_cpu_and_what_is_read_back(on_meta, monkeypatch):
    run = on_meta(TINY)
    monkeypatch.setitem(vitgan_nb.AUGMENTATIONS, "color", lambda x: x * torch.rand(()))
    with Operations() as operations:
        run.train_step()
    assert operations.on_cpu.total()
    monkeypatch.setitem(vitgan_nb.AUGMENTATIONS, "color", lambda x: x * x.mean().item())
    with pytest.raises(RuntimeError, match="item"):
        run.train_step()


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_finite_check_is_a_few_operations_and_reads_back_once(few_images, precision):
    run = Training(replace(PROFILES["smoke"], precision=precision))
    run.train_step()
    with Operations() as operations:
        assert run.is_sound()
    assert operations.all[READ_BACK] == 1 and operations.all.total() <= 20, operations.all


# --------------------------------------------------------------------------------------------------------------- Muon


@pytest.mark.parametrize("scaled", [False, True])
def test_muon_reads_nothing_back(scaled):
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((16, 16), (16, 16), (32, 16))]
    optimizer = MatrixMuon(weights, 0.004, torch.float32)
    if scaled:
        optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), torch.full((), 8.0)
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        with Operations() as operations:
            optimizer.step()
    assert operations.all[READ_BACK] == 0 < operations.all["aten.baddbmm.default"]


# ------------------------------------------------------------------------------------------------------------- graphs


@pytest.fixture
def graphs(few_images, monkeypatch):
    """The graphs that AOT hands to a compiler, in turn: forward ones with the number of inputs that they change."""
    made = []

    def forward(graph, inputs):
        metadata = TracingContext.get().fw_metadata
        changed = [i for i, info in enumerate(metadata.input_info) if info.mutates_data]
        made.append({"changed": len(changed), "not static": set(changed) - set(metadata.static_input_indices)})
        return make_boxed_func(graph.forward)

    def backward(graph, inputs):
        made.append("backward")
        return make_boxed_func(graph.forward)

    backend, compile = aot_autograd(fw_compiler=forward, bw_compiler=backward), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: compile(f, backend=backend, dynamic=False))
    torch._dynamo.reset()
    counters.clear()
    yield made
    torch._dynamo.reset()


def test_four_graphs_and_no_more(graphs, tmp_path):
    """Two objectives, forward and backward, no break; buffers changed in place lie still, as a replay needs. And no
    second compilation, whatever a user does next to a run."""
    config = replace(TINY, compile=True, out_dir=str(tmp_path), steps=3)
    run = train(config)
    assert run.quick.keys() == {"discriminator_objective", "generator_objective"}  # nothing fell back
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    directions = sum(name.endswith((".u", ".v")) for name, _ in run.discriminator.named_buffers())
    assert directions == 24
    discriminator = {"changed": directions + 1, "not static": set()}  # and the mapping network's mean
    assert graphs == [discriminator, "backward", {"changed": 1, "not static": set()}, "backward"]

    longer = replace(config, steps=6, minutes=5.0, out_dir=str(tmp_path / "other"))
    assert train(longer, resume=run) is run and run.step == 6
    second = Training(replace(longer, steps=9))
    second.train_step()
    restore(second, state_of(run))
    second.record()
    second.train_step()
    step = second.train_step

    def interrupted():
        step()
        os.kill(os.getpid(), signal.SIGINT)

    second.train_step = interrupted
    assert train(replace(longer, steps=99), resume=second).step == 8
    del second.train_step
    assert train(replace(longer, steps=10), resume=second).step == 10
    assert train(replace(longer, steps=12)).step == 12  # a third one, from the checkpoint
    assert len(graphs) == 4, "something was compiled again: TORCH_LOGS=recompiles says which guard failed"


def test_other_networks_are_four_graphs_too_and_r1_stays_outside(graphs, tmp_path):
    config = replace(TINY, compile=True, **OTHER)
    run, plain = Training(config), Training(replace(config, compile=False))
    for each in (run, plain):
        torch.manual_seed(0)
        for _ in range(17):  # the first and the last with R1
            each.train_step()
    assert run.quick.keys() == {"discriminator_objective", "generator_objective"} and not run.notes
    assert counters["stats"]["unique_graphs"] == 2 and len(graphs) == 4 and not counters["graph_break"]
    torch.testing.assert_close(run.sums, plain.sums, rtol=1e-3, atol=1e-3)


def test_muons_products_are_compiled_once_for_all_runs(graphs):
    for run in (Training(TINY), Training(replace(TINY, seed=1))):
        for optimizer in (run.optimizer_d, run.optimizer_g):
            optimizer.each[1].orthogonalize = torch.compile(vitgan_nb.orthogonalize_all)  # as for weights on a GPU
        for _ in range(2):
            run.train_step()
    assert len(graphs) == 2  # one each for the shapes of discriminator and generator


@pytest.mark.parametrize("tokens", [64, 65])
def test_the_mask_passes_its_gradient_on_through_aot(tokens):
    """L2 attention as a GPU computes it, its bias a mask, against its formula; 65 tokens are no multiple of 8."""
    condition = 'if q.device.type != "cpu":'
    attention = module_from(SCRIPT.read_text().replace(condition, "if True:")).L2Attention(24, heads=4).double()
    h = torch.randn(2, tokens, 24, dtype=torch.double, requires_grad=True)

    def formula(h):
        v = vitgan_nb.split_heads(attention.value(h), 4)  # (B, heads, N, d)
        return attention.out(vitgan_nb.merge_heads(attention.weights(h) @ v))  # (B, N, D)

    found = []
    for form in (torch.compile(attention, backend="aot_eager", fullgraph=True), formula):
        y = form(h)
        found.append([y, *torch.autograd.grad(y.square().sum(), [h, *attention.parameters()])])
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)


# -------------------------------------------------------------------------------------------- 95 % of the work in steps


def work_of(action, *arguments, **settings) -> tuple[int, int]:
    """FLOP of the matrix products and dispatched operations of one call."""
    with FlopCounterMode(display=False) as counter, Operations() as operations:
        action(*arguments, **settings)
    return counter.get_total_flops(), operations.all.total()


@pytest.mark.parametrize("profile", ["lesson", "paper"])
def test_a_record_is_little_work_beside_its_steps(on_meta, profile, monkeypatch):
    run = on_meta(PROFILES[profile])
    step = work_of(run.train_step)
    monkeypatch.setattr(Tensor, "tolist", lambda values: [0.0] * len(values))
    record = work_of(run.record)
    assert all(0 < r < 0.05 * vitgan_nb.RECORD_EVERY * s for r, s in zip(record, step, strict=True)), (record, step)


def test_all_that_a_run_does_beside_its_steps_is_little_work(few_images, tmp_path, monkeypatch):
    """100 steps of `smoke`, start and end of the run, pictures and checkpoints included."""
    config = replace(PROFILES["smoke"], steps=200, out_dir=str(tmp_path))
    run = Training(config)
    run.train_step()
    step = work_of(run.train_step)
    run.step = 100

    def nothing(run):
        run.step += 1
        run.sums[-1] += 1

    monkeypatch.setattr(Training, "train_step", nothing)
    with contextlib.redirect_stdout(None):
        rest = work_of(train, config, resume=run)
    assert run.step == 200 and len(run.history) == 2
    assert all(0 < r < 0.05 * 100 * s for r, s in zip(rest, step, strict=True)), (rest, step)
