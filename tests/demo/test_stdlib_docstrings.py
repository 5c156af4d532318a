"""Docstrings to pairs to shards: what is cut out of the source, what is left out, and that it is the same every time."""

from __future__ import annotations

import ast
import hashlib
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from udsstream.demo import stdlib_docstrings as sd
from udsstream.demo.stdlib_docstrings import DocstringPair, Limits, Skipped, build, ensure, pairs
from udsstream.errors import ConfigError

STDLIB = Path(sysconfig.get_paths()["stdlib"])
WIDE = Limits(max_prompt_chars=10_000, min_response_chars=1, max_response_chars=10_000)
HEAD = "Write the docstring of this Python {}.\n\n"


def library(root: Path, **files: str | bytes) -> Path:
    for name, content in files.items():
        path = root / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def read(root: Path, source: str | bytes) -> dict[str, tuple[str, str]]:
    """qualname -> (prompt, response) of one module."""
    skipped: list[Skipped] = []
    found = {
        p.qualname: (p.prompt, p.response) for p in pairs(root=library(root, m=source), limits=WIDE, skipped=skipped)
    }
    assert skipped == []
    return found


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(folder: Path) -> list[dict]:
    from streaming import LocalDataset

    data = LocalDataset(local=str(folder))
    return [data[i] for i in range(len(data))]


