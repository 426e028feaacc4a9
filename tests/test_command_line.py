"""The command line: what a run prints and leaves, going on, sampling, measuring, several processes."""

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SCRIPT, TINY, run_script, wait_for
from PIL import Image
from safetensors.torch import load_file

import vitgan_nb


def only(folder, pattern):
    (path,) = folder.glob(pattern)
    return path


def test_a_run_prints_its_plan_and_leaves_its_results(finished_run):
    folder, process = finished_run
    lines = process.stdout.splitlines()
    assert lines[1].startswith("Plan: shapes, 10,000 images")
    run = only(folder, "runs/*")
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [24]
    assert set(log[0]) >= {"loss_d", "loss_g", "real", "fake", "held_out", "images"}
    assert (run / "checkpoint-000000024.pt").exists() and (run / "progress.png").exists()
    assert not list(run.glob(".*")), "a partial file was left"


def test_samples_differ_from_each_other_and_from_the_first_step(finished_run):
    run = only(finished_run[0], "runs/*")
    first, last = (np.asarray(Image.open(run / name)) for name in ("samples-000000000.png", "samples.png"))
    assert first.shape == last.shape and (first != last).mean() > 0.5
    assert (last[1:17, 1:17] != last[1:17, 18:34]).mean() > 0.5  # the first two images of the grid


def test_goes_on_and_equals_an_unbroken_run(finished_run, tmp_path):
    for steps in (11, 24):
        process = run_script("train", *TINY, "--steps", steps, cwd=tmp_path)
        assert process.returncode == 0, process.stderr
    assert "Resumed at step 11" in process.stdout
    whole, broken = (load_file(only(f, "runs/*") / "generator.safetensors") for f in (finished_run[0], tmp_path))
    assert all((whole[name] == broken[name]).all() for name in whole)


def test_a_run_that_is_done_elsewhere_is_no_error(finished_run, tmp_path, capsys):
    checkpoint = str(only(finished_run[0], "runs/*/checkpoint-000000024.pt"))
    done = ["train", *TINY, "--steps", "24", "--out-dir", str(tmp_path), "--resume-from", checkpoint]
    assert vitgan_nb.main(done) == 0
    assert "Nothing to do" in capsys.readouterr().out


def test_a_signal_saves_what_there_is(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-u", SCRIPT, "train", *TINY], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint-*.pt")))
    time.sleep(2)
    process.terminate()
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "Interrupted at step" in rest
    newest = max(tmp_path.glob("runs/*/checkpoint-*.pt"))
    assert f"Step {int(newest.stem[-9:]):,}, " in rest and only(tmp_path, "runs/*/generator.safetensors")


def test_sample_and_evaluate(finished_run, tmp_path, capsys):
    weights = str(only(finished_run[0], "runs/*/generator.safetensors"))
    folder = str(weights).rsplit("/", 1)[0]
    for source, out in ((weights, "a.npz"), (folder, "b.npz")):
        assert vitgan_nb.main(["sample", "--weights", source, "--n", "7", "--out", str(tmp_path / out)]) == 0
    a, b = (np.load(tmp_path / name)["images"] for name in ("a.npz", "b.npz"))
    assert a.shape == (7, 16, 16, 3) and a.dtype == np.uint8 and (a == b).all()
    assert vitgan_nb.main(["sample", "--weights", weights, "--n", "3", "--out", str(tmp_path / "folder")]) == 0
    third = np.asarray(Image.open(tmp_path / "folder" / "000002.png"))
    assert np.abs(third.astype(int) - a[2]).max() <= 1  # the same image but for rounding, in a smaller batch
    assert vitgan_nb.main(["sample", "--weights", weights, "--n", "9", "--out", str(tmp_path / "grid.png")]) == 0
    assert Image.open(tmp_path / "grid.png").size == (3 * 17 + 1, 3 * 17 + 1)
    capsys.readouterr()
    assert vitgan_nb.main(["evaluate", "--weights", weights, "--n", "100", "--extractor", "thumbnails"]) == 0
    numbers = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert vitgan_nb.main(["export", "--weights", folder, "--out", str(tmp_path / "half.safetensors")]) == 0
    half = vitgan_nb.sample(vitgan_nb.load_generator(tmp_path / "half.safetensors"), 7).permute(0, 2, 3, 1).numpy()
    assert np.abs(half.astype(int) - a).mean() < 3 and (half != a).any()
    assert (tmp_path / "half.safetensors").stat().st_size < 0.7 * Path(weights).stat().st_size
    assert numbers["samples"] == 100 and numbers["real"] == 10_000 and numbers["kid"] > 3 * numbers["error"] > 0


