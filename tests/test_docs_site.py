"""The site: every page is in it, it builds without a warning, and neither building nor reading it asks the network for anything."""

from __future__ import annotations

import html.parser
import os
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import udsstream
from udsstream import errors, run_config

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


class Loader(yaml.SafeLoader):
    """As MkDocs reads its file, but that no tag means anything."""


def nav_pages(entry: object) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in nav_pages(part)]  # type: ignore[union-attr]


def test_every_page_is_in_the_navigation():
    listed = nav_pages(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"])
    assert len(listed) == len(set(listed))
    assert sorted(listed) == PAGES, "add the page to `nav` in mkdocs.yml, where its reader would look for it"


def test_the_reference_has_every_public_name():
    asked = "\n".join((DOCS / name).read_text() for name in ("api.md", "api_log.md", "api_scoring.md", "errors.md"))
    named = re.findall(r"^::: ([\w.]+)$", asked, flags=re.MULTILINE)
    for name in set(udsstream.__all__) - {"__version__"}:
        value = getattr(udsstream, name)
        assert f"{value.__module__}.{name}" in named, name
    sections = [name for name in run_config.__all__ if name.endswith(("Config", "Settings"))]
    assert {f"udsstream.run_config.{name}" for name in sections} <= set(named)
    for name in named:
        assert getattr(pydoc.locate(name), "__doc__", None), f"{name} has no docstring, or is not there"


def test_every_statement_about_another_project_names_its_source():
    page = (DOCS / "other_systems.md").read_text()
    notes = dict(re.findall(r"^\[\^([\w-]+)\]: (.*)$", page, flags=re.MULTILINE))
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in page.splitlines() if line.startswith("| ")]
    theirs = [row for row in rows if row[0] and not row[0].startswith("**udsstream")]
    assert {row[0] for row in theirs} == {
        "Composer's SelectiveBackprop", "UDS as published", "GREATS", "RHO-Loss", "InfoBatch", "DataFlex",
        "NeMo Curator", "datatrove", "Data-Juicer",
    }  # fmt: skip
    used = set()
    for row in theirs:
        for cell in row[1:]:
            cited = re.findall(r"\[\^([\w-]+)\]", cell)
            assert cited, f"{row[0]}: {cell}"
            assert cell.endswith("]"), f"{row[0]}: {cell}"
            used |= set(cited)
    assert used == notes.keys()
    assert all("https://" in note for note in notes.values())


def build_command() -> list[str]:
    """What `make docs` runs, with the Python that runs the tests."""
    (options,) = re.findall(r"-m mkdocs build (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    return [sys.executable, "-m", "mkdocs", "build", *options.split()]


def test_a_warning_is_an_error(tmp_path):
    """With --quiet, --strict hears none."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "mkdocs.yml").write_text("site_name: a\nplugins: []\n")
    for text, code in (("[b](index.md)", 0), ("[b](missing.md)", 1)):
        (tmp_path / "docs" / "index.md").write_text(text)
        done = subprocess.run(build_command(), cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        environment[name] = "http://127.0.0.1:9"  # nothing listens: what would be fetched fails
    build = [*build_command(), "--site-dir", str(out)]
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


class Fetched(html.parser.HTMLParser):
    """Collects what a browser fetches to show a page, and the page's anchors and text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.anchors: set[str] = set()
        self.formulas = 0
        self.text = ""
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.formulas += tag == "math"
        self.anchors |= {given["id"] or ""} if "id" in given else set()
        shown = tag in ("script", "img", "iframe", "source", "video", "audio")
        linked = tag == "link" and given.get("rel") not in ("canonical", "next", "prev")
        self.urls += [
            url for url in (given.get("src") if shown else None, given.get("href") if linked else None) if url
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.slow
def test_reading_it_asks_the_network_for_nothing(site):
    pages = sorted(site.glob("*.html"))
    assert {page.stem for page in pages} >= {Path(name).stem for name in PAGES}
    for page in pages:
        for url in Fetched(page).urls:
            assert not re.match(r"(https?:)?//", url), f"{page.name} fetches {url}"
            if page.name != "404.html":  # whose addresses are absolute
                assert (site / url.split("?")[0].split("#")[0]).exists(), f"{page.name} lacks {url}"
    for style in site.rglob("*.css"):
        assert not re.search(r"""(url\(|@import )["']?(https?:)?//""", style.read_text()), style
    assert (site / "search" / "search_index.json").stat().st_size > 100_000


@pytest.mark.slow
def test_the_reference_is_filled_and_formulas_are_drawn(site):
    page = Fetched(site / "errors.html")
    assert {f"udsstream.errors.{name}" for name in errors.__all__} <= page.anchors
    page = Fetched(site / "api.html")
    assert {f"udsstream.config.SelectionConfig.{name}" for name in ("method", "keep", "alpha")} <= page.anchors
    assert "Raises" in page.text
    page = Fetched(site / "derivation.html")
    assert page.formulas > 50
    assert "$" not in page.text
