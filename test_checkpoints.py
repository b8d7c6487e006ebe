"""Evaluate every checkpoint of a training run on STS-B, and compare with the scores recorded in training.

    python test_checkpoints.py runs/first                              all checkpoint_*.pt and pytorch_model.bin
    python test_checkpoints.py runs/first --every 10 --split test       thinned, one split
    python test_checkpoints.py runs/first --json

Writes checkpoint_scores.json and checkpoint_scores.png into the folder. Scores are kept by the files' hashes: a second
scan evaluates only what is new. A file that cannot be evaluated is a row that says why, and the exit status is then 1.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from train_6layer_deltanet import (ARCHITECTURE_KEYS, UserError, checkpoint_steps, choose_device, config, evaluate_sts,
                                   file_sha256, load_student_state, load_sts, load_teacher, plot_spearman, read_record,
                                   read_student, recorded_config, run_helper, student_from, write_atomic, write_json)

SPLITS = {"validation": "dev", "test": "test"}
RUN_KEYS = ("data_dir", "sts_name", "teacher_model", "device")
AGREEMENT = 1e-4  # other devices and thread counts sum in another order; a real difference is larger


class TokenisedOnce:
    """Stands in for the tokenizer: a list of sentences that was seen before is not tokenised again."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.seen = tokenizer, {}

    def __call__(self, sentences: list[str], **options: Any) -> dict[str, list[list[int]]]:
        key = (tuple(sentences), options.get("max_length"))
        if key not in self.seen:
            self.seen[key] = self.tokenizer(sentences, **options)
        return self.seen[key]


def thin(steps: list[int], every: int, limit: int, last: int) -> list[int]:
    """The steps to scan, rising: of the newest `last` every `every`-th back from the newest, at most `limit` evenly."""
    chosen = steps[-last:][::-1][::every][::-1]
    if limit and len(chosen) > limit:
        chosen = [chosen[i] for i in np.linspace(len(chosen) - 1, 0, limit).round().astype(int)[::-1]]
    return chosen


def run_config(folder: Path, files: list[Path], args: argparse.Namespace) -> dict[str, Any]:
    """The run's config, from run.json or its first readable file, with what the command line says."""
    found = read_record(folder / "run.json").get("config")
    cfg = recorded_config(found, folder / "run.json") if found else None
    for path in files if cfg is None else ():
        try:
            cfg = read_student(path)[1]
            break
        except UserError:
            continue
    given = {key: getattr(args, key) for key in RUN_KEYS if getattr(args, key)}
    return recorded_config((cfg or config) | {"device": "auto", "precision": "float32"} | given, folder)


class Scan:
    """Evaluates one file after another with one student, sentences tokenised once."""

    def __init__(self, folder: Path, cfg: dict[str, Any], splits: list[str]):
        self.cfg, self.folder, self.device = cfg, folder, choose_device(cfg)
        self.rows = {split: load_sts(cfg, SPLITS[split]) for split in splits}
        # Part of every kept score's key: scores of other sentences or lengths are other scores.
        self.keys = {split: hashlib.sha256(json.dumps([rows, cfg["max_length"]]).encode()).hexdigest()[:16]
                     for split, rows in self.rows.items()}
        self.teacher, tokenizer, _ = load_teacher(cfg)
        self.tokenizer, self.student, self.built = TokenisedOnce(tokenizer), None, None
        try:
            kept = read_record(folder / "checkpoint_scores.json").get("cache", {})
            self.cache = {k: v for k, v in kept.items() if isinstance(v, dict)}
        except (UserError, AttributeError):
            self.cache = {}
        self.evaluated = 0

    def scores(self, digest: str, model: Any) -> dict[str, float]:
        """{split_metric: score}, of the cache or of `model()`."""
        result = {}
        for split, rows in self.rows.items():
            key = f"{digest}:{self.keys[split]}"
            if key not in self.cache:
                self.evaluated += 1
                self.cache[key] = evaluate_sts(model(), self.tokenizer, rows, self.cfg["max_length"])
            result |= {f"{split}_{metric}": value for metric, value in self.cache[key].items()}
        return result

    def teacher_scores(self) -> dict[str, float]:
        digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in self.teacher.state_dict().values())).hexdigest()
        return self.scores(digest, lambda: self.teacher.to(self.device))

    def load(self, state: Any, cfg: dict[str, Any], where: str) -> Any:
        """The scan's student with the tensors `state`; built anew only for another architecture."""
        key = [cfg[k] for k in (*ARCHITECTURE_KEYS, "train_embeddings")]
        if self.built != key:
            self.teacher.cpu()
            self.student, self.built = student_from(state, cfg, where, self.teacher).to(self.device), key
        else:
            load_student_state(self.student, state, where)
        return self.student

    def row(self, path: Path) -> dict[str, Any]:
        """One file's row; `error` says what is wrong with it."""
        row: dict[str, Any] = {"file": path.name, "step": None}
        try:
            if path.suffix == ".pt":
                row["step"] = int(path.stem.removeprefix("checkpoint_"))
            row["sha256"] = file_sha256(path)
            known = self.cache.get(row["sha256"])
            if known and all(f"{row['sha256']}:{key}" in self.cache for key in self.keys.values()):
                row |= known | {"scores": self.scores(row["sha256"], None)}
            else:
                state, cfg, info = read_student(path)
                known = {"step": info["step"], "evaluation": info["evaluation"], "recorded": info["scores"]}
                model = self.load(state, cfg, str(path))
                row |= known | {"scores": self.scores(row["sha256"], lambda: model)}
                self.cache[row["sha256"]] = known
            if row.pop("evaluation") != self.cfg["sts_name"]:
                row["recorded"] = {}  # of other sentences: nothing to agree with
            both = [key for key in row["scores"] if key in row["recorded"]]
            row["agrees"] = all(abs(row["scores"][k] - row["recorded"][k]) <= AGREEMENT for k in both) if both else None
        except (UserError, ValueError, OSError) as error:
            row["error"] = str(error).removeprefix(f"{path}: ")
        return row


