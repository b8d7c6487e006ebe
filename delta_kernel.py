"""CPU kernel of the mixer operator (delta_mixer.py), compiled by Numba.

For each sentence and head the kernel reads the input projection's own rows and does the convolution, SiLU,
normalisation, resonance flux, gates, both delta-rule states and the output norm, token by token: the states (2 x 32 x
32 numbers) stay in the first-level cache, so the sequential form is the fast one on a CPU. Where no initial states are
given, the first BLOCK tokens are done without states (`recur_from_zero`) in the backward pass, and in the forward pass
if no more follow (padding counts) and no final states are wanted. Texts may also be packed, several in one row without
padding: a table says where each begins (`pack_lengths`). The formulas are those of `parallel_mixer`, its twin
in PyTorch; the tests compare the two. For `begin_layer` it also adds the projections' biases. Below it stand the
kernels of what is between a layer's other matrix products, GELU and layer normalisation, and of products in int8.

The backward pass has from the forward pass the states at the starts of blocks of BLOCK tokens, and computes all else
anew, block by block from the end. Parameters' gradients are summed per group of sentences, then over the groups: the
order does not depend on threads.
"""
from __future__ import annotations

import ctypes
import functools
import itertools
import math
import os
import struct
import sys
import threading
from array import array
from typing import Any, Callable, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .delta_mixer import BLOCK, HIDDEN

try:  # in a `try`, as transformers refuses a model of which a file imports, outside of one, what is not installed
    from llvmlite import ir
    from numba import cfunc, njit, types
    from numba.core import cgutils
    from numba.extending import intrinsic, models, register_model
except ImportError:
    raise

# ----------------------------------------------------------------------------------------------------------------------
# Vectors of float32 as a Numba type: what is written as a vector is one in the machine code; sums stay in registers


def compiled_for() -> frozenset[str]:
    """The extensions of the CPU that Numba compiles for, by what its cache on disk goes by too; none if it is mute."""
    try:
        from numba.core.registry import cpu_target
        return frozenset(cpu_target.target_context.codegen().magic_tuple()[2].split(","))
    except (ImportError, AttributeError, LookupError, TypeError):
        return frozenset()


EXTENSIONS = compiled_for()
WIDTH = 16
# That of `load_n`, `splat_n` and `sums_n`, for loops that hold a dozen vectors at once: AVX512 has 32 registers of 16
# numbers, AVX2 16 of 8.
NARROW = WIDTH if "+avx512f" in EXTENSIONS else WIDTH // 2
FAST = ("contract", "nsz", "arcp", "reassoc")  # not-a-number and infinity keep their meaning
JIT = {"nogil": True, "cache": True, "fastmath": set(FAST), "error_model": "numpy"}
# Of functions that kernels call, which are inlined: if they were called, a process that has just compiled them would
# link them otherwise than one that reads the cache, and the last bits of the two's results would differ.
PART = JIT | {"forceinline": True}
f32 = np.float32
ZERO, ONE = f32(0), f32(1)


class Lanes(types.Type):
    """Numba's type of a vector of `width` float32."""

    def __init__(self, width: int):
        super().__init__(f"float32x{width}")
        self.width = width

    def of(self, kind: ir.Type, value: Any = None) -> Any:
        """LLVM's vector type of as many of `kind`, or such a constant, of `value` in every place."""
        vector = ir.VectorType(kind, self.width)
        return vector if value is None else ir.Constant(vector, [value] * self.width)


lanes = Lanes(WIDTH)
FLOAT, INTEGER = ir.FloatType(), ir.IntType(32)


@register_model(Lanes)
class LanesModel(models.PrimitiveModel):
    def __init__(self, manager, numba_type):
        super().__init__(manager, numba_type, numba_type.of(FLOAT))


FLOATS, FLAGS, NUMBERS = (types.Array(kind, 1, "C") for kind in (types.float32, types.boolean, types.int64))


def as_vectors(context, builder, signature, args) -> list[ir.Value]:
    """The arguments as vectors of the result's type: a scalar stands for a vector of it."""
    found, result = [], signature.return_type
    for kind, value in zip(signature.args, args):
        if kind != result:
            value, none = context.cast(builder, value, kind, types.float32), ir.Constant(result.of(FLOAT), ir.Undefined)
            value = builder.insert_element(none, value, INTEGER(0))
            value = builder.shuffle_vector(value, none, result.of(INTEGER, 0))
        found.append(value)
    return found


def address(context, builder, signature, args, array: int = 0, index: ir.Value | None = None) -> ir.Value:
    """Where element `index`, args[1] if there is none, of an array among the arguments stands."""
    data = cgutils.create_struct_proxy(signature.args[array])(context, builder, args[array]).data
    return builder.gep(data, [args[1] if index is None else index])


def vector_address(kind: Lanes, context, builder, signature, args) -> ir.Value:
    """The same of a vector that begins there."""
    return builder.bitcast(address(context, builder, signature, args), kind.of(FLOAT).as_pointer())


def llvm(builder, name: str, kind: Lanes, result: ir.Type, *args: ir.Value, **options: Any) -> ir.Value:
    """Call LLVM's own function `name` for vectors of this kind."""
    function = ir.FunctionType(result, [a.type for a in args])
    function = cgutils.get_or_insert_function(builder.module, function, f"llvm.{name}.v{kind.width}f32")
    return builder.call(function, args, **options)


def made(kind: Lanes) -> tuple[Callable, Callable, Callable]:
    """What makes vectors of this kind: `load`, `splat` and `sums`."""
    @intrinsic
    def load(typingctx, array, index):
        """array[index:index + width] of a flat float32 array."""
        def codegen(context, builder, signature, args):
            value = builder.load(vector_address(kind, context, builder, signature, args))
            value.align = 4
            return value
        return kind(array, types.intp), codegen

    @intrinsic
    def splat(typingctx, x):
        """A vector of x."""
        return kind(x), lambda *given: as_vectors(*given)[0]

    @intrinsic
    def sums(typingctx, array, index):
        """A vector of the sums of as many vectors, which stand one after the other from array[index] on."""
        def codegen(context, builder, signature, args):
            first, width = vector_address(kind, context, builder, signature, args), kind.width
            found = [builder.load(builder.gep(first, [INTEGER(i)]), align=4) for i in range(width)]
            step = 1
            while len(found) > 1:  # of two, the sums of lanes `step` apart: the first one's where lane & step is 0
                masks = [ir.Constant(kind.of(INTEGER), [(lane & ~step | part) + width * bool(lane & step)
                                                        for lane in range(width)]) for part in (0, step)]
                found = [builder.fadd(*(builder.shuffle_vector(x, y, mask) for mask in masks), FAST)
                         for x, y in zip(found[::2], found[1::2])]
                step *= 2
            return found[0]
        return kind(array, types.intp), codegen

    return load, splat, sums


load, splat, sums = made(lanes)
load_n, splat_n, sums_n = made(Lanes(NARROW))


@intrinsic
def store(typingctx, array, index, value):
    """array[index:index + width] = value."""
    def codegen(context, builder, signature, args):
        builder.store(args[2], vector_address(value, context, builder, signature, args)).align = 4
        return context.get_dummy_value()
    return types.none(array, types.intp, value), codegen


@intrinsic
def item(typingctx, array, index):
    """array[index], without Numba's look whether an index counts from the end."""
    return types.float32(array, types.intp), lambda *given: given[1].load(address(*given))


@intrinsic
def prefetch(typingctx, array, index):
    """Have array[index] brought into the second-level cache; `index` may lie outside."""
    def codegen(context, builder, signature, args):
        byte, number = ir.IntType(8).as_pointer(), INTEGER
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        at = builder.bitcast(address(context, builder, signature, args), byte)
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [at, number(0), number(2), number(1)])
        return context.get_dummy_value()
    return types.none(array, types.intp), codegen


def reader(*kinds: types.Type) -> Callable:
    """A function that reads a kernel's arguments of these types, as a tuple, from where `in_threads` lays them down.

    A kernel's `call` is the address of an array of whole numbers: how many tasks are taken, how many threads have come,
    then the arguments: flags and whole numbers, the bits of a float32, an array's address and size.
    """
    @intrinsic
    def read(typingctx, call):
        def codegen(context, builder, signature, args):
            def word():
                return builder.load(builder.gep(place, [ir.Constant(ir.IntType(64), next(at))]))

            place, at, found = builder.inttoptr(args[0], ir.IntType(64).as_pointer()), itertools.count(2), []
            for kind in kinds:
                value = word()
                if isinstance(kind, types.Array):
                    array = context.make_array(kind)(context, builder)
                    data = builder.inttoptr(value, array.data.type)
                    width = ir.Constant(ir.IntType(64), context.get_abi_sizeof(data.type.pointee))
                    context.populate_array(array, data=data, shape=[word()], strides=[width], itemsize=width,
                                           meminfo=None)
                    value = array._getvalue()
                elif kind == types.float32:
                    value = builder.bitcast(builder.trunc(value, INTEGER), FLOAT)
                elif kind == types.boolean:
                    value = builder.trunc(value, ir.IntType(1))
                found.append(value)
            return context.make_tuple(builder, signature.return_type, found)
        return types.Tuple(kinds)(types.intp), codegen
    return read


def counter(at: int) -> Callable:
    """A function that counts in place `at` of a `call`, for all its threads; returns the number before."""
    @intrinsic
    def count(typingctx, call):
        def codegen(context, builder, signature, args):
            word = ir.IntType(64)
            place = builder.gep(builder.inttoptr(args[0], word.as_pointer()), [word(at)])
            return builder.atomic_rmw("add", place, word(1), "monotonic")
        return types.intp(types.intp), codegen
    return count


take, come = counter(0), counter(1)  # a task's number, a thread's number


def elementwise(build: Callable) -> Callable:
    """An operation on vectors, or on vectors and scalars, from its LLVM instructions."""
    def typed(*kinds):
        kind = next(kind for kind in kinds if isinstance(kind, Lanes))
        return kind(*kinds), lambda *given: build(given[1], *as_vectors(*given))
    return typed


@intrinsic
def fma(typingctx, x, y, z):
    """x * y + z, in one instruction where there is one."""
    return elementwise(lambda b, x, y, z: b.fadd(b.fmul(x, y, FAST), z, FAST))(x, y, z)


@intrinsic
def mul(typingctx, x, y):
    return elementwise(lambda b, x, y: b.fmul(x, y, FAST))(x, y)


@intrinsic
def add(typingctx, x, y):
    return elementwise(lambda b, x, y: b.fadd(x, y, FAST))(x, y)


@intrinsic
def sub(typingctx, x, y):
    return elementwise(lambda b, x, y: b.fsub(x, y, FAST))(x, y)


@intrinsic
def total(typingctx, x):
    """The sum of a vector's entries."""
    def codegen(context, builder, signature, args):
        return llvm(builder, "vector.reduce.fadd", x, FLOAT, FLOAT(0.0), args[0], fastmath=FAST)
    return types.float32(x), codegen


@intrinsic
def peak(typingctx, x):
    """The largest of a vector's entries."""
    def codegen(context, builder, signature, args):
        return llvm(builder, "vector.reduce.fmax", x, FLOAT, args[0], fastmath=FAST)
    return types.float32(x), codegen


@intrinsic
def div(typingctx, x, y):
    return elementwise(lambda b, x, y: b.fdiv(x, y, FAST))(x, y)


@intrinsic
def largest(typingctx, x, y):
    """The larger entries; x where y is not a number."""
    return elementwise(lambda b, x, y: b.select(b.fcmp_ordered(">", y, x), y, x))(x, y)


