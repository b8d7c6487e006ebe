"""Run MTEB tasks on checkpoints, saved models and the teacher, with the mteb package (requirements-eval.txt).

    python test_mteb_local.py --checkpoint runs/first/checkpoint_25000.pt --data_dir DIR
    python test_mteb_local.py --checkpoint sentence-transformers/all-MiniLM-L6-v2 --tasks STS12 STS13 STSBenchmark
    python test_mteb_local.py --checkpoint runs/first --compare results/best sentence-transformers/all-MiniLM-L6-v2
    python test_mteb_local.py --checkpoint runs/first --benchmark "MTEB(eng, v2)"

With --data_dir, STSBenchmark reads sts/stsb-test.tsv.gz and an STS task NAME reads sts/NAME.tsv.gz (sentence1,
sentence2, score); every other task needs the hub. A task whose data cannot be had is reported as not run, and the exit
status is then 1. Results go to mteb_results/ in mteb's own layout, with summary.md and summary.json.
"""
from __future__ import annotations

import argparse
import difflib
import logging
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from train_6layer_deltanet import (STS_ROWS, UserError, config, file_sha256, find_teacher, first_line, load_teacher,
                                   read_record, read_student, read_sts_file, run_helper, save_model, student_from,
                                   write_json, write_text)

# Main scores of all-MiniLM-L6-v2 on the MTEB leaderboard, in percent (multilingual tasks: English).
PUBLISHED = {"BIOSSES": 81.64, "SICK-R": 77.58, "STS12": 72.37, "STS13": 80.60, "STS14": 75.59, "STS15": 85.39,
             "STS16": 78.99, "STS17": 87.59, "STS22": 67.21, "STSBenchmark": 82.03}
LOCAL_NAMES = {"STSBenchmark": "stsb-test"}


def require_libraries() -> tuple[Any, Any]:
    """mteb and sentence_transformers, or a UserError that says how to install them."""
    try:
        import mteb
        import sentence_transformers
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install -r requirements-eval.txt") from None
    return mteb, sentence_transformers


def clean(text: str) -> str:
    """`text` with only letters, digits, dots and dashes, as part of a model's name."""
    return re.sub(r"[^\w.-]+", "_", text).strip("_.") or "model"


def open_model(name: str, teacher_model: str | None, device: str | None, int8: bool, scratch: Path) -> Any:
    """mteb's encoder of a checkpoint, a saved folder or a hub id; its revision is the weights' hash and the step.

    With `int8` a student multiplies in int8, on the CPU; other models stay as they are. A checkpoint is first saved as
    a folder in `scratch`, so that what is measured is what a user loads.
    """
    mteb, sentence_transformers = require_libraries()
    path, revision = Path(name), None
    if path.is_dir() and (path / "modules.json").is_file() and not (path / "modeling_deltanet.py").is_file():
        weights = next((path / w for w in ("model.safetensors", "pytorch_model.bin") if (path / w).is_file()), None)
        if weights is None:
            raise UserError(f"{path}: holds neither model.safetensors nor pytorch_model.bin")
        folder, label, revision = path, f"local/{clean(path.resolve().name)}", file_sha256(weights)[:16]
    elif path.exists():
        state, cfg, info = read_student(path)
        file = Path(info["file"]).resolve()
        label = f"local/{clean(file.parent.name)}" + (f"-{clean(file.stem)}" if info["kind"] == "checkpoint" else "")
        revision = f"step{info['step']}-{info['sha256'][:16]}"
        teacher, tokenizer, _ = load_teacher(cfg | ({"teacher_model": teacher_model} if teacher_model else {}))
        student = student_from(state, cfg, info["file"], teacher)  # also where a folder's weights are checked
        whole = info["kind"] == "model" and (file.parent / "modules.json").is_file()
        folder = file.parent if whole else scratch / f"model_{info['sha256'][:16]}"
        if not whole:
            save_model(folder, student, tokenizer, cfg, {"step": info["step"]})
    elif re.fullmatch(r"\w[\w.-]*/[\w.-]+(?<!\.pt)(?<!\.bin)(?<!\.safetensors)", name):
        folder, label = Path(name), name
        if name == config["teacher_model"]:
            folder = find_teacher(name)[0]
            revision = file_sha256(folder / "model.safetensors")[:16]
    else:
        raise UserError(f"{name}: no such checkpoint or folder, and not a hub id (OWNER/NAME)")
    options = {}
    if int8 and (folder / "modeling_deltanet.py").is_file():
        if "int8" not in (folder / "modeling_deltanet.py").read_text():
            raise UserError(f"{folder}: its modeling_deltanet.py knows no int8; save the model again")
        label, device, options = f"{label}-int8", "cpu", {"config_kwargs": {"int8": True}}
    try:
        model = sentence_transformers.SentenceTransformer(str(folder), trust_remote_code=path.exists(), device=device,
                                                          **options)
    except Exception as error:  # the hub's client and four libraries raise unrelated types
        raise UserError(f"{name}: cannot be opened ({first_line(error)[:200]})") from None
    encoder = mteb.SentenceTransformerEncoderWrapper(model)
    revision = revision or getattr(model.model_card_data, "base_model_revision", None)
    if revision is None:
        raise UserError(f"{name}: its revision is not known, so its results cannot be told from others'; download it "
                        "into a folder and give that")
    # mteb keeps results by name and revision: both must say which weights these are.
    encoder.mteb_model_meta = encoder.mteb_model_meta.model_copy(update={"name": label, "revision": revision})
    return encoder


