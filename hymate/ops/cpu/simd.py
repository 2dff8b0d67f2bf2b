"""Vectors of LANES numbers as values of compiled code.

They live in registers: in two or four where LANES are more than one holds, which LLVM sees to. The compiler's own
vectoriser is defeated by loops over many arrays that might overlap, and keeps running sums in memory.

Numba keeps compiled kernels by the date of the file they are in: after a change here, touch those that import it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, models, register_model

LANES = 16

# 2**f for |f| <= 1/2 and atanh(s) / s in s**2 for s <= 1/3, from the constant on
EXP2 = (1.0, 0.6931472, 0.24022348, 0.05550357, 0.009666374, 0.0013390867)
ATANH = (1.0, 0.33333320, 0.20003835, 0.14116977, 0.13433775)
ROUND = 1.5 * 2**23  # adding it rounds a float32 to an integer, which then fills the last bits

CONTRACT = ("contract",)
FAST = ("reassoc", "contract", "nsz", "arcp")  # NaN and infinity keep their meaning
int32 = ir.IntType(32)


class Vector(types.Type):
    """LANES numbers of one floating type."""

    def __init__(self, real: types.Float) -> None:
        self.real = real
        super().__init__(name=f"Vector({real})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Vector) -> None:
        element = ir.FloatType() if fe_type.real == types.float32 else ir.DoubleType()
        super().__init__(manager, fe_type, ir.VectorType(element, LANES))


# ------------------------------------------------------------------------------------------------------- memory


def _address(context: Any, builder: Any, array_type: Any, array: Any, row: Any, column: Any) -> Any:
    """Of one element of a matrix, without the wrap-around of negative indices."""
    struct = context.make_array(array_type)(context, builder, array)
    strides = [builder.extract_value(struct.strides, k) for k in range(2)]
    if array_type.layout == "C":
        strides[1] = ir.Constant(strides[1].type, array_type.dtype.bitwidth // 8)
    elif array_type.layout == "F":
        strides[0] = ir.Constant(strides[0].type, array_type.dtype.bitwidth // 8)
    offset = builder.add(builder.mul(row, strides[0]), builder.mul(column, strides[1]))
    base = builder.bitcast(struct.data, ir.IntType(8).as_pointer())
    return builder.gep(base, [offset])


def _constant(like: Any, value: float) -> Any:
    return ir.Constant(like.type, [value] * LANES)


def _shuffle(builder: Any, a: Any, b: Any, lanes: Sequence[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(int32, len(lanes)), list(lanes)))


def _splat(builder: Any, value: Any) -> Any:
    empty = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    one = builder.insert_element(empty, value, int32(0))
    return _shuffle(builder, one, one, [0] * LANES)


@intrinsic
def load(typingctx: Any, matrix: Any, row: Any, column: Any) -> Any:
    """LANES numbers of a row, from ``column`` on."""
    result = Vector(matrix.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature.args[0], *args)
        vector = context.get_value_type(result)
        return builder.load(builder.bitcast(address, vector.as_pointer()), align=matrix.dtype.bitwidth // 8)

    return result(matrix, types.intp, types.intp), codegen


@intrinsic
def store(typingctx: Any, matrix: Any, row: Any, column: Any, value: Any) -> Any:
    """The inverse of ``load``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature.args[0], *args[:3])
        pointer = builder.bitcast(address, args[3].type.as_pointer())
        builder.store(args[3], pointer, align=matrix.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(matrix, types.intp, types.intp, value), codegen


@intrinsic
def broadcast(typingctx: Any, matrix: Any, row: Any, column: Any) -> Any:
    """One number of a matrix in every lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature.args[0], *args)
        element = context.get_value_type(matrix.dtype)
        return _splat(builder, builder.load(builder.bitcast(address, element.as_pointer())))

    return Vector(matrix.dtype)(matrix, types.intp, types.intp), codegen


@intrinsic
def prefetch(typingctx: Any, matrix: Any, row: Any, column: Any) -> Any:
    """Ask for the cache line of an element, which need not exist."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature.args[0], *args)
        kind = ir.FunctionType(ir.VoidType(), [address.type, int32, int32, int32])
        function = builder.module.declare_intrinsic("llvm.prefetch", (address.type,), kind)
        builder.call(function, [address, int32(0), int32(3), int32(1)])
        return context.get_dummy_value()

    return types.void(matrix, types.intp, types.intp), codegen


@intrinsic
def transpose_tile(typingctx: Any, source: Any, row: Any, column: Any, out: Any, to_row: Any, to_column: Any) -> Any:
    """out[to_row + j, to_column + i] = source[row + i, column + j] for i, j < 8."""
    # Exchanges between rows 1, 2 and 4 apart, within half vectors and then between halves: as AVX shuffles them.
    steps = (
        (1, (0, 8, 1, 9, 4, 12, 5, 13), (2, 10, 3, 11, 6, 14, 7, 15)),
        (2, (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15)),
        (4, (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)),
    )
    columns = (0, 2, 1, 3, 4, 6, 5, 7)  # where they leave each

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        align = source.dtype.bitwidth // 8
        vector = ir.VectorType(context.get_value_type(source.dtype), 8)

        def pointer(array_type: Any, place: Sequence[Any], k: int) -> Any:
            array, row, column = place
            address = _address(context, builder, array_type, array, builder.add(row, row.type(k)), column)
            return builder.bitcast(address, vector.as_pointer())

        x = [builder.load(pointer(source, args[:3], k), align=align) for k in range(8)]
        for distance, low, high in steps:
            for k in range(8):
                if not k & distance:
                    pair = x[k], x[k + distance]
                    x[k], x[k + distance] = (_shuffle(builder, *pair, lanes) for lanes in (low, high))
        for j in range(8):
            builder.store(x[columns[j]], pointer(out, args[3:], j), align=align)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, out, types.intp, types.intp), codegen


