"""Time of a whole training step: against an attention student, the sequential reference, and the matrix products alone.

    python bench/train_step.py --data_dir DIR                     real length mix, and 16, 32, 64, 128, 512 tokens
    python bench/train_step.py --precision float32 bf16 --json results/bench/train_step.json
    python bench/train_step.py --preset specification             all losses of the specification, batches of 256 pairs
    python bench/train_step.py --quick                            does it work? under a minute

A step is the teacher's forward pass, the student's forward and backward pass, all losses of the preset, clipping and
AdamW, on batches that are already in memory (see bench/data.py for them). On a mix, the batches are `--batches` of the
first window, spread evenly over it by their number of tokens; at a fixed length every token is real.

- Nothing is compiled by torch.compile; the mixers run in the kernel that the device has.
- attention: the same loop with a student of the teacher's own architecture (random, its embeddings frozen).
- reference: the same student with the token-by-token recurrence in PyTorch, few pairs.
- floor: the matrix products of the step alone, with torch.mm and torch.bmm into given memory: those of every linear
  layer of the teacher (1 each) and of the student (3 each: forward, gradients of input and weight; 2 where the input
  needs none), and the teacher's attention. Not in it: the mixers' kernel, the losses' products, everything
  elementwise. `linear` is the part of it without attention.
- parts: where a step's time goes, from marks at module borders in the forward and, by identity nodes, in the backward
  pass of further steps that are not timed otherwise; every moment belongs to one part. On CUDA the marks are events on
  the stream.
- peak memory: of two steps on the largest batch, in a fresh process: models and step, above what the imports take, the
  kernel's (Numba) among them. What its compiler (LLVM) maps of its own library at the first call is in the student's.
"""
from __future__ import annotations

import argparse
import sys
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))
import torch
from common import (configure, find_data, fresh, headline, interleaved, machine, mib, note, parser, peak_rss, rate,
                    ratio, run, script, shown, spread, synchronise, table)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertModel

from detect_hardware import make_batch

LENGTHS = (16, 32, 64, 128, 512)
PARTS = ("teacher", "mixers", "FFNs", "rest of student", "losses", "optimiser")
KINDS = ("student", "attention")
Batch = list[script.MicroBatch]


# ----------------------------------------------------------------------------------------------------------------------
# Students in the loop


class AttentionStudent(nn.Module):
    """The teacher's architecture as a student: what `Trainer`, `build_optimizer` and the losses ask of one."""

    packs = False  # PyTorch's attention on a CPU reads padded texts

    def __init__(self, cfg: dict[str, Any], teacher: script.Teacher):
        super().__init__()
        self.config = type(teacher.config).from_dict(teacher.config.to_dict() | {
            "hidden_dropout_prob": cfg["dropout"], "attention_probs_dropout_prob": cfg["dropout"]})
        torch.manual_seed(cfg["seed"])
        self.bert = BertModel(self.config, add_pooling_layer=False)
        self.bert.embeddings.load_state_dict(teacher.model.embeddings.state_dict())
        self.bert.embeddings.requires_grad_(cfg["train_embeddings"])
        self.deltanet_layers = [
            SimpleNamespace(projections=lambda a=layer.attention: [
                x.weight for x in (a.self.query, a.self.key, a.self.value, a.output.dense)])
            for layer in self.bert.encoder.layer]

    def hidden_states(self, input_ids: Tensor, mask: Tensor,
                      output_state_overlap: bool = False) -> tuple[list[Tensor], None]:
        """The output of every block; there are no states that could overlap."""
        out = self.bert(input_ids=input_ids, attention_mask=mask, output_hidden_states=True)
        return list(out.hidden_states[1:]), None


class Loop:
    """One student in training; a call is what `Run.optimise` does with a batch."""

    def __init__(self, student: nn.Module, teacher: script.Teacher, cfg: dict[str, Any]):
        self.student, self.cfg = student.to(next(teacher.parameters()).device).train(), cfg
        self.trainer = script.Trainer(self.student, teacher, cfg)
        self.optimizer = script.build_optimizer(self.student, cfg)
        self.before_optimiser: Callable[[], None] = lambda: None

    def __call__(self, batch: Batch) -> None:
        cfg = self.cfg
        self.optimizer.zero_grad(set_to_none=True)
        values = self.trainer.step_gradients(batch, 1)
        self.before_optimiser()
        script.update(self.optimizer, values.values(), 1e-9, cfg["gradient_clip"],  # without leaving the start
                      self.trainer.processes)