def no_such(kind: str, name: str, known: list[str]) -> UserError:
    """mteb has no `kind` of this `name`; the closest one of `known`."""
    close = difflib.get_close_matches(name, known, 1)
    return UserError(f"mteb has no {kind} {name!r}" + (f": did you mean {close[0]!r}?" if close else ""))


def choose_tasks(names: list[str] | None, benchmark: str | None) -> list[Any]:
    """The tasks by name, English only; UserError for a name that mteb does not know."""
    mteb, _ = require_libraries()
    if benchmark:
        try:
            tasks = list(mteb.get_benchmark(benchmark).tasks)
        except KeyError:
            raise no_such("benchmark", benchmark, [b.name for b in mteb.get_benchmarks()]) from None
        known_tasks = {task.metadata.name for task in tasks}
        if missing := [n for n in names or [] if n not in known_tasks]:
            raise UserError(f"{missing[0]}: is not in {benchmark}")
        return [t for t in tasks if not names or t.metadata.name in names]
    tasks = []
    for name in dict.fromkeys(names or ["STSBenchmark"]):
        try:
            task = mteb.get_task(name)
        except KeyError:
            raise no_such("task", name, [t.metadata.name for t in mteb.get_tasks()]) from None
        if task.metadata.is_multilingual:
            task = mteb.get_task(name, languages=["eng"], exclusive_language_filter=True)
        tasks.append(task)
    return tasks


