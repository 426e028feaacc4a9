"""The notebook as a browser shows it: as a page, and, with -m browser, in JupyterLab, where it runs."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SCRIPT, wait_for

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

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
    if not CHROMIUM:
        pytest.skip("there is no Chromium here")
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(mathjax_url="", require_js_url="", jquery_url="", mermaid_js_url="")
    html, _ = exporter.from_filename(SCRIPT.with_name("ViTGAN.ipynb"))
    assert html.count("</body>") == 1
    (tmp_path / "page.html").write_text(html.replace("</body>", LOOK))
    page = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
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


CELLS = """() => {
  const panel = jupyterapp.shell.currentWidget;
  return panel.content.widgets.map((cell) => ({
    source: cell.model.sharedModel.getSource(),
    count: cell.model.type === "code" ? cell.model.executionCount : 0,
    folded: cell.inputHidden,
    outputs: cell.model.type === "code" ? cell.model.outputs.toJSON() : [],
  }));
}"""
QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET = [*QUIET.split(), "--disable-component-update", "--disable-sync"]


@pytest.fixture
def lab(tmp_path):
    """A page with the notebook, as the script makes it, open in JupyterLab."""
    pytest.importorskip("playwright", reason="pip install playwright")
    pytest.importorskip("jupyterlab", reason="pip install jupyterlab")
    if not CHROMIUM:
        pytest.skip("there is no Chromium here")
    from playwright.sync_api import sync_playwright

    home = tmp_path / "home"
    for extension, settings in (
        ("notebook-extension/tracker", {"windowingMode": "none"}),  # every cell is on the page
        ("apputils-extension/notification", {"fetchNews": "false"}),
    ):
        file = home / "settings" / "@jupyterlab" / f"{extension}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(settings))
    notebook = ["--to", "ipynb", "-o", tmp_path / "ViTGAN.ipynb", SCRIPT]
    subprocess.run([sys.executable, "-m", "jupytext", *notebook], check=True, capture_output=True)
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
         "--IdentityProvider.token=", "--expose-app-in-browser", f"--ServerApp.root_dir={tmp_path}",
         f"--LabApp.user_settings_dir={home / 'settings'}", f"--LabApp.workspaces_dir={home / 'workspaces'}",
         ],
        env=os.environ | {"JUPYTER_CONFIG_DIR": str(home), "VITGAN_MINUTES": "60", "MPLBACKEND": "agg"},
        stdout=subprocess.DEVNULL, stderr=(tmp_path / "server.log").open("w"),
    )  # fmt: skip
    try:
        wait_for(lambda: not socket.socket().connect_ex(("127.0.0.1", port)), 120)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch_persistent_context(
                tmp_path / "profile", executable_path=CHROMIUM, args=QUIET, viewport={"width": 1400, "height": 1000}
            )
            page = browser.pages[0]
            page.set_default_timeout(120_000)
            page.goto(f"http://127.0.0.1:{port}/lab/tree/ViTGAN.ipynb?reset")
            page.wait_for_function("window.jupyterapp?.shell.currentWidget?.content?.widgets?.length > 50")
            page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.ready")
            try:
                yield page
            except BaseException:
                page.screenshot(path=tmp_path / "failure.png")
                raise
            finally:
                with contextlib.suppress(Exception):
                    browser.close()
    finally:
        server.terminate()
        server.wait()


@pytest.mark.browser
def test_run_all_interrupt_go_on_and_move_every_slider(lab, tmp_path):
    def cells() -> list[dict]:
        return lab.evaluate(CELLS)

    def number(start: str) -> int:
        (found,) = [n for n, cell in enumerate(cells()) if start in cell["source"]]
        return found

    def told(n: int) -> str:
        return "".join("".join(o["text"]) for o in cells()[n]["outputs"] if o["output_type"] == "stream")

    def until(condition, seconds=1200):
        try:
            wait_for(condition, seconds)
        except AssertionError:
            lab.screenshot(path=tmp_path / "failure.png")
            raise AssertionError(f"it did not come; the screen is in {tmp_path}/failure.png") from None

    def idle() -> bool:
        return lab.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status") == "idle"

    def shown(n: int):
        return lab.locator(".jp-Notebook .jp-Cell").nth(n)

    until(lambda: len(cells()) > 50 and idle(), 120)
    hidden = [n for n, cell in enumerate(cells()) if cell["source"].startswith("# @title ") and cell["folded"]]
    assert len(hidden) > 40
    first = hidden[0]
    assert shown(first).locator(".cm-editor").count() == 0
    shown(first).locator(".jp-Placeholder-content").first.click()
    until(lambda: not cells()[first]["folded"] and shown(first).locator(".cm-editor").is_visible(), 60)

    training, last = number("    run = train(config)"), len(cells()) - 1
    lab.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells') }")
    until(lambda: any("image/png" in o.get("data", {}) for o in cells()[training]["outputs"]))  # the live figure
    figure = [o for o in cells()[training]["outputs"] if "image/png" in o.get("data", {})]
    until(lambda: [o for o in cells()[training]["outputs"] if "image/png" in o.get("data", {})] != figure)
    assert sum("image/png" in o.get("data", {}) for o in cells()[training]["outputs"]) == 1  # drawn anew in its place
    lab.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.session.kernel.interrupt()")
    until(lambda: "Interrupted at step" in told(training), 300)
    code = [n for n, cell in enumerate(cells()) if cell["source"] and cell["count"] != 0]
    until(lambda: idle() and cells()[code[-1]]["count"])
    assert not [(n, o) for n, cell in enumerate(cells()) for o in cell["outputs"] if o["output_type"] == "error"]
    assert not [told(n) for n in code if "Traceback" in told(n)] and last > 100

    moved = 0
    for n in (n for n in code if "@sliders(" in cells()[n]["source"]):
        picture = shown(n).locator(".jp-OutputArea-output img").last
        shown(n).scroll_into_view_if_needed()
        bars = shown(n).locator(".noUi-target")
        assert bars.count() >= 1
        shown(n).screenshot(path=tmp_path / f"slider-{n}-before.png")
        for k in range(bars.count()):
            before = picture.get_attribute("src")
            bar, handle = (part.bounding_box() for part in (bars.nth(k), bars.nth(k).locator(".noUi-handle")))
            at = [handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2]
            to = bar["x"] + (0.1 if at[0] > bar["x"] + 0.6 * bar["width"] else 0.9) * bar["width"]
            lab.mouse.move(*at)
            lab.mouse.down()
            lab.mouse.move(to, at[1], steps=5)
            lab.mouse.up()
            until(lambda: picture.get_attribute("src") not in (before, None), 120)  # noqa: B023
            moved += 1
        shown(n).screenshot(path=tmp_path / f"slider-{n}-after.png")
    assert moved >= 18
    assert not [o for cell in cells() for o in cell["outputs"] if o["output_type"] == "error"]

    lab.evaluate(
        f"() => {{ const content = jupyterapp.shell.currentWidget.content; content.activeCellIndex = {training}; }}"
    )
    lab.evaluate("() => { jupyterapp.commands.execute('notebook:run-cell') }")
    until(
        lambda: (
            "Resumed at step" in told(training)
            and any("image/png" in o.get("data", {}) for o in cells()[training]["outputs"])
        ),
        300,
    )
    time.sleep(3)
    lab.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.session.kernel.interrupt()")
    until(lambda: "Interrupted at step" in told(training), 300)
