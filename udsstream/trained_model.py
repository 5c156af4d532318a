"""The model that a training job left: its weights at a checkpoint, and the folder that Hugging Face's tools read.

A checkpoint of Composer holds what is needed to go on: of a LoRA job the adapter alone, beside the optimizer's state. What others want is a
folder for `from_pretrained`: to evaluate it, to serve it, to choose with it (`udsstream curate --score`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

import torch
from composer.models import HuggingFaceModel

from udsstream import __version__
from udsstream.errors import ConfigError, ResumeError, UdsstreamError
from udsstream.job_folder import JobFolder, replace_file
from udsstream.mosaicml.checkpoint import checkpoints_in, model_weights, read_checkpoint, selection_state
from udsstream.mosaicml.weights import check_frozen, weights_sha256
from udsstream.pipeline import build_model
from udsstream.run_config import ModelDtype, RunConfig, load_run_config
from udsstream.run_folder import CONFIG, refuse_model_code

__all__ = ["ORIGIN", "ExportedModel", "export_model", "load_trained_model"]

ORIGIN = "udsstream.json"
"""Says of an exported model which run it comes from."""


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """What was written, and where it comes from; `udsstream.json` in the folder."""

    base_model: str
    """As the run named it."""
    step: int
    """Steps that it was trained for."""
    form: str
    """`model` (whole; adapters are merged into it) or `adapter`."""
    dtype: str
    weights_sha256: str
    """Of all weights by name, as the record of a pass with this model in this dtype (`udsstream curate --score`) names them."""
    run_id: str | None
    """The log's, and the root of its digests when the checkpoint was saved; None for a run that chose nothing."""
    log_root: str | None


def export_model(
    run: Path,
    out: Path,
    *,
    step: int | None = None,
    adapter: bool = False,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> ExportedModel:
    """Writes the model of a training job as a folder that `from_pretrained` reads, with its tokenizer.

    Adapters are merged into the weights (W + (α/r) B A, arXiv 2106.09685, section 4.1) unless `adapter` asks for them alone. Weights are
    safetensors; no pickled code is run, and none written. The configuration comes last, so that what is not whole cannot be
    loaded; a killed export is done again by the same call.

    Args:
        run: the folder of a job of `udsstream train`.
        out: the folder to write; new or empty.
        step: of which checkpoint. None: the newest.
        adapter: write LoRA's matrices alone, as peft reads them.
        dtype: float32, bfloat16 or float16. None: as it was trained.
        trust_remote_code: run code that comes with the model, where the job's configuration asks for it too.

    Raises:
        ConfigError: the configuration asks for code that comes with the model, which is not trusted; `adapter` for a job that trained the
            whole model; an unknown dtype; the folder holds no job's configuration.
        ResumeError: there is no such checkpoint, it cannot be read without running code, or it is of another model.
        OutputExistsError: `out` holds something else.
        ModelError: the base model cannot be loaded.
    """
    dtypes = get_args(ModelDtype)
    if dtype is not None and dtype not in dtypes:
        raise ConfigError(f"dtype={dtype!r}: not one of {', '.join(dtypes)}")
    if not (run / CONFIG).exists():
        raise ConfigError(
            f"{run} holds no {CONFIG}: only a job of `udsstream train` says how its model is built. A model that a script of your own "
            "trained is saved there, by its `save_pretrained`"
        )
    config = load_run_config(run / CONFIG)
    if not trust_remote_code:
        refuse_model_code(run, config, ConfigError, again="--trust-remote-code")
    if adapter and config.model.lora is None:
        raise ConfigError(f"{run} trained the whole model (model.lora is not set): it has no adapter to write alone")
    path, at = _checkpoint(run, step)
    checkpoint = read_checkpoint(path)
    log = (selection_state(checkpoint) or {}).get("log")
    origin: dict[str, Any] = {
        "base_model": config.model.name,
        "step": at,
        "form": "adapter" if adapter else "model",
        "dtype": dtype or config.model.dtype,
        "run_id": None if log is None else str(log["run_id"]),
        "log_root": None if log is None else log["merkle_root"].hex(),
    }
    with JobFolder.claim(out, origin | {"run": str(run.absolute())}) as folder:
        if folder.published:  # a publication that was interrupted, and is whole now
            return ExportedModel(**_described(out))
        try:
            trained: Any = _with_weights(config, checkpoint, path)
        except UdsstreamError:
            folder.discard()
            raise
        model = trained.model
        if config.model.lora is not None and not adapter:
            model = model.merge_and_unload(safe_merge=True)
        elif adapter:
            _restore_types(model)
        model = model.to(getattr(torch, origin["dtype"]))
        exported = ExportedModel(**origin, weights_sha256=weights_sha256(torch.nn.ModuleDict({"model": model})))
        folder.clear()
        model.save_pretrained(folder.work, safe_serialization=True)
        trained.tokenizer.save_pretrained(folder.work)
        description = {"udsstream": __version__, **asdict(exported)}
        replace_file(folder.work / ORIGIN, (json.dumps(description, indent=2) + "\n").encode())
        folder.publish(folder.contents(), last="adapter_config.json" if adapter else "config.json")
    return exported


def _described(out: Path) -> dict[str, Any]:
    content = json.loads((out / ORIGIN).read_text())
    return {field.name: content[field.name] for field in fields(ExportedModel)}


def _restore_types(model: Any) -> None:
    """Composer 0.32 puts plain text in the place of two enumerations in peft's settings; peft's `save_pretrained` asks for these."""
    from peft import PeftType, TaskType

    for settings in model.peft_config.values():
        settings.peft_type, settings.task_type = PeftType(settings.peft_type), TaskType(settings.task_type)


def load_trained_model(config: RunConfig, run: Path, *, step: int) -> HuggingFaceModel:
    """The model of a job as it was after `step` steps, on the host.

    Raises:
        ResumeError: there is no such checkpoint, or it is of another model than the configuration's.
        ModelError: the base model cannot be loaded.
    """
    path, _ = _checkpoint(run, step)
    return _with_weights(config, read_checkpoint(path), path)


def _checkpoint(run: Path, step: int | None) -> tuple[Path, int]:
    there = checkpoints_in(run / "checkpoints")
    if not there:
        raise ResumeError(
            f"{run} has no checkpoint that can be read: one of {run}/checkpoints/ep…-ba…-rank0.pt is needed"
        )
    wanted = max(there) if step is None else step
    if wanted not in there:
        raise ResumeError(f"{run} has no checkpoint of step {wanted}; there are those of {', '.join(map(str, there))}")
    return there[wanted], wanted


def _with_weights(config: RunConfig, checkpoint: dict[str, Any], path: Path) -> HuggingFaceModel:
    model = build_model(config.model)
    check_frozen((selection_state(checkpoint) or {}).get("frozen_sha256"), model, str(path))
    weights = model_weights(checkpoint)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = sorted(trained - weights.keys())
    try:
        unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
    except RuntimeError as error:  # of another shape
        first = str(error).split("\n\t")[1:2] or [str(error)]
        raise ResumeError(f"{path} is of another model than the run's {CONFIG}: {first[0]}") from error
    if missing or unexpected:
        name = (missing or list(unexpected))[0]
        raise ResumeError(
            f"{path} is of another model than the run's {CONFIG}: {'it lacks' if missing else 'only it has'} the weight {name}"
        )
    return model
