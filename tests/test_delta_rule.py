"""The parallel delta rule against the sequential reference: outputs, final states and every gradient, in float64."""
import pytest
import torch

import train_6layer_deltanet as script


def random_inputs(length: int, case: str = "", dtype=torch.float64) -> list[torch.Tensor]:
    """q, k, v, beta, transition, read and initial state of 2 x 3 heads, K = 8, V = 5."""
    generator = torch.Generator().manual_seed(length)
    rand = lambda *shape: torch.rand(*shape, generator=generator, dtype=dtype)  # noqa: E731
    q, k = (script.kernel.l2_normalise(rand(2, 3, length, 8) - 0.5) for _ in range(2))
    v, beta, read = rand(2, 3, length, 5) - 0.5, rand(2, 3, length), rand(2, 3, length, 2)
    m = rand(2, 3, length, 2, 2)
    m = m / m.sum(-1, keepdim=True) * rand(2, 3, length, 2, 1)
    if case == "repeated tokens":
        q, k, v = (x[:, :, :1].expand_as(x) for x in (q, k, v))
        beta = torch.full_like(beta, 0.999)
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
            found = run(script.kernel.chunk_hierarchical_delta_rule, inputs, initial, chunk_size=chunk_size)
            for a, b in zip(expected, found):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("which", [0, 1])
def test_gradients_of_outputs_or_of_the_final_state_alone(which):
    inputs = [x.requires_grad_() for x in random_inputs(40)[:6]]
    found = []
    for form, sizes in ((script.recurrent_hierarchical_delta_rule, [{}]),
                        (script.kernel.chunk_hierarchical_delta_rule, [{}, {"chunk_size": 16}])):
        for size in sizes:
            result = form(*inputs, output_final_state=True, **size)[which]
            found.append(torch.autograd.grad(result.square().sum(), inputs, allow_unused=True, materialize_grads=True))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-10)


