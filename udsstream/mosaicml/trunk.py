"""A model cut in two: the trunk, whose hidden states are scored, and the head, which is never run on them.

    b rows of a scoring microbatch, N columns, D hidden width, V vocabulary

The trunk is whatever runs before the head: the model is called as in training, and a hook on the head takes what was about to enter it
and stops the call there. So no logits are made, and a model needs no particular structure but a head that is a module. (`trunk=` names
a module to take the *output* of instead, for a head that is not called as a module.)

That the head's formula (`udsstream/scoring/lm_head.py`) is what the model does with these hidden states is not assumed but checked, once,
on one candidate, against the model's own logits: `choose_form`.

Sharded parameters (FSDP2) are gathered and let go by the forward itself, which must therefore come to its end: the head is run then, on one
token of each row alone.

What is not here: finding the head's module and reading its weight (`head_module.py`).
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from udsstream.errors import ModelError
from udsstream.mosaicml.head_module import find_head, head_version, named_module, read_head, vocab_size_of
from udsstream.mosaicml.sharding import check_sharding, is_sharded, release
from udsstream.scoring.lm_head import LMHead

__all__ = ["ModelParts", "ScoringForm", "choose_form", "neutral"]

log = logging.getLogger(__name__)

Form = Literal["hidden_space", "vocabulary_slices", "logits"]

_CHECKED_TOKENS = 64
"""Tokens of the one candidate that the self-check builds logits for."""


class _ReachedHead(Exception):
    """Ends a forward that has shown its hidden states."""


@dataclass(frozen=True, kw_only=True)
class ScoringForm:
    """How candidates are scored with this model, and how well that agrees with the model's own logits."""

    form: Form
    scale: float = 1.0
    softcap: float | None = None
    relative_error: float | None = None
    """Frobenius distance of the head's formula from the model's logits, relative to the logits. None: could not be compared."""

    def __str__(self) -> str:
        details = [f"logit scale {self.scale:g}"] if self.scale != 1.0 else []
        details += [f"soft cap {self.softcap:g}"] if self.softcap is not None else []
        if self.relative_error is None:
            details.append("not compared with the model's logits")
        else:
            details.append(f"differs from the model's logits by {self.relative_error:.1e} relative")
        return f"{self.form} ({', '.join(details)})"


