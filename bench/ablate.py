"""Ablations and recipe trials: the same short run with one thing changed at a time, scored on STS-B dev.

    python bench/ablate.py --data_dir DIR --groups architecture losses --closest 2 --json results/ablations.json
    python bench/ablate.py --data_dir DIR --groups recipe --json results/recipe.json
    python bench/ablate.py --list                          every variant and what it changes

Every run sees `--pairs` pairs, in the same batches unless these are what is changed (size, mix, joined texts), warms
up over a tenth of its steps, decays to 0 and is scored once, at its end, on dev alone: nothing is chosen among
evaluations, and test is not looked at. With `--closest N` the base and the N variants whose dev scores lie nearest to
the base's are run with two more seeds. Finished runs in `--output_dir` are kept, so that an interrupted command goes
on where it was.
"""
from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).resolve().parent))
import numpy as np
import torch
from common import configure, find_data, machine, note, one_layer, parser, run, script
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

# Name: what changes. The base is the preset itself; a variant that changes nothing in it is left out.
# `learned_positions` moves all other random starts too, as it draws more numbers before them. The keys in OWN are this
# script's, not the config's: `ema_decay` scores the exponential moving average of the weights, `layer_distance` and
# `unpaired` are explained below, and with `falling_layer_weight` that weight falls linearly to 0 over the run.
OWN = ("ema_decay", "layer_distance", "falling_layer_weight", "unpaired")
LAYER_DISTANCE = script.layer_distillation_loss
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "base": {"base": {}},
    "architecture": {
        "all heads left to right": {"bidirectional": False},
        "no slow state": {"hierarchical_memory": False},
        "no cross-timescale coupling": {"cross_timescale_coupling": False},
        "no resonance flux": {"resonance_flux": False},
        "no short convolution": {"short_convolution": False},
        "no read gates": {"read_gates": False},
        "learned positions": {"learned_positions": True},
        "orthogonal projections": {"projection_init": "orthogonal"},
    },
    "losses": {
        **{f"no {name.replace('_', ' ')} loss": {key: 0.0} for name, key in script.LOSS_WEIGHTS.items()},
        **{f"with {name.replace('_', ' ')} loss": {key: script.config[key]}
           for name, key in script.LOSS_WEIGHTS.items() if script.config[key]},
    },
    "recipe": {
        "batch 32": {"batch_size": 32},
        "batch 8": {"batch_size": 8},
        "learning rate 1e-4": {"peak_learning_rate": 1e-4},
        "learning rate 3e-4": {"peak_learning_rate": 3e-4},
        "learning rate 4e-4": {"peak_learning_rate": 4e-4},
        "mixers x 5": {"mixer_lr_multiplier": 5.0},
        "mixers x 20": {"mixer_lr_multiplier": 20.0},
        "layer weight 1": {"layer_distill_weight": 1.0},
        "layer weight 3": {"layer_distill_weight": 3.0},
        "layer weight 10": {"layer_distill_weight": 10.0},
        "layer weight 30": {"layer_distill_weight": 30.0},
        "layer weight 100": {"layer_distill_weight": 100.0},
        "layer weight falling to 0": {"falling_layer_weight": True},
        "last layer alone": {"layer_distance": "last"},
        "layers scaled alike": {"layer_distance": "layers"},
        "channels scaled alike": {"layer_distance": "channels"},
        "embedding weight 20": {"distillation_weight": 20.0},
        "source_alpha 0.5": {"source_alpha": 0.5},
        "source_alpha 1": {"source_alpha": 1.0},
        "single sentences": {"unpaired": True},
        "no joined texts": {"joined_share": 0.0},
        "joined texts 5%": {"joined_share": 0.05},
        "joined texts 5% to 512": {"joined_share": 0.05, "joined_length": 512},
        "trained embeddings": {"train_embeddings": True},
        "dropout 0.1": {"dropout": 0.1},
        "averaged weights": {"ema_decay": 0.95},
    },
}


