"""A training job from its configuration: model, loaders, selection and Composer's Trainer.

What is not here: the run's folder (`run_folder.py`), its streams and how a row becomes tokens (`candidate_rows.py`), and any choice
about scores or batches (`udsstream/mosaicml`).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer import Trainer
from composer.core import Algorithm, Callback, DataSpec, Evaluator, Event, State
from composer.loggers import Logger
from composer.metrics.nlp import LanguageCrossEntropy
from composer.models import HuggingFaceModel
from composer.optim import (
    ComposerScheduler,
    ConstantWithWarmupScheduler,
    CosineAnnealingScheduler,
    CosineAnnealingWithWarmupScheduler,
    LinearScheduler,
    LinearWithWarmupScheduler,
)
from composer.utils import dist, reproducibility
from torch.utils.data import DataLoader

from udsstream.candidate_rows import check_local_columns, collator_of, streams_of
from udsstream.errors import DataError, ModelError
from udsstream.evals import append_eval, append_resumption
from udsstream.mosaicml.algorithm import OnlineBatchSelection
from udsstream.mosaicml.dataset import UDSStreamingDataset, stream_identities, verify_shards
from udsstream.mosaicml.interruption import Interruption, ignore_interrupts
from udsstream.mosaicml.lengths import count_lengths, remembered_lengths
from udsstream.mosaicml.ranks import on_rank_zero
from udsstream.mosaicml.replay import ReplaySelection
from udsstream.mosaicml.rng_state import NeutralEvaluation
from udsstream.run_config import EvalConfig, ModelConfig, RunConfig, SchedulerConfig, ValidationConfig
from udsstream.run_folder import INITIAL_EVAL, SUMMARY, claim_folder, record_duration, write_atomically
from udsstream.sft import SFTCollator, num_tokens

__all__ = [
    "TrainingResult",
    "build_model",
    "build_trainer",
    "close",
    "eval_loss",
    "join_ranks",
    "train",
    "validation_of",
]

_EVAL_METRIC = "LanguageCrossEntropy"


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a finished run says of itself beside its log."""

    save_folder: str
    batches: int
    eval_loss_before: float | None
    """Nats per token on the held-out data, before the first step."""
    eval_loss_after: float | None


def train(config: RunConfig, interruption: Interruption | None = None) -> TrainingResult:
    """Trains, or goes on training, and writes the run's folder. With an `interruption`, Ctrl-C saves before it ends the job.

    Raises:
        LogExistsError: `save_folder` holds a run and `autoresume` is off.
        ResumeError: `autoresume` is on, but the run there was made with another configuration.
        UdsstreamError: see `udsstream.errors`.
    """
    check_local_columns(config.data, config.eval)
    folder = Path(config.save_folder)
    join_ranks(config.device)
    on_rank_zero(lambda: claim_folder(folder, config))
    interruption = interruption or Interruption()
    trainer = build_trainer(
        config,
        callbacks=[interruption, *([_HeldOutLosses(folder)] if config.eval is not None else [])],
        save_interval=interruption.saving(config.save_interval),
    )
    try:
        on_rank_zero(lambda: record_duration(folder, trainer.state.timestamp.batch.value, config.max_duration))
        before = _initial_loss(trainer, config, folder)
        if trainer.state.timestamp < config.max_duration:
            trainer.fit()
        elif config.eval is not None:  # it was interrupted between its last checkpoint and its summary
            trainer.eval()
        result = TrainingResult(
            save_folder=str(folder),
            batches=trainer.state.timestamp.batch.value,
            eval_loss_before=before,
            eval_loss_after=eval_loss(trainer) if config.eval is not None else None,
        )
    finally:
        close(trainer)
    on_rank_zero(lambda: write_atomically(folder / SUMMARY, json.dumps(asdict(result), indent=2) + "\n"))
    return result


def join_ranks(device: str | None) -> str:
    """Starts torch.distributed, where it is not running yet; the device to train on, as Composer names it.

    Before any data set is made: Streaming would otherwise start it in its own way, and now and then fail.
    """
    device = device or ("gpu" if torch.cuda.is_available() else "cpu")
    dist.initialize_dist(device)
    return device


