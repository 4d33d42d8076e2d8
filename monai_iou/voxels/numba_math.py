"""What the loops over voxels are made of: functions of float32, and sums of short rows.

Numba has vectors of additions and products, but calls the C library for every exponential and logarithm. So both stand
here as polynomials (Moshier's Cephes library, https://www.netlib.org/cephes, `expf` and `logf`), with an error of a few
units in the last place. A row is at most :data:`WIDTH` voxels, so that rows stay in the cache of a core and a sum in
float32 keeps its digits; the sums of rows are added in float64.

Functions that sum may do so in any order, which is what lets a compiler use vectors. All others compute what is
written, because what keeps the digits of 1 - p and ln(1 + x) would be simplified away. NaN and infinities are what they
are everywhere: the loops see them and leave such voxels to the general formulas.

Machine code is kept on disk, as compiling takes seconds. Numba takes it for current while the file of a function is
unchanged, whatever became of the functions that it calls; here it is while all files of loops are. Neither kinds of
processor nor versions of Numba or of the loops share a file: Numba mixes up what two of them write to a common folder
at the same time, and takes old machine code for new where only the first of its two files could be written. For the
same reason every loop takes its arguments in one combination of types.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numba
import numpy as np
from numba.core import caching, config, registry
from numpy.typing import NDArray

from monai_iou.voxels.spec import PassSpec

_Function = TypeVar("_Function", bound=Callable[..., Any])
Row = NDArray[np.float32]

WIDTH = 1024  # voxels of a row at most
PADDING = 80  # between rows: at distances that are powers of two, they would displace each other from the cache
LARGEST = np.float32(1e30)  # of the sum of the sizes of a row's logits: products with them are finite

_F, _I = np.float32, np.int32
_AS_WRITTEN = {"nsz", "contract"}
_REORDERED = {*_AS_WRITTEN, "reassoc"}


def source_stamp(folder: Path) -> str:
    """Return what changes with any of a folder's files of loops."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("numba_*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()


_STAMP = source_stamp(Path(__file__).parent)
_logger = logging.getLogger("numba")
if _logger.level == logging.NOTSET:  # a program that logs at DEBUG would get thousands of lines for every loop
    _logger.setLevel(logging.WARNING)


def is_off() -> bool:
    """Return whether Numba has been told to compile nothing, which leaves loops in Python."""
    return bool(config.DISABLE_JIT)  # type: ignore[attr-defined]


def _keep_on_disk(compiled: Any) -> None:
    """Let machine code be kept in files of our own; one that cannot be read or written is as good as none."""
    cache = compiled._cache
    read, write = cache.load_overload, cache.save_overload
    processor = repr(registry.cpu_target.target_context.codegen().magic_tuple())
    kind = hashlib.sha256(f"{processor}, Numba {numba.__version__}".encode()).hexdigest()[:8]
    base = f"{cache._impl.filename_base}.{kind}"
    name = f"{base}.{_STAMP[:8]}"
    cache._cache_file = caching.IndexDataCacheFile(cache.cache_path, name, _STAMP)

    def load_overload(signature: Any, context: Any) -> Any:
        try:
            return read(signature, context)
        except Exception:  # whatever a file that a crash or a full disk has cut short leads to
            with contextlib.suppress(OSError):
                cache.flush()
            return None

    def save_overload(signature: Any, result: Any) -> None:
        with contextlib.suppress(Exception):
            _remove_earlier(Path(cache.cache_path), base, name)
            write(signature, result)

    cache.load_overload, cache.save_overload = load_overload, save_overload


def _remove_earlier(folder: Path, base: str, name: str) -> None:
    """Remove what earlier loops left in a folder: a process that still runs them compiles them again."""
    for file in folder.glob(f"{base}.*"):
        if not file.name.startswith(f"{name}."):
            with contextlib.suppress(OSError):
                file.unlink()


def _compiled(function: _Function, allowed: set[str]) -> _Function:
    options: dict[str, Any] = {"nogil": True, "fastmath": allowed, "error_model": "numpy"}
    try:
        kept: _Function = numba.njit(cache=True, **options)(function)
        _keep_on_disk(kept)
    except (RuntimeError, AttributeError, TypeError):
        # No folder can be written to, or this version of Numba keeps its code in another way.
        kept = numba.njit(**options)(function)
    return kept


def loop(function: _Function) -> _Function:
    """Compile a function at its first call, and keep the machine code on disk where a folder can be written to."""
    return _compiled(function, _AS_WRITTEN)


def summing_loop(function: _Function) -> _Function:
    """Compile, as :func:`loop`, a function whose sums may be taken in any order."""
    return _compiled(function, _REORDERED)


class Terms(NamedTuple):
    """What a pass sums, as the loops take it; see :class:`PassSpec`."""

    region: bool
    smaller: bool
    squares: bool
    confidence: bool
    entropy: bool
    gamma: float
    smoothing: float

    @classmethod
    def of(cls, spec: PassSpec) -> Terms:
        """Return the terms of a specification."""
        return cls(
            spec.overlap is not None,
            spec.overlap == "min_max",
            spec.power == 2,
            bool(spec.confidence),
            bool(spec.cross_entropy),
            float(spec.focal),
            float(spec.label_smoothing),
        )


