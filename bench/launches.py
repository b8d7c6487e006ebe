"""Operators of an optimiser step, by part: what launching them takes on a GPU, the step's arithmetic, and its memory.

    python bench/launches.py --json results/bench/launches.json    on any machine, under a minute
    python bench/launches.py --quick                               does it work? some seconds

Counted on a CPU, which calls the operators that a GPU would: their number depends on the config, not on the batch or
the lengths.

- operators: those that PyTorch dispatches, without views and allocations; uncompiled (torch.compile, on by default on
  CUDA, fuses many of them). The mixer is one operator forward and one backward. Operators on lists (norms, AdamW)
  count once, though a GPU takes a few launches for a long list.
- parts: `forward` is the student's, pooling and the layers' loss included, and with gradient caching its second time
  too; `losses` are those of the whole batch; `backward` is every backward pass; `optimiser` is the norm of the
  gradients, the check and AdamW.
- launches: so many microseconds for each operator. A GPU waits for launches only where they take longer than its work.
- arithmetic: FLOP of all matrix products, counted by torch.utils.flop_counter at two small batches and extrapolated,
  over the peak rate that NVIDIA's data sheets give for dense products; real code reaches a third to two thirds of it.
  Not in it: the mixers' kernel, some 5% more, and everything elementwise.
- memory: the tensors that autograd keeps from the forward to the backward pass, each storage once, at two small
  batches, extrapolated to the whole batch in one go, all texts at their longest. By the CPU's FFN, which keeps half of
  what the plain one does.
"""
from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))
import torch
from common import configure, headline, machine, note, parser, run, script, shown, table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from detect_hardware import make_batch, random_teacher

PARTS = ("teacher", "forward", "losses", "backward", "optimiser")
MICROSECONDS = (3, 5, 8)
TFLOPS = {"L40 TF32": 90.5, "L40 bf16": 181.0, "H100 TF32": 495.0, "H100 bf16": 989.0}  # dense, by NVIDIA's data sheets
# Those that launch no kernel; dropout at rate 0 is one of them.
NOTHING = ("aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::detach", "aten::dropout", "profiler::")


