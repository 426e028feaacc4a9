"""Two processes with half of a batch each are one process with all of it."""

import functools
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, SCRIPT, TINY, run_script, wait_for
from PIL import Image

import vitgan_nb
from vitgan_nb import BadInput, OneStream

LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
CONFIG = replace(vitgan_nb.TINY, batch_size=6, bcr_real=2.0, bcr_fake=3.0, augment="color,translation,cutout")
PARTS = ("generator", "discriminator", "average", "optimizer_g", "optimizer_d")
PROGRAM = """
import os, sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
import vitgan_nb
from test_processes import CASES, CONFIG, losses_and_state
from dataclasses import replace
torch.set_num_threads(1)
found = {{case: losses_and_state(vitgan_nb.Training(replace(CONFIG, **its), "cpu")) for case, its in CASES.items()}}
torch.save(found, f"{{sys.argv[1]}}/{{os.environ['RANK']}}.pt")
"""
CASES = {
    "adam": {"optimizer": "adam"},
    "muon": {"optimizer": "muon"},
    "classes": {"optimizer": "adam", "classes": True},
    "r1": {"optimizer": "adam", "r1": 1.0, "decoder": "conv"},
    "stylegan2": {"optimizer": "muon", "batch_size": 8, "r1": 1.0, "discriminator": "stylegan2"},
}


def losses_and_state(run, steps=20):
    """Each step's losses and logits, and at the end all that the run holds and what its average paints."""
    losses = []
    for _ in range(steps):
        run.train_step()
        entry = run.record()
        losses.append([entry[name] for name in (*vitgan_nb.STATISTICS, *vitgan_nb.LOGITS)])
    state = {part: getattr(run, part).state_dict() for part in PARTS}
    return torch.tensor(losses), state | {"painted": run.average.module(run.fixed_z).detach()}


@pytest.mark.parametrize("rank", range(3))
def test_a_process_takes_its_share_of_one_stream(rank):
    """Along the axis of the images, which is the first of an even number of axes and the second of an odd one."""
    for draw, share, whole, axis in (
        (torch.rand, (4, 1, 1, 1), (12, 1, 1, 1), 0),
        (torch.randn, (4, 7), (12, 7), 0),
        (torch.rand, (3, 4, 1, 1, 1), (3, 12, 1, 1, 1), 1),
        (functools.partial(torch.randint, 0, 1000), (2, 4, 1), (2, 12, 1), 1),
    ):
        torch.manual_seed(0)
        numbers = draw(whole)
        torch.manual_seed(0)
        with OneStream(rank, 3):
            mine = draw(share) if isinstance(draw, functools.partial) else draw(*share, dtype=torch.float32)
        torch.testing.assert_close(mine, numbers.unflatten(axis, (4, 3)).select(axis + 1, rank), rtol=0, atol=0)
        assert mine.dtype == numbers.dtype


