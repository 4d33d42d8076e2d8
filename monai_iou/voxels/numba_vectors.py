"""Vectors for runs of voxels, where the compiler makes none: a run is shorter than the rows that it unrolls a loop for.

Each function becomes the instructions of the processor's own vectors (LLVM's vector types,
https://llvm.org/docs/LangRef.html#vector-type). They take arrays in one piece, and their last vector may reach beyond
what they are asked for: :data:`LANES` elements behind it must belong to the array, but may hold anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

LANES = 16  # of float32; LLVM splits them where a processor has fewer
COMPARED = 32  # regions at a time

_FLOAT, _INT, _INDEX = ir.FloatType(), ir.IntType(32), ir.IntType(64)


def _intrinsic(write: Callable[..., Any]) -> Any:
    """Return what loops call; Numba's own annotations know no arguments of it."""
    return extending.intrinsic(write)


def _load(builder: Any, data: Any, index: Any, element: Any, lanes: int) -> Any:
    place = builder.bitcast(builder.gep(data, [index]), ir.VectorType(element, lanes).as_pointer())
    return builder.load(place, align=4)


def _data(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    return context.make_array(kind)(context, builder, value).data


def _in_all_lanes(builder: Any, value: Any) -> Any:
    kind = ir.VectorType(value.type, LANES)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _INT(0))
    first = ir.Constant(ir.VectorType(_INT, LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), first)


def _sum_of_lanes(builder: Any, vector: Any) -> Any:
    """Return the sum of the lanes: halves are added until one is left."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        nothing = ir.Constant(ir.VectorType(_FLOAT, 2 * lanes), ir.Undefined)
        kind = ir.VectorType(_INT, lanes)
        halves = [ir.Constant(kind, list(range(start, start + lanes))) for start in (0, lanes)]
        vector = builder.fadd(*(builder.shuffle_vector(vector, nothing, half) for half in halves))
    return builder.extract_element(vector, _INT(0))


@_intrinsic
def change_bits(typing: Any, groups: Any, start: Any) -> Any:
    """Return which of :data:`COMPARED` regions from `start` >= 1 on differ from the one before, a bit for each."""

    def write(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data, index = _data(context, builder, signature.args[0], arguments[0]), arguments[1]
        before = _load(builder, data, builder.sub(index, _INDEX(1)), _INT, COMPARED)
        differ = builder.icmp_signed("!=", _load(builder, data, index, _INT, COMPARED), before)
        return builder.zext(builder.bitcast(differ, ir.IntType(COMPARED)), _INDEX)

    return types.uint64(groups, types.int64), write


@_intrinsic
def lowest_bit(typing: Any, bits: Any) -> Any:
    """Return the position of the lowest bit that is set; one must be."""

    def write(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), write


def _by_vectors(builder: Any, start: Any, end: Any, body: Any) -> Any:
    """Write a loop that calls `body` with the place of each vector below `end`; return the place where it stops."""
    place = cgutils.alloca_once_value(builder, start)
    check, inside, behind = (builder.append_basic_block(name) for name in ("check", "inside", "behind"))
    builder.branch(check)
    builder.position_at_end(check)
    current = builder.load(place)
    builder.cbranch(builder.icmp_signed("<", current, end), inside, behind)
    builder.position_at_end(inside)
    body(current)
    builder.store(builder.add(current, _INDEX(LANES)), place)
    builder.branch(check)
    builder.position_at_end(behind)
    return current


@_intrinsic
def sum_between(typing: Any, values: Any, start: Any, stop: Any) -> Any:
    """Return the sum of values[start:stop], float32; that of no values is 0."""

    def write(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data, (_, start, stop) = _data(context, builder, signature.args[0], arguments[0]), arguments
        zeros = ir.Constant(ir.VectorType(_FLOAT, LANES), [0.0] * LANES)
        total = cgutils.alloca_once_value(builder, zeros)

        def add(place: Any) -> None:
            builder.store(builder.fadd(builder.load(total), _load(builder, data, place, _FLOAT, LANES)), total)

        rest = _by_vectors(builder, start, builder.sub(stop, _INDEX(LANES - 1)), add)
        left = _in_all_lanes(builder, builder.trunc(builder.sub(stop, rest), _INT))
        counts = builder.icmp_signed(">", left, ir.Constant(ir.VectorType(_INT, LANES), list(range(LANES))))
        last = builder.select(counts, _load(builder, data, rest, _FLOAT, LANES), zeros)
        return _sum_of_lanes(builder, builder.fadd(builder.load(total), last))

    return types.float32(values, types.int64, types.int64), write


@_intrinsic
def fill(typing: Any, values: Any, start: Any, stop: Any, number: Any) -> Any:
    """Write a float32 to values[start:stop], and to what the last vector has behind."""

    def write(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data, (_, start, stop, number) = _data(context, builder, signature.args[0], arguments[0]), arguments
        vector = _in_all_lanes(builder, number)

        def store(place: Any) -> None:
            target = builder.bitcast(builder.gep(data, [place]), vector.type.as_pointer())
            builder.store(vector, target, align=4)

        _by_vectors(builder, start, stop, store)
        return context.get_dummy_value()

    return types.none(values, types.int64, types.int64, types.float32), write
