"""A CUDA device without a GPU: tensors there are fake (`FakeTensorMode`), those of the host are real, and every wait is written down.

Mixed devices raise, as FakeTensorMode makes them. What the host fetches has no values: `answer` makes some up.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["IndexWithoutDriver", "SimulatedCuda"]

aten = torch.ops.aten


class IndexWithoutDriver(TorchFunctionMode):
    """`x[a:b]` written in Python selects the CUDA device first, fake or not; the same through operators does not. So do `int(x)` and the
    like, which wait for it besides."""

    def __init__(self, wait: Callable[[Tensor], Tensor] | None = None) -> None:
        self._wait = wait

    def __torch_function__(self, func, types, args=(), kwargs=None):
        tensor = next((arg for arg in args if isinstance(arg, Tensor)), None)
        if tensor is None or tensor.device.type != "cuda":
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.__getitem__:
            return _indexed(*args)
        if func is torch.Tensor.__setitem__:
            target = _indexed(tensor, args[1])
            assert target._is_view(), "an assignment through an index tensor is not simulated"
            return _copied(target, args[2])
        if func is torch.Tensor.copy_:
            return _copied(*args)
        if func is torch.Tensor.contiguous:
            return aten.clone(tensor, memory_format=torch.contiguous_format)
        if self._wait is not None and func in _WAITING:
            return func(self._wait(tensor), *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


_WAITING = (
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.cpu,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__bool__,
    torch.Tensor.__index__,
)


def _copied(target: Tensor, source: Any) -> Tensor:
    """Fake values need no copying, but must fit."""
    shape = source.shape if isinstance(source, Tensor) else ()
    assert torch.broadcast_shapes(target.shape, shape) == target.shape, f"{tuple(shape)} into {tuple(target.shape)}"
    return target


def _indexed(tensor: Tensor, index: Any) -> Tensor:
    items = index if isinstance(index, tuple) else (index,)
    dim = 0
    for place, item in enumerate(items):
        if isinstance(item, slice):
            tensor = aten.slice(tensor, dim, item.start, item.stop, item.step or 1)
            dim += 1
        elif item is None:
            tensor = tensor.unsqueeze(dim)
            dim += 1
        elif isinstance(item, int):
            tensor = tensor.select(dim, item)
        elif item is Ellipsis:
            dim = tensor.ndim - sum(later is not None for later in items[place + 1 :])
        else:
            assert len(items) == 1, "index tensors beside others are not simulated"
            tensor = aten.index(tensor, [item])
    return tensor


class SimulatedCuda(TorchDispatchMode):
    """While it is on, `device="cuda"` works; `waits` lists where the host waited for the device, innermost frame of ours first.

    Args:
        answer: makes the real tensor that the host gets for a fake one.
    """

    def __init__(
        self, answer: Callable[[Tensor], Tensor] = lambda fake: torch.zeros(fake.shape, dtype=fake.dtype)
    ) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=False)
        self.answer = answer
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        on_device = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
        target = kwargs.get("device")
        target = None if target is None else torch.device(target).type
        if not on_device and target != "cuda":
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if on_device and target == "cpu" and func is aten._to_copy.default:
            return self._wait(args[0]).to(kwargs.get("dtype") or args[0].dtype)
        if func is aten._local_scalar_dense.default:
            return self._wait(args[0]).item()
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            with unset_fake_temporarily():
                return args[0].copy_(self._wait(args[1]))
        args, kwargs = tree_map_only(Tensor, self._faked, (args, kwargs))
        return func(*args, **kwargs)

    def _faked(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        with unset_fake_temporarily():
            return self.fake.from_tensor(tensor)

    def _wait(self, fake: Tensor) -> Tensor:
        frames = [f"{frame.filename.rsplit('/', 1)[-1]}:{frame.name}" for frame in traceback.extract_stack()]
        self.waits.append(" < ".join(frame for frame in reversed(frames) if "simulated_cuda" not in frame))
        with unset_fake_temporarily():
            return self.answer(fake)

    def move(self, module: torch.nn.Module) -> torch.nn.Module:
        """The module, in place, with its parameters and buffers on the device."""
        with self.running():
            for child in module.modules():
                for name, parameter in child._parameters.items():
                    if parameter is not None:
                        moved = parameter.detach().to("cuda:0")
                        child._parameters[name] = torch.nn.Parameter(moved, requires_grad=parameter.requires_grad)
                for name, buffer in child._buffers.items():
                    child._buffers[name] = None if buffer is None else buffer.to("cuda:0")
        return module

    @contextlib.contextmanager
    def running(self) -> Iterator[SimulatedCuda]:
        """All modes that it takes."""
        with self.fake, self, IndexWithoutDriver(self._wait):  # torch looks for a driver unless a fake mode is on
            yield self