class Operators(TorchDispatchMode):
    """Counts by `part` the operators that do work."""

    def __init__(self):
        super().__init__()
        self.part, self.counts = "losses", Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[self.part] += not (function.is_view or function.name().startswith(NOTHING))
        return function(*args, **(kwargs or {}))

    def inside(self, part: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            before, self.part = self.part, part
            try:
                return function(*args, **kwargs)
            finally:
                self.part = before
        return call


def make_trainer(cfg: dict[str, Any]) -> tuple[script.Trainer, torch.optim.AdamW]:
    teacher = random_teacher(cfg)
    student = script.build_student(cfg, teacher).train()
    trainer = script.Trainer(student, teacher, cfg)
    trainer.packs = False  # as on a GPU
    return trainer, script.build_optimizer(student, cfg)


def count_step(trainer: script.Trainer, optimizer: torch.optim.AdamW, **sizes: int) -> tuple[Counter, int]:
    """Operators by part, and FLOP of the matrix products, of a step of the trainer's config with other `sizes`."""
    cfg = trainer.cfg | sizes
    operators, trainer.distances = Operators(), torch.zeros(2, 1, dtype=torch.float64)  # as a run measures its sources
    micros = [replace(micro, strata=torch.zeros(micro.pairs, dtype=torch.int64)) for micro in make_batch(cfg)]
    batch = trainer.upload(micros)
    plain = lambda self, x: self.down(torch.nn.functional.gelu(self.up(x)))  # noqa: E731  as on a GPU

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        values = trainer.step_gradients(batch, 1)
        update = operators.inside("optimiser", script.update)
        update(optimizer, values.values(), 1e-9, cfg["gradient_clip"], trainer.processes)

    with ExitStack() as stack:
        for target, name, new in ((script.FeedForward, "forward", plain),
                                  (trainer, "teach", operators.inside("teacher", trainer.teach)),
                                  (trainer, "forward", operators.inside("forward", trainer.forward)),
                                  (torch.autograd, "backward", operators.inside("backward", torch.autograd.backward))):
            stack.enter_context(mock.patch.object(target, name, new))
        flops = stack.enter_context(FlopCounterMode(display=False))
        stack.enter_context(operators)
        step()
    return operators.counts, flops.get_total_flops()


def kept_bytes(trainer: script.Trainer, pairs: int) -> int:
    """Bytes that autograd keeps from the forward to the backward pass of so many pairs in one go, without weights."""
    (micro,), kept = trainer.upload(make_batch(trainer.cfg | {"batch_size": pairs})), {}
    trainer.teach(micro)

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    # What is passed on is alive below, so that no memory is used twice.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        passed = trainer.forward(micro, 0, micro.tokens, len(micro.restore))  # noqa: F841
    return sum(kept.values()) - sum(kept.get(p.untyped_storage().data_ptr(), 0) for p in trainer.student.parameters())


def extrapolate(count: int, few: int, first: float, second: float) -> float:
    """The value at `count` of what is `first` at `few`, `second` at twice as many, and linear."""
    return first + (second - first) * (count - few) / few


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rows."""
    args.device, rows = "cpu", []
    for preset, parts in (("specification", 1), ("specification", 4), ("match_teacher", 1)):
        args.preset = preset
        cfg = configure(args, gradient_accumulation_steps=parts)
        script.choose_device(cfg)
        note(f"{preset}, {parts} micro-batches")
        trainer, optimizer = make_trainer(cfg)
        count_step(trainer, optimizer, batch_size=2 * parts, max_length=8)  # the first one sets up AdamW's averages
        pairs, row = 2 * parts, {"preset": preset, "micro_batches": parts, "pairs": cfg["batch_size"], "arithmetic": []}
        for length in (8,) if args.quick else (24, cfg["max_length"]):
            found = [count_step(trainer, optimizer, batch_size=n, max_length=length) for n in (pairs, 2 * pairs)]
            operators, tflop = found[0][0], extrapolate(cfg["batch_size"], pairs, *(flop for _, flop in found)) / 1e12
            row["arithmetic"].append({"tokens": length, "tflop": tflop})
        for found in row["arithmetic"]:
            found["milliseconds"] = {name: 1e3 * found["tflop"] / rate for name, rate in TFLOPS.items()}
        row |= {"operators": {part: operators[part] for part in PARTS}, "total": operators.total(),
                "launch_milliseconds": {str(us): operators.total() * us / 1e3 for us in MICROSECONDS}}
        rows.append(row)
        if len(rows) == 1:
            kept, whole = extrapolate(cfg["batch_size"], 1, *(kept_bytes(trainer, n) for n in (1, 2))), cfg
    return {"date": time.strftime("%Y-%m-%d"), "command": " ".join(["python", "bench/launches.py", *sys.argv[1:]]),
            "settings": {"repeats": 1, "microseconds": MICROSECONDS, "tflops": TFLOPS},
            "machine": machine(torch.device("cpu")), "rows": rows, "kept_gib": kept / 2**30,
            "kept_of": f"{whole['batch_size']} pairs of {whole['max_length']} tokens in one go"}


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    batches = lambda n: f"{n} micro-batch{'es' if n > 1 else ''}"  # noqa: E731
    name = lambda r: f"{r['preset']}, {batches(r['micro_batches'])}"  # noqa: E731
    lines = headline("Operators of an optimiser step", result, "counted")
    lines += table("operators, views left out, and what launching them takes in ms", result["rows"], {
        "": name, **{part: lambda r, part=part: str(r["operators"][part]) for part in PARTS},
        "total": lambda r: str(r["total"]),
        **{f"{us} us each": lambda r, us=us: shown(r["launch_milliseconds"][str(us)], ".1f") for us in MICROSECONDS}})
    arithmetic = [(r, a) for r in result["rows"] for a in r["arithmetic"]]
    lines += table("arithmetic: matrix products, ms at the peak rate", arithmetic, {
        "": lambda x: name(x[0]), "tokens a text": lambda x: str(x[1]["tokens"]),
        "TFLOP": lambda x: shown(x[1]["tflop"], ".3f"),
        **{gpu: lambda x, gpu=gpu: shown(x[1]["milliseconds"][gpu], ".2f") for gpu in TFLOPS}})
    return "\n".join([*lines, "", f"kept by autograd from the forward to the backward pass, {result['kept_of']}: "
                                  f"{result['kept_gib']:.2f} GiB"])


if __name__ == "__main__":
    sys.exit(run(parser(__doc__), measure, page, lambda: {}))