def make_loop(kind: str, cfg: dict[str, Any], teacher: script.Teacher) -> Loop:
    """The student, `attention`, or the student by the sequential `reference`."""
    if kind == "attention":
        return Loop(AttentionStudent(cfg, teacher), teacher, cfg)
    student = script.build_student(cfg, teacher)
    if kind == "reference":
        for mixer in student.deltanet_layers:
            mixer.mixer = partial(script.kernel.parallel_mixer, delta_rule=script.recurrent_hierarchical_delta_rule)
    return Loop(student, teacher, cfg)


# ----------------------------------------------------------------------------------------------------------------------
# Where the time goes


class Mark(torch.autograd.Function):
    """Identity; its backward calls `switch(name)`."""

    @staticmethod
    def forward(ctx, x, switch, name):
        ctx.switch, ctx.name = switch, name
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.switch(ctx.name)
        return grad, None, None


class Clock:
    """`switch(part)` ends the part that was running; `seconds()` sums up. CUDA: events, so that nothing waits."""

    def __init__(self, device: torch.device):
        self.cuda, self.marks = device.type == "cuda", []

    def switch(self, part: str) -> None:
        moment: Any = script.time.perf_counter()
        if self.cuda:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self.marks.append((part, moment))

    def seconds(self) -> Counter:
        synchronise()
        total = Counter()
        for (part, begun), (_, ended) in zip(self.marks, self.marks[1:]):
            total[part] += begun.elapsed_time(ended) / 1e3 if self.cuda else ended - begun
        return total


def step_parts(loop: Loop, batches: list[Batch]) -> Counter:
    """Seconds of each of PARTS in one step on every batch."""
    clock, student = Clock(loop.trainer.device), loop.student
    if isinstance(student, AttentionStudent):
        layers = student.bert.encoder.layer
        modules = {"mixers": [m for a in layers for m in (a.attention.self, a.attention.output.dense)],
                   "FFNs": [m for a in layers for m in (a.intermediate, a.output.dense)]}
    else:
        modules = {"mixers": [*student.deltanet_layers], "FFNs": [*student.deltanet_ffns]}

    def around(function: Callable, part: str, after: str) -> Callable:
        def wrapped(*args, **kwargs):
            clock.switch(part)
            try:
                return function(*args, **kwargs)
            finally:
                clock.switch(after)
        return wrapped

    def enter(part: str) -> Callable:
        def hook(module, args):
            marked = Mark.apply(args[0], clock.switch, "rest of student")
            clock.switch(part)
            return marked, *args[1:]
        return hook

    def leave(part: str) -> Callable:
        def hook(module, args, output):
            clock.switch("rest of student")
            first, *others = output if isinstance(output, tuple) else (output,)
            first = Mark.apply(first, clock.switch, part)
            return (first, *others) if isinstance(output, tuple) else first
        return hook

    def hidden_states(*args):
        # Nodes run backward newest first: all losses', then these marks, then the student's.
        states, overlap = type(student).hidden_states(student, *args)
        return [Mark.apply(s, clock.switch, "rest of student") for s in states], overlap

    with ExitStack() as stack:
        for part, found in modules.items():
            for module in found:
                for handle in (module.register_forward_pre_hook(enter(part)),
                               module.register_forward_hook(leave(part))):
                    stack.callback(handle.remove)
        patch = lambda target, name, new: stack.enter_context(mock.patch.object(target, name, new))  # noqa: E731
        patch(loop.trainer, "teach", around(loop.trainer.teach, "teacher", "losses"))
        patch(student, "hidden_states", around(hidden_states, "rest of student", "losses"))
        patch(torch.autograd, "backward", around(torch.autograd.backward, "losses", "losses"))
        patch(loop, "before_optimiser", lambda: clock.switch("optimiser"))
        for batch in batches:
            clock.switch("losses")
            loop(batch)
            clock.switch("optimiser")
    found = clock.seconds()
    if missing := [part for part in PARTS if not found[part] > 0]:
        raise script.UserError(f"no time was seen in {', '.join(missing)}: the trainer no longer passes the marks of "
                               "step_parts")
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The floor


