"""One of Apple's GPUs that is not there: tensors that say `mps`, and refuse float64 and NumPy as tensors there do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

APPLE, CPU = torch.device("mps"), torch.device("cpu")
_NO_FLOAT64 = "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."


class PretendedApple(TorchFunctionMode):
    """While it is entered, tensors from before are on the GPU, and so is what is computed of them until it is moved.

    Example:
        >>> numbers = torch.ones(3)
        >>> with PretendedApple():
        ...     print(numbers.sum().device, numbers.cpu().double().sum().device)
        ...     numbers.double()
        Traceback (most recent call last):
            ...
        TypeError: Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return CPU if _is_at_home(args[0]) else APPLE
        at_home = _result_is_at_home(func, args, kwargs)
        wants_float64 = func is Tensor.double or any(each is torch.float64 for each in (*args, *kwargs.values()))
        if not at_home and (wants_float64 or func is Tensor.numpy):
            raise TypeError(_NO_FLOAT64 if wants_float64 else "can't convert mps device type tensor to numpy.")
        plain = tuple(CPU if isinstance(each, torch.device) else each for each in args)
        if kwargs.get("device") is not None:
            kwargs["device"] = CPU
        result = func(*plain, **kwargs)
        if at_home and args and result is args[0] and not _is_at_home(result):
            result = result.clone()
        for each in tree_leaves(result):
            if at_home and isinstance(each, Tensor):
                each.at_home = True  # type: ignore[attr-defined]
        return result


def _is_at_home(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float64 or getattr(tensor, "at_home", False)


def _result_is_at_home(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a result is on the CPU; refuse operations of tensors on both devices, as the GPU does."""
    if func is Tensor.cpu:
        return True
    asked = [*(args[1:] if func is Tensor.to else ()), kwargs.get("device")]
    devices = [torch.device(each) for each in asked if isinstance(each, (str, torch.device))]
    if devices:
        return devices[0].type == "cpu"
    places = {_is_at_home(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor) and each.dim() > 0}
    if len(places) > 1 and func is not Tensor.copy_:
        message = f"Expected all tensors to be on the same device, but found mps and cpu: {func}."
        raise RuntimeError(message)
    return places != {False}
