"""The CPU kernel against the parallel form and the sequential reference: outputs, final states, all gradients.

Also threads, forks and compilers.
"""
import copy
import os
import pickle
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

import train_6layer_deltanet as script

REFERENCE = partial(script.kernel.parallel_mixer, delta_rule=script.recurrent_hierarchical_delta_rule)


def example(length: int, case: str = "", heads: int = 2, channels: int = 32,
            batch: int = 3) -> list[torch.Tensor | None]:
    """Inputs of a mixer, proj to initial_state."""
    given = script.kernel.mixer_example(torch.device("cpu"), heads, channels, batch, length)
    inputs = [x.detach() if x.is_floating_point() else x for x in given]
    proj, mask, keep = inputs[:3]
    mask.fill_(True)
    gates = proj[..., 3 * heads * channels:][..., :5 * heads].unflatten(-1, (5, heads))  # a view
    if case == "padded":
        mask[0, length - length // 3:], mask[1, :length // 2], mask[1, -1:], mask[2] = False, False, False, False
    elif case == "hole":
        mask[0, length // 4:length // 2], mask[1, ::3] = False, False
    elif case == "repeated tokens":
        proj[:] = proj[:, :1]
        gates[..., 0, :] = 7.0
    elif case == "no dropout, no state":
        inputs[2] = inputs[11] = None
    elif case:
        rows = {"beta": slice(0, 1), "retentions": slice(1, 3)}[case.split()[0]]
        gates[..., rows, :] = -14.0 if case.endswith("0") else 14.0
    return inputs


def results(form, inputs, **options) -> list[torch.Tensor]:
    """o, final states if they are wanted, and the gradients of every float input by fixed weights on both."""
    leaves = [x if x is None or not x.is_floating_point() else x.detach().clone().requires_grad_() for x in inputs]
    o, final = form(*leaves, **{"reverse_heads": 1, "output_final_state": True, **options})
    generator = torch.Generator().manual_seed(3)

    def weigh(x):
        return (x * torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x.dtype)).sum()

    (weigh(o) if final is None else weigh(o) + weigh(final)).backward()
    leaves = [x for x in leaves if x is not None and x.is_floating_point()]
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    return [o.detach(), *([] if final is None else [final.detach()]), *grads]


def assert_equal(found, expected, tolerance: float = 2e-4) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape, i
        difference, size = (a - b).abs().max(), b.abs().max()
        assert difference <= tolerance * (1 + size), (i, difference, size)


CASES = ["", "padded", "hole", "repeated tokens", "beta near 0", "beta near 1", "retentions near 0",
         "retentions near 1", "no dropout, no state"]


@pytest.mark.parametrize("length", [1, 2, 31, 33, 100])
@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_reference_and_parallel_form(length, case):
    inputs = example(length, case)
    kernel, expected = results(script.kernel.hierarchical_mixer, inputs), results(REFERENCE, inputs)
    assert_equal(kernel, expected)
    assert_equal(results(script.kernel.parallel_mixer, inputs), expected)
    assert not kernel[0][~inputs[1]].any() and not kernel[2][~inputs[1]].any()  # padding: no output, no gradient


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length, channels", [(1, 32), (2, 5), (16, 32), (17, 48), (31, 16), (32, 32), (33, 32)])
def test_texts_that_start_from_nothing(length, channels, case, final):
    """Their first tokens are computed without states: with and without any to follow, or states to return."""
    inputs = example(length, case, channels=channels)
    inputs[11] = None
    kernel, expected = (results(form, inputs, output_final_state=final)
                        for form in (script.kernel.hierarchical_mixer, REFERENCE))
    assert_equal(kernel, expected)


@pytest.mark.slow  # compiles for another processor
def test_processors_with_more_or_fewer_registers(monkeypatch, tmp_path):
    """The kernel once more, with the width of narrow vectors (16 or 8) that it does not take on this processor."""
    narrow = 24 - script.kernel.kernels("cpu").NARROW
    source, changed = re.subn(rb"(?m)^NARROW = .*$", b"NARROW = %d" % narrow, script.KERNEL_FILES["delta_kernel.py"])
    assert changed == 1
    monkeypatch.setitem(script.KERNEL_FILES, "delta_kernel.py", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    other = script.load_kernel()
    assert other.kernels("cpu").NARROW == narrow
    for length, channels in ((17, 5), (31, 32), (33, 20), (70, 32)):
        inputs = example(length, "hole", channels=channels)
        assert_equal(results(other.hierarchical_mixer, inputs), results(REFERENCE, inputs))
        inputs[11] = None
        for final in (False, True):
            assert_equal(*(results(form, inputs, output_final_state=final)
                           for form in (other.hierarchical_mixer, REFERENCE)))


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("length, channels", [(32, 32), (31, 5), (70, 32), (70, 5)])
def test_a_text_does_not_see_what_one_before_it_left(length, channels, state, threads):
    """Not even where that was not a number. One thread computes both with the same work space, the first one first."""
    threads(1)
    inputs = example(length, "hole", channels=channels, batch=9)  # a group has sentences 0 and 8
    inputs[11] = inputs[11] if state else None
    found = []
    for bad in (False, True):
        if bad:
            inputs[0][0] = torch.nan
        proj = inputs[0].detach().clone().requires_grad_()
        o, _ = script.kernel.hierarchical_mixer(proj, *inputs[1:], reverse_heads=1)
        o.square().sum().backward()
        found.append((o[8].detach(), proj.grad[8]))
        assert torch.isfinite(proj.grad[0]).all() != bad
    assert all(torch.equal(*pair) for pair in zip(*found)) and found[0][1].any()


SWITCHES = ["short_convolution", "resonance_flux", "cross_timescale_coupling", "hierarchical_memory", "read_gates",
            "bidirectional"]


@pytest.mark.parametrize("off", ["", *SWITCHES])
@pytest.mark.parametrize("length, channels", [(9, 32), (70, 32), (70, 5), (33, 48)])
def test_a_layer_begun_without_gradients(length, channels, off, monkeypatch, request):
    """Projections and kernel at once, which adds the biases: of every part its own random numbers."""
    layer = script.EnhancedHierarchicalDeltaNet(script.DeltaNetConfig(
        d_model=4 * channels, num_heads=4, **{name: name != off for name in SWITCHES})).eval()
    generator = torch.Generator().manual_seed(4)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    # New memory is filled with what is not a number: nothing of it may be read.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    x, (_, mask, *_) = torch.randn(3, length, 4 * channels, generator=generator), example(length, "padded")
    for mask in (mask, example(length, "hole")[1]):
        for final in (False, True):
            layer.mixer = REFERENCE
            expected = layer.read(x, mask, final)
            layer.mixer = None
            with torch.no_grad():
                found = layer.read(x, mask, final, fused=True)
            assert_equal(*([t for t in tensors if t is not None] for tensors in (found, expected)))
    with torch.no_grad():
        for wrong in ((x, mask[:, 1:]), (x[..., 1:], mask)):
            with pytest.raises(ValueError, match="need x .* and mask"):
                layer.read(*wrong, fused=True)
        assert layer.read(x[:0], mask[:0], fused=True)[0].shape == x[:0].shape
        monkeypatch.setattr(script, "PIECE", 8)
        assert_equal([layer.read(x, mask, fused=True)[0]], [expected[0]])  # some heads at a time


def test_a_first_block_of_padding_alone():
    inputs = example(70, "no dropout, no state")
    inputs[1][:, :33] = False
    assert_equal(*(results(form, inputs, reverse_heads=0)
                   for form in (script.kernel.hierarchical_mixer, REFERENCE)))


@pytest.mark.parametrize("switches", [
    {"convolution": False}, {"flux": False}, {"coupling": False}, {"hierarchical": False},
    {"read_gates": False}, {"reverse_heads": 0}, {"flux": False, "hierarchical": False}])
def test_every_switch(switches):
    for length, state in ((40, True), (20, False)):
        inputs = example(length, "hole")
        inputs[11] = inputs[11] if state else None
        options = switches | {"output_final_state": state}
        assert_equal(results(script.kernel.hierarchical_mixer, inputs, **options),
                     results(REFERENCE, inputs, **options))


@pytest.mark.parametrize("channels", [5, 16, 48, 64])
def test_other_head_widths(channels):
    inputs = example(37, "padded", channels=channels)
    assert_equal(results(script.kernel.hierarchical_mixer, inputs), results(REFERENCE, inputs))


def test_a_thousand_tokens():
    inputs = example(1000, heads=2, batch=1)
    assert_equal(results(script.kernel.hierarchical_mixer, inputs), results(REFERENCE, inputs), 1e-3)


def test_texts_continue_from_their_states():
    """Without the convolution, two halves with the state handed over are the whole.

    Heads that read backwards take the halves in turn.
    """
    inputs = example(64, "no dropout, no state")
    inputs[11] = torch.zeros(3, 2, 2, 32, 32)
    form = partial(script.kernel.hierarchical_mixer, reverse_heads=0, convolution=False, output_final_state=True)
    whole, state = form(*inputs)
    found = []
    for half in (slice(0, 40), slice(40, 64)):
        inputs_of_half = [inputs[0][:, half], inputs[1][:, half], *inputs[2:]]
        o, inputs[11] = form(*inputs_of_half)
        found.append(o)
    torch.testing.assert_close(torch.cat(found, 1), whole)
    torch.testing.assert_close(inputs[11], state)


def test_not_a_number_stays_one():
    for position in (0, 70):  # a channel of q, a gate
        inputs = example(20, "no dropout, no state")
        inputs[0][0, 5, position * 2] = torch.nan
        assert not torch.isfinite(script.kernel.hierarchical_mixer(*inputs)[0][0]).all()
        assert torch.isfinite(script.kernel.hierarchical_mixer(*inputs)[0][1]).all()


@pytest.fixture
def threads():
    count = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(count)


def test_results_do_not_depend_on_threads(threads, monkeypatch):
    inputs, found, module = example(70, "hole", heads=4, batch=11), [], script.kernel.kernels("cpu")
    assert module.openmp, "PyTorch's threads are not OpenMP's here"
    for openmp in (module.openmp, None):
        monkeypatch.setattr(module, "openmp", openmp)
        for count in (1, 2, 3, 8):
            threads(count)
            found.append(results(script.kernel.hierarchical_mixer, inputs))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_concurrent_callers(threads):
    threads(2)
    inputs = [example(n, heads=4, batch=5) for n in range(20, 36)]
    expected = [results(script.kernel.hierarchical_mixer, x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        found_by_all = pool.map(partial(results, script.kernel.hierarchical_mixer), inputs * 3)
        for found, wanted in zip(found_by_all, expected * 3):
            assert all(torch.equal(a, b) for a, b in zip(found, wanted))


def no_room(call):
    raise MemoryError("no room")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("openmp", [True, False])
def test_a_kernel_that_got_no_work_space_is_an_error(openmp, count, threads, monkeypatch):
    threads(2)
    module = script.kernel.kernels("cpu")
    if not openmp:
        monkeypatch.setattr(module, "openmp", None)
    with pytest.raises(MemoryError, match="no memory for the work space of the CPU kernel's no_room"):
        module.in_threads(no_room, 4, count)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_default_dtype_changes_nothing(dtype):
    inputs = example(40, "padded")
    expected = results(script.kernel.hierarchical_mixer, inputs)
    torch.set_default_dtype(dtype)
    try:
        found = results(script.kernel.hierarchical_mixer, inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_tensors_without_memory_are_refused():
    module = script.kernel.kernels("cpu")
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(torch.ones(4, 32))
        with pytest.raises(ValueError, match=r"needs tensors with memory on a CPU, got FakeTensor of shape \(4, 32\)"):
            module.in_threads(module.gelu_rows, 1, 1, 1, 4, 32, fake, fake, fake)
    meta = torch.ones(4, 32, device="meta")
    with pytest.raises(ValueError, match="on meta"):
        module.in_threads(module.gelu_rows, 1, 1, 1, 4, 32, meta, meta, meta)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit")
def test_traced_student_is_the_student():
    cfg = script.DeltaNetConfig(vocab_size=50, d_model=32, num_heads=2, num_layers=1, ffn_size=64)
    student, ids = script.DeltaNetStudent(cfg).eval(), torch.arange(12).view(2, 6)
    with torch.no_grad():
        traced = torch.jit.trace_module(student, {"forward": ids}, strict=False)
        torch.testing.assert_close(traced(ids + 7)["last_hidden_state"], student(ids + 7).last_hidden_state)


@pytest.mark.slow
def test_bits_are_those_of_the_cached_kernel(tmp_path):
    """A run that has compiled the kernel and one that continues it have the same bits."""
    code = ("import sys, torch; sys.path.insert(0, 'tests'); from test_delta_kernel import example, script\n"
            "x = example(70, 'hole', heads=4); x = [t.requires_grad_() if t.is_floating_point() else t for t in x]\n"
            "o, state = script.kernel.hierarchical_mixer(*x, output_final_state=True)\n"
            "grads = torch.autograd.grad(o.sum() + state.square().sum(), [t for t in x if t.requires_grad])\n"
            "torch.save([o.detach(), state.detach(), *grads], sys.argv[1])\n"
            "module = script.kernel.kernels('cpu'); print(module.compiled(module.backward).cache_hits)")
    root, found = os.path.dirname(os.path.dirname(os.path.abspath(__file__))), []
    for name, hits in (("first", "0"), ("second", "1")):
        done = subprocess.run([sys.executable, "-c", code, tmp_path / name], cwd=root, capture_output=True, text=True,
                              env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)})
        assert done.stdout.strip() == hits, done.stderr
        found.append(torch.load(tmp_path / name))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_after_a_fork():
    code = ("import os, sys; sys.path.insert(0, 'tests'); import torch; torch.set_num_threads(3)\n"
            "from test_delta_kernel import example, script\n"
            "inputs = example(40, heads=4, batch=5); first = script.kernel.hierarchical_mixer(*inputs)[0]\n"
            "pid = os.fork()\n"
            "same = torch.equal(script.kernel.hierarchical_mixer(*inputs)[0], first)\n"
            "if pid == 0: os._exit(0 if same else 1)\n"
            "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) or not same)")
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run([sys.executable, "-c", code], cwd=root, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_operator_is_whole_for_autograd_and_compilers():
    inputs = example(9, "padded")
    leaves = [x if not x.is_floating_point() else x.requires_grad_() for x in inputs]
    torch.library.opcheck(script.kernel.mixer, (*leaves, 1, True, True, True, True, True, True, True))
    form = torch.compile(script.kernel.hierarchical_mixer, backend="aot_eager", fullgraph=True)
    assert_equal(results(form, inputs), results(script.kernel.hierarchical_mixer, inputs), 0)


def test_two_versions_in_one_process(monkeypatch):
    """As when an older saved folder is opened beside this script: neither takes the other's operator away."""
    newer = script.KERNEL_FILES["delta_mixer.py"] + b"# another version\n"
    monkeypatch.setitem(script.KERNEL_FILES, "delta_mixer.py", newer)
    other = script.load_kernel()
    assert other is not script.kernel and other is script.load_kernel()
    inputs = [x.detach().to("meta") for x in example(9)]
    for module in (script.kernel, other, script.kernel):
        assert module.hierarchical_mixer(*inputs)[0].shape == (3, 9, 64), module


def test_strided_inputs():
    inputs = example(9, "padded")
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x for x in inputs]
    assert not strided[0].is_contiguous()
    found, expected = (results(script.kernel.hierarchical_mixer, x) for x in (strided, inputs))
    for a, b in zip(found, expected):
        assert torch.equal(a, b)


@pytest.mark.parametrize("position, wrong, message", [
    (0, torch.zeros(3, 9, 100), "rows of at least"), (0, torch.zeros(9, 208), "need proj"),
    (1, torch.ones(3, 9), "mask must be bool"), (1, torch.ones(3, 8, dtype=torch.bool), "mask must be"),
    (2, torch.ones(3, 9, 1, dtype=torch.bool), "keep must be"),
    (4, torch.zeros(2, 32, 16), "flux_bilinear must be"), (8, torch.zeros(1, 16), "flux_out_weight must be"),
    (10, torch.zeros(2, 32, device="meta"), "o_norm must be .* on meta"),
    (11, torch.zeros(3, 2, 32, 32), "initial_state must be")])
def test_wrong_input_is_one_clear_line(position, wrong, message):
    inputs = example(9)
    inputs[position] = wrong
    with pytest.raises(ValueError, match=message) as error:
        script.kernel.hierarchical_mixer(*inputs)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="reverse_heads"):
        script.kernel.hierarchical_mixer(*example(9), reverse_heads=3)


def test_gradients_of_outputs_or_of_the_final_state_alone():
    inputs = example(40, "hole")
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
    for which in (0, 1):
        found = []
        for form in (script.kernel.hierarchical_mixer, REFERENCE):
            out = form(*leaves, reverse_heads=1, output_final_state=True)[which]
            floats = [x for x in leaves if x.requires_grad]
            found.append(torch.autograd.grad(out.square().sum(), floats, allow_unused=True, materialize_grads=True))
        assert_equal(*found)


def test_lower_precision_inputs():
    inputs = [x.bfloat16() if x.is_floating_point() else x for x in example(33)]
    found = results(script.kernel.hierarchical_mixer, inputs)
    expected = results(script.kernel.hierarchical_mixer, [x.float() if x.is_floating_point() else x for x in inputs])
    assert found[0].dtype == torch.float32 and {x.dtype for x in found[2:-1]} == {torch.bfloat16}
    assert_equal([x.float() for x in found], expected, 0.01)


@pytest.mark.parametrize("shape", [(1, 16), (300, 48)])
@pytest.mark.parametrize("per_thread", [1, 1 << 18])
def test_gelu_and_its_gradient(shape, per_thread, threads, monkeypatch):
    threads(2)
    monkeypatch.setattr(script.kernel.kernels("cpu"), "PER_THREAD", per_thread)
    x, bias = 3 * torch.randn(shape, requires_grad=True), torch.randn(shape[1])
    x.retain_grad()
    y, grad = torch.nn.functional.gelu(x.double() + bias), torch.randn(shape)
    y.backward(grad.double())
    got = grad.clone()
    kernel = script.kernel.kernels("cpu")
    torch.testing.assert_close(kernel.gelu_backward(x.detach(), bias, got), y.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, x.grad, rtol=1e-5, atol=2e-6)
    found = kernel.gelu(x.detach(), bias, torch.empty(shape))
    torch.testing.assert_close(found, y.float(), rtol=1e-5, atol=1e-6)


def test_feed_forward_and_its_gradients(monkeypatch):
    ffn = script.FeedForward(script.DeltaNetConfig(d_model=32, ffn_size=64))
    x, found = torch.randn(2, 9, 32), []
    for kernel in (True, False):
        monkeypatch.setattr(script.kernel, "has_kernel", lambda _: kernel)  # noqa: B023
        leaf = x.clone().requires_grad_()
        y = ffn(leaf)
        with torch.no_grad():
            torch.testing.assert_close(ffn(x), y)
        found.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *ffn.parameters()])])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [32, 24])  # 24 channels are no whole vectors, which leaves PyTorch's operators
