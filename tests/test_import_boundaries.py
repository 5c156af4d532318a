"""Each layer, imported in a fresh process, loads nothing that it must not know."""

from __future__ import annotations

import ast
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import udsstream

ROOT = Path(udsstream.__file__).parent
HEAVY = {
    "torch",
    "composer",
    "streaming",
    "pyarrow",
    "transformers",
    "peft",
    "numpy",
    "pandas",
    "matplotlib",
    "omegaconf",
    "pydantic",
}
SCORING = {"composer", "streaming", "pyarrow", "transformers", "peft", "udsstream.selection_log", "udsstream.mosaicml"}
LOG = {"torch", "composer", "streaming", "transformers", "peft", "udsstream.scoring", "udsstream.mosaicml"}

OUR_TRAINERS = {f"udsstream.{name}" for name in ("mosaicml.algorithm", "mosaicml.replay", "pipeline")}
OURS = {
    f"udsstream.{name}"
    for name in ("scoring", "selection_log", "mosaicml", "audit", "report", "curate", "ingest", "pipeline", "sft")
}


def modules_of(package: str) -> list[str]:
    folder = ROOT.parent / package.replace(".", "/")
    return [package, *(f"{package}.{found.name}" for found in pkgutil.iter_modules([str(folder)]))]


def loaded_by(statement: str) -> set[str]:
    """Names in sys.modules after the statement, in a fresh process."""
    code = f"import sys\n{statement}\nimport json\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def trespassers(loaded: set[str], forbidden: set[str]) -> set[str]:
    """Forbidden modules among those loaded, submodules included."""
    return {name for name in loaded if any(name == bad or name.startswith(f"{bad}.") for bad in forbidden)}


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        (["udsstream"], HEAVY),
        (["udsstream.config", "udsstream.errors", "udsstream.job_folder"], HEAVY),
        (modules_of("udsstream.cli"), HEAVY),
        (modules_of("udsstream.scoring"), SCORING),
        (modules_of("udsstream.selection_log"), LOG),
        (modules_of("udsstream.audit"), LOG),
        (modules_of("udsstream.report"), LOG | {"matplotlib"}),
        (modules_of("udsstream.curate"), LOG | {"webdataset", "datasets", "pandas"}),
        # (composer.trainer comes with `import composer`.)
        (modules_of("udsstream.hf_trainer"), {"composer.algorithms", *OUR_TRAINERS}),
        (modules_of("udsstream.ingest"), {"composer", "peft", "datasets", "pandas", *OURS - {"udsstream.ingest"}}),
    ],
    ids=[
        "udsstream",
        "config and errors",
        "cli",
        "scoring",
        "selection_log",
        "audit",
        "report",
        "curate",
        "hf trainer",
        "ingest",
    ],
)
def test_a_layer_loads_nothing_that_it_must_not_know(modules, forbidden):
    assert trespassers(loaded_by("\n".join(f"import {name}" for name in modules)), forbidden) == set()


def test_the_layers_have_the_modules_that_are_checked():
    assert "udsstream.scoring.scorer" in modules_of("udsstream.scoring")
    assert "udsstream.selection_log.schema" in modules_of("udsstream.selection_log")


@pytest.mark.parametrize(
    ("statement", "forbidden", "found"),
    [
        ("import udsstream.scoring.scorer", HEAVY, "torch"),
        ("import json, udsstream\nudsstream.SelectionConfig\nimport numpy.linalg", HEAVY, "numpy.linalg"),
        ("import udsstream.selection_log.schema", {"pyarrow"}, "pyarrow"),
    ],
)
def test_the_check_can_fail(statement, forbidden, found):
    assert found in trespassers(loaded_by(statement), forbidden)


def test_config_and_errors_import_only_the_standard_library_and_each_other():
    for name in ("__init__", "config", "errors"):
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        lazy = {id(inner) for node in tree.body if isinstance(node, ast.If) for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if id(node) in lazy:  # under TYPE_CHECKING
                continue
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in imported:
                top = module.split(".")[0]
                assert top in sys.stdlib_module_names or module in ("udsstream.config", "udsstream.errors"), module


def test_public_names_are_resolved_on_first_use():
    assert "torch" not in loaded_by(
        "import udsstream\ndir(udsstream)\nudsstream.SelectionConfig\nudsstream.__version__"
    )
    with pytest.raises(AttributeError, match=r"has no attribute 'Nothing'; it has Candidates, OnlineBatchSelection"):
        _ = udsstream.Nothing
    for name in udsstream.__all__:
        assert name in dir(udsstream)
        assert getattr(udsstream, name) is not None


def test_the_oracles_import_nothing_of_what_they_judge():
    tree = ast.parse((Path(__file__).parent / "oracles.py").read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or ".").split(".")[0])
        elif isinstance(node, ast.Call):
            assert getattr(node.func, "id", "") not in ("__import__", "eval", "exec")
    assert imported == {"__future__", "collections", "hashlib", "math", "numpy", "torch"}
