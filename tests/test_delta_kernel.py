"""The Triton kernels against the sequential reference in float64: outputs, final states and every gradient.

Without a GPU the kernels run in Triton's interpreter, and are compiled for an L40 (sm_89) without being run. With one,
    python tests/test_delta_kernel.py gpu
compares them there and times both chunk sizes; the last test runs that command. What they take of a GPU:
    python tests/test_delta_kernel.py compile 89 [T [precision]]
"""
from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ != "__main__":  # as a script the kernels are compiled, not interpreted
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton", reason="triton is not installed")

import delta_kernel  # noqa: E402
from delta_kernel import hierarchical_delta_rule_triton  # noqa: E402
from train_6layer_deltanet import recurrent_hierarchical_delta_rule  # noqa: E402

if __name__ != "__main__" and not delta_kernel.INTERPRETED.value:
    raise RuntimeError("triton was imported before TRITON_INTERPRET=1 was set: run this file in a pytest of its own")

SHARED_MEMORY_LIMIT = 99 * 1024  # bytes per program on sm_86 and sm_89, the smallest of the GPUs supported
EXTREMES = ("padded", "repeated tokens", "opposite tokens", "beta near 0", "retentions near 0", "retentions near 1")


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are tiny: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_inputs(lead: tuple[int, ...], T: int, K: int, V: int, kind: str = "typical", initial: bool = True) -> dict:
    """Random float64 inputs as the layer makes them; `kind` names what is pushed to an extreme."""
    rng = torch.Generator().manual_seed(T + 1000 * K + V)

    def rand(*shape):
        return torch.rand(*lead, T, *shape, generator=rng, dtype=torch.float64)

    def randn(*shape):
        return torch.randn(*lead, *shape, generator=rng, dtype=torch.float64)

    q, k, v = F.normalize(randn(T, K), dim=-1), F.normalize(randn(T, K), dim=-1), randn(T, V)
    beta, psi, fast, slow = rand(), 0.01 + 0.98 * rand(), 0.6 * rand(), 0.7 + 0.3 * rand()
    if kind == "repeated tokens":
        q, k, v = (x[..., :1, :].expand_as(x).clone() for x in (q, k, v))
        beta = 1 - 1e-3 * beta
        beta[..., ::2] = 1
    elif kind == "opposite tokens":
        k = k[..., :1, :] * torch.where(torch.arange(T) % 2 == 0, 1.0, -1.0)[:, None].double()
        beta = torch.ones_like(beta)
    elif kind == "beta near 0":
        beta = 1e-4 * beta
    elif kind == "retentions near 0":
        fast, slow = 1e-4 * fast, 1e-4 * slow
        fast[..., ::3], slow[..., ::3] = 0, 0
    elif kind == "retentions near 1":
        fast, slow = 1 - 1e-4 * fast, 1 - 1e-5 * slow
    kappa, f, s = 0.05 + 0.10 * psi, fast * (1 - 0.10 * psi), slow * (1 - 0.05 * psi)
    if kind == "retentions near 1":
        f, s = fast, slow
    transition = torch.stack([f * (1 - kappa * psi), f * kappa * psi, s * kappa * (1 - psi),
                              s * (1 - kappa * (1 - psi))], -1).unflatten(-1, (2, 2))
    read = rand(2)
    if kind == "padded":
        beta[..., T - T // 3:] = 0
        transition[..., T - T // 3:, :, :] = torch.eye(2, dtype=torch.float64)
        read[..., T - T // 3:, :] = 0
    inputs = dict(q=q, k=k, v=v, beta=beta, transition=transition, read=read)
    return dict(inputs, initial_state=randn(2, K, V)) if initial else inputs


def results(function, inputs: dict, weights: dict, **options) -> dict:
    """Outputs and gradients; `weights` of o and final_state are the gradients that the backward pass starts from."""
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    o, final_state = function(**inputs, **options)
    outputs = {name: x for name, x in dict(o=o, final_state=final_state).items() if x is not None}
    sum((x * weights[name].to(x)).sum() for name, x in outputs.items() if name in weights).backward()
    return {**outputs, **{"d" + name: x.grad for name, x in inputs.items() if x.grad is not None}}


def compare(inputs: dict, tolerance: float = 1e-5, dtype=torch.float32, device="cpu", final: bool = True,
            weigh=("o", "final_state"), **options) -> float:
    """The largest error of any result, relative to that result's largest entry where that is above 1."""
    rng = torch.Generator().manual_seed(0)
    inputs = {name: x.to(dtype).to(device) for name, x in inputs.items()}
    *lead, T, K = inputs["q"].shape
    V = inputs["v"].shape[-1]
    weights = dict(o=torch.randn(*lead, T, V, generator=rng, dtype=torch.float64).to(dtype).to(device),
                   final_state=torch.randn(*lead, 2, K, V, generator=rng, dtype=torch.float64).float().to(device))
    weights = {name: weights[name] for name in weigh}
    got = results(hierarchical_delta_rule_triton, inputs, weights, output_final_state=final, **options)
    want = results(recurrent_hierarchical_delta_rule, {name: x.double() for name, x in inputs.items()}, weights,
                   output_final_state=final)
    assert want["o"].dtype == torch.float64 and set(got) >= set(want)
    worst = 0.0
    for name, x in want.items():
        x = x.detach()
        assert got[name].shape == x.shape and torch.isfinite(got[name]).all(), name
        error = ((got[name].double() - x).abs().max() / max(1.0, x.abs().max().item())).item()
        assert error <= tolerance, f"{name}: error {error:.1e}"
        worst = max(worst, error)
    return worst


@pytest.mark.parametrize("T, initial", [
    *((T, initial) for T in (1, 15, 16, 17, 63, 64, 65) for initial in (False, True)), (100, True), (150, False)])
def test_lengths(T: int, initial: bool) -> None:
    lead = (3, 1) if T < 18 else ()
    K = 32 if T in (16, 17, 65) else 16
    compare(make_inputs(lead, T, K, K, initial=initial))


@pytest.mark.parametrize("kind", EXTREMES)
def test_extremes(kind: str) -> None:
    compare(make_inputs((), 70 if kind.endswith(("tokens", "near 1")) else 40, 16, 16, kind))


def test_padding_changes_nothing() -> None:
    inputs = {name: x.float() for name, x in make_inputs((), 60, 16, 16, "padded", initial=False).items()}
    o, state = hierarchical_delta_rule_triton(**inputs, output_final_state=True)
    o_short, state_short = hierarchical_delta_rule_triton(**{name: x[:40] for name, x in inputs.items()},
                                                          output_final_state=True)
    assert torch.equal(o[:40], o_short) and torch.allclose(state, state_short, rtol=0, atol=1e-6)


@pytest.mark.parametrize("K, V, T, chunk_size", [(16, 32, 40, 16), (64, 16, 12, 32)])
def test_head_dims_and_chunk_sizes(K: int, V: int, T: int, chunk_size: int) -> None:
    compare(make_inputs((2,), T, K, V), chunk_size=chunk_size)


@pytest.mark.parametrize("initial, final, weigh", [(True, False, ("o",)), (False, False, ("o",)), (True, True, ("o",)),
                                                   (False, True, ("final_state",))])
def test_partial_results(initial: bool, final: bool, weigh: tuple[str, ...]) -> None:
    """Each pair of 'a state comes in' and 'the state is needed' is a kernel of its own."""
    compare(make_inputs((), 20, 16, 16, initial=initial), final=final, weigh=weigh)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_half_precision_inputs(dtype: torch.dtype, tolerance: float) -> None:
    """Computed in float32: only o and the gradients are rounded (to bfloat16 by truncation in the interpreter)."""
    inputs = {name: x.to(dtype) for name, x in make_inputs((), 12, 16, 16).items()}
    o, state = hierarchical_delta_rule_triton(**inputs, output_final_state=True)
    assert o.dtype == dtype and state.dtype == torch.float32
    compare(make_inputs((), 12, 16, 16), tolerance, dtype)


def test_strided_inputs() -> None:
    inputs = {name: x.float() for name, x in make_inputs((2, 2), 3, 16, 16).items()}
    strided = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in inputs.items()}
    assert not strided["q"].is_contiguous()
    for got, want in zip(hierarchical_delta_rule_triton(**strided, output_final_state=True),
                         hierarchical_delta_rule_triton(**inputs, output_final_state=True)):
        assert torch.equal(got, want)


def test_torch_compile_takes_it_whole() -> None:
    inputs = {name: x.float() for name, x in make_inputs((), 5, 16, 16).items()}
    weights = dict(o=torch.ones(5, 16), final_state=torch.ones(2, 16, 16))
    compiled = torch.compile(hierarchical_delta_rule_triton, backend="aot_eager", fullgraph=True)
    want = results(hierarchical_delta_rule_triton, inputs, weights, output_final_state=True)
    for name, x in results(compiled, inputs, weights, output_final_state=True).items():
        assert torch.equal(x, want[name]), name


@pytest.mark.parametrize("change, message", [
    (dict(beta=torch.zeros(4)), "beta must have shape"), (dict(q=torch.zeros(16)), "q and v must be"),
    (dict(transition=torch.zeros(5, 4)), "transition must have"), (dict(k=torch.zeros(5, 24)), "k must have shape"),
    (dict(q=torch.zeros(5, 24)), "K, V in"), (dict(v=torch.zeros(5, 16).double()), "v must be float32"),
    (dict(initial_state=torch.zeros(16, 16)), "initial_state must have shape"), (dict(chunk_size=48), "chunk_size"),
    (dict(precision="fp8"), "precision"), (dict(read=torch.zeros(5, 2, device="meta")), "read is on meta"),
])
def test_errors_are_one_clear_line(change: dict, message: str) -> None:
    inputs = {name: x.float() for name, x in make_inputs((), 5, 16, 16).items()}
    with pytest.raises(ValueError, match=message) as error:
        hierarchical_delta_rule_triton(**{**inputs, **change})
    assert "\n" not in str(error.value)


def run_as_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, env=env | environment)


def test_compiles_without_gpu(tmp_path: Path) -> None:
    """Both kernels with all their branches, for an L40; a machine with an NVIDIA build of triton needs no GPU."""
    if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas").is_file():
        pytest.skip("this build of triton has no ptxas")
    done = run_as_script("compile", "89", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    for line in done.stdout.splitlines():
        print(line)
        assert json.loads(line)["shared_bytes"] < SHARED_MEMORY_LIMIT


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_gpu() -> None:
    done = run_as_script("gpu")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    print(done.stdout)


def compile_kernels(capability: int, T: int = 128, precision: str = "ieee") -> None:
    """Compile for a GPU that need not be there (K = V = 32) and print what each kernel takes, one JSON line each.

    stack_bytes, per thread, is what does not fit the registers.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    chunk, carried = 16 if T <= 16 else 32, T > 32
    common = dict(K=32, V=32, C=chunk, LOG2_C=chunk.bit_length() - 1, STATE_IN=carried, STATE_OUT=True,
                  PRECISION=precision)
    forward = dict(HAS_INITIAL=False, SAVE_STATES=carried, SAVE_FINAL=True)
    backward = dict(HAS_DFINAL=True, SAVE_DINITIAL=False)
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for kernel, flags in ((delta_kernel._forward_kernel, forward), (delta_kernel._backward_kernel, backward)):
        constants = common | flags
        pointers = [i for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr")]
        signature = {name: "constexpr" if name in constants else "*fp32" if i in pointers else "i32"
                     for i, name in enumerate(kernel.arg_names)}
        source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in pointers})
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                                  options=delta_kernel.launch_options(chunk, precision))
        report = dict(kernel=kernel.__name__, sm=capability, T=T, chunk=chunk, warps=compiled.metadata.num_warps,
                      shared_bytes=compiled.metadata.shared)
        if cuobjdump.is_file():
            with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
                cubin.write(compiled.asm["cubin"])
                cubin.flush()
                usage = subprocess.run([cuobjdump, "-res-usage", cubin.name], capture_output=True, text=True).stdout
            registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
            report.update(registers=int(registers), stack_bytes=int(stack))
        print(json.dumps(report))


def run_on_gpu() -> None:
    """Errors in all precisions and chunk sizes, then milliseconds per layer at the batch size of training."""
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
    for T in (1, 16, 17, 32, 33, 100, 128, 512):
        for chunk_size in delta_kernel.CHUNK_SIZES:
            error = compare(make_inputs((5, 4), T, 32, 32), device="cuda", chunk_size=chunk_size)
            print(f"T={T} chunk_size={chunk_size}: error {error:.1e}")
    for kind in EXTREMES:
        print(f"{kind}: error {compare(make_inputs((5, 4), 100, 32, 32, kind), device='cuda'):.1e}")
    for precision, tolerance in (("tf32x3", 2e-5), ("tf32", 2e-2)):
        for K, V in ((32, 32), (16, 64), (64, 16)):
            error = compare(make_inputs((5, 4), 100, K, V), tolerance, device="cuda", precision=precision)
            print(f"{precision} K={K} V={V}: error {error:.1e}")
    print(f"bfloat16: error {compare(make_inputs((5, 4), 100, 32, 32), 1e-2, torch.bfloat16, 'cuda'):.1e}")
    for T in (32, 64, 128):
        inputs = {name: x.float().cuda().requires_grad_() for name, x in
                  make_inputs((12, 256), T, 32, 32, initial=False).items()}
        for chunk_size in delta_kernel.CHUNK_SIZES:
            for precision in delta_kernel.PRECISIONS:
                step = functools.partial(hierarchical_delta_rule_triton, **inputs, output_final_state=True,
                                         chunk_size=chunk_size, precision=precision)
                forward = triton.testing.do_bench(step)
                both = triton.testing.do_bench(lambda: sum(x.sum() for x in step()).backward())
                print(f"256 sentences, 12 heads, T={T} chunk_size={chunk_size} {precision}: "
                      f"forward {forward:.2f} ms, forward and backward {both:.2f} ms")


if __name__ == "__main__":
    if sys.argv[1] == "gpu":
        run_on_gpu()
    else:
        compile_kernels(*map(int, sys.argv[2:4]), *sys.argv[4:])
