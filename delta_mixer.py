"""What computes the delta rule fast, and the check that it computes the same as its definition.

    o, state = chunk_hierarchical_delta_rule(q, k, v, ...)  # the training script's `recurrent_...`, in chunks
    o, state = parallel_mixer(proj, mask, ...)  # all between a layer's projections, with that rule, in PyTorch
    o, state = hierarchical_mixer(proj, mask, ...)  # the same as one operator: (B, T, (3 K + 5) H) -> (B, T, H K)

The operator's kernels are Numba's on a CPU (delta_kernel.py) and Triton's on CUDA (delta_kernel_cuda.py), imported by
the first call there, so that neither needs the other's package. Both keep the same for the backward pass: the inputs,
and the states every BLOCK tokens. A saved model carries this file along; the check runs in training alone.
"""
from __future__ import annotations

import functools
import itertools
import math
import warnings
from importlib.util import find_spec
from typing import Any, Callable, Iterator, NamedTuple, Optional, Sequence
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ----------------------------------------------------------------------------------------------------------------------
# The parallel form


def decay_products(transition: Tensor, read: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All products of the transitions inside one chunk, by doubling the block size; nothing is ever divided.

    Args: transition (..., T, 2, 2), read (..., T, 2).
    Returns:
        c (..., T, T): c_tj = r_t^T M_t ... M_{j+1} 1 for j <= t, else 0.
        left (2, ..., T): r_t^T M_t ... M_1, what o_t reads of an initial state.
        right (2, ..., T): M_T ... M_{t+1} 1, what is left of write t at the end.
        whole (2, 2, ...): M_T ... M_1.
    """
    length = read.shape[-2]
    size = 1 << (length - 1).bit_length()
    # Timescales, then time, come first: the last axis is long at every block size, so each operation is vectorised.
    m, r = transition.movedim((-2, -1, -3), (0, 1, 2)), read.movedim((-1, -2), (0, 1))
    if size != length:
        eye = torch.eye(2, dtype=m.dtype, device=m.device).view(2, 2, *[1] * (m.dim() - 2))
        m = torch.cat([m, eye.expand(2, 2, size - length, *m.shape[3:])], 2)
        r = torch.cat([r, r.new_zeros(2, size - length, *r.shape[2:])], 1)
    m, r = m.unsqueeze(3), r.unsqueeze(2)  # (2, 2, blocks, 1, ...) and (2, blocks, 1, ...)
    c, right, left = r.sum(0).unsqueeze(2), torch.ones_like(r), (r.unsqueeze(1) * m).sum(0)
    while len(c) > 1:
        m1, m2, c1, c2 = m[:, :, ::2], m[:, :, 1::2], c[::2], c[1::2]
        left1, left2, right1, right2 = left[:, ::2], left[:, 1::2], right[:, ::2], right[:, 1::2]
        end1, end2 = m1[:, :, :, -1:], m2[:, :, :, -1:]  # each half's whole product
        off = left2[0].unsqueeze(2) * right1[0].unsqueeze(1) + left2[1].unsqueeze(2) * right1[1].unsqueeze(1)
        c = torch.cat([torch.cat([c1, torch.zeros_like(c1)], 2), torch.cat([off, c2], 2)], 1)
        left = torch.cat([left1, left2[0] * end1[0] + left2[1] * end1[1]], 2)
        right = torch.cat([end2[:, 0] * right1[0] + end2[:, 1] * right1[1], right2], 2)
        m = torch.cat([m1, m2[:, :1] * end1[0] + m2[:, 1:] * end1[1]], 3)
    return (c[0, :length, :length].movedim((0, 1), (-2, -1)).contiguous(), left[:, 0, :length].movedim(1, -1),
            right[:, 0, :length].movedim(1, -1), m[:, :, 0, -1])


class DeltaAttention(torch.autograd.Function):
    """A = tril(Q K^T) X diag(beta) and X = (I + diag(beta) tril(K K^T, -1))^-1, with the gradients in closed form.

    Plain DeltaNet's attention matrix (Yang et al. 2024, arXiv:2406.06484), by a triangular solve: a power series
    blows up on repeated tokens. q, k (..., T, K), beta (..., T) -> A, X (..., T, T).
    """

    @staticmethod
    def forward(ctx, q, k, beta):
        n = beta.unsqueeze(-1) * (k @ k.mT)
        eye = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device).expand_as(n)
        x = torch.linalg.solve_triangular(n, eye, upper=False, unitriangular=True)
        w = (q @ k.mT).tril_() @ x
        ctx.save_for_backward(q, k, beta, x, w)
        ctx.set_materialize_grads(False)
        return w * beta.unsqueeze(-2), x

    @staticmethod
    def backward(ctx, grad_a, grad_x):
        q, k, beta, x, w = ctx.saved_tensors
        grad_a = torch.zeros_like(w) if grad_a is None else grad_a  # only the final state has a gradient
        grad_beta = (grad_a * w).sum(-2)
        g = (grad_a * beta.unsqueeze(-2)) @ x.mT
        grad_n = w.mT @ g
        if grad_x is not None:
            grad_n = grad_n + x.mT @ (grad_x @ x.mT)
        grad_n = grad_n.tril_(-1).neg_()
        grad_beta = grad_beta + (grad_n * (k @ k.mT)).sum(-1)
        grad_n = grad_n * beta.unsqueeze(-1)
        g = g.tril_()
        grad_k = torch.baddbmm(*_flat3(g.mT @ q, grad_n + grad_n.mT, k)).view_as(k)
        return g @ k, grad_k, grad_beta


def _flat3(*tensors: Tensor) -> Iterator[Tensor]:
    """Every tensor as (batch, rows, columns)."""
    return (t.reshape(-1, *t.shape[-2:]) for t in tensors)


def chunk_hierarchical_delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, transition: Tensor, read: Tensor,
                                  initial_state: Tensor | None = None, output_final_state: bool = False,
                                  chunk_size: int | None = None) -> tuple[Tensor, Tensor | None]:
    """The parallel form of `recurrent_hierarchical_delta_rule`, same arguments and results, linear in T.

    M acts on the timescale axis and H_t = I - beta_t k_t k_t^T on the key axis, so they commute: inside a chunk the
    output is O = (c * A) V with plain DeltaNet's attention matrix A and the scalar decay weights c. All chunks are
    computed at once, as one more axis; only the states go from chunk to chunk. `chunk_size` None: up to 80 tokens are
    one chunk, longer texts are cut into chunks of 32 (the fastest of 16 to 128 on a CPU).
    """
    length = q.shape[-2]
    chunk_size = chunk_size or (length if length <= 80 else 32)
    count = -(-length // chunk_size)
    size = chunk_size if count > 1 else length
    if pad := count * size - length:
        q, k, v, read = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v, read))
        eye = torch.eye(2, dtype=q.dtype, device=q.device).expand(*transition.shape[:-3], pad, 2, 2)
        beta, transition = F.pad(beta, (0, pad)), torch.cat([transition, eye], -3)
    q, k, v, read = (x.unflatten(-2, (count, size)) for x in (q, k, v, read))
    beta, transition = beta.unflatten(-1, (count, size)), transition.unflatten(-3, (count, size))

    c, left, right, whole = decay_products(transition, read)
    a, x = DeltaAttention.apply(q, k, beta)
    o, state = (c * a) @ v, initial_state
    if initial_state is not None or output_final_state or count > 1:
        # Both states side by side as K x 2V: what each is multiplied with is the same, so one product serves both.
        k_end = ((x.mT @ k) * beta.unsqueeze(-1)).mT  # columns: beta_j H_C ... H_{j+1} k_j
        both = lambda weights: torch.cat([weights[0].unsqueeze(-1) * v, weights[1].unsqueeze(-1) * v], -1)  # noqa: E731
        written, lost, width = (k_end @ both(right)).unbind(-3), (k_end @ k).unbind(-3), v.shape[-1]
        state = torch.zeros_like(written[0]) if state is None else state.movedim(-3, -2).flatten(-2)
        states = []
        for i, m in enumerate(whole.movedim(-1, 0).unsqueeze(-1).unsqueeze(-1)):  # (chunks, 2, 2, ..., 1, 1)
            states.append(state)
            fast, slow = torch.sub(state, lost[i] @ state).split(width, -1)
            state = written[i] + torch.cat([m[0, 0] * fast + m[0, 1] * slow, m[1, 0] * fast + m[1, 1] * slow], -1)
        if initial_state is not None or count > 1:
            fast, slow = ((q - a @ k) @ torch.stack(states, -3)).split(width, -1)  # rows of q - A K: H_1 ... H_t q_t
            o = o + left[0].unsqueeze(-1) * fast + left[1].unsqueeze(-1) * slow
        state = state.unflatten(-1, (2, width)).movedim(-2, -3)
    o = o.flatten(-3, -2)
    return o[..., :length, :] if pad else o, state if output_final_state else None


def l2_normalise(x: Tensor) -> Tensor:
    """x * rsqrt(sum(x^2) + 1e-6) over the last axis."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def parallel_mixer(proj: Tensor, mask: Tensor, keep: Tensor | None, conv_weight: Tensor, flux_bilinear: Tensor,
                   flux_scale: Tensor, flux_in_weight: Tensor, flux_in_bias: Tensor, flux_out_weight: Tensor,
                   flux_out_bias: Tensor, o_norm: Tensor, initial_state: Tensor | None = None, *,
                   reverse_heads: int = 0, convolution: bool = True, flux: bool = True, coupling: bool = True,
                   hierarchical: bool = True, read_gates: bool = True, output_final_state: bool = False,
                   delta_rule: Callable = chunk_hierarchical_delta_rule) -> tuple[Tensor, Tensor | None]:
    """All between a layer's input and output projections, in PyTorch: the twin of `hierarchical_mixer`.

    Args:
        proj: (B, T, R), for each token q (H, K), k (H, K), v (H, K), the logits of beta, a_fast, a_slow, g_fast, g_slow
            (H each), and what fills the row.
        mask: (B, T) bool, False at padding: the convolution reads zeros there, nothing is written, and o is 0.
        keep: (B, T, H) bool or None, False where state dropout drops the write: the states pass, and are read.
        conv_weight: (4, 3, H, K), tap i looks i tokens back. o_norm: (H, K).
        flux_bilinear: (H, K, K), flux_scale: (H); flux_in_weight (16, 2 K + 1) and the others: the MLP of psi.
        initial_state: (B, H, 2, K, K) or None for zeros. reverse_heads: the last heads, which read right to left.
    Returns: o (B, T, H K), and the final states (B, H, 2, K, K), of each head in its own direction, or None.
    """
    (batch, length, _), (_, _, heads, channels) = proj.shape, conv_weight.shape

    def orient(x: Tensor) -> Tensor:
        """Turn time around for the last heads, x (H, B, T, ...) or (..., H, B, T, K); its own inverse."""
        if not reverse_heads:
            return x
        at = x.dim() - 4 if x.dim() > 4 else 0
        left, right = x.split([heads - reverse_heads, reverse_heads], at)
        return torch.cat([left, right.flip(at + 2)], at)

    width = 3 * heads * channels
    qkv, gates = proj[..., :width].float(), proj[..., width:width + 5 * heads].float()
    qkv = (qkv * mask.unsqueeze(-1)).view(batch, length, 3, heads, channels)
    qkv = orient(qkv.permute(2, 3, 0, 1, 4))  # (3, H, B, T, K)
    gates = torch.sigmoid(gates.view(batch, length, 5, heads).permute(3, 0, 1, 2))  # (H, B, T, 5)
    beta, a_fast, a_slow, g_fast, g_slow = orient(gates).unbind(-1)
    update = mask.expand(heads, -1, -1) if keep is None else (keep & mask.unsqueeze(-1)).permute(2, 0, 1)
    update, real = orient(update), orient(mask.expand(heads, -1, -1))
    if convolution:
        padded = F.pad(qkv, (0, 0, 3, 0))
        qkv = sum(padded[..., 3 - i:3 - i + length, :] * conv_weight[i, :, :, None, None] for i in range(4))
    q, k, v = F.silu(qkv).unbind(0)
    q, k = l2_normalise(q), l2_normalise(k)
    psi = torch.full_like(beta, 0.5)
    if flux:
        form = ((k.flatten(1, 2) @ flux_bilinear).view_as(k) * v).sum(-1) * flux_scale[:, None, None]
        hidden = F.silu(F.linear(torch.cat([k, v, form.unsqueeze(-1)], -1), flux_in_weight, flux_in_bias))
        psi = torch.sigmoid(hidden @ flux_out_weight + flux_out_bias).clamp(0.01, 0.99)
    if not read_gates:
        g_fast, g_slow = torch.ones_like(g_fast), torch.ones_like(g_slow)
    kappa = 0.05 + 0.10 * psi if coupling and hierarchical else 0.0 * psi
    f, s, alpha = a_fast * (1 - 0.10 * psi), a_slow * (1 - 0.05 * psi), 0.5 + 0.3 * psi
    out_fast, out_slow = kappa * psi, kappa * (1 - psi)
    transition = torch.stack([f * (1 - out_fast), f * out_fast, s * out_slow, s * (1 - out_slow)], -1)
    transition = transition.unflatten(-1, (2, 2))
    transition = torch.where(update[..., None, None], transition, torch.eye(2, device=proj.device))
    read = torch.stack([alpha * g_fast, (1 - alpha) * g_slow if hierarchical else torch.zeros_like(alpha)], -1)
    state = None if initial_state is None else initial_state.float().transpose(0, 1)
    o, state = delta_rule(q, k, v, beta * update, transition, read, initial_state=state,
                          output_final_state=output_final_state)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-6) * o_norm[:, None, None] * real.unsqueeze(-1)
    return orient(o).permute(1, 2, 0, 3).flatten(2), state.transpose(0, 1) if output_final_state else None


