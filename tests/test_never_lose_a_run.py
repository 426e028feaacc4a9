"""Kills, full disks, numbers that are not finite, interrupts: the run goes on, or can."""

import errno
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPT, TINY, run_script, wait_for

import vitgan_nb
from vitgan_nb import Training, checkpoints, load_checkpoint, run_folder, save_checkpoint, train


@pytest.fixture
def tiny(tmp_path):
    """A tiny configuration whose run is left in an empty folder."""
    return replace(vitgan_nb.TINY, out_dir=str(tmp_path), steps=12)


@pytest.fixture(autouse=True)
def no_figure(monkeypatch):
    """At the end of a run an empty file: drawing is a third of the time of a run as short as these."""
    monkeypatch.setattr(vitgan_nb, "save_progress", lambda run, path: path.touch())


def weights(run_or_state):
    state = run_or_state if isinstance(run_or_state, dict) else vitgan_nb.state_of(run_or_state)
    return {part: state[part] for part in (*Training.parts, "sums", "step")}


def assert_same(a, b):
    torch.testing.assert_close(weights(a), weights(b), rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------- kills


def train_saving_all_the_time(arguments, folder):
    """The command line in this process, a checkpoint after every step."""
    os.chdir(folder)
    torch.set_num_threads(1)
    vitgan_nb.CHECKPOINT_MINUTES = 0
    save = torch.save

    def slow_save(state, file):  # so that a good share of the kills falls into a write
        whole = io.BytesIO()
        save(state, whole)
        half = len(whole.getvalue()) // 2
        file.write(whole.getvalue()[:half])
        file.flush()
        time.sleep(0.05)
        file.write(whole.getvalue()[half:])

    torch.save = slow_save
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.exit(vitgan_nb.main(["train", *arguments]))


def kill_until(kills, tmp_path):
    """Start, SIGKILL at a random moment, look at what is there, go on; every run must end as the unbroken one did."""
    arguments = [*TINY, "--steps", "10"]
    server = multiprocessing.get_context("forkserver")  # with PyTorch loaded: a start takes a moment
    server.set_forkserver_preload(["torch", "torchvision", "matplotlib.pyplot"])

    def start(folder):
        folder.mkdir(exist_ok=True)
        process = server.Process(target=train_saving_all_the_time, args=(arguments, folder))
        process.start()
        return process

    def end_of(folder):
        (run,) = folder.glob("runs/*")
        assert not list(run.glob(".*.partial")), "a half-written file was left"
        return load_checkpoint(checkpoints(run)[0])

    warm = server.Process(target=int)
    warm.start()
    warm.join()
    began = time.monotonic()
    unbroken = start(tmp_path / "unbroken")
    unbroken.join()
    assert unbroken.exitcode == 0
    expected, whole = end_of(tmp_path / "unbroken"), time.monotonic() - began
    assert expected["step"] == 10
    moments, killed, finished, cut = random.Random(0), 0, 0, 0
    while killed < kills:
        folder = tmp_path / f"run {finished}"
        process = start(folder)
        process.join(timeout=whole * moments.random())
        if process.is_alive():
            process.kill()
            process.join()
            killed += 1
        for path in folder.glob("runs/*/checkpoint-*.pt"):
            load_checkpoint(path)  # raises where it is damaged
        cut += bool(list(folder.glob("runs/*/.*.partial")))
        if process.exitcode == 0:
            assert_same(end_of(folder), expected)
            finished += 1
    last = start(tmp_path / f"run {finished}")
    last.join()
    assert last.exitcode == 0
    assert_same(end_of(tmp_path / f"run {finished}"), expected)
    return cut


def test_killed_after_the_last_checkpoint_it_ends_again(tiny, capsys):
    run = train(tiny)
    folder = run_folder(tiny)
    at_the_end = ("generator.safetensors", "samples.png", "progress.png")
    files = {name: (folder / name).read_bytes() for name in at_the_end}
    (folder / "generator.safetensors").unlink()
    (folder / "samples.png").rename(folder / ".samples.png.partial")
    (folder / ".samples-000000006.png.partial").touch()
    assert train(tiny).step == run.step and "Nothing to do" in capsys.readouterr().out
    assert {name: (folder / name).read_bytes() for name in at_the_end} == files
    assert not list(folder.glob(".*"))


def test_going_back_to_an_older_checkpoint_leaves_the_end_of_the_newer(tiny, capsys):
    train(tiny)
    train(replace(tiny, steps=16))
    folder = run_folder(tiny)
    newer = (folder / "generator.safetensors").read_bytes()
    assert train(tiny, resume=folder / "checkpoint-000000012.pt").step == 12
    assert "Nothing to do" in capsys.readouterr().out
    assert (folder / "generator.safetensors").read_bytes() == newer


def test_killed_at_twelve_random_moments(tmp_path):
    assert kill_until(12, tmp_path) > 0, "no kill fell into a write: the test has lost its point"


@pytest.mark.slow
def test_killed_at_a_hundred_random_moments(tmp_path):
    assert kill_until(100, tmp_path) > 0


# ------------------------------------------------------------------------------------------------------ what it remembers


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_n_and_n_steps_are_two_n(tiny, precision):
    config = replace(tiny, precision=precision, steps=64)
    unbroken = train(replace(config, out_dir=f"{tiny.out_dir}/unbroken"))
    train(replace(config, steps=11))
    assert_same(train(config), unbroken)
    half = train(replace(config, steps=11, out_dir=f"{tiny.out_dir}/in memory"))
    assert_same(train(replace(config, out_dir=half.config.out_dir), resume=half), unbroken)


def test_the_random_generator_goes_on(tiny):
    run = Training(tiny)
    run.train_step()
    run.fixed_z += 1
    state = vitgan_nb.state_of(run)
    drawn = torch.rand(3).tolist()
    other = Training(tiny)
    vitgan_nb.restore(other, state)
    assert torch.rand(3).tolist() == drawn and torch.equal(other.fixed_z, run.fixed_z)


def test_a_checkpoint_of_another_seed_is_refused(tiny):
    train(replace(tiny, steps=2))
    with pytest.raises(vitgan_nb.BadInput, match="seed 0 ≠ 1"):
        train(replace(tiny, seed=1), resume=checkpoints(run_folder(tiny))[0])


def test_grids_and_log_of_a_run(tiny):
    train(replace(tiny, steps=40))
    grids = sorted(int(path.stem[-9:]) for path in run_folder(tiny).glob("samples-*.png"))
    log = [json.loads(line)["step"] for line in (run_folder(tiny) / "log.jsonl").read_text().splitlines()]
    assert grids == [0, 16, 20, 23, 27, 32, 39] and log == [40]  # 16 · 2^(1/4), 16 · 2^(1/2), …, rounded up
    assert (run_folder(tiny) / "samples.png").exists() and (run_folder(tiny) / "progress.png").exists()


def test_minutes_end_a_run(tiny, monkeypatch, capsys):
    """By a clock that only steps move on, by a second each: three seconds are three steps."""
    clock, step = {"now": 0.0}, Training.train_step

    def train_step(run):
        step(run)
        clock["now"] += 1

    monkeypatch.setattr(Training, "train_step", train_step)
    monkeypatch.setattr(vitgan_nb.time, "monotonic", lambda: clock["now"])
    limited = replace(tiny, steps=0, minutes=0.05)
    run = train(limited)
    assert run.step == run.seconds == 3 and len(run.history) == 1
    assert "Nothing to do" not in capsys.readouterr().out
    assert train(limited).step == 3 and "Nothing to do" in capsys.readouterr().out


def test_an_interrupt_ends_the_step_and_saves(tiny, monkeypatch, capsys):
    step = Training.train_step

    def train_step(run):
        if run.step == 5:
            signal.raise_signal(signal.SIGINT)
        step(run)

    monkeypatch.setattr(Training, "train_step", train_step)
    assert train(tiny).step == 6 and "Interrupted at step 6." in capsys.readouterr().out
    monkeypatch.undo()
    with pytest.raises(vitgan_nb.BadInput, match="already holds a run"):
        train(tiny, resume=False)
    newest = checkpoints(run_folder(tiny))[0]
    newest.write_bytes(newest.read_bytes()[:999])
    assert train(replace(tiny, steps=3)).step == 3
    told = capsys.readouterr().out
    assert f"Skipped: {newest} is damaged" in told and "Resumed at step 0" in told


def test_another_precision_goes_on_and_says_so(tiny, capsys):
    train(replace(tiny, steps=2))
    run = train(replace(tiny, steps=4, precision="bfloat16"))
    assert run.step == 4 and "Not bit for bit an unbroken run: before float32, now bfloat16." in capsys.readouterr().out


def test_float16_goes_on_from_float32(tiny):
    train(replace(tiny, steps=2))
    run = train(replace(tiny, steps=4, precision="float16"))
    assert run.step == 4 and run.scaler.is_enabled()


def test_other_networks_resume_exactly_and_can_be_exported(tiny, capsys):
    """60 steps, R1 in four of them; a resumed run is the unbroken one bit for bit."""
    other = replace(tiny, discriminator="stylegan2", decoder="conv", r1=1.0, steps=60)
    unbroken = train(replace(other, out_dir=f"{tiny.out_dir}/unbroken"))
    train(replace(other, steps=15))
    assert_same(train(other), unbroken)
    assert "Resumed at step 15" in capsys.readouterr().out
    generator = vitgan_nb.load_generator(run_folder(other) / "generator.safetensors")
    images = vitgan_nb.sample(generator, 4)
    assert torch.equal(images, vitgan_nb.sample(unbroken.average.module, 4)) and images.shape == (4, 3, 16, 16)
    with pytest.raises(vitgan_nb.BadInput, match="discriminator stylegan2 ≠ vit"):
        train(replace(other, discriminator="vit"), resume=checkpoints(run_folder(other))[0])


def test_a_run_keeps_the_folder_that_it_had_before_there_were_other_networks(tiny):
    smoke = replace(vitgan_nb.PROFILES["smoke"], diff_augment=True)
    assert run_folder(smoke) == Path("runs/shapes32-d128x3-f51b32")
    others = [{}, {"decoder": "conv"}, {"discriminator": "stylegan2"}, {"r1": 0.1}, {"diff_augment": False}]
    others.append({"classes": True})
    assert len({run_folder(replace(tiny, **other)) for other in others}) == 6


def test_going_on_from_further_back_keeps_what_it_writes(tiny):
    train(replace(tiny, steps=4))
    early = run_folder(tiny) / "early.pt"
    early.write_bytes(checkpoints(run_folder(tiny))[1].read_bytes())  # of step 0
    train(tiny)
    run = train(replace(tiny, steps=2), resume=early)
    names = sorted(path.name for path in run_folder(tiny).glob("*-*.pt"))
    abandoned = ["abandoned-000000004.pt", "abandoned-000000012.pt"]
    assert run.step == 2 and names == [*abandoned, "checkpoint-000000000.pt", "checkpoint-000000002.pt"]


def test_a_step_cut_in_two_is_not_saved(tiny, monkeypatch):
    step = Training.generator_step

    def generator_step(run):
        if run.step == 5:
            raise KeyboardInterrupt
        return step(run)

    monkeypatch.setattr(Training, "generator_step", generator_step)
    with pytest.raises(KeyboardInterrupt):
        train(tiny)
    monkeypatch.undo()
    assert [path.name for path in checkpoints(run_folder(tiny))] == ["checkpoint-000000000.pt"]
    assert_same(train(tiny), train(replace(tiny, out_dir=f"{tiny.out_dir}/unbroken")))


def test_going_back_skips_a_damaged_checkpoint(tiny, monkeypatch, capsys):
    train(replace(tiny, steps=4))
    step = Training.train_step

    def train_step(run):
        step(run)
        if run.step == 6:
            newest = checkpoints(run_folder(tiny))[0]
            newest.write_bytes(newest.read_bytes()[:999])
            monkeypatch.setattr(Training, "train_step", step)
            spoil_weight(run)

    monkeypatch.setattr(Training, "train_step", train_step)
    run = train(tiny)
    assert run.step == 12 and "Not finite at step 12: back to step 0" in capsys.readouterr().out


def test_the_newest_two_and_one_at_every_doubling_are_kept(tiny, monkeypatch):
    monkeypatch.setattr(vitgan_nb, "CHECKPOINT_MINUTES", 0)
    run_folder(tiny).mkdir()
    (run_folder(tiny) / ".checkpoint-000000007.pt.partial").touch()  # of a run that was killed
    train(replace(tiny, steps=21))
    steps = [int(path.stem[-9:]) for path in checkpoints(run_folder(tiny))]
    assert steps == [21, 20, 16, 8, 4, 2, 1, 0]
    assert not list(run_folder(tiny).glob(".*"))


def test_what_is_deleted_is_empty_first(tmp_path, monkeypatch):
    """On a mounted Google Drive deleted files go to the trash, where they count."""
    for step in (3, 5, 6, 7, 9, 10):
        (tmp_path / f"checkpoint-{step:09d}.pt").write_bytes(b"many bytes")
    unlink, sizes = Path.unlink, []

    def noting(path, **flags):
        sizes.append(path.stat().st_size)
        unlink(path, **flags)

    monkeypatch.setattr(Path, "unlink", noting)
    vitgan_nb.discard_old(tmp_path)
    assert sizes == [0, 0] and [int(path.stem[-9:]) for path in checkpoints(tmp_path)] == [10, 9, 5, 3]


def test_loading_a_checkpoint_runs_no_program(tiny, tmp_path):
    class Program:
        def __reduce__(self):
            return os.mkdir, (f"{tmp_path}/ran",)

    torch.save({"config": Program()}, tmp_path / "checkpoint-000000001.pt")
    with pytest.raises(vitgan_nb.BadInput, match="damaged or not a checkpoint"):
        load_checkpoint(tmp_path / "checkpoint-000000001.pt")
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_an_impossible_configuration_is_refused(tmp_path):
    torch.save({"config": {"dim": 0}}, tmp_path / "checkpoint-000000001.pt")
    with pytest.raises(vitgan_nb.BadInput, match="damaged or not a checkpoint"):
        load_checkpoint(tmp_path / "checkpoint-000000001.pt")


def test_a_checkpoint_of_another_version_is_refused(tiny):
    path = save_checkpoint(Training(tiny), run_folder(tiny))
    state = load_checkpoint(path)
    for part in ("generator", "optimizer_d"):
        other = state | {part: {"something": torch.zeros(3)}}
        torch.save(other, path)
        with pytest.raises(vitgan_nb.BadInput, match=f"{part} is of another version .* move the run's folder"):
            train(tiny)
    torch.save(state | {"average": {"module.something": torch.zeros(3)}}, path)
    with pytest.raises(vitgan_nb.BadInput, match="no generator of this version"):
        vitgan_nb.load_generator(path)


def test_going_on_with_other_images_is_told(tiny, capsys):
    run = Training(tiny)
    run.images = run.images[1:]
    save_checkpoint(run, run_folder(tiny))
    train(tiny)
    assert "before 9,999 images, now 10,000 images" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ when things fail


def test_a_full_disk_does_not_end_the_run(tiny, monkeypatch, capsys):
    monkeypatch.setattr(vitgan_nb, "CHECKPOINT_MINUTES", 0)
    save, room = torch.save, {"left": 3}

    def full(state, file):
        room["left"] -= 1
        if room["left"] < 0 and state["step"] < 12:
            file.write(b"the first bytes")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state, file)

    def no_room(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def not_allowed(*_):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(vitgan_nb.Keeper, "note", no_room)  # the log and the pictures fail as well: still one line
    monkeypatch.setattr(vitgan_nb, "save_progress", not_allowed)  # for another reason: one more line
    before = set(Path(tiny.out_dir).iterdir())
    run = train(tiny)
    lines = [line for line in capsys.readouterr().out.splitlines() if "Could not write" in line]
    assert run.step == 12 and len(lines) == 2 and "Permission denied" in lines[1]
    assert "No space left on device" in lines[0] and "checkpoint-000000002.pt" in lines[0]
    (folder,) = set(Path(tiny.out_dir).iterdir()) - before
    assert [int(path.stem[-9:]) for path in checkpoints(folder)] == [12, 2, 1, 0]
    assert not list(folder.glob(".*"))


def test_a_disk_that_stays_full_is_an_error_of_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save = torch.save

    def full(state, file):
        if state["step"]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state, file)

    def full_too(path, _):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(Path, "write_bytes", full_too)
    assert vitgan_nb.main(["train", *TINY, "--steps", "3"]) == 2
    told = capsys.readouterr()
    assert "the last checkpoint could not be written" in told.err
    assert "Step 3" in told.out and "NOT saved" in told.out and "all in" not in told.out