class ModelParts:
    """A Composer model, its head, and the place where its hidden states are taken.

    Args:
        model: the unwrapped model (not DDP's wrapper): called as `model(batch)`.
        head: dotted name of the head's module. None: the first `get_output_embeddings()` among the model's modules (Hugging Face).
        trunk: dotted name of a module whose output holds the hidden states (B, N, D). None: the head's input is taken.

    Raises:
        ModelError: a named module does not exist, no head is found, or the model is sharded in a way that cannot be scored.
    """

    def __init__(self, model: nn.Module, *, head: str | None = None, trunk: str | None = None) -> None:
        check_sharding(model)
        self.model = model
        self.is_sharded = is_sharded(model)
        """Whether the parameters are sharded over the ranks: then every forward is a collective, and so is reading the head."""
        self.head_module = named_module(model, head, "head") if head is not None else find_head(model)
        self._trunk = named_module(model, trunk, "trunk") if trunk is not None else None
        self._config = next((m.config for m in model.modules() if hasattr(m, "config")), None)
        if getattr(self._config, "is_encoder_decoder", False):
            raise ModelError(
                f"{type(self._config).__name__} is of an encoder-decoder model, whose logits are of other tokens than its input_ids; only "
                "decoders that predict their own input's next token can be scored"
            )

    @property
    def vocab_size(self) -> int:
        """V: rows of the head's weight."""
        return vocab_size_of(self.head_module)

    def hidden_states(self, batch: Mapping[str, Any]) -> Tensor:
        """The final hidden states (b, N, D) as they enter the head. Nothing after the trunk is computed.

        Raises:
            ModelError: the forward ended without passing the head.
        """
        seen: list[Tensor] = []
        try:
            with self._hooked(seen, then="shrink" if self.is_sharded else "stop"):
                self.model(self._without_cache(batch))
        except _ReachedHead:
            pass
        finally:
            if self.is_sharded:
                release(self.model)
        if seen:
            return seen[-1]
        raise ModelError(
            f"the model's forward ended without calling its {'trunk' if self._trunk is not None else 'head'} "
            f"({type(self._trunk or self.head_module).__name__}) as a module, so its hidden states could not be taken; name a module whose "
            "output they are with trunk="
        )

    def hidden_states_and_logits(self, batch: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """Both from one whole forward; None for what it does not show."""
        seen: list[Tensor] = []
        with self._hooked(seen, then="go on"):
            output = self.model(self._without_cache(batch))
        if self.is_sharded:
            release(self.model)
        return (seen[-1] if seen else None), _logits_of(output)

    def head(self, form: ScoringForm) -> LMHead:
        """The head's weight as it is now, adapters included.

        Raises:
            ModelError: the head is of a kind whose weight cannot be read as a matrix.
        """
        return read_head(self.head_module, scale=form.scale, softcap=form.softcap)

    def head_version(self) -> Hashable:
        """Changes whenever the head's weight does; None when it trains, since not every optimizer announces its writes."""
        return head_version(self.head_module)

    def declared_scaling(self) -> list[tuple[float, float | None]]:
        """(scale, soft cap) pairs to try, what the model's configuration declares first, none at all last."""
        scales = [1.0]
        logit_scale = getattr(self._config, "logit_scale", None)  # Cohere, MPT
        if isinstance(logit_scale, str):  # MPT's "inv_sqrt_d_model": the model has the number
            numbers = (getattr(module, "logit_scale", None) for module in self.model.modules())
            logit_scale = next((number for number in numbers if isinstance(number, float)), None)
        if isinstance(logit_scale, (int, float)) and logit_scale:
            scales.insert(0, float(logit_scale))
        logits_scaling = getattr(self._config, "logits_scaling", None)  # Granite divides
        if isinstance(logits_scaling, (int, float)) and logits_scaling:
            scales.insert(0, 1.0 / float(logits_scaling))
        cap = getattr(self._config, "final_logit_softcapping", None)  # Gemma 2
        caps = [float(cap), None] if isinstance(cap, (int, float)) and cap else [None]
        return list(dict.fromkeys((scale, cap) for scale in scales for cap in caps))

    def _without_cache(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        # A Hugging Face model in eval mode fills a key-value cache that nobody reads, unless it is told not to.
        accepts = getattr(self.model, "model_forward_args", ())
        batch = {**batch, "use_cache": False} if "use_cache" in accepts else batch
        if self.is_sharded and "labels" in accepts:
            # Nobody reads the loss, which the model could not compute for one token of a row.
            return {key: value for key, value in batch.items() if key != "labels"}
        return batch

    @contextlib.contextmanager
    def _hooked(self, seen: list[Tensor], *, then: Literal["stop", "shrink", "go on"]) -> Iterator[None]:
        """Puts the hidden states (b, N, D) into `seen`; then stops, runs the head on one token of each row, or goes on."""

        def enters_head(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else next(iter(kwargs.values()))
            if not hidden.is_floating_point():  # a head that is the input embedding too (MPT) embeds tokens first
                return None
            if self._trunk is None:
                take(hidden)
            if then != "shrink":
                return None
            return (
                ((hidden[:, -1:], *args[1:]), kwargs) if args else (args, kwargs | {next(iter(kwargs)): hidden[:, -1:]})
            )

        def take(hidden: Tensor) -> None:
            seen.append(hidden)
            if then == "stop":
                raise _ReachedHead

        handles = [self.head_module.register_forward_pre_hook(enters_head, with_kwargs=True)]
        if self._trunk is not None:
            handles.append(self._trunk.register_forward_hook(lambda _module, _args, output: take(_hidden_of(output))))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def choose_form(parts: ModelParts, batch: Mapping[str, Any]) -> ScoringForm:
    """Finds out, on the first row of a right-padded batch, how this model's logits come from its hidden states.

    Runs the model once on at most 64 tokens, with its head, and compares its logits with the head's formula: as the model's
    configuration declares it (scale, soft cap), then plain. The first that agrees is taken; if none does, candidates are scored from the
    model's own logits. A model whose logits cannot be seen is taken at its configuration's word, with a warning.

    Raises:
        ModelError: the head's weight cannot be read and the model shows no logits either.
    """
    real = int(batch["attention_mask"][0].sum())
    n = min(real, _CHECKED_TOKENS)
    width = batch["input_ids"].shape[1]
    one = {
        key: value[:1, :n] if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == width else value
        for key, value in batch.items()
    }
    hidden, logits = parts.hidden_states_and_logits(one)
    shown = logits if logits is not None else hidden
    if shown is not None and shown.shape[1] != n:
        raise ModelError(
            f"the model makes {shown.shape[1]} {'logits' if logits is not None else 'hidden states'} of {n} tokens, but one for each is "
            "needed: virtual tokens (prompt tuning, p-tuning) cannot be told from a sample's own. Prefix tuning and LoRA can be scored"
        )
    readable = True
    try:
        parts.head(ScoringForm(form="hidden_space"))
    except ModelError as error:
        if logits is None:
            raise
        log.warning("%s Candidates are scored from the model's own logits, N×V values each.", error)
        readable = False
    if logits is None:
        scale, softcap = parts.declared_scaling()[0]
        form = ScoringForm(
            form="hidden_space" if softcap is None else "vocabulary_slices", scale=scale, softcap=softcap
        )
        log.warning(
            "The model's forward returns no logits (B, N, V), so it could not be checked that they are what its head makes of its hidden "
            "states. Scoring goes on as %s.",
            form,
        )
        return form
    best = float("inf")
    if readable and hidden is not None:
        half = logits.dtype in (torch.bfloat16, torch.float16) or hidden.dtype in (torch.bfloat16, torch.float16)
        tolerance = 3e-2 if half else 2e-3  # 2e-3 leaves room for TF32
        for scale, softcap in parts.declared_scaling():
            trial = ScoringForm(
                form="hidden_space" if softcap is None else "vocabulary_slices", scale=scale, softcap=softcap
            )
            head = parts.head(trial)
            if head.vocab_size != logits.shape[-1] or hidden.shape[:-1] != logits.shape[:-1]:
                continue  # ProphetNet's head makes logits of one of several predictions
            error = _relative_error(head, hidden[0], logits[0])
            best = min(best, error)
            if error <= tolerance:
                return ScoringForm(form=trial.form, scale=scale, softcap=softcap, relative_error=error)
        log.warning(
            "The model's logits are not what its head makes of its hidden states (the closest formula differs by %.1e relative, "
            "allowed are %.0e). Candidates are scored from the model's own logits, N×V values each; if the model's head is another "
            "module, name it with head=.",
            best,
            tolerance,
        )
    return ScoringForm(form="logits", relative_error=0.0)


def _relative_error(head: LMHead, hidden: Tensor, logits: Tensor) -> float:
    """Frobenius distance of the head's formula from the model's logits (N, V), relative to these.

    With a shard each rank looks at its own candidate and its own rows, and all get the same number. A collective then.
    """
    first = 0 if head.shard is None else head.shard.start
    shown = logits[:, first : first + head.weight.shape[0]].float()
    formula = head.logits(hidden) if head.weight.shape[0] else shown
    squares = torch.stack([(formula - shown).square().sum(), shown.square().sum()])
    distance, size = head.add_up(squares).tolist()
    return (distance / max(size, 1e-60)) ** 0.5


@contextlib.contextmanager
def neutral(model: nn.Module) -> Iterator[None]:
    """Runs a block in eval mode, without gradients, and puts back every module's mode and every global generator's state.

    What `torch.compile` compiled runs as it was written: a forward that ends at the head, with other lengths at each step, would be traced
    again and again, and its graphs would take the places that the training's graphs have (dynamo keeps 8 of a function).
    """
    # The flags themselves, not model.eval(): some modules do more than set a flag in train() and eval() (loralib merges its adapters),
    # a user may keep others in eval mode for good, and with thousands of adapter modules the calls would cost as much as the scores.
    training = [module for module in _modules_of(model) if module.training]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
        ):
            for module in training:
                object.__setattr__(module, "training", False)
            yield
    finally:
        for module in training:
            object.__setattr__(module, "training", True)
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _modules_of(model: nn.Module) -> list[nn.Module]:
    """`list(model.modules())` in another order, in a quarter of its time: LoRA makes thousands of modules, looked through at every step."""
    found = {model: None}
    modules = [model]
    for module in modules:  # grows while it is gone through
        for child in module._modules.values():
            if child is not None and child not in found:
                found[child] = None
                modules.append(child)
    return modules


def _hidden_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and "last_hidden_state" in output:
        return output["last_hidden_state"]
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise ModelError(f"the trunk's output is a {type(output).__name__} in which no hidden states (B, N, D) were found")


def _logits_of(output: Any) -> Tensor | None:
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, (tuple, list)):
        output = next((part for part in output if isinstance(part, Tensor) and part.ndim == 3), None)
    return output if isinstance(output, Tensor) and output.ndim == 3 else None