def test_a_generator_of_classes_is_compared_with_images_in_no_class(tmp_path, capsys):
    generator = vitgan_nb.Generator(replace(vitgan_nb.TINY, classes=True))
    vitgan_nb.save_generator(generator, tmp_path / "g.safetensors")
    (tmp_path / "flat").mkdir()
    for number, image in enumerate(vitgan_nb.draw_shapes(200, 16)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "flat" / f"{number}.png")
    flags = ["--n", "100", "--extractor", "thumbnails", "--dataset", "folder", "--data-root", str(tmp_path / "flat")]
    assert vitgan_nb.main(["evaluate", "--weights", str(tmp_path / "g.safetensors"), *flags]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["real"] == 180


def test_benchmark_prints_json(capsys):
    assert vitgan_nb.main(["benchmark", *TINY]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["train_images_per_s"] > 0 and result["sample_images_per_s"] > 0 and 0 < result["matrix_share"] < 1
    assert result["peak_bytes"] > 10**6


@pytest.mark.parametrize("command", ["train", "sample", "export", "evaluate", "benchmark"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        vitgan_nb.main([command, "--help"])
    assert stop.value.code == 0 and "--" in capsys.readouterr().out


def test_what_is_not_compiled_is_told_at_the_end_and_in_the_log(tmp_path, monkeypatch, capsys):
    def broken(function, **_):
        def fail(*_):
            raise RuntimeError("no compiler here")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    config = replace(vitgan_nb.TINY, compile=True, out_dir=str(tmp_path))
    vitgan_nb.train(config)
    assert "; not compiled, see the log." in capsys.readouterr().out.splitlines()[-1]
    log = [json.loads(line) for line in only(tmp_path, "*/log.jsonl").read_text().splitlines()]
    told = [(note["not_compiled"], note["reason"]) for note in log if "not_compiled" in note]
    assert told == [(f"{name}_objective", "no compiler here") for name in ("discriminator", "generator")]


def test_compiling_takes_nothing_off_the_minutes(tmp_path, monkeypatch, capsys):
    """A clock that an objective moves on: by 5 seconds, and by 10 more the first time. Three steps compile."""
    clock = {"now": 0.0}

    def compiler(function, **_):
        compiled = []

        def call(*inputs):
            if not compiled:
                compiled.append(True)
                clock["now"] += 10
            clock["now"] += 5
            return function(*inputs)

        return call

    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(vitgan_nb.time, "monotonic", lambda: clock["now"])
    run = vitgan_nb.train(replace(vitgan_nb.TINY, compile=True, minutes=0.8, steps=7, out_dir=str(tmp_path)))
    assert run.step == 7 and run.seconds == 4 * 10
    told = capsys.readouterr().out
    assert told.count("Compiling took") == told.count("Compiling took 50 s, which do not count.") == 1


def test_a_demo_without_memory_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(vitgan_nb, "LIVE", True)

    @vitgan_nb.demo
    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert capsys.readouterr().out.startswith("too_large: the GPU's memory is used up")


@pytest.mark.slow
def test_compiled_steps_are_the_plain_steps(monkeypatch):
    """Two minutes of compiling. Randomness off, since a compiled program may draw in another order."""
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, 0.3))
    monkeypatch.setattr(vitgan_nb.Training, "latents", lambda run, n: run.fixed_z[:n])
    config = replace(vitgan_nb.TINY, augment="color")
    runs = [vitgan_nb.Training(replace(config, compile=compile)) for compile in (False, True)]
    for run in runs:
        for _ in range(3):
            run.train_step()
    assert runs[1].quick.keys() == {"discriminator_objective", "generator_objective"}  # nothing fell back
    torch.testing.assert_close(runs[0].sums, runs[1].sums, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_float16_scales_its_losses(optimizer):
    run = vitgan_nb.Training(replace(vitgan_nb.TINY, precision="float16", optimizer=optimizer))
    for _ in range(12):
        run.train_step()
    scale = run.scaler.get_scale()
    assert run.scaler.is_enabled() and 1 <= scale < 2**16  # it found a scale that does not overflow
    assert run.skipped == 16 - math.log2(scale)  # each batch that did halved it, and was counted
    run.sums.zero_()
    for _ in range(4):
        run.train_step()
    assert run.sums.isfinite().all() and all(p.isfinite().all() for p in run.generator.parameters())


def test_all_five_numbers_and_statistics_of_the_real_images_computed_once(monkeypatch, tmp_path):
    """`evaluate` as users call it, small networks in the place of Inception and VGG16, which take a download."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    class StandIn(FeatureExtractorBase):
        """Colours of 4 × 4 fields under each name that torch-fidelity asks for."""

        passes = 0

        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return ("2048", "logits_unbiased", "fc2", "fc2_relu")

        def forward(self, images):
            assert images.dtype == torch.uint8 and images.shape[1:] == (3, 16, 16)
            StandIn.passes += len(images)
            features = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)
            return tuple(features for _ in self.features_list)

    for name in ("inception-v3-compat", "vgg16"):
        layer = FEATURE_EXTRACTORS_REGISTRY[name].get_default_feature_layer_for_metric
        monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, name, type(
            name, (StandIn,), {"get_default_feature_layer_for_metric": staticmethod(layer)}))  # fmt: skip
    real, samples = vitgan_nb.draw_shapes(300, 16, seed=1), vitgan_nb.draw_shapes(100, 16, seed=2)
    first = vitgan_nb.evaluate(samples, real)
    assert StandIn.passes == 2 * 400  # through both networks
    assert first["samples"] == 100 and first["real"] == 300 and first["extractor"] == "inception"
    assert 0 < first["fid"] < vitgan_nb.evaluate(255 - samples, real)["fid"]
    assert abs(first["kid"]) < 0.05 and 1 < first["is"] < 2 and first["precision"] > 0.5 and first["recall"] > 0.5
    assert StandIn.passes == 2 * 400 + 2 * 100  # the second time, only the samples
    assert vitgan_nb.evaluate(samples, real) == first
    vitgan_nb.evaluate(samples, real[:200])
    assert StandIn.passes == 2 * 400 + 2 * 2 * 100 + 2 * 300  # other real images, other statistics


def test_frd_tells_noise_from_images(tmp_path, monkeypatch):
    """`benchmarks/frd.py` with random weights in the file that is downloaded otherwise."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    from benchmarks import frd

    torch.manual_seed(0)
    network = frd.ResNet56()
    torch.save({"state_dict": {f"module.{name}": w for name, w in network.state_dict().items()}}, tmp_path / "w.th")
    monkeypatch.setattr(frd.Features, "weights", tmp_path / "w.th")
    real, samples = vitgan_nb.draw_shapes(240, seed=1), vitgan_nb.draw_shapes(120, seed=2)
    assert network.eval()(vitgan_nb.to_float(real[:2])).shape == (2, 112)
    more = vitgan_nb.draw_shapes(120, seed=3)
    good, bad = (frd.closeness(images, real, more) for images in (samples, torch.randint_like(samples, 256)))
    assert good["n"] == 120 and good["frd"] < bad["frd"] and good["krd"] < bad["krd"]
    assert good["precision"] > 0.5 > 0.1 > bad["precision"] and good["recall"] > 0.5
    torch.save({"state_dict": frd.ResNet56().state_dict()}, tmp_path / "w.th")  # another network: nothing kept is used
    copied = frd.closeness(real, real, more)
    assert copied["frd"] == copied["nearest"] == 0 and 0.5 < good["nearest"] < 2 < bad["nearest"]
    assert 0 <= copied["classes"] <= math.log2(10) + 0.01