class Floor:
    """The matrix products of a step, to be run on memory of the right shapes; nothing is allocated when they run."""

    def __init__(self, cfg: dict[str, Any], teacher: script.Teacher, student: script.DeltaNetStudent):
        self.cfg, self.teacher, self.student, self.packs = cfg, teacher.config, student.config, student.packs
        self.device = next(teacher.parameters()).device
        self.dtype = torch.bfloat16 if cfg["precision"] == "bf16" else torch.float32
        self.memory: dict[Any, Tensor] = {}

    def tensor(self, role: str, *shape: int, dtype: torch.dtype) -> Tensor:
        key = (role, shape, dtype)
        if key not in self.memory:
            self.memory[key] = torch.randn(shape, device=self.device).to(dtype)
        return self.memory[key]

    def product(self, count: int, m: int, k: int, n: int, dtype: torch.dtype = torch.float32) -> tuple:
        a, b, out = (self.tensor(r, count, *s, dtype=dtype) for r, s in (("a", (m, k)), ("b", (k, n)), ("out", (m, n))))
        return torch.bmm, a, b, out, 2 * count * m * k * n

    def linear(self, rows: int, fan_in: int, fan_out: int, kinds: str,
               dtype: torch.dtype | None = None) -> Iterator[tuple]:
        """A linear layer's products; kinds: f forward, i gradient of the input, w gradient of the weight."""
        make = lambda role, *shape: self.tensor(role, *shape, dtype=dtype or self.dtype)  # noqa: E731
        x, w, y = make("x", rows, fan_in), make("w", fan_out, fan_in), make("y", rows, fan_out)
        for kind in kinds:
            a, b, out = {"f": (x, w.T, make("fy", rows, fan_out)), "i": (y, w, make("dx", rows, fan_in)),
                         "w": (y.T, x, make("dw", fan_out, fan_in))}[kind]
            yield torch.mm, a, b, out, 2 * rows * fan_in * fan_out

    def products(self, batch: Batch) -> tuple[list[tuple], list[tuple]]:
        """(function, a, b, out, FLOP) of linear layers, and of the teacher's attention; the mixers' kernel has none."""
        s, t, linear, other = self.student, self.teacher, [], []
        d, projected = s.d_model, -(-(3 * s.d_model + 5 * s.num_heads) // 16) * 16
        forward = "ff" if len(batch) > 1 else "f"  # gradient-cached: the student goes forward twice
        groups = [ids.shape for micro in batch for ids, _ in micro.groups]
        for n, length in groups:
            h = t.num_attention_heads
            for _ in range(t.num_hidden_layers):
                for fan_in, fan_out in [(d, d)] * 4 + [(d, t.intermediate_size), (t.intermediate_size, d)]:
                    linear += self.linear(n * length, fan_in, fan_out, "f")
                for shape in ((length, d // h, length), (length, length, d // h)):
                    other.append(self.product(n * h, *shape, self.dtype))
        for rows in [micro.tokens for micro in batch] if self.packs else [n * length for n, length in groups]:
            for layer in range(s.num_layers):
                first = forward + ("w" if layer == 0 and not self.cfg["train_embeddings"] else "iw")
                linear += self.linear(rows, d, projected, first)
                for fan_in, fan_out in ((d, d), (d, s.ffn_size), (s.ffn_size, d)):
                    linear += self.linear(rows, fan_in, fan_out, forward + "iw")
        return linear, other


def run_products(products: list[tuple]) -> None:
    for function, a, b, out, _ in products:
        function(a, b, out=out)


# ----------------------------------------------------------------------------------------------------------------------
# Measurement


def sizes(batches: list[Batch]) -> dict[str, float]:
    """Pairs, sentences and tokens of a pass over the batches."""
    masks = [mask for batch in batches for micro in batch for _, mask in micro.groups]
    tokens, padded = sum(int(m.sum()) for m in masks), sum(m.numel() for m in masks)
    return {"batches": len(batches), "pairs": sum(micro.pairs for batch in batches for micro in batch),
            "sentences": sum(map(len, masks)), "tokens": tokens, "padding": 1 - tokens / padded}


def padded_tokens(batch: Batch) -> int:
    return sum(ids.numel() for micro in batch for ids, _ in micro.groups)


def measured(name: str, cfg: dict[str, Any], batches: list[Batch], largest: Batch, teacher: nn.Module, repeats: int,
             memory: bool) -> dict[str, Any]:
    """One row: the student, the attention student and the floor on the same batches."""
    note(f"{name}, {cfg['precision']}: {len(batches)} batches of {sizes(batches)['pairs'] / len(batches):.0f} pairs")
    student, attention = make_loop("student", cfg, teacher), make_loop("attention", cfg, teacher)
    floor = Floor(cfg, teacher, student.student)
    products = {id(batch): floor.products(batch) for batch in batches}
    linear, other = (lambda b, i=i: run_products(products[id(b)][i]) for i in (0, 1))
    seconds = interleaved({"student": student, "attention": attention, "linear": linear, "other": other},
                          batches, repeats)
    whole = [a + b for a, b in zip(seconds["linear"], seconds["other"])]
    parts = {kind: step_parts(loop, batches) for kind, loop in (("student", student), ("attention", attention))}
    with FlopCounterMode(display=False) as counter:
        student(batches[0])
    flop = sum(p[-1] for part in products[id(batches[0])] for p in part)
    work = sizes(batches)
    row = {"texts": name, "precision": cfg["precision"], **work}
    for kind in KINDS:
        row[kind] = {"step_seconds": spread(seconds[kind], 1 / len(batches)),
                     "pairs_per_s": rate(work["pairs"], seconds[kind]),
                     "tokens_per_s": rate(work["tokens"], seconds[kind]),
                     "parts": {p: parts[kind][p] / parts[kind].total() for p in PARTS}}
    for kind in KINDS:
        shapes = [{"pairs": m.pairs, "padded": [ids.shape[1] for ids, _ in m.groups], "lengths": m.lengths}
                  for m in largest]
        row[kind]["peak_bytes"] = fresh(__file__, kind=kind, cfg=cfg, shapes=shapes)["peak"] if memory else None
    return row | {"speed_against_attention": ratio(seconds["attention"], seconds["student"]),
                  "floor_share": ratio(whole, seconds["student"]), "floor_seconds": spread(whole, 1 / len(batches)),
                  "linear_floor_share": ratio(seconds["linear"], seconds["student"]),
                  "linear_floor_seconds": spread(seconds["linear"], 1 / len(batches)),
                  "floor_gflop_first_batch": flop / 1e9, "counted_gflop_first_batch": counter.get_total_flops() / 1e9}


def worker(kind: str, cfg: dict[str, Any], shapes: list[dict[str, Any]]) -> dict[str, Any]:
    """Peak bytes of two steps on random tokens of the given shapes, the models included."""
    device = script.choose_device(cfg)
    if script.kernel.has_kernel(torch.empty(0)):
        script.kernel.kernels("cpu")
    start = peak_rss()
    loop, batch = make_loop(kind, cfg, script.load_teacher(cfg)[0].to(device)), []
    for micro in shapes:
        lengths, count = micro["lengths"], sum(map(len, micro["lengths"]))
        masks = [torch.arange(padded) < torch.tensor(real)[:, None] for padded, real in zip(micro["padded"], lengths)]
        groups = [(torch.randint(1000, 30000, mask.shape), mask.long()) for mask in masks]
        batch.append(script.MicroBatch(micro["pairs"], torch.arange(count), groups, torch.arange(count), lengths))
    loop(batch), loop(batch)
    return {"peak": torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_rss() - start}


def mix_batches(cfg: dict[str, Any], tokenizer: Any, count: int) -> tuple[list[Batch], Batch, int]:
    """`count` batches of the first window, evenly spread by their tokens; its largest one; the number of all pairs."""
    data = script.load_training_data(cfg, tokenizer, note)
    ordered = sorted((data.batch(i) for i in range(1, data.WINDOW + 1)), key=padded_tokens)
    return [ordered[int((i + 0.5) * len(ordered) / count)] for i in range(count)], ordered[-1], data.size


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rows."""
    lengths, repeats, tokens = args.lengths, args.repeats, args.tokens
    more: dict[str, Any] = {"batch_size": args.batch_size} if args.batch_size else {}
    if args.accumulation:
        more["gradient_accumulation_steps"] = args.accumulation
    if args.quick:
        lengths, repeats, tokens, args.batches, args.reference_pairs = [16], 2, 64, 1, 2
        more = {"batch_size": args.batch_size or 2, "gradient_accumulation_steps": args.accumulation or 1}
    data, name = find_data(args, folder, 2000)
    cfg = configure(args, **data, **more)
    device = script.choose_device(cfg)
    result = {"machine": machine(device)}
    teacher, tokenizer, origin = script.load_teacher(cfg)
    mix, largest, pairs = mix_batches(cfg, tokenizer, args.batches)
    teacher.to(device)
    rows = []
    for precision in args.precision:
        now = cfg | {"precision": precision}
        if "mix" not in args.skip:
            rows.append(measured("mix", now, mix, largest, teacher, repeats, memory=True))
        for length in lengths:
            here = now | {"max_length": length, "batch_size": max(2, min(cfg["batch_size"], tokens // (2 * length)))}
            here["gradient_accumulation_steps"] = min(cfg["gradient_accumulation_steps"], here["batch_size"])
            batch = make_batch(here)
            rows.append(measured(f"{length} tokens", here, [batch], batch, teacher, repeats, memory=not args.quick))
    reference = None
    if "reference" not in args.skip:
        length = 8 if args.quick else 128
        here = cfg | {"max_length": length, "batch_size": args.reference_pairs, "gradient_accumulation_steps": 1}
        note(f"reference: {args.reference_pairs} pairs of {length} tokens")
        batch = make_batch(here)
        loops = {kind: make_loop(kind, here, teacher) for kind in ("student", "reference")}
        seconds = interleaved(loops, [batch], repeats)
        reference = {"length": length, **sizes([batch]), **{f"{k}_seconds": spread(v) for k, v in seconds.items()},
                     "speed_against_reference": ratio(seconds["reference"], seconds["student"])}
    kept = ("batch_size", "gradient_accumulation_steps", "length_groups", "pad_lengths", "dropout", "state_dropout")
    settings = {"preset": args.preset, "repeats": repeats, "teacher": origin, "data": name, "pairs_available": pairs,
                **{k: cfg[k] for k in (*kept, *script.LOSS_WEIGHTS.values())}}
    return result | {"settings": settings, "rows": rows, "reference": reference}


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    s, rows = result["settings"], result["rows"]
    lines = headline("Training step", result)
    lines += [f"mix: {s['data']}, {s['pairs_available']:,} pairs", f"preset {s['preset']}: dropout {s['dropout']}, "
              f"gradient_accumulation_steps {s['gradient_accumulation_steps']}, losses "
              + ", ".join(f"{name} {s[key]}" for name, key in script.LOSS_WEIGHTS.items() if s[key])]
    which = {"texts": lambda r: r["texts"], "precision": lambda r: r["precision"]}
    title = "whole step; x attention: speed over the attention student's; floor: matrix products over step time"
    lines += table(title, rows, {
        **which, "pairs/step": lambda r: shown(r["pairs"] / r["batches"], ".0f"),
        "padding": lambda r: shown(r["padding"], ".1%"),
        "pairs/s": lambda r: shown(r["student"]["pairs_per_s"]),
        "tokens/s": lambda r: shown(r["student"]["tokens_per_s"], ",.0f"),
        "attention: pairs/s": lambda r: shown(r["attention"]["pairs_per_s"]),
        "x attention": lambda r: shown(r["speed_against_attention"], ".2f"),
        "floor": lambda r: shown(r["floor_share"], ".2f"),
        "linear": lambda r: shown(r["linear_floor_share"]["median"], ".2f"),
        "peak MiB": lambda r: mib(r["student"]["peak_bytes"]),
        "attention's": lambda r: mib(r["attention"]["peak_bytes"])})
    by_kind = [{**r, "kind": k} for r in rows for k in KINDS]
    lines += table("shares of the step by part (marks at module borders)", by_kind, {
        **which, "student": lambda r: r["kind"],
        **{part: lambda r, part=part: shown(r[r["kind"]]["parts"][part], ".1%") for part in PARTS}})
    title = "seconds of a step's matrix products; GFLOP of the first batch: the floor's, and counted in the step"
    lines += table(title, rows, {
        **which, "floor": lambda r: shown(r["floor_seconds"]), "linear": lambda r: shown(r["linear_floor_seconds"]),
        "step": lambda r: shown(r["student"]["step_seconds"]), "GFLOP": lambda r: shown(r["floor_gflop_first_batch"]),
        "counted": lambda r: shown(r["counted_gflop_first_batch"])})
    if r := result["reference"]:
        lines += ["", f"sequential reference, {r['pairs']} pairs of {r['length']} tokens, float32: "
                  f"{shown(r['reference_seconds'])} s a step, the student {shown(r['student_seconds'])} s: "
                  f"{shown(r['speed_against_reference'])} times as fast"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input or a failed measurement."""
    p = parser(__doc__)
    p.add_argument("--precision", nargs="+", default=["float32"], choices=script.CHOICES["precision"],
                   help="one or both")
    p.add_argument("--lengths", nargs="*", type=int, default=list(LENGTHS), help="tokens of the fixed-length rows")
    p.add_argument("--batches", type=int, default=16, help="batches of the mix in a repeat")
    p.add_argument("--tokens", type=int, default=4096, help="tokens of a fixed-length step, at most batch_size pairs")
    p.add_argument("--batch_size", type=int, default=0, help="pairs a step; 0: the preset's")
    p.add_argument("--accumulation", type=int, default=0, help="gradient_accumulation_steps; 0: the preset's")
    p.add_argument("--reference_pairs", type=int, default=4, help="pairs of the reference's step, 128 tokens")
    p.add_argument("--skip", nargs="*", default=[], choices=("mix", "reference"), help="what not to measure")
    return run(p, measure, page, worker, argv)


if __name__ == "__main__":
    sys.exit(main())
