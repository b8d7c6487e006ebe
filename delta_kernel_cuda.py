"""CUDA (Triton) kernels of the mixer operator (delta_mixer.py): all between a layer's input and output projections.

Convolution, SiLU, normalisation, resonance flux, gates, recurrence and output norm are one launch for all sentences,
heads and directions: a program owns one (sentence, head), keeps both K x K states on chip and walks over chunks of 16
tokens in its head's own direction. At token t the states S[fast], S[slow] mix through the 2 x 2 matrix M_t, each takes
a delta-rule write, and the output reads both:

    S~_t = M_t S_{t-1},   S_t[a] = S~_t[a] + beta_t k_t (v_t - S~_t[a]^T k_t)^T,   o_t = sum_a r_t[a] S_t[a]^T q_t

M_t acts on the timescale axis and H_t = I - beta_t k_t k_t^T on the K axis, so they commute, and within a chunk of C
tokens that starts from the states S_0 (`tril(., -1)` drops the diagonal, `*` is elementwise)

    X = (I + diag(beta) tril(K K^T, -1))^-1,   W = tril(Q K^T) X,   A = W diag(beta)
    c_tj = r_t^T M_t ... M_{j+1} 1,   u_t = r_t^T M_t ... M_1,   P_t = M_C ... M_{t+1},   R_t = P_t 1
    O = (c * A) V + sum_a u[:, a] * (Q - A K) S_0[a]
    S_C[a] = mix[a] + K~^T (R[:, a] * V - K mix[a]),   mix = M_C ... M_1 S_0,   K~ = diag(beta) X^T K

This is the chunked (WY) delta rule of Yang et al. 2024 (arXiv:2406.06484) with the decays moved into the scalar
matrix c. The backward pass recomputes everything but the states at every second chunk's start, in five launches:
the outputs before their norm, with the states between; the states' gradients, from the last chunk to the first; the
recurrence with its gates; normalisation and flux; the convolution. Sums over tokens stay on chip, sums over programs
are left to PyTorch: no atomics, so the same input gives the same bits.
"""
from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from .delta_mixer import BLOCK, HIDDEN

try:  # in a `try`, as transformers refuses a model of which a file imports, outside of one, what is not installed
    import triton
    import triton.language as tl
except ImportError:
    raise

# Within a chunk work per token grows with its length, at its end the states cost the same for any: with K = 32 both are
# about equal at 16, which is also the least that a tensor core product takes. Larger tiles do not fit the registers.
CHUNK = 16


@triton.jit
def _load_state(ptr, K: tl.constexpr):
    return tl.load(ptr + tl.arange(0, K)[:, None] * K + tl.arange(0, K)[None, :])


@triton.jit
def _store_state(ptr, value, K: tl.constexpr):
    tl.store(ptr + tl.arange(0, K)[:, None] * K + tl.arange(0, K)[None, :], value)


# Under TRITON_INTERPRET=1 kernels run as Python on CPU tensors, without assembly.
INTERPRETED = tl.constexpr(not isinstance(_load_state, triton.JITFunction))


@triton.jit
def _pin(x):
    """x, computed here and under a name of its own.

    Left alone, the compiler shares each operand of a product, spread out to 32 or more registers per thread, with
    every later product that uses it, and moves products down to their first use while their operands wait in
    registers. Both cost far more registers than they save work. Assembly with side effects is what the compiler
    leaves where it is.
    """
    if INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def _anchor(x):
    """The integer x, under a name of its own.

    Addresses that do not change from chunk to chunk would be computed before the loop and held in two registers each.
    """
    if INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    return _pin(tl.dot(_pin(a), _pin(b), input_precision=PRECISION))


@triton.jit
def _silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def _silu_gradient(x):
    sigmoid = tl.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


@triton.jit
def _entry(x, where, axis: tl.constexpr):
    """The one entry of x along `axis` that `where` names."""
    return tl.sum(tl.where(where, x, 0.0), axis=axis)


@triton.jit
def _token(position, T, REVERSED):
    """The place in the sentence of what a head reads at `position`."""
    return tl.where(REVERSED, T - 1 - position, position)


@triton.jit
def _load_rows(ptr, token, inside, STRIDE, K: tl.constexpr):
    """Rows (C, K) of a matrix as float32, zero where not `inside`."""
    rows = tl.load(ptr + token[:, None] * STRIDE + tl.arange(0, K)[None, :], mask=inside[:, None], other=0.0)
    return rows.to(tl.float32)