@loop
def exp(x: Any) -> Any:
    """Return e^x of x <= 88; 0 below the smallest normal number."""
    held = min(max(x, _F(-87.3)), _F(88))
    whole = np.floor(held * _F(1.4426950408889634) + _F(0.5))
    r = held - whole * _F(0.693359375) + whole * _F(2.12194440e-4)  # less k ln 2, in two parts
    series = _F(1.9875691500e-4)
    series = series * r + _F(1.3981999507e-3)
    series = series * r + _F(8.3334519073e-3)
    series = series * r + _F(4.1665795894e-2)
    series = series * r + _F(1.6666665459e-1)
    series = series * r + _F(5.0000001201e-1)
    power = _I((_I(whole) + _I(127)) << _I(23)).view(np.float32)  # 2^k
    value = (series * r * r + r + _F(1)) * power
    return value if x > _F(-87.3) else _F(0)


@loop
def log1p(x: Any) -> Any:
    """Return ln(1 + x) of x >= 0, with the digits of a small x."""
    u = _F(1) + x
    bits = _F(u).view(np.int32)
    exponent = (bits - _I(0x3F3504F3)) >> _I(23)  # of u / sqrt(1/2), so that the rest is near 1
    whole = _F(exponent)
    f = _I(bits - (exponent << _I(23))).view(np.float32) - _F(1)
    series = _F(7.0376836292e-2)
    series = series * f - _F(1.1514610310e-1)
    series = series * f + _F(1.1676998740e-1)
    series = series * f - _F(1.2420140846e-1)
    series = series * f + _F(1.4249322787e-1)
    series = series * f - _F(1.6668057665e-1)
    series = series * f + _F(2.0000714765e-1)
    series = series * f - _F(2.4999993993e-1)
    series = series * f + _F(3.3333331174e-1)
    square = f * f
    rest = f * square * series - whole * _F(2.12194440e-4) - _F(0.5) * square
    return f + rest + whole * _F(0.693359375) + (x - (u - _F(1))) / u  # the last: what 1 + x has rounded off


@loop
def power(value: Any, logarithm: Any, exponent: Any) -> Any:
    """Return value^exponent of a value from 0 to 1 whose logarithm is known."""
    if exponent == _F(2):
        return value * value
    return value if exponent == _F(1) else exp(exponent * logarithm)


@summing_loop
def total(values: Row, n: int) -> Any:
    """Return the sum of n values."""
    found = _F(0)
    for i in range(n):
        found += values[i]
    return found


@summing_loop
def size(values: Row, n: int) -> Any:
    """Return the sum of the absolute values of n numbers; NaN and infinite where one of them is."""
    found = _F(0)
    for i in range(n):
        found += abs(values[i])
    return found


@summing_loop
def products(first: Row, second: Row, n: int) -> Any:
    """Return the sum of n products."""
    found = _F(0)
    for i in range(n):
        found += first[i] * second[i]
    return found


@summing_loop
def minima(first: Row, second: Row, n: int) -> Any:
    """Return the sum of the smaller ones of n pairs."""
    found = _F(0)
    for i in range(n):
        found += min(first[i], second[i])
    return found


@summing_loop
def cubes(values: Row, n: int) -> Any:
    """Return the sum of n third powers."""
    found = _F(0)
    for i in range(n):
        found += values[i] * values[i] * values[i]
    return found


@loop
def select_class(labels: Row, number: Any, n: int, out: Row) -> None:
    """Write 1 where the label is a class, whose number is float32, and 0 elsewhere."""
    for i in range(n):
        out[i] = _F(1) if labels[i] == number else _F(0)


@loop
def read_maps(maps: Row, valid: Row, n: int, out: Row) -> None:
    """Write the targets of a class, 0 at ignored voxels, whatever stands there."""
    for i in range(n):
        out[i] = maps[i] if valid[i] > _F(0) else _F(0)


@loop
def read_valid(labels: Row, mark: Any, mask: Any, n: int, out: Row) -> None:
    """Write 1 at voxels that count, 0 at those marked in the labels, or left out by a mask that is not empty."""
    if mask.shape[0] > 0:
        for i in range(n):
            out[i] = _F(1) if mask[i] else _F(0)
    else:
        ignored = _F(mark)
        for i in range(n):
            out[i] = _F(0) if labels[i] == ignored else _F(1)


@summing_loop
def not_shares(values: Row, n: int) -> Any:
    """Return how many values are not from 0 to 1."""
    found = _F(0)
    for i in range(n):
        found += _F(0) if (values[i] >= _F(0)) & (values[i] <= _F(1)) else _F(1)
    return found


@loop
def add_region(rows: Any, p: Row, y: Row, n: int, terms: Terms) -> None:
    """Add I, P, T and Q of a class to `rows`, (7,) float64; `p` and `y` are 0 at ignored voxels."""
    if terms.region:
        rows[0] += minima(p, y, n) if terms.smaller else products(p, y, n)
        rows[1] += products(p, p, n) if terms.squares else total(p, n)
    rows[2] += products(y, y, n) if terms.squares else total(y, n)
    if terms.confidence:
        rows[4] += cubes(p, n) if terms.squares else products(p, p, n)
