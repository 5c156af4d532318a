"""A Hugging Face model as scoring calls it: with a batch, on the Trainer's device."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from composer.devices import Device
from peft import PeftModel
from torch import Tensor, nn

from udsstream.mosaicml.head_module import named_module

__all__ = ["CalledWithBatch", "TrainerDevice"]

Module = TypeVar("Module", bound=nn.Module)


class CalledWithBatch(nn.Module):
    """`model(batch)` instead of `model(**batch)`, with what the model's forward names and nothing else of the batch.

    Args:
        model: as the Trainer prepared it, unwrapped.
        mixed_precision: of its accelerator, such as "bf16". The logits are shown as they were computed: the model's forward, which runs in
            that precision, would show them in float32, and nobody could tell rounding from another head.
    """

    def __init__(self, model: nn.Module, mixed_precision: str | None = None) -> None:
        super().__init__()
        self.model = model
        self._computed_in = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision or "")
        inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model  # peft's wrapper takes anything
        # Of the class: mixed precision puts another function in the object's place.
        self.model_forward_args = tuple(inspect.signature(type(inner).forward).parameters)[1:]

    def forward(self, batch: Mapping[str, Any]) -> Any:
        """The model's output."""
        output = self.model(**{name: batch[name] for name in self.model_forward_args if name in batch})
        if self._computed_in is None or not isinstance(output, Mapping) or output.get("logits") is None:
            return output
        return {"logits": output["logits"].to(self._computed_in)}

    def name_of(self, name: str | None, role: str) -> str | None:
        """The dotted name here of a module that the user named within the model; ModelError when there is none."""
        if name is None:
            return None
        named_module(self.model, name, role)
        return f"model.{name}"


class TrainerDevice(Device):
    """The Trainer's device, in Composer's terms. (Composer's own would set global flags of CUDA, which training would notice.)"""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.name = device.type

    def module_to_device(self, module: Module) -> Module:
        """The module, on it."""
        return module.to(self._device)

    def tensor_to_device(self, tensor: Tensor) -> Tensor:
        """The tensor, on it."""
        return tensor.to(self._device)
