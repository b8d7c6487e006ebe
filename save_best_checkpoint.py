"""Write a checkpoint's student as a folder that sentence-transformers and transformers open.

    python save_best_checkpoint.py runs/first/checkpoint_25000.pt        into runs/first
    python save_best_checkpoint.py best --run_dir runs/first             by name: best, last, a step, a file's name
    python save_best_checkpoint.py results/best --output_dir out         the full folder of a compact export
    python save_best_checkpoint.py best --export_trained results/best    the compact form: trained tensors in float16
    python save_best_checkpoint.py A --average B C --output_dir soup     the mean of several students' weights
    python save_best_checkpoint.py best --onnx                           also onnx/model.onnx
    python save_best_checkpoint.py best --int8 --data_dir DIR            also onnx/model_qint8.onnx, checked on STS-B
    python save_best_checkpoint.py best --push_to_hub OWNER/NAME         also a model of the hub

--onnx and --int8 need requirements-eval.txt; how they are built and how fast they are: docs/speed.md.
"""
from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import Tensor

import train_6layer_deltanet as script
from delta_onnx import export_int8, export_onnx, need
from train_6layer_deltanet import (ARCHITECTURE_KEYS, FOLDER_KEYS, HUB_SOURCES, DeltaNetStudent, RunLock, UserError,
                                   checkpoint_steps, config, file_sha256, find_checkpoint, first_line, load_teacher,
                                   read_record, read_student, run_helper, save_model, student_from, trainable_state,
                                   write_atomic, write_json, write_text)

CARD_MARK = "library_name: sentence-transformers"


def find_source(name: str, run_dir: Path) -> tuple[Path, str]:
    """The file or folder that `name` means, and how it was chosen. Bare names and steps are looked up in `run_dir`."""
    path = Path(name)
    if path.exists():
        return path, f"{path.name} was named by hand"
    if path.parent != Path("."):
        raise UserError(f"{name}: no such file or folder")
    if not run_dir.is_dir():
        raise UserError(f"{name}: no such file, and no folder {run_dir} to look in; set --run_dir")
    steps = checkpoint_steps(run_dir)
    if name == "last":
        found = find_checkpoint(run_dir, -1, log=lambda line: print(line, file=sys.stderr))
        if found is None:
            raise UserError(f"{run_dir}: holds no whole checkpoint")
        return found, "it is the newest whole checkpoint of its run"
    if name == "best":
        scored = []
        for step in steps:
            try:
                _, cfg, info = read_student(run_dir / f"checkpoint_{step}.pt")
            except UserError as error:
                print(f"warning: passing over {error}", file=sys.stderr)
                continue
            if (score := measured_scores(info).get(f"{cfg['best_model_split']}_spearman")) is not None:
                scored.append((score, -step, cfg["best_model_split"]))
        if not scored:
            raise UserError(f"{run_dir}: no checkpoint with a recorded score; run test_checkpoints.py on it, or name "
                            f"one of the steps {steps if steps else '(there are none)'}")
        score, step, split = max(scored)
        return run_dir / f"checkpoint_{-step}.pt", f"it has the highest {split} Spearman of the run's checkpoints"
    number = name.removeprefix("checkpoint_").removesuffix(".pt")
    if number.isdigit() and int(number) in steps:
        return run_dir / f"checkpoint_{int(number)}.pt", f"step {int(number)} was named by hand"
    raise UserError(f"{name}: neither a path nor a checkpoint of {run_dir}, which has steps "
                    f"{steps if steps else 'none'}; give a path, a step, best or last")


def measured_scores(info: dict[str, Any]) -> dict[str, float]:
    """The scores recorded in training, else those that test_checkpoints.py measured of the same bytes."""
    if info["scores"]:
        return info["scores"]
    for row in read_record(Path(info["file"]).parent / "checkpoint_scores.json").get("files", []):
        if row.get("sha256") == info["sha256"] and row.get("scores"):
            return row["scores"]
    return {}


