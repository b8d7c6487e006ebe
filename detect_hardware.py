"""Report the hardware, estimate the memory and time of training on it, and recommend a command line.

    python detect_hardware.py
    python detect_hardware.py --batch_size 64 --max_length 128 --json
    python detect_hardware.py --measure false        no measured steps: no times, and the memory only by formula

Needs neither a GPU nor the teacher nor a network: the measured steps use random weights of the same shapes.
"""
from __future__ import annotations

import argparse
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
from transformers import BertConfig, BertModel

from train_6layer_deltanet import Teacher, Trainer, UserError, build_optimizer, build_student, config, parse_value

PARTS = (1, 2, 4, 8)
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
        driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True,
                                text=True, timeout=20).stdout.split("\n")[0].strip() or None
    except (OSError, subprocess.TimeoutExpired):
        driver = None
    return {"gpus": gpus, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "driver": driver,
            "pytorch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
            "platform": platform.platform(), "cpu": {
                "name": model[1] if model else platform.processor() or platform.machine(), "cores": os.cpu_count(),
                "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
                "threads": torch.get_num_threads(), "avx512": "avx512f" in flags, "amx": "amx_tile" in flags,
                "bf16": bool(flags & {"avx512_bf16", "amx_bf16"}), "memory_gib": sizes.get("MemTotal"),
                "free_gib": sizes.get("MemAvailable")}}


def random_teacher(cfg: dict[str, Any]) -> Teacher:
    """A BERT of the teacher's shapes with random weights: memory and speed do not depend on the values."""
    d = cfg["d_model"]
    shapes = BertConfig(hidden_size=d, num_hidden_layers=cfg["num_layers"], num_attention_heads=12, intermediate_size=4 * d)
    return Teacher(BertModel(shapes, add_pooling_layer=False))


