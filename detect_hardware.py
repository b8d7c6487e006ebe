"""Report the hardware, estimate the memory and time of training on it, and recommend a command line.

    python detect_hardware.py
    python detect_hardware.py --batch_size 64 --max_length 128 --json
    python detect_hardware.py --measure false        no measured steps: no times, and the memory only by formula

Needs neither a GPU nor the teacher nor a network: the measured steps use random weights of the same shapes.
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel

from train_6layer_deltanet import (MicroBatch, Teacher, Trainer, UserError, build_optimizer, build_student, config,
                                   run_helper)

PARTS = (1, 2, 4, 8)
# GiB that CUDA reports, dense TFLOP/s in TF32 and in bf16, GB/s: from NVIDIA's data sheets (A100 and H100: SXM, 80 GB).
GPUS = {"L40": (44.4, 90.5, 181.0, 864), "RTX 4090": (23.6, 82.6, 165.2, 1008), "A100": (79.2, 156.0, 312.0, 2039),
        "H100": (79.2, 494.7, 989.4, 3350)}
LAUNCH = 5e-6  # seconds from one operator to the next when the device waits for them
SHORT = 20  # tokens of a sentence of some 15 words
TINY = {"d_model": 64, "num_heads": 2, "num_layers": 1, "max_length": 8, "gradient_accumulation_steps": 1}
LAUNCHES = Path(__file__).with_name("results") / "bench" / "launches.json"
USABLE = 0.9  # share of the memory that a training can have: the rest is the driver's, libraries' and fragmentation
KEYS = ("batch_size", "max_length", "total_steps")
COLUMNS = ("parameters", "teacher", "gradients", "optimizer")


def read_text(path: str) -> str:
    """A small file's text, or nothing where there is none (other systems)."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def find_hardware() -> dict[str, Any]:
    """GPUs, CPU, memory and versions; None for what cannot be found out here."""
    cpu, memory = read_text("/proc/cpuinfo"), read_text("/proc/meminfo")
    model = re.search(r"^model name\s*:\s*(.+)$", cpu, re.M)
    flags = set((re.search(r"^flags\s*:\s*(.+)$", cpu, re.M) or ["", ""])[1].split())
    sizes = {key: int(kb) / 2**20 for key, kb in re.findall(r"^(\w+):\s+(\d+) kB", memory, re.M)}
    gpus = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        gpus.append({"name": p.name, "memory_gib": p.total_memory / 2**30, "compute_capability": f"{p.major}.{p.minor}",
                     "multiprocessors": p.multi_processor_count, "tf32": p.major >= 8, "bf16": p.major >= 8,
                     "meets_specification": p.major >= 7, "recommended": p.major >= 8})
    try:
        found = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], text=True,
                               capture_output=True, timeout=20)
        driver = found.stdout.split("\n")[0].strip() or None
    except (OSError, subprocess.TimeoutExpired):
        driver = None
    return {"gpus": gpus, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "driver": driver,
            "pytorch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
            "platform": platform.platform(), "cpu": {
                "name": model[1] if model else platform.processor() or platform.machine(), "cores": os.cpu_count(),
                "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
                "threads": torch.get_num_threads(), "avx512": "avx512f" in flags, "amx": "amx_bf16" in flags,
                "bf16": bool(flags & {"avx512_bf16", "amx_bf16"}), "memory_gib": sizes.get("MemTotal"),
                "free_gib": sizes.get("MemAvailable")}}


def random_teacher(cfg: dict[str, Any]) -> Teacher:
    """A BERT of the teacher's shapes with random weights: memory and speed do not depend on the values."""
    shapes = BertConfig(hidden_size=cfg["d_model"], intermediate_size=4 * cfg["d_model"],
                        num_hidden_layers=cfg["num_layers"], num_attention_heads=cfg["num_heads"])
    return Teacher(BertModel(shapes, add_pooling_layer=False))