def refuse_worse(folder: Path, record_name: str, weights: str, info: dict[str, Any], split: str) -> None:
    """UserError if `folder` holds a model that is better than `info`'s by the recorded Spearman, or may be."""
    old, key = read_record(folder / record_name), f"{split}_spearman"
    if not (folder / weights).is_file() or info["sha256"] in (old.get("sha256"), old.get("source_sha256")):
        return
    ours, theirs = info["scores"].get(key), old.get(key)
    if not isinstance(theirs, (int, float)) or not math.isfinite(theirs):
        raise UserError(f"{folder}: holds a {weights} without a recorded {key}; --force overwrites it")
    if ours is None:
        raise UserError(f"{info['file']}: has no recorded {key}, {folder} holds a model with {theirs:.4f}; measure it "
                        "with test_checkpoints.py, or --force")
    if old.get("evaluation") != info["evaluation"]:
        raise UserError(f"{folder}: its model was scored on {old.get('evaluation')}, this one on {info['evaluation']}; "
                        "they cannot be compared; --force overwrites it")
    if theirs > ours:
        raise UserError(f"{folder}: holds a better model (step {old.get('step')}, {key} {theirs:.4f}; this one has "
                        f"{ours:.4f}); --force overwrites it")


def card_header(cfg: dict[str, Any], info: dict[str, Any]) -> str:
    """The YAML by which the hub lists a model, with STS-B scores as those of mteb's STSBenchmark, in percent."""
    origin, usual = cfg["teacher_model"], cfg["teacher_model"] == config["teacher_model"]
    results = [huggingface_hub.EvalResult(
        task_type="STS", dataset_type="mteb/stsbenchmark-sts", dataset_name="MTEB STSBenchmark",
        dataset_config="default", dataset_split=split, dataset_revision="b0fddb56ed78048fa8b90373c8a3cfc37b684831",
        metric_type=f"cosine_{metric}", metric_value=round(100 * info["scores"][f"{split}_{metric}"], 4))
        for split in ("test", "validation") for metric in ("pearson", "spearman")
        if info["evaluation"] == "stsb" and f"{split}_{metric}" in info["scores"]]
    return huggingface_hub.ModelCardData(
        language="en", license="apache-2.0" if usual else "other", library_name="sentence-transformers",
        pipeline_tag="sentence-similarity", base_model=None if Path(origin).is_dir() else origin,
        tags=["sentence-transformers", "feature-extraction", "linear-attention", "deltanet", *["mteb"] * bool(results)],
        model_name=f"hierarchical-deltanet-{'minilm' if usual else Path(origin).name}",
        eval_results=results or None).to_yaml()