def estimate_memory(cfg: dict[str, Any], sentences_per_pair: int = 2) -> dict[str, float]:
    """Peak bytes of a training step in which every text has max_length tokens, by part, and their `total`.

    Floats kept for the backward pass by the CPU's kernel, per layer, with width D, H heads, FFN width F = 4 D:
      per token 8 D (input and output of the mixer, its projections, sums and norms), F (FFN), 5 H (gates), D for the distance to the
      teacher; 2 D (D / H) a block of 32 tokens but the first, for the states.
    On CUDA, by the parallel form in PyTorch:
      per token 20 D (mixer, norms) + 2 F (FFN), 60 H + 384 (gates, flux, transitions), 8 H a doubling of the decay products,
      D for the distance to the teacher; in bf16 6 D less; with the states' loss 4 D more, and 2 D (D / H) a sentence;
      per sentence 5 H T^2: the decay products c, the attention A, their product, and X and W of the triangular solve.
      While one layer runs backwards it holds further 3 H T^2 a sentence.
    The teacher's hidden states are kept for all micro-batches, the rest for one.
    """
    d, heads, layers, length = cfg["d_model"], cfg["num_heads"], cfg["num_layers"], cfg["max_length"]
    bf16, parts = cfg["precision"] == "bf16", cfg["gradient_accumulation_steps"]
    mixer = 4 * d * d + 4 * d + 5 * heads * (d + 1) + 13 * d + d * d // heads + heads + 16 * (2 * d // heads + 3) + 1
    trained = layers * (mixer + 8 * d * d + 5 * d + 4 * d)
    frozen = 30522 * d + 3 * d
    teacher = 30522 * d + 514 * d + layers * (12 * d * d + 13 * d) + 2 * d
    sentences = sentences_per_pair * cfg["batch_size"]
    part = -(-cfg["batch_size"] // parts) * sentences_per_pair
    doublings = (length - 1).bit_length()
    per_token = (22 if bf16 else 28) * d + 60 * heads + 384 + 8 * heads * doublings
    per_token += d if cfg["layer_distill_weight"] else 0
    if cfg["ortho_state_reg_weight"]:
        per_token += 4 * d + 2 * d * (d // heads) / length
    square = heads * length * (length if length <= 80 else 32)  # chunks as in chunk_hierarchical_delta_rule
    per_token += (8 * d * d // heads // 32 if length > 80 else 0)  # two states a chunk of 32, and what is made of them
    if cfg["device"] != "cuda":
        square, per_token = 0, 12 * d + 5 * heads + (d if cfg["layer_distill_weight"] else 0)
        per_token += 2 * d * (d // heads) * ((length - 1) // 32) / length
    found = {"parameters": 4.0 * (trained + frozen), "teacher": 4.0 * teacher, "gradients": 4.0 * trained,
             "optimizer": 8.0 * trained, "teacher_states": 4.0 * sentences * length * layers * d,
             "activations": 4.0 * part * layers * (length * per_token + 5 * square), "backward": 4.0 * part * 3 * square}
    if bf16:
        found["parameters"] += 2.0 * trained  # autocast's copies
    return found | {"total": sum(found.values())}


def make_batch(cfg: dict[str, Any]) -> list[dict[str, Any]]:
    """Micro-batches of random tokens, every text max_length long, in the form of PairData.batch."""
    generator, batch = torch.Generator().manual_seed(0), []
    parts = cfg["gradient_accumulation_steps"]
    for part in range(parts):
        pairs = cfg["batch_size"] // parts + (part < cfg["batch_size"] % parts)
        ids = torch.randint(1000, 30000, (2 * pairs, cfg["max_length"]), generator=generator)
        batch.append({"pairs": pairs, "keys": torch.randint(2**60, (2 * pairs,), generator=generator),
                      "groups": [(ids, torch.ones_like(ids))], "restore": torch.arange(2 * pairs)})
    return batch


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes. ru_maxrss is not it on Linux: it starts at the parent's."""
    if found := re.search(r"^VmHWM:\s+(\d+) kB", read_text("/proc/self/status"), re.M):
        return int(found[1]) * 1024
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measured_steps(cfg: dict[str, Any], budget: float = 0) -> dict[str, float]:
    """Train in this process, which should be fresh: seconds of the last step, its pairs, peak bytes above the start.

    Two steps of batch_size pairs; with a `budget` of seconds also steps of as many pairs as fit in it, at most `most_pairs`.
    """
    device = torch.device("cuda" if cfg["device"] != "cpu" and torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high"), torch.set_flush_denormal(True)
    if cfg["threads"]:
        torch.set_num_threads(cfg["threads"])
    start = peak_rss()
    teacher = random_teacher(cfg)
    student = build_student(cfg, teacher).to(device).train()
    trainer, optimizer = Trainer(student, teacher.to(device), cfg), build_optimizer(student, cfg)

    def step(pairs: int) -> float:
        batch, begun = make_batch(cfg | {"batch_size": pairs}), time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        trainer.step_gradients(batch, 1)
        torch.nn.utils.clip_grad_norm_(student.parameters(), cfg["gradient_clip"]).item()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    pairs = cfg["batch_size"]
    step(pairs)  # the first one also sets up libraries
    small = seconds = step(pairs)
    if budget:
        pairs = max(pairs, min(cfg["most_pairs"], int(pairs * budget / small / 2)))
        seconds = min(step(pairs), step(pairs))
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_rss() - start
    return {"seconds": seconds, "small_seconds": small, "pairs": pairs, "peak": float(peak)}


def measure(cfg: dict[str, Any], timeout: float, budget: float = 0) -> dict[str, float]:
    """`measured_steps` in a fresh process, so that the peak is the training's own. UserError if it fails."""
    # Without this, the allocator keeps freed blocks of many sizes, and the peak is not what the training needs.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    try:
        done = subprocess.run([sys.executable, __file__, "--worker", json.dumps([cfg, budget])], capture_output=True, text=True,
                              timeout=timeout, env=env)
    except subprocess.TimeoutExpired:
        raise UserError(f"the measured steps took more than {timeout:.0f} s; use --measure false") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1][:200]
        raise UserError(f"the measured steps failed: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_within(cfg: dict[str, Any], room: float) -> dict[str, Any]:
    """Steps of few pairs, in under 30 s and `room` bytes, and from them the step of the whole batch.

    A step is taken as a fixed time and a time for each pair, both from the two sizes measured.
    """
    few = min(2, cfg["batch_size"])
    small = cfg | {"batch_size": few, "gradient_accumulation_steps": 1}
    small["most_pairs"] = most = max(few, cfg["batch_size"] // cfg["gradient_accumulation_steps"])
    while most > few and estimate_memory(small | {"batch_size": most})["total"] > room:
        small["most_pairs"] = most = max(few, most // 2)
    found = measure(small, 28, 8.0)
    pairs = found["pairs"]
    each = max(0.0, (found["seconds"] - found["small_seconds"]) / (pairs - few)) if pairs > few else found["seconds"] / pairs
    # Several micro-batches go forward twice: once without and once with a graph, about 4 units of work instead of 3.
    factor = 4 / 3 if cfg["gradient_accumulation_steps"] > 1 else 1.0
    step = max(0.0, found["seconds"] - each * pairs) + each * cfg["batch_size"] * factor
    return found | {"estimated": estimate_memory(small | {"batch_size": pairs})["total"], "step_seconds": step,
                    "total_hours": step * cfg["total_steps"] / 3600}


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
    precision = "bf16" if fast_bf16 and fitting.get("float32", 99) > 8 and "bf16" in fitting else "float32"
    result = {"hardware": hardware, "device": cfg["device"], "usable_gib": room / 2**30, "setting": {k: cfg[k] for k in KEYS},
              "estimates_gib": estimates, "smallest_gradient_accumulation_steps": fitting, "measured": None, "command": None}
    if precision in fitting:
        cfg |= {"precision": precision, "gradient_accumulation_steps": fitting[precision]}
        options = {k: cfg[k] for k in (*KEYS, "gradient_accumulation_steps", "precision") if cfg[k] != config[k]}
        result["command"] = " ".join([f"python train_6layer_deltanet.py --device {cfg['device']}",
                                      *(f"--{k} {v}" for k, v in options.items())])
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
        meets = ("meets the specification (7.0), 8.0 recommended: " + yes(g["recommended"])) if g["meets_specification"] else \
            "below the specification's 7.0: training would use the CPU"
        lines.append(f"  GPU {i}: {g['name']}, {g['memory_gib']:.1f} GiB, compute capability {g['compute_capability']}, "
                     f"{g['multiprocessors']} multiprocessors, TF32 {yes(g['tf32'])}, bf16 {yes(g['bf16'])}; {meets}")
    c, size = h["cpu"], lambda x: f"{x:.1f} GiB" if x else "unknown"  # noqa: E731
    lines += [] if h["gpus"] else ["  GPU: none that PyTorch can use; the specification asks for compute capability 7.0: not met"]
    lines += [f"  CPU: {c['name']}, {c['cores']} cores ({c['usable_cores']} usable, {c['threads']} threads), AVX512 {yes(c['avx512'])}, AMX "
              f"{yes(c['amx'])}, bf16 {yes(c['bf16'])}; memory {size(c['memory_gib'])}, {size(c['free_gib'])} free",
              f"  CUDA {h['cuda'] or 'none'}, cuDNN {h['cudnn'] or 'none'}, driver {h['driver'] or 'none'}, PyTorch {h['pytorch']}, "
              f"transformers {h['transformers']}, Python {h['python']}, {h['platform']}", "",
              f"Training memory in GiB, {s['batch_size']} pairs a step of two texts of {s['max_length']} tokens (most texts are "
              f"shorter; hard negatives add up to half); usable on this {r['device']}: {r['usable_gib']:.1f}",
              "  precision micro-batches" + "".join(f"{part:>13}" for part in (*COLUMNS, "activations", "total")) + "  fits"]
    for e in r["estimates_gib"]:
        values = [*(e[part] for part in COLUMNS), e["activations"] + e["backward"] + e["teacher_states"], e["total"]]
        lines.append(f"  {e['precision']:<10}{e['gradient_accumulation_steps']:>13}" + "".join(f"{v:>13.2f}" for v in values)
                     + f"  {yes(e['fits'])}")
    for precision, parts in r["smallest_gradient_accumulation_steps"].items():
        lines.append(f"  smallest gradient_accumulation_steps that fits in {precision}: {parts}")
    if m := r["measured"]:
        lines += ["", f"Measured here: a step of {m['pairs']} pairs takes {m['seconds']:.2f} s and {m['peak'] / 2**30:.2f} GiB (the "
                  f"formula says {m['estimated'] / 2**30:.2f})",
                  f"  extrapolated to {s['batch_size']} pairs, not measured: {1 / m['step_seconds']:.3g} steps/s, "
                  f"{m['total_hours']:.3g} hours for {s['total_steps']} steps;",
                  "  a bigger batch uses the device better, and shorter texts take less"]
    if "not_measured" in r:
        lines += ["", f"Not measured: {r['not_measured']}"]
    none = "none: no micro-batch count fits this device; use a smaller --batch_size or --max_length"
    lines += ["", "Recommended:", f"  {r['command'] or none}"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 when a command line could be recommended, 1 if nothing fits or the measurement failed, 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for key in KEYS:
        parser.add_argument(f"--{key}", type=int, default=config[key], help="as in training (default: %(default)s)")
    parser.add_argument("--measure", nargs="?", const="true", default="true", help="run a few steps, under 30 s (default: true)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    try:
        if args.worker:
            print(json.dumps(measured_steps(*json.loads(args.worker))))
            return 0
        args.measure = parse_value("measure", args.measure, True)
        result = report(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2) if args.json else page(result))
    return 0 if result["command"] and "not_measured" not in result else 1


if __name__ == "__main__":
    sys.exit(main())
