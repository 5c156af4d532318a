"""Reading a Composer checkpoint that somebody may have sent: no pickled code is run.

Composer itself reads its checkpoints with the full unpickler, and evaluates the written form of some algorithms
(`_apply_required_algorithms` in `composer/core/state.py`). So a file is read here first, by torch's restricted unpickler, with the few
harmless classes that Composer puts in (times, NumPy arrays, a version string); what passes may be given to Composer.

Only checkpoints of one file (not sharded ones) are read.
"""

from __future__ import annotations

import datetime
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.torch_version import TorchVersion

from udsstream.errors import ResumeError

__all__ = ["checkpoints_in", "model_weights", "read_checkpoint", "selection_state"]

_NAME = re.compile(r"ep(\d+)-ba(\d+)-rank0\.pt")


def _harmless() -> list[Any]:
    arrays = [np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdSU")]
    # NumPy 2 renamed the module; a checkpoint may have been written by either.
    reconstruct: Any = np.array(0).__reduce__()[0]  # type: ignore[index]
    names = ("numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct")
    return [*arrays, *((reconstruct, name) for name in names), datetime.timedelta, TorchVersion]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint file, tensors on the host.

    Raises:
        ResumeError: there is no such file, it is torn or no checkpoint, it names a class or function that no checkpoint of a selecting
            run needs, or an algorithm that Composer would instantiate from text.
    """
    path = Path(path)
    try:
        with torch.serialization.safe_globals(_harmless()):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ResumeError(f"{path}: there is no such checkpoint") from None
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it names {named[1]}, which could run code" if named else "torch's restricted unpickler refuses it"
        raise ResumeError(f"{path} is not read: {what}. Use a checkpoint that Composer saved in this run") from error
    except Exception as error:  # bytes that torch did not write can make the unpickler stumble anywhere
        known = isinstance(error, RuntimeError | OSError | ValueError) and str(error)
        why = error if known else f"torch.save has not written it so ({type(error).__name__} while reading)"
        raise ResumeError(f"{path} cannot be read as a checkpoint: {why}. It may be torn: use an older one") from error
    state = loaded.get("state") if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise ResumeError(f"{path} is a file of torch, but no checkpoint of Composer: it holds no state of a model")
    _check_algorithms(path, state.get("algorithms", []))
    return loaded


def _check_algorithms(path: Path, saved: Any) -> None:
    import composer.algorithms

    entries = list(saved.items()) if isinstance(saved, dict) else saved
    if not isinstance(entries, list | tuple) or not all(map(_is_named, entries)):
        raise ResumeError(
            f"{path} is a file of torch, but no checkpoint of Composer: what it holds as algorithms are not pairs of a name and a state"
        )
    for name, value in entries:
        required = getattr(getattr(composer.algorithms, name, None), "required_on_load", None)
        if required is not None and required():
            written = value.get("repr") if isinstance(value, dict) else value
            raise ResumeError(
                f"{path} is not read: it asks Composer to evaluate {written!r} as an algorithm. Give that algorithm to the Trainer and "
                "load the checkpoint there, if you know whose it is"
            )


def _is_named(entry: Any) -> bool:
    return isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[0], str)


def selection_state(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """What `OnlineBatchSelection.state_dict()` put into a checkpoint that `read_checkpoint` returned; None when it has none."""
    saved = dict(checkpoint["state"].get("algorithms") or {})
    found = saved.get("OnlineBatchSelection")
    return found if isinstance(found, dict) and "memory" in found else None


def model_weights(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The model's weights in a checkpoint that `read_checkpoint` returned: name → tensor (adapters only, where only these are saved)."""
    return {name: value for name, value in checkpoint["state"]["model"].items() if isinstance(value, torch.Tensor)}


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """The checkpoints that Composer saved in a folder by the number of batches before them; of several, the one of the last epoch."""
    found: dict[int, tuple[int, Path]] = {}
    for entry in folder.iterdir() if folder.is_dir() else ():
        if name := _NAME.fullmatch(entry.name):
            epoch, batch = int(name[1]), int(name[2])
            if batch not in found or found[batch][0] < epoch:
                found[batch] = (epoch, entry)
    return {batch: path for batch, (_, path) in sorted(found.items())}