# ----------------------------------------------------------------------------------------------------------------------
# The operator, named after the package and so after its content: a process may hold the kernels of several versions

BLOCK = 32  # tokens between two kept states
HIDDEN = 16  # units of the flux's MLP
PACKAGES = {"cpu": "numba", "cuda": "triton"}
DEVICES = {device for device, package in PACKAGES.items() if find_spec(package)}  # those that have kernels here
CUDA_CHANNELS = (16, 32, 64)  # of a head, that the CUDA kernels take


@functools.cache
def kernels(device: str) -> Any:
    """The module with a device's `mixer_forward` and `mixer_backward`."""
    if device == "cuda":
        from . import delta_kernel_cuda as found
    else:
        from . import delta_kernel as found
    return found


def outputs(proj: Tensor, conv_weight: Tensor, output_final_state: bool, save_states: bool,
            table: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Room for o (B, T, H K), the final states (B, H, 2, K, K) or (0,), and the kept states or (0,).

    Those are of the starts of all blocks but the first, (B, H, blocks - 1, 2, K, K filled up to a multiple of 16). Of
    packed texts each has as many blocks as its length makes, and all stand in one row, (states, 2, K, ...): the `table`
    says how many, so that these cannot be traced.
    """
    (batch, length, _), (_, _, heads, K) = proj.shape, conv_weight.shape
    kept, new = (batch, heads, -(-length // BLOCK) - 1), proj.new_empty
    if table is not None:
        batch, kept = len(table) - 1, (heads * int(table[-1, 1]),)
    return (new(*proj.shape[:2], heads * K, dtype=torch.float32),
            new((batch, heads, 2, K, K) if output_final_state else (0,), dtype=torch.float32),
            new((*kept, 2, K, -(-K // 16) * 16) if save_states else (0,), dtype=torch.float32))


def pack_lengths(lengths: Sequence[int] | None, x: Tensor) -> Tensor | None:
    """Of every text, and of the end, its first token and the states kept of those before it: (texts + 1, 2) int64.

    Raises ValueError unless `lengths` are those of texts packed into x (1, T, ...) on a CPU; None: of none.
    """
    if lengths is None:
        return None
    if len(x) != 1 or not x.is_cpu or sum(lengths) != x.shape[1] or min(lengths, default=0) < 1:
        raise ValueError(f"need lengths above 0 that sum to the {x.shape[1]} tokens of one row on a CPU, got "
                         f"{list(lengths)[:8]} for {tuple(x.shape)} on {x.device}")
    kept = [max(0, length - 1) // BLOCK for length in lengths]
    return torch.tensor([*zip(itertools.accumulate(lengths, initial=0), itertools.accumulate(kept, initial=0))])


@torch.library.custom_op(f"{__package__}::mixer", mutates_args=())
def mixer(proj: Tensor, mask: Tensor, keep: Optional[Tensor], conv_weight: Tensor, flux_bilinear: Tensor,
          flux_scale: Tensor, flux_in_weight: Tensor, flux_in_bias: Tensor, flux_out_weight: Tensor,
          flux_out_bias: Tensor, o_norm: Tensor, initial_state: Optional[Tensor], reverse_heads: int, convolution: bool,
          flux: bool, coupling: bool, hierarchical: bool, read_gates: bool, output_final_state: bool, save_states: bool,
          table: Optional[Tensor] = None) -> tuple[Tensor, Tensor, Tensor]:
    parameters = [conv_weight, flux_bilinear, flux_scale, flux_in_weight, flux_in_bias, flux_out_weight, flux_out_bias,
                  o_norm]
    found = outputs(proj, conv_weight, output_final_state, save_states, table)
    kernels(proj.device.type).mixer_forward(*found, proj, mask, keep, parameters, initial_state, reverse_heads,
                                            (convolution, flux, coupling, hierarchical, read_gates),
                                            *([] if table is None else [table]))  # the CPU's alone takes one
    return found


@torch.library.custom_op(f"{__package__}::mixer_backward", mutates_args=())
def mixer_backward(grad_o: Tensor, grad_final: Optional[Tensor], saved: Tensor, proj: Tensor, mask: Tensor,
                   keep: Optional[Tensor], conv_weight: Tensor, flux_bilinear: Tensor, flux_scale: Tensor,
                   flux_in_weight: Tensor, flux_in_bias: Tensor, flux_out_weight: Tensor, flux_out_bias: Tensor,
                   o_norm: Tensor, initial_state: Optional[Tensor], reverse_heads: int, convolution: bool, flux: bool,
                   coupling: bool, hierarchical: bool, read_gates: bool, table: Optional[Tensor] = None,
                   ) -> list[Tensor]:
    parameters = [conv_weight, flux_bilinear, flux_scale, flux_in_weight, flux_in_bias, flux_out_weight, flux_out_bias,
                  o_norm]
    grad_proj, *grads, grad_initial = kernels(proj.device.type).mixer_backward(
        grad_o, grad_final, saved, proj, mask, keep, parameters, initial_state, reverse_heads,
        (convolution, flux, coupling, hierarchical, read_gates), *([] if table is None else [table]))
    # Copied, as an operator's results may not share memory: those of parameters are parts of a few sums.
    return [grad_proj.to(proj.dtype), *(x.to(of.dtype, copy=True).contiguous() for x, of in zip(grads, parameters)),
            grad_initial]


@mixer.register_fake
def _(proj, mask, keep, conv_weight, flux_bilinear, flux_scale, flux_in_weight, flux_in_bias, flux_out_weight,
      flux_out_bias, o_norm, initial_state, reverse_heads, convolution, flux, coupling, hierarchical, read_gates,
      output_final_state, save_states, table=None):
    return outputs(proj, conv_weight, output_final_state, save_states, table)


@mixer_backward.register_fake
def _(grad_o, grad_final, saved, proj, mask, keep, conv_weight, flux_bilinear, flux_scale, flux_in_weight, flux_in_bias,
      flux_out_weight, flux_out_bias, o_norm, initial_state, *switches):
    inputs = (proj, conv_weight, flux_bilinear, flux_scale, flux_in_weight, flux_in_bias, flux_out_weight,
              flux_out_bias, o_norm)
    grad_initial = proj.new_empty(0 if initial_state is None else initial_state.shape, dtype=torch.float32)
    return [*(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs), grad_initial]


def keep_inputs(ctx, inputs, output) -> None:
    """What the backward pass needs: the inputs, and the kept states."""
    ctx.save_for_backward(output[2], inputs[20], *inputs[:12])
    ctx.switches, ctx.wants_final = inputs[12:18], inputs[18]
    ctx.set_materialize_grads(False)


def differentiate(ctx, grad_o, grad_final, _):
    saved, table, proj, *others = ctx.saved_tensors
    if grad_o is None:
        grad_o = proj.new_zeros(*proj.shape[:2], others[9].numel())
    final = grad_final if ctx.wants_final else None
    *grads, grad_initial = mixer_backward(grad_o.float(), final, saved, proj, *others, *ctx.switches, table)
    initial_state = others[-1]
    return (grads[0], None, None, *grads[1:],
            None if initial_state is None else grad_initial.to(initial_state.dtype), *[None] * 9)


mixer.register_autograd(differentiate, setup_context=keep_inputs)


def check_inputs(inputs: tuple[Tensor | None, ...], reverse_heads: int, packed: int | None = None) -> None:
    """ValueError if an argument of the mixer does not fit the others: the kernel reads memory by these shapes.

    `packed`: the number of texts that are packed into one row.
    """
    proj, mask, keep, conv, *_ = inputs
    if proj.dim() != 3 or conv.dim() != 4:
        raise ValueError(f"need proj (B, T, R) and conv_weight (4, 3, H, K), got {tuple(proj.shape)}, "
                         f"{tuple(conv.shape)}")
    (batch, length, row), (_, _, heads, K) = proj.shape, conv.shape
    if row < heads * (3 * K + 5) or not 0 <= reverse_heads <= heads:
        raise ValueError(f"need proj's rows of at least {heads * (3 * K + 5)} numbers and reverse_heads in 0..{heads}, "
                         f"got {row} and {reverse_heads}")
    if proj.device.type == "cuda" and K not in CUDA_CHANNELS:
        raise ValueError(f"the CUDA kernels take heads of {CUDA_CHANNELS} channels, got {K}")
    shapes = {"mask": (batch, length), "keep": (batch, length, heads), "conv_weight": (4, 3, heads, K),
              "flux_bilinear": (heads, K, K), "flux_scale": (heads,), "flux_in_weight": (HIDDEN, 2 * K + 1),
              "flux_in_bias": (HIDDEN,), "flux_out_weight": (HIDDEN,), "flux_out_bias": (1,), "o_norm": (heads, K),
              "initial_state": (packed or batch, heads, 2, K, K)}
    for (name, shape), x in zip(shapes.items(), inputs[1:]):
        flags = name in ("mask", "keep")
        if x is None and name in ("keep", "initial_state"):
            continue
        if tuple(x.shape) != shape or x.device != proj.device or (x.dtype == torch.bool) != flags:
            raise ValueError(f"{name} must be {'bool' if flags else 'numbers'} of shape {shape} on {proj.device}, "
                             f"got {x.dtype} of {tuple(x.shape)} on {x.device}")


def hierarchical_mixer(proj: Tensor, mask: Tensor, keep: Tensor | None, conv_weight: Tensor, flux_bilinear: Tensor,
                       flux_scale: Tensor, flux_in_weight: Tensor, flux_in_bias: Tensor, flux_out_weight: Tensor,
                       flux_out_bias: Tensor, o_norm: Tensor, initial_state: Tensor | None = None, *,
                       reverse_heads: int = 0, convolution: bool = True, flux: bool = True, coupling: bool = True,
                       hierarchical: bool = True, read_gates: bool = True, output_final_state: bool = False,
                       lengths: Sequence[int] | None = None) -> tuple[Tensor, Tensor | None]:
    """The mixer of a layer, arguments and results as of `parallel_mixer`.

    With `lengths`, on a CPU alone, the batch is one row of that many texts one after the other, packed, of so many
    tokens each; states are then (texts, H, 2, K, K). Computed in float32; products on CUDA as
    torch.set_float32_matmul_precision says. Raises ValueError naming the first argument whose shape, type or device
    does not fit.
    """
    inputs = (proj, mask, keep, conv_weight, flux_bilinear, flux_scale, flux_in_weight, flux_in_bias, flux_out_weight,
              flux_out_bias, o_norm, initial_state)
    table = pack_lengths(lengths, proj)
    check_inputs(inputs, reverse_heads, None if lengths is None else len(lengths))
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    o, final, _ = mixer(*inputs, reverse_heads, convolution, flux, coupling, hierarchical, read_gates,
                        output_final_state, wanted, table)
    return o, final if output_final_state else None


def has_kernel(x: Tensor, channels: int = 32) -> bool:
    """Whether kernels for heads of `channels` run where `x` is; warns once if a package for them is missing."""
    device = x.device.type
    if device in PACKAGES and device not in DEVICES and not torch.compiler.is_compiling():
        package = PACKAGES[device]
        warnings.warn(f"without the package {package} this model is several times slower on {device}: "
                      f"pip install {package}", stacklevel=1)
    return device in DEVICES and (device == "cpu" or channels in CUDA_CHANNELS)


def fastest_mixer(x: Tensor, channels: int) -> Callable:
    """The mixer for heads of `channels` where `x` is."""
    return hierarchical_mixer if has_kernel(x, channels) else parallel_mixer


# ----------------------------------------------------------------------------------------------------------------------
# What stands between the matrix products of a layer, on a CPU

ROWS = 2048  # tokens in work at once where no gradient is wanted: what `encode` puts into a batch on a CPU


def fuses(x: Tensor, *widths: int) -> bool:
    """Whether the CPU's kernel does the elementwise parts of layers of these widths for `x`: in float32 alone."""
    plain = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu") and not any(n % 16 for n in widths)
    return not x.is_cuda and plain and not (torch.compiler.is_compiling() or torch.jit.is_tracing()) and has_kernel(x)


class RecomputedFeedForward(torch.autograd.Function):
    """`feed_forward` on a CPU, x (N, D) -> (N, D); keeps half of what autograd would, (N, F) numbers."""

    @staticmethod
    def forward(ctx, x, up, up_bias, down, down_bias):
        hidden = x @ up.T
        ctx.save_for_backward(x, hidden, up, up_bias, down)
        return F.linear(kernels("cpu").gelu(hidden, up_bias, torch.empty_like(hidden)), down, down_bias)

    @staticmethod
    def backward(ctx, grad):
        x, hidden, up, up_bias, down = ctx.saved_tensors
        grad_hidden = grad @ down
        activated = kernels("cpu").gelu_backward(hidden, up_bias, grad_hidden)  # grad_hidden becomes that of `hidden`
        return grad_hidden @ up, grad_hidden.T @ x, grad_hidden.sum(0), grad.T @ activated, grad.sum(0)


def feed_forward(x: Tensor, up: nn.Linear, down: nn.Linear) -> Tensor:
    """down(gelu(up(x))), with the exact GELU; with gradients by the CPU's kernel. x (..., D) -> (..., D)."""
    if torch.is_grad_enabled() and fuses(x, up.out_features):
        return RecomputedFeedForward.apply(x.flatten(0, -2), up.weight, up.bias, down.weight, down.bias).view_as(x)
    return down(F.gelu(up(x)))


class Kept(NamedTuple):
    """What a CPU's kernel reads in place of a layer's tensors."""
    first: Tensor  # of these, as it was then
    tracked: list[Tensor]  # those of which PyTorch counts the changes, which it does not in inference mode
    changes: int
    value: Any


KEPT: WeakKeyDictionary[nn.Module, Kept] = WeakKeyDictionary()


def kept(layer: nn.Module, first: Tensor, tensors: Callable[[nn.Module], list[Tensor]], pack: Callable) -> Any:
    """`pack(*tensors(layer))`, kept until one of them is changed in place, or the first one replaced by another."""
    found = KEPT.get(layer)
    if found is None or found.first is not first or found.changes != sum([x._version for x in found.tracked]):
        sources = tensors(layer)
        tracked = [x for x in sources if not x.is_inference()]
        changes = sum([x._version for x in tracked])
        found = KEPT[layer] = Kept(first, tracked, changes, pack(*sources))
    return found.value


def multiply_int8(x: Tensor, layer: nn.Linear, added_to: Tensor | None = None) -> Tensor:
    """x (N, D) times the layer's weights in int8, without its bias: (N, F), new or added to what is there."""
    cpu, weight = kernels("cpu"), layer.weight
    return cpu.multiply_int8(x, kept(layer, weight, lambda _: [weight], cpu.pack_int8), added_to)


def mixer_tensors(layer: nn.Module) -> list[Tensor]:
    """A mixer's parameters, and the biases of what it reads, as `pack_mixer` takes them."""
    heads, K, _ = layer.flux_bilinear.shape
    return [layer.conv_weight.view(4, 3, heads, K), layer.flux_bilinear, layer.flux_log_temperature,
            layer.flux_in.weight, layer.flux_in.bias, layer.flux_out.weight, layer.flux_out.bias, layer.o_norm,
            layer.qkv_proj.bias, layer.gate_proj.bias]


def pack_mixer(*tensors: Tensor) -> Any:
    """`mixer_tensors` as the CPU's kernel takes them."""
    conv, bilinear, log_temperature, *others, qkv_bias, gate_bias = tensors
    return kernels("cpu").packed([conv, bilinear, torch.exp(-log_temperature), *others], (qkv_bias, gate_bias))


def pack_mixer_int8(qkv: Tensor, gates: Tensor, *tensors: Tensor) -> tuple[Any, Any]:
    """The weights of q, k, v and the gates as one matrix in int8, and `pack_mixer`."""
    return kernels("cpu").pack_int8(torch.cat([qkv, gates])), pack_mixer(*tensors)


def begin_layer(x: Tensor, mask: Tensor, layer: nn.Module, output_final_state: bool = False, int8: bool = False,
                lengths: Sequence[int] | None = None) -> tuple[Tensor, Tensor | None]:
    """What a layer's mixer reads, without gradients, of an x that `fuses`: x (B, T, D), mask (B, T) bool -> (B, T, D).

    And the final states (B, H, 2, K, K) or None. `lengths`: of texts packed into one row. By what `layer`, an
    EnhancedHierarchicalDeltaNet, holds: no hooks are called. In float32 q, k, v and the gates are two products, as
    joining the weights takes longer for short texts; their biases the kernel's. Raises ValueError for other shapes.
    """
    rows, (heads, K, _), table = x.flatten(0, 1), layer.flux_bilinear.shape, pack_lengths(lengths, x)
    if mask.shape != x.shape[:2] or x.shape[2] != heads * K:
        raise ValueError(f"need x (B, T, {heads * K}) and mask (B, T), got {tuple(x.shape)} and {tuple(mask.shape)}")
    if int8:
        sources = lambda layer: [layer.qkv_proj.weight, layer.gate_proj.weight, *mixer_tensors(layer)]  # noqa: E731
        weights, parameters = kept(layer, layer.qkv_proj.weight, sources, pack_mixer_int8)
        proj = kernels("cpu").multiply_int8(rows, weights).view(*x.shape[:2], -1)
    else:
        parameters, widths = pack_mixer(*mixer_tensors(layer)), (3 * heads * K, 5 * heads)
        proj = x.new_empty(*x.shape[:2], -(-sum(widths) // 16) * 16)
        q_k_v, gates, _ = proj.flatten(0, 1).split([*widths, proj.shape[-1] - sum(widths)], 1)
        torch.mm(rows, layer.qkv_proj.weight.T, out=q_k_v)
        torch.mm(rows, layer.gate_proj.weight.T, out=gates)
    o = x.new_empty(x.shape)
    final = x.new_empty(len(lengths or x), heads, 2, K, K) if output_final_state else None
    switches = tuple(layer.switches[name] for name in ("convolution", "flux", "coupling", "hierarchical", "read_gates"))
    kernels("cpu").mixer_forward(o, final, None, proj, mask, None, parameters, None, layer.reverse_heads, switches,
                                 table)
    return o, final


@torch.no_grad()
def finish_layer(x: Tensor, read: Tensor, o_proj: nn.Linear, norm: nn.LayerNorm, up: nn.Linear, down: nn.Linear,
                 ffn_norm: nn.LayerNorm, int8: bool = False) -> Tensor:
    """What follows a layer's mixer, without gradients and in place of x, which `fuses`: x, read (..., D) -> (..., D).

    x = norm(x + o_proj(read)), then ffn_norm(x + down(gelu(up(x)))), by the layers' tensors: no hooks are
    called, and all have biases. Sums with x are the matrix products' own, biases
    the kernel's, so that no tensor is read or written for one of these alone.
    """
    cpu, rows = kernels("cpu"), x.flatten(0, -2)
    hidden = None if int8 else x.new_empty(min(len(rows), ROWS), up.out_features)

    def add_product(to: Tensor, y: Tensor, layer: nn.Linear) -> Tensor:
        return multiply_int8(y, layer, to) if int8 else to.addmm_(y, layer.weight.T)

    for piece, part in zip(rows.split(ROWS), read.flatten(0, -2).split(ROWS)):
        cpu.add_and_normalise(add_product(piece, part, o_proj), o_proj.bias, norm)
        if int8:
            raised = multiply_int8(piece, up)
        else:
            raised = torch.mm(piece, up.weight.T, out=hidden[:len(piece)])
        cpu.add_and_normalise(add_product(piece, cpu.gelu(raised, up.bias, raised), down), down.bias, ffn_norm)
    return rows.view_as(x)


# ----------------------------------------------------------------------------------------------------------------------
# Which form: each is checked against the definition, then timed


def relative_difference(expected: Tensor, found: Tensor) -> float:
    """The largest difference over 1 + the largest expected entry."""
    return float((expected - found).detach().abs().max() / (1 + expected.detach().abs().max()))


def mixer_example(device: torch.device, heads: int = 4, channels: int = 32, batch: int = 2, length: int = 70,
                  ) -> list[Tensor]:
    """Random inputs of a mixer, `proj` to `initial_state`, with padding and dropped writes; floats want gradients."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    mask = torch.ones(batch, length, dtype=torch.bool)
    keep = torch.rand(batch, length, heads, generator=generator) > 0.1
    mask[0, length - length // 4:], mask[-1, length // 3:length // 2] = False, False
    floats = [rand(batch, length, -(-heads * (3 * channels + 5) // 16) * 16), rand(4, 3, heads, channels, scale=0.5),
              rand(heads, channels, channels, scale=channels ** -0.5), torch.rand(heads, generator=generator),
              rand(16, 2 * channels + 1, scale=0.25), rand(16, scale=0.25), rand(16), rand(1), rand(heads, channels),
              rand(batch, heads, 2, channels, channels, scale=0.25)]
    proj, *parameters = (x.to(device).requires_grad_() for x in floats)
    return [proj, mask.to(device), keep.to(device), *parameters]


class WrongMixer(ArithmeticError):
    """A form of the mixer differs from the definition, or no form is left that does not; said in one line."""


TF32_LIMIT = 0.03  # of a mixer's difference where products have TF32's 10 bits: 0.008, emulated on a CPU


def check_mixers(definition: Callable, device: torch.device, mixers: dict[str, Callable] | None = None,
                 heads: int = 4, channels: int = 32, precision: str = "highest", limit: float = 1e-3) -> float:
    """Largest difference of the mixers that `device` has from `parallel_mixer` with the delta rule's `definition`.

    Outputs, final states and all gradients, see `relative_difference`; WrongMixer above `limit`. The definition, with
    the arguments and results of `chunk_hierarchical_delta_rule`, is computed in float32, the mixers with products of
    `precision`: by default that too, as TF32's rounding would hide a wrong result.
    """
    if mixers is None:
        mixers = {"parallel form": parallel_mixer}
        if device.type == "cpu" and "cpu" in DEVICES:
            mixers["kernel"] = hierarchical_mixer
    inputs, worst, before = mixer_example(device, heads, channels), 0.0, torch.get_float32_matmul_precision()

    def results(form: Callable, precision: str = "highest", **options: Any) -> list[Tensor]:
        torch.set_float32_matmul_precision(precision)
        try:
            found = form(*inputs, reverse_heads=heads // 2, output_final_state=True, **options)
            total = sum(x.square().sum() for x in found)
            return [*found, *torch.autograd.grad(total, [x for x in inputs if x.requires_grad])]
        finally:
            torch.set_float32_matmul_precision(before)

    expected = results(parallel_mixer, delta_rule=definition)
    for name, form in mixers.items():
        difference = max(map(relative_difference, expected, results(form, precision)))
        if not difference < limit:
            raise WrongMixer(
                f"the {name} of the delta rule differs from its definition by {difference:.1e} on {device}: this build "
                "of PyTorch, Numba or Triton, or this device computes wrongly; try --device cpu, or other versions")
        worst = max(worst, difference)
    return worst


def time_mixer(form: Callable, inputs: list[Tensor], options: dict[str, Any], seconds: float) -> float:
    """Seconds that `form` takes, forward and backward: the median over `seconds`.

    `inputs`: as of `mixer_example`, without the initial state; `options`: the form's, by name.
    """
    from torch.utils.benchmark import Timer
    wanted = [x for x in inputs if x.requires_grad]

    def once() -> None:
        o, _ = form(*inputs, **options)
        torch.autograd.grad(o.sum(), wanted, allow_unused=True)

    once()  # compiles
    timer = Timer("once()", globals={"once": once}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median


def choose_mixer(definition: Callable, device: torch.device, shape: tuple[int, int, int, int], options: dict[str, Any],
                 bf16: bool = False, timed: bool = True, forms: dict[str, Callable] | None = None,
                 log: Callable[[str], None] = print, seconds: float = 0.5,
                 slowest: Callable[..., list[float]] = lambda *seconds: [*seconds]) -> Callable:
    """The fastest mixer that is right on `device`, on inputs of `shape` (heads, channels, texts, tokens).

    Each is checked against the `definition`, then timed with `options`; one line says why one is left out, and one what
    was taken. Without `timed`, the first that is right: times differ from run to run. `slowest`: from this process's
    times those of the slowest one, so that all take the same form. Raises WrongMixer if none is right.
    """
    heads, channels, texts, tokens = shape
    if forms is None:
        forms = {"parallel form": parallel_mixer}
        if device.type in DEVICES:
            forms = {"Triton kernel" if device.type == "cuda" else "Numba kernel": hierarchical_mixer} | forms
        elif device.type in PACKAGES:
            log(f"mixer: its kernel is left out: the package {PACKAGES[device.type]} is not installed")
    inputs = mixer_example(device, heads, channels, texts, tokens)[:-1] if timed else []
    if bf16 and inputs:
        inputs[0] = inputs[0].detach().bfloat16().requires_grad_()
    precision, times = torch.get_float32_matmul_precision(), []
    for name, form in forms.items():
        try:
            check_mixers(definition, device, {name: form}, heads, channels)
            if precision != "highest" and device.type == "cuda":
                check_mixers(definition, device, {name: form}, heads, channels, precision, TF32_LIMIT)
            times.append(time_mixer(form, inputs, options, seconds) if timed else 0.0)
        except Exception as error:  # a wrong result, or a compiler's or the driver's error: each has a type of its own
            said = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
            log(f"mixer: the {name} is left out: {type(error).__name__}: {said[-1][:250]}")
            times.append(math.inf)
    ranking = sorted((x for x in zip(slowest(*times), forms) if x[0] < math.inf), key=lambda x: x[0])
    if not ranking:
        raise WrongMixer(f"no form of the mixer computes rightly on {device} (see above); try --device cpu, or other "
                         "versions")
    (best, taken), *others = ranking
    why = ", ".join(f"{time / best:.1f} times the {name}'s speed" for time, name in others if timed)
    why += f" at {texts} x {tokens} tokens, forward and backward" if why else ""
    log(f"mixer: {taken}, {why or ('not timed, as the run is deterministic' if others else 'the only one left')}")
    return forms[taken]