@intrinsic
def exp(typingctx, x):
    """e^x to about 2e-7 of itself, x cut to +-87, by a power of two and the rest's Taylor polynomial of degree 6.

    The argument is split as in Cephes' expf (Moshier 1992). Not-a-number stays so.
    """
    def build(builder, x):
        def constant(value):
            return lanes.of(FLOAT, float(f32(value)))

        def polynomial(x, *coefficients):
            result = constant(coefficients[0])
            for coefficient in coefficients[1:]:
                result = builder.fadd(builder.fmul(result, x, FAST), constant(coefficient), FAST)
            return result

        for sign, limit in ((">", constant(87.0)), ("<", constant(-87.0))):
            x = builder.select(builder.fcmp_ordered(sign, x, limit), limit, x)
        n = llvm(builder, "floor", lanes, x.type, polynomial(x, math.log2(math.e), 0.5))
        for part in (-0.693359375, 2.12194440e-4):
            x = builder.fadd(x, builder.fmul(n, constant(part), FAST), FAST)
        rest = polynomial(x, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
        exponent = builder.add(builder.fptosi(n, lanes.of(INTEGER)), lanes.of(INTEGER, 127))
        return builder.fmul(rest, builder.bitcast(builder.shl(exponent, lanes.of(INTEGER, 23)), x.type), FAST)

    return elementwise(build)(x)


@njit(**PART)
def sigmoid(x):
    return div(ONE, add(exp(sub(ZERO, x)), ONE))


# ----------------------------------------------------------------------------------------------------------------------
# Kernel. Arrays are flat; rows of K channels are padded with zeros to KP, a multiple of WIDTH; tokens are in the
# head's own order


class Weights(NamedTuple):
    """Parameters of one head."""
    conv: np.ndarray  # (4, 3, KP)
    bilinear: np.ndarray  # (KP, KP), k^T W v
    bilinear_t: np.ndarray  # its transpose
    mlp: np.ndarray  # (HIDDEN, 2 KP), of k and v
    mlp_t: np.ndarray  # its transpose
    small: np.ndarray  # (3, HIDDEN): the MLP's weight of the bilinear form, its biases, its output weights
    norm: np.ndarray  # (KP), of the output
    # (8, and 8 unused): scale of the bilinear form, bias of the MLP's output, of the five gates; 1 with a bias
    numbers: np.ndarray
    bias: np.ndarray  # (3, KP), of q, k, v before the convolution


class Work(NamedTuple):
    """What is known of one block of tokens."""
    x: np.ndarray  # (3 + BLOCK, 3 KP), input of the convolution, from three tokens before the block on
    y: np.ndarray  # (BLOCK, 3 KP), its output
    s: np.ndarray  # (BLOCK, 3 KP), sigmoid of y
    z: np.ndarray  # (BLOCK, 3 KP), q, k, v
    inverse: np.ndarray  # (2, BLOCK), 1 / norm of q and k before their normalisation
    u: np.ndarray  # (BLOCK, KP), W^T k
    form: np.ndarray  # (BLOCK), k^T W v
    pre: np.ndarray  # (BLOCK, HIDDEN), the MLP's hidden units before their SiLU
    hidden: np.ndarray  # (BLOCK, HIDDEN), sigmoid of pre
    gates: np.ndarray  # (6, BLOCK): beta, a_fast, a_slow, g_fast, g_slow, psi before its clamp
    at: np.ndarray  # (BLOCK, 8): M row by row, beta, read weights of the two states, q . k
    real: np.ndarray  # (BLOCK) bool, False at padding
    kept: np.ndarray  # (BLOCK) bool, False where state dropout drops the write
    o: np.ndarray  # (BLOCK, KP), what is read, before the output norm
    k_state: np.ndarray  # (BLOCK, 2, KP), S^T k of both states before the token
    states: np.ndarray  # (slots, 2, K, KP)
    slot: np.ndarray  # (BLOCK), where in `states` the state before the token is
    order: np.ndarray  # (BLOCK + 1), which tokens of the block are real, and their number
    # Of `recur_from_zero`: tokens are the real ones, a row is of one token, its entries of those before it and itself;
    # of `decay` and `weight` only the first row is used unless all are kept
    keys: np.ndarray  # (KP, BLOCK), k of each
    beta: np.ndarray  # (BLOCK), beta of each
    products: np.ndarray  # (2, BLOCK, BLOCK), k . k and q . k
    decay: np.ndarray  # (4, BLOCK, BLOCK), product of the transitions between; of a token with itself the identity
    weight: np.ndarray  # (6, BLOCK, BLOCK), of earlier errors: in those of both states (4), in what is read (2)
    error: np.ndarray  # (2, BLOCK, KP), what a token adds to both states along k, before beta


class Gradients(NamedTuple):
    """Sums over the sentences of a group of one head, as `Weights`; then work space of the backward pass."""
    conv: np.ndarray
    bilinear: np.ndarray
    mlp: np.ndarray
    small: np.ndarray
    norm: np.ndarray
    numbers: np.ndarray
    state: np.ndarray  # (2, K, KP), of the states after the token in work
    z: np.ndarray  # (BLOCK, 3 KP), of q, k, v, then of y with three rows more: those of the block after
    at: np.ndarray  # (BLOCK, 8)
    pre: np.ndarray  # (BLOCK, HIDDEN)
    form: np.ndarray  # (BLOCK)
    rows: np.ndarray  # (6, KP), vectors of the token in work; the last two: `state`^T k, k of the token before it
    lines: np.ndarray  # (3, KP, NARROW), whose rows are yet to be summed up
    error: np.ndarray  # (2, BLOCK, KP), of w.error
    error_t: np.ndarray  # (2, KP, BLOCK), no gradients: w.error transposed
    state_t: np.ndarray  # (2, KP, KP), transposed `state`
    pairs: np.ndarray  # (7, BLOCK): of transitions' products of all later tokens (4), beta, q . k and k . k


@njit(**PART)
def zeros(count):
    """`count` zeros that begin at a cache line: a vector that lies in two lines takes twice as long."""
    room = np.zeros(count + WIDTH, f32)
    skip = -(room.ctypes.data // 4) % WIDTH
    return room[skip:skip + count]


@njit(inline="always", **JIT)
def copy_row(source, i, target, j, count):
    """target[j:j + count] = source[i:i + count]."""
    whole = count // WIDTH * WIDTH
    for c in range(0, whole, WIDTH):
        store(target, j + c, load(source, i + c))
    for c in range(whole, count):
        target[j + c] = source[i + c]


@njit(**PART)
def prepare(start, n, first, h, ahead, length, K, heads, reverse, convolution, flux, coupling, hierarchical, read_gates,
            row, proj, mask, keep, p, w):
    """Everything of the block's tokens that does not depend on the states; rows up to the next multiple of 4 are zeros.

    `ahead`: by how many numbers the rows that are needed next are further on in `proj`; they are fetched meanwhile.
    """
    KP = len(p.norm)
    wide = 3 * KP
    n4 = (n + 3) // 4 * 4
    for i in range(-3, n4):
        t = length - 1 - start - i if reverse else start + i
        token = first + t
        real = 0 <= start + i and i < n and mask[token]
        for part in range(3):
            to = (3 + i) * wide + part * KP
            if real:
                copy_row(proj, token * row + (part * heads + h) * K, w.x, to, K)
                for c in range(0, KP if p.numbers[7] else 0, WIDTH):
                    store(w.x, to + c, add(load(w.x, to + c), load(p.bias, part * KP + c)))
            else:
                for c in range(0, KP, WIDTH):
                    store(w.x, to + c, splat(ZERO))
        if i >= 0:
            at = token * row + ahead
            for part in range(3):
                for c in range(0, K, WIDTH):
                    prefetch(proj, at + (part * heads + h) * K + c)
            for gate in range(5):
                prefetch(proj, at + (3 * K + gate) * heads + h)
            w.real[i], w.kept[i] = real, real and (len(keep) == 0 or keep[token * heads + h])
            for gate in range(5):
                at_gate = token * row + (3 * K + gate) * heads + h
                w.gates[gate * BLOCK + i] = proj[at_gate] + p.numbers[2 + gate] if real else ZERO
    for c in range(0, wide, WIDTH):
        w0, w1, w2, w3 = load(p.conv, c), load(p.conv, wide + c), load(p.conv, 2 * wide + c), load(p.conv, 3 * wide + c)
        x3, x2, x1 = load(w.x, c), load(w.x, wide + c), load(w.x, 2 * wide + c)
        for i in range(n4):
            x0 = load(w.x, (3 + i) * wide + c)
            y = fma(x0, w0, fma(x1, w1, fma(x2, w2, mul(x3, w3)))) if convolution else x0
            s = sigmoid(y)
            store(w.y, i * wide + c, y)
            store(w.s, i * wide + c, s)
            store(w.z, i * wide + c, mul(y, s))
            x3, x2, x1 = x2, x1, x0
    for i in range(n4):
        for part in range(2):
            at, square = i * wide + part * KP, splat(ZERO)
            for c in range(at, at + KP, WIDTH):
                square = fma(load(w.z, c), load(w.z, c), square)
            inverse = ONE / math.sqrt(total(square) + f32(1e-6))
            w.inverse[part * BLOCK + i] = inverse
            for c in range(at, at + KP, WIDTH):
                store(w.z, c, mul(load(w.z, c), inverse))
    if flux:
        for i in range(0, n4, 4):  # four tokens at a time: each weight is read once for them
            k0, k1, k2, k3 = i * wide + KP, (i + 1) * wide + KP, (i + 2) * wide + KP, (i + 3) * wide + KP
            for c in range(0, KP, WIDTH):
                u0 = u1 = u2 = u3 = splat(ZERO)
                for a in range(K):
                    weight = load(p.bilinear, a * KP + c)
                    u0, u1 = fma(weight, item(w.z, k0 + a), u0), fma(weight, item(w.z, k1 + a), u1)
                    u2, u3 = fma(weight, item(w.z, k2 + a), u2), fma(weight, item(w.z, k3 + a), u3)
                store(w.u, i * KP + c, u0), store(w.u, (i + 1) * KP + c, u1)
                store(w.u, (i + 2) * KP + c, u2), store(w.u, (i + 3) * KP + c, u3)
            h0 = h1 = h2 = h3 = load(p.small, HIDDEN)
            for a in range(2 * KP):  # k and v stand side by side
                weight = load(p.mlp_t, a * HIDDEN)
                h0, h1 = fma(weight, item(w.z, k0 + a), h0), fma(weight, item(w.z, k1 + a), h1)
                h2, h3 = fma(weight, item(w.z, k2 + a), h2), fma(weight, item(w.z, k3 + a), h3)
            store(w.pre, i * HIDDEN, h0), store(w.pre, (i + 1) * HIDDEN, h1)
            store(w.pre, (i + 2) * HIDDEN, h2), store(w.pre, (i + 3) * HIDDEN, h3)
        for i in range(n4):
            form = splat(ZERO)
            for c in range(0, KP, WIDTH):
                form = fma(load(w.u, i * KP + c), load(w.z, i * wide + 2 * KP + c), form)
            w.form[i] = total(form)
            pre = fma(load(p.small, 0), w.form[i] * p.numbers[0], load(w.pre, i * HIDDEN))
            hidden = sigmoid(pre)
            store(w.pre, i * HIDDEN, pre), store(w.hidden, i * HIDDEN, hidden)
            w.gates[5 * BLOCK + i] = total(mul(mul(pre, hidden), load(p.small, 2 * HIDDEN))) + p.numbers[1]
    for gate in range(6 if flux else 5):
        for i in range(gate * BLOCK, gate * BLOCK + n4, WIDTH):
            store(w.gates, i, sigmoid(load(w.gates, i)))
    for i in range(n):
        psi = min(max(w.gates[5 * BLOCK + i], f32(0.01)), f32(0.99)) if flux else f32(0.5)
        kappa = f32(0.05) + f32(0.10) * psi if coupling and hierarchical else ZERO
        f, s = w.gates[BLOCK + i] * (ONE - f32(0.10) * psi), w.gates[2 * BLOCK + i] * (ONE - f32(0.05) * psi)
        out_fast, out_slow, alpha = kappa * psi, kappa * (ONE - psi), f32(0.5) + f32(0.3) * psi
        w.at[8 * i + 5] = alpha * (w.gates[3 * BLOCK + i] if read_gates else ONE)
        w.at[8 * i + 6] = (ONE - alpha) * (w.gates[4 * BLOCK + i] if read_gates else ONE) if hierarchical else ZERO
        if w.kept[i]:
            w.at[8 * i], w.at[8 * i + 1] = f * (ONE - out_fast), f * out_fast
            w.at[8 * i + 2], w.at[8 * i + 3] = s * out_slow, s * (ONE - out_slow)
            w.at[8 * i + 4] = w.gates[i]
        else:
            w.at[8 * i], w.at[8 * i + 1], w.at[8 * i + 2], w.at[8 * i + 3], w.at[8 * i + 4] = ONE, ZERO, ZERO, ONE, ZERO


@njit(**PART)
def recur(n, step, K, w):
    """Both states over the block's tokens, from the first slot of w.states on; `step` 1 keeps those before each token.

    At least one token is real.

    Columns of the states are independent of one another. As a token changes them, what the next one reads of them is
    summed up: so no sum waits for itself, as it would in a pass of its own.
    """
    KP = len(w.o) // BLOCK
    wide, size, m = 3 * KP, K * KP, 0
    for i in range(n):
        w.slot[i] = m * step
        if w.real[i]:
            w.order[m], product = i, splat_n(ZERO)
            for c in range(i * wide, i * wide + KP, NARROW):
                product = fma(load_n(w.z, c), load_n(w.z, c + KP), product)
            w.at[8 * i + 7] = total(product)
            m += 1
    w.order[BLOCK] = m
    for c in range(0, KP, NARROW):
        old, k = c, w.order[0] * wide + KP
        kf = ks = qf = qs = splat_n(ZERO)  # S^T k and S^T q of the states before the token
        for a in range(K):
            f, s = load_n(w.states, old + a * KP), load_n(w.states, old + size + a * KP)
            ka, qa = item(w.z, k + a), item(w.z, k - KP + a)
            kf, ks, qf, qs = fma(f, ka, kf), fma(s, ka, ks), fma(f, qa, qf), fma(s, qa, qs)
        for j in range(m):
            i, new = w.order[j], old + step * 2 * size
            m00, m01, m10, m11 = w.at[8 * i], w.at[8 * i + 1], w.at[8 * i + 2], w.at[8 * i + 3]
            beta, r0, r1, qk = w.at[8 * i + 4], w.at[8 * i + 5], w.at[8 * i + 6], w.at[8 * i + 7]
            store(w.k_state, 2 * i * KP + c, kf), store(w.k_state, (2 * i + 1) * KP + c, ks)
            value, k, next_k = load_n(w.z, i * wide + 2 * KP + c), i * wide + KP, w.order[min(j + 1, m - 1)] * wide + KP
            df = mul(sub(value, fma(kf, m00, mul(ks, m01))), beta)  # what is written along k
            ds = mul(sub(value, fma(kf, m10, mul(ks, m11))), beta)
            read = fma(qf, r0 * m00 + r1 * m10, mul(qs, r0 * m01 + r1 * m11))
            store(w.o, i * KP + c, fma(fma(df, r0, mul(ds, r1)), qk, read))
            kf = ks = qf = qs = splat_n(ZERO)
            for a in range(K):
                f, s, ka = load_n(w.states, old + a * KP), load_n(w.states, old + size + a * KP), item(w.z, k + a)
                f, s = fma(f, m00, fma(s, m01, mul(df, ka))), fma(f, m10, fma(s, m11, mul(ds, ka)))
                store(w.states, new + a * KP, f), store(w.states, new + size + a * KP, s)
                ka, qa = item(w.z, next_k + a), item(w.z, next_k - KP + a)
                kf, ks, qf, qs = fma(f, ka, kf), fma(s, ka, ks), fma(f, qa, qf), fma(s, qa, qs)
            old = new


@njit(**PART)
def recur_from_zero(n, keep, K, w):
    """`recur` of a block before which both states are zero, from token to token; the states after it are not made.

    With P_ts = M_t ... M_(s+1) and e_s[sigma], what token s adds to state sigma along k_s, before beta_s:
        e_t[tau] = v_t - sum_(s<t) (k_t . k_s) beta_s sum_sigma P_ts[tau, sigma] e_s[sigma]
        o_t = sum_(s<=t) (q_t . k_s) beta_s sum_(sigma, tau) r_t[tau] P_ts[tau, sigma] e_s[sigma].
    For so few tokens this is less work than the states are. At least one token is real. `keep` 1 keeps all rows for the
    backward pass.
    """
    KP, BB = len(w.o) // BLOCK, BLOCK * BLOCK
    wide, other, m = 3 * KP, BLOCK * KP, 0
    for i in range(n):
        if w.real[i]:
            w.order[m], w.beta[m] = i, w.at[8 * i + 4]
            for a in range(K):
                w.keys[a * BLOCK + m] = w.z[i * wide + KP + a]
            m += 1
    w.order[BLOCK], m16 = m, (m + WIDTH - 1) // WIDTH * WIDTH
    for j in range(m, m16):
        w.beta[j] = ZERO
        for a in range(K):
            w.keys[a * BLOCK + j] = ZERO
    for j in range(0, m, 4):
        i0, i1 = w.order[j] * wide, w.order[min(j + 1, m - 1)] * wide
        i2, i3 = w.order[min(j + 2, m - 1)] * wide, w.order[min(j + 3, m - 1)] * wide
        for s in range(0, j + 4, NARROW):
            k0 = k1 = k2 = k3 = q0 = q1 = q2 = q3 = splat_n(ZERO)
            for a in range(K):
                key, b = load_n(w.keys, a * BLOCK + s), a + KP
                k0, k1 = fma(key, item(w.z, i0 + b), k0), fma(key, item(w.z, i1 + b), k1)
                k2, k3 = fma(key, item(w.z, i2 + b), k2), fma(key, item(w.z, i3 + b), k3)
                q0, q1 = fma(key, item(w.z, i0 + a), q0), fma(key, item(w.z, i1 + a), q1)
                q2, q3 = fma(key, item(w.z, i2 + a), q2), fma(key, item(w.z, i3 + a), q3)
            at = j * BLOCK + s
            store(w.products, at, k0), store(w.products, at + BLOCK, k1)
            store(w.products, at + 2 * BLOCK, k2), store(w.products, at + 3 * BLOCK, k3)
            store(w.products, BB + at, q0), store(w.products, BB + at + BLOCK, q1)
            store(w.products, BB + at + 2 * BLOCK, q2), store(w.products, BB + at + 3 * BLOCK, q3)
    for j in range(m):
        i, here = w.order[j], j * BLOCK * keep
        m00, m01, m10, m11 = w.at[8 * i], w.at[8 * i + 1], w.at[8 * i + 2], w.at[8 * i + 3]
        beta, r0, r1 = w.beta[j], w.at[8 * i + 5], w.at[8 * i + 6]
        w.products[j * BLOCK + j] = ZERO
        qk = w.products[BB + j * BLOCK + j] * beta
        for s in range(0, j + 1, NARROW):
            p00 = p01 = p10 = p11 = splat_n(ZERO)
            if j > s:
                at = here - BLOCK * keep + s
                p00, p01 = load_n(w.decay, at), load_n(w.decay, BB + at)
                p10, p11 = load_n(w.decay, 2 * BB + at), load_n(w.decay, 3 * BB + at)
                p00, p10 = fma(p00, m00, mul(p10, m01)), fma(p00, m10, mul(p10, m11))
                p01, p11 = fma(p01, m00, mul(p11, m01)), fma(p01, m10, mul(p11, m11))
            at, written = here + s, load_n(w.beta, s)
            store(w.decay, at, p00), store(w.decay, BB + at, p01)
            store(w.decay, 2 * BB + at, p10), store(w.decay, 3 * BB + at, p11)
            kk = mul(load_n(w.products, j * BLOCK + s), written)
            qs = mul(load_n(w.products, BB + j * BLOCK + s), written)
            store(w.weight, at, mul(kk, p00)), store(w.weight, BB + at, mul(kk, p01))
            store(w.weight, 2 * BB + at, mul(kk, p10)), store(w.weight, 3 * BB + at, mul(kk, p11))
            store(w.weight, 4 * BB + at, mul(qs, fma(p00, r0, mul(p10, r1))))
            store(w.weight, 5 * BB + at, mul(qs, fma(p01, r0, mul(p11, r1))))
        for c in range(0, KP, NARROW):
            f0 = f1 = s0 = s1 = o0 = o1 = splat_n(ZERO)
            for s in range(j):
                f, e, at = load_n(w.error, s * KP + c), load_n(w.error, other + s * KP + c), here + s
                f0, f1 = fma(f, item(w.weight, at), f0), fma(e, item(w.weight, BB + at), f1)
                s0, s1 = fma(f, item(w.weight, 2 * BB + at), s0), fma(e, item(w.weight, 3 * BB + at), s1)
                o0, o1 = fma(f, item(w.weight, 4 * BB + at), o0), fma(e, item(w.weight, 5 * BB + at), o1)
            value = load_n(w.z, i * wide + 2 * KP + c)
            f, e = sub(value, add(f0, f1)), sub(value, add(s0, s1))
            store(w.error, j * KP + c, f), store(w.error, other + j * KP + c, e)
            store(w.o, i * KP + c, add(add(o0, o1), fma(f, qk * r0, mul(e, qk * r1))))
        w.weight[4 * BB + here + j], w.weight[5 * BB + here + j] = qk * r0, qk * r1
        for entry in range(4):
            w.decay[entry * BB + here + j] = ZERO if entry % 3 else ONE


@njit(**PART)
def inverse_rms(o, i, K):
    """1 / sqrt(mean(o^2) + 1e-6) of row i."""
    KP, square = len(o) // BLOCK, splat(ZERO)
    for c in range(i * KP, (i + 1) * KP, WIDTH):
        square = fma(load(o, c), load(o, c), square)
    return ONE / math.sqrt(total(square) / f32(K) + f32(1e-6))


@njit(**PART)
def packed_size(K, heads):
    """Of all heads' `Weights`: how many numbers a head has of its own, and how many there are in all."""
    KP = (K + WIDTH - 1) // WIDTH * WIDTH
    own = 12 * KP + 2 * KP * KP + KP + 3 * KP + WIDTH  # conv, bilinear and its transpose, norm, bias, numbers
    return own, heads * own + HIDDEN * (4 * KP + 3)


@njit(**PART)
def of_head(packed, h, K, heads):
    """The `Weights` of head h."""
    KP = (K + WIDTH - 1) // WIDTH * WIDTH
    own, end = packed_size(K, heads)
    conv, mlp = h * own, heads * own
    bilinear, mlp_t = conv + 12 * KP, mlp + 2 * HIDDEN * KP
    bilinear_t, small = bilinear + KP * KP, mlp_t + 2 * HIDDEN * KP
    norm = bilinear_t + KP * KP
    bias = norm + KP
    numbers = bias + 3 * KP
    return Weights(packed[conv:bilinear], packed[bilinear:bilinear_t], packed[bilinear_t:norm], packed[mlp:mlp_t],
                   packed[mlp_t:small], packed[small:end], packed[norm:bias], packed[numbers:conv + own],
                   packed[bias:numbers])


pack_arguments = reader(types.intp, types.boolean, *[FLOATS] * 11)


def pack(call):
    """`packed`, all heads' `Weights`, from the parameters; `transposed`: bilinear_t is wanted.

    The biases, of q, k, v and of the gates, may be empty.
    """
    (K, transposed, conv, bilinear, scale, mlp, mlp_bias, mlp_out, out_bias, norm, bias, gate_bias,
     packed) = pack_arguments(call)
    heads = len(scale)
    take(call)  # the only task
    for h in range(heads):
        p = of_head(packed, h, K, heads)
        KP = len(p.norm)
        p.numbers[:] = ZERO
        for part in range(12):
            copy_row(conv, (part * heads + h) * K, p.conv, part * KP, K)
        for a in range(K):
            copy_row(bilinear, (h * K + a) * K, p.bilinear, a * KP, K)
            for c in range(K if transposed else 0):
                p.bilinear_t[c * KP + a] = bilinear[(h * K + a) * K + c]
        copy_row(norm, h * K, p.norm, 0, K)
        p.numbers[0], p.numbers[1] = scale[h], out_bias[0]
        if len(bias):
            p.numbers[7] = ONE
            for part in range(3):
                copy_row(bias, (part * heads + h) * K, p.bias, part * KP, K)
            for gate in range(5):
                p.numbers[2 + gate] = gate_bias[gate * heads + h]
    for m in range(HIDDEN):  # the MLP is of all heads
        for a in range(K):
            for part in range(2):
                weight = mlp[m * (2 * K + 1) + part * K + a]
                p.mlp[(2 * m + part) * KP + a] = p.mlp_t[(part * KP + a) * HIDDEN + m] = weight
        p.small[m], p.small[HIDDEN + m], p.small[2 * HIDDEN + m] = mlp[m * (2 * K + 1) + 2 * K], mlp_bias[m], mlp_out[m]


@njit(**PART)
def new_work(K, KP, slots):
    rows = BLOCK * KP
    return Work(zeros((3 + BLOCK) * 3 * KP), zeros(3 * rows), zeros(3 * rows), zeros(3 * rows), zeros(2 * BLOCK),
                zeros(rows), zeros(BLOCK), zeros(BLOCK * HIDDEN), zeros(BLOCK * HIDDEN), zeros(6 * BLOCK),
                zeros(8 * BLOCK), np.zeros(BLOCK, np.bool_), np.zeros(BLOCK, np.bool_), zeros(rows), zeros(2 * rows),
                zeros(slots * 2 * K * KP), np.zeros(BLOCK, np.int64), np.zeros(BLOCK + 1, np.int64), zeros(rows),
                zeros(BLOCK), zeros(2 * BLOCK * BLOCK), zeros(4 * BLOCK * BLOCK), zeros(6 * BLOCK * BLOCK),
                zeros(2 * rows))


@njit(**PART)
def copy_state(source, i, source_row, target, j, target_row, K):
    """Both states, from rows of `source_row` numbers to rows of `target_row`."""
    for a in range(2 * K):
        copy_row(source, i + a * source_row, target, j + a * target_row, K)


@njit(**PART)
def any_real(first, start, n, length, reverse, mask):
    at = first + (length - start - n if reverse else start)
    for token in range(at, at + n):
        if mask[token]:
            return True
    return False


@njit(**PART)
def text(b, padded, table):
    """Text b: its first token, its length, and how many states are kept of the texts before it.

    By the `table`; without one every text has `padded` tokens.
    """
    if len(table):
        return table[2 * b], table[2 * b + 2] - table[2 * b], table[2 * b + 1]
    return b * padded, padded, b * ((padded + BLOCK - 1) // BLOCK - 1)


MIXER = (*[types.intp] * 9, *[types.boolean] * 5, FLOATS, FLOATS, FLAGS, FLAGS, FLOATS, NUMBERS)
forward_arguments, backward_arguments = reader(*MIXER, *[FLOATS] * 3), reader(*MIXER, *[FLOATS] * 11)


def forward(call):
    """A task is `per_task` heads of the sentences g, g + groups, ... Absent arrays are empty."""
    (threads, groups, per_task, batch, padded, row, K, heads, reversed_from, convolution, flux, coupling, hierarchical,
     read_gates, parameters, proj, mask, keep, initial, table, o, final, saved) = forward_arguments(call)
    if come(call) >= threads:
        return
    KP = (K + WIDTH - 1) // WIDTH * WIDTH
    w, size = new_work(K, KP, 1), 2 * K * KP
    each = (heads + per_task - 1) // per_task
    line, task = zeros(KP), take(call)
    while task < groups * each:
        h0 = task % each * per_task
        for b in range(task // each, batch, groups):
            first, length, kept = text(b, padded, table)
            blocks = (length + BLOCK - 1) // BLOCK
            for h in range(h0, min(h0 + per_task, heads)):
                p, reverse = of_head(parameters, h, K, heads), h >= reversed_from
                w.states[:] = ZERO
                if len(initial):
                    copy_state(initial, (b * heads + h) * 2 * K * K, K, w.states, 0, KP, K)
                for start in range(0, length, BLOCK):
                    n = min(BLOCK, length - start)
                    if start and len(saved):
                        at = kept * heads + h * (blocks - 1) + start // BLOCK - 1
                        copy_row(w.states, 0, saved, at * size, size)
                    some = any_real(first, start, n, length, reverse, mask)
                    for i in range(n):
                        t = length - 1 - start - i if reverse else start + i
                        for c in range(0, K, WIDTH):
                            prefetch(o, ((first + t) * heads + h) * K + c)
                    if some:
                        ahead = K if start + n == length else BLOCK * row * (-1 if reverse else 1)
                        prepare(start, n, first, h, ahead, length, K, heads, reverse, convolution, flux, coupling,
                                hierarchical, read_gates, row, proj, mask, keep, p, w)
                        if n < length or len(initial) or len(final):
                            recur(n, 0, K, w)
                        else:
                            recur_from_zero(n, 0, K, w)
                    for i in range(n):
                        t = length - 1 - start - i if reverse else start + i
                        real = some and w.real[i]
                        scaled = inverse_rms(w.o, i, K) if real else ZERO
                        for c in range(0, KP, WIDTH):
                            normal = mul(mul(load(w.o, i * KP + c), scaled), load(p.norm, c))
                            store(line, c, normal if real else splat(ZERO))
                        copy_row(line, 0, o, ((first + t) * heads + h) * K, K)
                if len(final):
                    copy_state(w.states, 0, KP, final, (b * heads + h) * 2 * K * K, K, K)
        task = take(call)


@njit(**PART)
def recur_backward(K, p, w, g):
    """Gradients of q, k, v and `at` of the block's tokens from those of o, which stand in w.o, and of later states."""
    KP, m = len(p.norm), w.order[BLOCK]
    wide, size = 3 * KP, K * KP
    for c in range(0, KP, NARROW):
        k, gf, gs = w.order[m - 1] * wide + KP, splat_n(ZERO), splat_n(ZERO)
        for a in range(K):
            gf = fma(load_n(g.state, a * KP + c), item(w.z, k + a), gf)
            gs = fma(load_n(g.state, size + a * KP + c), item(w.z, k + a), gs)
        store(g.rows, 4 * KP + c, gf), store(g.rows, 5 * KP + c, gs)
    for j in range(m - 1, -1, -1):
        i = w.order[j]
        old, q, k, v = w.slot[i] * 2 * size, i * wide, i * wide + KP, i * wide + 2 * KP
        m00, m01, m10, m11 = w.at[8 * i], w.at[8 * i + 1], w.at[8 * i + 2], w.at[8 * i + 3]
        beta, r0, r1, qk = w.at[8 * i + 4], w.at[8 * i + 5], w.at[8 * i + 6], w.at[8 * i + 7]
        of = os = gb = g00 = g01 = g10 = g11 = splat_n(ZERO)
        for c in range(0, KP, NARROW):
            o, value = load_n(w.o, i * KP + c), load_n(w.z, v + c)
            gf, gs = fma(o, r0 * qk, load_n(g.rows, 4 * KP + c)), fma(o, r1 * qk, load_n(g.rows, 5 * KP + c))
            kf, ks = load_n(w.k_state, 2 * i * KP + c), load_n(w.k_state, (2 * i + 1) * KP + c)
            ef, es = sub(value, fma(kf, m00, mul(ks, m01))), sub(value, fma(kf, m10, mul(ks, m11)))
            of, os, gb = fma(o, ef, of), fma(o, es, os), fma(gf, ef, fma(gs, es, gb))
            gf, gs = mul(gf, beta), mul(gs, beta)
            store(g.z, v + c, add(gf, gs))
            # these four are subtracted below
            g00, g01, g10, g11 = fma(gf, kf, g00), fma(gf, ks, g01), fma(gs, kf, g10), fma(gs, ks, g11)
            store(g.rows, c, mul(ef, beta)), store(g.rows, KP + c, mul(es, beta))
            store(g.rows, 2 * KP + c, fma(gf, m00, mul(gs, m10))), store(g.rows, 3 * KP + c, fma(gf, m01, mul(gs, m11)))
            store(g.rows, 4 * KP + c, splat_n(ZERO)), store(g.rows, 5 * KP + c, splat_n(ZERO))
        o_fast, o_slow = beta * total(of), beta * total(os)
        g00, g01, g10, g11 = sub(ZERO, g00), sub(ZERO, g01), sub(ZERO, g10), sub(ZERO, g11)
        earlier = w.order[max(j - 1, 0)] * wide + KP
        for a in range(K):
            ka, qa, kb = item(w.z, k + a), item(w.z, q + a), item(w.z, earlier + a)
            of = os = gk = splat_n(ZERO)
            for c in range(0, KP, NARROW):
                f, s = load_n(w.states, old + a * KP + c), load_n(w.states, old + size + a * KP + c)
                o, uf, us = load_n(w.o, i * KP + c), load_n(g.rows, 2 * KP + c), load_n(g.rows, 3 * KP + c)
                gf = fma(o, r0 * qa, load_n(g.state, a * KP + c))
                gs = fma(o, r1 * qa, load_n(g.state, size + a * KP + c))
                of, os = fma(f, o, of), fma(s, o, os)
                gk = fma(gf, load_n(g.rows, c), fma(gs, load_n(g.rows, KP + c), gk))
                gk = sub(sub(gk, mul(f, uf)), mul(s, us))
                g00, g01, g10, g11 = fma(f, gf, g00), fma(s, gf, g01), fma(f, gs, g10), fma(s, gs, g11)
                f, s = sub(fma(gf, m00, mul(gs, m10)), mul(uf, ka)), sub(fma(gf, m01, mul(gs, m11)), mul(us, ka))
                store(g.state, a * KP + c, f), store(g.state, size + a * KP + c, s)
                store(g.rows, 4 * KP + c, fma(f, kb, load_n(g.rows, 4 * KP + c)))
                store(g.rows, 5 * KP + c, fma(s, kb, load_n(g.rows, 5 * KP + c)))
            store(g.lines, a * NARROW, of), store(g.lines, (KP + a) * NARROW, os)
            store(g.lines, (2 * KP + a) * NARROW, gk)
        read_fast = read_slow = splat_n(ZERO)
        for a in range(0, KP, NARROW):
            f, s = sums_n(g.lines, a * NARROW), sums_n(g.lines, (KP + a) * NARROW)
            ka, qa = load_n(w.z, k + a), load_n(w.z, q + a)
            fast, slow = fma(f, m00, fma(s, m01, mul(ka, o_fast))), fma(f, m10, fma(s, m11, mul(ka, o_slow)))
            read_fast, read_slow = fma(qa, fast, read_fast), fma(qa, slow, read_slow)
            store(g.z, q + a, fma(fast, r0, mul(slow, r1))), store(g.z, k + a, sums_n(g.lines, (2 * KP + a) * NARROW))
        g.at[8 * i], g.at[8 * i + 1], g.at[8 * i + 2], g.at[8 * i + 3] = total(g00), total(g01), total(g10), total(g11)
        g.at[8 * i + 4], g.at[8 * i + 5], g.at[8 * i + 6] = total(gb), total(read_fast), total(read_slow)


@njit(**PART)
def end_backward(K, w, g):
    """Where later tokens have gradients: what those of the states after the block (g.state) give to its tokens."""
    KP, BB, m = len(w.o) // BLOCK, BLOCK * BLOCK, w.order[BLOCK]
    wide, size, other, last = 3 * KP, K * KP, BLOCK * KP, (m - 1) * BLOCK
    for a in range(K):
        for c in range(KP):
            g.state_t[c * KP + a], g.state_t[(KP + c) * KP + a] = g.state[a * KP + c], g.state[size + a * KP + c]
    for s in range(m):
        k, at, beta = w.order[s] * wide + KP, last + s, w.beta[s]
        p00, p01, p10, p11 = w.decay[at], w.decay[BB + at], w.decay[2 * BB + at], w.decay[3 * BB + at]
        g00 = g01 = g10 = g11 = splat_n(ZERO)
        for c in range(0, KP, NARROW):
            gf = gs = splat_n(ZERO)  # of what is added to both states along k
            for a in range(K):
                gf = fma(load_n(g.state, a * KP + c), item(w.z, k + a), gf)
                gs = fma(load_n(g.state, size + a * KP + c), item(w.z, k + a), gs)
            f, e = load_n(w.error, s * KP + c), load_n(w.error, other + s * KP + c)
            g00, g01, g10, g11 = fma(gf, f, g00), fma(gf, e, g01), fma(gs, f, g10), fma(gs, e, g11)
            store(g.error, s * KP + c, mul(fma(gf, p00, mul(gs, p10)), beta))
            store(g.error, other + s * KP + c, mul(fma(gf, p01, mul(gs, p11)), beta))
            store(g.rows, c, mul(fma(f, p00, mul(e, p01)), beta))
            store(g.rows, KP + c, mul(fma(f, p10, mul(e, p11)), beta))
        for c in range(0, KP, NARROW):
            gf = gs = splat_n(ZERO)
            for a in range(K):
                gf = fma(load_n(g.state_t, a * KP + c), item(g.rows, a), gf)
                gs = fma(load_n(g.state_t, (KP + a) * KP + c), item(g.rows, KP + a), gs)
            store(g.z, k + c, add(gf, gs))
        t00, t01, t10, t11 = total(g00), total(g01), total(g10), total(g11)
        g.pairs[s], g.pairs[BLOCK + s] = beta * t00, beta * t01
        g.pairs[2 * BLOCK + s], g.pairs[3 * BLOCK + s] = beta * t10, beta * t11
        g.pairs[4 * BLOCK + s] = p00 * t00 + p01 * t01 + p10 * t10 + p11 * t11


@njit(**PART)
def recur_from_zero_backward(later, K, w, g):
    """`recur_backward` of what `recur_from_zero` has computed; g.state counts if `later`."""
    KP, BB, m = len(w.o) // BLOCK, BLOCK * BLOCK, w.order[BLOCK]
    wide, other = 3 * KP, BLOCK * KP
    g.pairs[:] = ZERO
    if later:
        end_backward(K, w, g)
    for j in range((m + WIDTH - 1) // WIDTH * WIDTH):
        for c in range(K):
            f, e = (w.error[j * KP + c], w.error[other + j * KP + c]) if j < m else (ZERO, ZERO)
            g.error_t[c * BLOCK + j], g.error_t[(KP + c) * BLOCK + j] = f, e
        for c in range(0, KP, NARROW):
            if j < m and not later:
                store(g.error, j * KP + c, splat_n(ZERO)), store(g.error, other + j * KP + c, splat_n(ZERO))
                store(g.z, w.order[j] * wide + KP + c, splat_n(ZERO))
    for j in range(m - 1, -1, -1):
        i = w.order[j]
        m00, m01, m10, m11 = w.at[8 * i], w.at[8 * i + 1], w.at[8 * i + 2], w.at[8 * i + 3]
        r0, r1, q, k = w.at[8 * i + 5], w.at[8 * i + 6], i * wide, i * wide + KP
        for c in range(0, KP, NARROW):
            f0 = f1 = f2 = s0 = s1 = s2 = splat_n(ZERO)
            for t in range(j + 1, m):
                at, o = t * BLOCK + j, load_n(w.o, w.order[t] * KP + c)
                f, e = load_n(g.error, t * KP + c), load_n(g.error, other + t * KP + c)
                f0, s0 = fma(o, item(w.weight, 4 * BB + at), f0), fma(o, item(w.weight, 5 * BB + at), s0)
                f1, s1 = fma(f, item(w.weight, at), f1), fma(f, item(w.weight, BB + at), s1)
                f2, s2 = fma(e, item(w.weight, 2 * BB + at), f2), fma(e, item(w.weight, 3 * BB + at), s2)
            o, at = load_n(w.o, i * KP + c), j * BLOCK + j
            f0, s0 = fma(o, item(w.weight, 4 * BB + at), f0), fma(o, item(w.weight, 5 * BB + at), s0)
            f0 = sub(add(load_n(g.error, j * KP + c), f0), add(f1, f2))
            s0 = sub(add(load_n(g.error, other + j * KP + c), s0), add(s1, s2))
            store(g.error, j * KP + c, f0), store(g.error, other + j * KP + c, s0)
            store(g.z, i * wide + 2 * KP + c, add(f0, s0))
        g00 = g01 = g10 = g11 = read_fast = read_slow = splat_n(ZERO)
        for s in range(0, j + 1, NARROW):
            of = os = c00 = c01 = c10 = c11 = splat_n(ZERO)  # of the weights in what is read; of the others, negative
            for c in range(K):
                f, e = load_n(g.error_t, c * BLOCK + s), load_n(g.error_t, (KP + c) * BLOCK + s)
                o, x, y = item(w.o, i * KP + c), item(g.error, j * KP + c), item(g.error, other + j * KP + c)
                of, os, c00, c01 = fma(f, o, of), fma(e, o, os), fma(f, x, c00), fma(e, x, c01)
                c10, c11 = fma(f, y, c10), fma(e, y, c11)
            at, beta = j * BLOCK + s, load_n(w.beta, s)
            p00, p01 = load_n(w.decay, at), load_n(w.decay, BB + at)
            p10, p11 = load_n(w.decay, 2 * BB + at), load_n(w.decay, 3 * BB + at)
            kk, qk = load_n(w.products, at), load_n(w.products, BB + at)
            fast, slow = fma(of, p00, mul(os, p01)), fma(of, p10, mul(os, p11))
            gq = fma(fast, r0, mul(slow, r1))
            gk = sub(ZERO, fma(c00, p00, fma(c01, p01, fma(c10, p10, mul(c11, p11)))))
            store(g.pairs, 4 * BLOCK + s, fma(qk, gq, fma(kk, gk, load_n(g.pairs, 4 * BLOCK + s))))
            store(g.pairs, 5 * BLOCK + s, mul(gq, beta)), store(g.pairs, 6 * BLOCK + s, mul(gk, beta))
            kk, qk = mul(kk, beta), mul(qk, beta)
            read_fast, read_slow = fma(qk, fast, read_fast), fma(qk, slow, read_slow)
            of, os = mul(of, qk), mul(os, qk)
            c00 = sub(fma(of, r0, load_n(g.pairs, s)), mul(kk, c00))
            c01 = sub(fma(os, r0, load_n(g.pairs, BLOCK + s)), mul(kk, c01))
            c10 = sub(fma(of, r1, load_n(g.pairs, 2 * BLOCK + s)), mul(kk, c10))
            c11 = sub(fma(os, r1, load_n(g.pairs, 3 * BLOCK + s)), mul(kk, c11))
            if j > s:
                at -= BLOCK
                p00, p01 = load_n(w.decay, at), load_n(w.decay, BB + at)
                p10, p11 = load_n(w.decay, 2 * BB + at), load_n(w.decay, 3 * BB + at)
                g00, g01 = fma(c00, p00, fma(c01, p01, g00)), fma(c00, p10, fma(c01, p11, g01))
                g10, g11 = fma(c10, p00, fma(c11, p01, g10)), fma(c10, p10, fma(c11, p11, g11))
            store(g.pairs, s, fma(c00, m00, mul(c10, m10))), store(g.pairs, BLOCK + s, fma(c01, m00, mul(c11, m10)))
            store(g.pairs, 2 * BLOCK + s, fma(c00, m01, mul(c10, m11)))
            store(g.pairs, 3 * BLOCK + s, fma(c01, m01, mul(c11, m11)))
        g.at[8 * i], g.at[8 * i + 1], g.at[8 * i + 2], g.at[8 * i + 3] = total(g00), total(g01), total(g10), total(g11)
        g.at[8 * i + 4], g.at[8 * i + 5], g.at[8 * i + 6] = g.pairs[4 * BLOCK + j], total(read_fast), total(read_slow)
        for c in range(0, KP, NARROW):
            query, key, both = load_n(w.z, q + c), load_n(w.z, k + c), g.pairs[5 * BLOCK + j]
            gq, gk = mul(key, both), fma(query, both, load_n(g.z, k + c))
            for s in range(j):
                at, of_q, of_k = w.order[s] * wide + KP + c, g.pairs[5 * BLOCK + s], g.pairs[6 * BLOCK + s]
                gq, gk = fma(load_n(w.z, at), of_q, gq), fma(load_n(w.z, at), of_k, gk)
                store(g.z, at, fma(query, of_q, fma(key, of_k, load_n(g.z, at))))
            store(g.z, q + c, gq), store(g.z, k + c, gk)


@njit(**PART)
def gate_backward(i, flux, coupling, hierarchical, read_gates, w, g, logits):
    """Gradients of the gates' logits (5) from those of `at` of token i; returns the gradient of the logit of psi."""
    beta, a_fast, a_slow = w.gates[i], w.gates[BLOCK + i], w.gates[2 * BLOCK + i]
    g_fast, g_slow = w.gates[3 * BLOCK + i], w.gates[4 * BLOCK + i]
    raw = w.gates[5 * BLOCK + i] if flux else f32(0.5)
    psi = min(max(raw, f32(0.01)), f32(0.99))
    coupled = coupling and hierarchical
    kappa = f32(0.05) + f32(0.10) * psi if coupled else ZERO
    fast_kept, slow_kept = ONE - f32(0.10) * psi, ONE - f32(0.05) * psi
    f, s, alpha = a_fast * fast_kept, a_slow * slow_kept, f32(0.5) + f32(0.3) * psi
    out_fast, out_slow = kappa * psi, kappa * (ONE - psi)
    g_psi = f32(0.3) * g.at[8 * i + 5] * (g_fast if read_gates else ONE)
    if hierarchical:
        g_psi -= f32(0.3) * g.at[8 * i + 6] * (g_slow if read_gates else ONE)
    gf = gs = gb = ZERO
    if w.kept[i]:  # else the token's M and beta are constants
        g00, g01, g10, g11 = g.at[8 * i], g.at[8 * i + 1], g.at[8 * i + 2], g.at[8 * i + 3]
        gf, gs, gb = (ONE - out_fast) * g00 + out_fast * g01, out_slow * g10 + (ONE - out_slow) * g11, g.at[8 * i + 4]
        g_psi -= f32(0.10) * a_fast * gf + f32(0.05) * a_slow * gs
        if coupled:
            g_out_fast, g_out_slow = f * (g01 - g00), s * (g10 - g11)
            g_psi += kappa * (g_out_fast - g_out_slow) + f32(0.10) * (psi * g_out_fast + (ONE - psi) * g_out_slow)
    logits[0] = gb * beta * (ONE - beta)
    logits[1] = gf * fast_kept * a_fast * (ONE - a_fast)
    logits[2] = gs * slow_kept * a_slow * (ONE - a_slow)
    logits[3] = g.at[8 * i + 5] * alpha * g_fast * (ONE - g_fast) if read_gates else ZERO
    logits[4] = g.at[8 * i + 6] * (ONE - alpha) * g_slow * (ONE - g_slow) if read_gates and hierarchical else ZERO
    return g_psi * raw * (ONE - raw) if flux and f32(0.01) <= raw <= f32(0.99) else ZERO


@njit(**PART)
def flux_backward(n, K, p, w, g):
    """Add the flux's gradients of k and v, and of its parameters; those of the tokens' psi logits stand in g.form."""
    KP = len(p.norm)
    wide, g_out, g_scale = 3 * KP, ZERO, ZERO
    g_first, g_bias, g_last = load(g.small, 0), load(g.small, HIDDEN), load(g.small, 2 * HIDDEN)
    n4 = (n + 3) // 4 * 4
    for i in range(n4):
        logit = g.form[i] if i < n else ZERO
        if logit == ZERO:  # padding, or psi at its clamp
            store(g.pre, i * HIDDEN, splat(ZERO))
            g.form[i] = ZERO
            continue
        pre, hidden = load(w.pre, i * HIDDEN), load(w.hidden, i * HIDDEN)
        g_out += logit
        g_last = fma(mul(pre, hidden), logit, g_last)
        g_pre = mul(mul(mul(load(p.small, 2 * HIDDEN), logit), hidden), fma(pre, sub(ONE, hidden), ONE))
        store(g.pre, i * HIDDEN, g_pre)
        g_bias, g_first = add(g_bias, g_pre), fma(g_pre, w.form[i] * p.numbers[0], g_first)
        g_form = total(mul(g_pre, load(p.small, 0)))
        g_scale += g_form * w.form[i]
        g.form[i] = g_form * p.numbers[0]
        k, v = i * wide + KP, i * wide + 2 * KP
        for c in range(0, KP, WIDTH):
            gk0 = gk1 = splat(ZERO)
            for a in range(0, KP, 2):
                gk0 = fma(load(p.bilinear_t, a * KP + c), item(w.z, v + a), gk0)
                gk1 = fma(load(p.bilinear_t, (a + 1) * KP + c), item(w.z, v + a + 1), gk1)
            gk = fma(add(gk0, gk1), g.form[i], load(g.z, k + c))
            gv = fma(load(w.u, i * KP + c), g.form[i], load(g.z, v + c))
            for m in range(HIDDEN):
                unit = item(g.pre, i * HIDDEN + m)
                gk, gv = fma(load(p.mlp, 2 * m * KP + c), unit, gk), fma(load(p.mlp, (2 * m + 1) * KP + c), unit, gv)
            store(g.z, k + c, gk), store(g.z, v + c, gv)
    store(g.small, 0, g_first), store(g.small, HIDDEN, g_bias), store(g.small, 2 * HIDDEN, g_last)
    g.numbers[0] += g_scale
    g.numbers[1] += g_out
    for c in range(0, KP, WIDTH):
        for a in range(0, KP, 4):  # four rows at a time: each v is read once for them
            at = a * KP + c
            s0, s1 = load(g.bilinear, at), load(g.bilinear, at + KP)
            s2, s3 = load(g.bilinear, at + 2 * KP), load(g.bilinear, at + 3 * KP)
            for i in range(n):
                k, v = i * wide + KP + a, mul(load(w.z, i * wide + 2 * KP + c), g.form[i])
                s0, s1 = fma(v, item(w.z, k), s0), fma(v, item(w.z, k + 1), s1)
                s2, s3 = fma(v, item(w.z, k + 2), s2), fma(v, item(w.z, k + 3), s3)
            store(g.bilinear, at, s0), store(g.bilinear, at + KP, s1)
            store(g.bilinear, at + 2 * KP, s2), store(g.bilinear, at + 3 * KP, s3)
    for c in range(0, 2 * KP, WIDTH):
        for m in range(0, HIDDEN, 4):
            at, two = 2 * m * KP + c, 2 * KP
            s0, s1 = load(g.mlp, at), load(g.mlp, at + two)
            s2, s3 = load(g.mlp, at + 2 * two), load(g.mlp, at + 3 * two)
            for i in range(n):
                u, z = i * HIDDEN + m, load(w.z, i * wide + KP + c)
                s0, s1 = fma(z, item(g.pre, u), s0), fma(z, item(g.pre, u + 1), s1)
                s2, s3 = fma(z, item(g.pre, u + 2), s2), fma(z, item(g.pre, u + 3), s3)
            store(g.mlp, at, s0), store(g.mlp, at + two, s1)
            store(g.mlp, at + 2 * two, s2), store(g.mlp, at + 3 * two, s3)


@njit(**PART)
def input_backward(n, convolution, p, w, g):
    """From the gradients of q, k, v in g.z to those of the convolution's output (there) and input (in w.y)."""
    KP = len(p.norm)
    wide = 3 * KP
    for i in range(n):
        for part in range(2):
            at, product, inverse = i * wide + part * KP, splat(ZERO), w.inverse[part * BLOCK + i]
            for c in range(at, at + KP, WIDTH):
                product = fma(load(w.z, c), load(g.z, c), product)
            along = total(product)
            for c in range(at, at + KP, WIDTH):
                store(g.z, c, mul(sub(load(g.z, c), mul(load(w.z, c), along)), inverse))
        for c in range(i * wide, (i + 1) * wide, WIDTH):
            s = load(w.s, c)
            store(g.z, c, mul(load(g.z, c), mul(s, fma(load(w.y, c), sub(ONE, s), ONE))) if w.real[i] else splat(ZERO))
    for c in range(0, wide, WIDTH):
        if not convolution:
            for i in range(n):
                store(w.y, i * wide + c, load(g.z, i * wide + c))
            continue
        w0, w1, w2, w3 = load(p.conv, c), load(p.conv, wide + c), load(p.conv, 2 * wide + c), load(p.conv, 3 * wide + c)
        s0, s1, s2, s3 = load(g.conv, c), load(g.conv, wide + c), load(g.conv, 2 * wide + c), load(g.conv, 3 * wide + c)
        for i in range(n):
            y0, y1 = load(g.z, i * wide + c), load(g.z, (i + 1) * wide + c)
            y2, y3 = load(g.z, (i + 2) * wide + c), load(g.z, (i + 3) * wide + c)
            store(w.y, i * wide + c, fma(y0, w0, fma(y1, w1, fma(y2, w2, mul(y3, w3)))))
            s0, s1 = fma(y0, load(w.x, (i + 3) * wide + c), s0), fma(y0, load(w.x, (i + 2) * wide + c), s1)
            s2, s3 = fma(y0, load(w.x, (i + 1) * wide + c), s2), fma(y0, load(w.x, i * wide + c), s3)
        store(g.conv, c, s0), store(g.conv, wide + c, s1)
        store(g.conv, 2 * wide + c, s2), store(g.conv, 3 * wide + c, s3)


def backward(call):
    """Gradients, tasks as in `forward`; those of parameters go to the rows (group, head) of g_conv and the others."""
    (threads, groups, per_task, batch, padded, row, K, heads, reversed_from, convolution, flux, coupling, hierarchical,
     read_gates, parameters, proj, mask, keep, initial, table, saved, grad_o, grad_final, grad_proj, grad_initial,
     g_conv, g_bilinear, g_mlp, g_small, g_norm, g_numbers) = backward_arguments(call)
    if come(call) >= threads:
        return
    KP = (K + WIDTH - 1) // WIDTH * WIDTH
    w, each = new_work(K, KP, BLOCK + 1), (heads + per_task - 1) // per_task
    wide, size = 3 * KP, 2 * K * KP
    state, z, at = zeros(size), zeros((BLOCK + 3) * wide), zeros(8 * BLOCK)
    pre, form = zeros(BLOCK * HIDDEN), zeros(BLOCK)
    rows, lines, logits, error = zeros(6 * KP), zeros(3 * KP * NARROW), zeros(5), zeros(2 * BLOCK * KP)
    error_t, state_t, pairs = zeros(2 * KP * BLOCK), zeros(2 * KP * KP), zeros(7 * BLOCK)
    task = take(call)
    while task < groups * each:
        group, h0 = task // each, task % each * per_task
        for b in range(group, batch, groups):
            first, length, kept = text(b, padded, table)
            blocks = (length + BLOCK - 1) // BLOCK
            for h in range(h0, min(h0 + per_task, heads)):
                p, reverse, i = of_head(parameters, h, K, heads), h >= reversed_from, group * heads + h
                g = Gradients(g_conv[i * 4 * wide:(i + 1) * 4 * wide], g_bilinear[i * KP * KP:(i + 1) * KP * KP],
                              g_mlp[i * 2 * KP * HIDDEN:(i + 1) * 2 * KP * HIDDEN],
                              g_small[i * 3 * HIDDEN:(i + 1) * 3 * HIDDEN], g_norm[i * KP:(i + 1) * KP],
                              g_numbers[i * 2:(i + 1) * 2], state, z, at, pre, form, rows, lines,
                              error, error_t, state_t, pairs)
                g.state[:] = ZERO
                if len(grad_final):
                    copy_state(grad_final, (b * heads + h) * 2 * K * K, K, g.state, 0, KP, K)
                g.z[:] = ZERO
                for start in range((blocks - 1) * BLOCK, -1, -BLOCK):
                    n = min(BLOCK, length - start)
                    some = any_real(first, start, n, length, reverse, mask)
                    if some:
                        if start:
                            place = kept * heads + h * (blocks - 1) + start // BLOCK - 1
                            copy_row(saved, place * size, w.states, 0, size)
                        elif len(initial):
                            w.states[:size] = ZERO
                            copy_state(initial, (b * heads + h) * 2 * K * K, K, w.states, 0, KP, K)
                        ahead = BLOCK * row * (1 if reverse else -1) if start else K
                        prepare(start, n, first, h, ahead, length, K, heads, reverse, convolution, flux, coupling,
                                hierarchical, read_gates, row, proj, mask, keep, p, w)
                        if start or len(initial):
                            recur(n, 1, K, w)
                        else:
                            recur_from_zero(n, 1, K, w)
                        for i in range(n):  # the output norm: w.o becomes the gradient of what was read
                            if not w.real[i]:
                                continue
                            t = length - 1 - start - i if reverse else start + i
                            inverse, product = inverse_rms(w.o, i, K), splat(ZERO)
                            for c in range(K, KP):
                                g.rows[c] = ZERO
                            copy_row(grad_o, ((first + t) * heads + h) * K, g.rows, 0, K)
                            for c in range(0, KP, WIDTH):
                                unit, grad = mul(load(w.o, i * KP + c), inverse), load(g.rows, c)
                                store(g.norm, c, fma(grad, unit, load(g.norm, c)))
                                grad = mul(grad, load(p.norm, c))
                                store(g.rows, c, grad)
                                product = fma(grad, unit, product)
                            along = total(product) * inverse / f32(K)
                            for c in range(0, KP, WIDTH):
                                grad = sub(load(g.rows, c), mul(load(w.o, i * KP + c), along))
                                store(w.o, i * KP + c, mul(grad, inverse))
                        if start or len(initial):
                            recur_backward(K, p, w, g)
                        else:
                            recur_from_zero_backward(n < length or len(grad_final), K, w, g)
                    else:
                        for i in range(n):
                            w.real[i] = False
                    for i in range(n):
                        t = length - 1 - start - i if reverse else start + i
                        at_gate = (first + t) * row + 3 * K * heads + h
                        form[i] = ZERO
                        if w.real[i]:
                            form[i] = gate_backward(i, flux, coupling, hierarchical, read_gates, w, g, logits)
                        for gate in range(5):
                            grad_proj[at_gate + gate * heads] = logits[gate] if w.real[i] else ZERO
                    if some and flux:
                        flux_backward(n, K, p, w, g)
                    if some:
                        input_backward(n, convolution, p, w, g)
                    else:
                        g.z[:BLOCK * wide] = ZERO
                    for i in range(n):
                        t = length - 1 - start - i if reverse else start + i
                        for part in range(3):
                            to = (first + t) * row + (part * heads + h) * K
                            if w.real[i]:
                                copy_row(w.y, i * wide + part * KP, grad_proj, to, K)
                            else:
                                for c in range(to, to + K):
                                    grad_proj[c] = ZERO
                    for i in range(3):  # in the block before, these are three tokens later
                        for c in range(0, wide, WIDTH):
                            store(g.z, (BLOCK + i) * wide + c, load(g.z, i * wide + c))
                if len(grad_initial):
                    copy_state(g.state, 0, KP, grad_initial, (b * heads + h) * 2 * K * K, K, K)
        task = take(call)


# ----------------------------------------------------------------------------------------------------------------------
# Between the matrix products of a layer: layer normalisation, and GELU, x Phi(x) = max(x, 0) - |x| Q(|x|) with
# Q(z) = 1 - Phi(z) by Abramowitz and Stegun 7.1.26 (to 1e-7)


@njit(**PART)
def upper_tail(z, density):
    """1 - Phi(z) of z >= 0, given exp(-z^2 / 2)."""
    t = div(ONE, fma(z, f32(0.3275911 / math.sqrt(2)), ONE))
    tail = fma(t, f32(1.061405429 / 2), splat(f32(-1.453152027 / 2)))
    tail = fma(tail, t, splat(f32(1.421413741 / 2)))
    tail = fma(tail, t, splat(f32(-0.284496736 / 2)))
    return mul(mul(fma(tail, t, splat(f32(0.254829592 / 2))), t), density)


gelu_arguments, gelu_backward_arguments, norm_arguments = (
    reader(*[types.intp] * 3, *arrays) for arrays in ([FLOATS] * 3, [FLOATS] * 4, [FLOATS] * 4 + [types.float32]))


@njit(**PART)
def share(call, pieces, rows):
    """The rows, from one to before another, of the next of so many pieces; none if all are taken."""
    piece = min(take(call), pieces)
    return piece * rows // pieces, min(piece + 1, pieces) * rows // pieces


def gelu_rows(call):
    """out = gelu(x + bias), rows of `width` numbers, a multiple of 16."""
    pieces, rows, width, x, bias, out = gelu_arguments(call)
    start, end = share(call, pieces, rows)
    while start < end:
        for row in range(start, end):
            for c in range(0, width, WIDTH):
                value = add(load(x, row * width + c), load(bias, c))
                size = largest(value, sub(ZERO, value))
                tail = upper_tail(size, exp(mul(mul(value, value), f32(-0.5))))
                store(out, row * width + c, sub(largest(value, splat(ZERO)), mul(size, tail)))
        start, end = share(call, pieces, rows)


def gelu_backward_rows(call):
    """out = gelu(x + bias), and grad becomes the gradient of x: times Phi(x) + x phi(x)."""
    pieces, rows, width, x, bias, grad, out = gelu_backward_arguments(call)
    start, end = share(call, pieces, rows)
    while start < end:
        for row in range(start, end):
            for c in range(0, width, WIDTH):
                at, value = row * width + c, add(load(x, row * width + c), load(bias, c))
                size, density = largest(value, sub(ZERO, value)), exp(mul(mul(value, value), f32(-0.5)))
                tail = upper_tail(size, density)
                store(out, at, sub(largest(value, splat(ZERO)), mul(size, tail)))
                half, sign = f32(0.5), div(value, largest(size, splat(f32(1e-30))))
                phi = fma(sign, sub(half, tail), half)
                store(grad, at, mul(load(grad, at), fma(mul(value, f32(1 / math.sqrt(2 * math.pi))), density, phi)))
        start, end = share(call, pieces, rows)


def normalise_rows(call):
    """x + bias, of mean 0 and variance 1 in a row of `width` numbers, a multiple of 16, times weight, plus shift."""
    pieces, rows, width, x, bias, weight, shift, eps = norm_arguments(call)
    start, end = share(call, pieces, rows)
    while start < end:
        for row in range(start, end):
            at, mean, square = row * width, splat(ZERO), splat(ZERO)
            for c in range(0, width, WIDTH):
                value = add(load(x, at + c), load(bias, c))
                mean = add(mean, value)
                store(x, at + c, value)
            mean = splat(total(mean) / f32(width))
            for c in range(0, width, WIDTH):
                value = sub(load(x, at + c), mean)
                square = fma(value, value, square)
                store(x, at + c, value)
            inverse = splat(ONE / math.sqrt(total(square) / f32(width) + eps))
            for c in range(0, width, WIDTH):
                store(x, at + c, fma(mul(load(x, at + c), inverse), load(weight, c), load(shift, c)))
        start, end = share(call, pieces, rows)


# ----------------------------------------------------------------------------------------------------------------------
# Matrix products in int8. A row of x is cut into 127 steps from its least to its largest number, a row of the weights
# into 63 of each sign: the sums of four products of such steps fit 16 bits, which is how AVX2 sums them

BYTES = types.Array(types.uint8, 1, "C")
SUMMED_BY = next((name for name in ("avx512vnni", "avx2") if f"+{name}" in EXTENSIONS), "")  # whose instructions
SUMS = 16 if SUMMED_BY == "avx512vnni" else 8  # of 32 bits in a vector
TILE, PANEL = 4, 2 * SUMS  # rows of x and of the weights whose products' sums stay in registers
BLOCK_ROWS = 64  # of x that are in work at once


def add_products(builder, found: ir.Value, pairs: list[tuple[ir.Value, ir.Value]]) -> ir.Value:
    """SUMS int32, to each the sum of its four products added, of each pair of 4 SUMS bytes: x's, and the weights'."""
    def of(bits: int, count: int) -> ir.Type:
        return ir.VectorType(ir.IntType(bits), count)

    def call(name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
        function = ir.FunctionType(result, [a.type for a in args])
        return builder.call(cgutils.get_or_insert_function(builder.module, function, f"llvm.x86.{name}"), args)

    def neighbours(value: ir.Value) -> ir.Value:
        """Sums of two entries side by side."""
        none, count = ir.Constant(value.type, ir.Undefined), value.type.count // 2
        halves = (ir.Constant(of(32, count), [*range(first, 2 * count, 2)]) for first in (0, 1))
        return builder.add(*(builder.shuffle_vector(value, none, half) for half in halves))

    if SUMMED_BY == "avx512vnni":
        for x, w in pairs:
            both = (builder.bitcast(y, found.type) for y in (x, w))
            found = call("avx512.vpdpbusd.512", found.type, found, *both)
        return found
    if SUMMED_BY == "avx2":
        sums = [call("avx2.pmadd.ub.sw", of(16, 2 * SUMS), x, w) for x, w in pairs]
        ones = ir.Constant(of(16, 2 * SUMS), [1] * (2 * SUMS))
        return builder.add(found, call("avx2.pmadd.wd", found.type, builder.add(*sums), ones))
    wide = of(16, 4 * SUMS)
    sums = [neighbours(builder.mul(builder.zext(x, wide), builder.sext(w, wide))) for x, w in pairs]
    return builder.add(found, neighbours(builder.sext(builder.add(*sums), of(32, 2 * SUMS))))


def tile_of(rows: int) -> Callable:
    """A function that multiplies so many rows of x with a panel of the weights."""
    @intrinsic
    def multiply(typingctx, x, at, depth, weights, panel, out):
        """out = the products' sums (rows, PANEL), of x's bytes from `at` on and of the weights' from `panel` on."""
        def codegen(context, builder, signature, args):
            def place(number: int, first: ir.Value) -> ir.Value:
                return address(context, builder, signature, args, number, first)

            def read(kind: ir.Type, start: ir.Value, *further: ir.Value) -> ir.Value:
                for offset in further:
                    start = builder.gep(start, [offset])
                return builder.load(builder.bitcast(start, kind.as_pointer()), align=1)

            vector, some = ir.VectorType(INTEGER, SUMS), ir.VectorType(ir.IntType(8), 4 * SUMS)
            word, none = ir.IntType(64), ir.Constant(vector, ir.Undefined)
            xs, ws = place(0, args[1]), place(3, args[4])
            lines = [builder.gep(xs, [builder.mul(args[2], word(row))]) for row in range(rows)]
            before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
            builder.branch(loop)
            builder.position_at_end(loop)
            k, found = builder.phi(word), [builder.phi(vector) for _ in range(2 * rows)]
            at_weights, old = builder.mul(k, word(PANEL)), list(found)
            w = [[read(some, ws, at_weights, word(4 * (PANEL * step + SUMS * half))) for step in (0, 1)]
                 for half in (0, 1)]
            for row, line in enumerate(lines):
                both = []
                for step in (0, 1):  # four bytes of a row, again and again
                    four = builder.insert_element(none, read(INTEGER, line, k, word(4 * step)), INTEGER(0))
                    four = builder.shuffle_vector(four, none, ir.Constant(vector, [0] * SUMS))
                    both.append(builder.bitcast(four, some))
                for half in (0, 1):
                    i = 2 * row + half
                    found[i] = add_products(builder, found[i], list(zip(both, w[half])))
            following = builder.add(k, word(8))
            for phi, first, new in zip([k, *old], [word(0)] + [ir.Constant(vector, None)] * len(old),
                                       [following, *found]):
                phi.add_incoming(first, before), phi.add_incoming(new, builder.block)
            builder.cbranch(builder.icmp_signed("<", following, args[2]), loop, after)
            builder.position_at_end(after)
            floats = ir.VectorType(FLOAT, SUMS)
            for i, value in enumerate(found):
                to = builder.bitcast(place(5, word(i * SUMS)), floats.as_pointer())
                builder.store(builder.sitofp(value, floats), to).align = 4
            return context.get_dummy_value()
        return types.none(x, types.intp, types.intp, weights, types.intp, out), codegen
    return multiply


multiply_tile, multiply_row = tile_of(TILE), tile_of(1)


@intrinsic
def store_bytes(typingctx, array, index, value):
    """array[index:index + width] = value without what follows the point; from 0 to 255."""
    def codegen(context, builder, signature, args):
        cut = builder.fptoui(args[2], value.of(ir.IntType(8)))
        builder.store(cut, builder.bitcast(address(context, builder, signature, args), cut.type.as_pointer())).align = 1
        return context.get_dummy_value()
    return types.none(array, types.intp, value), codegen


product_arguments = reader(*[types.intp] * 5, FLOATS, BYTES, FLOATS, FLOATS, types.boolean)


def multiply_rows(call):
    """out = x times the weights, or added to it: x (rows, depth), out (rows, columns), a multiple of 16.

    A task is BLOCK_ROWS rows of x and one of `parts` of the columns. `scales`: what a step of each row of the weights
    is worth, then the sum of that row.
    """
    threads, parts, rows, depth, columns, x, weights, scales, out, added = product_arguments(call)
    if come(call) >= threads:
        return
    blocks, panels = (rows + BLOCK_ROWS - 1) // BLOCK_ROWS, (columns + PANEL - 1) // PANEL
    levels, steps, least = np.empty(BLOCK_ROWS * depth, np.uint8), zeros(BLOCK_ROWS), zeros(BLOCK_ROWS)
    sums, task = zeros(TILE * PANEL), take(call)
    while task < blocks * parts:
        first, part = task // parts * BLOCK_ROWS, task % parts
        count = min(BLOCK_ROWS, rows - first)
        for i in range(count):
            at = (first + i) * depth
            high, low = load(x, at), sub(ZERO, load(x, at))
            for c in range(WIDTH, depth, WIDTH):
                high, low = largest(high, load(x, at + c)), largest(low, sub(ZERO, load(x, at + c)))
            least[i] = -peak(low)
            steps[i] = max((peak(high) - least[i]) / f32(127), f32(1e-30))
            inverse, start, half = ONE / steps[i], splat(least[i]), splat(f32(0.5))
            for c in range(0, depth, WIDTH):
                store_bytes(levels, i * depth + c, fma(sub(load(x, at + c), start), inverse, half))
        for panel in range(part * panels // parts, (part + 1) * panels // parts):
            i = 0
            while i < count:
                n = TILE if i + TILE <= count else 1
                if n == TILE:
                    multiply_tile(levels, i * depth, depth, weights, panel * PANEL * depth, sums)
                else:
                    multiply_row(levels, i * depth, depth, weights, panel * PANEL * depth, sums)
                for row in range(n):
                    for c in range(0, PANEL, WIDTH):
                        column = panel * PANEL + c
                        if column < columns:
                            to = (first + i + row) * columns + column
                            value = mul(mul(load(sums, row * PANEL + c), load(scales, column)), steps[i + row])
                            value = fma(load(scales, panels * PANEL + column), least[i + row], value)
                            if added:
                                value = add(value, load(out, to))
                            store(out, to, value)
                i += n
        task = take(call)


# ----------------------------------------------------------------------------------------------------------------------
# Threads: the tasks of a call are shared out over the OpenMP threads that PyTorch's own operators use. Those wait for
# their next task in a loop, for milliseconds, so that threads of our own would have to share the cores with them.

GROUPS = 8  # sentences are summed in at most as many groups, however many threads there are
# Normally that of the library which PyTorch has loaded, GNU's or LLVM's; None: threads are made for each call.
openmp = getattr(ctypes.CDLL(None), "GOMP_parallel", None)


def forget_openmp() -> None:
    """In a forked process OpenMP's threads are gone, and it would wait for them."""
    global openmp
    openmp = None


os.register_at_fork(after_in_child=forget_openmp)


@functools.cache
def compiled(kernel: Callable) -> Any:
    """`kernel` as Numba's C function, compiled or from the cache on disk; says so if that takes long."""
    note = threading.Timer(2, print, ["note: compiling the CPU kernel, once; it is kept for later runs"],
                           {"file": sys.stderr})
    note.daemon = True
    note.start()
    try:
        return cfunc(types.void(types.intp), **JIT)(kernel)
    finally:
        note.cancel()


def in_threads(kernel: Callable, tasks: int, threads: int, *arguments: Any) -> None:
    """The kernel with these arguments on so many threads, this one among them. Safe for concurrent callers.

    The threads need nothing of Python meanwhile. Tensors: float32, bool, uint8 or int64, one number after the other,
    None: an empty one; ValueError for those without memory on a CPU, MemoryError if no thread got its work space.
    """
    call, function = array("q", (0, 0)), compiled(kernel).ctypes
    for x in arguments:
        if isinstance(x, Tensor):
            address, size = x.data_ptr(), x.numel()
            if not x.is_cpu or (size and not address):
                raise ValueError(f"the CPU kernel needs tensors with memory on a CPU, got {type(x).__name__} of shape "
                                 f"{tuple(x.shape)} on {x.device}")
            call.extend((address, size))
        elif x is None:
            call.extend((0, 0))
        else:
            call.append(struct.unpack("i", struct.pack("f", x))[0] if isinstance(x, float) else x)
    address, _ = call.buffer_info()
    if threads == 1:
        function(address)
    elif openmp:
        # As many as PyTorch's operators use, as a smaller team would end the threads that the next operator needs.
        openmp(function, ctypes.c_void_p(address), max(threads, torch.get_num_threads()), 0)
    else:
        def work(*kept: Any) -> None:  # what it works on, also if this thread is interrupted
            function(address)

        others = [threading.Thread(target=work, args=(call, *arguments)) for _ in range(1, threads)]
        for thread in others:
            thread.start()
        function(address)
        for thread in others:
            thread.join()
    if call[0] < tasks:
        raise MemoryError(f"no memory for the work space of the CPU kernel's {kernel.__name__}")


PER_THREAD = 1 << 16  # numbers of a row-wise kernel that are worth a thread


def share_rows(kernel: Callable, x: Tensor, *arguments: Any) -> None:
    """A kernel of rows, x (N, width), on as many threads as are worth it, one piece for each."""
    threads = max(1, min(torch.get_num_threads(), len(x), x.numel() // PER_THREAD))
    in_threads(kernel, threads, threads, threads, *map(int, x.shape), flat(x), *arguments)


def share_heads(kernel: Callable, batch: int, heads: int, *arguments: Any) -> None:
    """`forward` or `backward` on as many threads as PyTorch uses; more threads, fewer heads in a task."""
    groups, threads = max(1, min(batch, GROUPS)), torch.get_num_threads()
    per_task = heads if threads == 1 else max(1, min(heads, groups * heads // (2 * threads)))
    tasks = groups * -(-heads // per_task)
    threads = min(threads, tasks)
    in_threads(kernel, tasks, threads, threads, groups, per_task, batch, *arguments)


# ----------------------------------------------------------------------------------------------------------------------
# What delta_mixer.py calls


def flat(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """The tensor, its numbers one after the other."""
    fits = tensor is None or (tensor.dtype == dtype and tensor.is_contiguous())
    return tensor if fits else tensor.detach().to(dtype).contiguous()


class Packed(NamedTuple):
    """All heads' `Weights`, one after the other."""
    numbers: Tensor
    heads: int
    K: int


def packed(parameters: list[Tensor], biases: tuple[Tensor, Tensor] | None = None, transposed: bool = False) -> Packed:
    """All heads' parameters; `biases` (3 H K), (5 H): what `proj` lacks; `transposed`: with what `backward` needs."""
    heads, K = map(int, parameters[0].shape[2:])
    make = torch.zeros if K % WIDTH else torch.empty  # zeros fill up rows; both begin at a cache line
    found = make(packed_size.py_func(K, heads)[1], dtype=torch.float32, device="cpu")
    in_threads(pack, 1, 1, K, transposed, *map(flat, (*parameters, *(biases or (None, None)))), found)
    return Packed(found, heads, K)


def arguments(parameters: Packed, proj: Tensor, mask: Tensor, keep: Tensor | None, initial_state: Tensor | None,
              reverse_heads: int, switches: tuple[bool, ...], table: Tensor | None = None) -> tuple[Any, ...]:
    """What `forward` and `backward` take alike, from the batch on."""
    (batch, length, row), (numbers, heads, K) = map(int, proj.shape), parameters
    batch = batch if table is None else len(table) - 1
    return (batch, heads, length, row, K, heads, heads - reverse_heads, *switches, numbers, flat(proj),
            flat(mask, torch.bool), flat(keep, torch.bool), flat(initial_state), flat(table, torch.int64))


def mixer_forward(o: Tensor, final: Tensor | None, saved: Tensor | None, proj: Tensor, mask: Tensor,
                  keep: Tensor | None, parameters: list[Tensor] | Packed, *others: Any) -> None:
    """Fill `o`, `final` and `saved`, as `outputs` makes them; None or empty is not wanted. `others`: `arguments`."""
    parameters = parameters if isinstance(parameters, Packed) else packed(parameters)
    share_heads(forward, *arguments(parameters, proj, mask, keep, *others), flat(o), flat(final), flat(saved))


def mixer_backward(grad_o: Tensor, grad_final: Tensor | None, saved: Tensor, proj: Tensor, mask: Tensor,
                   keep: Tensor | None, parameters: list[Tensor], initial_state: Tensor | None, reverse_heads: int,
                   switches: tuple[bool, ...], table: Tensor | None = None) -> list[Tensor]:
    """Gradients of proj, the eight parameters and the initial state, in float32."""
    (_, _, heads, K), batch = parameters[0].shape, len(proj) if table is None else len(table) - 1
    groups, KP = min(batch, GROUPS), -(-K // WIDTH) * WIDTH
    options = {"dtype": torch.float32, "device": "cpu"}
    grad_proj = torch.empty(proj.shape, **options)
    grad_proj[..., heads * (3 * K + 5):] = 0  # what fills a row; the projection's gradient multiplies it by zeros
    grad_initial = torch.empty(0 if initial_state is None else initial_state.shape, **options)
    shapes = ((4, 3, KP), (KP, KP), (HIDDEN, 2, KP), (3, HIDDEN), (KP,), (2,))
    sums = [torch.zeros(groups, heads, *shape, **options) for shape in shapes]
    inputs = arguments(packed(parameters, transposed=True), proj, mask, keep, initial_state, reverse_heads, switches,
                       table)
    share_heads(backward, *inputs, flat(saved), flat(grad_o), flat(grad_final), flat(grad_proj), flat(grad_initial),
                *map(flat, sums))
    conv, bilinear, mlp, small, norm, numbers = (x.sum(0) for x in sums)
    mlp, small, numbers_sum = mlp.sum(0), small.sum(0), numbers.sum(0)
    return [grad_proj, conv[..., :K].permute(1, 2, 0, 3), bilinear[:, :K, :K], numbers[:, 0],
            torch.cat([mlp[..., :K].flatten(1), small[0].unsqueeze(1)], 1), small[1], small[2], numbers_sum[1:],
            norm[:, :K],
            grad_initial]


def gelu(x: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """Exact GELU of x + bias into `out`, which may be x. x, out (N, F) float32, bias (F); F a multiple of 16."""
    share_rows(gelu_rows, x, flat(bias), flat(out))
    return out


def gelu_backward(x: Tensor, bias: Tensor, grad: Tensor) -> Tensor:
    """gelu(x + bias) anew, (N, F); `grad`, of that, becomes the gradient of x in place."""
    out = torch.empty_like(x)
    share_rows(gelu_backward_rows, x, flat(bias), flat(grad), flat(out))
    return out


def add_and_normalise(x: Tensor, bias: Tensor, norm: torch.nn.LayerNorm) -> None:
    """x = norm(x + bias), in place. x (N, D) float32, bias (D); D a multiple of 16."""
    share_rows(normalise_rows, x, flat(bias), flat(norm.weight), flat(norm.bias), float(norm.eps))


class Int8Matrix(NamedTuple):
    """Weights as `multiply_rows` reads them."""
    levels: Tensor  # (panels, depth / 4, PANEL, 4) bytes
    scales: Tensor  # (2, panels PANEL)
    columns: int  # of the products, a multiple of 16


def pack_int8(weight: Tensor) -> Int8Matrix:
    """`weight` (columns, depth) in int8; rows of zeros fill it up to a multiple of 16.

    Raises ValueError unless the depth is a multiple of 16.
    """
    count, depth = weight.shape
    if not depth or depth % 16:
        raise ValueError(f"need a weight of rows of a multiple of 16 numbers, got {tuple(weight.shape)}")
    columns = -(-count // 16) * 16
    whole = torch.zeros(-(-columns // PANEL) * PANEL, depth, dtype=torch.float32, device="cpu")
    whole[:count] = weight.detach()
    steps = (whole.abs().amax(1) / 63).clamp(min=1e-30)
    levels = (whole / steps[:, None]).round()
    panels = levels.to(torch.int8).view(-1, PANEL, depth // 4, 4).transpose(1, 2).contiguous()
    return Int8Matrix(panels.view(torch.uint8), torch.stack([steps, levels.sum(1) * steps]), columns)


WORK = 1 << 20  # products that are worth a thread


def multiply_int8(x: Tensor, weight: Int8Matrix, added_to: Tensor | None = None) -> Tensor:
    """x (N, depth), finite float32, times the weights: (N, columns), new or added to what is there.

    Raises ValueError for other shapes and types, for sums that are not one number after the other, and where a gradient
    of x is wanted.
    """
    (rows, depth), columns, wanted = x.shape, weight.columns, 4 * weight.levels.shape[1]
    out = x.new_empty(rows, columns) if added_to is None else added_to
    if depth != wanted or out.shape != (rows, columns) or not out.is_contiguous():
        raise ValueError(f"need x (N, {wanted}) and contiguous sums (N, {columns}), got {tuple(x.shape)} and "
                         f"{tuple(out.shape)}")
    if x.dtype != torch.float32 or out.dtype != torch.float32 or (x.requires_grad and torch.is_grad_enabled()):
        raise ValueError(f"products in int8 are of float32 and have no gradient, got {x.dtype} and {out.dtype}")
    threads = max(1, min(torch.get_num_threads(), rows * columns * depth // WORK))
    blocks = -(-rows // BLOCK_ROWS)
    parts = 1 if threads == 1 else max(1, min(-(-2 * threads // blocks), columns // PANEL))
    in_threads(multiply_rows, blocks * parts, threads, threads, parts, rows, depth, columns, flat(x), weight.levels,
               weight.scales, out, added_to is not None)
    return out