def test_what_could_not_be_saved_is_saved_when_there_is_room(tiny, monkeypatch):
    save = torch.save

    def full(state, file):
        if state["step"]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    run = train(tiny)
    assert not run.saved
    monkeypatch.setattr(torch, "save", save)
    assert train(tiny, resume=run).saved and load_checkpoint(checkpoints(run_folder(tiny))[0])["step"] == 12


def test_compiling_is_told_once_and_not_told_of_what_came_before(tiny, monkeypatch, capsys):
    """A step back counts the steps after it; a failure of an earlier run is not one of this."""

    def broken(function, **_):
        def fail(*_):
            raise RuntimeError("no compiler")

        return fail

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    spoil_step_7(monkeypatch, spoil_weight)
    run = train(replace(tiny, compile=True))  # after step 12 back to 0
    assert run.step == 12 and capsys.readouterr().out.count("Compiling took") == 1
    monkeypatch.setattr(torch, "compile", broken)
    other = replace(tiny, seed=1, compile=True)
    train(replace(other, steps=2))
    assert "; not compiled, see the log" in capsys.readouterr().out
    train(replace(other, steps=4, compile=False))
    out = capsys.readouterr().out
    assert "; not compiled, see the log" not in out and "before compiled, now not compiled." in out


def test_a_full_disk_at_the_start_leaves_what_was_there(tiny, monkeypatch):
    """On from a copy of step 4, nothing can be written, and the folder holds step 8 of before: that stays."""
    folder = run_folder(tiny)
    train(replace(tiny, steps=4))
    earlier = shutil.copy(folder / "checkpoint-000000004.pt", folder.parent)
    train(replace(tiny, steps=8))
    (folder / "checkpoint-000000004.pt").unlink()
    log = (folder / "log.jsonl").read_text()

    def full(state, file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        train(tiny, resume=earlier)
    monkeypatch.undo()
    assert [int(path.stem[-9:]) for path in checkpoints(folder)] == [8, 0]
    assert (folder / "log.jsonl").read_text() == log
    assert train(tiny).step == 12


def spoil_buffer(run):
    run.generator.mapping.w_mean[2] = math.nan


def spoil_weight(run):
    with torch.no_grad():
        next(iter(run.discriminator.parameters())).view(-1)[3] = math.nan


def spoil_gradient(run):
    next(iter(run.generator.parameters())).grad = torch.full_like(next(iter(run.generator.parameters())), math.nan)
    run.optimizer_g.step()


def spoil_step_7(monkeypatch, spoil) -> list:
    """The first time that a run is at step 7, `spoil` it; gives a list that this is noted in."""
    step, spoilt = Training.train_step, []

    def train_step(run):
        step(run)
        if run.step == 7 and not spoilt:
            spoilt.append(run.step)
            spoil(run)

    monkeypatch.setattr(Training, "train_step", train_step)
    return spoilt


@pytest.mark.parametrize("spoil", [spoil_buffer, spoil_weight, spoil_gradient])
def test_not_finite_goes_back_and_on(tiny, spoil, monkeypatch, capsys):
    spoilt = spoil_step_7(monkeypatch, spoil)
    run = train(tiny)
    assert run.step == 12 and run.is_sound() and spoilt == [7]
    assert "Not finite at step 12: back to step 0, on with other random numbers." in capsys.readouterr().out
    log = [json.loads(line) for line in (run_folder(tiny) / "log.jsonl").read_text().splitlines()]
    assert {"step": 12, "not_finite": 1} in log
    clean = train(replace(tiny, out_dir=f"{tiny.out_dir}/clean"))
    assert not torch.equal(clean.generator.position.weight, run.generator.position.weight)  # it did go on differently


def test_the_fourth_time_it_stops_and_nothing_bad_is_saved(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    step = Training.train_step

    def train_step(run):
        step(run)
        if run.step == 5:
            spoil_weight(run)

    monkeypatch.setattr(Training, "train_step", train_step)
    assert vitgan_nb.main(["train", *TINY, "--steps", "8"]) == 2
    told = capsys.readouterr()
    assert told.out.count("Not finite at step 8") == 3 and "try a lower learning_rate" in told.err
    (checkpoint,) = tmp_path.glob("runs/*/checkpoint-*.pt")
    assert load_checkpoint(checkpoint)["step"] == 0


def test_a_hopeless_run_stops_though_its_checkpoints_are_due(tiny, monkeypatch, capsys):
    """Every step lasts longer than the time between checkpoints, and the second after each restart spoils the run."""
    step, back, clock = Training.train_step, vitgan_nb.restore, {"now": 0.0, "steps": 0}

    def restore(run, state):
        clock["steps"] = 0
        return back(run, state)

    def train_step(run):
        step(run)
        clock["now"] += 200
        clock["steps"] += 1
        if clock["steps"] > 1:
            spoil_weight(run)

    monkeypatch.setattr(Training, "train_step", train_step)
    monkeypatch.setattr(vitgan_nb, "restore", restore)
    monkeypatch.setattr(vitgan_nb.time, "monotonic", lambda: clock["now"])
    with pytest.raises(vitgan_nb.BadInput, match="going back to the last checkpoint did not help"):
        train(replace(tiny, steps=60))
    assert capsys.readouterr().out.count("Not finite") == 3


def test_what_another_branch_left_at_the_same_step_is_not_gone_on_from(tiny, monkeypatch):
    """Step 4 of one branch and of another: a kill, or a step that is not finite, must not exchange them."""
    four, folder = replace(tiny, steps=4), run_folder(tiny)
    train(four)
    state = load_checkpoint(folder / "checkpoint-000000000.pt")
    state["rng"]["cpu"] = torch.Generator().manual_seed(9).get_state()
    torch.save(state, folder / "other.pt")
    other = weights(train(four, resume=folder / "other.pt"))
    kept = folder / "abandoned-000000004.pt"
    first = weights(load_checkpoint(kept))
    assert not torch.equal(first["generator"]["position.weight"], other["generator"]["position.weight"])

    def killed(run):
        raise SystemExit

    monkeypatch.setattr(Training, "train_step", killed)
    with pytest.raises(SystemExit):
        train(tiny, resume=kept)
    again = Training(tiny)
    vitgan_nb.resume_from(again, folder, True)
    assert_same(again, load_checkpoint(kept))


def test_a_full_disk_leaves_another_branch_in_its_place(tiny, monkeypatch):
    train(replace(tiny, steps=4))
    folder = run_folder(tiny)
    there, other = folder / "checkpoint-000000004.pt", folder / "other.pt"
    torch.save(load_checkpoint(there) | {"seconds": 9.0}, other)
    before = there.read_bytes()

    def full(state, file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        train(tiny, resume=other)
    assert there.read_bytes() == before and not list(folder.glob("abandoned*"))


def test_a_checkpoint_that_is_damaged_is_written_anew(tiny):
    path = save_checkpoint(Training(tiny), run_folder(tiny))
    path.write_bytes(path.read_bytes()[:99])
    train(replace(tiny, steps=1))
    assert load_checkpoint(path)["step"] == 0


def test_going_back_does_not_go_to_a_later_branch(tiny, monkeypatch, capsys):
    """A run that went on from step 4 while step 8 of an earlier one still lies in the folder."""
    train(replace(tiny, steps=4))
    train(replace(tiny, steps=8))
    step, spoilt = Training.train_step, []

    def train_step(run):
        step(run)
        if not spoilt:
            spoilt.append(run.step)
            spoil_weight(run)

    monkeypatch.setattr(Training, "train_step", train_step)
    run = train(tiny, resume=run_folder(tiny) / "checkpoint-000000004.pt")
    assert run.step == 12 and spoilt == [5]
    assert "Not finite at step 12: back to step 4" in capsys.readouterr().out


def test_a_run_in_memory_goes_on_as_it_is_or_not_at_all(tiny):
    run = train(replace(tiny, steps=4))
    for change in ({"precision": "bfloat16"}, {"compile": True}, {"seed": 1}, {"data_root": "elsewhere"}):
        with pytest.raises(vitgan_nb.BadInput, match=next(iter(change))):
            train(replace(tiny, **change), resume=run)
    with pytest.raises(vitgan_nb.BadInput, match=f"another configuration: seed {tiny.seed} ≠ 1;"):  # before ≠ now
        train(replace(tiny, seed=1), resume=run)
    assert train(tiny, resume=run) is run and run.step == 12
    assert run.config is run.generator.config is run.average.module.config is tiny


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_in_float16_isolated_overflows_are_skipped_and_counted(tiny, optimizer, monkeypatch, capsys):
    """Four infinite losses in 120 steps: nothing is taken back, weights and momenta stay finite, the log says four."""
    objective, step = Training.discriminator_objective, {"now": 0}

    def sometimes_infinite(run, real):
        loss, consistency = objective(run, real)
        step["now"] = run.step
        return (loss * float("inf") if run.step in (20, 50, 80, 119) else loss), consistency

    monkeypatch.setattr(Training, "discriminator_objective", sometimes_infinite)
    scaler = torch.amp.GradScaler  # from a scale that fits, so that only ours overflow
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **k, init_scale=2.0**8))
    run = train(replace(tiny, precision="float16", optimizer=optimizer, steps=120))
    assert run.step == 120 and run.is_sound() and "Not finite" not in capsys.readouterr().out
    assert run.history[-1]["skipped"] == int(run.skipped) == 4
    state = run.optimizer_d.state_dict()
    for each in state.get("each", [state]):
        assert all(t.isfinite().all() for s in each["state"].values() for t in s.values())
    assert all(math.isfinite(entry["loss_d"]) for entry in run.history)


def test_a_sound_checkpoint_counts_the_take_backs_anew(tiny, monkeypatch, capsys):
    """Five times not finite, a checkpoint after each: the run ends."""
    step, spoilt = Training.train_step, set()

    def train_step(run):
        step(run)
        if run.step % 3 == 0 and run.step not in spoilt:
            spoilt.add(run.step)
            spoil_weight(run)

    monkeypatch.setattr(Training, "train_step", train_step)
    monkeypatch.setattr(vitgan_nb, "CHECKPOINT_MINUTES", 0)
    assert train(replace(tiny, steps=16)).step == 16
    assert capsys.readouterr().out.count("Not finite") == 5


@pytest.mark.parametrize("error", [ValueError("something else"), SystemExit(3)])
def test_whatever_is_raised_the_last_checkpoint_stays(tiny, error, monkeypatch):
    step = Training.train_step

    def train_step(run):
        if run.step == 5:
            raise error
        step(run)

    monkeypatch.setattr(Training, "train_step", train_step)
    with pytest.raises(type(error)):
        train(tiny)
    monkeypatch.undo()
    assert load_checkpoint(checkpoints(run_folder(tiny))[0])["step"] == 0
    assert_same(train(tiny), train(replace(tiny, out_dir=f"{tiny.out_dir}/unbroken")))


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail] can't allocate memory: 9 bytes")],
)
def test_out_of_memory_says_what_to_change(tmp_path, error, monkeypatch, capsys):
    def train_step(run):
        raise error

    monkeypatch.setattr(Training, "train_step", train_step)
    monkeypatch.chdir(tmp_path)
    assert vitgan_nb.main(["train", *TINY]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "used up with batch_size 4; take 2" in told
    assert vitgan_nb.main(["benchmark", *TINY]) == 2
    told = capsys.readouterr().err
    assert "the memory is used up" in told and told.count("\n") == 1


def test_a_second_interrupt_is_raised_at_once():
    with pytest.raises(KeyboardInterrupt), vitgan_nb.interrupts_wait() as noted:
        signal.raise_signal(signal.SIGINT)
        assert noted == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_into_a_place_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert vitgan_nb.main(["train", *TINY, "--steps", "2", "--out-dir", str(tmp_path / "file" / "runs")]) == 2
    assert capsys.readouterr().err.count("error: ") == 1


def test_without_home(tmp_path):
    process = run_script("train", *TINY, "--steps", 2, cwd=tmp_path, HOME="/proc/nowhere")
    assert process.returncode == 0, process.stderr


# ------------------------------------------------------------------------------------------------------- in the notebook


class Kernel:
    """A real kernel."""

    def __init__(self, folder):
        from jupyter_client.manager import start_new_kernel

        self.folder = folder
        self.manager, self.client = start_new_kernel(kernel_name="python3", cwd=str(folder))

    def start(self, code):
        return self.client.execute(code)

    def finish(self, message):
        """The text that a cell printed; errors are raised."""
        text = ""
        while True:
            received = self.client.get_iopub_msg(timeout=120)
            if received["parent_header"].get("msg_id") != message:
                continue
            if received["msg_type"] == "stream":
                text += received["content"]["text"]
            assert received["msg_type"] != "error", received["content"]["traceback"]
            if received["msg_type"] == "status" and received["content"]["execution_state"] == "idle":
                return text


@pytest.fixture
def kernel(tmp_path):
    kernel = Kernel(tmp_path)
    yield kernel
    kernel.client.stop_channels()
    kernel.manager.shutdown_kernel(now=True)


def test_interrupting_the_kernel_returns_the_run(kernel):
    prepare = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import vitgan_nb as v\nfrom dataclasses import replace"
    kernel.finish(kernel.start(prepare))
    training = kernel.start("run = v.train(replace(v.TINY, steps=0))")
    wait_for(lambda: list(kernel.folder.glob("runs/*/checkpoint-*.pt")))
    time.sleep(2)
    kernel.manager.interrupt_kernel()
    text = kernel.finish(training)
    step = int(re.search(r"Interrupted at step (\d+)", text)[1])
    assert kernel.finish(kernel.start("print(run.step, v.sample(run.average.module, 2).shape)")).startswith(f"{step} ")
    kernel.manager.restart_kernel(now=True)  # and all over again, as after a disconnect
    kernel.client.wait_for_ready(timeout=60)
    kernel.finish(kernel.start(prepare))
    text = kernel.finish(kernel.start(f"run = v.train(replace(v.TINY, steps={step + 3}))"))
    assert f"Resumed at step {step}" in text


@pytest.mark.parametrize("asked", [False, True])
def test_drive_is_used_when_asked_for_and_only_then(asked, monkeypatch, capsys):
    mounted = []
    drive = type("Drive", (), {"mount": staticmethod(mounted.append)})
    monkeypatch.setitem(sys.modules, "google.colab", type("Colab", (), {"drive": drive}))
    (cell,) = (c for c in SCRIPT.read_text().split("\n# %%") if "drive.mount" in c)
    names = vars(vitgan_nb) | {
        "LIVE": True, "PROFILE": "smoke", "DATASET": "shapes", "FOLDER": "", "MINUTES": 0, "SEED": 0, "SAVE_TO_DRIVE": asked
    }  # fmt: skip
    exec(cell.split("\n", 1)[1], names)
    assert mounted == (["/content/drive"] if asked else [])
    assert names["config"].out_dir == ("/content/drive/MyDrive/vitgan" if asked else "runs")
