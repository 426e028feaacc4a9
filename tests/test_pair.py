"""The notebook and the script are one; the notebook is executed, whole and fit for GitHub and Colab."""

import json
import re
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
    """Without what is folded, cells and answers: lines that are not empty, and lines of a cell of code."""
    shown = [c for c in NOTEBOOK["cells"] if not c["metadata"].get("jupyter", {}).get("source_hidden")]
    sources = [re.sub("</summary>.*?</details>", "", "".join(cell["source"]), flags=re.DOTALL) for cell in shown]
    lines = [sum(bool(line.strip()) for line in source.splitlines()) for source in sources]
    code = [n for n, cell in zip(lines, shown, strict=True) if cell["cell_type"] == "code"]
    assert sum(lines) < 1200 and max(code) <= 36 and sum(n > 25 for n in code) <= 5


def test_pictures_are_png():
    """And what moves, which GitHub may not show, has still pictures beside it."""
    images = [
        kind for cell in CODE for out in cell["outputs"] for kind in out.get("data", {}) if kind.startswith("image/")
    ]
    assert set(images) == {"image/png"} and len(images) >= 12
    for cell in CODE:
        if "@sliders(" in "".join(cell["source"]):
            assert [kind for out in cell["outputs"] for kind in out.get("data", {})].count("image/png") == 1


def test_small_enough_for_github_without_widgets_and_every_picture_described():
    assert (ROOT / "ViTGAN.ipynb").stat().st_size < 6_000_000
    kinds = {kind for cell in CODE for out in cell["outputs"] for kind in out.get("data", {})}
    assert not any("widget" in kind for kind in kinds)
    html = [out["data"]["text/html"] for cell in CODE for out in cell["outputs"] if "text/html" in out.get("data", {})]
    assert html and all(' alt="' in tag for page in html for tag in re.findall("<img[^>]*>", "".join(page)))


def test_headings_are_a_table_of_contents():
    """Numbered, each with an anchor, and the map links to every one in this order."""
    cells = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown"]
    headings = [re.search(r'<a name="(.+)"></a>\n## (\w+)\. ', cell) for cell in cells if re.search("^## ", cell, re.M)]
    assert [found[2] for found in headings] == [*map(str, range(1, 24)), *"ABCD"]
    contents = cells[0].split("**Contents.**")[1]
    linked = re.findall(r"\[(\w+) [^]]+\]\(#([\w-]+)\)", contents)
    assert linked == [(found[2], found[1]) for found in headings]