def model_card(student: DeltaNetStudent, cfg: dict[str, Any], info: dict[str, Any], chosen: str, place: str) -> str:
    """README.md of a model at `place`: how to load, scores and how they came about, architecture, data, limits."""
    sizes = {name: p.numel() for name, p in student.named_parameters() if name != "projection"}
    total, trained = sum(sizes.values()), sum(sizes.get(name, 0) for name in trainable_state(student))
    c, origin = student.config, cfg["teacher_model"]
    width = student.projection.shape[0] if cfg["keep_projection"] and hasattr(student, "projection") else c.d_model
    licence = "Apache-2.0, as the teacher, whose weights it contains." if origin == config["teacher_model"] else \
        "Its teacher's, whose weights it contains, is to be looked up; the code is under Apache-2.0."
    name = "STS-B" if info["evaluation"] == "stsb" else info["evaluation"]
    teacher = {f"{split}_teacher_agreement": 1.0 for split in ("validation", "test")} | (info["teacher"] or {})
    rows = [f"| {name} {key.replace('_', ', ', 1).replace('_', ' ')} | {value:.4f} | "
            + (f"{teacher[key]:.4f} |" if key in teacher else "not recorded |")
            for key, value in info["scores"].items()]
    scores = "\n".join(["| evaluation | this model | teacher |", "|---|---:|---:|", *rows] if rows
                       else ["No score was recorded."])
    split, first = cfg["best_model_split"], info["init"]
    start = f"Started as {first.get('file')}, step {first.get('step')} of an earlier run" if first else \
        f"Embeddings, norms and FFNs started as the teacher's; projections started {cfg['projection_init']}"
    choice = (f"Checkpoint of step {info['step']}; {chosen}. The run kept its best model by the {split} split"
              + (", so its own test score chose it and is slightly optimistic." if split == "test" else "."))
    if info["kind"] == "export":
        choice += " The weights were stored in float16; the scores are of the float32 weights they were rounded from."
    names = [f"{n} ({HUB_SOURCES[n][0]})" if n in HUB_SOURCES else n for n in info["sources"] or ()]
    data, unmeasured = "The training sources were not recorded", "retrieval, long documents and other languages were"
    if names:
        data = f"Sentence pairs of {len(names)} sources: {', '.join(names)}"
    if cfg["long_share"]:
        data += (f". {cfg['long_share']:.0%} of the steps were of documents of up to {cfg['long_length']:,} tokens, "
                 "with a query each")
        unmeasured = "other languages were"
    parts = [f"{key.replace('_', ' ')}: {'yes' if getattr(c, key) else 'no'}" for key in ARCHITECTURE_KEYS[3:]]
    own = student.word_embeddings.weight.requires_grad
    embeddings = "the embeddings too" if own else "the embeddings are the teacher’s"
    longest = script.longest_read(cfg, first)
    return f"""---
{card_header(cfg, info)}
---

# Hierarchical DeltaNet distilled from {Path(origin).name}

A sentence encoder without attention: {c.num_layers} layers of a delta-rule recurrence, time linear in the length.

## Load

```python
from sentence_transformers import SentenceTransformer
model = SentenceTransformer("{place}", trust_remote_code=True)
vectors = model.encode(["A man is eating food.", "Somebody eats a meal."])  # unit length, {width} numbers each
```

With transformers alone: `AutoModel.from_pretrained("{place}", trust_remote_code=True)` and
`AutoTokenizer.from_pretrained("{place}", trust_remote_code=True)` give `last_hidden_state`; the embedding is its
mean over the real tokens, scaled to unit length. Needs PyTorch 2.6 or newer; the code that runs is
`modeling_deltanet.py`. `SentenceTransformer(..., config_kwargs={{"int8": True}})`, or `int8=True` for AutoModel,
multiplies in int8: faster on a CPU with Numba.

## Scores

{scores}

{choice}

## Architecture

{total:,} parameters, {trained:,} of them trained ({embeddings}).
Width {c.d_model}, {c.num_heads} heads, FFN {c.ffn_size}; {', '.join(parts)}.
{start}. Trained to {info['step']} of
{cfg['total_steps']} steps of {cfg['batch_size']} pairs, seed {cfg['seed']}; every setting is in `training_config.json`.

## Data

{data}. The scored sentences were dropped from the training pairs.

## Limits

English only. Trained on texts of at most {longest} tokens, and `SentenceTransformer` cuts texts there.
Similarities are those of general sentences; {unmeasured} not measured. What is unfair in the
teacher's and the data's view of people is copied too.

## Licence

{licence} The training data have licences of their own, and
some of the sources named above are for non-commercial or research use only: look there before any other use.
"""


def check_hub(name: str) -> None:
    """UserError if `name` cannot be a model of the hub, or there is no token to write with."""
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except ValueError as error:
        raise UserError(f"push_to_hub: {first_line(error)[:160]}") from None
    if name.count("/") != 1:
        raise UserError(f"push_to_hub {name}: must be OWNER/NAME")
    if huggingface_hub.get_token() is None:
        raise UserError("push_to_hub: no token; set HF_TOKEN, or run `hf auth login`")


def push_to_hub(folder: Path, name: str, files: list[str], cfg: dict[str, Any], message: str) -> str:
    """Send `files` of `folder` to the hub's model `name` in one commit; its address.

    The training config goes without the folders of this machine.
    """
    content: dict[str, Any] = {file: folder / file for file in files}
    content["training_config.json"] = json.dumps(cfg | {key: config[key] for key in FOLDER_KEYS}, indent=2).encode()
    try:
        api = huggingface_hub.HfApi()
        address = api.create_repo(name, exist_ok=True)
        api.create_commit(name, [huggingface_hub.CommitOperationAdd(*pair) for pair in content.items()],
                          commit_message=message)
    except Exception as error:  # the client and the library below it raise unrelated types
        reason = first_line(error)[:200]
        raise UserError(f"push_to_hub {name}: {folder} is written, but was not sent ({reason})") from None
    return str(address)


