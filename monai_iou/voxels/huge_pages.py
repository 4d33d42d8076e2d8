"""Memory for gradients: as large as the logits, and on a CPU slow to come by."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_MADV_HUGEPAGE = 14  # of Linux's madvise(2)
_HUGE_PAGE = 1 << 21  # bytes


@functools.cache
def _madvise() -> Callable[..., Any] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):  # a system without a C library of that name
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def empty_like(tensor: Tensor) -> Tensor:
    """Return `torch.empty_like(tensor)`, asking Linux for its memory in pages of 2 MiB.

    The system clears memory when it is first written to, 4 KiB at a time unless asked; for a gradient that takes as
    long as all the arithmetic. It is a wish that the system may ignore: only pages that lie inside the tensor, no more
    memory, no other values. torch does the same for all its memory if THP_MEM_ALLOC_ENABLE=1 is set.
    """
    out = torch.empty_like(tensor)
    madvise = _madvise() if out.device.type == "cpu" else None
    if madvise is not None:
        start = -(-out.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        length = (out.data_ptr() + out.untyped_storage().nbytes() - start) // _HUGE_PAGE * _HUGE_PAGE
        if length > 0:
            madvise(start, length, _MADV_HUGEPAGE)
    return out
