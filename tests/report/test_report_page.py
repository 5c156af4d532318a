"""The page: whole and well formed for every kind of run, its numbers those of the log, nothing of the log taken for HTML."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import uds_log
from test_report_figures import pearson
from text_runs import Page, pairs, write_run, write_stream
from typer.testing import CliRunner

from udsstream import cli
from udsstream.audit.report import Anchor, AuditReport, Finding
from udsstream.errors import ConfigError, LogError, ResumeError
from udsstream.report import page as page_module
from udsstream.report import plots
from udsstream.report.figures import StreamChoice, measure
from udsstream.report.page import BEGINNING, Content, flatten, render, top_streams
from udsstream.report.samples import pick
from udsstream.report.write import write_report
from udsstream.selection_log.reader import SelectionLog
from udsstream.selection_log.writer import SelectionLogWriter
from udsstream.untrusted_text import clean, escape, shorten

STYLE = Path(page_module.__file__).with_name("style.css").read_text()
SECTIONS = ["In numbers", "What was chosen", "Over the run", "Samples", "Settings", "How the figures were made"]
PLOTS = ["scores", "length", "over-steps-score", "over-steps-intra", "over-steps-inter", "novelty", "tokens", "time"]
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&lt;$x^2$\u202ebad\x00\ud800"
"""What a hostile log or stream may hold. (UTF-8 cannot hold the half of a pair at the end, but JSON can.)"""


@pytest.fixture
def streams(tmp_path) -> dict[str, Path]:
    return {name: write_stream(tmp_path / name, pairs(name, count)) for name, count in (("cats", 30), ("dogs", 17))}


@pytest.fixture
def run(tmp_path, streams) -> tuple[Path, list[dict]]:
    rows = write_run(tmp_path / "run", streams)
    return tmp_path / "run", rows


def checked(html: str) -> Page:
    """The page taken apart, after what must hold of every page."""
    page = Page(html)
    assert page.mistakes == []
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        assert tag not in ("script", "img", "iframe", "object", "embed", "link", "base", "form"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name != "src", tag
            if name in ("href", "xlink:href"):
                assert value in [f"#{i}" for i in ids], value
            for reference in re.findall(r"url\(([^)]*)\)", value or ""):
                assert reference.removeprefix("#") in ids, reference
            if name in ("aria-labelledby", "aria-describedby"):
                assert set(value.split()) <= set(ids)
        if tag == "svg":
            assert attributes["role"] == "img"
            assert "aria-labelledby" in attributes
        if tag == "th":
            assert attributes.get("scope") in ("row", "col")
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), levels
    assert "url(" not in STYLE
    assert "@import" not in STYLE
    policy = next(a["content"] for t, a in page.elements if t == "meta" and a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    return page


def tiles(page: Page) -> dict[str, str]:
    values = [text for path, text in page.texts if path[-3:] == ("div", "dd", "span")]
    return dict(zip(page.inside("dt"), values, strict=False))


def test_a_report_has_everything_and_its_numbers_are_the_logs(run):
    root, rows = run
    written = write_report(root)
    html = written.path.read_text(encoding="utf-8")
    assert written.path == root / "report.html"
    assert (written.bytes, written.bytes < 300_000) == (len(html.encode()), True)
    page = checked(html)
    assert page.inside("h2") == ["Audit:", *SECTIONS]
    assert [a["aria-labelledby"] for t, a in page.elements if t == "svg"] == [f"{name}-title" for name in PLOTS]
    assert {"Run 3f6c0a9b7d2e", "Model tiny", "Started 2026-11-24 03:00 UTC", "Streams 2"} <= set(
        re.findall(r"(?:Run|Model|Streams) \S+|Started \S+ \S+ UTC", page.text)
    )

    kept = [row for row in rows if row["selected"]]
    offered, trained = (sum(row["tokens"] for row in part) for part in (rows, kept))
    correlation = pearson([row["score"] for row in rows], [row["tokens"] for row in rows])
    found = tiles(page)
    assert found["Steps"] == "12"
    assert found["Candidates"] == str(len(rows)) == "96"
    assert found["Chosen"] == str(len(kept)) == "24"
    assert found["Tokens saved"] == f"{(offered - trained) / offered:.0%}"
    assert found["Choosing took"] == f"{sum(0.5 + s / 4 for s in range(11)) / sum(2.0 + s for s in range(11)):.0%}"
    assert found["Score and length"] == f"{correlation:+.2f}"
    assert f"trained on {trained:,} of {offered:,}" in page.text
    assert "in 2 epochs" in page.text
    assert "written 4.0 times over (24 embeddings)" in page.text
    assert "1 step has no times" in page.text
    for number, name in enumerate(("cats", "dogs")):
        own = [row for row in rows if row["stream"] == number]
        chosen = sum(row["selected"] for row in own)
        cells = f"{name} {len(own)} {chosen} {chosen / len(own):.0%} {len(own) / 96:.1%} {chosen / 24:.1%}".split()
        assert cells in [row.split() for row in table_rows(html)]
    medians = {step: np.median([row["score"] for row in rows if row["step"] == step]) for step in range(12)}
    assert all(f"{median:.4g}" in page.text for median in medians.values())


def table_rows(html: str) -> list[str]:
    return [" ".join(re.sub("<[^>]*>", " ", row).split()) for row in re.findall("<tr>(.*?)</tr>", html)]


def test_the_same_log_gives_the_same_bytes(run, tmp_path):
    first, again = (write_report(run[0], out=tmp_path / name).path.read_bytes() for name in ("a.html", "b.html"))
    assert first == again


def test_another_log_gives_other_plots(run, tmp_path, streams):
    write_run(tmp_path / "other", streams, steps=9)
    first, other = (
        write_report(root, out=tmp_path / "x.html").path.read_text() for root in (run[0], tmp_path / "other")
    )
    svgs = [re.findall("<svg.*?</svg>", html) for html in (first, other)]
    assert len(svgs[0]) == len(svgs[1]) == len(PLOTS)
    assert all(a != b for a, b in zip(*svgs, strict=True))


def test_texts_are_shown_shortened_or_left_out(run, streams):
    root, rows = run
    page = checked(write_report(root).path.read_text())
    best = max((row for row in rows if row["selected"]), key=lambda row: row["score"])
    name, number = ("cats", best["sample_id"]) if best["stream"] == 0 else ("dogs", best["sample_id"] - 30)
    assert f"{name} asks {number}" in page.inside("pre")
    assert f"{best['tokens']} tokens" in page.text
    without = checked(write_report(root, text=False).path.read_text())
    assert "asks" not in without.text
    assert "The text of the samples was left out." in without.text
    assert page.inside("h3")[0] == without.inside("h3")[0]


def test_a_long_text_is_cut_where_it_can_be_seen(tmp_path, streams):
    streams["cats"] = write_stream(tmp_path / "long", [{"text": f"{i} " + "x" * 5000} for i in range(40)])
    write_run(tmp_path / "run", streams)
    page = checked(write_report(tmp_path / "run").path.read_text())
    assert f"({5002 - 700:,} more characters)" in page.text or f"({5003 - 700:,} more characters)" in page.text
    assert max(len(text) for text in page.inside("pre")) <= 702


def test_nothing_of_a_log_or_its_text_is_taken_for_html(tmp_path):
    evil = EVIL.replace("\ud800", "")
    turns = json.dumps([{"role": EVIL, "content": EVIL}])
    folder = write_stream(
        tmp_path / "s", [{"prompt": f"{evil} {i}", EVIL[:8]: evil, "messages": turns} for i in range(40)]
    )
    write_run(
        tmp_path / "run",
        {evil: folder},
        run_id=evil,
        created=evil,
        model={"name": evil, evil: evil},
        selection={"method": evil},
        versions=[evil, {evil: [evil]}],
        extra={evil: {evil: evil}},
    )
    html = write_report(tmp_path / "run").path.read_text(encoding="utf-8")
    page = checked(html)
    for bad in ("<script", "<img", "\u202e", "\x00", "\ud800"):
        assert bad not in html
    assert "<script>alert(1)</script>" in page.text
    assert "\\u202ebad\\u0000\\ud800" in page.text
    assert any("onerror=alert(2)" in shown for shown in page.inside("pre"))
    titles = [text for path, text in page.texts if "svg" not in path and path[-1:] == ("title",)]
    assert titles == ["Selection report, run <script>aler"]


@pytest.mark.parametrize(
    ("settings", "says", "plots_missing"),
    [
        ({"method": "random"}, "which the method “random” does not use", {"over-steps-intra", "over-steps-inter", "novelty"}),
        ({"steps": 3, "off": (0, 1, 2)}, "No step was scored", {"scores", "length", *(n for n in PLOTS if "over" in n), "novelty"}),
        ({"off": (0, 3)}, "10 with a choice, the others were trained on whole", set()),
        ({"streams": False}, "(no stream)", set()),
        ({"ranks": 3}, "Ranks 3", set()),
        ({"resume_at": 5, "checkpoints": (2,)}, "12", set()),
        ({"steps": 1}, "There are no times of steps", set()),
        ({"embeddings": "full"}, "times over", set()),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_every_kind_of_run(tmp_path, settings, says, plots_missing):
    root = uds_log.write(tmp_path / "run", **dict(settings))
    page = checked(write_report(root).path.read_text())
    assert says in page.text
    assert page.inside("h2")[1:] == SECTIONS
    drawn = {a["aria-labelledby"].removesuffix("-title") for t, a in page.elements if t == "svg"}
    assert drawn == set(PLOTS) - {"time"} - plots_missing


def test_a_run_without_streams_or_settings(tmp_path):
    root = uds_log.write(tmp_path / "run", streams=False)
    run = json.loads((root / "run.json").read_text())
    page = checked(render(Content(run={"log": run["log"]}, audit="no audit", figures=measure(SelectionLog.open(root)))))
    assert "The run names no streams." in page.text
    assert "Not audited No audit." in page.text


def test_an_empty_and_an_unfinished_log(tmp_path):
    writer = SelectionLogWriter.create(tmp_path, run=uds_log.run(), embeddings="none")
    page = checked(write_report(tmp_path).path.read_text())
    assert "The log has no decisions yet." in page.text
    uds_log.append(writer, 0, 4)
    page = checked(write_report(tmp_path).path.read_text())
    assert tiles(page)["Steps"] == "4"
    writer.close()


def test_a_damaged_log_has_a_page_that_says_so(tmp_path):
    root = uds_log.write(tmp_path / "run")
    segment = next((root / "selection").rglob("*.arrow"))
    content = bytearray(segment.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    segment.write_bytes(content)
    page = checked(write_report(root).path.read_text())
    assert "The decisions cannot be read" in page.text
    assert re.search(r"Audit: \d+ findings?", page.text)


def report(**changes) -> AuditReport:
    findings = changes.pop("findings", ())
    given = {
        "run_id": "r", "steps": 3, "rows": 9, "attempts": 1, "findings": findings, "checked": ("did `this`",),
        "unchecked": ("not that",), "anchored": False,
    }  # fmt: skip
    return AuditReport(**(given | changes))


def test_the_verdict_is_shown(tmp_path):
    run = {"run_id": "r"}
    page = checked(render(Content(run=run, audit=report(), figures="x")))
    assert "Audit: Nothing was found" in page.text
    assert "Internally consistent; no anchor was given" in page.text
    assert "What was not checked (1) Not that. What was checked (1) Did this." in page.text
    assert "this" in page.inside("code")

    findings = tuple(Finding(check="top-k", message=f"<b>{i}</b> is wrong", step=i, rank=0) for i in range(9))
    bad = report(findings=(*findings, Finding(check="chain", message="broken")), found={"top-k": 9000, "chain": 1})
    html = render(Content(run=run, audit=bad, figures="x"))
    page = checked(html)
    assert "Audit: 9,001 findings" in page.text
    assert "top-k <b>3</b> is wrong." in page.text
    assert "<b>4</b> is wrong" not in page.text
    assert "… and 8,996 more of top-k" in page.text
    assert "chain Broken." in page.text
    assert 'class="verdict bad"' in html

    anchor = Anchor(source="given", step=3, root="ab" * 32, found=True)
    page = checked(render(Content(run=run, audit=report(anchored=True, anchor=anchor), figures="x")))
    assert "Audit: Intact relative to the anchor" in page.text


def test_the_checkpoint_must_be_one(run, tmp_path):
    with pytest.raises(ResumeError):
        write_report(run[0], checkpoint=tmp_path / "none.pt")


def test_the_command(run, tmp_path, streams):
    root = run[0]
    done = CliRunner().invoke(cli.app, ["report", str(root)])
    assert done.exit_code == 0, done.output
    assert re.match(rf"{re.escape(str(root))}/report\.html \(\d+ kB\)\. Audit: ", done.output)
    shutil.move(streams["cats"], tmp_path / "moved")
    arguments = [
        "report",
        str(root),
        "--out",
        str(tmp_path / "r.html"),
        "--stream",
        f"cats={tmp_path / 'moved'}",
        "--samples",
        "1",
    ]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    page = checked((tmp_path / "r.html").read_text())
    assert page.text.count("No text:") == 0
    assert sum(t == "article" for t, _ in page.elements) == len(pick(SelectionLog.open(root), per_kind=1))
    assert CliRunner().invoke(cli.app, ["report", str(root), "--no-text"]).exit_code == 0
    assert "cats asks" not in (root / "report.html").read_text()
    assert CliRunner().invoke(cli.app, ["report", str(root), "--stream", "cats"]).exit_code == 2


def test_what_cannot_be_written_or_read(run, tmp_path):
    root = run[0]
    for place in (root / "run.json", root):
        before = place.read_bytes() if place.is_file() else None
        with pytest.raises(ConfigError, match="--out"):
            write_report(root, out=place)
        assert before is None or place.read_bytes() == before
    with pytest.raises(ConfigError, match=r"cannot be written to .*; name another file with --out"):
        write_report(root, out=tmp_path / "no folder" / "r.html")
    with pytest.raises(LogError):
        write_report(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="no stream named 'cows'"):
        write_report(root, streams={"cows": "x"})
    kept = write_report(root).path.read_text()
    assert kept.startswith(BEGINNING)
    assert sorted(path.name for path in root.iterdir() if "report" in path.name) == ["report.html"]


@pytest.mark.timeout(60)
def test_pipes_in_a_received_folder_are_not_waited_for(tmp_path):
    root = uds_log.write(tmp_path / "run")
    for name in ("summary.json", "timings.jsonl", "evals.jsonl"):
        os.mkfifo(root / name)
    page = checked(write_report(root).path.read_text())
    assert "timings.jsonl is not a regular file" in page.text
    (root / "report.html").unlink()
    os.mkfifo(root / "report.html")
    with pytest.raises(ConfigError, match=r"report.html is not a place for a report .*regular file.*--out"):
        write_report(root)


def test_held_out_loss_is_shown_when_the_pipeline_left_it(run):
    root = run[0]
    (root / "summary.json").write_text(json.dumps({"eval_loss_before": 3.25, "eval_loss_after": 2.5}))
    page = checked(write_report(root).path.read_text())
    assert tiles(page)["Held-out loss"] == "2.500"
    assert "3.250 before training" in page.text
    for broken in ("{", '{"eval_loss_before": null}', '{"eval_loss_before": NaN, "eval_loss_after": 1}', "[1]"):
        (root / "summary.json").write_text(broken)
        assert "Held-out" not in write_report(root).path.read_text()


def test_a_correlation_that_alarms_in_training_is_explained(run):
    figures = measure(SelectionLog.open(run[0]))
    assert figures.correlation > 0.9
    assert "close to taking the longest" in checked(write_report(run[0]).path.read_text()).text


def test_many_candidates_are_drawn_as_a_density(run, monkeypatch):
    few = plots.length_plot(measure(SelectionLog.open(run[0]))).svg
    monkeypatch.setattr(plots, "POINTS", 50)
    page = checked(write_report(run[0]).path.read_text())
    many = plots.length_plot(measure(SelectionLog.open(run[0]))).svg
    assert few.count("<use") == 96 + 0
    assert many.count("<use") == 0
    assert "mostly chosen" in page.text


def test_plots_have_the_pages_colours_and_none_of_their_own(run):
    html = write_report(run[0]).path.read_text()
    used = set(re.findall(r"(?:fill|stroke|color): ([^;\"]+)", " ".join(re.findall("<svg.*?</svg>", html))))
    assert used <= {"none", "currentColor", "var(--grid)", "var(--all)", "var(--kept)", "var(--rejected)"}
    assert {"var(--all)", "var(--kept)", "var(--rejected)", "currentColor"} <= used


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_enough_to_read(scheme):
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[:2]
    )
    assert light.keys() == dark.keys()
    colours = light if scheme == "light" else dark

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(colours[a]), luminance(colours[b])))
        return (high + 0.05) / (low + 0.05)

    for ground in ("ground", "card", "code"):
        for text in ("ink", "muted", "kept", "rejected", "bad"):
            assert contrast(text, ground) >= 4.5, (text, ground)
    assert contrast("all", "card") >= 3
    for ground in ("good", "bad"):
        for text in (ground, "ink", "muted"):
            assert contrast(text, f"{ground}-ground") >= 4.5, (text, ground)


def test_the_last_streams_are_put_together():
    streams = [StreamChoice(name=str(i), candidates=20 - i, kept=i) for i in range(12)]
    assert top_streams(streams, 11) == streams
    shown = top_streams(streams, 8)
    assert shown[:8] == streams[:8]
    assert (shown[8].name, shown[8].candidates, shown[8].kept) == ("4 others", 12 + 11 + 10 + 9, 8 + 9 + 10 + 11)


def test_settings_are_flattened():
    assert flatten({"a": {"b": 1, "c": [1, 2], "d": {}}, "e": [{"f": None}, True], "g": []}) == [
        ("a.b", "1"), ("a.c", "1, 2"), ("a.d", "none"), ("e.0.f", "none"), ("e.1", "true"), ("g", "none"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234, "1.23k"),
        (6000, "6k"),
        (999_700, "1M"),
        (2.5e9, "2.5G"),
        (-15000, "-15k"),
        (0.0512, "0.0512"),
        (999, "999"),
    ],
)
def test_short_numbers(value, text):
    assert plots.short(value) == text


def test_text_of_others():
    assert clean("a\r\nb\tc\x1b[31m\u2066x\u200fy\ufffe") == "a\nb\tc\\u001b[31m\\u2066x\\u200fy\\ufffe"
    assert escape("<a href='x\">&") == "&lt;a href=&#x27;x&quot;&gt;&amp;"
    assert (shorten("abcdef", characters=4), shorten("abcdef", characters=4).left_out) == ("abcd", 2)
    assert (shorten("a\nb\nc", characters=9, lines=2), shorten("a\nb\nc", characters=9, lines=2).left_out) == (
        "a\nb",
        2,
    )
    assert shorten("a\nb", characters=9, lines=2).left_out == 0


def test_the_commands_in_the_documentation_are_understood():
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    lines = [line.split("#")[0].split() for line in text.splitlines() if line.startswith("udsstream report ")]
    assert len(lines) == 4
    shown = CliRunner().invoke(cli.app, ["report", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    options = {word for line in lines for word in line if word.startswith("--")}
    assert options == set(re.findall(r"--(?:out|no-text|samples|checkpoint|stream)\b", shown))