@pytest.mark.parametrize("threads", [1, 3])
def test_without_gradients_a_layer_is_the_same(width, threads, monkeypatch):
    student = script.DeltaNetStudent(script.DeltaNetConfig(
        d_model=width, num_heads=2, num_layers=3, ffn_size=64, vocab_size=50)).eval()
    for parameter in student.parameters():  # norms with weights and biases of their own, too
        torch.nn.init.normal_(parameter, std=0.3)
    ids, mask = torch.randint(50, (3, 20)), torch.ones(3, 20)
    mask[1, 7:] = 0
    monkeypatch.setattr(script.kernel, "ROWS", 7)
    monkeypatch.setattr(script.kernel.kernels("cpu"), "PER_THREAD", 1)
    calls, begin, finish = [], script.kernel.begin_layer, script.kernel.finish_layer
    monkeypatch.setattr(script.kernel, "begin_layer", lambda *args: calls.append(0) or begin(*args))
    monkeypatch.setattr(script.kernel, "finish_layer", lambda *args: calls.append(1) or finish(*args))
    expected, _ = student.hidden_states(ids, mask)
    assert not calls and expected[0].requires_grad
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            states, _ = student.hidden_states(ids, mask)
            (last,), _ = student.hidden_states(ids, mask, last_alone=True)
            student.train().config.dropout = 0.0
            count = len(calls)
            student.hidden_states(ids, mask)  # state dropout is not drawn there
    finally:
        torch.set_num_threads(before)
    assert calls == ([0, 1] * 6 if width == 32 else []) and len(calls) == count
    for a, b in zip([*states, last], [*expected, expected[-1]], strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-5)