# --------------------------------------------------------------------------------------------------- arithmetic


@intrinsic
def splat(typingctx: Any, value: Any) -> Any:
    """One number in every lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _splat(builder, args[0])

    return Vector(value)(value), codegen


@intrinsic
def mul(typingctx: Any, a: Any, b: Any) -> Any:
    """a * b."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fmul(*args, flags=FAST)

    return a(a, b), codegen


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(builder.fmul(args[0], args[1], flags=FAST), args[2], flags=FAST)

    return a(a, b, c), codegen


@intrinsic
def total(typingctx: Any, a: Any) -> Any:
    """The sum over the lanes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, width = args[0], LANES
        while width > 1:
            width //= 2
            low, high = (_shuffle(builder, value, value, range(k, k + width)) for k in (0, width))
            value = builder.fadd(low, high, flags=FAST)
        return builder.extract_element(value, int32(0))

    return a.real(a), codegen


# Each of the following is a function of its own, for its sums must not be reordered as in those that call it.


def _polynomial(builder: Any, x: Any, coefficients: Sequence[float]) -> Any:
    result = _constant(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        product = builder.fmul(result, x, flags=CONTRACT)
        result = builder.fadd(product, _constant(x, coefficient), flags=CONTRACT)
    return result


def _each_lane(builder: Any, name: str, x: Any) -> Any:
    function = builder.module.declare_intrinsic(name, (x.type.element,))
    result = x
    for lane in map(int32, range(LANES)):
        value = builder.call(function, [builder.extract_element(x, lane)])
        result = builder.insert_element(result, value, lane)
    return result


def _exp2_of(builder: Any, x: Any) -> Any:
    """Good to about two units in the last place in float32, within +-126; beyond that the value there."""
    if x.type.element == ir.DoubleType():
        return _each_lane(builder, "llvm.exp", builder.fmul(x, _constant(x, math.log(2))))
    for order, limit in (("<", -126.0), (">", 126.0)):
        bound = _constant(x, limit)
        x = builder.select(builder.fcmp_ordered(order, x, bound), bound, x)
    shifted = builder.fadd(x, _constant(x, ROUND))
    power = _polynomial(builder, builder.fsub(x, builder.fsub(shifted, _constant(x, ROUND))), EXP2)
    integers = ir.VectorType(int32, LANES)
    exponent = builder.shl(builder.bitcast(shifted, integers), ir.Constant(integers, [23] * LANES))
    return builder.bitcast(builder.add(builder.bitcast(power, integers), exponent), x.type)


def _sigmoid_of(builder: Any, x: Any) -> Any:
    one = _constant(x, 1.0)
    power = _exp2_of(builder, builder.fmul(x, _constant(x, -1 / math.log(2))))
    return builder.fdiv(one, builder.fadd(one, power))


def _softplus_of(builder: Any, x: Any) -> Any:
    """max(x, 0) + log(1 + u), u = exp(-|x|); 2 atanh(u / (2 + u)) is log(1 + u) with a small relative error."""
    zero = _constant(x, 0.0)
    positive = builder.fcmp_ordered(">", x, zero)
    scale = builder.select(positive, _constant(x, -1 / math.log(2)), _constant(x, 1 / math.log(2)))
    u = _exp2_of(builder, builder.fmul(x, scale))
    if x.type.element == ir.DoubleType():
        log = _each_lane(builder, "llvm.log", builder.fadd(u, _constant(x, 1.0)))
    else:
        s = builder.fdiv(u, builder.fadd(u, _constant(x, 2.0)))
        log = builder.fmul(_constant(x, 2.0), builder.fmul(s, _polynomial(builder, builder.fmul(s, s), ATANH)))
    return builder.fadd(builder.select(positive, x, zero), log)


def _function(name: str, emit: Callable[[Any, Any], Any]) -> Any:
    @intrinsic
    def inner(typingctx: Any, a: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit(builder, args[0])

        return a(a), codegen

    def outer(a: Any) -> Any:
        return inner(a)

    outer.__name__ = outer.__qualname__ = name
    return njit(fastmath={"contract"})(outer)


exp2 = _function("exp2", _exp2_of)
sigmoid = _function("sigmoid", _sigmoid_of)
softplus = _function("softplus", _softplus_of)
