"""A GPU that is not there: tensors that say `cuda:0` and compute on the CPU, for what must run on a GPU.

Unlike the device "meta", it computes values, so that what runs on it can be compared with the same on the CPU. It
refuses operations of tensors on two devices, as a GPU does, and counts the operations listed below that make the host
wait for a GPU, copies among them.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 0)
aten: Any = torch.ops.aten

# Whose results have values or shapes that the host has to be told.
_ASKING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
    aten.histc.default,
    aten.repeat_interleave.Tensor,
    aten.allclose.default,
}
_NUMBERS = {Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.__index__}
_INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class OnPretendGpu(Tensor):
    """A tensor that says that it is on a GPU; its values are those of `held`, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnPretendGpu:
        made: OnPretendGpu = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=GPU,
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnPretendGpu({self.held!r})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        on_cpu = [each for each in tensors if not isinstance(each, cls) and each.dim() > 0]
        # Tensors on a GPU may be indexed by those on the CPU, and not the other way round.
        may_mix = func is aten._to_copy.default or (func in _INDEXING and isinstance(args[0], cls))
        if on_cpu and not may_mix:
            message = f"Expected all tensors to be on the same device, but found cuda:0 and cpu: {func}."
            raise RuntimeError(message)
        target = kwargs.get("device")
        leaves = func is aten._to_copy.default and target is not None and torch.device(target).type == "cpu"
        masks = func in _INDEXING and any(
            each is not None and each.dtype in {torch.bool, torch.uint8} for each in args[1]
        )
        if func in _ASKING or masks or on_cpu or leaves:
            _note(func, kwargs.get("non_blocking", False))
        if target is not None:
            kwargs["device"] = "cpu"
        made_of = {id(each.held): each for each in tensors if isinstance(each, cls)}
        args, kwargs = tree_map_only(cls, lambda each: each.held, (args, kwargs))
        result = func(*args, **kwargs)
        if leaves:
            return result
        return tree_map_only(Tensor, lambda each: made_of[id(each)] if id(each) in made_of else cls(each), result)


class _Placing(TorchFunctionMode):
    """Make the tensors on the pretended GPU that are asked for there, without CUDA."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.cuda:
            return _moved(args[0], func)
        if func is Tensor.to:
            if isinstance(args[1] if args[1:] else None, OnPretendGpu):  # as the other one is
                args = (args[0], GPU, args[1].dtype)
            wanted = [each for each in (*args[1:], kwargs.get("device")) if _is_gpu(each)]
            if not wanted:
                return func(*args, **kwargs)
            kwargs.pop("device", None)
            rest = [each for each in args[1:] if not _is_gpu(each)]
            source = args[0]
            cast = source.to(*rest, **kwargs) if rest or "dtype" in kwargs else source
            return _moved(cast, func)
        if func in {Tensor.__getitem__, Tensor.__setitem__} and isinstance(args[0], OnPretendGpu):
            return _indexed(func, *args)
        if func is Tensor.type and len(args) > 1 and isinstance(args[1], str):
            return args[0].to(getattr(torch, args[1].split(".")[-1]))
        if func in _NUMBERS and isinstance(args[0], OnPretendGpu):
            _note(func)
            return func(args[0].held)
        if func is Tensor.__invert__:
            return torch.bitwise_not(args[0])  # the same without a question to the driver
        if func is Tensor.copy_:
            return _filled(*args)
        if func is torch.as_tensor and isinstance(args[0], OnPretendGpu):
            return args[0].to(kwargs.get("dtype") or args[0].dtype)
        if _is_gpu(kwargs.get("device")) and not any(isinstance(each, OnPretendGpu) for each in tree_leaves(args)):
            kwargs["device"] = "cpu"
            made = func(*args, **kwargs)
            if func in {torch.tensor, torch.as_tensor}:
                _note(func)
            return tree_map_only(Tensor, OnPretendGpu, made)
        return func(*args, **kwargs)


def _is_gpu(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


def _moved(values: Tensor, why: Any) -> Tensor:
    if isinstance(values, OnPretendGpu):
        return values
    _note(why)
    return OnPretendGpu(values.detach().clone())


def _indexed(func: Any, values: OnPretendGpu, index: Any, new: Any = None) -> Any:
    """Index on the CPU: torch's own indexing asks the real driver."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(part, list) or (isinstance(part, Tensor) and part.dtype == torch.bool) for part in parts):
        _note(func)
    index = tree_map_only(OnPretendGpu, lambda each: each.held, index)
    if func is Tensor.__getitem__:
        return OnPretendGpu(values.held[index])
    if isinstance(new, Tensor) and not isinstance(new, OnPretendGpu) and new.dim() > 0:
        _note(func)
    values.held[index] = new.held if isinstance(new, OnPretendGpu) else new
    return None


def _filled(values: Tensor, source: Tensor, *_: Any) -> Tensor:
    if isinstance(values, OnPretendGpu) != isinstance(source, OnPretendGpu) and source.dim() > 0:
        _note(Tensor.copy_)
    plain = [each.held if isinstance(each, OnPretendGpu) else each for each in (values, source)]
    plain[0].copy_(plain[1])
    return values


_noted = threading.local()


def _note(func: Any, non_blocking: bool = False) -> None:
    waits = getattr(_noted, "waits", None)
    if waits is not None and not non_blocking:
        waits[getattr(func, "__name__", str(func))] += 1


@contextmanager
def pretended_gpu() -> Iterator[Counter[str]]:
    """Pretend a GPU in this thread; yield what makes the host wait for it, with how often it happened.

    Example:
        >>> with pretended_gpu() as waits:
        ...     total = torch.ones(3, device="cuda").sum()
        ...     print(total.device, dict(waits), total.item(), dict(waits))
        cuda:0 {} 3.0 {'_local_scalar_dense.default': 1}
    """
    _noted.waits = Counter()
    try:
        with torch.no_grad(), _Placing():  # autograd asks the real driver
            yield _noted.waits
    finally:
        _noted.waits = None
