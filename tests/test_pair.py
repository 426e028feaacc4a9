"""The notebook and the script are one; the notebook is executed, whole and fit for GitHub and Colab."""

import json
import subprocess
import sys

from conftest import ROOT, SCRIPT

NOTEBOOK = json.loads((ROOT / "ViTGAN.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_notebook_and_script_say_the_same():
    text = subprocess.run(
        [sys.executable, "-m", "jupytext", "--to", "py:percent", "-o", "-", ROOT / "ViTGAN.ipynb"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert text == SCRIPT.read_text(), "run jupytext --update --to ipynb vitgan_nb.py and execute the notebook"


def test_every_cell_was_executed_without_error():
    assert all(cell["execution_count"] for cell in CODE if "".join(cell["source"]).strip())
    assert not [out for cell in CODE for out in cell["outputs"] if out["output_type"] == "error"]


def test_asks_colab_for_a_gpu_and_renders_on_github():
    assert NOTEBOOK["metadata"]["accelerator"] == "GPU"
    assert "widgets" not in NOTEBOOK["metadata"]
    assert sum("# @title" in "".join(cell["source"]) for cell in CODE) == 1


def test_pictures_are_png():
    images = [
        kind for cell in CODE for out in cell["outputs"] for kind in out.get("data", {}) if kind.startswith("image/")
    ]
    assert set(images) == {"image/png"} and len(images) >= 12
