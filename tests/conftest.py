"""Shared by the tests: a tiny run on the command line."""

import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import matplotlib
import pytest

matplotlib.use("agg")
os.environ.setdefault("VITGAN_MINUTES", "0.5")  # so long the notebook trains under nbval
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # two threads wait for each other on a busy machine; two tests run at once
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with interrupts ignored
ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "vitgan_nb.py"
TINY = (
    "--profile smoke --image-size 16 --dim 16 --depth 1 --heads 2 --latent-dim 8 --mapping-depth 2 --siren-dim 8 "
    "--batch-size 4 --optimizer adam --precision float32"
).split()


def run_script(*arguments, cwd, launcher=(sys.executable,), **environment):
    """Run `vitgan_nb.py` in `cwd` as a user does; returns the finished process, output as text."""
    return subprocess.run(
        [*launcher, str(SCRIPT), *map(str, arguments)],
        cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def wait_for(condition, seconds=60):
    """Until `condition()` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.1)


def module_from(source: str) -> types.ModuleType:
    """The notebook's program, changed, as a module."""
    module = types.ModuleType("changed")
    exec(compile(source, "changed.py", "exec"), module.__dict__)
    return module


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A folder in which a tiny run of 24 steps has ended, and the process that made it."""
    folder = tmp_path_factory.mktemp("run")
    process = run_script("train", *TINY, "--steps", 24, cwd=folder)
    assert process.returncode == 0, process.stderr
    return folder, process


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """The folder, new, in which decoded images are kept."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "vitgan"
