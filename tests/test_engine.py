"""Parts of the engine by themselves, each in this process: what is compiled and what not, formats, files."""

import functools
import json
import resource
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy
import pytest
import safetensors.torch
import torch
from conftest import TINY as FLAGS
from PIL import Image

import vitgan_nb
from vitgan_nb import TINY, BadInput, Training, run_folder, save_checkpoint, save_generator


def compiled_run(monkeypatch, **other) -> tuple[Training, list]:
    """A run for which `torch.compile` gives back what it gets, and what that was called with."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: asked.append((function.__name__, how)) or function)
    return Training(replace(TINY, compile=True, **other), "cpu"), asked


def test_both_objectives_are_compiled_as_a_whole_for_one_shape(monkeypatch):
    run, asked = compiled_run(monkeypatch)
    how = {"mode": "reduce-overhead", "dynamic": False}
    assert asked == [("discriminator_objective", how), ("generator_objective", how)]
    assert [*run.quick] == [name for name, _ in asked] and run.compiles
    run.train_step()
    assert [*run.quick] == [name for name, _ in asked] and run.notes == []  # nothing fell back


def test_where_the_compiled_form_fails_the_plain_one_takes_its_place(capsys):
    """Forwards or backwards, after wrong gradients have been left; what `more` gives is not lost."""
    run, weight, x = Training(TINY, "cpu"), torch.nn.Parameter(torch.zeros(3)), torch.tensor([1.0, 2.0, 4.0])
    optimizer = torch.optim.SGD([weight], lr=1.0)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(_, weight):
            return weight.sum()

        @staticmethod
        def backward(*_):
            weight.grad = torch.ones(3)
            raise RuntimeError("x" * 300 + "\nmore")

    def objective(x, y):
        return [(weight * x).sum(), 2 * (weight * x).sum(), 5 * y + 0 * weight.sum()]

    def forwards(x, y):
        raise TypeError

    y = torch.tensor(1.0)
    for compiled in (forwards, lambda *_, y: [Fails.apply(weight)] * 3):
        weight.data.zero_()
        run.quick["objective"] = compiled
        terms = run.descend(objective, optimizer, x, more=lambda x, y: (10 * weight * x).sum() + 7, y=y)
        assert torch.equal(weight.data, -13 * x) and weight.grad is None and run.quick == {}
        assert [term.item() for term in terms] == [0, 0, 12] and not any(term.requires_grad for term in terms)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "(TypeError); training goes on" in told[0] and "(" + "x" * 200 + ")" in told[1]
    notes = [{"step": 0, "not_compiled": "objective", "reason": reason} for reason in ("TypeError", "x" * 200)]
    assert run.notes == notes
    run.quick["objective"] = lambda *_, y: (_ for _ in ()).throw(MemoryError())
    with pytest.raises(MemoryError):  # no compiler's fault
        run.descend(objective, optimizer, x, y=y)


def test_products_that_cannot_be_compiled_fall_back_once_but_for_memory(capsys):
    run = Training(TINY, "cpu")
    muon = run.optimizer_d.each[1]
    stacks, called = [torch.randn(2, 12, 16)], []

    def quick(stacks, dtype):
        called.append((len(stacks), dtype))
        return vitgan_nb.orthogonalize_all(stacks, dtype)

    expected = vitgan_nb.orthogonalize_all(stacks, torch.float32)
    muon.orthogonalize = functools.partial(run.orthogonalize, quick, muon)
    torch.testing.assert_close(muon.orthogonalize(stacks, torch.float32), expected)
    assert called == [(1, torch.float32)] and run.notes == [] and capsys.readouterr().err == ""

    def full(*_):
        raise MemoryError

    with pytest.raises(MemoryError):
        run.orthogonalize(full, muon, stacks, torch.float32)

    def broken(*_):
        raise TypeError("no compiler")

    torch.testing.assert_close(run.orthogonalize(broken, muon, stacks, torch.float32), expected)
    assert muon.orthogonalize is vitgan_nb.orthogonalize_all
    assert run.notes == [{"step": 0, "not_compiled": "orthogonalize_all", "reason": "no compiler"}]


def test_both_halves_of_a_step_multiply_in_the_format_of_the_run():
    run, formats = Training(replace(TINY, precision="bfloat16"), "cpu"), []
    for network in (run.generator, run.discriminator):
        network.register_forward_pre_hook(
            lambda module, _: formats.append((type(module).__name__, torch.is_autocast_enabled("cpu")))
        )
    run.train_step()
    assert formats == [("Generator", True), ("Discriminator", True)] * 2


def test_the_folder_of_a_run_knows_which_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = replace(TINY, dataset="folder", data_root="a")
    assert run_folder(config) == run_folder(replace(config, data_root=str(tmp_path / "a")))
    assert run_folder(config) != run_folder(replace(config, data_root="b"))
    assert run_folder(replace(TINY, data_root="a")) == run_folder(TINY)  # shapes come from nowhere


def test_a_checkpoint_takes_what_a_killed_one_left_and_says_what_a_disk_said(tmp_path, monkeypatch):
    run = Training(TINY, "cpu")
    (tmp_path / ".checkpoint-000000007.pt.partial").write_bytes(b"half")
    save_checkpoint(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000000000.pt"]

    def full(*_):
        raise RuntimeError("unexpected pos 64 vs 0") from None

    def closed(*_):
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904 - as torch.save does

    for save, reason in ((full, "unexpected pos"), (closed, "No space left")):
        monkeypatch.setattr(torch, "save", save)
        with pytest.raises(OSError, match=reason):
            save_checkpoint(run, tmp_path)


def test_a_file_that_is_cut_off_is_an_os_error_and_leaves_nothing(tmp_path):
    """A limit on files' sizes in place of a full disk: what fails is the write itself."""
    run, (soft, hard) = Training(TINY, "cpu"), resource.getrlimit(resource.RLIMIT_FSIZE)
    for write in (lambda: save_checkpoint(run, tmp_path), lambda: save_generator(run.generator, tmp_path / "g")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            with pytest.raises(OSError):
                write()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_done_ends_well_once_more(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for told in ("Step 2, 8 images,", "Nothing to do"):
        assert vitgan_nb.main(["train", *FLAGS, "--steps", "2"]) == 0
        assert told in capsys.readouterr().out


def test_what_an_exported_generator_says_of_itself(tmp_path):
    generator = vitgan_nb.Generator(TINY)
    for about in ("", "350,000 images"):
        vitgan_nb.save_generator(generator, tmp_path / "a.safetensors", about=about)
        with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
            told = file.metadata()
        assert told.pop("config") == vitgan_nb.json.dumps(vitgan_nb.asdict(TINY)) and told == (
            {"about": about} if about else {}
        )


def test_r1_comes_in_one_step_of_sixteen(monkeypatch):
    run, asked = Training(replace(TINY, r1=0.5), "cpu"), []

    def penalty(discriminator, images, weight):
        asked.append((run.step, weight))
        return 0 * images.sum()

    monkeypatch.setattr(vitgan_nb, "slope_penalty", penalty)
    for run.step in (0, 1, 15, 16, 17):
        run.discriminator_step()
    assert asked == [(0, 8.0), (16, 8.0)]


def test_a_generator_is_found_again_with_its_classes_or_refused_in_a_sentence(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(BadInput, match="a.safetensors does not exist; name a .safetensors file"):
        vitgan_nb.load_generator(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(BadInput, match=r"holds no ViTGAN generator, or no generator of this version \(.+\)"):
        vitgan_nb.load_generator(path)
    generator, z = vitgan_nb.Generator(replace(TINY, classes=True), 7).eval(), torch.randn(2, TINY.latent_dim)
    vitgan_nb.save_generator(generator, path)
    (tmp_path / "any").touch()
    assert path.stat().st_mode == (tmp_path / "any").stat().st_mode  # others may read it, if they may any file
    found, labels = vitgan_nb.load_generator(path), torch.tensor([0, 6])
    assert found.mapping.kinds == 7 and not found.training
    assert torch.equal(found(z, labels=labels), generator(z, labels=labels))


def test_steepness_is_one_at_the_start_and_grows_with_a_weight():
    discriminator = vitgan_nb.Discriminator(TINY)
    start = vitgan_nb.steepness(discriminator)
    assert len(start) > 10 and all(value == pytest.approx(1, abs=1e-4) for value in start.values())
    discriminator.head.weight.data *= 3
    assert vitgan_nb.steepness(discriminator) == pytest.approx(start | {"head": 3 * start["head"]})


def test_only_the_first_process_speaks_and_writes(tmp_path, capsys):
    run, done = Training(TINY, "cpu"), []
    keeper = vitgan_nb.Keeper(run, tmp_path, False)
    keeper.say("")
    keeper.say("once")
    assert keeper.write(done.append, 1)

    def refuses():
        raise OSError("the disk says no")

    assert not keeper.write(refuses)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "once" and "(the disk says no). The last checkpoint is not there yet" in second
    assert not keeper.write(refuses) and capsys.readouterr().out == ""  # told once
    run.rank = 1
    other = vitgan_nb.Keeper(run, tmp_path, False)
    other.say("never")
    assert not other.write(done.append, 2) and done == [1] and capsys.readouterr().out == ""


class Board:
    """In the place of TensorBoard's writer: what it was told."""

    def __init__(self, folder, **how):
        self.calls = [("made", folder.name, how)]
        Board.last = self

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append((name, *arguments))


def test_what_tensorboard_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Board))
    monkeypatch.setattr(vitgan_nb, "RECORD_EVERY", 2)
    config = replace(TINY, out_dir=str(tmp_path), steps=4)
    vitgan_nb.train(config, tensorboard=True)
    (folder,) = tmp_path.iterdir()
    (folder / "log.jsonl").write_text("what a later step left\n")
    run = vitgan_nb.train(replace(config, steps=6), tensorboard=True)
    (made, name, how), *calls = Board.last.calls
    assert (made, name, how) == ("made", "tensorboard", {"purge_step": 4})
    assert calls[-1] == ("close",) and calls[-2][:2] == ("add_image", "samples") and calls[-2][3:] == (6, None, "HWC")
    told = {call[1]: call[2:] for call in calls if call[0] == "add_scalar"}
    entry = run.history[-1]
    for kind, names in (("loss", vitgan_nb.STATISTICS), ("logit", vitgan_nb.LOGITS)):
        assert all(told[f"{kind}/{name}"] == (entry[name], 6) for name in names)
    assert told["steepness/head"][1] == 6 and len(told) == 6 + len(vitgan_nb.steepness(run.discriminator))
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]


def test_tensorboard_is_missed_only_where_it_is_wanted(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not installed
    config = replace(TINY, out_dir=str(tmp_path), steps=1)
    with pytest.raises(BadInput, match="tensorboard is not installed; run pip install tensorboard"):
        vitgan_nb.train(config, tensorboard=True)
    assert [*tmp_path.iterdir()] == []
    assert vitgan_nb.train(config).step == 1


def test_samples_are_as_many_as_asked_for_and_classes_take_turns_in_lots_too():
    """Latents are drawn by the hundred, images of 64 × 64 painted by 25."""
    generator = vitgan_nb.Generator(replace(TINY, classes=True, image_size=64), 3)
    in_turn, of_one = vitgan_nb.sample(generator, 203), vitgan_nb.sample(generator, 203, label=1)
    assert in_turn.shape == of_one.shape == (203, 3, 64, 64)
    alike = (in_turn.int() - of_one.int()).abs().flatten(1).amax(1) <= 1  # rounding
    assert alike.nonzero()[:, 0].tolist() == [*range(1, 203, 3)]
    assert torch.equal(in_turn[:4], vitgan_nb.sample(generator, 4, seed=0))


def test_a_label_is_one_that_was_learned():
    plain, generator = vitgan_nb.Generator(TINY), vitgan_nb.Generator(replace(TINY, classes=True), 3)
    assert vitgan_nb.sample(generator, 1, label=0).shape == vitgan_nb.sample(generator, 1, label=2).shape
    for label in (-1, 3, 1.0, True):
        with pytest.raises(BadInput, match="label is .*, but must be from 0 to 2"):
            vitgan_nb.sample(generator, 1, label=label)
    for label in (0, 1):
        with pytest.raises(BadInput, match="left out: this generator has learned no classes"):
            vitgan_nb.sample(plain, 1, label=label)


class Bar:
    """In the place of tqdm's bar: how it was made, where it stands, what it says."""

    def __init__(self, **how):
        self.how, self.n, self.told, self.closed = how, how["initial"], [], False
        Bar.last = self

    def update(self, by):
        self.n += by

    def set_postfix_str(self, told, **_):
        self.told.append(told)

    def close(self):
        self.closed = True


@pytest.mark.parametrize(
    ("limits", "shown", "terminal"),
    [
        ({"steps": 4}, {"total": 4, "unit": "step"}, True),
        ({"steps": 4, "minutes": 2.0}, {"total": 4, "unit": "step"}, False),
        ({"steps": 0, "minutes": 2.0}, {"total": 120, "unit": "s"}, False),
    ],
)
def test_the_bar_counts_what_ends_the_run(limits, shown, terminal, tmp_path, monkeypatch):
    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    run = Training(replace(TINY, out_dir=str(tmp_path), **limits), "cpu")
    run.step, run.seconds = 3, 119.0
    keeper = vitgan_nb.Keeper(run, tmp_path, False)
    (tmp_path / "log.jsonl").write_text("what a later step left\n")
    keeper.start()
    assert (tmp_path / "log.jsonl").read_text() == ""
    begun = 119 if shown["unit"] == "s" else 3
    assert Bar.last.how == shown | {"initial": begun, "mininterval": 2.0 if terminal else 10.0, "maxinterval": 30.0}
    run.step, run.seconds = 4, 120.2
    keeper.after_step()
    assert Bar.last.n == begun + 1


def test_one_line_of_the_log_and_of_the_bar_for_a_record(tmp_path, monkeypatch):
    """No record of a step that was taken back; in float16 skipped batches are counted."""
    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    monkeypatch.setattr(vitgan_nb, "RECORD_EVERY", 2)
    sound = iter([True, False])
    monkeypatch.setattr(Training, "is_sound", lambda _: next(sound, True))
    run = vitgan_nb.train(replace(TINY, out_dir=str(tmp_path)))
    (log,) = tmp_path.glob("*/log.jsonl")
    steps = [entry["step"] for entry in map(json.loads, log.read_text().splitlines()) if "real" in entry]
    assert steps == [2, 4] and len(Bar.last.told) == 3  # step 2, back to 0, steps 2 and 4
    real, fake = (run.history[-1][name] for name in ("real", "fake"))
    assert Bar.last.told[-1] == f"logits real {real:+.2f} fake {fake:+.2f}" and Bar.last.closed
    run.scaler, run.skipped = SimpleNamespace(is_enabled=lambda: True), torch.tensor(3.0)
    keeper = vitgan_nb.Keeper(run, tmp_path, False)
    keeper.bar = Bar(initial=0)
    keeper.record()
    assert json.loads((tmp_path / "log.jsonl").read_text())["skipped"] == 3
    keeper.folder = tmp_path / "no such folder"
    keeper.record()
    assert len(Bar.last.told) == 1


def test_only_what_was_saved_counts_as_saved(tmp_path):
    """Then a full disk is told anew, and three more take-backs are allowed; the clock starts again in any case."""
    keeper = vitgan_nb.Keeper(Training(TINY, "cpu"), tmp_path, False)
    (tmp_path / "file").write_text("no folder can be made here")
    for folder, saved in ((tmp_path / "file" / "folder", False), (tmp_path, True)):
        keeper.folder, keeper.taken_back, keeper.saved_at = folder, 2, 0.0
        keeper.told = {0}
        assert keeper.save() == saved and keeper.saved_at > 0
        assert (keeper.taken_back == 0, 0 not in keeper.told) == (saved, saved)
    keeper.take_back()
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"step": 0, "not_finite": 1}  # now, not at the end
    keeper.first, keeper.run.any_process = False, lambda answer: disk  # what the first process found
    for disk in (False, True):
        keeper.taken_back, keeper.told = 2, {0}
        assert keeper.save() == disk
        assert (keeper.taken_back == 0, not keeper.told) == (disk, disk)


def test_a_checkpoint_abandons_those_after_it(tmp_path):
    run = Training(TINY, "cpu")
    (tmp_path / "checkpoint-000000007.pt").touch()
    save_checkpoint(run, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["abandoned-000000007.pt", "checkpoint-000000000.pt"]
    (tmp_path / "checkpoint-000000007.pt").write_text("yet another branch")
    save_checkpoint(run, tmp_path)
    assert (tmp_path / "abandoned-000000007.pt").read_text() == ""
    assert (tmp_path / "abandoned-000000007-.pt").read_text() == "yet another branch"


def test_several_processes_save_once_when_it_is_time(tmp_path, monkeypatch):
    """They agree every ten steps only."""
    monkeypatch.setattr(vitgan_nb, "CHECKPOINT_MINUTES", 0)
    monkeypatch.setattr(Training, "any_process", lambda _, answer: answer)
    monkeypatch.setattr(Training, "agree", lambda *_: None)
    saved = []
    monkeypatch.setattr(vitgan_nb.Keeper, "save", lambda keeper: saved.append(keeper.run.step) or True)
    run = Training(replace(TINY, out_dir=str(tmp_path), steps=25), "cpu")
    run.world = 2
    vitgan_nb.train(run.config, resume=run)
    assert saved == [10, 20, 25]


def test_what_lies_in_the_folder_at_the_end(tmp_path):
    run = vitgan_nb.train(replace(TINY, out_dir=str(tmp_path), steps=2, classes=True))
    (folder,) = tmp_path.iterdir()
    pictures = "classes.png", "progress.png", "samples-000000000.png", "samples.png", "samples.webp"
    checkpoints = "checkpoint-000000000.pt", "checkpoint-000000002.pt"
    left = sorted([*pictures, *checkpoints, "generator.safetensors", "log.jsonl"])
    assert sorted(path.name for path in folder.iterdir()) == left
    in_rows = vitgan_nb.to_grid(run.class_rows(), 10)  # ten of each class beside each other
    with Image.open(folder / "classes.png") as image:
        assert torch.equal(torch.from_numpy(numpy.array(image)), torch.from_numpy(in_rows))
