"""Where the time of an optimiser step goes at 1 and 2 processes, and a cost model that predicts the second from sizes.

    python bench/scale.py --data_dir DIR --json results/bench/scale.json     Gloo on the CPU; on CUDA NCCL and 2 GPUs
    python bench/scale.py --quick                                            does it work? under a minute

Measured on the same steps of `PairData` at 1 and at 2 processes, a mean over the processes:
- compute: teacher, student forward, losses of the whole batch, student forward and backward, clipping, AdamW; the
  student reads padding, as on CUDA
- waiting for the process whose micro-batches are longer or whose core is slower
- gather: the sum of `Trainer.exchange` and the two small sums of `Run`, after all processes have met
- reduction: a step less the same step without DistributedDataParallel's all-reduce: what backward does not hide
- data: `PairData.batch`, which training calls a step ahead in a thread; here it stands before the step
Predicted without a step of 2 processes, from tokens, sentences, pairs and 4 bytes a trained parameter, by constants for
- a step, a micro-batch and a padded token (fitted to one process's steps on other batches), and a pair of data
- slow-down: the same steps in two processes at once that do not communicate (they share caches and memory bandwidth)
- all-reduce: latency + bytes / bandwidth, fitted to 16 KiB to 16 MiB; behind the backward pass on CUDA, not on the CPU
The last table extends the model to GPU nodes by ASSUMED: nothing in it is measured, except what data cost here.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import numpy as np
import torch
from common import configure, find_data, headline, machine, note, parser, run, script, shown, spread, table, timed
from scipy.optimize import nnls

PARTS = ("compute", "waiting", "gather", "reduction", "data", "step")
SIZES = [2**n for n in range(14, 25, 2)]  # bytes of the all-reduces that latency and bandwidth are fitted to
BACKWARD = 0.4  # of a micro-batch's time: teacher 1, student forward 1 and again 1, its backward 2
BACKWARD_ALONE = 0.5  # where a process has one micro-batch, which goes forward once
ASSUMED = {  # of H100 nodes; rates are parts of the data sheets', for a reader to replace
    # 1.05 TFLOP of matrix products at flop_per_s: 256 pairs of 24 tokens, forward once, by bench/launches.py. Beside
    # them its 712 operators, of one group of lengths, are launched in 4 ms, 5 us each.
    "micro_batch_s": 0.0105,
    "flop_per_s": 100e12, "memory_bytes_per_s": 2e12,  # of 495e12 (TF32) and 3.35e12, for products 384 deep
    "loss_passes": 16,  # reads and writes of N x N float32 by a loss on the cosines of all sentences and its gradient
    "node_bytes_per_s": 200e9, "node_latency_s": 3e-5,  # NVLink, of 450e9 a direction
    "network_bytes_per_s": 20e9, "network_latency_s": 1e-4}  # one 200 Gbit/s InfiniBand port a node, of 25e9


class Timed(script.Processes):
    """Processes that, while `marked`, meet before each sum, so that waiting and summing are told apart."""

    marked, waited, summed = False, 0.0, 0.0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.marked:
            self.waited += timed(self.wait)
        self.summed += timed(lambda: super(Timed, self).sum(tensor)) if self.count > 1 else 0.0
        return tensor


def optimise(trainer: Any, optimizer: torch.optim.Optimizer, batch: list[script.MicroBatch], step: int) -> None:
    """What `Run.optimise` and `Run.agree` do with a batch; the rate stays 0, where `build_optimizer` puts it.

    Of one micro-batch alone too with gradient caching, as it is one of several where the model is used.
    """
    optimizer.zero_grad(set_to_none=True)
    values = trainer.step_gradients(batch, step, cached=True)
    script.update(optimizer, values.values(), 0.0, trainer.cfg["gradient_clip"], trainer.processes)
    trainer.processes.table(0, 0)


def data_cost(cfg: dict[str, Any], tokenizer: Any) -> tuple[Any, float, float]:
    """The data, and seconds of `batch` and of `build_window` per pair; nothing is left to the builder's thread."""
    data = script.load_training_data(cfg, tokenizer, note)
    window = timed(lambda: data.window(0)) / data.WINDOW
    data.windows[1].result()
    batch = median(timed(lambda: data.batch(step)) for step in range(1, 33))
    return data, batch / cfg["batch_size"], window / cfg["batch_size"]


