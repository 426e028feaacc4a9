"""Importing the file defines everything and does nothing."""

import subprocess
import sys

from conftest import ROOT

PROBE = """
import os, sys
sys.modules["IPython"] = sys.modules["ipywidgets"] = None  # importing them now raises ImportError
sys.path.insert(0, {root!r})
before = set(os.listdir("."))
import matplotlib.pyplot as plt
import vitgan_nb
assert not vitgan_nb.LIVE
assert set(os.listdir(".")) == before, "wrote a file"
assert not plt.get_fignums(), "opened a figure"
for name in ("torchvision", "torch_fidelity", "safetensors", "tqdm.auto"):
    assert name not in sys.modules, name + " is imported before it is needed"
"""


def test_import_draws_writes_and_needs_nothing(tmp_path):
    probe = PROBE.format(root=str(ROOT))
    done = subprocess.run([sys.executable, "-B", "-c", probe], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
