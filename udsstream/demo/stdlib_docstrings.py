"""A real instruction data set that every machine with Python already has: its standard library's docstrings.

Owns reading the sources (never importing them), making pairs of them and writing the pairs as MDS shards:

    OUT/train/<package>/     one stream per top-level package or module: json, argparse, …
    OUT/held_out/            pairs that are in no stream, spread evenly over the library, to judge a model by
    OUT/dataset.json         written last: what was made, from which Python, what was left out and why

A pair's prompt is the source of a function, method, class or module without any docstring in it (the nested ones go too,
or a class in the training set would hold the answers for its held-out methods); its response is the docstring that the
source had. Both are kept within a few hundred characters (`Limits`): with SmolLM2's chat template all pairs of Python
3.10 to 3.13 have at most 483 tokens and 93% at most 256, half of them at most 120. Left out: tests, installed packages,
pairs that occur twice (the second time).

The same Python gives the same bytes. Another Python gives another data set: figures made with it are not comparable.
The text is the Python Software Foundation's (PSF licence); it is read on the user's machine and not redistributed.
"""

from __future__ import annotations

import ast
import inspect
import os
import platform
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from udsstream.demo.once import build_once
from udsstream.errors import ConfigError

__all__ = ["COLUMNS", "MARKER", "BuildReport", "DocstringPair", "Limits", "Skipped", "build", "ensure", "pairs"]

COLUMNS = {"prompt": "str", "response": "str", "module": "str", "qualname": "str"}
"""Columns of every shard."""

MARKER = "dataset.json"
"""Written last into a finished data set."""

_BUILDER = 1  # raise it when the same Python gives other bytes
_LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_SMALLEST_PACKAGE_TO_HOLD_OUT_FROM = 8  # pairs: a smaller stream would lose too much of itself

_Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module


@dataclass(frozen=True, kw_only=True)
class DocstringPair:
    """One function, method, class or module and its docstring."""

    package: str
    """Top-level package or module: the stream."""
    module: str
    """Dotted name."""
    qualname: str
    """Name within the module, as `__qualname__`; empty for the module itself."""
    prompt: str
    """One line of instruction and the source without docstrings."""
    response: str
    """The docstring, dedented and stripped."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Which pairs are worth having, in characters (4 of this text make one SmolLM2 token)."""

    max_prompt_chars: int = 900
    """Above it, the source is too long for a small model on two cores."""
    min_response_chars: int = 20
    """Below it, the docstring hardly says anything."""
    max_response_chars: int = 500

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} must be a whole number of characters, at least 1")
        if self.min_response_chars > self.max_response_chars:
            raise ConfigError(
                f"min_response_chars={self.min_response_chars} is above max_response_chars={self.max_response_chars}: no "
                "pair could be kept"
            )


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A file that could not be read, or a documented thing that was left out."""

    module: str
    qualname: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What is in a data set, and what is not."""

    out: Path
    reused: bool
    """Whether it was there already."""
    pairs: int
    """For training: held-out pairs not counted."""
    held_out: int
    streams: Mapping[str, int] = field(repr=False)
    """Training pairs of each stream, by its name."""
    skipped_files: Mapping[str, str] = field(repr=False)
    """Module -> why its source could not be read."""
    left_out: Mapping[str, int]
    """Documented things that made no pair, counted by reason."""
    python: str

    @property
    def train(self) -> Mapping[str, Path]:
        """The folder of each stream."""
        return {name: self.out / "train" / name for name in self.streams}


# Reading


def pairs(
    *, root: Path | None = None, limits: Limits | None = None, skipped: list[Skipped] | None = None
) -> Iterator[DocstringPair]:
    """The pairs of the library in `root` (default: the running Python's), by path, then by line.

    What is not yielded is appended to `skipped` with its reason. Raises `ConfigError` when there are no sources at all.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else Path(root)
    limits = Limits() if limits is None else limits
    skipped = [] if skipped is None else skipped
    seen: set[tuple[str | None, str]] = set()
    paths = _source_paths(root)
    if not paths:
        raise ConfigError(
            f"the Python library in {root} has no .py files to read docstrings from (a zipped or byte-compiled Python?); "
            "run the demo with another Python"
        )
    for path in paths:
        module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        try:
            source = _decode((root / path).read_bytes())
            found = list(_documented(source))
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = f"{type(error).__name__}: {str(error).replace(str(root / path), path.as_posix())}"
            skipped.append(Skipped(module=module, qualname="", reason=reason))
            continue
        for qualname, prompt, response in found:
            reason = _reason_to_leave_out(prompt, response, limits)
            if reason is None and (prompt, response) in seen:
                reason = "the same pair occurred before"
            if reason is not None or prompt is None:
                skipped.append(Skipped(module=module, qualname=qualname or "<module>", reason=str(reason)))
                continue
            seen.add((prompt, response))
            package = module.partition(".")[0]
            yield DocstringPair(package=package, module=module, qualname=qualname, prompt=prompt, response=response)


def _source_paths(root: Path) -> list[Path]:
    """Relative paths of the library's sources, in an order that no file system or locale has a say in."""
    found = []
    for folder, names, files in os.walk(root):
        # A folder that is no identifier (config-3.12-…, lib-dynload) is no package.
        names[:] = [name for name in names if name.isidentifier() and name not in _LEFT_OUT]
        here = Path(folder).relative_to(root)
        found += [here / name for name in files if name.endswith(".py") and name[:-3].isidentifier()]
    return sorted(found, key=lambda path: path.parts)


