"""Triton kernels of the hierarchical delta rule: forward and backward of one layer's mixer.

    from delta_kernel import hierarchical_delta_rule_triton      # CUDA only
    o, final_state = hierarchical_delta_rule_triton(q, k, v, beta, transition, read, output_final_state=True)

Per sentence and head there are two K x V states, S[fast] and S[slow]. At token t they mix through the
2 x 2 matrix M_t, each takes a delta-rule write, and the output reads both:

    S~_t = M_t S_{t-1},   S_t[a] = S~_t[a] + beta_t k_t (v_t - S~_t[a]^T k_t)^T,   o_t = sum_a r_t[a] S_t[a]^T q_t

M_t acts on the timescale axis and H_t = I - beta_t k_t k_t^T on the K axis, so they commute, and within a
chunk of C tokens that starts from the state S_0 (`tril(., -1)` drops the diagonal, `*` is elementwise)

    X = (I + diag(beta) tril(K K^T, -1))^-1,   W = tril(Q K^T) X,   A = W diag(beta)
    c_tj = r_t^T M_t ... M_{j+1} 1,   u_t = r_t^T M_t ... M_1,   P_t = M_C ... M_{t+1},   R_t = P_t 1
    O = (c * A) V + sum_a u[:, a] * (Q - A K) S_0[a]
    S_C[a] = mix[a] + K~^T (R[:, a] * V - K mix[a]),   mix = M_C ... M_1 S_0,   K~ = diag(beta) X^T K

This is the chunked (WY) delta rule of Yang et al. 2024 (arXiv:2406.06484) with the decays moved into the
scalar matrix c. A program owns one (sentence, head), keeps every matrix above and both states on chip, and
walks over the chunks; the backward pass walks them in reverse and recomputes all but the states at the chunk
boundaries, the only thing stored besides the inputs. The naive twin of these kernels is
`recurrent_hierarchical_delta_rule` in the training script; tests/test_delta_kernel.py compares the two.
"""

from typing import Optional

import torch
import triton
import triton.language as tl

# Work per token and on-chip memory grow with the chunk; states at the boundaries and steps in sequence shrink. With
# K = V = 32 a carried state costs about as much as a 32 x 32 block of A, so larger chunks only add work, and the
# twenty tiles that the backward pass holds at once fit the registers (4 per thread and tile). At 128 they would not
# come near: one 128 x 128 float32 tile alone is 64 KB. Longer inputs carry their state, in registers, between chunks.
CHUNK_SIZES = (16, 32)
HEAD_DIMS = (16, 32, 64)
PRECISIONS = ("ieee", "tf32x3", "tf32")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _load_mixing(m_ptr, t, T):
    """M_t as (ff, fs, sf, ss); the identity at tokens past the end. `t` is a scalar or a vector of tokens."""
    inside = t < T
    m_ff = tl.load(m_ptr + 4 * t, mask=inside, other=1.0).to(tl.float32)
    m_fs = tl.load(m_ptr + 4 * t + 1, mask=inside, other=0.0).to(tl.float32)
    m_sf = tl.load(m_ptr + 4 * t + 2, mask=inside, other=0.0).to(tl.float32)
    m_ss = tl.load(m_ptr + 4 * t + 3, mask=inside, other=1.0).to(tl.float32)
    return m_ff, m_fs, m_sf, m_ss