def average_students(states: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    """The weighted mean of students of one architecture, tensor by tensor; the weights are scaled to a sum of 1.

    Model soups (arXiv:2203.05482); of a student and the one it was trained from, WiSE-FT (arXiv:2109.01903).
    """
    total = sum(weights)
    if len(weights) != len(states) or not math.isfinite(total) or total <= 0:
        raise UserError(f"average: {len(states)} students, weights {weights}: one for each is needed, of a sum above 0")
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in states]
    if any(other != shapes[0] for other in shapes):
        raise UserError("average: the students are not of one architecture")
    return {name: sum(state[name] * (w / total) for state, w in zip(states, weights)) for name in states[0]}


def average(args: argparse.Namespace, student: DeltaNetStudent, cfg: dict[str, Any], info: dict[str, Any],
            teacher: Any) -> str:
    """Give `student` the mean of its weights and of those of `--average`; returns what was averaged."""
    states, names = [student.state_dict()], [f"step {info['step']}"]
    weights = args.weights or [1.0] * (1 + len(args.average))
    for name in args.average:
        state, theirs, other = read_student(find_source(name, Path(args.run_dir))[0])
        if any(theirs[key] != cfg[key] for key in ARCHITECTURE_KEYS):
            raise UserError(f"average: {other['file']} is of another architecture than {info['file']}")
        states.append(student_from(state, theirs, other["file"], teacher).state_dict())
        names.append(f"{Path(other['file']).name} of sha256 {other['sha256'][:12]}, step {other['step']}")
    student.load_state_dict(average_students(states, weights))
    return f"it is the average of {'; '.join(f'{n} (weight {w:g})' for n, w in zip(names, weights))}"


