"""The operator with its CUDA kernels in Triton's interpreter: outputs, final states, all gradients.

The kernels are compiled, too, for GPUs that are not there.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_6layer_deltanet as script
from test_delta_kernel import assert_equal, example, results

triton = pytest.importorskip("triton", reason="Triton is not installed")
operator = script.kernel
kernels = operator.kernels("cuda")
SWITCHES = ("hierarchical", "coupling", "flux", "convolution", "read_gates")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """The CUDA kernels in place of the CPU's."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    monkeypatch.setattr(operator, "kernels", lambda device: kernels)


def compare(inputs: list, tolerance: float = 1e-4, **options) -> None:
    """The operator against the parallel form in float32."""
    found = results(operator.hierarchical_mixer, inputs, **options)
    in_float32 = [x.float() if x is not None and x.is_floating_point() else x for x in inputs]
    expected = results(script.kernel.parallel_mixer, in_float32, **options)
    _, _, heads, channels = inputs[3].shape
    assert found[2].dtype == inputs[0].dtype and not found[2][..., heads * (3 * channels + 5):].any()
    assert_equal([x.float() for x in found], expected, tolerance)


@pytest.mark.parametrize("length, case", [
    *((n, "") for n in (1, 5, 16, 37)), (17, "no dropout, no state"),
    *(pytest.param(*which, marks=pytest.mark.slow) for which in (
        (17, ""), (70, ""), (1, "no dropout, no state"), (50, "no dropout, no state")))])
def test_lengths(length, case):
    compare(example(length, case, batch=1))


@pytest.mark.parametrize("length", [9, 34])
def test_without_the_final_state(length):
    inputs, found = example(length, "no dropout, no state", batch=1), []
    leaves = [x.requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs]
    for form in (operator.hierarchical_mixer, script.kernel.parallel_mixer):
        o, final = form(*leaves, reverse_heads=1)
        assert final is None
        wanted = [x for x in leaves if x is not None and x.requires_grad]
        found.append([o, *torch.autograd.grad(o.square().sum(), wanted)])
    assert_equal(*found)


@pytest.mark.parametrize("case", ["padded", "hole", "repeated tokens", "beta near 0", "beta near 1",
                                  "retentions near 0", "retentions near 1"])
def test_extremes(case):
    compare(example(18, case, batch={"padded": 3, "hole": 2}.get(case, 1)))


@pytest.mark.parametrize("off", SWITCHES)
def test_switches(off):
    compare(example(18, batch=1), **{off: False})


@pytest.mark.parametrize("channels", [16, 64])
def test_other_head_widths(channels):
    compare(example(18, batch=1, channels=channels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_projections(dtype):
    """Computed in float32: only the gradient of proj is rounded."""
    inputs = example(12, batch=1)
    inputs[0] = inputs[0].to(dtype)
    compare(inputs, 1e-2)


def test_strided_inputs():
    inputs = example(5)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x for x in inputs]
    for a, b in zip(results(operator.hierarchical_mixer, inputs), results(operator.hierarchical_mixer, strided)):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_operator_is_whole_for_autograd_and_compilers():
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in example(34, batch=1)]
    leaves[1][0, 25:] = False
    torch.library.opcheck(operator.mixer, (*leaves, 1, *[True] * 7))
    assert operator.mixer(*leaves, 1, *[True] * 7)[2].shape == (1, 2, 1, 2, 32, 32)  # the state at token 32


@pytest.mark.parametrize("setting, precision", [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_products_are_as_precise_as_pytorch_s(setting, precision):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        assert kernels._precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.slow
def test_compiles_without_a_gpu(tmp_path):
    """Every kernel with all its branches for an L40, and what it takes."""
    if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas").is_file():
        pytest.skip("this build of triton has no ptxas")
    tests = Path(__file__).parent
    env = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(map(str, (tests, tests.parent)))}
    done = subprocess.run([sys.executable, __file__, "89"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(reports) == 6
    for report in reports:
        print(report)
        assert report["shared_bytes"] < 99 * 1024  # what a block can have on sm_89
        assert report.get("stack_bytes", 0) <= (0 if report["kernel"] == "_forward_kernel" else 64), report


def compile_kernels(capability: int, precision: str = "tf32") -> None:
    """Compile for a GPU that need not be there (K = 32, several chunks); print what each kernel takes, as JSON lines.

    stack_bytes, of a thread, is what does not fit the registers.
    """
    import re
    import tempfile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    assert "numba" not in sys.modules  # which a machine with a GPU need not have
    constants = dict(K=32, H=12, C=16, LOG2_C=4, HIDDEN=16, HAS_KEEP=True, HAS_INITIAL=False, HIERARCHICAL=True,
                     COUPLING=True, FLUX=True, CONVOLUTION=True, READ_GATES=True, CARRY=True, SAVE_STATES=True,
                     SAVE_FINAL=True, HAS_DFINAL=True, STRIDE=1216, SPAN=2, SAVE_DINITIAL=False,
                     FLUXES=32 * 32 + 1 + 16 * 65 + 33, PRECISION=precision)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for name in ("_forward_kernel", "_backward_output_kernel", "_backward_states_kernel", "_backward_chunk_kernel",
                 "_backward_activation_kernel", "_backward_convolution_kernel"):
        kernel = getattr(kernels, name)
        own = {n: constants[n] for n in kernel.arg_names if n in constants}
        names = [n for n in kernel.arg_names if n.endswith("_ptr")]
        pointers = {n: "*u8" if n.startswith(("mask", "keep")) else "*fp32" for n in names}
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
