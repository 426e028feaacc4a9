"""Run all, as on Colab, as near as it goes without one. Not part of the tests: it takes a quarter of an hour.

    python tests/rehearse_colab.py [--python python3.12] [--torch 2.10.0 --torchvision 0.25.0] [--keep FOLDER]

In a virtual environment with what Colab has and no torch-fidelity, with a stand-in for `google.colab` that refuses to
mount a Drive, the notebook alone in a folder is run twice: as it is, for a minute, and as `lesson` with float16 forced,
for half a minute of training on the CPU. Prints what the cells about the run printed. Raises where a cell fails, asks
for something, or where a package was installed meanwhile.
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

PACKAGES = "matplotlib numpy pillow safetensors tqdm ipywidgets ipykernel nbclient nbformat".split()
COLAB = """
class drive:
    @staticmethod
    def mount(path):
        raise RuntimeError("the Drive was not asked for")
"""
RUN = '''
import sys
import nbformat
from nbclient import NotebookClient

class Client(NotebookClient):
    def handle_comm_msg(self, *_):
        """Widgets become plain output."""

notebook, (settings, after) = nbformat.read("ViTGAN.ipynb", as_version=4), sys.argv[1:]
(form,) = [cell for cell in notebook.cells if cell.source.startswith("# @title Settings")]
(chosen,) = [cell for cell in notebook.cells if cell.source.startswith("# @title What was chosen")]
form.source += "\\n" + settings
chosen.source += "\\n" + after
Client(notebook, timeout=3600, allow_stdin=False).execute()
for cell in notebook.cells:
    for output in cell.get("outputs", []):
        if output.output_type == "stream" and ("LIVE" in cell.source or output.name == "stderr"):
            print(f"  {output.name}: {output.text.strip()[-900:]}")
print(sum(cell.cell_type == "code" for cell in notebook.cells), "cells ran")
'''


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="python3.12")
    parser.add_argument("--torch", default="2.10.0")
    parser.add_argument("--torchvision", default="0.25.0")
    parser.add_argument("--keep", type=Path, help="a folder for the environment, to be used again")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        environment = flags.keep or Path(scratch, "environment")
        python = environment / "bin" / "python"
        if not python.exists():
            subprocess.run([flags.python, "-m", "venv", environment], check=True)
            torch = [f"torch=={flags.torch}", f"torchvision=={flags.torchvision}"]
            subprocess.run([python, "-m", "pip", "install", "--quiet", *torch, *PACKAGES], check=True)
        (site,) = (environment / "lib").glob("python*/site-packages")
        (site / "google").mkdir(exist_ok=True)
        (site / "google" / "colab.py").write_text(COLAB)

        def installed() -> str:
            return subprocess.run([python, "-m", "pip", "freeze"], check=True, capture_output=True, text=True).stdout

        before = installed()
        for name, settings, after in (
            ("as it is", "MINUTES = 1", ""),
            (
                "lesson in float16",
                'PROFILE, MINUTES = "lesson", 0.5',
                'if LIVE:\n    config = replace(config, precision="float16")',
            ),
        ):
            folder = Path(scratch, name)
            folder.mkdir()
            shutil.copy(Path(__file__).resolve().parent.parent / "ViTGAN.ipynb", folder)
            print(name, flush=True)
            subprocess.run([python.absolute(), "-c", RUN, settings, after], cwd=folder, check=True)
        assert installed() == before, "something was installed"


if __name__ == "__main__":
    main()