def build_trainer(
    config: RunConfig,
    *,
    replay: ReplaySelection | None = None,
    checkpoint: Path | None = None,
    callbacks: Sequence[Callback] = (),
    save_interval: Callable[[State, Event], bool] | None = None,
) -> Trainer:
    """The Trainer of a run, with its checkpoint loaded if there is one to resume from.

    Args:
        config: the job.
        replay: trains on what its log names, instead of selecting.
        checkpoint: to begin from, whole; where there is none to resume from.
        callbacks: in addition.
        save_interval: when to save, as a Trainer takes it, instead of the configuration's.
    """
    device = join_ranks(config.device)
    reproducibility.seed_all(config.seed)
    model = build_model(config.model)
    folder = Path(config.save_folder)
    algorithms: list[Algorithm] = []
    if replay is not None:
        algorithms = [replay]
        if replay.verify:
            replay.use(**validation_of(config, model))
    elif config.selection is not None:
        settings: dict[str, Any] = config.selection | validation_of(config, model)
        algorithms = [
            OnlineBatchSelection(
                **settings,
                max_seq_len=config.max_seq_len,
                log_dir=folder,
                autoresume=config.autoresume,
            )
        ]
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.optimizer.lr,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
    )
    return Trainer(
        model=model,
        train_dataloader=_train_loader(config, model, replay),
        eval_dataloader=_evaluator(config.eval, config, model) if config.eval is not None else None,
        eval_interval=config.eval.interval if config.eval is not None else 1,
        optimizers=optimizer,
        schedulers=_scheduler(config.scheduler),
        max_duration=config.max_duration,
        algorithms=algorithms + _clipping(config.gradient_clip_norm),
        callbacks=[NeutralEvaluation(), *callbacks],
        seed=config.seed,
        device=device,
        precision=config.precision,
        device_train_microbatch_size=config.device_train_microbatch_size or _kept_per_step(config),
        accumulate_train_batch_on_tokens=True,
        run_name=folder.name,
        save_folder=str(folder / "checkpoints"),
        save_interval=save_interval or config.save_interval,
        save_num_checkpoints_to_keep=config.save_num_checkpoints_to_keep,
        save_overwrite=config.autoresume,
        autoresume=config.autoresume,
        # Both training data sets find their place by themselves; turning the evaluation's once would draw a random number.
        spin_dataloaders=False,
        load_path=config.load_path if checkpoint is None else str(checkpoint),
        load_weights_only=checkpoint is None,
        progress_bar=config.progress_bar,
        auto_log_hparams=False,
    )


def close(trainer: Trainer) -> None:
    """Ends a Trainer, and lets go of its streams' local folders: it may live on in the caches of torch, as the key of a model."""
    trainer.close()
    for loader in (
        trainer.state.train_dataloader,
        *(evaluator.dataloader.dataloader for evaluator in trainer.state.evaluators),
    ):
        dataset = getattr(loader, "dataset", None)
        if isinstance(dataset, UDSStreamingDataset):
            dataset.close()


def build_model(config: ModelConfig) -> HuggingFaceModel:
    """A Hugging Face causal language model for Composer, with LoRA if asked for, and the held-out loss as its metric.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            config.tokenizer or config.name, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        model = AutoModelForCausalLM.from_pretrained(
            config.name,
            revision=config.revision,
            torch_dtype=getattr(torch, config.dtype),
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"model.name={config.name!r}: cannot be loaded as a causal language model with its tokenizer: {error}"
        ) from error
    lora = None
    if config.lora is not None:
        from peft import LoraConfig

        lora = LoraConfig(
            r=config.lora.r,
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            target_modules=config.lora.target_modules,
            task_type="CAUSAL_LM",
        )
    return HuggingFaceModel(
        model,
        tokenizer,
        metrics=None,  # training metrics would run every batch through the model once more
        eval_metrics=[LanguageCrossEntropy(ignore_index=-100)],
        use_logits=True,
        peft_config=lora,
    )


def validation_of(config: RunConfig, model: HuggingFaceModel) -> dict[str, list[dict[str, Any]]]:
    """The samples that `selection.validation` names, as OnlineBatchSelection takes them; empty where it names none.

    Raises:
        DataError: the stream has fewer.
    """
    settings = (config.selection or {}).get("validation")
    if settings is None:
        return {}
    held_out = ValidationConfig.model_validate(settings)
    dataset = UDSStreamingDataset(
        local=held_out.local, remote=held_out.remote, split=held_out.split, batch_size=1, shuffle=False
    )
    if dataset.num_samples < held_out.samples:
        raise DataError(
            f"selection.validation.samples: {held_out.samples} are asked for, but {held_out.local or held_out.remote} has "
            f"{dataset.num_samples}"
        )
    collate = collator_of(config.data, config.max_seq_len, model)
    rows = [dataset[number] for number in range(held_out.samples)]
    return {"validation": [collate(rows[start : start + 8]) for start in range(0, len(rows), 8)]}


def _train_loader(config: RunConfig, model: HuggingFaceModel, replay: ReplaySelection | None) -> DataSpec:
    data = config.data
    dataset = UDSStreamingDataset(
        streams=streams_of(data),
        batch_size=data.batch_size,
        shuffle=data.shuffle,
        shuffle_seed=data.shuffle_seed,
        num_canonical_nodes=data.num_canonical_nodes,
        predownload=data.predownload,
        cache_limit=data.cache_limit,
        validate_hash=data.validate_hash,
    )
    if data.verify_data:
        verify_shards(dataset)
    collator = collator_of(data, config.max_seq_len, model)
    if data.length_group_batches is not None and replay is None:  # a replay reads what the log names
        lengths = _lengths(config, dataset, collator)
        dataset.group_by_length(data.length_group_batches, lengths)
    workers = {
        "num_workers": data.num_workers,
        "timeout": data.timeout if data.num_workers else 0,
        "collate_fn": collator,
        "worker_init_fn": ignore_interrupts,
    }
    loader = (
        replay.dataloader(dataset, **workers) if replay else DataLoader(dataset, batch_size=data.batch_size, **workers)
    )
    return DataSpec(loader, get_num_tokens_in_batch=num_tokens)


def _lengths(config: RunConfig, dataset: UDSStreamingDataset, collator: SFTCollator) -> np.ndarray:
    """The tokens of every row, counted once for a run: the file's name tells other streams and other settings apart."""
    settings = {field.name: getattr(collator, field.name) for field in fields(collator) if field.name != "tokenizer"}
    settings["tokenizer"] = [str(collator.tokenizer.name_or_path), len(collator.tokenizer)]
    settings["streams"] = [stream.index_sha256 for stream in stream_identities(dataset)]
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    path = Path(config.save_folder) / f"lengths-{key[:16]}.npy"
    workers = {"num_workers": config.data.num_workers, "progress_bar": config.progress_bar}
    return remembered_lengths(path, dataset.size, lambda: count_lengths(dataset, collator.length_of, **workers))


