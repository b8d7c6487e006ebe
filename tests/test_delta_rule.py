"""The parallel delta rule against the sequential reference: outputs, final states and every gradient, in float64."""
import pytest
import torch

import train_6layer_deltanet as script


def random_inputs(length: int, case: str = "", dtype=torch.float64) -> list[torch.Tensor]:
    """q, k, v, beta, transition, read and initial state of 2 x 3 heads, K = 8, V = 5."""
    generator = torch.Generator().manual_seed(length)
    rand = lambda *shape: torch.rand(*shape, generator=generator, dtype=dtype)  # noqa: E731
    q, k = (script.l2_normalise(rand(2, 3, length, 8) - 0.5) for _ in range(2))
    v, beta, read = rand(2, 3, length, 5) - 0.5, rand(2, 3, length), rand(2, 3, length, 2)
    m = rand(2, 3, length, 2, 2)
    m = m / m.sum(-1, keepdim=True) * rand(2, 3, length, 2, 1)
    if case == "repeated tokens":
        q, k, v, beta = q[:, :, :1].expand_as(q), k[:, :, :1].expand_as(k), v[:, :, :1].expand_as(v), torch.full_like(beta, 0.999)
    elif case == "beta near 0":
        beta = beta * 1e-6
    elif case == "beta near 1":
        beta = 1 - beta * 1e-6
    elif case == "retentions near 0":
        m = m * 1e-6
    elif case == "retentions near 1":
        m = torch.eye(2, dtype=dtype) * (1 - 1e-6) + 0 * m
    elif case == "padded":
        pad = torch.arange(length) >= (length + 1) // 2
        beta = beta.masked_fill(pad, 0)
        m = torch.where(pad[:, None, None], torch.eye(2, dtype=dtype), m)
    return [q, k, v, beta, m, read, rand(2, 3, 2, 8, 5)]


def run(form, inputs, initial: bool, **kwargs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    o, state = form(*leaves[:6], initial_state=leaves[6] if initial else None, output_final_state=True, **kwargs)
    generator = torch.Generator().manual_seed(7)
    weight = lambda x: torch.rand(x.shape, generator=generator, dtype=x.dtype)  # noqa: E731
    ((o * weight(o)).sum() + (state * weight(state)).sum()).backward()
    return [o, state, *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves[:6 + initial])]


CASES = ["", "repeated tokens", "beta near 0", "beta near 1", "retentions near 0", "retentions near 1", "padded"]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 100])
@pytest.mark.parametrize("case", CASES)
def test_parallel_equals_reference(length, case):
    inputs = random_inputs(length, case)
    for initial in (False, True):
        expected = run(script.recurrent_hierarchical_delta_rule, inputs, initial)
        for chunk_size in (16, 128):
            for a, b in zip(expected, run(script.chunk_hierarchical_delta_rule, inputs, initial, chunk_size=chunk_size)):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_parallel_equals_reference_at_1000_tokens():
    inputs = random_inputs(1000)
    expected = run(script.recurrent_hierarchical_delta_rule, inputs, True)
    for a, b in zip(expected, run(script.chunk_hierarchical_delta_rule, inputs, True, chunk_size=128)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_float32_is_close_to_the_float64_reference(case):
    inputs = random_inputs(100, case)
    expected = run(script.recurrent_hierarchical_delta_rule, inputs, True)
    got = run(script.chunk_hierarchical_delta_rule, [x.float() for x in inputs], True, chunk_size=128)
    assert max((a - b.double()).abs().max() for a, b in zip(expected[:2], got[:2])) < 5e-6


def test_short_convolution_equals_conv1d():
    x = torch.randn(3, 4, 2, 11, 8, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 3, 4, 1, 1, 8, dtype=torch.float64, requires_grad=True)
    y = script.ShortConvolution.apply(x, w)
    channels_first = x.permute(2, 0, 1, 4, 3).reshape(2, -1, 11)
    kernel = w.flip(0).permute(1, 2, 5, 0, 3, 4).reshape(-1, 1, 4)
    expected = torch.nn.functional.conv1d(torch.nn.functional.pad(channels_first, (3, 0)), kernel, groups=96)
    expected = expected.view(2, 3, 4, 8, 11).permute(1, 2, 0, 4, 3)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, (x, w), grad), torch.autograd.grad(expected, (x, w), grad)):
        torch.testing.assert_close(a, b)