@triton.jit
def _load_rows(ptr, start, T, C: tl.constexpr, D: tl.constexpr):
    """Rows start .. start + C - 1 of a (T, D) matrix as float32, zero past the end."""
    row = start + tl.arange(0, C)
    offset = row[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(ptr + offset, mask=(row < T)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _store_rows(ptr, value, start, T, C: tl.constexpr, D: tl.constexpr):
    row = start + tl.arange(0, C)
    offset = row[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(ptr + offset, value.to(ptr.dtype.element_ty), mask=(row < T)[:, None])


@triton.jit
def _load_vector(ptr, start, T, C: tl.constexpr, STRIDE: tl.constexpr):
    t = start + tl.arange(0, C)
    return tl.load(ptr + t * STRIDE, mask=t < T, other=0.0).to(tl.float32)


@triton.jit
def _store_vector(ptr, value, start, T, C: tl.constexpr, STRIDE: tl.constexpr):
    t = start + tl.arange(0, C)
    tl.store(ptr + t * STRIDE, value.to(ptr.dtype.element_ty), mask=t < T)


@triton.jit
def _load_state(ptr, K: tl.constexpr, V: tl.constexpr):
    offset = tl.arange(0, K)[:, None] * V + tl.arange(0, V)[None, :]
    return tl.load(ptr + offset).to(tl.float32)


@triton.jit
def _store_state(ptr, value, K: tl.constexpr, V: tl.constexpr):
    offset = tl.arange(0, K)[:, None] * V + tl.arange(0, V)[None, :]
    tl.store(ptr + offset, value.to(ptr.dtype.element_ty))


# Under TRITON_INTERPRET=1 kernels run as Python on CPU tensors, without assembly.
INTERPRETED = tl.constexpr(not isinstance(_load_state, triton.JITFunction))


@triton.jit
def _pin(x):
    """x, computed here and under a name of its own.

    Left alone, the compiler shares each operand of a product, spread out to 32 or more registers per thread, with
    every later product that uses it, and moves products down to their first use while their operands wait in
    registers. Both cost far more registers than they save work: without pins the backward kernel spills kilobytes
    per thread, with them almost nothing. Assembly with side effects is what the compiler leaves where it is.
    """
    if INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    return _pin(tl.dot(_pin(a), _pin(b), input_precision=PRECISION))


@triton.jit
def _delta_matrices(q, k, beta, C: tl.constexpr, LOG2_C: tl.constexpr, PRECISION: tl.constexpr):
    """X and W of a chunk, each (C, C).

    X is the inverse of I + N by block substitution: once the diagonal blocks of some size are inverted, the block
    between two neighbours is -X_22 N_21 X_11. Every entry met on the way is beta_t k_t^T H ... H k_j, at most 1 for
    keys of unit length, also for repeated tokens, where a power series in N would grow without bound.
    """
    row = tl.arange(0, C)[:, None]
    col = tl.arange(0, C)[None, :]
    kk = tl.where(row > col, _dot(k, tl.trans(k), PRECISION), 0.0)
    n = beta[:, None] * kk
    x = tl.where(row == col, 1.0, tl.where((row ^ col) == 1, -n, 0.0))  # n is zero above the diagonal
    for level in range(1, LOG2_C):
        below = tl.where((row >> level) == ((col >> level) ^ 1), n, 0.0)
        x -= _dot(x, _dot(below, x, PRECISION), PRECISION)
    p = tl.where(row >= col, _dot(q, tl.trans(k), PRECISION), 0.0)
    return x, _dot(p, x, PRECISION)


@triton.jit
def _read_weights(m_ptr, r_f, r_s, start, T, C: tl.constexpr):
    """Tiles (C, C) B[fast], B[slow] of the row vectors B_tj = r_t^T M_t ... M_{j+1}, zero for j > t; c is their sum.

    Column by column from the right: M_j multiplies the rows t >= j of all columns left of j. Only sums of products
    of numbers in [0, 1]: nothing is divided by a decay, and underflow is harmless. Both tiles keep one layout
    throughout, so the loop exchanges nothing between threads.
    """
    row = tl.arange(0, C)[:, None]
    col = tl.arange(0, C)[None, :]
    b_f = tl.where(row >= col, r_f[:, None], 0.0)
    b_s = tl.where(row >= col, r_s[:, None], 0.0)
    tokens = tl.minimum(T - start, C)  # M = I past the end
    for step in range(1, tokens):
        j = tokens - step
        m_ff, m_fs, m_sf, m_ss = _load_mixing(m_ptr, start + j, T)
        applies = (row >= j) & (col < j)
        next_f = b_f * m_ff + b_s * m_sf
        next_s = b_f * m_fs + b_s * m_ss
        b_f = tl.where(applies, next_f, b_f)
        b_s = tl.where(applies, next_s, b_s)
    return b_f, b_s


@triton.jit
def _write_weights(m_ptr, start, T, C: tl.constexpr):
    """Tiles (C, C) e[fast], e[slow] with e_tj = M_t ... M_{j+1} 1; row t holds e_{t-1}, zero for j >= t."""
    row = tl.arange(0, C)[:, None]
    col = tl.arange(0, C)[None, :]
    e_f = tl.where(row > col, 1.0, 0.0)
    e_s = e_f
    for t in range(1, tl.minimum(T - start, C - 1)):
        m_ff, m_fs, m_sf, m_ss = _load_mixing(m_ptr, start + t, T)
        applies = (row > t) & (col < t)
        next_f = m_ff * e_f + m_fs * e_s
        next_s = m_sf * e_f + m_ss * e_s
        e_f = tl.where(applies, next_f, e_f)
        e_s = tl.where(applies, next_s, e_s)
    return e_f, e_s


@triton.jit
def _products_before(m_ptr, start, T, C: tl.constexpr):
    """M_{t-1} ... M_1 for every t (four (C,) vectors ff, fs, sf, ss) and M_C ... M_1 (four scalars)."""
    token = tl.arange(0, C)
    before_ff = tl.zeros((C,), dtype=tl.float32)
    before_fs = tl.zeros((C,), dtype=tl.float32)
    before_sf = tl.zeros((C,), dtype=tl.float32)
    before_ss = tl.zeros((C,), dtype=tl.float32)
    l_ff = 1.0
    l_fs = 0.0
    l_sf = 0.0
    l_ss = 1.0
    for t in range(tl.minimum(T - start, C)):
        here = token == t
        before_ff = tl.where(here, l_ff, before_ff)
        before_fs = tl.where(here, l_fs, before_fs)
        before_sf = tl.where(here, l_sf, before_sf)
        before_ss = tl.where(here, l_ss, before_ss)
        m_ff, m_fs, m_sf, m_ss = _load_mixing(m_ptr, start + t, T)
        l_ff, l_sf = m_ff * l_ff + m_fs * l_sf, m_sf * l_ff + m_ss * l_sf
        l_fs, l_ss = m_ff * l_fs + m_fs * l_ss, m_sf * l_fs + m_ss * l_ss
    return before_ff, before_fs, before_sf, before_ss, l_ff, l_fs, l_sf, l_ss


@triton.jit
def _products_after(m_ptr, start, T, C: tl.constexpr):
    """P_t = M_C ... M_{t+1} for every t, as four (C,) vectors ff, fs, sf, ss."""
    token = tl.arange(0, C)
    after_ff = tl.zeros((C,), dtype=tl.float32)
    after_fs = tl.zeros((C,), dtype=tl.float32)
    after_sf = tl.zeros((C,), dtype=tl.float32)
    after_ss = tl.zeros((C,), dtype=tl.float32)
    l_ff = 1.0
    l_fs = 0.0
    l_sf = 0.0
    l_ss = 1.0
    tokens = tl.minimum(T - start, C)
    for step in range(tokens):
        t = tokens - 1 - step
        here = token == t
        after_ff = tl.where(here, l_ff, after_ff)
        after_fs = tl.where(here, l_fs, after_fs)
        after_sf = tl.where(here, l_sf, after_sf)
        after_ss = tl.where(here, l_ss, after_ss)
        m_ff, m_fs, m_sf, m_ss = _load_mixing(m_ptr, start + t, T)
        l_ff, l_fs = l_ff * m_ff + l_fs * m_sf, l_ff * m_fs + l_fs * m_ss
        l_sf, l_ss = l_sf * m_ff + l_ss * m_sf, l_sf * m_fs + l_ss * m_ss
    return after_ff, after_fs, after_sf, after_ss


@triton.jit(do_not_specialize=["T", "CHUNKS"])
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, beta_ptr, m_ptr, r_ptr, initial_ptr,
    o_ptr, final_ptr, states_ptr,
    T, CHUNKS,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG2_C: tl.constexpr,
    HAS_INITIAL: tl.constexpr, STATE_IN: tl.constexpr, STATE_OUT: tl.constexpr,
    SAVE_STATES: tl.constexpr, SAVE_FINAL: tl.constexpr, PRECISION: tl.constexpr,
):
    """o and the final state of one (sentence, head).

    STATE_IN: some chunk starts from a state other than zero. STATE_OUT: the state after some chunk is needed.
    SAVE_STATES: store the state at the start of every chunk, (CHUNKS, 2, K, V), for the backward pass.
    """
    n = tl.program_id(0).to(tl.int64)  # n * T * K may pass 2^31
    q_ptr += n * T * K
    k_ptr += n * T * K
    v_ptr += n * T * V
    o_ptr += n * T * V
    beta_ptr += n * T
    m_ptr += n * T * 4
    r_ptr += n * T * 2
    states_ptr += n * CHUNKS * (2 * K * V)
    if HAS_INITIAL:
        s_f = _load_state(initial_ptr + n * (2 * K * V), K, V)
        s_s = _load_state(initial_ptr + n * (2 * K * V) + K * V, K, V)
    else:
        s_f = tl.zeros((K, V), dtype=tl.float32)
        s_s = tl.zeros((K, V), dtype=tl.float32)

    for chunk in range(CHUNKS):
        start = chunk * C
        if SAVE_STATES:
            _store_state(states_ptr + chunk * (2 * K * V), s_f, K, V)
            _store_state(states_ptr + chunk * (2 * K * V) + K * V, s_s, K, V)
        q = _load_rows(q_ptr, start, T, C, K)
        k = _load_rows(k_ptr, start, T, C, K)
        v = _load_rows(v_ptr, start, T, C, V)
        beta = _load_vector(beta_ptr, start, T, C, 1)
        r_f = _load_vector(r_ptr, start, T, C, 2)
        r_s = _load_vector(r_ptr + 1, start, T, C, 2)

        x, w = _delta_matrices(q, k, beta, C, LOG2_C, PRECISION)
        a = w * beta[None, :]
        b_f, b_s = _read_weights(m_ptr, r_f, r_s, start, T, C)
        o = _dot((b_f + b_s) * a, v, PRECISION)
        if STATE_IN:
            before_ff, before_fs, before_sf, before_ss, l_ff, l_fs, l_sf, l_ss = _products_before(m_ptr, start, T, C)
            m_ff, m_fs, m_sf, m_ss = _load_mixing(m_ptr, start + tl.arange(0, C), T)
            to_f = r_f * m_ff + r_s * m_sf
            to_s = r_f * m_fs + r_s * m_ss
            u_f = to_f * before_ff + to_s * before_sf
            u_s = to_f * before_fs + to_s * before_ss
            q_tilde = q - _dot(a, k, PRECISION)
            o += u_f[:, None] * _dot(q_tilde, s_f, PRECISION)
            o += u_s[:, None] * _dot(q_tilde, s_s, PRECISION)
        _store_rows(o_ptr, o, start, T, C, V)
        if STATE_OUT:
            after_ff, after_fs, after_sf, after_ss = _products_after(m_ptr, start, T, C)
            k_tilde = beta[:, None] * _dot(tl.trans(x), k, PRECISION)
            z_f = (after_ff + after_fs)[:, None] * v
            z_s = (after_sf + after_ss)[:, None] * v
            if STATE_IN:
                s_f, s_s = l_ff * s_f + l_fs * s_s, l_sf * s_f + l_ss * s_s
                z_f -= _dot(k, s_f, PRECISION)
                z_s -= _dot(k, s_s, PRECISION)
            s_f += _dot(tl.trans(k_tilde), z_f, PRECISION)
            s_s += _dot(tl.trans(k_tilde), z_s, PRECISION)

    if SAVE_FINAL:
        _store_state(final_ptr + n * (2 * K * V), s_f, K, V)
        _store_state(final_ptr + n * (2 * K * V) + K * V, s_s, K, V)


@triton.jit(do_not_specialize=["T", "CHUNKS"])
def _backward_kernel(
    q_ptr, k_ptr, v_ptr, beta_ptr, m_ptr, r_ptr, states_ptr, do_ptr, dfinal_ptr,
    dq_ptr, dk_ptr, dv_ptr, dbeta_ptr, dm_ptr, dr_ptr, dinitial_ptr,
    T, CHUNKS,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG2_C: tl.constexpr,
    HAS_DFINAL: tl.constexpr, STATE_IN: tl.constexpr, STATE_OUT: tl.constexpr,
    SAVE_DINITIAL: tl.constexpr, PRECISION: tl.constexpr,
):
    """Gradients of everything the forward kernel read; `ds` is the gradient of the state after the chunk.

    With E = dO V^T: dA = c * E, dc = A * E, dV = (c * A)^T dO. From dW = dA diag(beta) and G = dW X^T follow
    dP = tril(G) and dN = -tril(W^T G, -1). K~ adds X^T K to what depends on X: with Kx = X^T K and
    H = X dKx, dN loses tril(Kx H^T, -1) as well and dK gains H.
    """
    n = tl.program_id(0).to(tl.int64)
    q_ptr += n * T * K
    k_ptr += n * T * K
    v_ptr += n * T * V
    do_ptr += n * T * V
    beta_ptr += n * T
    m_ptr += n * T * 4
    r_ptr += n * T * 2
    states_ptr += n * CHUNKS * (2 * K * V)
    dq_ptr += n * T * K
    dk_ptr += n * T * K
    dv_ptr += n * T * V
    dbeta_ptr += n * T
    dm_ptr += n * T * 4
    dr_ptr += n * T * 2
    row = tl.arange(0, C)[:, None]
    col = tl.arange(0, C)[None, :]
    if HAS_DFINAL:
        ds_f = _load_state(dfinal_ptr + n * (2 * K * V), K, V)
        ds_s = _load_state(dfinal_ptr + n * (2 * K * V) + K * V, K, V)
    else:
        ds_f = tl.zeros((K, V), dtype=tl.float32)
        ds_s = tl.zeros((K, V), dtype=tl.float32)

    for step in range(CHUNKS):
        chunk = CHUNKS - 1 - step
        start = chunk * C
        q = _load_rows(q_ptr, start, T, C, K)
        k = _load_rows(k_ptr, start, T, C, K)
        v = _load_rows(v_ptr, start, T, C, V)
        do = _load_rows(do_ptr, start, T, C, V)
        beta = _load_vector(beta_ptr, start, T, C, 1)
        x, w = _delta_matrices(q, k, beta, C, LOG2_C, PRECISION)
        a = w * beta[None, :]
        r_f = _load_vector(r_ptr, start, T, C, 2)
        r_s = _load_vector(r_ptr + 1, start, T, C, 2)
        m_ff, m_fs, m_sf, m_ss = _load_mixing(m_ptr, start + tl.arange(0, C), T)
        dq = tl.zeros((C, K), dtype=tl.float32)
        dk = tl.zeros((C, K), dtype=tl.float32)
        dv = tl.zeros((C, V), dtype=tl.float32)
        da = tl.zeros((C, C), dtype=tl.float32)
        dn = tl.zeros((C, C), dtype=tl.float32)
        dbeta = tl.zeros((C,), dtype=tl.float32)

        if STATE_IN:
            s_f = _load_state(states_ptr + chunk * (2 * K * V), K, V)
            s_s = _load_state(states_ptr + chunk * (2 * K * V) + K * V, K, V)
            before_ff, before_fs, before_sf, before_ss, l_ff, l_fs, l_sf, l_ss = _products_before(m_ptr, start, T, C)
        # The state handed on, mix[a] + k_tilde^T z[a] with z[a] = R[:, a] * V - K mix[a].
        if STATE_OUT:
            after_ff, after_fs, after_sf, after_ss = _products_after(m_ptr, start, T, C)
            kx = _dot(tl.trans(x), k, PRECISION)
            k_tilde = beta[:, None] * kx
            past_f = (after_ff + after_fs)[:, None]
            past_s = (after_sf + after_ss)[:, None]
            dz_f = _dot(k_tilde, ds_f, PRECISION)
            dz_s = _dot(k_tilde, ds_s, PRECISION)
            dv += past_f * dz_f + past_s * dz_s
            dpast_f = tl.sum(dz_f * v, axis=1)
            dpast_s = tl.sum(dz_s * v, axis=1)
            z_f = past_f * v
            z_s = past_s * v
            if STATE_IN:
                mix_f = l_ff * s_f + l_fs * s_s
                mix_s = l_sf * s_f + l_ss * s_s
                z_f -= _dot(k, mix_f, PRECISION)
                z_s -= _dot(k, mix_s, PRECISION)
                dk -= _dot(dz_f, tl.trans(mix_f), PRECISION)
                dk -= _dot(dz_s, tl.trans(mix_s), PRECISION)
            dk_tilde = _dot(z_f, tl.trans(ds_f), PRECISION)
            dk_tilde += _dot(z_s, tl.trans(ds_s), PRECISION)
            dbeta += tl.sum(dk_tilde * kx, axis=1)
            h = _dot(x, beta[:, None] * dk_tilde, PRECISION)
            dk += h
            dn -= _dot(kx, tl.trans(h), PRECISION)
            if STATE_IN:
                ds_f -= _dot(tl.trans(k), dz_f, PRECISION)
                ds_s -= _dot(tl.trans(k), dz_s, PRECISION)
                dl_ff = tl.sum(ds_f * s_f)
                dl_fs = tl.sum(ds_f * s_s)
                dl_sf = tl.sum(ds_s * s_f)
                dl_ss = tl.sum(ds_s * s_s)
                ds_f, ds_s = l_ff * ds_f + l_sf * ds_s, l_fs * ds_f + l_ss * ds_s

        # The output's part that reads the state carried in, sum_a u[:, a] * (q_tilde S_0[a]).
        if STATE_IN:
            to_f = r_f * m_ff + r_s * m_sf
            to_s = r_f * m_fs + r_s * m_ss
            u_f = to_f * before_ff + to_s * before_sf
            u_s = to_f * before_fs + to_s * before_ss
            q_tilde = q - _dot(a, k, PRECISION)
            ds_f += _dot(tl.trans(q_tilde), u_f[:, None] * do, PRECISION)
            ds_s += _dot(tl.trans(q_tilde), u_s[:, None] * do, PRECISION)
            from_f = _dot(do, tl.trans(s_f), PRECISION)
            du_f = tl.sum(q_tilde * from_f, axis=1)
            dq += u_f[:, None] * from_f
            from_s = _dot(do, tl.trans(s_s), PRECISION)
            du_s = tl.sum(q_tilde * from_s, axis=1)
            dq += u_s[:, None] * from_s
            da -= _dot(dq, tl.trans(k), PRECISION)
            dk -= _dot(tl.trans(a), dq, PRECISION)

        # The output's part inside the chunk, (c * A) V.
        b_f, b_s = _read_weights(m_ptr, r_f, r_s, start, T, C)
        c = b_f + b_s
        dv += _dot(tl.trans(c * a), do, PRECISION)
        dca = _dot(do, tl.trans(v), PRECISION)
        _store_rows(dv_ptr, dv, start, T, C, V)
        dc = a * dca
        da += c * dca

        # c_tj = r_t^T e_tj with e_t = M_t e_{t-1}. So the gradient of M_t is (gradient of e_t) e_{t-1}^T, summed over
        # the columns j < t and the two of the carried state, where M_{t-1} ... M_1 takes the place of e_{t-1}. The
        # gradient of e_t is B^T dc, plus what reaches it through R and mix.
        e_f, e_s = _write_weights(m_ptr, start, T, C)
        dread_f = tl.sum(dc * e_f, axis=1)
        dread_s = tl.sum(dc * e_s, axis=1)
        de_f = _dot(tl.trans(b_f), dc, PRECISION)
        de_s = _dot(tl.trans(b_s), dc, PRECISION)
        if STATE_OUT:
            de_f += after_ff[:, None] * dpast_f[None, :] + after_sf[:, None] * dpast_s[None, :]
            de_s += after_fs[:, None] * dpast_f[None, :] + after_ss[:, None] * dpast_s[None, :]
        dm_ff = tl.sum(de_f * e_f, axis=1)
        dm_fs = tl.sum(de_f * e_s, axis=1)
        dm_sf = tl.sum(de_s * e_f, axis=1)
        dm_ss = tl.sum(de_s * e_s, axis=1)
        if STATE_IN:
            dread_f += du_f * before_ff + du_s * before_fs
            dread_s += du_f * before_sf + du_s * before_ss
            dproduct_ff = tl.sum(b_f * du_f[:, None], axis=0)
            dproduct_fs = tl.sum(b_f * du_s[:, None], axis=0)
            dproduct_sf = tl.sum(b_s * du_f[:, None], axis=0)
            dproduct_ss = tl.sum(b_s * du_s[:, None], axis=0)
            if STATE_OUT:
                dproduct_ff += after_ff * dl_ff + after_sf * dl_sf
                dproduct_fs += after_ff * dl_fs + after_sf * dl_ss
                dproduct_sf += after_fs * dl_ff + after_ss * dl_sf
                dproduct_ss += after_fs * dl_fs + after_ss * dl_ss
            dm_ff += dproduct_ff * before_ff + dproduct_fs * before_fs
            dm_fs += dproduct_ff * before_sf + dproduct_fs * before_ss
            dm_sf += dproduct_sf * before_ff + dproduct_ss * before_fs
            dm_ss += dproduct_sf * before_sf + dproduct_ss * before_ss
        own = tl.sum(tl.where(row == col, dc, 0.0), axis=1)
        _store_vector(dr_ptr, own + m_ff * dread_f + m_fs * dread_s, start, T, C, 2)
        _store_vector(dr_ptr + 1, own + m_sf * dread_f + m_ss * dread_s, start, T, C, 2)
        _store_vector(dm_ptr, dm_ff, start, T, C, 4)
        _store_vector(dm_ptr + 1, dm_fs, start, T, C, 4)
        _store_vector(dm_ptr + 2, dm_sf, start, T, C, 4)
        _store_vector(dm_ptr + 3, dm_ss, start, T, C, 4)

        dbeta += tl.sum(da * w, axis=0)
        g = _dot(da * beta[None, :], tl.trans(x), PRECISION)
        dn -= _dot(tl.trans(w), g, PRECISION)
        dn = tl.where(row > col, dn, 0.0)
        y = _dot(dn, k, PRECISION)
        dbeta += tl.sum(y * k, axis=1)
        dk += beta[:, None] * y
        dk += _dot(tl.trans(dn), beta[:, None] * k, PRECISION)
        _store_vector(dbeta_ptr, dbeta, start, T, C, 1)
        dp = tl.where(row >= col, g, 0.0)
        dq += _dot(dp, k, PRECISION)
        dk += _dot(tl.trans(dp), q, PRECISION)
        _store_rows(dq_ptr, dq, start, T, C, K)
        _store_rows(dk_ptr, dk, start, T, C, K)

    if SAVE_DINITIAL:
        _store_state(dinitial_ptr + n * (2 * K * V), ds_f, K, V)
        _store_state(dinitial_ptr + n * (2 * K * V) + K * V, ds_s, K, V)


def launch_options(chunk_size: int, precision: str) -> dict:
    """Launch options of both kernels; num_stages=1 because the chunk loop is too long to buffer its loads twice.

    Float32 products spread over all warps alike; tensor core tiles have 16 rows, of which two warps cover a chunk.
    """
    return dict(num_warps=8 if chunk_size == 32 and precision == "ieee" else 4, num_stages=1)


# The two kernels are registered as custom operators, so torch.compile takes each as one opaque node: no graph
# break, and nothing to trace inside. Tensors arrive contiguous with their leading dims flattened to N.


@torch.library.custom_op("hierarchical_delta_rule::forward", mutates_args=())
def _forward_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, transition: torch.Tensor,
    read: torch.Tensor, initial_state: Optional[torch.Tensor], output_final_state: bool, save_states: bool,
    chunk_size: int, precision: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (N, T, K), V = q.shape, v.shape[-1]
    o, final_state, states = _forward_fake(q, k, v, beta, transition, read, initial_state, output_final_state,
                                           save_states, chunk_size, precision)
    chunks = triton.cdiv(T, chunk_size)
    if N > 0:
        with torch.cuda.device_of(q):
            _forward_kernel[(N,)](
                q, k, v, beta, transition, read, q if initial_state is None else initial_state,
                o, final_state, states, T, chunks, K=K, V=V, C=chunk_size, LOG2_C=chunk_size.bit_length() - 1,
                HAS_INITIAL=initial_state is not None, STATE_IN=initial_state is not None or chunks > 1,
                STATE_OUT=output_final_state or chunks > 1, SAVE_STATES=save_states and chunks > 1,
                SAVE_FINAL=output_final_state, PRECISION=precision, **launch_options(chunk_size, precision))
    return o, final_state, states


@_forward_op.register_fake
def _forward_fake(q, k, v, beta, transition, read, initial_state, output_final_state, save_states, chunk_size,
                  precision):
    (N, T, K), V = q.shape, v.shape[-1]
    chunks = -(-T // chunk_size)
    state = dict(dtype=torch.float32, device=q.device)
    final_state = torch.empty((N, 2, K, V) if output_final_state else (0,), **state)
    # A single chunk starts from the initial state, which is at hand.
    states = torch.empty((N, chunks, 2, K, V) if save_states and chunks > 1 else (0,), **state)
    return torch.empty_like(v), final_state, states


@torch.library.custom_op("hierarchical_delta_rule::backward", mutates_args=())
def _backward_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, transition: torch.Tensor,
    read: torch.Tensor, initial_state: Optional[torch.Tensor], states: torch.Tensor, do: torch.Tensor,
    dfinal: Optional[torch.Tensor], chunk_size: int, precision: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    (N, T, K), V = q.shape, v.shape[-1]
    chunks = triton.cdiv(T, chunk_size)
    has_initial = initial_state is not None
    grads = _backward_fake(q, k, v, beta, transition, read, initial_state, states, do, dfinal, chunk_size, precision)
    if N > 0:
        with torch.cuda.device_of(q):
            _backward_kernel[(N,)](
                q, k, v, beta, transition, read, states if chunks > 1 else initial_state if has_initial else q,
                do, q if dfinal is None else dfinal, *grads, T, chunks,
                K=K, V=V, C=chunk_size, LOG2_C=chunk_size.bit_length() - 1,
                HAS_DFINAL=dfinal is not None, STATE_IN=has_initial or chunks > 1,
                STATE_OUT=dfinal is not None or chunks > 1, SAVE_DINITIAL=has_initial, PRECISION=precision,
                **launch_options(chunk_size, precision))
    return grads


@_backward_op.register_fake
def _backward_fake(q, k, v, beta, transition, read, initial_state, states, do, dfinal, chunk_size, precision):
    dinitial = q.new_empty(0) if initial_state is None else torch.empty_like(initial_state)
    return tuple(torch.empty_like(x) for x in (q, k, v, beta, transition, read)) + (dinitial,)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.output_final_state, _, ctx.chunk_size, ctx.precision = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, do, dfinal, _):
    q, k, v, beta, transition, read, initial_state, states = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do.contiguous()
    dfinal = dfinal.contiguous() if ctx.output_final_state and dfinal is not None else None
    *grads, dinitial = _backward_op(q, k, v, beta, transition, read, initial_state, states, do, dfinal,
                                    ctx.chunk_size, ctx.precision)
    return *grads, None if initial_state is None else dinitial, None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _check(tensors: dict[str, torch.Tensor], chunk_size: int | None, precision: str) -> None:
    q, v = tensors["q"], tensors["v"]
    if q.dim() < 2 or v.dim() < 2:
        raise ValueError(f"q and v must be (..., T, K) and (..., T, V), got {tuple(q.shape)} and {tuple(v.shape)}")
    (*lead, T, K), V = q.shape, v.shape[-1]
    if T < 1 or K not in HEAD_DIMS or V not in HEAD_DIMS:
        raise ValueError(f"need T >= 1 and K, V in {HEAD_DIMS}, got T={T}, K={K}, V={V}")
    if chunk_size not in (None, *CHUNK_SIZES):
        raise ValueError(f"chunk_size must be one of {CHUNK_SIZES} or None, got {chunk_size}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    shapes = dict(q=(*lead, T, K), k=(*lead, T, K), v=(*lead, T, V), beta=(*lead, T), transition=(*lead, T, 2, 2),
                  read=(*lead, T, 2), initial_state=(*lead, 2, K, V))
    for name, x in tensors.items():
        if tuple(x.shape) != shapes[name]:
            raise ValueError(f"{name} must have shape {shapes[name]} to fit q and v, got {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}")
        if x.device != q.device or not (x.is_cuda or INTERPRETED.value):
            raise ValueError(f"{name} is on {x.device}: all tensors must be on one CUDA device "
                             "(on the CPU only with TRITON_INTERPRET=1 set before the import)")


def hierarchical_delta_rule_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, transition: torch.Tensor,
    read: torch.Tensor, initial_state: torch.Tensor | None = None, output_final_state: bool = False,
    chunk_size: int | None = None, precision: str = "ieee",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The hierarchical delta rule, differentiable (once) in every tensor argument.

    Args:
        q, k: (..., T, K) activated and L2-normalised queries and keys, K in {16, 32, 64}.
        v: (..., T, V) values, V in {16, 32, 64}.
        beta: (..., T) write strength in [0, 1]; 0 at padding.
        transition: (..., T, 2, 2) the matrices M_t over (fast, slow), entries >= 0, row sums <= 1; I at padding.
        read: (..., T, 2) the weights r_t of the two timescales.
        initial_state: (..., 2, K, V), or None for zeros.
        output_final_state: also return the state after the last token.
        chunk_size: tokens per chunk, 16 or 32; by default 16 for T <= 16, else 32.
        precision: of the matrix products. "ieee": float32, relative errors of about 1e-7. "tf32x3": three TF32 tensor
            core products for each, about 1e-6; "tf32": one, about 1e-3. Where TF32 is not several times faster than
            float32 (an L40 peaks at 90 TFLOPS in both), "tf32x3" has nothing to gain.

    Returns:
        o: (..., T, V) in the dtype of v; final_state: (..., 2, K, V) float32, or None.
        Inputs may be float32, bfloat16 or float16 and are used in float32; a gradient has its input's dtype.

    Raises:
        ValueError: a shape, dtype, device, chunk size or precision that the kernels do not take.

    Source: Yang et al. 2024, arXiv:2406.06484 (the chunked delta rule); the derivation is in the module docstring.
    """
    tensors = dict(q=q, k=k, v=v, beta=beta, transition=transition, read=read)
    if initial_state is not None:
        tensors["initial_state"] = initial_state
    _check(tensors, chunk_size, precision)
    lead, T = q.shape[:-2], q.shape[-2]
    N = lead.numel()
    flat = {name: x.reshape(N, *x.shape[len(lead):]).contiguous() for name, x in tensors.items()}
    save_states = torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values())
    o, final_state, _ = _forward_op(
        flat["q"], flat["k"], flat["v"], flat["beta"], flat["transition"], flat["read"], flat.get("initial_state"),
        output_final_state, save_states, chunk_size or (16 if T <= 16 else 32), precision)
    return o.reshape(v.shape), final_state.reshape(*lead, *final_state.shape[1:]) if output_final_state else None