# Packed texts


@pytest.mark.parametrize("channels", [32, 24])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_packed_texts_are_those_texts(channels, state, threads):
    lengths = [5, 40, 1, 100, 33, 32, 64, 65, 7]
    inputs = example(sum(lengths), channels=channels, batch=1)
    inputs[11] = 0.25 * torch.randn(len(lengths), 2, 2, channels, channels) if state else None

    def apart(proj, mask, keep, *parameters, **options):
        states = [None] * len(lengths) if parameters[-1] is None else parameters[-1].split(1)
        texts = zip(proj.split(lengths, 1), mask.split(lengths, 1), keep.split(lengths, 1), states)
        found = [script.kernel.hierarchical_mixer(*text, *parameters[:-1], initial, **options)
                 for *text, initial in texts]
        return torch.cat([o for o, _ in found], 1), torch.cat([final for _, final in found])

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        packed = partial(script.kernel.hierarchical_mixer, lengths=lengths)
        for a, b in zip(results(packed, inputs), results(apart, inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("lengths", [[4, 5], [10, 0], [12, -2], []])
def test_wrong_lengths_are_one_clear_line(lengths):
    with pytest.raises(ValueError, match="need lengths above 0 that sum to the 10 tokens"):
        script.kernel.hierarchical_mixer(*example(10, batch=1)[:-1], lengths=lengths)
    with pytest.raises(ValueError, match="need lengths above 0 that sum to the 5 tokens"):
        script.kernel.hierarchical_mixer(*example(5, batch=2)[:-1], lengths=[5, 5])
    layer = int8_student().deltanet_layers[0]
    with torch.no_grad(), pytest.raises(ValueError, match="need lengths above 0 that sum to the 10 tokens"):
        script.kernel.begin_layer(torch.zeros(1, 10, 64), torch.ones(1, 10, dtype=torch.bool), layer, lengths=lengths)


@pytest.fixture
def read_tokens(monkeypatch) -> list[int]:
    """How many tokens, padding among them, each call of a student's layers reads."""
    counts, hidden_states = [], script.DeltaNetStudent.hidden_states

    def counted(self, ids, *args, **options):
        counts.append(ids.numel())
        return hidden_states(self, ids, *args, **options)

    monkeypatch.setattr(script.DeltaNetStudent, "hidden_states", counted)
    return counts


def ragged(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of texts of these lengths, 40 at most, and their mask."""
    return (torch.randint(50, (len(lengths), 40)),
            (torch.arange(40) < torch.tensor(lengths)[:, None]).long())


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("piece", [script.PIECE, 90])  # the second: two texts at a time
def test_padding_on_the_right_is_left_out(int8, piece, read_tokens, monkeypatch):
    monkeypatch.setattr(script, "PIECE", piece)
    student, (ids, mask) = int8_student(), ragged(3, 40, 0, 33, 21)
    found = last_states(student, ids, mask, int8=int8)
    assert sum(read_tokens) == 97 and not found[mask == 0].any()
    monkeypatch.setattr(script.DeltaNetStudent, "packs", False)
    expected = last_states(student, ids, mask, int8=int8)
    assert sum(read_tokens) > 97 + 97
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["left", "hole", "none", "all", "one text"])
def test_other_padding_is_read(case, read_tokens):
    """There the convolution reads zeros, or nothing would be spared."""
    ids, mask = ragged(3, 40, 11)
    if case == "left":
        mask = mask.flip(1)
    elif case == "hole":
        mask[1, 7:9] = 0
    elif case == "one text":
        ids, mask = ids[:1], mask[:1]
    else:
        mask[:] = case == "all"
    assert last_states(int8_student(), ids, mask, int8=False).isfinite().all() and read_tokens == [ids.numel()]


def test_padding_is_left_out_with_gradients_too(read_tokens, monkeypatch):
    student, (ids, mask), found = int8_student(int8=False), ragged(12, 4, 40), []
    for _ in range(2):
        student.zero_grad()
        (script.mean_pool(student(ids, mask).last_hidden_state, mask) * torch.linspace(-1, 1, 64)).sum().backward()
        found.append({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
        monkeypatch.setattr(script.DeltaNetStudent, "packs", False)
    assert read_tokens == [56, 120] and found[0].keys() == found[1].keys()
    for name, expected in found[1].items():
        torch.testing.assert_close(found[0][name], expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("why", ["positions", "compiled", "mixer", "no kernel"])
def test_what_does_not_pack_reads_padding(why, monkeypatch):
    student = int8_student(int8=False, learned_positions=why == "positions")
    ids, mask = torch.randint(50, (2, 12)), torch.ones(2, 12, dtype=torch.int64)
    mask[1, 4:] = 0
    assert why == "positions" or student.packs
    expected = last_states(student, ids, mask, int8=False)[mask == 1]
    if why == "compiled":
        student.hidden_states = partial(script.DeltaNetStudent.hidden_states, student)
    elif why == "mixer":
        for layer in student.deltanet_layers:
            layer.mixer = script.kernel.parallel_mixer
    elif why == "no kernel":
        monkeypatch.setattr(script.kernel, "DEVICES", {})
        monkeypatch.setattr(script.kernel, "PACKAGES", {})
    assert not student.packs
    torch.testing.assert_close(last_states(student, ids, mask, int8=False)[mask == 1], expected, rtol=1e-4, atol=1e-5)


# int8


def int8_student(**changes) -> script.DeltaNetStudent:
    """A student with weights of some size that multiplies in int8."""
    student = script.DeltaNetStudent(script.DeltaNetConfig(
        **{"d_model": 64, "num_heads": 2, "num_layers": 2, "ffn_size": 96, "vocab_size": 50, "int8": True} | changes))
    for name, parameter in student.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1 if "norm" not in name else 1.0)
    return student.eval()


def last_states(student: script.DeltaNetStudent, *inputs: torch.Tensor, int8: bool = True) -> torch.Tensor:
    """The last layer's states without gradients, (B, T, D)."""
    student.config.int8 = int8
    with torch.no_grad():
        return student(*inputs).last_hidden_state


@pytest.mark.parametrize("piece", [script.PIECE, 40])  # the second: heads and texts a few at a time, as in long texts
def test_int8_is_close_to_float32(piece, monkeypatch):
    torch.manual_seed(0)
    student, inputs = int8_student(), (torch.randint(50, (2, 70)), torch.ones(2, 70))
    inputs[1][0, 33:] = 0
    monkeypatch.setattr(script, "PIECE", piece)
    expected, found = last_states(student, *inputs, int8=False), last_states(student, *inputs)
    for other in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        torch.testing.assert_close(last_states(other, *inputs), found, rtol=0, atol=0)
    real = inputs[1].bool()
    assert 1e-3 < (found - expected)[real].norm() / expected[real].norm() < 0.1


def int8_products(kernel, threads: int) -> None:
    """Products of weights in 63 steps of a row's largest and inputs in 127 of a row's range, both rounded."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    for rows, depth, columns in ((1, 16, 1), (5, 64, 20), (67, 48, 1230), (131, 1536, 96)):
        weight, x = torch.rand(columns, depth) - 0.3, torch.rand(rows, depth) - 0.1
        weight[-1] *= 100
        x[-1] = 3.0
        x[0], weight[0] = 1.0, 1.0  # the largest of both, which must not overflow
        x[0, -1] = -1.0
        torch.set_num_threads(threads)
        try:
            packed = kernel.pack_int8(weight)
            y = kernel.multiply_int8(x, packed)
            again = kernel.multiply_int8(x, packed, torch.ones_like(y))
        finally:
            torch.set_num_threads(before)
        torch.testing.assert_close(again, y + 1)
        assert y.shape == (rows, -(-columns // 16) * 16) and not y[:, columns:].any()
        w, z = weight.double(), x.double()
        least = z.amin(1, keepdim=True)
        step = (z.amax(1, keepdim=True) - least).clamp(min=1e-30) / 127
        of_weight = w.abs().amax(1, keepdim=True) / 63
        expected = (least + step * ((z - least) / step).round()) @ (of_weight * (w / of_weight).round()).T
        # What is half-way between two steps may be rounded otherwise in float32: of three numbers of a sum at most.
        apart = 3 * (step * w.abs().amax(1) + of_weight.T * z.abs().amax(1, keepdim=True)) + 1e-5 * expected.abs()
        assert ((y[:, :columns] - expected).abs() <= apart).all()
        assert (y[:, :columns] - expected).norm() / expected.norm() < 1e-4


@pytest.mark.parametrize("threads", [1, 3])
def test_int8_products_are_off_by_rounding_alone(threads, monkeypatch):
    kernel = script.kernel.kernels("cpu")
    monkeypatch.setattr(kernel, "WORK", 1)  # even the smallest are worth a thread
    int8_products(kernel, threads)
    packed = kernel.pack_int8(torch.ones(3, 16))
    for x, said in ((torch.ones(2, 32), r"need x \(N, 16\)"), (torch.ones(2, 16, dtype=torch.float64), "float64"),
                    (torch.ones(2, 16, requires_grad=True), "no gradient")):
        with pytest.raises(ValueError, match=said):
            kernel.multiply_int8(x, packed)
    with pytest.raises(ValueError, match="contiguous sums"):
        kernel.multiply_int8(torch.ones(2, 16), packed, torch.ones(16, 2).T)
    with pytest.raises(ValueError, match="multiple of 16"):
        kernel.pack_int8(torch.ones(3, 24))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert kernel.pack_int8(torch.ones(3, 16, dtype=torch.float32)).scales.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("sums", [8, 16])
def test_int8_products_on_other_processors(sums, monkeypatch, tmp_path):
    """In instructions that every processor has, and laid out for vectors of either width."""
    source = script.KERNEL_FILES["delta_kernel.py"]
    for name, value in ((b"SUMMED_BY", b'""'), (b"SUMS", b"%d" % sums)):
        source, changed = re.subn(rb"(?m)^%s = .*$" % name, b"%s = %s" % (name, value), source)
        assert changed == 1
    monkeypatch.setitem(script.KERNEL_FILES, "delta_kernel.py", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernel = script.load_kernel().kernels("cpu")
    assert kernel.SUMMED_BY == "" and kernel.PANEL == 2 * sums
    monkeypatch.setattr(kernel, "WORK", 1)
    int8_products(kernel, 1)
    int8_products(kernel, 3)


def test_int8_follows_the_weights():
    """Packed anew after weights were loaded, changed in place or replaced; not held up by those of inference mode."""
    torch.manual_seed(0)
    student, other, ids = int8_student(), int8_student(), torch.randint(50, (2, 9))
    expected = last_states(other, ids)
    assert not torch.equal(last_states(student, ids), expected)
    student.load_state_dict(other.state_dict())
    torch.testing.assert_close(last_states(student, ids), expected, rtol=0, atol=0)
    with torch.no_grad():
        student.deltanet_layers[1].flux_in.bias += 1
        changed = last_states(student, ids)
        assert not torch.equal(changed, expected)
        student.deltanet_ffns[0].up.weight *= 2
        assert not torch.equal(last_states(student, ids), changed)
    student.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    torch.testing.assert_close(last_states(student, ids), expected, rtol=0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(copy.deepcopy(other)(ids).last_hidden_state, expected, rtol=0, atol=0)


def test_in_int8_a_text_is_the_same_in_any_batch():
    torch.manual_seed(0)
    student, ids, mask = int8_student(), torch.randint(50, (5, 70)), torch.ones(5, 70)
    mask[0, 40:] = 0
    alone = last_states(student, ids[:1, :40])
    assert (last_states(student, ids, mask)[0, :40] - alone[0]).norm() / alone.norm() < 1e-3


def test_several_threads_begin_in_int8():
    torch.manual_seed(0)
    ids = torch.randint(50, (8, 4, 30))
    student = int8_student()
    expected = [last_states(copy.deepcopy(student), x) for x in ids]
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda x: last_states(student, x), ids)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("case", ["gradients", "training", "bfloat16", "width", "no numba"])
def test_int8_where_it_cannot_be_is_said(case, monkeypatch):
    student, ids = int8_student(**({"ffn_size": 40} if case == "width" else {})), torch.randint(50, (1, 5))
    student = student.bfloat16() if case == "bfloat16" else student
    student.train(case == "training")
    if case == "no numba":
        monkeypatch.setattr(script.kernel, "has_kernel", lambda _: False)
    with torch.set_grad_enabled(case == "gradients"), pytest.raises(ValueError, match="int8 needs a CPU"):
        student(ids)


def test_int8_of_the_committed_model_on_sts_dev(data_dir, teacher_and_tokenizer):
    teacher, tokenizer = teacher_and_tokenizer
    student, _, _ = script.open_student(Path(script.__file__).parent / "results" / "best", teacher)
    rows, scores = script.load_sts({"data_dir": str(data_dir), "sts_name": "stsb"}, "dev")[::3], []
    for int8 in (False, True):
        student.config.int8 = int8
        scores.append(script.evaluate_sts(student, tokenizer, rows)["spearman"])
    assert scores[0] != scores[1] and abs(scores[0] - scores[1]) < 0.004


# The choice at the start of a run


def choose(forms=None, **changes) -> tuple[str, list[str], object]:
    """The name taken, the lines said, and the form that the student's layers have then."""
    cfg = script.config | {"batch_size": 8, "max_length": 64, "gradient_accumulation_steps": 2, "d_model": 64,
                           "num_heads": 2} | changes
    student = script.DeltaNetStudent(script.DeltaNetConfig(d_model=64, num_heads=2, num_layers=2, vocab_size=9))
    lines: list[str] = []
    script.choose_mixer(student, cfg, torch.device("cpu"), forms=forms, log=lines.append, seconds=0.02)
    assert len({layer.mixer for layer in student.deltanet_layers}) == 1
    return re.match("mixer: (.+?),", lines[-1])[1], lines, student.deltanet_layers[0].mixer


def test_fastest_form_is_taken():
    name, (line,), form = choose()
    assert name == "Numba kernel" and form is script.kernel.hierarchical_mixer
    assert re.fullmatch(r"mixer: Numba kernel, \d+\.\d times the parallel form's speed at 8 x 64 tokens, "
                        "forward and backward", line)
    assert float(line.split()[3]) > 1


def test_a_form_that_is_wrong_or_fails_is_left_out_in_one_line():
    def wrong(*inputs, **options):
        return tuple(x if x is None else 1.01 * x for x in script.kernel.parallel_mixer(*inputs, **options))

    def broken(*inputs, **options):
        raise RuntimeError("at 3:1:\n  x = tl.dot(a)\n\nptxas fatal: no such instruction\n")

    name, lines, form = choose({"wrong": wrong, "broken": broken, "parallel form": script.kernel.parallel_mixer})
    assert name == "parallel form" and form is script.kernel.parallel_mixer and all("\n" not in line for line in lines)
    assert re.match("mixer: the wrong is left out: WrongMixer: .* differs from its definition by", lines[0])
    assert lines[1:] == ["mixer: the broken is left out: RuntimeError: ptxas fatal: no such instruction",
                         "mixer: parallel form, the only one left"]
    with pytest.raises(script.kernel.WrongMixer, match="no form of the mixer"):
        choose({"broken": broken})


def test_deterministic_runs_do_not_depend_on_times():
    plain = script.kernel.parallel_mixer
    slow = lambda *inputs, **options: [time.sleep(0.3), plain(*inputs, **options)][1]  # noqa: E731
    assert choose({"slow": slow, "parallel form": plain}, deterministic=True)[0] == "slow"
    assert choose({"slow": slow, "parallel form": plain})[0] == "parallel form"