def export_trained(folder: Path, student: DeltaNetStudent, cfg: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """The compact form: float16 trained tensors, the training config, the scores with the tensors' sha256."""
    from safetensors.torch import save
    state = {name: t.cpu().half().contiguous() for name, t in trainable_state(student).items()}
    if not all(torch.isfinite(t).all() for t in state.values()):
        raise UserError(f"{folder}: a weight is too large for float16; nothing was written")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").unlink(missing_ok=True)
    write_atomic(folder / "student.safetensors", lambda file: file.write(save(state)))
    write_json(folder / "config.json", cfg | {key: config[key] for key in FOLDER_KEYS})
    write_json(folder / "metrics.json", {**record, "weights": "float16",
                                         "sha256": file_sha256(folder / "student.safetensors")})
    return ["student.safetensors", "config.json", "metrics.json"]


def save(args: argparse.Namespace) -> dict[str, Any]:
    """Do what the command line says; returns what was written."""
    if args.push_to_hub is not None:
        check_hub(args.push_to_hub)
        if args.export_trained:
            raise UserError("push_to_hub: sends a whole folder; leave out --export_trained")
    source, chosen = find_source(args.checkpoint, Path(args.run_dir))
    state, cfg, info = read_student(source)
    chosen = info["chosen"] or chosen
    info["scores"] = {} if args.average else measured_scores(info)  # an average's are not known yet
    home, split = Path(info["file"]).parent, cfg["best_model_split"]
    cfg["keep_projection"] |= args.keep_projection
    folder = Path(args.export_trained or args.output_dir or (args.run_dir if info["kind"] == "export" else home))
    if info["kind"] == "export" and folder.resolve() == home.resolve():
        raise UserError(f"{folder}: holds the export itself; choose another --output_dir")
    card = folder / "README.md"
    if not args.force:
        names = ("metrics.json", "student.safetensors") if args.export_trained else ("scores.json", "pytorch_model.bin")
        refuse_worse(folder, *names, info, split)
        foreign = card.is_file() and CARD_MARK not in card.read_text(encoding="utf-8", errors="replace")
        if foreign and not args.export_trained:
            raise UserError(f"{card}: is not a model card; choose another --output_dir, or --force")
    teacher, tokenizer, _ = load_teacher(cfg | ({"teacher_model": args.teacher_model} if args.teacher_model else {}))
    student = student_from(state, cfg, info["file"], teacher)
    wide = cfg["keep_projection"] and hasattr(student, "projection")
    if wide and "projection" not in state:
        raise UserError(f"{info['file']}: was saved without the map to its teacher's width; give a checkpoint")
    if args.average:
        chosen = average(args, student, cfg, info, teacher)
    record = {"step": info["step"], "evaluation": info["evaluation"], **info["scores"], "best_model_split": split,
              "chosen": chosen, "sources": info["sources"], "teacher": info["teacher"],
              "source": Path(info["file"]).name, "source_sha256": info["sha256"],
              **({"init": info["init"]} if info["init"] else {})}
    result = {"folder": str(folder), "step": info["step"], "scores": info["scores"], "source": info["file"]}
    if args.export_trained:
        return result | {"files": export_trained(folder, student, cfg, record)}
    if args.onnx or args.int8:
        need("onnx", "onnxruntime")
    onnx, int8 = folder / "onnx" / "model.onnx", folder / "onnx" / "model_qint8.onnx"  # sentence-transformers' places
    with ExitStack() as stack:
        if (folder / ".lock").exists():  # a training writes its best model here
            stack.callback(RunLock(folder, lambda line: None).release)
        for file in (onnx, int8):
            file.unlink(missing_ok=True)  # of other weights
        files = save_model(folder, student, tokenizer, cfg, record)
        write_text(card, model_card(student, cfg, info, chosen, args.push_to_hub or "FOLDER"))
    if args.onnx or args.int8:
        if wide:
            print(f"note: {onnx.parent}: gives {cfg['d_model']} numbers; the map to the teacher's width is 2_Dense",
                  file=sys.stderr)
        with tempfile.TemporaryDirectory() as scratch:
            try:
                result["onnx"] = export_onnx(student, onnx, Path(scratch))
                if args.int8:
                    data = {"data_dir": args.data_dir, "sts_name": "auto"} if args.data_dir else {}
                    result["onnx"] |= export_int8(tokenizer, onnx, int8, Path(scratch), cfg | data, bool(args.data_dir))
            except (RuntimeError, ValueError, TypeError) as error:  # of onnxruntime
                raise UserError(f"{folder}: the ONNX export failed ({first_line(error)[:160]})") from None
    files += ["README.md", *(f"onnx/{file.name}" for file in (onnx, int8) if file.is_file())]
    if args.push_to_hub:
        result["hub"] = push_to_hub(folder, args.push_to_hub, files, cfg, f"Step {info['step']}: {chosen}"[:200])
    return result | {"files": sorted(files)}


def page(result: dict[str, Any]) -> str:
    """What was written, for people."""
    lines = [f"{result['source']} (step {result['step']}) -> {result['folder']}"]
    for key, value in [*result["scores"].items(), *result.get("onnx", {}).items()]:
        lines.append(f"  {key:<24} {value:.4g}" if isinstance(value, float) else f"  {key:<24} {value}")
    return "\n".join([*lines, *([f"  hub: {result['hub']}"] if "hub" in result else []),
                      "  files: " + ", ".join(result["files"])])


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 when the model was written, 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("checkpoint", help="checkpoint file, saved folder, or in --run_dir: a file name, a step, best, last")
    add("--output_dir", help="folder to write (default: the checkpoint's own; for an export, --run_dir)")
    add("--run_dir", default=config["output_dir"], help="where bare names are looked up (default: %(default)s)")
    add("--teacher_model", help="teacher's folder or id (default: the one it was trained with)")
    add("--export_trained", metavar="DIR", help="write only the compact form, into DIR")
    add("--average", nargs="+", default=[], metavar="STUDENT", help="average its weights with these students'")
    add("--weights", nargs="+", type=float, help="of CHECKPOINT and of each of --average (default: equal)")
    add("--onnx", action="store_true", help="also write onnx/model.onnx, checked with onnxruntime")
    add("--int8", action="store_true", help="also write onnx/model_qint8.onnx, and onnx/model.onnx")
    add("--data_dir", help="folder with sts/stsb-dev.tsv.gz for --int8 (default: the training's)")
    add("--push_to_hub", metavar="OWNER/NAME", help="also send what was written to this model of the hub")
    add("--keep_projection", action="store_true", help="also save the map to a wider teacher's width")
    add("--force", action="store_true", help="overwrite a better model")
    return run_helper(parser, argv, save, page)


if __name__ == "__main__":
    sys.exit(main())