def variants(groups: list[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> (group, changed keys), the base first."""
    return {name: (group, change) for group in ["base", *groups] for name, change in VARIANTS[group].items()}


def other_layer_distance(kind: str) -> Callable:
    """layer_distillation_loss of the last layer alone, or with each layer's or channel's error over its variance.

    The variance is that in texts of one length; the variances' mean over all layers is multiplied back, so that one
    weight suits all forms.
    """
    def loss(student: list[Tensor], teacher: list[Tensor], mask: Tensor, tokens: float) -> Tensor:
        if kind == "last":
            return LAYER_DISTANCE(student[-1:], teacher[-1:], mask, tokens)
        variances = [t[mask.bool()].float().var(0) for t in teacher]
        mean = torch.stack(variances).mean()
        scales = [mean / (v.clamp(min=0.01 * mean) if kind == "channels" else v.mean()) for v in variances]
        per_layer = [((scale * (s.float() - t).square()).mean(-1) * mask).sum()
                     for scale, s, t in zip(scales, student, teacher)]
        return torch.stack(per_layer).mean() / tokens
    return loss


def without_pairs(build: Callable) -> Callable:
    """PairData.build_window with a window's positives moved by half of it: most pairs are then two single sentences."""
    def built(number: int) -> Any:
        rows, batches = build(number)
        half = len(rows["positive"]) // 2
        moved = ("positive", "positive_length", "key_positive")
        return {k: np.roll(v, half) if k in moved else v for k, v in rows.items()}, batches
    return built


class Trials:
    """Short runs in one process: what they have in common (teacher, its cosines, dev set, pairs) is loaded once."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        data, self.data_name = find_data(args, folder, 2000)
        self.args, self.cfg = args, configure(args, **data, gradient_accumulation_steps=1,
                                              batch_size=args.batch_size)
        self.cfg |= one_layer(self.cfg, folder) if args.quick else {}
        self.device = script.choose_device(self.cfg)
        self.teacher, self.tokenizer, _ = script.load_teacher(self.cfg)
        self.teacher.to(self.device)
        self.dev = script.load_sts(self.cfg, "dev")[:100 if args.quick else None]
        self.cosines = script.sts_cosines(self.teacher, self.tokenizer, self.dev, self.cfg["max_length"])
        self.pairs: dict[str, script.PairData] = {}

    def run(self, name: str, change: dict[str, Any], seed: int) -> dict[str, Any]:
        """Train and score one variant; its record, read back if `--output_dir` holds it."""
        own, change = ({k: v for k, v in change.items() if (k in OWN) == mine} for mine in (True, False))
        steps = self.args.pairs // {**self.cfg, **change}["batch_size"]
        cfg = script.check_config({**self.cfg, **change, "seed": seed, "total_steps": steps,
                                   "warmup_steps": max(1, steps // 10)})
        order = script.stable_seed(own.get("unpaired"), *(cfg[k] for k in (
            "seed", "batch_size", "source_alpha", "joined_share", "joined_length")))
        if order not in self.pairs:
            self.pairs = {order: script.load_training_data(cfg, self.tokenizer, note)}
            if own.get("unpaired"):
                self.pairs[order].build_window = without_pairs(self.pairs[order].build_window)
        path = self.args.output_dir / f"{name.replace(' ', '_')}-{seed}.json"
        places = ("data_dir", "cache_dir", "threads", "output_dir")
        kept = {k: v for k, v in cfg.items() if k not in places} | own
        digest = f"{script.stable_seed(kept, self.pairs[order].fingerprints, script.SOURCE):016x}"
        try:
            if (record := json.loads(path.read_text()))["config"] == digest:
                return record
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not run, or not to its end
        note(f"{name}, seed {seed}: {steps} steps")
        student = script.build_student(cfg, self.teacher).to(self.device).train()
        trainer, optimizer = script.Trainer(student, self.teacher, cfg), script.build_optimizer(student, cfg)
        decay, distance = own.get("ema_decay"), own.get("layer_distance")
        averaged = None if decay is None else AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay))
        script.layer_distillation_loss = LAYER_DISTANCE if distance is None else other_layer_distance(distance)
        for step in range(1, steps + 1):
            if "falling_layer_weight" in own:
                trainer.cfg = cfg | {"layer_distill_weight": cfg["layer_distill_weight"] * (1 - step / steps)}
            optimizer.zero_grad(set_to_none=True)
            losses = trainer.step_gradients(self.pairs[order].batch(step), step)
            row = script.update(optimizer, losses.values(), script.learning_rate(step, cfg), cfg["gradient_clip"],
                                trainer.processes)
            if not math.isfinite(row.sum()):
                raise script.UserError(f"{name}, seed {seed}: the loss of step {step} is not finite; "
                                       "leave this variant out with --only")
            if averaged:
                averaged.update_parameters(student)
        scores = script.evaluate_sts(averaged.module if averaged else student, self.tokenizer, self.dev,
                                     cfg["max_length"], self.cosines)
        note(f"{name}, seed {seed}: dev Spearman {scores['spearman']:.4f}")
        record = {"seed": seed, "steps": steps, **{f"dev_{k}": v for k, v in scores.items()},
                  "last_losses": {n: x.item() for n, x in losses.items()}, "config": digest,
                  "git_commit": machine(self.device)["git_commit"]}
        script.write_json(path, record)
        return record


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rows."""
    if args.quick:
        args.pairs, args.batch_size, args.closest = 4, 2, 1
        args.groups, args.only = ["losses"], ["no layer distill loss"]
    found = variants(args.groups)
    if unknown := set(args.only) - set(found):
        raise script.UserError(f"--only {', '.join(sorted(unknown))}: not in these groups; see --list")
    found = {name: v for name, v in found.items() if not args.only or name in ("base", *args.only)}
    if args.pairs < max(args.batch_size, *(change.get("batch_size", 0) for _, change in found.values())):
        raise script.UserError(f"--pairs {args.pairs}: less than a batch")
    args.output_dir = args.output_dir or folder / "runs"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    trials = Trials(args, folder)
    first = trials.cfg["seed"]
    found = {name: v for name, v in found.items() if name == "base" or any(
        not trials.cfg[k] if name.startswith("with ") else trials.cfg.get(k) != x for k, x in v[1].items())}
    rows = [{"group": group, "variant": name, "changes": change, "runs": [trials.run(name, change, first)]}
            for name, (group, change) in found.items()]
    base = rows[0]["runs"][0]["dev_spearman"]
    for row in rows:
        row["difference"] = row["runs"][0]["dev_spearman"] - base
    for seed in (first + 1, first + 2) if args.closest else ():
        for row in sorted(rows, key=lambda r: abs(r["difference"]))[:args.closest + 1]:  # the base is the first
            row["runs"].append(trials.run(row["variant"], row["changes"], seed))
    for row in rows:
        values = [r["dev_spearman"] for r in row["runs"]]
        row["mean"], row["deviation"] = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
        differences = [v - r["dev_spearman"] for v, r in zip(values, rows[0]["runs"])]  # same seed, same batches
        row["difference_mean"] = statistics.mean(differences)
        row["difference_deviation"] = statistics.stdev(differences) if len(values) > 1 else None
    kept = ("projection_init", "joined_share", "joined_length", "peak_learning_rate", "mixer_lr_multiplier",
            "source_alpha", "dropout", *script.LOSS_WEIGHTS.values())
    return {"machine": machine(trials.device), "rows": rows, "settings": {
        "preset": args.preset, "pairs": args.pairs, "batch_size": args.batch_size, "repeats": 1,
        "data": trials.data_name, **{k: trials.cfg[k] for k in kept}}}


def page(result: dict[str, Any]) -> str:
    """The result for people: a Markdown table."""
    s, m = result["settings"], result["machine"]
    lines = [f"Runs of {s['pairs']:,} pairs of {s['data']}, preset {s['preset']}, batches of {s['batch_size']}. "
             f"{m['cpu']}, {m['threads']} threads, PyTorch {m['torch']}, commit {m['git_commit']}; 1 repeats. "
             "Differences are of the first seed, in the last column of runs with the same seed.", "",
             "| group | variant | dev Spearman | difference | agreement with the teacher | mean of seeds (deviation) "
             "| mean difference (deviation) |",
             "|---|---|---:|---:|---:|---:|---:|"]
    for row in sorted(result["rows"], key=lambda r: (list(VARIANTS).index(r["group"]), r["difference"])):
        seeds = "|"
        if len(row["runs"]) > 1:
            seeds = f"{row['mean']:.4f} ({row['deviation']:.4f}) " \
                    f"| {row['difference_mean']:+.4f} ({row['difference_deviation']:.4f})"
        first = row["runs"][0]
        lines.append(f"| {row['group']} | {row['variant']} | {first['dev_spearman']:.4f} | {row['difference']:+.4f} | "
                     f"{first['dev_teacher_agreement']:.4f} | {seeds} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input or a failed run."""
    p = parser(__doc__)
    p.add_argument("--groups", nargs="*", default=["architecture", "losses"],
                   choices=[g for g in VARIANTS if g != "base"], help="which variants")
    p.add_argument("--only", nargs="*", default=[], help="names of variants, to run these and the base alone")
    p.add_argument("--pairs", type=int, default=1600, help="pairs a run sees")
    p.add_argument("--batch_size", type=int, default=16, help="pairs a step, unless the variant changes it")
    p.add_argument("--closest", type=int, default=0,
                   help="how many variants nearest to the base get two more seeds, like the base")
    p.add_argument("--output_dir", type=Path, help="where the runs are kept; empty: a temporary folder")
    p.add_argument("--list", action="store_true", help="print the variants and stop")
    if "--list" in (sys.argv[1:] if argv is None else argv):
        for name, (group, change) in variants(list(VARIANTS)[1:]).items():
            print(f"{group:13} {name}: {change}")
        return 0
    return run(p, measure, page, lambda: {}, argv)


if __name__ == "__main__":
    sys.exit(main())