def worker(cfg: dict[str, Any], folder: str, batches: int, repeats: int) -> dict[str, Any]:
    """What one of two processes measures, written to `folder`; as one process, the first works, the second sleeps."""
    processes = Timed(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    device = script.choose_device(cfg, int(os.environ["LOCAL_RANK"]))
    processes.connect(device, 300)
    teacher, tokenizer, origin = script.load_teacher(cfg)
    student = script.build_student(cfg, teacher).to(device).train()
    optimizer = script.build_optimizer(student, cfg)
    alone = script.Trainer(student, teacher.to(device), cfg, processes=Timed())
    alone.packs = False  # as on a GPU: all of a step's time follows the padded tokens
    data, pair_s, _ = data_cost(cfg, tokenizer)
    steps = {step: data.batch(step) for step in range(1, 2 * batches + 1)}
    cases = [case for step in range(1, batches + 1) for case in (steps[step], [steps[step][step % len(steps[step])]])]
    tokens = lambda batch: [sum(ids.numel() for ids, _ in micro.groups) for micro in batch]  # noqa: E731
    out = {"teacher": origin, "data_pair_s": pair_s,
           "parameters": sum(t.numel() for t in script.trainable_state(student).values()),
           "cases": [[len(case), sum(tokens(case))] for case in cases],
           "steps": [{"step": step, "tokens": tokens(batch), "sentences": sum(len(micro.restore) for micro in batch)}
                     for step, batch in steps.items() if step > batches]}

    def calibration(meet: Any) -> list[float]:
        """Seconds of one process's step on each of the cases: whole batches, and one micro-batch of each."""
        call = lambda case: (meet(), timed(lambda: optimise(alone, optimizer, case, 1)))[1]  # noqa: E731
        return [median([call(case) for _ in range(repeats + 1)][1:]) for case in cases]

    def rounds(trainer: Any) -> list[list[float]]:
        """Mean seconds of PARTS, `repeats` times; two processes take a step with the reduction, and marked without."""
        now, found = trainer.processes, []
        for turn in range(-2, repeats):
            for step in range(batches + 1, batches + 2 if turn < 0 else 2 * batches + 1):
                whole = {}
                for marked in (False, True) if now.count > 1 else (True,):
                    now.marked, now.waited, now.summed = marked, 0.0, 0.0
                    if trainer.replica:
                        trainer.replica.require_backward_grad_sync = not marked
                    now.wait()
                    fetched = timed(lambda: steps.update({step: data.batch(step)}))
                    whole[marked] = fetched + timed(lambda: optimise(trainer, optimizer, steps[step], step))
                compute, taken = whole[True] - now.waited - now.summed - fetched, whole.get(False, whole[True])
                found.append((compute, now.waited, now.summed, taken - whole[True], fetched, taken))
        return np.array(found[2:]).reshape(repeats, batches, len(PARTS)).mean(1).tolist()

    processes.wait()
    if processes.rank == 0:
        out |= {"alone": calibration(lambda: None), "one": rounds(alone)}
        # For the extrapolation, micro-batches of 256 pairs, not 8.
        larger = cfg | {"batch_size": 16 * cfg["batch_size"], "gradient_accumulation_steps": 2}
        _, out["batch_pair_s"], out["window_pair_s"] = data_cost(larger, tokenizer)
    processes.wait()
    out["at_once"], buffers = calibration(processes.wait), [torch.zeros(size // 4, device=device) for size in SIZES]
    sums = lambda x: [timed(lambda: processes.sum(x)) for _ in range(2 + 5 * repeats)]  # noqa: E731
    out["allreduce"] = [[4 * len(x), median(sums(x)[2:])] for x in buffers]
    both = script.Trainer(student, teacher, cfg, processes=processes)
    both.packs = False
    out["two"] = rounds(both)
    processes.leave()
    script.write_json(Path(folder) / f"{processes.rank}.json", out)
    return {}


def calibrate(ranks: list[dict[str, Any]], hidden: float) -> dict[str, float]:
    """The model's constants; no step of two processes is in them."""
    def fit(*columns: list[float], seconds: list[float]) -> list[float]:
        a = np.array(columns, np.float64).T  # least squares of the relative errors, no factor below 0
        return (nnls(a / a.max(0) / np.array(seconds)[:, None], np.ones(len(a)))[0] / a.max(0)).tolist()

    one, (bytes_, seconds) = ranks[0], zip(*ranks[0]["allreduce"])
    step, micro, token = fit([1] * len(one["cases"]), *zip(*one["cases"]), seconds=one["alone"])
    latency, byte = fit([1] * len(SIZES), bytes_, seconds=seconds)
    slower = median(fmean(both) / alone for *both, alone in zip(*(r["at_once"] for r in ranks), one["alone"]))
    return {"step_s": step, "micro_batch_s": micro, "token_s": token, "data_pair_s": one["data_pair_s"],
            "slow_down": slower, "latency_s": latency, "byte_s": byte, "hidden_share": hidden}


def reduction(latency: float, byte: float, size: int, hidden: float) -> float:
    """Seconds by which all-reduces of `size` bytes of gradients outlast the backward pass, as the last bucket's do."""
    buckets = 1 + max(0, -(-(size - 2**20) // (25 * 2**20)))  # DistributedDataParallel's, in MiB: 1, the others 25
    return max(buckets * latency + size * byte - hidden, latency + size * byte / buckets)


def predict(c: dict[str, float], cfg: dict[str, Any], step: dict[str, Any], size: int, count: int = 2) -> list[float]:
    """Seconds of PARTS in one step, with `size` bytes of gradients."""
    own = [[n for i, n in enumerate(step["tokens"]) if (i + step["step"]) % count == rank] for rank in range(count)]
    seconds = [c["slow_down"] * (c["step_s"] + c["micro_batch_s"] * len(n) + c["token_s"] * sum(n)) for n in own]
    hidden = c["hidden_share"] * c["slow_down"] * (c["micro_batch_s"] + c["token_s"] * min(n[-1] for n in own))
    gather = 3 * c["latency_s"] + 8 * cfg["d_model"] * step["sentences"] * c["byte_s"]
    parts = [fmean(seconds), max(seconds) - fmean(seconds), gather,
             reduction(c["latency_s"], c["byte_s"], size, hidden),
             c["slow_down"] * c["data_pair_s"] * cfg["batch_size"]]
    return [*parts, sum(parts)]


def cluster(nodes: int, gpus: int, micro_pairs: int, sentences: float, size: int, one: dict[str, Any],
            d: int) -> dict[str, Any]:
    """Seconds of a step of `nodes` x `gpus` GPUs, with one micro-batch each, by ASSUMED; of data by what it took."""
    a, count, link = ASSUMED, nodes * gpus, "network" if nodes > 1 else "node"
    pairs, latency = count * micro_pairs, a[f"{link}_latency_s"]
    byte = 2 * (count - 1) / count / a[f"{link}_bytes_per_s"]
    n, several, compute = pairs * sentences, count > 1, a["micro_batch_s"]
    parts = {"compute": compute,
             "losses": n**2 * (8 * d / a["flop_per_s"] + 4 * a["loss_passes"] / a["memory_bytes_per_s"]),
             "gather": several * (3 * latency + 8 * d * n * byte),
             "reduction": several * reduction(latency, byte, size, BACKWARD_ALONE * compute)}
    return {"nodes": nodes, "gpus": gpus, "pairs": pairs, **parts, "device": sum(parts.values()),
            "batch": pairs * one["batch_pair_s"], "window": pairs * one["window_pair_s"],
            "loss_matrix_bytes": 4 * n**2}


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measured and predicted parts, and the extrapolation."""
    if args.quick:
        args.batches, args.repeats, args.batch_size, args.accumulation = 1, 1, 4, 4
    if args.batches < 1 or args.accumulation < 3:
        raise script.UserError("--batches must be at least 1, --accumulation at least 3: "
                               "more than a micro-batch for each process")
    paths, name = find_data(args, folder, 2000)
    cfg = configure(args, **paths, batch_size=args.batch_size, gradient_accumulation_steps=args.accumulation)
    device = script.choose_device(cfg)
    result = {"machine": machine(device)}
    request = json.dumps({"cfg": cfg, "folder": str(folder), "batches": args.batches, "repeats": args.repeats})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__,
               "--worker", request]
    done = subprocess.run(command, capture_output=True, text=True)  # not `fresh`: its allocator shows peaks, not speed
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        said = next((line[7:] for line in lines if line.startswith("error: ")), f"torchrun: {lines[-1][:300]}")
        raise script.UserError(said)
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    one, steps, size = ranks[0], ranks[0]["steps"], 4 * ranks[0]["parameters"]
    constants = calibrate(ranks, BACKWARD if device.type == "cuda" else 0.0)
    sentences = fmean(s["sentences"] for s in steps)
    predicted = [predict(constants, cfg, step, size) for step in steps]
    two = np.mean([r["two"] for r in ranks], 0).tolist()
    rows = [{"part": part, "one": spread(alone), "predicted": fmean(model), "measured": spread(both),
             "error": fmean(model) / median(both) - 1}
            for part, alone, model, both in zip(PARTS, zip(*one["one"]), zip(*predicted), zip(*two))]
    return result | {
        "settings": {"repeats": args.repeats, "preset": args.preset, "batches": args.batches, "data": name,
                     "teacher": one["teacher"],
                     **{k: cfg[k] for k in ("batch_size", "gradient_accumulation_steps", "threads", "precision")}},
        "sizes": {"gradient_bytes": size, "gather_bytes": 8 * cfg["d_model"] * sentences, "sentences": sentences,
                  "padded_tokens": fmean(sum(s["tokens"]) for s in steps),
                  "micro_batches_per_process": args.accumulation / 2},
        "constants": constants | {k: one[k] for k in ("batch_pair_s", "window_pair_s")},
        "allreduce": one["allreduce"], "rows": rows, "assumed": ASSUMED, "cluster": [
            cluster(*shape, 256, sentences / cfg["batch_size"], size, one, cfg["d_model"])
            for shape in ((1, 1), (1, 8), (2, 8), (8, 8))]}


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    s, z, step = result["settings"], result["sizes"], result["rows"][-1]
    ms = lambda x: shown(spread([*x.values()], 1e3) if isinstance(x, dict) else 1e3 * x, ".1f")  # noqa: E731
    lines = headline("Scaling from 1 to 2 processes", result, f"{s['batches']} steps in each")
    lines += [f"{s['data']}; preset {s['preset']}, {s['batch_size']} pairs in {s['gradient_accumulation_steps']} "
              f"micro-batches; a step: {z['gradient_bytes'] / 1e6:.1f} MB of gradients, "
              f"{z['gather_bytes'] / 1e3:.0f} kB of embeddings, {z['padded_tokens']:.0f} tokens"]
    lines += table("milliseconds of a step", result["rows"], {
        "part": lambda r: r["part"], "1 process": lambda r: ms(r["one"]), "2 predicted": lambda r: ms(r["predicted"]),
        "2 measured": lambda r: ms(r["measured"]), "error": lambda r: shown(r["error"], "+.0%")})
    lines += [f"speed-up: {step['one']['median'] / step['predicted']:.2f} predicted, "
              f"{step['one']['median'] / step['measured']['median']:.2f} measured"]
    names = ("compute", "losses", "gather", "reduction", "device", "batch", "window")
    lines += table("extrapolated: milliseconds of a step, 256 pairs a GPU; device: the sum before it; batch, window: "
                   "threads beside it", result["cluster"], {
        "nodes x GPUs": lambda r: f"{r['nodes']} x {r['gpus']}", "pairs": lambda r: f"{r['pairs']:,}",
        **{k: lambda r, k=k: ms(r[k]) for k in names}, "N x N GB": lambda r: f"{r['loss_matrix_bytes'] / 1e9:.2f}"})
    return "\n".join(lines + [f"{k}: " + ", ".join(f"{n} {v:.3g}" for n, v in result[k].items())
                              for k in ("constants", "assumed")])


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input or a failed measurement."""
    p = parser(__doc__)
    p.add_argument("--batches", type=int, default=4, help="steps measured; as many others calibrate the model")
    p.add_argument("--batch_size", type=int, default=32, help="pairs a step")
    p.add_argument("--accumulation", type=int, default=4,
                   help="gradient_accumulation_steps, shared by the two processes")
    p.set_defaults(threads=1, repeats=2)
    return run(p, measure, page, worker, argv)


if __name__ == "__main__":
    sys.exit(main())
