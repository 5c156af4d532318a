"""Text that others wrote, made fit to be shown: names, ids and samples come from the log and its streams, and are not trusted."""

from __future__ import annotations

import html
import re

__all__ = ["Shortened", "clean", "clean_line", "escape", "in_markup", "shorten"]

# Control characters but line break and tab, marks that reverse the direction of what follows, halves of surrogate pairs
# (which UTF-8 cannot hold) and the two code points that XML forbids.
_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def clean(text: str) -> str:
    """The text with every character that would not be seen, or would change how others are seen, written as its number (`\\u202e`)."""
    return _UNSHOWABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text.replace("\r\n", "\n"))


def clean_line(text: str) -> str:
    """The same on one line: nobody's name begins a line that looks like one of ours."""
    return clean(text).replace("\n", "\\u000a")


def in_markup(text: object) -> str:
    """A name on one line, for rich: its brackets are brackets, and no markup."""
    from rich.markup import escape

    return escape(clean_line(str(text)))


def escape(value: object) -> str:
    """A value as HTML text or as an attribute's value within quotes."""
    return html.escape(clean(str(value)), quote=True)


class Shortened(str):
    """A text that was cut; `left_out` is how many characters are missing at its end."""

    left_out: int

    def __new__(cls, text: str, left_out: int = 0) -> Shortened:
        self = super().__new__(cls, text)
        self.left_out = left_out
        return self


def shorten(text: str, *, characters: int, lines: int = 1_000_000) -> Shortened:
    """The text's beginning: at most so many characters and lines."""
    kept = text[:characters]
    if kept.count("\n") >= lines:
        kept = "\n".join(kept.split("\n")[:lines])
    return Shortened(kept, len(text) - len(kept))
