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


def test_machinery_is_folded_in_colab_and_in_jupyterlab_and_has_a_title():
    for cell in CODE:
        title = "".join(cell["source"]).startswith("# @title ")
        assert title == (cell["metadata"].get("cellView") == "form"), cell["source"][:3]
        settings = title and "Settings" in cell["source"][0]  # a form, open
        assert cell["metadata"].get("jupyter", {}).get("source_hidden", False) == (title and not settings)


def test_a_learner_reads_about_1200_lines_in_short_cells():
    """Folded cells aside: lines that are not empty, and lines of a cell of code."""
    shown = [c for c in NOTEBOOK["cells"] if not c["metadata"].get("jupyter", {}).get("source_hidden")]
    lines = [sum(bool(line.strip()) for line in cell["source"]) for cell in shown]
    code = [n for n, cell in zip(lines, shown, strict=True) if cell["cell_type"] == "code"]
    assert sum(lines) < 1200 and max(code) <= 36 and sum(n > 25 for n in code) <= 5


def test_pictures_are_png():
    images = [
        kind for cell in CODE for out in cell["outputs"] for kind in out.get("data", {}) if kind.startswith("image/")
    ]
    assert set(images) == {"image/png"} and len(images) >= 12
