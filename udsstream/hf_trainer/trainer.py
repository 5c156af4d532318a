"""`SelectingTrainer`: a Hugging Face `Trainer` that trains on the most valuable part of every update's batches.

    trainer = SelectingTrainer(model=model, args=arguments, train_dataset=rows, data_collator=collator, keep=0.25, log_dir="runs/a")
    trainer.train()

Only translates: the Trainer's events into `run.py`'s calls. The candidates of one decision are the batches of one update of the weights,
`per_device_train_batch_size × gradient_accumulation_steps` rows; the kept ones are trained on in as many parts as there were batches, and
the loss is normalised by their tokens alone. Decisions are numbered by updates: the log's step is the Trainer's `global_step`.

One process with one device: everything else is refused (Composer's adapter has ranks). What is weaker than there: docs/other_loops.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import DataLoader, RandomSampler
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from udsstream.config import EmbeddingRecord, LengthNorm, Method, ProjectionScale, Scope, SelectionConfig
from udsstream.errors import ConfigError, ResumeError
from udsstream.hf_trainer.checkpoint import CheckpointState, newest_whole_checkpoint
from udsstream.hf_trainer.parts import PartsTrainer
from udsstream.hf_trainer.rows import StreamRows
from udsstream.hf_trainer.run import RunPlan, RunSettings, SelectionRun
from udsstream.mosaicml.dataset import sample_source_of
from udsstream.mosaicml.method_inputs import MethodInputs
from udsstream.mosaicml.sample_identity import IdentifyingCollator, SampleIdentity, SampleIdSetting
from udsstream.scoring.candidates import Candidates

__all__ = ["SelectingTrainer"]


class SelectingTrainer(PartsTrainer):
    """A `transformers.Trainer` that trains on the most valuable part of every update's batches, and keeps a record of every choice.

    Arguments that are not listed here are the settings of `udsstream.SelectionConfig`, whose times count updates (`ba`), candidates (`sp`)
    and their tokens (`tok`).

    Args:
        *args: of `transformers.Trainer`.
        **kwargs: of `transformers.Trainer`; rows are read by number from `train_dataset`.
        log_dir: where the record of every choice goes (made if absent). None: no record.
        autoresume: a run that was killed before its first checkpoint may go on in the log that it had begun.
        trunk: dotted name of a module of the model whose output holds the final hidden states. None: what enters the head is taken.
        head: dotted name of the head's module. None: found through `get_output_embeddings()`.
        warm_start: `log_dir` of a former run, whose memory this run begins with.
        reference: what `method="rho_loss"` needs; see `OnlineBatchSelection`.
        validation: what `method="greats"` needs; see there, too.
        sample_ids: `auto` takes `sample_id` from the rows, else their numbers; `content-hash` makes ids of the tokens.

    Raises:
        ConfigError: a setting cannot be used (here, or before training starts when data or model show it).
        RankError: more than one process or device takes part.
        DataError, ModelError, ScoreError, LogError, ResumeError: while training; see `udsstream.errors`.
    """

    def __init__(
        self,
        *args: Any,
        method: Method | Callable[[Candidates], Any] = "uds",
        keep: float | int = 0.25,
        keep_tokens: int | None = None,
        alpha: float | None = None,
        buffer_size: int = 1024,
        projection_dims: tuple[int, int] = (128, 8),
        max_seq_len: int = 2048,
        projection_scale: ProjectionScale = "isometric",
        length_norm: LengthNorm = "none",
        scope: Scope = "global",
        start: str = "0ba",
        end: str | None = None,
        interrupt: int = 0,
        embeddings: EmbeddingRecord = "tail",
        seed: int = 17,
        score_microbatch_tokens: int = 16384,
        log_dir: str | Path | None = None,
        autoresume: bool = False,
        trunk: str | None = None,
        head: str | None = None,
        warm_start: str | Path | None = None,
        reference: str | Path | Mapping[int, float] | None = None,
        validation: Iterable[Mapping[str, Any]] | None = None,
        sample_ids: SampleIdSetting = "auto",
        **kwargs: Any,
    ) -> None:
        config = SelectionConfig(
            method=method,
            keep=keep,
            keep_tokens=keep_tokens,
            alpha=alpha,
            buffer_size=buffer_size,
            projection_dims=projection_dims,
            max_seq_len=max_seq_len,
            projection_scale=projection_scale,
            length_norm=length_norm,
            scope=scope,
            start=start,
            end=end,
            interrupt=interrupt,
            embeddings=embeddings,
            seed=seed,
            score_microbatch_tokens=score_microbatch_tokens,
        )
        self._settings = RunSettings(
            config=config,
            inputs=MethodInputs.of(config, reference=reference, validation=validation),
            log_dir=Path(log_dir) if log_dir is not None else None,
            autoresume=autoresume,
            warm_start=Path(warm_start) if warm_start is not None else None,
            trunk=trunk,
            head=head,
        )
        self._identity = SampleIdentity(sample_ids)
        self._loaded: CheckpointState | None = None
        self._loader: Any = None
        self._run: SelectionRun | None = None
        super().__init__(*args, **kwargs)
        candidates = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        if isinstance(keep, int) and keep > candidates:
            raise ConfigError(
                f"keep: {keep} of the candidates of each update are to be kept, but an update has only {candidates} "
                f"({self.args.gradient_accumulation_steps} batches of {self.args.per_device_train_batch_size}); choose at most "
                f"{candidates}, a fraction, or larger batches"
            )
        self.add_callback(_Events(self))

    # The Trainer's interface ------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As `Trainer.train`. With `resume_from_checkpoint=True` a checkpoint that was not saved to its end is passed over.

        Raises:
            ResumeError: the checkpoint holds no state of the selection, or that of another run.
        """
        if trial is not None:
            raise ConfigError(
                "a search for hyperparameters trains many models, but a log is one run's; train them one by one"
            )
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(newest_whole_checkpoint(Path(str(self.args.output_dir))) or "") or True
        self._loaded = None
        if isinstance(resume_from_checkpoint, str):
            self._loaded = CheckpointState.read(Path(resume_from_checkpoint), self._settings.config)
        try:
            return super().train(resume_from_checkpoint, trial, **kwargs)
        finally:
            if self._run is not None:
                self._run.close()
            self._identity.detach()

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's data loader, made to tell the ids of its rows."""
        loader = self._plain_loader(super().get_train_dataloader)
        inner = getattr(loader, "base_dataloader", loader)
        if isinstance(inner.dataset, StreamRows):
            inner.collate_fn = IdentifyingCollator(inner.collate_fn)
        self._identity.attach(inner)
        self._loader = loader
        return loader

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, *args: Any) -> Any:  # type: ignore[override]
        """The batches of an update, of which only the rows worth most are left; and, as the Trainer counts, how many labels these have."""
        candidates = self._taken(epoch_iterator, num_batches)
        kept: list[dict[str, Any]] = []
        if candidates:
            assert self._run is not None
            kept = self._run.choose(candidates, self._learning_rate)
        return self._counted(kept, num_batches, *args)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`; beside a training loss, how the selection went at the last update."""
        if self._run is not None and self.is_in_train and "loss" in logs:
            logs = {**logs, **self._run.metrics()}
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._run is not None and not self.args.save_only_model:
            folder = Path(str(self._get_output_dir(trial=trial))) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self._run.state().write(folder)
        super()._save_checkpoint(model, trial)

    # What the Trainer's events bring about ----------------------------------------------------------------------------

    def _begin(self) -> None:
        plan = self._plan()
        self._check_order(plan)
        self._run = SelectionRun(
            self._settings,
            plan,
            called=self._called_with_batch(),
            device=self.args.device,
            identity=self._identity,
            source=sample_source_of(getattr(self._loader, "base_dataloader", self._loader)),
            loaded=self._loaded,
        )

    def _plan(self) -> RunPlan:
        accumulation = self.args.gradient_accumulation_steps
        return RunPlan(
            step=self.state.global_step,
            max_steps=self.state.max_steps,
            updates_per_epoch=max(1, -(-len(self._loader) // accumulation)),
            batch_size=self._batch_size,
            accumulation=accumulation,
            seed=self.args.seed,
            tokenizer=str(getattr(self.processing_class, "name_or_path", "") or "unknown"),
            sampler=type(self._sampler()).__name__,
        )

    def _sampler(self) -> Any:
        return getattr(getattr(self._loader, "batch_sampler", None), "sampler", None)

    def _check_order(self, plan: RunPlan) -> None:
        """Raises ResumeError when the rest of an epoch would come in another order than it had."""
        made = plan.step % plan.updates_per_epoch
        if not made:
            return
        drawn = isinstance(self._sampler(), RandomSampler) and not isinstance(self._sampler(), SeedableRandomSampler)
        for wrong, what in (
            (self.args.ignore_data_skip, "ignore_data_skip=True begins the epoch anew"),
            (self.args.group_by_length, "group_by_length=True draws an epoch's order anew where it goes on"),
            (drawn, "use_seedable_sampler=False draws an epoch's order anew where it goes on"),
        ):
            if wrong:
                raise ResumeError(
                    f"{what}, so that a run resumed within an epoch would see other candidates than were left "
                    f"({made} of the epoch's {plan.updates_per_epoch} updates were made); leave it out, or resume at an epoch's end"
                )


class _Events(TrainerCallback):
    """Hands on what the Trainer has no methods for."""

    def __init__(self, trainer: SelectingTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del args, state, control, kwargs
        self._trainer._begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del args, state, control, kwargs
        if self._trainer._run is not None:
            self._trainer._run.end_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del args, state, control, kwargs
        if self._trainer._run is not None:
            self._trainer._run.seal()