def estimate_memory(cfg: dict[str, Any], sentences_per_pair: int = 2) -> dict[str, float]:
    """Peak bytes of a training step in which every text has max_length tokens, by part, and their `total`.

    Floats kept for the backward pass with the mixer's kernels, per layer, with width D, H heads, FFN width F = 4 D:
      per token 8 D (input and output of the mixer, its projections, sums and norms), F (FFN; on CUDA also its GELU),
      5 H (gates), D for the distance to the teacher; 2 D (D / H) a block of 32 tokens but the first, for the states; on
      CUDA in bf16 6 D less. While one layer runs backwards on CUDA, it holds further 8 D a token, and 4 D (D / H) a
      chunk of 16.
    The teacher's hidden states are kept for all micro-batches, if a loss needs them, the rest for one.
    """
    d, heads, layers, length = cfg["d_model"], cfg["num_heads"], cfg["num_layers"], cfg["max_length"]
    bf16, parts = cfg["precision"] == "bf16", cfg["gradient_accumulation_steps"]
    mixer = 4 * d * d + 4 * d + 5 * heads * (d + 1) + 13 * d + d * d // heads + heads + 16 * (2 * d // heads + 3) + 1
    trained = layers * (mixer + 8 * d * d + 5 * d + 4 * d)
    frozen = 30522 * d + 3 * d
    teacher = 30522 * d + 514 * d + layers * (12 * d * d + 13 * d) + 2 * d
    sentences = sentences_per_pair * cfg["batch_size"]
    part = -(-cfg["batch_size"] // parts) * sentences_per_pair
    taught = sentences if cfg["layer_distill_weight"] else part
    cuda, blocks = cfg["device"] == "cuda", (length - 1) // 32
    per_token = (12 + (4 - 6 * bf16) * cuda) * d + 5 * heads + (d if cfg["layer_distill_weight"] else 0)
    kept = length * per_token + 2 * d * (d // heads) * blocks
    backward = 8 * d * length + 4 * d * (d // heads) * -(-length // 16) if cuda else 0
    found = {"parameters": 4.0 * (trained + frozen), "teacher": 4.0 * teacher, "gradients": 4.0 * trained,
             "optimizer": 8.0 * trained, "teacher_states": 4.0 * taught * length * layers * d,
             "activations": 4.0 * part * layers * kept, "backward": 4.0 * part * backward}
    if bf16:
        found["parameters"] += 2.0 * trained  # autocast's copies
    return found | {"total": sum(found.values())}


def make_batch(cfg: dict[str, Any]) -> list[MicroBatch]:
    """Micro-batches of random tokens, every text max_length long, as PairData.batch gives them."""
    generator, batch = torch.Generator().manual_seed(0), []
    parts = cfg["gradient_accumulation_steps"]
    for part in range(parts):
        pairs = cfg["batch_size"] // parts + (part < cfg["batch_size"] % parts)
        ids = torch.randint(1000, 30000, (2 * pairs, cfg["max_length"]), generator=generator).numpy()
        keys = torch.randint(2**60, (2, pairs), generator=generator).numpy()
        batch.append(MicroBatch.of([*ids], [*keys], [(cfg["max_length"], cfg["max_length"])]))
    return batch


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes; not ru_maxrss: on Linux it starts at the parent's."""
    if found := re.search(r"^VmHWM:\s+(\d+) kB", read_text("/proc/self/status"), re.M):
        return int(found[1]) * 1024
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """Give freed memory back, and let `peak_rss` start from what is in use; where a system cannot, the peak stays."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


class Training:
    """A student and a teacher with random weights, and whole optimiser steps of them."""

    def __init__(self, cfg: dict[str, Any]):
        self.cfg, teacher = cfg, random_teacher(cfg)
        self.device = torch.device("cuda" if cfg["device"] != "cpu" and torch.cuda.is_available() else "cpu")
        self.student = build_student(cfg, teacher).to(self.device).train()
        self.trainer = Trainer(self.student, teacher.to(self.device), cfg)
        self.optimizer = build_optimizer(self.student, cfg)

    def step(self, pairs: int) -> float:
        """Seconds of a step of `pairs` pairs."""
        batch, begun = make_batch(self.cfg | {"batch_size": pairs}), time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        self.trainer.step_gradients(batch, 1)
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.cfg["gradient_clip"]).item()
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun


def measured_steps(cfg: dict[str, Any], budget: float = 0) -> dict[str, float]:
    """Train in this process, which should be fresh: seconds of the last step, its pairs, peak bytes above the start.

    Two steps of batch_size pairs; with a `budget` of seconds also steps of as many pairs as fit in it, at most
    `most_pairs`: where one step takes longer, that one is all.
    """
    torch.set_float32_matmul_precision("high"), torch.set_flush_denormal(True)
    if cfg["threads"]:
        torch.set_num_threads(cfg["threads"])
    # A small student first: what compiles the kernels and sets up libraries is not the training's memory, nor its time.
    Training(cfg | TINY).step(2)
    forget_peak()
    if cfg["device"] == "cuda":
        torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
    start, training, pairs = peak_rss(), Training(cfg), cfg["batch_size"]
    small = seconds = training.step(pairs)
    if not budget or small < budget / 2:  # the first step is the slower one
        small = seconds = min(small, training.step(pairs))
    if (more := min(cfg.get("most_pairs", pairs), int(pairs * budget / small / 2))) > pairs:
        pairs, seconds = more, min(training.step(more), training.step(more))
    peak = torch.cuda.max_memory_allocated() if training.device.type == "cuda" else peak_rss() - start
    return {"seconds": seconds, "small_seconds": small, "pairs": pairs, "peak": float(peak)}


def measure(cfg: dict[str, Any], timeout: float, budget: float = 0) -> dict[str, float]:
    """`measured_steps` in a fresh process, so that the peak is the training's own. UserError if it fails."""
    # Without this, the allocator keeps freed blocks of many sizes, and the peak is not what the training needs.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    try:
        done = subprocess.run([sys.executable, __file__, "--worker", json.dumps([cfg, budget])], capture_output=True,
                              text=True, timeout=timeout, env=env)
    except subprocess.TimeoutExpired:
        raise UserError(f"the measured steps did not end in {timeout:.0f} s; use --measure false") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1][:200]
        raise UserError(f"the measured steps failed: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_within(cfg: dict[str, Any], room: float) -> dict[str, Any]:
    """Steps of few pairs, for some 8 s and in `room` bytes, and from them the step of the whole batch.

    A step is taken as a fixed time and a time for each pair, both from the two sizes measured. However slow the machine
    is, one step of 2 pairs is measured; the limit of 15 minutes is for one that hangs.
    """
    few = min(2, cfg["batch_size"])
    small = cfg | {"batch_size": few, "gradient_accumulation_steps": 1}
    small["most_pairs"] = most = max(few, cfg["batch_size"] // cfg["gradient_accumulation_steps"])
    while most > few and estimate_memory(small | {"batch_size": most})["total"] > room:
        small["most_pairs"] = most = max(few, most // 2)
    found = measure(small, 900, 8.0)
    pairs = found["pairs"]
    each = (found["seconds"] - found["small_seconds"]) / (pairs - few) if pairs > few else found["seconds"] / pairs
    each = max(0.0, each)
    # Several micro-batches go forward twice: once without and once with a graph, about 4 units of work instead of 3.
    factor = 4 / 3 if cfg["gradient_accumulation_steps"] > 1 else 1.0
    step = max(0.0, found["seconds"] - each * pairs) + each * cfg["batch_size"] * factor
    return found | {"estimated": estimate_memory(small | {"batch_size": pairs})["total"], "step_seconds": step,
                    "total_hours": step * cfg["total_steps"] / 3600}


class Operators(TorchDispatchMode):
    """Counts the operators that do work, as `count`; those inside another one, such as the mixer, are not seen."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += not (operator.is_view or operator.name().startswith(("aten::empty", "aten::new_empty")))
        return operator(*args, **(kwargs or {}))


def count_operators(cfg: dict[str, Any]) -> int:
    """Operators of an optimiser step in one micro-batch of one length, whatever their sizes.

    As recorded by bench/launches.py, or else counted here: then with the CPU's feed-forward and optimiser.
    """
    with contextlib.suppress(ValueError, KeyError, TypeError):
        for row in json.loads(read_text(str(LAUNCHES)))["rows"]:
            if row["preset"] == "specification" and row["micro_batches"] == 1:
                return int(row["total"])
    training = Training(cfg | TINY | {"device": "cpu", "num_layers": cfg["num_layers"]})
    training.trainer.packs = False  # as on a GPU
    training.step(2)  # makes the optimiser's state
    with Operators() as operators:
        training.step(2)
    return operators.count


def step_flops(cfg: dict[str, Any], length: int) -> float:
    """Floating point operations of a step in one go, every text `length` tokens: the teacher's and the student's.

    A token and layer: 24 D^2 for projections and FFN of both; 10 H D for the gates and about 20 D (D / H) for the
    mixer, 4 T D for the teacher's attention; the student's twice as many backward as forward.
    """
    d, heads = cfg["d_model"], cfg["num_heads"]
    student, teacher = 24 * d * d + 10 * heads * d + 20 * d * d // heads, 24 * d * d + 4 * length * d
    return 2.0 * cfg["batch_size"] * length * cfg["num_layers"] * (3 * student + teacher)


def compute_gpus(cfg: dict[str, Any], operators: int) -> list[dict[str, Any]]:
    """What GPUs that are not here would need and take: memory by formula, and the time of a step, computed.

    That is of the operators one after the other, or of the arithmetic at half of the data sheet's rate and of the
    activations four times over the memory's bus (out and in, and their gradients), whichever is longer.
    """
    found = []
    for name, (gib, *rates, bandwidth) in GPUS.items():
        for precision, rate in zip(("float32", "bf16"), rates):
            of_gpu = cfg | {"device": "cuda", "precision": precision}
            memory = {n: estimate_memory(of_gpu | {"gradient_accumulation_steps": n}) for n in (2**i for i in range(12))
                      if n <= cfg["batch_size"]}
            parts = next((n for n, x in memory.items() if x["total"] <= USABLE * gib * 2**30), None)
            row = {"gpu": name, "precision": precision, "gradient_accumulation_steps": parts}
            for label, length in (("", cfg["max_length"]), ("short_", min(SHORT, cfg["max_length"]))):
                if parts:
                    one = of_gpu | {"max_length": length, "gradient_accumulation_steps": 1}
                    work = step_flops(cfg, length) / (rate * 1e12 / 2)
                    work += 4 * estimate_memory(one)["activations"] / (bandwidth * 1e9)
                    again = 4 / 3 if parts > 1 else 1.0  # the forward pass twice
                    seconds = max(operators * parts * LAUNCH, work) * again
                    row |= {f"{label}step_seconds": seconds, f"{label}hours": seconds * cfg["total_steps"] / 3600}
            found.append(row | ({"gib": memory[parts]["total"] / 2**30} if parts else {}))
    return found


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is printed."""
    hardware = find_hardware()
    cfg = config | {key: getattr(args, key) for key in KEYS}
    if cfg["batch_size"] < 2 or not 4 <= cfg["max_length"] <= 512 or cfg["total_steps"] < 1:
        raise UserError("batch_size must be at least 2, max_length 4 to 512, total_steps at least 1")
    gpu = next((g for g in hardware["gpus"] if g["meets_specification"]), None)
    cfg["device"], room = ("cuda", gpu["memory_gib"]) if gpu else ("cpu", hardware["cpu"]["free_gib"] or 4.0)
    room *= USABLE * 2**30
    estimates, fitting = [], {}
    for precision in ("float32", "bf16"):
        counts = [*PARTS, *(2**i for i in range(4, 12))]
        for parts in (n for n in counts if n <= cfg["batch_size"]):
            found = estimate_memory(cfg | {"precision": precision, "gradient_accumulation_steps": parts})
            if found["total"] <= room:
                fitting.setdefault(precision, parts)
            if parts in PARTS:
                estimates.append({"precision": precision, "gradient_accumulation_steps": parts,
                                  **{k: v / 2**30 for k, v in found.items()}, "fits": found["total"] <= room})
    fast_bf16 = gpu["bf16"] if gpu else hardware["cpu"]["bf16"]
    # On CPUs that multiply bf16, steps in it are 1.3 to 2.2 times as fast (docs/speed.md).
    wanted = fitting.get("float32", 99) > 8 or not gpu
    precision = "bf16" if fast_bf16 and wanted and "bf16" in fitting else "float32"
    result = {"hardware": hardware, "device": cfg["device"], "usable_gib": room / 2**30, "estimates_gib": estimates,
              "setting": {k: cfg[k] for k in KEYS}, "smallest_gradient_accumulation_steps": fitting, "measured": None,
              "command": None}
    if precision in fitting:
        cfg |= {"precision": precision, "gradient_accumulation_steps": fitting[precision]}
        options = {k: cfg[k] for k in (*KEYS, "gradient_accumulation_steps", "precision") if cfg[k] != config[k]}
        result["command"] = " ".join([f"python train_6layer_deltanet.py --device {cfg['device']}",
                                      *(f"--{k} {v}" for k, v in options.items())])
    if not gpu:
        operators = count_operators(cfg)
        result |= {"operators": operators, "computed": compute_gpus(cfg, operators)}
    if args.measure:
        try:
            result["measured"] = measure_within(cfg, room)
        except UserError as error:
            result["not_measured"] = str(error)
    return result


def page(r: dict[str, Any]) -> str:
    """The report for people."""
    h, s, yes = r["hardware"], r["setting"], lambda x: "yes" if x else "no"  # noqa: E731
    lines = ["Hardware"]
    for i, g in enumerate(h["gpus"]):
        meets = "below the specification's 7.0: training would use the CPU"
        if g["meets_specification"]:
            meets = f"meets the specification (7.0), 8.0 recommended: {yes(g['recommended'])}"
        lines.append(f"  GPU {i}: {g['name']}, {g['memory_gib']:.1f} GiB, compute capability "
                     f"{g['compute_capability']}, {g['multiprocessors']} multiprocessors, TF32 {yes(g['tf32'])}, bf16 "
                     f"{yes(g['bf16'])}; {meets}")
    if not h["gpus"]:
        lines.append("  GPU: none that PyTorch can use; the specification asks for compute capability 7.0: not met")
    c, size = h["cpu"], lambda x: f"{x:.1f} GiB" if x else "unknown"  # noqa: E731
    parts = (*COLUMNS, "activations", "total")
    lines += [f"  CPU: {c['name']}, {c['cores']} cores ({c['usable_cores']} usable, {c['threads']} threads), AVX512 "
              f"{yes(c['avx512'])}, AMX {yes(c['amx'])}, bf16 {yes(c['bf16'])}; memory {size(c['memory_gib'])}, "
              f"{size(c['free_gib'])} free",
              f"  CUDA {h['cuda'] or 'none'}, cuDNN {h['cudnn'] or 'none'}, driver {h['driver'] or 'none'}, PyTorch "
              f"{h['pytorch']}, transformers {h['transformers']}, Python {h['python']}, {h['platform']}", "",
              f"Training memory in GiB, {s['batch_size']} pairs a step of two texts of {s['max_length']} tokens (most "
              f"texts are shorter; hard negatives add up to half); usable on this {r['device']}: {r['usable_gib']:.1f}",
              "  precision micro-batches" + "".join(f"{part:>13}" for part in parts) + "  fits"]
    for e in r["estimates_gib"]:
        values = [*(e[part] for part in COLUMNS), e["activations"] + e["backward"] + e["teacher_states"], e["total"]]
        lines.append(f"  {e['precision']:<10}{e['gradient_accumulation_steps']:>13}"
                     + "".join(f"{v:>13.2f}" for v in values) + f"  {yes(e['fits'])}")
    for precision, parts in r["smallest_gradient_accumulation_steps"].items():
        lines.append(f"  smallest gradient_accumulation_steps that fits in {precision}: {parts}")
    if m := r["measured"]:
        lines += ["", f"Measured here: a step of {m['pairs']} pairs takes {m['seconds']:.2f} s and "
                  f"{m['peak'] / 2**30:.2f} GiB (the formula says {m['estimated'] / 2**30:.2f})",
                  f"  extrapolated to {s['batch_size']} pairs, not measured: {1 / m['step_seconds']:.3g} steps/s, "
                  f"{m['total_hours']:.3g} hours for {s['total_steps']} steps;",
                  "  a bigger batch uses the device better, and shorter texts take less"]
    if "not_measured" in r:
        lines += ["", f"Not measured: {r['not_measured']}"]
    if "computed" in r:
        lines += ["", f"Computed, not measured: one GPU, steps of {s['batch_size']} pairs in as few micro-batches as "
                  f"fit, each as long as {r['operators']}",
                  f"operators of {LAUNCH * 1e6:.0f} us, or as the arithmetic at half of the data sheet's rate and the "
                  "activations' traffic",
                  f"  {'GPU':<10}{'precision':<11}{'micro-batches':>13}{'GiB':>7}{'ms a step':>11}{'hours':>7}"
                  f"{f'with {SHORT} tokens a text:':>25}{'ms':>6}{'hours':>7}"]
    for e in r.get("computed", []):
        name = f"  {e['gpu']:<10}{'TF32' if e['precision'] == 'float32' else 'bf16':<11}"
        lines.append(name + ("does not fit" if not e["gradient_accumulation_steps"] else (
            f"{e['gradient_accumulation_steps']:>13}{e['gib']:>7.1f}{1e3 * e['step_seconds']:>11.0f}{e['hours']:>7.1f}"
            f"{'':>25}{1e3 * e['short_step_seconds']:>6.0f}{e['short_hours']:>7.1f}")))
    none = "none: no micro-batch count fits this device; use a smaller --batch_size or --max_length"
    lines += ["", "Recommended:", f"  {r['command'] or none}"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 with a recommended command line, 1 if nothing fits or measuring failed, 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__)
    for key in KEYS:
        parser.add_argument(f"--{key}", type=int, default=config[key], help="as in training (default: %(default)s)")
    parser.add_argument("--measure", nargs="?", const="true", default="true",
                        help="run a few steps, some 10 s of them (default: true)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)

    def work(args: argparse.Namespace) -> dict[str, Any]:
        if args.worker:
            print(json.dumps(measured_steps(*json.loads(args.worker))))
            raise SystemExit(0)
        if args.measure not in ("true", "false"):
            raise UserError(f"--measure takes true or false, not {args.measure!r}")
        args.measure = args.measure == "true"
        return report(args)

    return run_helper(parser, argv, work, page, lambda result: not result["command"] or "not_measured" in result)


if __name__ == "__main__":
    sys.exit(main())
