"""The layer's sequence mixer as one operator: on a CPU by Numba (delta_kernel.py), on CUDA by Triton.

    o, final_state = hierarchical_mixer(proj, mask, ...)          # differentiable; (B, T, (3 K + 5) H) -> (B, T, H K)

Its twin in PyTorch is `parallel_mixer` of the training script. A device's kernels are imported by the first call there,
so that neither needs the other's package. Both keep the same for the backward pass: the inputs, and the states every
BLOCK tokens.
"""
from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Optional

import torch
from torch import Tensor

BLOCK = 32  # tokens between two kept states
HIDDEN = 16  # units of the flux's MLP
PACKAGES = {"cpu": "numba", "cuda": "triton"}
DEVICES = {device for device, package in PACKAGES.items() if find_spec(package)}  # those that have kernels here
CUDA_CHANNELS = (16, 32, 64)  # of a head, that the CUDA kernels take


def kernels(device: str) -> Any:
    """The module with a device's `mixer_forward` and `mixer_backward`."""
    if device == "cuda":
        from . import delta_kernel_cuda as found
    else:
        from . import delta_kernel as found
    return found


def outputs(proj: Tensor, conv_weight: Tensor, output_final_state: bool, save_states: bool,
            ) -> tuple[Tensor, Tensor, Tensor]:
    """Room for o (B, T, H K), the final states (B, H, 2, K, K) or (0,), and the kept states or (0,).

    Those are of the starts of all blocks but the first, (B, H, blocks - 1, 2, K, K filled up to a multiple of 16).
    """
    (batch, length, _), (_, _, heads, K) = proj.shape, conv_weight.shape
    blocks, new = -(-length // BLOCK), proj.new_empty
    return (new(batch, length, heads * K, dtype=torch.float32),
            new((batch, heads, 2, K, K) if output_final_state else (0,), dtype=torch.float32),
            new((batch, heads, blocks - 1, 2, K, -(-K // 16) * 16) if save_states else (0,), dtype=torch.float32))


@torch.library.custom_op("deltanet::mixer", mutates_args=())
def mixer(proj: Tensor, mask: Tensor, keep: Optional[Tensor], conv_weight: Tensor, flux_bilinear: Tensor,
          flux_scale: Tensor, flux_in_weight: Tensor, flux_in_bias: Tensor, flux_out_weight: Tensor,
          flux_out_bias: Tensor, o_norm: Tensor, initial_state: Optional[Tensor], reverse_heads: int, convolution: bool,
          flux: bool, coupling: bool, hierarchical: bool, read_gates: bool, output_final_state: bool, save_states: bool,
          ) -> tuple[Tensor, Tensor, Tensor]:
    parameters = [conv_weight, flux_bilinear, flux_scale, flux_in_weight, flux_in_bias, flux_out_weight, flux_out_bias,
                  o_norm]
    found = outputs(proj, conv_weight, output_final_state, save_states)
    kernels(proj.device.type).mixer_forward(*found, proj, mask, keep, parameters, initial_state, reverse_heads,
                                            (convolution, flux, coupling, hierarchical, read_gates))
    return found


@torch.library.custom_op("deltanet::mixer_backward", mutates_args=())
def mixer_backward(grad_o: Tensor, grad_final: Optional[Tensor], saved: Tensor, proj: Tensor, mask: Tensor,
                   keep: Optional[Tensor], conv_weight: Tensor, flux_bilinear: Tensor, flux_scale: Tensor,
                   flux_in_weight: Tensor, flux_in_bias: Tensor, flux_out_weight: Tensor, flux_out_bias: Tensor,
                   o_norm: Tensor, initial_state: Optional[Tensor], reverse_heads: int, convolution: bool, flux: bool,
                   coupling: bool, hierarchical: bool, read_gates: bool) -> list[Tensor]:
    parameters = [conv_weight, flux_bilinear, flux_scale, flux_in_weight, flux_in_bias, flux_out_weight, flux_out_bias,
                  o_norm]
    grad_proj, *grads, grad_initial = kernels(proj.device.type).mixer_backward(
        grad_o, grad_final, saved, proj, mask, keep, parameters, initial_state, reverse_heads,
        (convolution, flux, coupling, hierarchical, read_gates))
    # Copied, as an operator's results may not share memory: those of parameters are parts of a few sums.
    return [grad_proj.to(proj.dtype), *(x.to(of.dtype, copy=True).contiguous() for x, of in zip(grads, parameters)),
            grad_initial]


@mixer.register_fake
def _(proj, mask, keep, conv_weight, flux_bilinear, flux_scale, flux_in_weight, flux_in_bias, flux_out_weight,
      flux_out_bias, o_norm, initial_state, reverse_heads, convolution, flux, coupling, hierarchical, read_gates,
      output_final_state, save_states):
    return outputs(proj, conv_weight, output_final_state, save_states)


@mixer_backward.register_fake
def _(grad_o, grad_final, saved, proj, mask, keep, conv_weight, flux_bilinear, flux_scale, flux_in_weight, flux_in_bias,
      flux_out_weight, flux_out_bias, o_norm, initial_state, *switches):
    inputs = (proj, conv_weight, flux_bilinear, flux_scale, flux_in_weight, flux_in_bias, flux_out_weight,
              flux_out_bias, o_norm)
    grad_initial = proj.new_empty(0 if initial_state is None else initial_state.shape, dtype=torch.float32)
    return [*(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs), grad_initial]


def keep_inputs(ctx, inputs, output) -> None:
    """What the backward pass needs: the inputs, and the kept states."""
    ctx.save_for_backward(output[2], *inputs[:12])
    ctx.switches, ctx.wants_final = inputs[12:18], inputs[18]
    ctx.set_materialize_grads(False)


def differentiate(ctx, grad_o, grad_final, _):
    saved, proj, *others = ctx.saved_tensors
    if grad_o is None:
        grad_o = proj.new_zeros(*proj.shape[:2], others[9].numel())
    final = grad_final if ctx.wants_final else None
    *grads, grad_initial = mixer_backward(grad_o.float(), final, saved, proj, *others, *ctx.switches)
    initial_state = others[-1]
    return (grads[0], None, None, *grads[1:],
            None if initial_state is None else grad_initial.to(initial_state.dtype), *[None] * 8)


mixer.register_autograd(differentiate, setup_context=keep_inputs)


def check_inputs(inputs: tuple[Tensor | None, ...], reverse_heads: int) -> None:
    """ValueError if an argument of the mixer does not fit the others: the kernel reads memory by these shapes."""
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
              "initial_state": (batch, heads, 2, K, K)}
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
                       ) -> tuple[Tensor, Tensor | None]:
    """The mixer of a layer, arguments and results as of `parallel_mixer` in the training script.

    Computed in float32; products on CUDA as torch.set_float32_matmul_precision says. Raises ValueError naming the first
    argument whose shape, type or device does not fit.
    """
    inputs = (proj, mask, keep, conv_weight, flux_bilinear, flux_scale, flux_in_weight, flux_in_bias, flux_out_weight,
              flux_out_bias, o_norm, initial_state)
    check_inputs(inputs, reverse_heads)
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    o, final, _ = mixer(*inputs, reverse_heads, convolution, flux, coupling, hierarchical, read_gates,
                        output_final_state, wanted)
    return o, final if output_final_state else None


def gelu(x: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """Exact GELU of x + bias into `out`, which may be x, on a CPU. x, out (N, F) float32, bias (F); F = 0 mod 16."""
    return kernels("cpu").gelu(x, bias, out)


def gelu_backward(x: Tensor, bias: Tensor, grad: Tensor) -> Tensor:
    """gelu(x + bias) anew, on a CPU; `grad`, of that, becomes the gradient of x in place. x, grad (N, F)."""
    return kernels("cpu").gelu_backward(x, bias, grad)