def test_a_batch_must_be_shared_out_evenly(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(BadInput, match="batch_size is 6, but must be a multiple of the 4 processes"):
        vitgan_nb.Training(CONFIG, "cpu")
    with pytest.raises(BadInput, match="batch_size is 8, but must be a multiple of 16 for discriminator stylegan2"):
        vitgan_nb.Training(replace(CONFIG, batch_size=8, discriminator="stylegan2"), "cpu")


@pytest.fixture
def one_of_two(monkeypatch):
    """This process as the second of two, whose group has it alone."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_process_of_two_takes_its_share_and_sums_are_halved(one_of_two, monkeypatch):
    images, draws, batch = [], [], vitgan_nb.real_batch
    monkeypatch.setattr(vitgan_nb, "real_batch", lambda data, at, *to: (images.append(at), batch(data, at, *to))[1])
    run = vitgan_nb.Training(replace(CONFIG, compile=True), "cpu")
    assert (run.world, run.rank, run.compiles, run.quick) == (2, 1, False, {})
    for network, its in ((run.generator, run.synced_g), (run.discriminator, run.synced_d)):
        assert its.module is network and not its.will_sync_module_buffers()
    state = torch.get_rng_state()
    run.generator.mapping.register_forward_hook(lambda _, inputs, __: draws.append(inputs[0]))
    agreed, agree, w_mean = [], run.agree, run.generator.mapping.w_mean
    run.agree = lambda tensor: (agreed.append(tensor), agree(tensor))
    run.train_step()
    assert len(agreed) == 1 and agreed[0] is w_mean
    shared = vitgan_nb.batch_indices(len(run.images), 6, 0, CONFIG.seed)
    assert [its.tolist() for its in images] == [shared[1::2].tolist()]
    torch.set_rng_state(state)
    torch.rand(6, 1, 1, 1)  # which images are mirrored
    assert torch.equal(draws[0], torch.randn(6, CONFIG.latent_dim)[1::2]) and [len(z) for z in draws] == [3, 3]
    total, summed, all_reduce = torch.tensor([2.0, 6.0]), [], torch.distributed.all_reduce
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda tensor, *how: (summed.append(tensor), all_reduce(tensor))
    )
    run.agree(total)
    assert total.tolist() == [1, 3] and summed[0] is total  # the sum over the group, over two
    run.record()
    assert agreed[1] is total and agreed[2] is run.sums


def test_processes_agree_at_least_every_ten_steps_to_stop(one_of_two, monkeypatch, tmp_path):
    """So an interrupt is saved before the launcher, which waits for 30 seconds, kills them."""
    config, step = replace(vitgan_nb.TINY, steps=40, out_dir=str(tmp_path)), vitgan_nb.Training.train_step

    def interrupted(run):
        step(run)
        if run.step == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(vitgan_nb.Training, "train_step", interrupted)
    run = vitgan_nb.train(config)
    assert run.step == 10 and run.world == 2


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """What `losses_and_state` gives for each of the CASES, in each of two processes."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "program.py").write_text(PROGRAM.format(root=str(ROOT), tests=str(ROOT / "tests")))
    done = subprocess.run([*LAUNCHER, folder / "program.py", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(case, of_two):
    """But for StyleGAN2's discriminator, each process of which forms groups of its own images: there they stay alike."""
    (losses, state), (other_losses, other) = (found[case] for found in of_two)
    torch.testing.assert_close(other, state, rtol=0, atol=0)  # weights, spectral vectors, averages, optimizers
    assert torch.equal(losses, other_losses)
    if case == "stylegan2":
        return
    alone, alone_state = losses_and_state(vitgan_nb.Training(replace(CONFIG, **CASES[case]), "cpu"))
    torch.testing.assert_close(losses, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state["painted"], alone_state["painted"], rtol=1e-4, atol=1e-4)
    assert (losses[1:] != losses[:-1]).all()


def test_a_checkpoint_of_two_processes_goes_on_in_one_and_the_other_way_round(tmp_path, cache):
    """And a folder of images is decoded by the first process alone."""
    (tmp_path / "images").mkdir()
    for k in range(12):
        Image.new("L", (16, 16), k).save(tmp_path / "images" / f"{k}.png")
    flags, decoded = [*TINY, "--dataset", "folder", "--data-root", "images"], 0
    for steps, launcher in ((6, LAUNCHER), (9, (sys.executable,)), (12, LAUNCHER)):
        process = run_script("train", *flags, "--steps", steps, cwd=tmp_path, launcher=launcher)
        assert process.returncode == 0, process.stderr
        assert process.stdout.count("Plan:") == 1
        decoded += process.stdout.count("Converted: 12 × mode L.")
    assert "Resumed at step 9" in process.stdout and "before 1 process, now 2 processes" in process.stdout
    assert len(list(tmp_path.glob("runs/*/checkpoint-000000012.pt"))) == 1
    assert decoded == 1 and len(list(cache.glob("*.u8"))) == 1


def test_a_process_that_dies_ends_the_others(tmp_path):
    command = [*LAUNCHER, SCRIPT, "train", *TINY, "--steps", "100000"]
    launched = subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint-*.pt")))
    time.sleep(2)
    children = subprocess.run(["pgrep", "-P", str(launched.pid)], capture_output=True, text=True).stdout.split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    told = launched.communicate(timeout=60)[1]
    assert launched.returncode != 0
    ours = [line for line in told.splitlines() if line.startswith("error: ")]
    assert ours == [
        "error: another process of this run ended; start it again, and it goes on from the last checkpoint."
    ]
    assert "FutureWarning" not in told
    for child in children:
        assert not os.path.exists(f"/proc/{child}")
