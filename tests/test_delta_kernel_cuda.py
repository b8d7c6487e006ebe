"""The CUDA kernels of the mixer, in Triton's interpreter: outputs, final states and all gradients; compiled for GPUs that are not there."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_6layer_deltanet as script
from test_delta_kernel import example

triton = pytest.importorskip("triton", reason="Triton is not installed")
import delta_kernel_cuda as kernels  # noqa: E402

SWITCHES = ("hierarchical", "coupling", "flux", "convolution", "read_gates")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")


def narrow(inputs: list, heads: int = 2, channels: int = 32) -> list:
    """The inputs with rows of exactly (3 K + 5) H numbers, as these kernels read them."""
    return [inputs[0][..., :heads * (3 * channels + 5)].contiguous(), *inputs[1:]]


def compare(inputs: list, tolerance: float = 1e-4, final: bool = True, **off: bool) -> None:
    """Kernels against the parallel form in float32, with random gradients of o, and of the final states if `final`."""
    switches = {name: off.get(name, True) for name in SWITCHES}
    leaves = [x.detach().float().requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs]
    o, state = script.parallel_mixer(*leaves, reverse_heads=1, output_final_state=True, **switches)
    generator = torch.Generator().manual_seed(1)
    grad_o, grad_state = (torch.randn(x.shape, generator=generator) for x in (o, state))
    floats = [x for x in leaves if x is not None and x.requires_grad]
    expected = torch.autograd.grad((o * grad_o).sum() + final * (state * grad_state).sum(), floats, allow_unused=True, materialize_grads=True)
    plain, values = [x if x is None else x.detach() for x in inputs], (1, *switches.values())
    found_o, found_state, boundaries = kernels.mixer_forward_cuda(*plain, *values, final, True)
    found = kernels.mixer_backward_cuda(grad_o.to(found_o.dtype), grad_state if final else None, boundaries, *plain, *values)
    assert found_o.dtype == found[0].dtype == inputs[0].dtype and (found_state is not None) == final
    pairs = [(found_o, o), *([(found_state, state)] if final else []), *zip((x for x in found if x is not None), expected, strict=True)]
    for i, (a, b) in enumerate(pairs):
        assert a.shape == b.shape and (a.float() - b).abs().max() <= tolerance * (1 + b.abs().max()), (i, (a - b).abs().max())


@pytest.mark.parametrize("length, case", [*((n, "") for n in (1, 5, 16, 17, 37)), *((n, "no dropout, no state") for n in (1, 17))])
def test_lengths(length, case):
    compare(narrow(example(length, case, batch=1)), final=bool(case))


@pytest.mark.parametrize("case", ["padded", "hole", "repeated tokens", "beta near 0", "beta near 1", "retentions near 0", "retentions near 1"])
def test_extremes(case):
    compare(narrow(example(18, case, batch={"padded": 3, "hole": 2}.get(case, 1))))


@pytest.mark.parametrize("off", SWITCHES)
def test_switches(off):
    compare(narrow(example(18, batch=1)), **{off: False})


@pytest.mark.parametrize("channels", [16, 64])
def test_other_head_widths(channels):
    compare(narrow(example(18, batch=1, channels=channels), 2, channels))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_projections(dtype, tolerance):
    """Computed in float32: only o and the gradient of proj are rounded."""
    inputs = narrow(example(12, batch=1))
    compare([inputs[0].to(dtype), *inputs[1:]], tolerance)


def test_strided_inputs():
    inputs = narrow(example(5))
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x for x in inputs]
    for a, b in zip(*(kernels.mixer_forward_cuda(*x, 1, *[True] * 7) for x in (inputs, strided))):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("position, wrong, message", [
    (0, torch.zeros(3, 5, 208), "proj must have shape"), (0, torch.zeros(3, 5, 202).double(), "proj must be float32"),
    (1, torch.ones(3, 5), "mask must be bool"), (4, torch.zeros(2, 32, 16), "flux_bilinear must have shape"),
    (10, torch.zeros(2, 24), "channels, got 24"), (11, torch.zeros(3, 2, 32, 32), "initial_state must have shape"),
    (8, torch.zeros(16, device="meta"), "flux_out_weight is on meta")])
def test_errors_are_one_clear_line(position, wrong, message):
    inputs = narrow(example(5))
    inputs[position] = wrong
    with pytest.raises(ValueError, match=message) as error:
        kernels.mixer_forward_cuda(*inputs, 1, *[True] * 7)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_compiles_without_a_gpu(tmp_path):
    """Every kernel with all its branches for an L40, and what it takes."""
    if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas").is_file():
        pytest.skip("this build of triton has no ptxas")
    env = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parent.parent)))}
    done = subprocess.run([sys.executable, __file__, "89"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(reports) == 6
    for report in reports:
        print(report)
        assert report["shared_bytes"] < 99 * 1024  # what a block can have on sm_89
        assert report.get("stack_bytes", 0) <= (0 if report["kernel"] == "_forward_kernel" else 64), report


def compile_kernels(capability: int, precision: str = "tf32") -> None:
    """Compile for a GPU that need not be there (K = 32, several chunks), and print what each kernel takes, one JSON line each.

    stack_bytes, of a thread, is what does not fit the registers.
    """
    import re
    import tempfile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    constants = dict(K=32, H=12, C=16, LOG2_C=4, HIDDEN=16, HAS_KEEP=True, HAS_INITIAL=False, HIERARCHICAL=True, COUPLING=True, FLUX=True,
                     CONVOLUTION=True, READ_GATES=True, CARRY=True, SAVE_STATES=True, SAVE_FINAL=True, HAS_DFINAL=True,
                     SAVE_DINITIAL=False, FLUXES=32 * 32 + 1 + 16 * 65 + 33, PRECISION=precision)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for name in ("_forward_kernel", "_backward_output_kernel", "_backward_states_kernel", "_backward_chunk_kernel",
                 "_backward_activation_kernel", "_backward_convolution_kernel"):
        kernel = getattr(kernels, name)
        own = {n: constants[n] for n in kernel.arg_names if n in constants}
        pointers = {n: "*u8" if n.startswith(("mask", "keep")) else "*fp32" for n in kernel.arg_names if n.endswith("_ptr")}
        signature = {n: "constexpr" if n in own else pointers.get(n, "i32") for n in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n in pointers}
        compiled = triton.compile(ASTSource(kernel, signature, own, aligned), target=GPUTarget("cuda", capability, 32),
                                  options=kernels.launch_options(32))
        report = dict(kernel=name, sm=capability, precision=precision, shared_bytes=compiled.metadata.shared)
        if tool.is_file():
            with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
                cubin.write(compiled.asm["cubin"])
                cubin.flush()
                usage = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True).stdout
            registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
            report |= {"registers": int(registers), "stack_bytes": int(stack)}
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    compile_kernels(int(sys.argv[1]), *sys.argv[2:])
