"""The settings of the selection: frozen, validated once, with a fingerprint. (The training job's are in `run_config.py`.)

Knows neither torch nor Composer: times stay strings such as "10ba" here and are read by the adapter.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from udsstream.errors import ConfigError

Method = Literal[
    "uds",
    "uds_intra",
    "uds_inter",
    "max_loss",
    "max_grad",
    "selective_backprop",
    "rho_loss",
    "greats",
    "divbs",
    "longest",
    "random",
    "full",
]
Scope = Literal["global", "rank"]
ProjectionScale = Literal["isometric", "reference"]
LengthNorm = Literal["none", "sqrt", "tokens"]
EmbeddingRecord = Literal["full", "tail", "none"]

PUBLISHED_ALPHA = 1.5e-3
"""The weight of `inter` in the authors' run script, in the units of `projection_scale="reference"`."""

MEASURES = ("intra", "inter", "loss", "grad_norm")
"""What a method of one's own may have measured of each candidate, as the log's columns are named."""

_MEASURES: dict[str, tuple[str, ...]] = {
    "uds": ("intra", "inter"),
    "uds_intra": ("intra", "inter"),
    "uds_inter": ("intra", "inter"),
    "max_loss": ("loss",),
    "max_grad": ("grad_norm",),
    "selective_backprop": ("loss",),
    "rho_loss": ("loss", "reference_loss"),
    "greats": ("alignment", "interaction"),
    "divbs": ("interaction",),
}
"""What a method measures of each candidate by a forward, as the log's columns are named; the others need none."""

_LATER = ("keep_tokens", "measured")
"""Settings that came after the first logs: left out of their record where they are not used, so that old ones still agree."""

_OWN_METHOD = re.compile(r"[\w.<>]+:[\w.<>]+")

_TIME = re.compile(r"^(\d+)(ba|ep|sp|tok)$|^(0(\.\d+)?|1(\.0+)?)dur$")