def _decode(data: bytes) -> str:
    """Source text as Python reads it: declared encoding, no byte order mark, line feeds only."""
    encoding, _ = tokenize.detect_encoding(BytesIO(data).readline)
    return data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def _documented(source: str) -> Iterator[tuple[str, str | None, str]]:
    """(qualname, prompt, response) of all that has a docstring, by line; the prompt is None where it cannot be cut out.

    Lines are sliced by the parser's numbers: `ast.get_source_segment` splits the whole file anew for each node.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's code
        tree = ast.parse(source)
    lines = source.split("\n")  # not splitlines(): the parser does not end a line at a form feed
    nodes = sorted(_walk(tree, ""), key=lambda item: _first_line(item[1]))
    docstrings = [(node, node.body[0]) for _, node, _ in nodes if ast.get_docstring(node, clean=False) is not None]
    alone = {statement.lineno: len(node.body) == 1 for node, statement in docstrings}
    spans = {statement.lineno: statement for _, statement in docstrings}
    for qualname, node, kind in nodes:
        response = ast.get_docstring(node, clean=False)
        if response is None:
            continue
        first, last = _first_line(node), getattr(node, "end_lineno", None) or len(lines)
        code = _without_docstrings(lines, first, last, spans, alone)
        prompt = None if code is None else f"Write the docstring of this Python {kind}.\n\n{code}"
        yield qualname, prompt, inspect.cleandoc(response)


def _walk(node: ast.AST, prefix: str, in_class: bool = False) -> Iterator[tuple[str, _Documented, str]]:
    """(qualname, node, kind) of the module and of each function, method and class in it."""
    if isinstance(node, ast.Module):
        yield "", node, "module"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + child.name, child, "method" if in_class else "function"
            yield from _walk(child, f"{prefix}{child.name}.<locals>.")
        elif isinstance(child, ast.ClassDef):
            yield prefix + child.name, child, "class"
            yield from _walk(child, f"{prefix}{child.name}.", in_class=True)
        elif isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            yield from _walk(child, prefix, in_class)


def _first_line(node: _Documented) -> int:
    """1-based; a decorator belongs to what it decorates."""
    if isinstance(node, ast.Module):
        return 1
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _without_docstrings(
    lines: Sequence[str], first: int, last: int, spans: Mapping[int, ast.stmt], alone: Mapping[int, bool]
) -> str | None:
    """Lines `first` to `last` without the docstrings among them and without their own indentation.

    None when a docstring shares its line with code (`def f(): "…"`): cutting within a line is not worth its bugs.
    """
    kept: list[str] = []
    number = first
    while number <= last:
        statement = spans.get(number)
        if statement is None:
            kept.append(lines[number - 1])
            number += 1
            continue
        assert statement.end_lineno is not None
        assert statement.end_col_offset is not None
        indent = lines[number - 1][: statement.col_offset]
        # The parser counts columns in UTF-8 bytes.
        rest = lines[statement.end_lineno - 1].encode()[statement.end_col_offset :].decode().strip()
        if indent.strip() or (rest and not rest.startswith("#")):
            return None
        number = statement.end_lineno + 1
        if alone[statement.lineno]:
            kept.append(f"{indent}...")
        else:
            while number <= last and not lines[number - 1].strip():
                number += 1  # the empty line that set the docstring off
    indent = lines[first - 1][: len(lines[first - 1]) - len(lines[first - 1].lstrip())]
    return "\n".join(line.removeprefix(indent).rstrip() for line in kept).strip("\n")


def _reason_to_leave_out(prompt: str | None, response: str, limits: Limits) -> str | None:
    if prompt is None:
        return "a docstring shares its line with code"
    if len(response) < limits.min_response_chars:
        return f"docstring shorter than {limits.min_response_chars} characters"
    if len(response) > limits.max_response_chars:
        return f"docstring longer than {limits.max_response_chars} characters"
    if len(prompt) > limits.max_prompt_chars:
        return f"source longer than {limits.max_prompt_chars} characters"
    if any("\ud800" <= char <= "\udfff" for char in response):
        return "docstring that is no valid Unicode"  # "\ud800" in a docstring that is not raw: no UTF-8 for it
    return None


# Writing


def build(out: Path, *, held_out: int = 64, root: Path | None = None, limits: Limits | None = None) -> BuildReport:
    """Writes the data set into the folder `out`, which must be empty or absent, without a marker; a few seconds.

    `held_out` pairs, spread evenly, are kept from training: only such as share neither source nor docstring with
    another, and only from packages with enough pairs. Raises `ConfigError` when there are not that many.
    """
    from streaming import MDSWriter

    out = Path(out)
    skipped: list[Skipped] = []
    every = list(pairs(root=root, limits=limits, skipped=skipped))
    chosen = _choose_held_out(every, held_out)
    streams: dict[str, list[DocstringPair]] = {}
    for i, pair in enumerate(every):
        if i not in chosen:
            streams.setdefault(pair.package, []).append(pair)
    folders = {out / "train" / name: content for name, content in streams.items()}
    if chosen:
        folders[out / "held_out"] = [every[i] for i in sorted(chosen)]
    for folder, content in folders.items():
        # Raw shards: they can be opened in place and their hashes checked without unpacking.
        with MDSWriter(out=str(folder), columns=COLUMNS, hashes=["sha1", "xxh64"]) as writer:
            for pair in content:
                writer.write({name: getattr(pair, name) for name in COLUMNS})
    files = {entry.module: entry.reason for entry in skipped if not entry.qualname}
    return BuildReport(
        out=out,
        reused=False,
        pairs=len(every) - len(chosen),
        held_out=len(chosen),
        streams={name: len(content) for name, content in streams.items()},
        skipped_files=files,
        left_out=dict(sorted(Counter(entry.reason for entry in skipped if entry.qualname).items())),
        python=_python(),
    )


def ensure(out: Path, *, held_out: int = 64, root: Path | None = None, limits: Limits | None = None) -> BuildReport:
    """The data set in `out`, built unless it is there, complete, from this Python and of these settings.

    An interrupted build leaves nothing under the name `out` and is begun anew. Raises as `build`, and `ConfigError` when
    `out` holds something else.
    """
    limits = Limits() if limits is None else limits
    library = str(sysconfig.get_paths()["stdlib"] if root is None else root)
    key = {"builder": _BUILDER, "python": _python(), "library": library, "held_out": held_out, **asdict(limits)}

    def write(folder: Path) -> dict[str, Any]:
        report = asdict(build(folder, held_out=held_out, root=root, limits=limits))
        return {name: value for name, value in report.items() if name not in ("out", "reused")}

    report, reused = build_once(Path(out), marker=MARKER, key=key, build=write)
    return BuildReport(out=Path(out), reused=reused, **report)


def _python() -> str:
    return f"{platform.python_implementation()} {platform.python_version()}"


def _choose_held_out(every: Sequence[DocstringPair], count: int) -> set[int]:
    """Indices of `count` pairs at equal distances among those that may be held out."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ConfigError(f"held_out={count!r} must be a whole number of pairs, at least 0")
    prompts, responses = Counter(pair.prompt for pair in every), Counter(pair.response for pair in every)
    packages = Counter(pair.package for pair in every)
    able = [
        i
        for i, pair in enumerate(every)
        if prompts[pair.prompt] == responses[pair.response] == 1
        and packages[pair.package] >= _SMALLEST_PACKAGE_TO_HOLD_OUT_FROM
    ]
    # At most every second one, so that no stream is emptied.
    if count > len(able) // 2:
        raise ConfigError(
            f"held_out={count} of {len(every)} pairs is too much: {len(able)} share neither source nor docstring with "
            f"another and come from packages of {_SMALLEST_PACKAGE_TO_HOLD_OUT_FROM} pairs or more, and half of these "
            f"({len(able) // 2}) is the most that can be held out"
        )
    return {able[(2 * k + 1) * len(able) // (2 * count)] for k in range(count)}
