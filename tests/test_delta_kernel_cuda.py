"""The CUDA kernels of the mixer against the parallel form, in Triton's interpreter: outputs, final states and all gradients."""
import pytest
import torch

import train_6layer_deltanet as script


@pytest.mark.parametrize("length", [5, 37])
def test_cuda_kernels_equal_the_parallel_form(length):
    kernels = pytest.importorskip("delta_kernel_cuda", reason="Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    inputs = script.mixer_example(torch.device("cpu"), 2, 32, 1, length)
    inputs[0] = inputs[0].detach()[..., :2 * (3 * 32 + 5)].contiguous().requires_grad_()
    o, final = script.parallel_mixer(*inputs, reverse_heads=1, output_final_state=True)
    grad_o, grad_final = torch.randn_like(o), torch.randn_like(final)
    expected = torch.autograd.grad((o * grad_o).sum() + (final * grad_final).sum(), [x for x in inputs if x.requires_grad])
    plain, switches = [x.detach() for x in inputs], (1, True, True, True, True, True)
    found_o, found_final, boundaries = kernels.mixer_forward_cuda(*plain, *switches, True, True)
    found = kernels.mixer_backward_cuda(grad_o, grad_final, boundaries, *plain, *switches)
    for a, b in zip([found_o, found_final, *found], [o, final, *expected], strict=True):
        assert (a - b).abs().max() < 1e-4 * (1 + b.abs().max())
