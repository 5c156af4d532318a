"""The page in a real browser, headless Chromium (Debian's package `chromium`): no overflow, no request, no complaint, light and dark."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import uds_log
from text_runs import pairs, write_run, write_stream

from udsstream.report.write import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"),
]

FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --hide-scrollbars --allow-file-access-from-files --enable-logging=stderr
    --virtual-time-budget=5000"""

HARNESS = """<!doctype html><title>harness</title><body style="margin:0">
<iframe id="frame" src="{page}" style="border:0;width:{width}px;height:900px"></iframe>
<pre id="result"></pre>
<script>
addEventListener("load", () => {{
  const view = document.getElementById("frame").contentWindow, page = view.document, root = page.documentElement;
  for (const fold of page.querySelectorAll("details")) fold.open = true;
  const style = selector => view.getComputedStyle(page.querySelector(selector));
  const wide = [...page.querySelectorAll("body *")].filter(part =>
    part.getBoundingClientRect().right > root.clientWidth + 1 && !part.closest(".scroll") && !part.closest(".shares"));
  document.getElementById("result").textContent = JSON.stringify({{
    width: root.clientWidth, scrollWidth: root.scrollWidth, height: root.scrollHeight,
    wide: wide.map(part => part.outerHTML.slice(0, 80)),
    requests: view.performance.getEntriesByType("resource").map(entry => entry.name),
    ground: style("body").backgroundColor,
    text: page.querySelector("svg text") && style("svg text").fill,
    plotWidths: [...page.querySelectorAll("figure svg")].map(svg => Math.round(svg.getBoundingClientRect().width)),
    columns: page.querySelector(".plots") && style(".plots").gridTemplateColumns.split(" ").length,
    textSize: page.querySelector("svg text") && page.querySelector("svg text").getBoundingClientRect().height,
    title: page.title,
  }});
}});
</script>"""


def browse(address: str, *, dark: bool = False) -> tuple[str, list[str]]:
    """The document after it has loaded, and what the browser's console says."""
    assert CHROMIUM is not None
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    # Chromium binds a socket in its temporary folder, and aborts where the path has more than 107 characters.
    with tempfile.TemporaryDirectory(prefix="udsstream-", dir="/tmp", ignore_cleanup_errors=True) as short:
        profile = f"--user-data-dir={short}/profile"
        command = [CHROMIUM, *FLAGS.split(), scheme, profile, "--window-size=1400,900", "--dump-dom", address]
        environment = os.environ | {"TMPDIR": short}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def measured(page: Path, folder: Path, *, width: int, dark: bool = False) -> dict[str, Any]:
    """The page within a frame of this width, all its folds open."""
    harness = folder / "harness.html"
    harness.write_text(HARNESS.format(page=page.as_uri(), width=width))
    document, console = browse(harness.as_uri(), dark=dark)
    found = re.search('<pre id="result">(.+?)</pre>', document, re.DOTALL)
    assert found is not None, document[:1000]
    return json.loads(html.unescape(found[1])) | {"console": console}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A report with long words in its names and texts."""
    folder = tmp_path_factory.mktemp("report")
    long = "a-name-without-any-space-" * 12
    streams = {
        "cats": write_stream(folder / "cats", pairs("cats", 30)),
        long: write_stream(folder / "dogs", [{"text": "x" * 400 + "<script>alert(1)</script>"} for _ in range(20)]),
    }
    write_run(folder / "run", streams, steps=40, model={"name": "/models/" + "m" * 200}, extra={long: long})
    return write_report(folder / "run").path


@pytest.mark.parametrize(("width", "columns"), [(1280, 3), (800, 2), (400, 1), (320, 1)])
def test_nothing_is_wider_than_the_page(page, tmp_path, width, columns):
    found = measured(page, tmp_path, width=width)
    assert found["console"] == []
    assert (found["width"], found["scrollWidth"]) == (width, width), found["wide"]
    assert found["wide"] == []
    assert found["columns"] == columns
    assert len(found["plotWidths"]) == 8
    assert min(found["plotWidths"]) >= 0.75 * width / columns
    assert found["textSize"] >= 9


def test_light_and_dark(page, tmp_path):
    light, dark = (measured(page, tmp_path, width=1280, dark=d) for d in (False, True))
    assert (light["ground"], dark["ground"]) == ("rgb(245, 246, 248)", "rgb(15, 19, 24)")
    assert (light["text"], dark["text"]) == ("rgb(27, 32, 39)", "rgb(231, 234, 238)")


def test_nothing_is_asked_for_and_nothing_complained_of(page, tmp_path):
    assert measured(page, tmp_path, width=1280)["requests"] == []
    document, console = browse(page.as_uri())
    assert console == []
    assert "<h2>Settings</h2>" in document


def test_requests_scripts_and_overflow_would_be_seen(page, tmp_path):
    """The checks above can fail."""
    text = page.read_text()
    wide = tmp_path / "wide.html"
    wide.write_text(text.replace("<main>", '<main><p id="wide" style="width:2000px">wide</p>'))
    found = measured(wide, tmp_path, width=400)
    assert found["scrollWidth"] > 400
    assert any('id="wide"' in part for part in found["wide"])

    asks = tmp_path / "asks.html"
    policy = r'<meta http-equiv="Content-Security-Policy"[^>]*>'
    address = "http://127.0.0.1:59999/nowhere.png"
    asks.write_text(re.sub(policy, "", text).replace("<main>", f'<main><img alt="" src="{address}">'))
    assert measured(asks, tmp_path, width=400)["requests"] == [address]

    # With the policy, what might slip through an escape is refused, and the browser says so.
    script = tmp_path / "script.html"
    script.write_text(text.replace("<main>", "<main><script>document.title = 'ran'</script>"))
    document, console = browse(script.as_uri())
    assert "<title>ran" not in document
    assert any("Content Security Policy" in line for line in console)


@pytest.mark.parametrize(
    "settings", [{"method": "random"}, {"steps": 1}, {"steps": 3, "off": (0, 1, 2)}, {"streams": False}]
)
def test_other_runs_fit_too(tmp_path, settings):
    root = uds_log.write(tmp_path / "run", **dict(settings))
    found = measured(write_report(root).path, tmp_path, width=400)
    assert (found["scrollWidth"], found["wide"], found["requests"], found["console"]) == (400, [], [], [])


def test_a_page_without_plots_fits_too(tmp_path):
    root = uds_log.write(tmp_path / "run", steps=0)
    found = measured(write_report(root).path, tmp_path, width=400)
    assert (found["scrollWidth"], found["wide"], found["plotWidths"]) == (400, [], [])