def _evaluator(held_out: EvalConfig, config: RunConfig, model: HuggingFaceModel) -> Evaluator:
    dataset = UDSStreamingDataset(
        local=held_out.local,
        remote=held_out.remote,
        split=held_out.split,
        batch_size=held_out.batch_size,
        shuffle=False,
    )
    loader = DataLoader(
        dataset, batch_size=held_out.batch_size, collate_fn=collator_of(config.data, config.max_seq_len, model)
    )
    return Evaluator(
        label="held_out",
        dataloader=DataSpec(loader, get_num_tokens_in_batch=num_tokens),
        metric_names=[_EVAL_METRIC],
        subset_num_batches=held_out.max_batches or -1,
        eval_interval=held_out.interval,
    )


def _scheduler(config: SchedulerConfig) -> ComposerScheduler:
    if config.name == "constant":
        return ConstantWithWarmupScheduler(t_warmup=config.warmup)
    warms_up = not config.warmup.startswith("0")
    if config.name == "linear":
        return (
            LinearWithWarmupScheduler(t_warmup=config.warmup, alpha_f=config.alpha_f)
            if warms_up
            else LinearScheduler(alpha_f=config.alpha_f)
        )
    return (
        CosineAnnealingWithWarmupScheduler(t_warmup=config.warmup, alpha_f=config.alpha_f)
        if warms_up
        else CosineAnnealingScheduler(alpha_f=config.alpha_f)
    )


def _clipping(norm: float | None) -> list[Any]:
    if norm is None:
        return []
    from composer.algorithms import GradientClipping

    return [GradientClipping(clipping_type="norm", clipping_threshold=norm)]


def _kept_per_step(config: RunConfig) -> int:
    """All that is trained on at once. Left to itself, Composer would take the candidates' number and warn of smaller batches."""
    if config.selection is None:
        return config.data.batch_size
    ranks = dist.get_world_size()
    settings = config.selection_config()
    if settings.keep_tokens is not None:
        return config.data.batch_size
    return max(1, settings.kept(config.data.batch_size * ranks, ranks) // ranks)


def _initial_loss(trainer: Trainer, config: RunConfig, folder: Path) -> float | None:
    """The held-out loss before the first step: measured once, and remembered over interruptions."""
    if config.eval is None:
        return None
    path = folder / INITIAL_EVAL
    remembered = on_rank_zero(lambda: json.loads(path.read_text())["loss"] if path.exists() else None)
    if remembered is not None:
        if trainer.state.timestamp.batch.value == 0:
            on_rank_zero(lambda: append_eval(folder, step=0, loss=remembered, seconds=None))
        return remembered
    if trainer.state.timestamp.batch.value > 0:
        return None
    trainer.eval()
    loss = eval_loss(trainer)
    on_rank_zero(lambda: write_atomically(path, json.dumps({"loss": loss}) + "\n"))
    return loss


def eval_loss(trainer: Trainer) -> float:
    """The held-out loss of the last evaluation, in nats per token."""
    return _held_out_loss(trainer.state)


def _held_out_loss(state: State) -> float:
    return float(state.eval_metrics["held_out"][_EVAL_METRIC].compute())


class _HeldOutLosses(Callback):
    """Writes each evaluation down as it ends, and from where a resumed run goes on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._began = 0.0

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Evaluations within training and by `Trainer.eval()` alike."""
        del logger
        step = state.timestamp.batch.value
        if event == Event.AFTER_LOAD:
            on_rank_zero(lambda: append_resumption(self._folder, step))
        elif event in (Event.EVAL_BEFORE_ALL, Event.EVAL_STANDALONE_START):
            self._began = time.perf_counter()
        elif event in (Event.EVAL_AFTER_ALL, Event.EVAL_STANDALONE_END):
            seconds = time.perf_counter() - self._began
            loss = _held_out_loss(state)  # on every rank: it is a mean over them
            on_rank_zero(lambda: append_eval(self._folder, step=step, loss=loss, seconds=seconds))
