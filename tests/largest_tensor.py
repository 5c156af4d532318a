"""The largest tensor that is made while a block runs: what must never be built is smaller than this."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["LargestTensor"]


class LargestTensor(TorchDispatchMode):
    """`bytes`: of the largest memory behind a tensor that an operator made, views left out."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(item, torch.Tensor) and item._base is None:
                self.bytes = max(self.bytes, item.untyped_storage().nbytes())
        return result