@triton.jit
def _load_logits(ptr, token, inside, STRIDE):
    return tl.load(ptr + token * STRIDE, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_logits(ptr, value, inside):
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _load_past(x_ptr, mask_ptr, position, lag, T, REVERSED, STRIDE, K: tl.constexpr):
    """What stands `lag` tokens before each position, (C, K): zero before the start and at padding."""
    past = position - lag
    token = _token(past, T, REVERSED)
    inside = (past >= 0) & (past < T)
    inside = inside & (tl.load(mask_ptr + token, mask=inside, other=0) != 0)
    return _load_rows(x_ptr, token, inside, STRIDE, K)


@triton.jit
def _convolve(x_ptr, conv_ptr, mask_ptr, position, T, REVERSED, STRIDE, TAP, K: tl.constexpr,
              CONVOLUTION: tl.constexpr):
    """The convolution of q, k or v at each position, (C, K). `TAP` is the stride of conv_weight's first dim."""
    x = _load_past(x_ptr, mask_ptr, position, 0, T, REVERSED, STRIDE, K)
    if CONVOLUTION:
        x *= tl.load(conv_ptr + tl.arange(0, K))[None, :]
        for lag in tl.static_range(1, 4):
            tap = tl.load(conv_ptr + lag * TAP + tl.arange(0, K))
            x += tap[None, :] * _load_past(x_ptr, mask_ptr, position, lag, T, REVERSED, STRIDE, K)
    return x


@triton.jit
def _normalise(x):
    return x * tl.rsqrt(tl.sum(x * x, axis=1) + 1e-6)[:, None]


@triton.jit
def _flux_logit(k, v, bilinear_ptr, scale, in_weight_ptr, in_bias_ptr, out_weight_ptr, out_bias_ptr,
                K: tl.constexpr, HIDDEN: tl.constexpr, PRECISION: tl.constexpr):
    """The flux before its sigmoid (C,), with the bilinear form (C,) and hidden layer before SiLU (C, HIDDEN)."""
    unit = tl.arange(0, HIDDEN)
    weight = in_weight_ptr + unit[None, :] * (2 * K + 1)
    channel = tl.arange(0, K)[:, None]
    form = tl.sum(_dot(k, _load_state(bilinear_ptr, K), PRECISION) * v, axis=1)
    hidden = _dot(k, tl.load(weight + channel), PRECISION)
    hidden += _dot(v, tl.load(weight + K + channel), PRECISION)
    last = tl.load(in_weight_ptr + unit * (2 * K + 1) + 2 * K)
    hidden += (scale * form)[:, None] * last[None, :] + tl.load(in_bias_ptr + unit)[None, :]
    logit = tl.sum(_silu(hidden) * tl.load(out_weight_ptr + unit)[None, :], axis=1)
    return logit + tl.load(out_bias_ptr), form, hidden


@triton.jit
def _gates(logit_ptr, psi, token, written, inside, STRIDE, H, C: tl.constexpr,
           HIERARCHICAL: tl.constexpr, COUPLING: tl.constexpr, READ_GATES: tl.constexpr):
    """beta, M as (ff, fs, sf, ss) and r as (fast, slow) of each token, (C,) each."""
    beta = tl.where(written, tl.sigmoid(_load_logits(logit_ptr, token, inside, STRIDE)), 0.0)
    f = tl.sigmoid(_load_logits(logit_ptr + H, token, inside, STRIDE)) * (1 - 0.10 * psi)
    s = tl.sigmoid(_load_logits(logit_ptr + 2 * H, token, inside, STRIDE)) * (1 - 0.05 * psi)
    m_ff = tl.where(written, f, 1.0)
    m_ss = tl.where(written, s, 1.0)
    m_fs = tl.full((C,), 0.0, dtype=tl.float32)
    m_sf = tl.full((C,), 0.0, dtype=tl.float32)
    if COUPLING and HIERARCHICAL:
        kappa = 0.05 + 0.10 * psi
        m_fs = tl.where(written, f * (kappa * psi), 0.0)
        m_sf = tl.where(written, s * (kappa * (1 - psi)), 0.0)
        m_ff = tl.where(written, f * (1 - kappa * psi), 1.0)
        m_ss = tl.where(written, s * (1 - kappa * (1 - psi)), 1.0)
    r_f = tl.where(inside, 0.5 + 0.3 * psi, 0.0)
    r_s = tl.where(inside, 0.5 - 0.3 * psi, 0.0)
    if READ_GATES:
        r_f *= tl.sigmoid(_load_logits(logit_ptr + 3 * H, token, inside, STRIDE))
        r_s *= tl.sigmoid(_load_logits(logit_ptr + 4 * H, token, inside, STRIDE))
    if not HIERARCHICAL:
        r_s = tl.full((C,), 0.0, dtype=tl.float32)
    return beta, m_ff, m_fs, m_sf, m_ss, r_f, r_s


@triton.jit
def _prepare(proj_ptr, mask_ptr, keep_ptr, conv_ptr, bilinear_ptr, scale_ptr, in_weight_ptr, in_bias_ptr,
             out_weight_ptr, out_bias_ptr, h, position, token, T, REVERSED, STRIDE: tl.constexpr, H: tl.constexpr,
             K: tl.constexpr, HIDDEN: tl.constexpr, C: tl.constexpr, HAS_KEEP: tl.constexpr,
             HIERARCHICAL: tl.constexpr, COUPLING: tl.constexpr,
             FLUX: tl.constexpr, CONVOLUTION: tl.constexpr, READ_GATES: tl.constexpr, PRECISION: tl.constexpr):
    """All that the recurrence takes of a chunk, and where there is a token and where one is written."""
    inside = position < T
    inside = inside & (tl.load(mask_ptr + token, mask=inside, other=0) != 0)
    written = inside
    if HAS_KEEP:
        written = inside & (tl.load(keep_ptr + token * H, mask=inside, other=0) != 0)
    q = _normalise(_silu(_convolve(proj_ptr + h * K, conv_ptr + h * K, mask_ptr, position, T, REVERSED, STRIDE,
                                   3 * H * K, K, CONVOLUTION)))
    k = _normalise(_silu(_convolve(proj_ptr + (H + h) * K, conv_ptr + (H + h) * K, mask_ptr, position, T, REVERSED,
                                   STRIDE, 3 * H * K, K, CONVOLUTION)))
    v = _silu(_convolve(proj_ptr + (2 * H + h) * K, conv_ptr + (2 * H + h) * K, mask_ptr, position, T, REVERSED, STRIDE,
                        3 * H * K, K, CONVOLUTION))
    psi = tl.full((C,), 0.5, dtype=tl.float32)
    if FLUX:
        logit, _, _ = _flux_logit(k, v, bilinear_ptr + h * K * K, tl.load(scale_ptr + h), in_weight_ptr, in_bias_ptr,
                                  out_weight_ptr, out_bias_ptr, K, HIDDEN, PRECISION)
        psi = tl.minimum(tl.maximum(tl.sigmoid(logit), 0.01), 0.99)
    beta, m_ff, m_fs, m_sf, m_ss, r_f, r_s = _gates(
        proj_ptr + 3 * H * K + h, psi, token, written, inside, STRIDE, H, C, HIERARCHICAL, COUPLING, READ_GATES)
    return q, k, v, psi, beta, m_ff, m_fs, m_sf, m_ss, r_f, r_s, inside, written


@triton.jit
def _delta_matrices(q, k, beta, C: tl.constexpr, LOG2_C: tl.constexpr, PRECISION: tl.constexpr):
    """X and W of a chunk, each (C, C).

    X is the inverse of I + N by block substitution: once the diagonal blocks of some size are inverted, the block
    between two neighbours is -X_22 N_21 X_11. Every entry met on the way is beta_t k_t^T H ... H k_j, at most 1 for
    keys of unit length, also for repeated tokens, where a power series in N would grow without bound.
    """
    row = tl.arange(0, C)[:, None]
    col = tl.arange(0, C)[None, :]
    n = tl.where(row > col, beta[:, None] * _dot(k, tl.trans(k), PRECISION), 0.0)
    x = tl.where(row == col, 1.0, tl.where((row ^ col) == 1, -n, 0.0))
    for level in tl.static_range(1, LOG2_C):
        below = tl.where((row >> level) == ((col >> level) ^ 1), n, 0.0)
        x -= _dot(x, _dot(below, x, PRECISION), PRECISION)
    p = tl.where(row >= col, _dot(q, tl.trans(k), PRECISION), 0.0)
    return x, _dot(p, x, PRECISION)


@triton.jit
def _decays(m_ff, m_fs, m_sf, m_ss, C: tl.constexpr):
    """Products of the M inside a chunk: four tiles (C, C) with M_{t-1} ... M_{j+1} in row t and column j < t, and four
    vectors (C,) with M_C ... M_{j+1}.

    In the last column of the tiles, which has no such entry, stand the products from the chunk's start, M_{t-1} ...
    M_1, and as last entry of the vectors their end, M_C ... M_1. What else is above the diagonal means nothing. Row by
    row, each from the one before: only sums of products of numbers in [0, 1], nothing is divided by a decay, and
    underflow is harmless.
    """
    token = tl.arange(0, C)
    row = token[:, None]
    ff = tl.full((C,), 1.0, dtype=tl.float32)
    fs = tl.full((C,), 0.0, dtype=tl.float32)
    sf = tl.full((C,), 0.0, dtype=tl.float32)
    ss = tl.full((C,), 1.0, dtype=tl.float32)
    e_ff = tl.full((C, C), 1.0, dtype=tl.float32)
    e_fs = tl.full((C, C), 0.0, dtype=tl.float32)
    e_sf = tl.full((C, C), 0.0, dtype=tl.float32)
    e_ss = tl.full((C, C), 1.0, dtype=tl.float32)
    for t in range(C):
        here = token == t
        a = _entry(m_ff, here, 0)
        b = _entry(m_fs, here, 0)
        c = _entry(m_sf, here, 0)
        d = _entry(m_ss, here, 0)
        applies = (token < t) | (token == C - 1)
        ff, sf = tl.where(applies, a * ff + b * sf, ff), tl.where(applies, c * ff + d * sf, sf)
        fs, ss = tl.where(applies, a * fs + b * ss, fs), tl.where(applies, c * fs + d * ss, ss)
        e_ff = tl.where(row == t + 1, ff[None, :], e_ff)
        e_fs = tl.where(row == t + 1, fs[None, :], e_fs)
        e_sf = tl.where(row == t + 1, sf[None, :], e_sf)
        e_ss = tl.where(row == t + 1, ss[None, :], e_ss)
    return e_ff, e_fs, e_sf, e_ss, ff, fs, sf, ss


@triton.jit
def _output_decays(m_ff, m_fs, m_sf, m_ss, r_f, r_s, C: tl.constexpr):
    """c (C, C), u as (fast, slow), M_C ... M_1 as (ff, fs, sf, ss) and R as (fast, slow)."""
    row = tl.arange(0, C)[:, None]
    col = tl.arange(0, C)[None, :]
    last = tl.arange(0, C) == C - 1
    e_ff, e_fs, e_sf, e_ss, after_ff, after_fs, after_sf, after_ss = _decays(m_ff, m_fs, m_sf, m_ss, C)
    to_f = r_f * m_ff + r_s * m_sf
    to_s = r_f * m_fs + r_s * m_ss
    c = to_f[:, None] * (e_ff + e_fs) + to_s[:, None] * (e_sf + e_ss)
    c = tl.where(row == col, (r_f + r_s)[:, None], tl.where(row > col, c, 0.0))
    u_f = to_f * _entry(e_ff, col == C - 1, 1) + to_s * _entry(e_sf, col == C - 1, 1)
    u_s = to_f * _entry(e_fs, col == C - 1, 1) + to_s * _entry(e_ss, col == C - 1, 1)
    return (c, u_f, u_s, _entry(after_ff, last, 0), _entry(after_fs, last, 0), _entry(after_sf, last, 0),
            _entry(after_ss, last, 0), tl.where(last, 1.0, after_ff + after_fs),
            tl.where(last, 1.0, after_sf + after_ss))


# A dot's tiles are spread over the warps by rows or by columns, whichever the last dot of a loop's body has more of,
# for all dots that depend on each other. With 16 tokens and more channels, columns are what leaves no warp with the
# work of another: so the bodies below end with a product of shape (C, K).


@triton.jit(do_not_specialize=["T", "CHUNKS", "FIRST_REVERSED"])
def _forward_kernel(
    proj_ptr, mask_ptr, keep_ptr, conv_ptr, bilinear_ptr, scale_ptr, in_weight_ptr, in_bias_ptr, out_weight_ptr,
    out_bias_ptr, norm_ptr, initial_ptr, o_ptr, final_ptr, states_ptr,
    T, CHUNKS, FIRST_REVERSED,
    STRIDE: tl.constexpr, H: tl.constexpr, K: tl.constexpr, HIDDEN: tl.constexpr, C: tl.constexpr, LOG2_C: tl.constexpr,
    HAS_KEEP: tl.constexpr, HAS_INITIAL: tl.constexpr, HIERARCHICAL: tl.constexpr, COUPLING: tl.constexpr,
    FLUX: tl.constexpr, CONVOLUTION: tl.constexpr, READ_GATES: tl.constexpr, CARRY: tl.constexpr,
    SAVE_STATES: tl.constexpr, SAVE_FINAL: tl.constexpr, SPAN: tl.constexpr, PRECISION: tl.constexpr,
):
    """o and the final state of one (sentence, head).

    CARRY: a state comes into or leaves some chunk. SAVE_STATES: store the states at the start of every SPAN-th chunk
    but the first, (ceil(CHUNKS / SPAN) - 1, 2, K, K), for the backward pass.
    """
    n = tl.program_id(0).to(tl.int64)  # n * T * K may pass 2^31
    head = (n % H).to(tl.int32)
    REVERSED = head >= FIRST_REVERSED
    proj_ptr += (n // H) * T * STRIDE
    mask_ptr += (n // H) * T
    keep_ptr += (n // H) * T * H + head
    o_ptr += (n // H) * T * (H * K) + head * K
    if SAVE_STATES:
        states_ptr += (n * (tl.cdiv(CHUNKS, SPAN) - 1) - 1) * (2 * K * K)
    channel = tl.arange(0, K)
    if HAS_INITIAL:
        s_f = _load_state(initial_ptr + n * (2 * K * K), K)
        s_s = _load_state(initial_ptr + n * (2 * K * K) + K * K, K)
    else:
        s_f = tl.full((K, K), 0.0, dtype=tl.float32)
        s_s = tl.full((K, K), 0.0, dtype=tl.float32)

    for chunk in range(CHUNKS):
        if SAVE_STATES:
            if chunk > 0 and chunk % SPAN == 0:
                _store_state(states_ptr + chunk // SPAN * (2 * K * K), s_f, K)
                _store_state(states_ptr + chunk // SPAN * (2 * K * K) + K * K, s_s, K)
        position = chunk * C + tl.arange(0, C)
        token = _token(position, T, REVERSED)
        h = _anchor(head)
        q, k, v, psi, beta, m_ff, m_fs, m_sf, m_ss, r_f, r_s, _, _ = _prepare(
            proj_ptr, mask_ptr, keep_ptr, conv_ptr, bilinear_ptr, scale_ptr, in_weight_ptr, in_bias_ptr, out_weight_ptr,
            out_bias_ptr, h, position, token, T, REVERSED, STRIDE, H, K, HIDDEN, C, HAS_KEEP, HIERARCHICAL, COUPLING,
            FLUX, CONVOLUTION, READ_GATES, PRECISION)
        c, u_f, u_s, l_ff, l_fs, l_sf, l_ss, past_f, past_s = _output_decays(m_ff, m_fs, m_sf, m_ss, r_f, r_s, C)
        x, w = _delta_matrices(q, k, beta, C, LOG2_C, PRECISION)
        a = w * beta[None, :]
        ca = c * a
        if CARRY:
            q_tilde = q - _dot(a, k, PRECISION)
            o = u_f[:, None] * _dot(q_tilde, s_f, PRECISION)
            o += u_s[:, None] * _dot(q_tilde, s_s, PRECISION)
            s_f, s_s = l_ff * s_f + l_fs * s_s, l_sf * s_f + l_ss * s_s
            k_tilde = beta[:, None] * _dot(tl.trans(x), k, PRECISION)
            s_f += _dot(tl.trans(k_tilde), past_f[:, None] * v - _dot(k, s_f, PRECISION), PRECISION)
            s_s += _dot(tl.trans(k_tilde), past_s[:, None] * v - _dot(k, s_s, PRECISION), PRECISION)
            o += _dot(ca, v, PRECISION)
        else:
            o = _dot(ca, v, PRECISION)
        o *= tl.rsqrt(tl.sum(o * o, axis=1) / K + 1e-6)[:, None] * tl.load(norm_ptr + h * K + channel)[None, :]
        tl.store(o_ptr + token[:, None] * (H * K) + channel[None, :], o.to(o_ptr.dtype.element_ty),
                 mask=(position < T)[:, None])

    if SAVE_FINAL:
        _store_state(final_ptr + n * (2 * K * K), s_f, K)
        _store_state(final_ptr + n * (2 * K * K) + K * K, s_s, K)


@triton.jit(do_not_specialize=["T", "CHUNKS", "FIRST_REVERSED"])
def _backward_output_kernel(
    proj_ptr, mask_ptr, keep_ptr, conv_ptr, bilinear_ptr, scale_ptr, in_weight_ptr, in_bias_ptr, out_weight_ptr,
    out_bias_ptr, norm_ptr, initial_ptr, saved_ptr, do_ptr, states_ptr, work_ptr, reads_ptr, whole_ptr, dnorm_ptr,
    T, CHUNKS, FIRST_REVERSED,
    STRIDE: tl.constexpr, H: tl.constexpr, K: tl.constexpr, HIDDEN: tl.constexpr, C: tl.constexpr, LOG2_C: tl.constexpr,
    HAS_KEEP: tl.constexpr, HAS_INITIAL: tl.constexpr, HIERARCHICAL: tl.constexpr, COUPLING: tl.constexpr,
    FLUX: tl.constexpr, CONVOLUTION: tl.constexpr, READ_GATES: tl.constexpr, CARRY: tl.constexpr, SPAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of the output before its norm and of o_norm, and what the states' gradients need, in SPAN chunks.

    work (T, 4, K) gets the first of them, K, K~ and Q~; reads (T, 2) gets u, whole (CHUNKS, 4) M_C ... M_1, and states
    (CHUNKS, 2, K, K) the states at the starts of all chunks, from the saved one.
    """
    spans = tl.cdiv(CHUNKS, SPAN)
    n = (tl.program_id(0) // spans).to(tl.int64)
    span = tl.program_id(0) % spans
    head = (n % H).to(tl.int32)
    REVERSED = head >= FIRST_REVERSED
    channel = tl.arange(0, K)
    if CARRY:
        states_ptr += n * CHUNKS * (2 * K * K)
        whole_ptr += n * CHUNKS * 4
        saved_ptr += (n * (spans - 1) + span - 1) * (2 * K * K)
        s_f = tl.full((K, K), 0.0, dtype=tl.float32)
        s_s = tl.full((K, K), 0.0, dtype=tl.float32)
        if span > 0:
            s_f = _load_state(saved_ptr, K)
            s_s = _load_state(saved_ptr + K * K, K)
        elif HAS_INITIAL:
            s_f = _load_state(initial_ptr + n * (2 * K * K), K)
            s_s = _load_state(initial_ptr + n * (2 * K * K) + K * K, K)

    for chunk in range(span * SPAN, tl.minimum(span * SPAN + SPAN, CHUNKS)):
        position = chunk * C + tl.arange(0, C)
        token = _token(position, T, REVERSED)
        h = _anchor(head)
        q, k, v, psi, beta, m_ff, m_fs, m_sf, m_ss, r_f, r_s, inside, written = _prepare(
            proj_ptr + (n // H) * T * STRIDE, mask_ptr + (n // H) * T, keep_ptr + (n // H) * T * H + h, conv_ptr,
            bilinear_ptr, scale_ptr, in_weight_ptr, in_bias_ptr, out_weight_ptr, out_bias_ptr, h, position, token, T,
            REVERSED, STRIDE, H, K, HIDDEN, C, HAS_KEEP, HIERARCHICAL, COUPLING, FLUX, CONVOLUTION, READ_GATES,
            PRECISION)
        c, u_f, u_s, l_ff, l_fs, l_sf, l_ss, past_f, past_s = _output_decays(m_ff, m_fs, m_sf, m_ss, r_f, r_s, C)
        x, w = _delta_matrices(q, k, beta, C, LOG2_C, PRECISION)
        a = w * beta[None, :]
        here = position < T
        rows = work_ptr + n * T * (4 * K) + _anchor(position)[:, None] * (4 * K) + channel[None, :]
        ca = c * a
        o = tl.full((C, K), 0.0, dtype=tl.float32)
        if CARRY:
            _store_state(states_ptr + chunk * (2 * K * K), s_f, K)
            _store_state(states_ptr + chunk * (2 * K * K) + K * K, s_s, K)
            k_tilde = beta[:, None] * _dot(tl.trans(x), k, PRECISION)
            q_tilde = q - _dot(a, k, PRECISION)
            tl.store(rows + K, k, mask=here[:, None])
            tl.store(rows + 2 * K, k_tilde, mask=here[:, None])
            tl.store(rows + 3 * K, q_tilde, mask=here[:, None])
            tl.store(reads_ptr + n * T * 2 + position * 2, u_f, mask=here)
            tl.store(reads_ptr + n * T * 2 + position * 2 + 1, u_s, mask=here)
            tl.store(whole_ptr + chunk * 4, l_ff)
            tl.store(whole_ptr + chunk * 4 + 1, l_fs)
            tl.store(whole_ptr + chunk * 4 + 2, l_sf)
            tl.store(whole_ptr + chunk * 4 + 3, l_ss)
            o += u_f[:, None] * _dot(q_tilde, s_f, PRECISION)
            o += u_s[:, None] * _dot(q_tilde, s_s, PRECISION)
        o += _dot(ca, v, PRECISION)
        scale = tl.rsqrt(tl.sum(o * o, axis=1) / K + 1e-6)
        o *= scale[:, None]
        do = _load_rows(do_ptr + (n // H) * T * (H * K) + h * K, token, inside, H * K, K)
        tl.store(dnorm_ptr + (n * CHUNKS + chunk) * K + channel, tl.sum(do * o, axis=0))
        do *= tl.load(norm_ptr + h * K + channel)[None, :]
        tl.store(rows, scale[:, None] * (do - o * (tl.sum(do * o, axis=1) / K)[:, None]), mask=here[:, None])
        if CARRY:
            s_f, s_s = l_ff * s_f + l_fs * s_s, l_sf * s_f + l_ss * s_s
            s_f += _dot(tl.trans(k_tilde), past_f[:, None] * v - _dot(k, s_f, PRECISION), PRECISION)
            s_s += _dot(tl.trans(k_tilde), past_s[:, None] * v - _dot(k, s_s, PRECISION), PRECISION)


@triton.jit(do_not_specialize=["T", "CHUNKS"])
def _backward_states_kernel(
    work_ptr, reads_ptr, whole_ptr, dfinal_ptr, dstates_ptr, dinitial_ptr, T, CHUNKS,
    K: tl.constexpr, C: tl.constexpr, HAS_DFINAL: tl.constexpr, SAVE_DINITIAL: tl.constexpr, PRECISION: tl.constexpr,
):
    """The gradient of the state after every chunk, dstates (CHUNKS, 2, K, K), from the last to the first."""
    n = tl.program_id(0).to(tl.int64)
    work_ptr += n * T * (4 * K)
    reads_ptr += n * T * 2
    whole_ptr += n * CHUNKS * 4
    dstates_ptr += n * CHUNKS * (2 * K * K)
    if HAS_DFINAL:
        ds_f = _load_state(dfinal_ptr + n * (2 * K * K), K)
        ds_s = _load_state(dfinal_ptr + n * (2 * K * K) + K * K, K)
    else:
        ds_f = tl.full((K, K), 0.0, dtype=tl.float32)
        ds_s = tl.full((K, K), 0.0, dtype=tl.float32)

    for step in range(CHUNKS):
        chunk = CHUNKS - 1 - step
        _store_state(dstates_ptr + chunk * (2 * K * K), ds_f, K)
        _store_state(dstates_ptr + chunk * (2 * K * K) + K * K, ds_s, K)
        position = chunk * C + tl.arange(0, C)
        here = position < T
        k = _load_rows(work_ptr + K, position, here, 4 * K, K)
        k_tilde = _load_rows(work_ptr + 2 * K, position, here, 4 * K, K)
        ds_f -= _dot(tl.trans(k), _dot(k_tilde, ds_f, PRECISION), PRECISION)
        ds_s -= _dot(tl.trans(k), _dot(k_tilde, ds_s, PRECISION), PRECISION)
        l_ff = tl.load(whole_ptr + chunk * 4)
        l_fs = tl.load(whole_ptr + chunk * 4 + 1)
        l_sf = tl.load(whole_ptr + chunk * 4 + 2)
        l_ss = tl.load(whole_ptr + chunk * 4 + 3)
        ds_f, ds_s = l_ff * ds_f + l_sf * ds_s, l_fs * ds_f + l_ss * ds_s
        do = _load_rows(work_ptr, position, here, 4 * K, K)
        q_tilde = _load_rows(work_ptr + 3 * K, position, here, 4 * K, K)
        u_f = tl.load(reads_ptr + position * 2, mask=here, other=0.0)
        u_s = tl.load(reads_ptr + position * 2 + 1, mask=here, other=0.0)
        ds_f += _dot(tl.trans(q_tilde), u_f[:, None] * do, PRECISION)
        ds_s += _dot(tl.trans(q_tilde), u_s[:, None] * do, PRECISION)

    if SAVE_DINITIAL:
        _store_state(dinitial_ptr + n * (2 * K * K), ds_f, K)
        _store_state(dinitial_ptr + n * (2 * K * K) + K * K, ds_s, K)


@triton.jit(do_not_specialize=["T", "CHUNKS", "FIRST_REVERSED"])
def _backward_chunk_kernel(
    proj_ptr, mask_ptr, keep_ptr, conv_ptr, bilinear_ptr, scale_ptr, in_weight_ptr, in_bias_ptr, out_weight_ptr,
    out_bias_ptr, states_ptr, dstates_ptr, dproj_ptr, work_ptr, dpsi_ptr,
    T, CHUNKS, FIRST_REVERSED,
    STRIDE: tl.constexpr, H: tl.constexpr, K: tl.constexpr, HIDDEN: tl.constexpr, C: tl.constexpr, LOG2_C: tl.constexpr,
    HAS_KEEP: tl.constexpr, HIERARCHICAL: tl.constexpr, COUPLING: tl.constexpr, FLUX: tl.constexpr,
    CONVOLUTION: tl.constexpr, READ_GATES: tl.constexpr, CARRY: tl.constexpr, PRECISION: tl.constexpr,
):
    """Gradients of the logits, of q, k and v as the recurrence takes them, and of psi, in one chunk of one head.

    `ds` is the gradient of the state after the chunk. With E = dO V^T: dA = c * E, dc = A * E, dV = (c * A)^T dO. From
    dW = dA diag(beta) and G = dW X^T follow dP = tril(G) and dN = -tril(W^T G, -1). K~ adds X^T K to what depends on X:
    with Kx = X^T K and J = X dKx, dN loses tril(Kx J^T, -1) as well and dK gains J.
    """
    n = (tl.program_id(0) // CHUNKS).to(tl.int64)
    chunk = tl.program_id(0) % CHUNKS
    h = (n % H).to(tl.int32)
    REVERSED = h >= FIRST_REVERSED
    proj_ptr += (n // H) * T * STRIDE
    dproj_ptr += (n // H) * T * STRIDE
    mask_ptr += (n // H) * T
    keep_ptr += (n // H) * T * H + h
    work_ptr += n * T * (4 * K)
    dpsi_ptr += n * T
    if CARRY:
        states_ptr += n * CHUNKS * (2 * K * K)
        dstates_ptr += n * CHUNKS * (2 * K * K)
    row = tl.arange(0, C)[:, None]
    col = tl.arange(0, C)[None, :]
    channel = tl.arange(0, K)
    position = chunk * C + tl.arange(0, C)
    token = _token(position, T, REVERSED)
    q, k, v, psi, beta, m_ff, m_fs, m_sf, m_ss, r_f, r_s, inside, written = _prepare(
        proj_ptr, mask_ptr, keep_ptr, conv_ptr, bilinear_ptr, scale_ptr, in_weight_ptr, in_bias_ptr, out_weight_ptr,
        out_bias_ptr, h, position, token, T, REVERSED, STRIDE, H, K, HIDDEN, C, HAS_KEEP, HIERARCHICAL, COUPLING, FLUX,
        CONVOLUTION, READ_GATES, PRECISION)
    x, w = _delta_matrices(q, k, beta, C, LOG2_C, PRECISION)
    a = w * beta[None, :]
    e_ff, e_fs, e_sf, e_ss, after_ff, after_fs, after_sf, after_ss = _decays(m_ff, m_fs, m_sf, m_ss, C)
    to_f = r_f * m_ff + r_s * m_sf
    to_s = r_f * m_fs + r_s * m_ss
    start = col == C - 1
    last = tl.arange(0, C) == C - 1
    before_ff = _entry(e_ff, start, 1)
    before_fs = _entry(e_fs, start, 1)
    before_sf = _entry(e_sf, start, 1)
    before_ss = _entry(e_ss, start, 1)
    l_ff = _entry(after_ff, last, 0)
    l_fs = _entry(after_fs, last, 0)
    l_sf = _entry(after_sf, last, 0)
    l_ss = _entry(after_ss, last, 0)
    after_ff = tl.where(last, 1.0, after_ff)
    after_fs = tl.where(last, 0.0, after_fs)
    after_sf = tl.where(last, 0.0, after_sf)
    after_ss = tl.where(last, 1.0, after_ss)
    # Row vectors r_t^T M_t ... M_{j+1} and, in row t, column vectors M_{t-1} ... M_{j+1} 1.
    b_f = tl.where(row > col, to_f[:, None] * e_ff + to_s[:, None] * e_sf, tl.where(row == col, r_f[:, None], 0.0))
    b_s = tl.where(row > col, to_f[:, None] * e_fs + to_s[:, None] * e_ss, tl.where(row == col, r_s[:, None], 0.0))
    e_f = tl.where(row > col, e_ff + e_fs, 0.0)
    e_s = tl.where(row > col, e_sf + e_ss, 0.0)

    rows = work_ptr + position[:, None] * (4 * K) + channel[None, :]
    here = (position < T)[:, None]
    do = tl.load(rows, mask=here, other=0.0)
    # Inside the chunk, (c * A) V.
    c = b_f + b_s
    dv = _dot(tl.trans(c * a), do, PRECISION)
    dca = _dot(do, tl.trans(v), PRECISION)
    dc = a * dca
    da = c * dca

    # c_tj = r_t^T e_tj with e_t = M_t e_{t-1}. So the gradient of M_t is (gradient of e_t) e_{t-1}^T, summed over
    # the columns j < t and the two of the carried state, where M_{t-1} ... M_1 takes the place of e_{t-1}. The
    # gradient of e_t is B^T dc, plus what reaches it through R and mix.
    dread_f = tl.sum(dc * e_f, axis=1)
    dread_s = tl.sum(dc * e_s, axis=1)
    de_f = _dot(tl.trans(b_f), dc, PRECISION)
    de_s = _dot(tl.trans(b_s), dc, PRECISION)
    own = _entry(dc, row == col, 1)

    if CARRY:
        u_f = to_f * before_ff + to_s * before_sf
        u_s = to_f * before_fs + to_s * before_ss
        q_tilde = q - _dot(a, k, PRECISION)
        # The output's part that reads the state carried in, sum_a u[:, a] * (q_tilde S_0[a]).
        from_f = _dot(do, tl.trans(_load_state(states_ptr + _anchor(chunk) * (2 * K * K), K)), PRECISION)
        du_f = tl.sum(q_tilde * from_f, axis=1)
        dq = u_f[:, None] * from_f
        from_s = _dot(do, tl.trans(_load_state(states_ptr + _anchor(chunk) * (2 * K * K) + K * K, K)), PRECISION)
        du_s = tl.sum(q_tilde * from_s, axis=1)
        dq += u_s[:, None] * from_s
        da -= _dot(dq, tl.trans(k), PRECISION)
        dk = -_dot(tl.trans(a), dq, PRECISION)
        # The state handed on, mix[a] + k_tilde^T z[a] with z[a] = R[:, a] * V - K mix[a].
        kx = _dot(tl.trans(x), k, PRECISION)
        k_tilde = beta[:, None] * kx
        past_f = (after_ff + after_fs)[:, None]
        past_s = (after_sf + after_ss)[:, None]
        ds_f = _load_state(dstates_ptr + _anchor(chunk) * (2 * K * K), K)
        ds_s = _load_state(dstates_ptr + _anchor(chunk) * (2 * K * K) + K * K, K)
        dz_f = _dot(k_tilde, ds_f, PRECISION)
        dz_s = _dot(k_tilde, ds_s, PRECISION)
        tl.store(rows + 2 * K, dv + past_f * dz_f + past_s * dz_s, mask=here)
        dpast_f = tl.sum(dz_f * v, axis=1)
        dpast_s = tl.sum(dz_s * v, axis=1)
        s_f = _load_state(states_ptr + _anchor(chunk) * (2 * K * K), K)
        s_s = _load_state(states_ptr + _anchor(chunk) * (2 * K * K) + K * K, K)
        mix = l_ff * s_f + l_fs * s_s
        dk_tilde = _dot(past_f * v - _dot(k, mix, PRECISION), tl.trans(ds_f), PRECISION)
        dk -= _dot(dz_f, tl.trans(mix), PRECISION)
        mix = l_sf * s_f + l_ss * s_s
        dk_tilde += _dot(past_s * v - _dot(k, mix, PRECISION), tl.trans(ds_s), PRECISION)
        dk -= _dot(dz_s, tl.trans(mix), PRECISION)
        ds_f -= _dot(tl.trans(k), dz_f, PRECISION)
        ds_s -= _dot(tl.trans(k), dz_s, PRECISION)
        dl_ff = tl.sum(tl.sum(ds_f * s_f, axis=1), axis=0)
        dl_fs = tl.sum(tl.sum(ds_f * s_s, axis=1), axis=0)
        dl_sf = tl.sum(tl.sum(ds_s * s_f, axis=1), axis=0)
        dl_ss = tl.sum(tl.sum(ds_s * s_s, axis=1), axis=0)
        dbeta = tl.sum(dk_tilde * kx, axis=1)
        j = _dot(x, beta[:, None] * dk_tilde, PRECISION)
        dk += j
        dn = -_dot(kx, tl.trans(j), PRECISION)

        de_f += after_ff[:, None] * dpast_f[None, :] + after_sf[:, None] * dpast_s[None, :]
        de_s += after_fs[:, None] * dpast_f[None, :] + after_ss[:, None] * dpast_s[None, :]
        dread_f += du_f * before_ff + du_s * before_fs
        dread_s += du_f * before_sf + du_s * before_ss
        from_ff = tl.sum(b_f * du_f[:, None], axis=0) + after_ff * dl_ff + after_sf * dl_sf
        from_fs = tl.sum(b_f * du_s[:, None], axis=0) + after_ff * dl_fs + after_sf * dl_ss
        from_sf = tl.sum(b_s * du_f[:, None], axis=0) + after_fs * dl_ff + after_ss * dl_sf
        from_ss = tl.sum(b_s * du_s[:, None], axis=0) + after_fs * dl_fs + after_ss * dl_ss
        dm_ff = tl.sum(de_f * e_f, axis=1) + from_ff * before_ff + from_fs * before_fs
        dm_fs = tl.sum(de_f * e_s, axis=1) + from_ff * before_sf + from_fs * before_ss
        dm_sf = tl.sum(de_s * e_f, axis=1) + from_sf * before_ff + from_ss * before_fs
        dm_ss = tl.sum(de_s * e_s, axis=1) + from_sf * before_sf + from_ss * before_ss
    else:
        tl.store(rows + 2 * K, dv, mask=here)
        dq = tl.full((C, K), 0.0, dtype=tl.float32)
        dk = tl.full((C, K), 0.0, dtype=tl.float32)
        dn = tl.full((C, C), 0.0, dtype=tl.float32)
        dbeta = tl.full((C,), 0.0, dtype=tl.float32)
        dm_ff = tl.sum(de_f * e_f, axis=1)
        dm_fs = tl.sum(de_f * e_s, axis=1)
        dm_sf = tl.sum(de_s * e_f, axis=1)
        dm_ss = tl.sum(de_s * e_s, axis=1)

    dr_f = own + m_ff * dread_f + m_fs * dread_s
    dr_s = own + m_sf * dread_f + m_ss * dread_s
    dbeta += tl.sum(da * w, axis=0)
    g = _dot(da * beta[None, :], tl.trans(x), PRECISION)
    dn = tl.where(row > col, dn - _dot(tl.trans(w), g, PRECISION), 0.0)
    y = _dot(dn, k, PRECISION)
    dbeta += tl.sum(y * k, axis=1)
    dk += beta[:, None] * y
    dk += _dot(tl.trans(dn), beta[:, None] * k, PRECISION)
    dp = tl.where(row >= col, g, 0.0)
    dq += _dot(dp, k, PRECISION)
    tl.store(rows, dq, mask=here)
    dk += _dot(tl.trans(dp), q, PRECISION)
    tl.store(rows + K, dk, mask=here)

    # The gates, as in `_gates`.
    logit_ptr = proj_ptr + 3 * H * K + h
    dlogit_ptr = dproj_ptr + 3 * H * K + h + token * STRIDE
    here = position < T
    a_f = tl.sigmoid(_load_logits(logit_ptr + H, token, written, STRIDE))
    a_s = tl.sigmoid(_load_logits(logit_ptr + 2 * H, token, written, STRIDE))
    kappa = tl.full((C,), 0.0, dtype=tl.float32)
    if COUPLING and HIERARCHICAL:
        kappa = 0.05 + 0.10 * psi
    df = tl.where(written, dm_ff * (1 - kappa * psi) + dm_fs * (kappa * psi), 0.0)
    ds = tl.where(written, dm_sf * (kappa * (1 - psi)) + dm_ss * (1 - kappa * (1 - psi)), 0.0)
    dpsi = -0.10 * a_f * df - 0.05 * a_s * ds
    if COUPLING and HIERARCHICAL:
        dout_f = tl.where(written, a_f * (1 - 0.10 * psi) * (dm_fs - dm_ff), 0.0)
        dout_s = tl.where(written, a_s * (1 - 0.05 * psi) * (dm_sf - dm_ss), 0.0)
        dpsi += kappa * (dout_f - dout_s) + 0.10 * (dout_f * psi + dout_s * (1 - psi))
    df *= (1 - 0.10 * psi) * a_f * (1 - a_f)
    ds *= (1 - 0.05 * psi) * a_s * (1 - a_s)
    _store_logits(dlogit_ptr, dbeta * beta * (1 - beta), here)
    _store_logits(dlogit_ptr + H, df, here)
    _store_logits(dlogit_ptr + 2 * H, ds, here)
    dr_f = tl.where(inside, dr_f, 0.0)
    dr_s = tl.where(inside, dr_s, 0.0)
    if not HIERARCHICAL:
        dr_s = tl.full((C,), 0.0, dtype=tl.float32)
    if READ_GATES:
        g_f = tl.sigmoid(_load_logits(logit_ptr + 3 * H, token, inside, STRIDE))
        g_s = tl.sigmoid(_load_logits(logit_ptr + 4 * H, token, inside, STRIDE))
        dr_f *= g_f
        dr_s *= g_s
        _store_logits(dlogit_ptr + 3 * H, dr_f * (0.5 + 0.3 * psi) * (1 - g_f), here)
        _store_logits(dlogit_ptr + 4 * H, dr_s * (0.5 - 0.3 * psi) * (1 - g_s), here)
    else:
        _store_logits(dlogit_ptr + 3 * H, tl.full((C,), 0.0, dtype=tl.float32), here)
        _store_logits(dlogit_ptr + 4 * H, tl.full((C,), 0.0, dtype=tl.float32), here)
    tl.store(dpsi_ptr + position, dpsi + 0.3 * (dr_f - dr_s), mask=here)


@triton.jit
def _activation_gradient(x, dy, NORMALISED: tl.constexpr):
    """From the gradient of silu(x), normalised or not, to that of x, (C, K)."""
    if NORMALISED:
        y = _silu(x)
        scale = tl.rsqrt(tl.sum(y * y, axis=1) + 1e-6)
        y *= scale[:, None]
        dy = scale[:, None] * (dy - y * tl.sum(dy * y, axis=1)[:, None])
    return dy * _silu_gradient(x)


@triton.jit(do_not_specialize=["T", "CHUNKS", "FIRST_REVERSED"])
def _backward_activation_kernel(
    proj_ptr, mask_ptr, conv_ptr, bilinear_ptr, scale_ptr, in_weight_ptr, in_bias_ptr, out_weight_ptr, out_bias_ptr,
    work_ptr, dpsi_ptr, dflux_ptr,
    T, CHUNKS, FIRST_REVERSED,
    STRIDE: tl.constexpr, H: tl.constexpr, K: tl.constexpr, HIDDEN: tl.constexpr, C: tl.constexpr, FLUXES: tl.constexpr,
    FLUX: tl.constexpr, CONVOLUTION: tl.constexpr, PRECISION: tl.constexpr,
):
    """From the gradients of q, k, v and psi to those of the flux's parameters and of the convolution's output.

    work (T, 4, K), of one (sentence, head) in its own direction, holds the gradients of q, k, v and is overwritten.
    """
    TAP: tl.constexpr = 3 * H * K
    n = tl.program_id(0).to(tl.int64)
    head = (n % H).to(tl.int32)
    REVERSED = head >= FIRST_REVERSED
    proj_ptr += (n // H) * T * STRIDE
    mask_ptr += (n // H) * T
    work_ptr += n * T * (4 * K)
    dpsi_ptr += n * T
    channel = tl.arange(0, K)
    unit = tl.arange(0, HIDDEN)
    if FLUX:
        dbilinear = tl.full((K, K), 0.0, dtype=tl.float32)
        dweight_k = tl.full((HIDDEN, K), 0.0, dtype=tl.float32)
        dweight_v = tl.full((HIDDEN, K), 0.0, dtype=tl.float32)
        dweight_u = tl.full((HIDDEN,), 0.0, dtype=tl.float32)
        dbias = tl.full((HIDDEN,), 0.0, dtype=tl.float32)
        dout = tl.full((HIDDEN,), 0.0, dtype=tl.float32)
        dscale = tl.full((C,), 0.0, dtype=tl.float32)
        dout_bias = tl.full((C,), 0.0, dtype=tl.float32)

    for chunk in range(CHUNKS):
        position = chunk * C + tl.arange(0, C)
        h = _anchor(head)
        here = position < T
        rows = work_ptr + position[:, None] * (4 * K) + channel[None, :]
        x = _convolve(proj_ptr + h * K, conv_ptr + h * K, mask_ptr, position, T, REVERSED, STRIDE, TAP, K, CONVOLUTION)
        dy = tl.load(rows, mask=here[:, None], other=0.0)
        tl.store(rows, _activation_gradient(x, dy, True), mask=here[:, None])
        x_k = _convolve(proj_ptr + (H + h) * K, conv_ptr + (H + h) * K, mask_ptr, position, T, REVERSED, STRIDE, TAP, K,
                        CONVOLUTION)
        x_v = _convolve(proj_ptr + (2 * H + h) * K, conv_ptr + (2 * H + h) * K, mask_ptr, position, T, REVERSED, STRIDE,
                        TAP, K, CONVOLUTION)
        dk = tl.load(rows + K, mask=here[:, None], other=0.0)
        dv = tl.load(rows + 2 * K, mask=here[:, None], other=0.0)
        if FLUX:
            k = _normalise(_silu(x_k))
            v = _silu(x_v)
            scale = tl.load(scale_ptr + h)
            logit, form, hidden = _flux_logit(k, v, bilinear_ptr + h * K * K, scale, in_weight_ptr, in_bias_ptr,
                                              out_weight_ptr, out_bias_ptr, K, HIDDEN, PRECISION)
            psi = tl.sigmoid(logit)
            dpsi = tl.load(dpsi_ptr + position, mask=here, other=0.0)
            dlogit = tl.where((psi >= 0.01) & (psi <= 0.99), dpsi * psi * (1 - psi), 0.0)
            dout_bias += dlogit
            dout += tl.sum(dlogit[:, None] * _silu(hidden), axis=0)
            dhidden = dlogit[:, None] * tl.load(out_weight_ptr + unit)[None, :] * _silu_gradient(hidden)
            dbias += tl.sum(dhidden, axis=0)
            dweight_u += tl.sum(dhidden * (scale * form)[:, None], axis=0)
            du = tl.sum(dhidden * tl.load(in_weight_ptr + unit * (2 * K + 1) + 2 * K)[None, :], axis=1)
            dscale += du * form
            dform = (scale * du)[:, None] * v
            weight = in_weight_ptr + unit[:, None] * (2 * K + 1) + channel[None, :]
            dweight_k += _dot(tl.trans(dhidden), k, PRECISION)
            dweight_v += _dot(tl.trans(dhidden), v, PRECISION)
            dbilinear += _dot(tl.trans(k), dform, PRECISION)
            dv += (scale * du)[:, None] * _dot(k, _load_state(bilinear_ptr + h * K * K, K), PRECISION)
            dv += _dot(dhidden, tl.load(weight + K), PRECISION)
            dk += _dot(dform, tl.trans(_load_state(bilinear_ptr + h * K * K, K)), PRECISION)
            dk += _dot(dhidden, tl.load(weight), PRECISION)
        tl.store(rows + K, _activation_gradient(x_k, dk, True), mask=here[:, None])
        tl.store(rows + 2 * K, _activation_gradient(x_v, dv, False), mask=here[:, None])

    if FLUX:
        dflux_ptr += n * FLUXES
        _store_state(dflux_ptr, dbilinear, K)
        tl.store(dflux_ptr + K * K, tl.sum(dscale, axis=0))
        dflux_ptr += K * K + 1
        weight = dflux_ptr + unit[:, None] * (2 * K + 1) + channel[None, :]
        tl.store(weight, dweight_k)
        tl.store(weight + K, dweight_v)
        tl.store(dflux_ptr + unit * (2 * K + 1) + 2 * K, dweight_u)
        dflux_ptr += HIDDEN * (2 * K + 1)
        tl.store(dflux_ptr + unit, dbias)
        tl.store(dflux_ptr + HIDDEN + unit, dout)
        tl.store(dflux_ptr + 2 * HIDDEN, tl.sum(dout_bias, axis=0))


@triton.jit(do_not_specialize=["T", "CHUNKS", "FIRST_REVERSED"])
def _backward_convolution_kernel(
    proj_ptr, mask_ptr, conv_ptr, work_ptr, dproj_ptr, dconv_ptr, T, CHUNKS, FIRST_REVERSED,
    STRIDE: tl.constexpr, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, CONVOLUTION: tl.constexpr,
):
    """From the gradient of the convolution's output, in work (T, 4, K), to those of q, k, v in proj and of the taps.

    Of one chunk and head: dconv (4, 3, K) is the chunk's share.
    """
    n = (tl.program_id(0) // CHUNKS).to(tl.int64)
    chunk = tl.program_id(0) % CHUNKS
    h = (n % H).to(tl.int32)
    REVERSED = h >= FIRST_REVERSED
    channel = tl.arange(0, K)
    position = chunk * C + tl.arange(0, C)
    token = _token(position, T, REVERSED)
    here = position < T
    mask_ptr += (n // H) * T
    inside = here & (tl.load(mask_ptr + token, mask=here, other=0) != 0)
    dconv_ptr += (n * CHUNKS + chunk) * (12 * K) + channel
    for part in tl.static_range(3):
        rows = work_ptr + n * T * (4 * K) + part * K + position[:, None] * (4 * K) + channel[None, :]
        x_ptr = proj_ptr + (n // H) * T * STRIDE + (part * H + h) * K
        dx = tl.load(rows, mask=here[:, None], other=0.0)
        total = dx
        if CONVOLUTION:
            tap_ptr = conv_ptr + (part * H + h) * K + channel
            total *= tl.load(tap_ptr)[None, :]
            tl.store(dconv_ptr + part * K,
                     tl.sum(dx * _load_past(x_ptr, mask_ptr, position, 0, T, REVERSED, STRIDE, K), axis=0))
            for lag in tl.static_range(1, 4):
                later = tl.load(rows + lag * (4 * K), mask=(position + lag < T)[:, None], other=0.0)
                total += tl.load(tap_ptr + lag * (3 * H * K))[None, :] * later
                past = _load_past(x_ptr, mask_ptr, position, lag, T, REVERSED, STRIDE, K)
                tl.store(dconv_ptr + (3 * lag + part) * K, tl.sum(dx * past, axis=0))
        dproj = dproj_ptr + (n // H) * T * STRIDE + (part * H + h) * K + token[:, None] * STRIDE + channel[None, :]
        tl.store(dproj, tl.where(inside[:, None], total, 0.0).to(dproj_ptr.dtype.element_ty), mask=here[:, None])


def launch_options(K: int) -> dict:
    """Launch options of all kernels; num_stages=1 because the chunk loop is too long to buffer its loads twice."""
    return dict(num_warps=8 if K == 64 else 4 if K == 32 else 2, num_stages=1)


def _precision() -> str:
    """Of the matrix products, as of PyTorch's own: float32, or 10 bits of it (TF32)."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _device_of(x: Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _arguments(proj: Tensor, mask: Tensor, keep: Tensor | None, parameters: list[Tensor], initial_state: Tensor | None,
               reverse_heads: int, switches: tuple[bool, ...], carry: bool) -> tuple[list, tuple, dict, dict]:
    """What the kernels take: tensors, contiguous and in float32, bool as bytes; lengths; constants.

    Those are of the kernels that read rows of proj, and of those that prepare all of a chunk.
    """
    if not (proj.is_cuda or INTERPRETED.value):
        raise ValueError(f"tensors on {proj.device}: CUDA kernels take them only with TRITON_INTERPRET=1 set at their "
                         "import")
    H, K = parameters[-1].shape
    convolution, flux, coupling, hierarchical, read_gates = switches
    masks = [proj if m is None else m.contiguous().view(torch.uint8) for m in (mask, keep)]
    initial = None if initial_state is None else initial_state.detach().float().contiguous()
    inputs = [proj.contiguous(), *masks, *(x.detach().float().contiguous() for x in parameters), initial]
    rows = dict(K=K, C=CHUNK, H=H, STRIDE=proj.shape[-1], CONVOLUTION=convolution, **launch_options(K))
    chunks = dict(rows, HIDDEN=HIDDEN, FLUX=flux, LOG2_C=CHUNK.bit_length() - 1, HAS_KEEP=keep is not None, CARRY=carry,
                  HIERARCHICAL=hierarchical, COUPLING=coupling, READ_GATES=read_gates, PRECISION=_precision())
    return inputs, (proj.shape[1], triton.cdiv(proj.shape[1], CHUNK), H - reverse_heads), rows, chunks


def mixer_forward(o: Tensor, final: Tensor, saved: Tensor, proj: Tensor, mask: Tensor, keep: Tensor | None,
                  parameters: list[Tensor], initial_state: Tensor | None, reverse_heads: int,
                  switches: tuple[bool, ...]) -> None:
    """Fill `o`, `final` and `saved`, made by `outputs`; empty ones are not wanted."""
    carry = proj.shape[1] > CHUNK or initial_state is not None or final.numel() > 0
    inputs, lengths, _, chunks = _arguments(
        proj, mask, keep, parameters, initial_state, reverse_heads, switches, carry)
    with _device_of(proj):
        if o.numel():
            _forward_kernel[(len(proj) * chunks["H"],)](
                *inputs, o, final, saved, *lengths, HAS_INITIAL=initial_state is not None, SPAN=BLOCK // CHUNK,
                SAVE_STATES=saved.numel() > 0, SAVE_FINAL=final.numel() > 0, **chunks)


def mixer_backward(grad_o: Tensor, grad_final: Tensor | None, saved: Tensor, proj: Tensor, mask: Tensor,
                   keep: Tensor | None, parameters: list[Tensor], initial_state: Tensor | None, reverse_heads: int,
                   switches: tuple[bool, ...]) -> list[Tensor]:
    """Gradients of proj, in its type, and in float32 of the eight parameters and the initial state."""
    (B, T, _), (H, K) = proj.shape, parameters[-1].shape
    convolution, flux, *_ = switches
    chunks, f32 = triton.cdiv(T, CHUNK), dict(dtype=torch.float32, device=proj.device)
    carry = chunks > 1 or initial_state is not None or grad_final is not None
    sizes = [K * K, 1, HIDDEN * (2 * K + 1), HIDDEN, HIDDEN, 1]
    d_flux = (torch.empty if flux else torch.zeros)((B, H, sum(sizes)), **f32)
    d_conv = (torch.empty if convolution else torch.zeros)((B, H, chunks, 4, 3, K), **f32)
    d_norm = torch.empty((B, H, chunks, K), **f32)
    dproj = torch.empty_like(proj, memory_format=torch.contiguous_format)
    dproj[..., (3 * K + 5) * H:] = 0  # what fills the row
    dinitial = torch.empty(0 if initial_state is None else initial_state.shape, **f32)
    if B:
        work, dpsi = torch.empty((B, H, T, 4, K), **f32), torch.empty((B, H, T), **f32)
        reads, whole = torch.empty((B, H, T, 2), **f32), torch.empty((B, H, chunks, 4), **f32)
        states, dstates = (torch.empty((B, H, chunks, 2, K, K) if carry else 0, **f32) for _ in range(2))
        inputs, lengths, rows, of_chunks = _arguments(
            proj, mask, keep, parameters, initial_state, reverse_heads, switches, carry)
        (*inputs, norm, initial), span = inputs, BLOCK // CHUNK
        with _device_of(proj):
            _backward_output_kernel[(B * H * triton.cdiv(chunks, span),)](
                *inputs, norm, initial, saved, grad_o.contiguous(), states, work, reads, whole, d_norm, *lengths,
                HAS_INITIAL=initial is not None, SPAN=span, **of_chunks)
            if carry:
                _backward_states_kernel[(B * H,)](
                    work, reads, whole, None if grad_final is None else grad_final.float().contiguous(), dstates,
                    dinitial, *lengths[:2], K=K, C=CHUNK, HAS_DFINAL=grad_final is not None,
                    SAVE_DINITIAL=initial is not None, PRECISION=_precision(), **launch_options(K))
            _backward_chunk_kernel[(B * H * chunks,)](
                *inputs, states, dstates, dproj, work, dpsi, *lengths, **of_chunks)
            proj, mask, _, *weights = inputs
            _backward_activation_kernel[(B * H,)](
                proj, mask, *weights, work, dpsi, d_flux, *lengths, FLUXES=sum(sizes), HIDDEN=HIDDEN, FLUX=flux,
                PRECISION=_precision(), **rows)
            _backward_convolution_kernel[(B * H * chunks,)](
                proj, mask, weights[0], work, dproj, d_conv, *lengths, **rows)
    d_bilinear, d_scale, *d_shared = d_flux.sum(0).split(sizes, 1)
    d_in_weight, d_in_bias, d_out_weight, d_out_bias = torch.cat(d_shared, 1).sum(0).split(sizes[2:])
    return [dproj, d_conv.sum((0, 2)).permute(1, 2, 0, 3), d_bilinear.reshape(H, K, K), d_scale.flatten(),
            d_in_weight.view(HIDDEN, 2 * K + 1), d_in_bias, d_out_weight, d_out_bias, d_norm.sum((0, 2)), dinitial]