def convert_alpha(alpha: float, *, vocab_size: int, max_seq_len: int) -> float:
    """The published weight α, stated for embeddings in the units of the published code, in those of the isometric projection.

    The published transform is unnormalised, so its distances are √(T·V)/2 times longer (T: `max_seq_len`, V: `vocab_size`)
    and its α as many times smaller: `α_isometric = α_published · √(T·V) / 2`.
    """
    return alpha * math.sqrt(max_seq_len * vocab_size) / 2


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """What decides which candidates are trained on.

    Raises:
        ConfigError: a value is of the wrong type or out of range; the message lists every mistake, one per line.
    """

    method: Method | Callable[..., Any] = "uds"
    """`uds` (arXiv 2510.16882), its parts alone, and what else docs/methods.md lists; or a function of one's own from
    `udsstream.Candidates` to their scores, one each, of which the largest are kept. In a record it is `module:name`."""
    keep: float | int = 0.25
    """A float in (0, 1]: the fraction of the candidate batch that is kept (at least 1, halves rounded up). An int ≥ 1: how many."""
    keep_tokens: int | None = None
    """Instead of `keep`: of each global batch the best are kept for as long as their tokens are no more than this (one per rank at
    least, whatever its length)."""
    alpha: float | None = None
    """Weight of `inter` in `score = intra + α · inter`. None: the published 1.5e-3, converted to the units of `projection_scale`."""
    buffer_size: int = 1024
    """M: how many of the last selected embeddings the memory holds."""
    projection_dims: tuple[int, int] = (128, 8)
    """(d1, d2): rows kept on the vocabulary side and on the token side; an embedding has d1·d2 components."""
    max_seq_len: int = 2048
    """T: the longest sample, in tokens, that can be scored; the token side of the projection is drawn for it."""
    projection_scale: ProjectionScale = "isometric"
    """`isometric` preserves norms in expectation; `reference` has the scaling (and the inflated distances) of the published code."""
    length_norm: LengthNorm = "none"
    """Divides `intra` and the embedding of an N-token sample by 1, √N or N."""
    scope: Scope = "global"
    """`global`: the best of the whole candidate batch, whichever rank loaded them. `rank`: each rank keeps its share of its own candidates,
    as in the published setting; what is chosen then depends on the number of ranks."""
    start: str = "0ba"
    """Selection begins at this time: an integer with `ba`, `ep`, `sp` or `tok`, or a fraction of the run with `dur` ("0.1dur")."""
    end: str | None = None
    """Selection stops at this time (exclusive). None: never."""
    interrupt: int = 0
    """Every `interrupt`-th batch of an epoch is trained on whole. 0: none is."""
    embeddings: EmbeddingRecord = "tail"
    """Which embeddings the log keeps: all (`full`), those in the memory at each checkpoint (`tail`), or none."""
    seed: int = 17
    """Seed of the projection and of `method="random"`."""
    score_microbatch_tokens: int = 16384
    """Upper bound on rows × longest row, in tokens, of one scoring forward (a longer single sample goes alone)."""
    measured: tuple[str, ...] | None = None
    """What a method of one's own has measured. Taken from the function (`udsstream.measures`): not to be set."""

    def __post_init__(self) -> None:
        if callable(self.method) and self.measured is None:
            asked = set(getattr(self.method, "measures", ()))
            if asked & {"intra", "inter"}:
                asked |= {"intra", "inter"}  # one forward, one memory
            known = tuple(name for name in MEASURES if name in asked)
            object.__setattr__(self, "measured", known + tuple(sorted(asked - set(known))))
        mistakes = list(_mistakes(self))
        if mistakes:
            raise ConfigError(
                "the selection's settings cannot be used:\n" + "\n".join(f"  {line}" for line in mistakes)
            )
        object.__setattr__(self, "projection_dims", tuple(self.projection_dims))
        if self.measured is not None:
            object.__setattr__(self, "measured", tuple(self.measured))

    @property
    def method_name(self) -> str:
        """The method as records name it: `module:name` for one of one's own."""
        if isinstance(self.method, str):
            return self.method
        return f"{getattr(self.method, '__module__', '')}:{getattr(self.method, '__qualname__', type(self.method).__qualname__)}"

    @property
    def measures(self) -> tuple[str, ...]:
        """What the method measures of each candidate, by the names of the log's columns."""
        return self.measured if self.measured is not None else _MEASURES.get(self.method_name, ())

    @property
    def compares(self) -> bool:
        """Whether the method compares candidates with each other (greedily), instead of scoring each alone."""
        return "interaction" in self.measures

    @property
    def remembers(self) -> bool:
        """Whether the method has a memory of what was trained on."""
        return "inter" in self.measures

    @property
    def embedding_dim(self) -> int:
        """d = d1·d2: the components of one embedding."""
        return self.projection_dims[0] * self.projection_dims[1]

    def resolved_alpha(self, vocab_size: int) -> float:
        """α in the units of `projection_scale`, for a head with `vocab_size` rows."""
        if self.alpha is not None:
            return float(self.alpha)
        if self.projection_scale == "reference":
            return PUBLISHED_ALPHA
        return convert_alpha(PUBLISHED_ALPHA, vocab_size=vocab_size, max_seq_len=self.max_seq_len)

    def kept(self, candidates: int, ranks: int = 1) -> int:
        """K: how many of `candidates` are kept, `keep_tokens` apart. A count larger than an incomplete last batch keeps all of it.

        With several ranks it is the next multiple of their number, so that all train on equal shares. That full batches need no rounding
        is checked before training, so it concerns incomplete last batches alone.
        """
        if self.method == "full":
            kept = candidates
        elif isinstance(self.keep, float):
            kept = min(candidates, max(1, math.floor(self.keep * candidates + 0.5)))
        else:
            kept = min(candidates, self.keep)
        return min(-(-kept // ranks), candidates // ranks) * ranks

    def as_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        settings = fields | {"method": self.method_name, "projection_dims": list(self.projection_dims)}
        if self.measured is not None:
            settings["measured"] = list(self.measured)
        return {name: value for name, value in settings.items() if name not in _LATER or value is not None}

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of every setting that can change a decision (so not of `embeddings`)."""
        settings = self.as_dict()
        del settings["embeddings"]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def config_difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each field whose value differs: the field, what it was, what it is."""
    absent = "(absent)"
    return [
        f"{name}: was {old.get(name, absent)!r}, is {new.get(name, absent)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, absent) != new.get(name, absent)
    ]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _method_mistakes(config: SelectionConfig):
    method, measured = config.method, config.measured
    own = callable(method) or (isinstance(method, str) and _OWN_METHOD.fullmatch(method) is not None)
    if not own and method not in get_args(Method):
        yield f"method: {method!r} is none of {', '.join(get_args(Method))}, and no function"
    if not own and measured is not None:
        yield f"measured: {measured!r} is given, but the method {method!r} knows by itself what it measures; leave it out"
    if own and measured is not None:
        names = [measured] if isinstance(measured, str) else list(measured)
        for name in names:
            if name not in MEASURES:
                yield f"method: it asks for {name!r} to be measured, which is none of {', '.join(MEASURES)}"
    if config.scope == "rank" and config.keep_tokens is not None:
        yield "keep_tokens: is of the global batch, but with scope='rank' each rank chooses by itself; give keep"


def _mistakes(config: SelectionConfig):
    yield from _method_mistakes(config)
    for name, allowed in (
        ("scope", Scope),
        ("projection_scale", ProjectionScale),
        ("length_norm", LengthNorm),
        ("embeddings", EmbeddingRecord),
    ):
        value = getattr(config, name)
        if value not in get_args(allowed):
            yield f"{name}: {value!r} is none of {', '.join(get_args(allowed))}"
    for name, least in (
        ("buffer_size", 1),
        ("max_seq_len", 1),
        ("interrupt", 0),
        ("seed", 0),
        ("score_microbatch_tokens", 1),
    ):
        value = getattr(config, name)
        if not _is_int(value) or value < least:
            yield f"{name}: {value!r} is not an integer of at least {least}"
    if config.interrupt == 1:
        yield "interrupt: 1 would train on every batch whole and select nothing; 0 selects always, 2 every other batch"
    budget = config.keep_tokens
    if budget is not None and (not _is_int(budget) or budget < 1):
        yield f"keep_tokens: {budget!r} is not an integer of at least 1"
    if budget is not None and config.method == "full":
        yield "keep_tokens: the method 'full' keeps every candidate; leave it out"
    keep = config.keep
    if isinstance(keep, float):
        if not 0 < keep <= 1:
            yield f"keep: the fraction {keep!r} is not in (0, 1]; a count is given as an integer of at least 1"
    elif not _is_int(keep) or keep < 1:
        yield f"keep: {keep!r} is neither a fraction in (0, 1] nor a count of at least 1"
    alpha = config.alpha
    if alpha is not None and (
        isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha) or alpha < 0
    ):
        yield f"alpha: {alpha!r} is not a finite number of at least 0"
    dims = config.projection_dims
    if not isinstance(dims, (tuple, list)) or len(dims) != 2 or not all(_is_int(d) and d >= 1 for d in dims):
        yield f"projection_dims: {dims!r} is not a pair of positive integers (vocabulary side, token side)"
    elif _is_int(config.max_seq_len) and dims[1] > config.max_seq_len:
        yield f"projection_dims: {dims[1]} rows on the token side, but only max_seq_len={config.max_seq_len} tokens to draw them from"
    for name in ("start", "end"):
        value = getattr(config, name)
        if value is None and name == "end":
            continue
        if not isinstance(value, str) or not _TIME.fullmatch(value):
            yield f"{name}: {value!r} is not a time such as '10ba', '1ep', '5000sp', '1000000tok' or '0.1dur'"
