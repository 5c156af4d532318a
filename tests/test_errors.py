"""The exception tree: what is exported, what is drawn in the docstring and what is defined are the same."""

from __future__ import annotations

import inspect
import re

import pytest

from udsstream import errors

DEFINED = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, BaseException) and value.__module__ == errors.__name__
}


def test_exported_names_are_the_exceptions_defined():
    assert errors.__all__ == sorted(DEFINED)


def drawn_tree() -> dict[str, str | None]:
    """name → its parent, read from the docstring's drawing."""
    parents: dict[str, str | None] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"^    ((?:│   |    )*(?:[├└]── )?)(\w+)", line)
        if found:
            depth = len(found[1]) // 4
            path[depth:] = [found[2]]
            parents[found[2]] = path[depth - 1] if depth else None
    return parents


def test_the_docstring_draws_the_tree():
    actual = {
        name: None if name == "UdsstreamError" else error.__bases__[0].__name__ for name, error in DEFINED.items()
    }
    assert drawn_tree() == actual


def test_the_docstring_names_the_builtin_families():
    for line in (errors.__doc__ or "").splitlines():
        found = re.search(r"(\w+Error) .*\((\w+Error)\)$", line)
        if found:
            assert [base.__name__ for base in DEFINED[found[1]].__bases__][1:] == [found[2]]
    families = {name: [base.__name__ for base in error.__bases__[1:]] for name, error in DEFINED.items()}
    assert {name: family for name, family in families.items() if family} == {
        "ConfigError": ["ValueError"],
        "DataError": ["ValueError"],
        "ModelError": ["ValueError"],
        "ScoreError": ["ArithmeticError"],
        "ResumeError": ["RuntimeError"],
        "RankError": ["RuntimeError"],
        "ReplayError": ["RuntimeError"],
        "OutputExistsError": ["RuntimeError"],
        "OutputWriteError": ["RuntimeError"],
        "AttestationError": ["ValueError"],
    }


@pytest.mark.parametrize("name", sorted(DEFINED))
def test_every_error_can_be_caught_as_the_base_and_says_what_it_is(name):
    error = DEFINED[name]
    assert issubclass(error, errors.UdsstreamError)
    assert (error.__doc__ or "").endswith(".")
    assert str(error("what happened")) == "what happened"
