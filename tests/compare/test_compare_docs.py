"""docs/comparing.md holds what it says: its configuration is one, its columns and its arithmetic are those of the table."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from comparisons import finished_run, settings_of

from udsstream.compare.arithmetic import t_test
from udsstream.compare.config import CompareConfig, load_compare_config, plan_runs
from udsstream.compare.table import as_markdown, compare_runs

PAGE = (Path(__file__).parent.parent.parent / "docs" / "comparing.md").read_text()
WHOLE, ANSWERS = re.findall(r"^```yaml\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_the_configuration_is_one(tmp_path):
    (tmp_path / "mine.yaml").write_text(WHOLE)
    config = load_compare_config(tmp_path / "mine.yaml")
    runs = plan_runs(config)
    assert len(runs) == 15
    grouped = next(run for run in runs if run.entry == "uds-grouped")
    assert grouped.config.data.length_group_batches == 8
    with_answers = config.model_dump() | yaml.safe_load(ANSWERS)
    assert CompareConfig(**with_answers).answers is not None


def test_every_column_is_explained_and_no_other():
    config = CompareConfig(**settings_of(Path("out"), "m", Path("d"), seeds=[1]))
    finished = [
        finished_run(entry, 1, losses=[2.0, 1.0], tokens=[0, 10], accuracy=0.5) for entry in ("random", "longest")
    ]
    table = as_markdown(compare_runs(config, plan_runs(config), finished)).splitlines()[2]
    columns = {cell.strip() for cell in table.strip("|").split("|")} - {"entry", "seeds"}
    columns = {re.sub(r"^− random(,| at).*", "", column) for column in columns} - {
        ""
    }  # differences of columns that are explained
    (section,) = re.findall(r"^## The table\n(.*?)^## ", PAGE, flags=re.MULTILINE | re.DOTALL)
    explained = {
        name
        for line in re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE)
        for name in re.findall(r"`(.*?)`", line)
    }
    assert explained == columns


def test_how_large_a_difference_of_three_seeds_must_be():
    """t with 2 degrees of freedom has the distribution function 1/2 + t / (2 √(2 + t²)): Student 1908."""
    t = 4.30
    assert 2 * (1 - (0.5 + t / (2 * math.sqrt(2 + t * t)))) == pytest.approx(0.05, abs=2e-4)
    assert t / math.sqrt(3) == pytest.approx(2.5, abs=0.03)
    assert "about 2.5 times its ±" in PAGE


def p_of_factor(n: int, factor: float) -> float | None:
    """The p-value of n differences whose mean is `factor` times their standard deviation."""
    values = np.arange(n) - (n - 1) / 2
    return t_test((values / values.std(ddof=1) + factor).tolist())


def test_how_large_other_differences_must_be():
    assert p_of_factor(5, 1.24) == pytest.approx(0.05, abs=2e-4)
    assert "with five, 1.24 times" in PAGE
    assert p_of_factor(3, 9.3) == pytest.approx(0.05 / 13, rel=0.01)
    assert "of thirteen differences the first must be 9 times its ±" in PAGE