def give_data(task: Any, data_dir: str) -> str:
    """Load a task's data, from `data_dir` if it is there; returns its origin. Raises UserError if it cannot be had."""
    name = task.metadata.name
    path = Path(data_dir) / "sts" / f"{LOCAL_NAMES.get(name, name)}.tsv.gz"
    if data_dir and task.metadata.type == "STS" and path.is_file():
        from datasets import Dataset
        rows = read_sts_file(path)
        if not rows or (name == "STSBenchmark" and len(rows) != STS_ROWS["test"]):
            raise UserError(f"{path}: {len(rows)} pairs" + (f", expected exactly {STS_ROWS['test']}" if rows else ""))
        first, second, gold = (list(column) for column in zip(*rows))
        found = Dataset.from_dict({"sentence1": first, "sentence2": second, "score": gold})
        data = {split: found for split in task.eval_splits}
        task.dataset = {task.hf_subsets[0]: data} if task.metadata.is_multilingual else data
        if task.metadata.is_multilingual:
            task.hf_subsets = task.hf_subsets[:1]
        task.data_loaded = True
        return f"{path.name}, sha256 {file_sha256(path)[:16]}"
    try:
        task.load_data()
    except Exception as error:  # the hub's client raises a dozen unrelated types
        looked = f" {path}" if task.metadata.type == "STS" and data_dir else ""
        raise UserError(f"no local file{looked}, and the hub gave none ({first_line(error)[:160]})") from None
    return f"hub, {task.metadata.dataset['path']}"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Every task on every model; returns and writes the summary."""
    mteb, _ = require_libraries()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if args.data_dir and not Path(args.data_dir).is_dir():
        raise UserError(f"data_dir {args.data_dir}: no such folder")
    tasks, folder = choose_tasks(args.tasks, args.benchmark), Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    cache = mteb.ResultCache(cache_path=folder)
    origins, not_run, models = {}, {}, []
    used = read_record(folder / "data.json")  # which data a kept result is of: mteb does not look at it
    with tempfile.TemporaryDirectory() as scratch:
        encoders = [open_model(name, args.teacher_model, args.device, args.int8, Path(scratch))
                    for name in [args.checkpoint, *args.compare]]
        for task in tasks:
            try:
                origins[task.metadata.name] = give_data(task, args.data_dir)
            except UserError as error:
                not_run[task.metadata.name] = str(error)
        for encoder in encoders:
            meta, scores = encoder.mteb_model_meta, {}
            for task in (t for t in tasks if t.metadata.name in origins):
                name, key = task.metadata.name, f"{meta.name} {meta.revision} {task.metadata.name}"
                kept = not args.overwrite and used.get(key) == origins[name]
                found = mteb.evaluate(encoder, task, cache=cache, raise_error=False, co2_tracker=False,
                                      overwrite_strategy="only-missing" if kept else "always",
                                      show_progress_bar=not args.json)
                if not found.task_results:
                    reason = first_line(found.exceptions[0].exception) if found.exceptions else "no result"
                    not_run[f"{name}, {meta.name}"] = f"failed: {reason[:160]}"
                    continue
                scores[name] = float(found.task_results[0].get_score())
                used[key] = origins[name]
                write_json(folder / "data.json", used)
            models.append({"model": meta.name, "revision": meta.revision, "scores": scores})
    names = [task.metadata.name for task in tasks]
    summary = {"mteb": mteb.__version__, "tasks": names, "data": origins, "models": models,
               "published_teacher": {name: PUBLISHED[name] / 100 for name in names if name in PUBLISHED},
               "not_run": not_run}
    write_json(folder / "summary.json", summary)
    write_text(folder / "summary.md", page(summary))
    return summary


def page(summary: dict[str, Any]) -> str:
    """The summary as a page of Markdown that also reads well in a terminal."""
    number = lambda scores, task: f"{scores[task]:.4f}" if task in scores else "not run"  # noqa: E731
    rows = [["task", *(m["model"] for m in summary["models"]), "all-MiniLM-L6-v2, published"]]
    for task in summary["tasks"]:
        rows.append([task, *(number(m["scores"], task) for m in summary["models"]),
                     number(summary["published_teacher"], task).replace("not run", "-")])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    notes = [f"- {m['model']}: revision {m['revision']}" for m in summary["models"]]
    notes += [f"- {task}: data from {origin}" for task, origin in summary["data"].items()]
    notes += [f"- {task}: NOT RUN: {reason}" for task, reason in summary["not_run"].items()]
    return "\n".join([f"# MTEB main scores (mteb {summary['mteb']})", "", *lines, "", *notes]) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 if every task ran on every model, 1 if one did not, 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="checkpoint file, saved folder, or hub id")
    parser.add_argument("--compare", nargs="+", default=[], metavar="PATH", help="more of them, for a table")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="MTEB tasks (default: STSBenchmark)")
    parser.add_argument("--benchmark", help='a benchmark\'s tasks, such as "MTEB(eng, v2)"')
    parser.add_argument("--data_dir", default="",
                        help="folder with sts/stsb-test.tsv.gz or sts/NAME.tsv.gz (default: the hub)")
    parser.add_argument("--output_dir", default="mteb_results", help="where results go (default: %(default)s)")
    parser.add_argument("--teacher_model", help="teacher's folder or id (default: the checkpoint's)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--int8", action="store_true", help="local students multiply in int8, on the CPU")
    parser.add_argument("--overwrite", action="store_true", help="run again what is already in the output folder")
    return run_helper(parser, argv, run, page, lambda summary: bool(summary["not_run"]))


if __name__ == "__main__":
    sys.exit(main())