def test_parallel_equals_reference_at_1000_tokens():
    inputs = random_inputs(1000)
    expected = run(script.recurrent_hierarchical_delta_rule, inputs, True)
    for a, b in zip(expected, run(script.kernel.chunk_hierarchical_delta_rule, inputs, True, chunk_size=128)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_float32_is_close_to_the_float64_reference(case):
    inputs = random_inputs(100, case)
    expected = run(script.recurrent_hierarchical_delta_rule, inputs, True)
    got = run(script.kernel.chunk_hierarchical_delta_rule, [x.float() for x in inputs], True, chunk_size=128)
    assert max((a - b.double()).abs().max() for a, b in zip(expected[:2], got[:2])) < 5e-6


@pytest.mark.parametrize("name", ["parallel_mixer", "hierarchical_mixer"])
def test_start_up_check_sees_a_wrong_gradient(name):
    mixer = script.kernel.parallel_mixer if name == "parallel_mixer" else script.kernel.hierarchical_mixer

    def wrong(proj, *rest, **options):  # the values are right, the gradient of the projections is 1% off
        return mixer(proj.detach() + 1.01 * (proj - proj.detach()), *rest, **options)

    assert script.check_mixers(torch.device("cpu")) < 1e-5
    with pytest.raises(script.kernel.WrongMixer, match="kernel .* differs from its definition"):
        script.check_mixers(torch.device("cpu"), {"kernel": wrong})


def written_out(mixer, p: dict, x: torch.Tensor, mask: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The layer in float64, head by head and token by token, as section 1 of the delta rule's definition has it.

    p: the mixer's parameters; x (B, T, D), mask (B, T); keep (H, B, T): False where state dropout drops a write.
    """
    cfg, (batch, length, dim), heads, out = mixer.cfg, x.shape, mixer.cfg.num_heads, []
    size = dim // heads
    for h in range(heads):
        turned = cfg.bidirectional and h >= heads // 2
        xs, real = (y.flip(1) if turned else y for y in (x, mask))
        weight, bias = p["qkv_proj.weight"].view(3, heads, size, dim), p["qkv_proj.bias"].view(3, heads, size)
        q, k, v = (xs @ weight[j, h].T + bias[j, h] for j in range(3))
        if cfg.short_convolution:
            raw = [y * real[..., None] for y in (q, k, v)]
            taps = p["conv_weight"][:, :, h, 0, 0]
            at = lambda j, t: sum(taps[i, j] * raw[j][:, t - i] for i in range(min(4, t + 1)))  # noqa: E731,B023
            q, k, v = (torch.stack([at(j, t) for t in range(length)], 1) for j in range(3))
        q, k, v = (y * torch.sigmoid(y) for y in (q, k, v))
        q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
        gate = xs @ p["gate_proj.weight"].view(5, heads, dim)[:, h].T + p["gate_proj.bias"].view(5, heads)[:, h]
        beta, a_fast, a_slow, g_fast, g_slow = torch.sigmoid(gate).unbind(-1)
        if not cfg.read_gates:
            g_fast = g_slow = torch.ones_like(g_fast)
        u = torch.einsum("bti,ij,btj->bt", k, p["flux_bilinear"][h], v) / p["flux_log_temperature"][h].exp()
        hidden = torch.cat([k, v, u.unsqueeze(-1)], -1) @ p["flux_in.weight"].T + p["flux_in.bias"]
        logit = (hidden * torch.sigmoid(hidden)) @ p["flux_out.weight"].T + p["flux_out.bias"]
        psi = torch.sigmoid(logit).squeeze(-1).clamp(0.01, 0.99)
        psi = psi if cfg.resonance_flux else torch.full_like(beta, 0.5)
        kappa = 0.05 + 0.10 * psi if cfg.cross_timescale_coupling and cfg.hierarchical_memory else torch.zeros_like(psi)
        f, s, alpha = a_fast * (1 - 0.10 * psi), a_slow * (1 - 0.05 * psi), 0.5 + 0.3 * psi
        for b in range(batch):
            fast = slow = torch.zeros(size, size, dtype=x.dtype)
            rows = []
            for t in range(length):
                if real[b, t] and keep[h, b, t]:
                    old, n = (fast, slow), (b, t)
                    fast = f[n] * (1 - kappa[n] * psi[n]) * old[0] + f[n] * kappa[n] * psi[n] * old[1]
                    slow = s[n] * kappa[n] * (1 - psi[n]) * old[0] + s[n] * (1 - kappa[n] * (1 - psi[n])) * old[1]
                    fast, slow = (m + beta[n] * torch.outer(k[n], v[n] - m.T @ k[n]) for m in (fast, slow))
                o = alpha[b, t] * g_fast[b, t] * fast.T @ q[b, t]
                if cfg.hierarchical_memory:
                    o = o + (1 - alpha[b, t]) * g_slow[b, t] * slow.T @ q[b, t]
                rows.append(o / (o.square().mean() + 1e-6).sqrt() * p["o_norm"][h, 0, 0])
            out.append(torch.stack(rows[::-1] if turned else rows))
    o = torch.stack(out).view(heads, batch, length, size).permute(1, 2, 0, 3).flatten(2)
    return o @ p["o_proj.weight"].T + p["o_proj.bias"]


@pytest.mark.parametrize("switch", ["", "bidirectional", "hierarchical_memory", "cross_timescale_coupling",
                                    "resonance_flux", "short_convolution", "read_gates", "state_dropout"])
@pytest.mark.parametrize("form", ["parallel_mixer", "hierarchical_mixer"])
def test_layer_equals_its_definition(switch, form, monkeypatch):
    dropped = switch == "state_dropout"
    switched = {switch: False} if switch and not dropped else {}
    torch.manual_seed(0)  # of some random starts the gradient is ill-conditioned, in either form
    mixer = script.EnhancedHierarchicalDeltaNet(script.DeltaNetConfig(
        d_model=16, num_heads=4, state_dropout=0.4 if dropped else 0.0, **switched))
    mixer.mixer = script.kernel.parallel_mixer if form == "parallel_mixer" else script.kernel.hierarchical_mixer
    generator = torch.Generator().manual_seed(1)
    for parameter in mixer.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    x, mask = torch.randn(2, 7, 16, generator=generator), torch.ones(2, 7)
    mask[1, 4:] = 0
    draws = torch.rand(2, 7, 4, generator=generator)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: draws)
    keep = (draws >= 0.4 if dropped else torch.ones_like(draws, dtype=torch.bool)).permute(2, 0, 1).clone()
    keep[2:] = keep[2:].flip(2) if switch != "bidirectional" else keep[2:]  # `written_out`: in the head's direction
    weights = torch.randn(2, 7, 16, generator=generator) * mask[..., None]  # what stands at padding is nobody's
    leaves = {name: p.detach().double().requires_grad_() for name, p in mixer.named_parameters()}
    y, expected = mixer(x, mask)[0], written_out(mixer, leaves, x.double(), mask, keep)
    torch.testing.assert_close((y * mask[..., None]).double(), expected * mask[..., None], rtol=1e-4, atol=1e-4)
    (y * weights).sum().backward(), (expected * weights).sum().backward()
    for name, p in mixer.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        wanted = 0 if leaves[name].grad is None else leaves[name].grad
        assert (grad.double() - wanted).norm() < 1e-4 * (1 + grad.norm()), name
