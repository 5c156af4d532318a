"""What several commands need of their arguments."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import typer

from udsstream.errors import UdsstreamError
from udsstream.untrusted_text import clean

__all__ = ["complaint", "is_rank_zero", "stream_places"]


def complaint(error: UdsstreamError) -> str:
    """An error as it is printed: it may quote what others wrote, so none of its further lines begins where one of ours does."""
    return re.sub(r"\n(?! )", "\n  ", clean(f"udsstream: {type(error).__name__}: {error}"))


def stream_places(given: Sequence[str] | None) -> dict[str, str]:
    """`--stream NAME=PATH`, repeated: where streams are now, by their names."""
    places = {}
    for text in given or ():
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise typer.BadParameter(f"{text!r} is not NAME=PATH, such as train=/data/train", param_hint="--stream")
        places[name] = path
    return places


def is_rank_zero() -> bool:
    """Whether this process is the one that prints (launchers such as `composer` and torchrun set RANK)."""
    return os.environ.get("RANK", "0") == "0"