def scan(args: argparse.Namespace) -> dict[str, Any]:
    """Scan the folder as the command line says; returns the report, which is also written."""
    folder = Path(args.output_dir)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    steps = checkpoint_steps(folder)
    files = [folder / f"checkpoint_{step}.pt" for step in thin(steps, args.every, args.limit, args.last)]
    strays = {*folder.glob("checkpoint_*.pt")} - {folder / f"checkpoint_{step}.pt" for step in steps}
    if (folder / "pytorch_model.bin").is_file():
        files.append(folder / "pytorch_model.bin")
    if not files and not strays:
        raise UserError(f"{folder}: holds no checkpoint_*.pt and no pytorch_model.bin")
    cfg = run_config(folder, files, args)
    work = Scan(folder, cfg, [args.split] if args.split else list(SPLITS))
    rows = [{"file": path.name, "step": None, "error": "its name holds no step"} for path in sorted(strays)]
    report: dict[str, Any] = {"evaluation": cfg["sts_name"], "splits": list(work.rows),
                              "teacher": work.teacher_scores(), "files": rows}
    for path in tqdm(files, desc="checkpoints", unit="file", disable=True if args.json else None):
        rows.append(work.row(path))
        write_json(folder / "checkpoint_scores.json", report | {"cache": work.cache})  # a stopped scan loses nothing
    for split in work.rows:
        key = f"{split}_spearman"
        good = [row for row in rows if key in row.get("scores", {})]
        best = max(good, key=lambda row: (row["scores"][key], row["file"].endswith(".pt")), default=None)
        report[f"best_by_{split}"] = best and {"file": best["file"], "step": best["step"], **best["scores"]}
    report |= {"evaluated": work.evaluated, "bad": sum("error" in row for row in rows)}
    write_json(folder / "checkpoint_scores.json", report | {"cache": work.cache})
    figure = Figure(figsize=(8, 4.5), layout="tight")
    scored = [{"step": row["step"], **row.get("scores", {})} for row in rows if row["file"].endswith(".pt")]
    plot_spearman(figure.subplots(), scored, report["teacher"], cfg["sts_name"])
    write_atomic(folder / "checkpoint_scores.png", lambda file: figure.savefig(file, dpi=100))
    return report


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    keys = [f"{split}_{metric}" for split in report["splits"] for metric in ("pearson", "spearman")]
    head = "".join(f"{key.replace('validation', 'val').replace('_', ' '):>14}" for key in keys)
    recorded = "".join(f"{'recorded ' + s.replace('validation', 'val'):>15}" for s in report["splits"])
    lines = [f"{'file':<24}{'step':>8}{head}{recorded}  agree"]
    number = lambda value, width: f"{value:>{width}.4f}" if value is not None else f"{'-':>{width}}"  # noqa: E731
    teacher = {"file": "teacher", "step": "", "scores": report["teacher"], "recorded": {}, "agrees": None}
    for r in [*report["files"], teacher]:
        line = f"{r['file']:<24}{r['step'] if r['step'] is not None else '-':>8}"
        if "error" in r:
            lines.append(f"{line}  error: {r['error']}")
            continue
        line += "".join(number(r["scores"].get(k), 14) for k in keys)
        line += "".join(number(r["recorded"].get(f"{s}_spearman"), 15) for s in report["splits"])
        lines.append(f"{line}  {({True: 'yes', False: 'NO', None: '-'})[r['agrees']]}")
    for split in report["splits"]:
        if best := report[f"best_by_{split}"]:
            score = best[f"{split}_spearman"]
            lines.append(f"best by {split}: {best['file']}, step {best['step']}, Spearman {score:.4f}")
    return "\n".join([*lines, f"{report['evaluated']} evaluations run, the rest was known; {report['bad']} bad files"])


def count(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 if all files were evaluated, 1 if some are bad, 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="folder of a training run")
    parser.add_argument("--split", choices=list(SPLITS), help="only this split (default: both)")
    parser.add_argument("--every", type=count, default=1, metavar="N", help="only every N-th, back from the newest")
    parser.add_argument("--limit", type=count, default=0, metavar="N", help="at most N checkpoints, spread evenly")
    parser.add_argument("--last", type=count, default=0, metavar="N", help="only the newest N checkpoints")
    for key in RUN_KEYS:
        parser.add_argument(f"--{key}", help="as in training" + " (default: the run's)" * (key != "device"))
    return run_helper(parser, argv, scan, table, lambda report: report["bad"] > 0)


if __name__ == "__main__":
    sys.exit(main())
