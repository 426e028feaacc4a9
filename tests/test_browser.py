"""The notebook as a browser shows it."""

import json
import re
import shutil
import subprocess

import pytest
from conftest import SCRIPT

LOOK = """<pre id="seen"></pre><script>addEventListener("load", () => {
  const all = (what) => [...document.querySelectorAll(what)];
  document.getElementById("seen").textContent = "SEEN" + JSON.stringify({
    images: all("img").length,
    broken: all("img").filter((image) => !image.naturalWidth).length,
    links: all("a[href^='#']:not(.anchor-link)").length,
    lost: all("a[href^='#']").map((a) => decodeURIComponent(a.hash.slice(1)))
      .filter((name) => !document.getElementById(name) && !document.getElementsByName(name).length),
    tables: all(".jp-MarkdownOutput table").length,
    bars: all(".jp-MarkdownOutput p").filter((p) => p.textContent.includes(" | ")).length,
    wide: all("img").filter((image) => image.getBoundingClientRect().right > innerWidth).length,
  }) + "NEES"})</script></body>"""


def test_pictures_links_and_tables_show(tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not browser:
        pytest.skip("there is no Chromium here")
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(mathjax_url="", require_js_url="", jquery_url="", mermaid_js_url="")
    html, _ = exporter.from_filename(SCRIPT.with_name("ViTGAN.ipynb"))
    assert html.count("</body>") == 1
    (tmp_path / "page.html").write_text(html.replace("</body>", LOOK))
    page = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--window-size=1400,900", "--virtual-time-budget=10000", "--dump-dom", tmp_path / "page.html"],
        capture_output=True, text=True, timeout=120,
    ).stdout  # fmt: skip
    seen = json.loads(re.search("SEEN({.*})NEES", page.split('id="seen"')[1])[1])
    assert seen["images"] > 20 and seen["broken"] == seen["wide"] == 0
    assert seen["links"] > 26 and seen["lost"] == []
    text = [
        cell
        for cell in json.loads(SCRIPT.with_name("ViTGAN.ipynb").read_text())["cells"]
        if cell["cell_type"] == "markdown"
    ]
    assert (
        seen["tables"] == sum(line.startswith("|---") for cell in text for line in cell["source"]) and seen["bars"] == 0
    )
    assert not any("![]" in line for cell in text for line in cell["source"])  # every picture has a description