@pytest.fixture
def small(tmp_path):
    """Three real packages: enough to write, quick to read."""
    root = tmp_path / "lib"
    for name in ("json", "logging", "wsgiref"):
        shutil.copytree(STDLIB / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(STDLIB / "argparse.py", root / "argparse.py")
    return root


# What is cut out


def test_a_function_loses_its_docstring(tmp_path):
    source = (
        '@cache\n@wraps(g)\nasync def f(x):\n    """Adds one.\n\n    To x.\n    """\n\n    # why\n    return x + 1\n'
    )
    expected = "@cache\n@wraps(g)\nasync def f(x):\n    # why\n    return x + 1"
    assert read(tmp_path, source) == {"f": (HEAD.format("function") + expected, "Adds one.\n\nTo x.")}


def test_a_docstring_alone_leaves_a_body(tmp_path):
    source = 'class E(ValueError):\n    "An error."  # said\n\n\nx = 1\n'
    assert read(tmp_path, source) == {"E": (HEAD.format("class") + "class E(ValueError):\n    ...", "An error.")}


def test_a_method_loses_its_indentation_and_a_class_the_docstrings_of_its_methods(tmp_path):
    source = (
        'class A:\n    """A thing."""\n    def f(self):\n        """Does it."""\n        return """\nraw\n"""\n\n'
        '    class B:\n        def g(self):\n            "Only said."\n'
    )
    found = read(tmp_path, source)
    assert found == {
        "A": (
            HEAD.format("class")
            + 'class A:\n    def f(self):\n        return """\nraw\n"""\n\n    class B:\n        def g(self):\n            ...',
            "A thing.",
        ),
        "A.f": (HEAD.format("method") + 'def f(self):\n    return """\nraw\n"""', "Does it."),
        "A.B.g": (HEAD.format("method") + "def g(self):\n    ...", "Only said."),
    }


def test_a_module_loses_all_docstrings(tmp_path):
    source = '#!/usr/bin/python\n"""A module."""\n\nimport x\n\ndef f():\n    """Does it."""\n    return 1\n'
    found = read(tmp_path, source)
    assert found[""] == (HEAD.format("module") + "#!/usr/bin/python\nimport x\n\ndef f():\n    return 1", "A module.")


def test_functions_are_found_wherever_a_statement_can_stand(tmp_path):
    source = (
        "def f():\n    def g():\n        'In a function.'\n        return 0\n    return g\n"
        "try:\n    import x\nexcept ImportError:\n    def h():\n        'In a handler.'\n        return 0\n"
        "else:\n    if True:\n        for i in x:\n            with i:\n                def k():\n                    'Deep.'\n"
        "match x:\n    case 1:\n        def m():\n            'In a case.'\n"
        "class A:\n    if True:\n        def n(self):\n            'A method all the same.'\n"
    )
    found = read(tmp_path, source)
    assert {name: response for name, (_, response) in found.items()} == {
        "f.<locals>.g": "In a function.",
        "h": "In a handler.",
        "k": "Deep.",
        "m": "In a case.",
        "A.n": "A method all the same.",
    }
    assert found["A.n"][0].startswith(HEAD.format("method"))
    assert found["f.<locals>.g"][0].startswith(HEAD.format("function"))


@pytest.mark.parametrize(
    "source", ["def f(): 'One line.'\n", "def f():\n    '日本日本日本日本'; return 0\n", "def é(): 'é'\n"]
)
def test_a_docstring_that_shares_its_line_is_left_out_and_counted(tmp_path, source):
    skipped: list[Skipped] = []
    assert list(pairs(root=library(tmp_path, m=source), limits=WIDE, skipped=skipped)) == []
    assert [(s.module, s.reason) for s in skipped] == [("m", "a docstring shares its line with code")]


@pytest.mark.parametrize(
    ("source", "response"),
    [
        ("\ufeffdef f():\n    'naïve 日本'\n    return 0\n", "naïve 日本"),
        ("# -*- coding: latin-1 -*-\ndef f():\n    'naïve'\n    return 0\n".encode("latin-1"), "naïve"),
        ("def f():\r\n    '''one\r\n\r\n    two'''\r\n    return 0\r\n", "one\n\ntwo"),
        ("def f():\r    '''one\r\r    two'''\r    return 0\r", "one\n\ntwo"),
        ("x = 1\n\f\ndef f():\n    'after a form feed'\n    return 0\n", "after a form feed"),
        ("x = 'a\x1cb\x85\u2028'\ndef f():\n    'after odd separators'\n    return 0\n", "after odd separators"),
        ("def f():\n\n    # said\n    'a' 'b'\n    return 0\n", "ab"),
        ("def f():\n    'back\\\nslash \\d'\n    return 0\n", "backslash \\d"),
        ("def f():\n    'no line feed at the end'\n    return 0", "no line feed at the end"),
        ("def f():\n    ('''in\n    brackets''')\n    return 0\n", "in\nbrackets"),
    ],
)
def test_encodings_and_line_ends(tmp_path, source, response):
    prompt, found = read(tmp_path, source)["f"]
    assert found == response
    code = prompt.removeprefix(HEAD.format("function"))
    assert ast.get_docstring(ast.parse(code).body[0]) is None  # pyright: ignore
    assert code.startswith("def f():\n")
    assert code.endswith("return 0")
    assert "\r" not in prompt


def _skips(root: Path, limits: Limits = WIDE) -> list[Skipped]:
    skipped: list[Skipped] = []
    list(pairs(root=root, limits=limits, skipped=skipped))
    return skipped


# What is left out


def test_tests_and_installed_packages_are_not_read(tmp_path):
    source = "def {0}():\n    'Docstring of {0}.'\n    return 0\n"
    names = ["a", "p__x", "p__sub__y", "test__b", "p__test__c", "p__tests__d", "p__idle_test__e", "site-packages__f"]
    names += ["config-3-x86__g", "dist-packages__h", "not-a-module"]
    root = library(tmp_path, **{name: source.format(name.replace("-", "_")) for name in names})
    (root / "a.txt").write_text("no Python")
    library(root, p____init____=source.format("init"))
    (root / "p" / "__init__.py").write_text(source.format("init"))
    assert [(p.package, p.module) for p in pairs(root=root, limits=WIDE)] == [
        ("a", "a"),
        ("p", "p"),
        ("p", "p.sub.y"),
        ("p", "p.x"),
    ]


def test_unreadable_files_are_skipped_and_reported(tmp_path):
    root = library(
        tmp_path,
        good="def f():\n    'A docstring.'\n    return 0\n",
        syntax="def f(:\n",
        bytes_=b"# -*- coding: utf-8 -*-\nx = '\xff'\n",
        unknown="# -*- coding: klingon -*-\n",
        nul="x = 1\0\n",
        deep="x = " + "(" * 5000 + ")" * 5000 + "\n",
    )
    (root / "gone.py").symlink_to(root / "nowhere.py")
    skipped: list[Skipped] = []
    assert [p.module for p in pairs(root=root, limits=WIDE, skipped=skipped)] == ["good"]
    assert [entry.module for entry in skipped] == ["bytes_", "deep", "gone", "nul", "syntax", "unknown"]
    assert all(entry.qualname == "" and "Error" in entry.reason for entry in skipped)
    assert str(tmp_path) not in "".join(entry.reason for entry in skipped)


def test_lengths(tmp_path):
    body = "def f{0}():\n    '{1}'\n    return {2}\n"
    limits = Limits(max_prompt_chars=80, min_response_chars=5, max_response_chars=10)
    prompt = HEAD.format("function") + "def f0():\n    return "
    room = 80 - len(prompt)
    cases = [
        ("x" * 4, "0"),
        ("x" * 5, "0"),
        ("x" * 10, "0"),
        ("x" * 11, "0"),
        ("yyyyy", "1" * room),
        ("y" * 6, "1" * (room + 1)),
    ]
    root = library(tmp_path, m="".join(body.format(i, *case) for i, case in enumerate(cases)))
    skipped: list[Skipped] = []
    assert [p.qualname for p in pairs(root=root, limits=limits, skipped=skipped)] == ["f1", "f2", "f4"]
    assert [(entry.qualname, entry.reason) for entry in skipped] == [
        ("f0", "docstring shorter than 5 characters"),
        ("f3", "docstring longer than 10 characters"),
        ("f5", "source longer than 80 characters"),
    ]


def test_a_pair_counts_once(tmp_path):
    source = "def f():\n    'A docstring.'\n    return 0\n"
    root = library(tmp_path, a=source, b=source)
    assert [p.module for p in pairs(root=root, limits=WIDE)] == ["a"]
    assert _skips(root) == [Skipped(module="b", qualname="f", reason="the same pair occurred before")]


def test_a_lone_surrogate_is_left_out(tmp_path):
    root = library(tmp_path, m="def f():\n    'odd \\ud800'\n    return 0\n")
    assert [s.reason for s in _skips(root)] == ["docstring that is no valid Unicode"]


def test_no_sources(tmp_path):
    with pytest.raises(ConfigError, match=rf"in {tmp_path} has no .py files .* run the demo with another Python"):
        list(pairs(root=tmp_path))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_prompt_chars": 0}, "max_prompt_chars=0 must be a whole number"),
        ({"min_response_chars": True}, "min_response_chars=True must be"),
        ({"max_response_chars": 1.5}, "max_response_chars=1.5 must be"),
        ({"min_response_chars": 9, "max_response_chars": 8}, "min_response_chars=9 is above max_response_chars=8"),
    ],
)
def test_impossible_limits(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        Limits(**kwargs)


# Order


def test_the_order_is_by_path_and_line_whatever_the_file_system_says(small, monkeypatch):
    expected = list(pairs(root=small))
    assert len(expected) > 100
    walk = os.walk

    def shuffled(root):
        for folder, names, files in walk(root):
            random.Random(3).shuffle(names)
            random.Random(4).shuffle(files)
            yield folder, names, files

    monkeypatch.setattr(sd.os, "walk", shuffled)
    assert list(pairs(root=small)) == expected
    assert list(dict.fromkeys(p.package for p in expected)) == ["argparse", "json", "logging", "wsgiref"]
    lines = [p.qualname for p in expected if p.module == "json.decoder"]
    source = (small / "json" / "decoder.py").read_text()
    # The class stands before its methods, and they are in the order of the file.
    assert lines == sorted(lines, key=lambda name: source.index(f" {name.rpartition('.')[2]}("))


# Writing


def test_what_is_written_is_what_was_read(small, tmp_path):
    out = tmp_path / "out"
    report = build(out, root=small, held_out=7)
    every = list(pairs(root=small))
    names = ("prompt", "response", "module", "qualname")
    written = [row for folder in report.train.values() for row in rows(folder)]
    held_out = rows(out / "held_out")
    key = [tuple(row[name] for name in names) for row in written + held_out]
    assert sorted(key) == sorted(tuple(getattr(p, name) for name in names) for p in every)
    assert len(held_out) == report.held_out == 7
    assert report.pairs == len(written) == len(every) - 7
    assert set(report.streams) == {"argparse", "json", "logging", "wsgiref"}
    for name, folder in report.train.items():
        assert len(rows(folder)) == report.streams[name]
        assert all(row["module"].split(".")[0] == name for row in rows(folder))
    assert {row["response"] for row in held_out}.isdisjoint(row["response"] for row in written)
    assert len({row["module"].split(".")[0] for row in held_out}) >= 2  # spread out
    assert (out / "train" / "json" / "index.json").read_text().count('"xxh64"') >= 1
    assert report.skipped_files == {}
    assert sum(report.left_out.values()) == len([s for s in _skips(small, Limits()) if s.qualname])


def test_the_same_python_gives_the_same_bytes(small, tmp_path):
    first, second = ensure(tmp_path / "a", root=small), ensure(tmp_path / "b", root=small)
    assert digest(first.out) == digest(second.out)
    assert sd.MARKER in digest(first.out)
    assert not first.reused


def test_it_is_reused_only_when_it_is_the_same(small, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = ensure(out, root=small)
    again = ensure(out, root=small)
    assert again.reused
    assert (again.pairs, again.streams, again.left_out) == (first.pairs, first.streams, first.left_out)
    assert not ensure(out, root=small, held_out=3).reused
    assert not ensure(out, root=small, held_out=3, limits=Limits(max_prompt_chars=500)).reused
    monkeypatch.setattr(sd.platform, "python_version", lambda: "3.99.0")
    assert ensure(out, root=small, held_out=3, limits=Limits(max_prompt_chars=500)).python.endswith("3.99.0")
    assert ensure(out, root=small, held_out=3, limits=Limits(max_prompt_chars=500)).reused


def test_an_interrupted_build_is_begun_anew(small, tmp_path, monkeypatch):
    import streaming

    class Interrupted(streaming.MDSWriter):
        def write(self, sample):
            if sample["module"].startswith("wsgiref"):
                raise KeyboardInterrupt
            super().write(sample)

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "MDSWriter", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            ensure(tmp_path / "out", root=small)
    assert not (tmp_path / "out").exists()
    assert ensure(tmp_path / "out", root=small).pairs > 100


@pytest.mark.parametrize("held_out", [-1, True, 2.0])
def test_an_impossible_number_to_hold_out(small, tmp_path, held_out):
    with pytest.raises(ConfigError, match=r"held_out=.* must be a whole number of pairs, at least 0"):
        build(tmp_path / "out", root=small, held_out=held_out)


def test_too_many_to_hold_out(small, tmp_path):
    with pytest.raises(
        ConfigError, match=r"held_out=5000 of \d+ pairs is too much: \d+ share neither source nor docstring"
    ):
        ensure(tmp_path / "out", root=small, held_out=5000)
    assert not (tmp_path / "out").exists()


def test_nothing_held_out(small, tmp_path):
    report = build(tmp_path / "out", root=small, held_out=0)
    assert report.held_out == 0
    assert not (tmp_path / "out" / "held_out").exists()


def pair(package: str, i: int, response: str | None = None, prompt: str | None = None) -> DocstringPair:
    name = f"{package} {i}"
    return DocstringPair(
        package=package, module=package, qualname=f"f{i}", prompt=prompt or name, response=response or name
    )


def test_held_out_pairs_are_spread_and_share_nothing():
    every = [pair("big", i) for i in range(100)] + [pair("tiny", i) for i in range(7)]
    every += [pair("same", i, "the same words") for i in range(50)]
    every += [pair("source", i, None, "the same source") for i in range(50)]
    assert sd._choose_held_out(every, 10) == {5, 15, 25, 35, 45, 55, 65, 75, 85, 95}
    assert len(sd._choose_held_out(every, 50)) == 50
    with pytest.raises(ConfigError, match=r"half of these \(50\) is the most"):
        sd._choose_held_out(every, 51)


def test_modules_are_read_and_not_imported(tmp_path):
    root = library(tmp_path, json="raise SystemExit('imported')\n\ndef f():\n    'A docstring.'\n    return 0\n")
    assert [p.response for p in pairs(root=root, limits=WIDE)] == ["A docstring."]
    code = "import sys; from udsstream.demo.stdlib_docstrings import pairs; n = sum(1 for _ in pairs()); print('turtle' in sys.modules, n)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("False ")


@pytest.mark.slow
def test_the_whole_library(tmp_path):
    """Also under another hash seed and locale, in another process: the same bytes."""
    begin = time.perf_counter()
    report = ensure(tmp_path / "a")
    seconds = time.perf_counter() - begin
    assert 4_000 < report.pairs < 9_000
    assert len(report.streams) > 130
    assert report.held_out == 64
    assert seconds < 60  # 3 s when the machine has nothing else to do
    held_out = rows(report.out / "held_out")
    assert len({row["module"].split(".")[0] for row in held_out}) > 25
    trained = {row["prompt"] for folder in report.train.values() for row in rows(folder)}
    assert not any(row["prompt"] in trained for row in held_out)
    assert not any(row["response"] in prompt for row in held_out for prompt in trained if len(row["response"]) > 40)
    for p in pairs():
        ast.parse(p.prompt.partition("\n\n")[2])
    code = "from pathlib import Path; from udsstream.demo.stdlib_docstrings import ensure; ensure(Path({!r}))"
    env = os.environ | {"PYTHONHASHSEED": "7", "LC_ALL": "C", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", code.format(str(tmp_path / "b"))], env=env, check=True)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
