"""What is published: one version, a source distribution that holds the project, and a wheel that works in an environment of its own.

The wheel is built from the source distribution, as an index would, and installed where no checkout can be imported. Its heavy dependencies
are not installed again: the environment sees those of the one that runs the tests, whose own udsstream it does not.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import numpy_run
import pytest

import udsstream

ROOT = Path(__file__).parent.parent
PACKAGE = Path(udsstream.__file__).parent
JUNK = ("__pycache__", ".egg-info", ".venv", ".git/", ".pytest_cache", ".ruff_cache", ".hypothesis", "/runs/", "/site/")


def files_below(folder: Path) -> set[str]:
    """Paths relative to the project, without what Python writes."""
    found = {path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    return {path.relative_to(ROOT).as_posix() for path in found}


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A folder with the source distribution, and the wheel that was built from it."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def clean(dist, tmp_path_factory) -> Path:
    """The `bin` of an environment in which the wheel is the only udsstream."""
    home = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    (wheel,) = dist.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*pip, str(wheel)], check=True)
    # A path in a .pth file is searched, but the .pth files in it are not read: those of an editable install, for one.
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


def in_clean(clean: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [str(clean / command[0]), *command[1:]],
        cwd=folder, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_the_version_stands_in_one_place(dist, clean, tmp_path):
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+|\.dev\d+)?", udsstream.__version__), "neither semantic nor PEP 440"
    assert not re.search(r"^version *=", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert sorted(path.name for path in dist.iterdir()) == [
        f"udsstream-{udsstream.__version__}-py3-none-any.whl",
        f"udsstream-{udsstream.__version__}.tar.gz",
    ]
    metadata = "import importlib.metadata; print(importlib.metadata.version('udsstream'))"
    assert in_clean(clean, tmp_path, "python", "-c", metadata).stdout == f"{udsstream.__version__}\n"
    assert in_clean(clean, tmp_path, "udsstream", "--version").stdout == f"udsstream {udsstream.__version__}\n"


def test_the_changelog_has_this_version_and_keeps_its_form():
    """Keep a Changelog 1.1.0: newest first, each with its date, and what is to come on top."""
    changelog = (ROOT / "docs" / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## (.*)$", changelog, flags=re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    released = [re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - \d{4}-\d\d-\d\d", heading) for heading in headings[1:]]
    assert all(released)
    numbers = [tuple(map(int, match.groups())) for match in released if match]
    assert numbers == sorted(set(numbers), reverse=True)
    assert numbers[0] == tuple(map(int, udsstream.__version__.split(".")[:3])), (
        "make a release, or take the version back"
    )
    kinds = set(re.findall(r"^### (.*)$", changelog, flags=re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(dist):
    (wheel,) = dist.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == files_below(PACKAGE) | {"udsstream/demo/demo.yaml"}
    assert {"udsstream/report/style.css", "udsstream/py.typed"} <= held


@pytest.mark.slow
def test_the_source_distribution_holds_the_project_and_no_junk(dist):
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    expected = {"pyproject.toml", "README.md", "LICENSE", "Makefile", "mkdocs.yml", ".ci/run"}
    for folder in ("udsstream", "tests", "docs", "pipelines"):
        expected |= files_below(ROOT / folder)
    assert expected <= held
    assert held - expected == {"PKG-INFO", ".gitignore"}
    assert not [name for name in held for junk in JUNK if junk in f"/{name}"]


@pytest.mark.slow
def test_the_wheel_works_where_there_is_no_checkout(clean, tmp_path):
    done = in_clean(clean, tmp_path, "python", "-c", "import udsstream; print(udsstream.__file__)")
    assert Path(done.stdout.strip()).is_relative_to(clean.parent), done.stdout + done.stderr
    (tmp_path / "runs").mkdir()
    numpy_run.finished(tmp_path / "runs" / "a")
    done = in_clean(clean, tmp_path, "udsstream", "audit", "runs/a")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "internally consistent" in done.stdout
    done = in_clean(clean, tmp_path, "udsstream", "report", "runs/a", "--no-text")  # needs its style sheet
    assert done.returncode == 0, done.stdout + done.stderr
    assert "<style>" in (tmp_path / "runs" / "a" / "report.html").read_text()
    recipe = "from udsstream.demo.main import recipe; print(recipe().is_file(), recipe())"
    done = in_clean(clean, tmp_path, "python", "-c", recipe)
    assert done.stdout.startswith("True "), done.stdout + done.stderr
    assert Path(done.stdout.split()[1]).is_relative_to(clean.parent)


def imported_names() -> dict[str, str]:
    """What the package imports from outside of it and of the standard library, with one file that does."""
    found: dict[str, str] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for module in modules:
                top = module.partition(".")[0]
                if top and top != "udsstream" and top not in sys.stdlib_module_names:
                    found[top] = path.relative_to(ROOT).as_posix()
    return found


def declared() -> set[str]:
    """Distributions that pyproject.toml asks for in every installation, and those that an extra of Composer's brings."""

    def name_of(requirement: str) -> str:
        return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()  # type: ignore[index]

    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", text, flags=re.MULTILINE | re.DOTALL)
    assert listed is not None
    names = {name_of(requirement) for requirement in re.findall(r'^ +"(.*?)"', listed[1], flags=re.MULTILINE)}
    asked = re.search(r'"mosaicml\[(.*?)\]', listed[1])
    assert asked is not None
    for requirement in importlib.metadata.requires("mosaicml") or ():
        if any(re.search(rf"extra == ['\"]{extra}['\"]", requirement) for extra in asked[1].split(",")):
            names.add(name_of(requirement))
    return names


BROUGHT = {
    "accelerate": "peft",
    "jinja2": "torch",
    "safetensors": "transformers",
    "tokenizers": "transformers",
    "xxhash": "mosaicml-streaming",
    "yaml": "omegaconf",
}
"""Imported, and not asked for but by something that is: by which distribution."""
EXTRAS = {"cryptography": "attest", "gguf": "demo"}
"""Imported by a function that an extra of pyproject.toml is for."""


def test_what_is_imported_is_declared():
    homes = {
        name: {home.lower().replace("_", "-") for home in importlib.metadata.packages_distributions().get(name, ())}
        for name in imported_names()
    }
    asked = declared()
    assert {name for name, found in homes.items() if not found & asked} == BROUGHT.keys() | EXTRAS.keys()
    for name, distribution in BROUGHT.items():
        assert distribution in asked
        brings = {re.match(r"[\w.-]+", line)[0].lower() for line in importlib.metadata.requires(distribution) or ()}  # type: ignore[index]
        assert homes[name] & brings, f"{distribution} does not bring {name} any more"
    text = (ROOT / "pyproject.toml").read_text()
    for name, extra in EXTRAS.items():
        assert re.search(rf'^{extra} = \["{name}\b', text, flags=re.MULTILINE), name
