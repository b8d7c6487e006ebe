"""Write a checkpoint's student as a folder that sentence-transformers and transformers open.

    python save_best_checkpoint.py runs/first/checkpoint_25000.pt             into runs/first
    python save_best_checkpoint.py best --run_dir runs/first --output_dir out  by name: best, last, 25000, checkpoint_25000.pt
    python save_best_checkpoint.py results/best --output_dir out              the full folder of a compact export
    python save_best_checkpoint.py best --export_trained results/best         the compact form: trained tensors in float16
    python save_best_checkpoint.py A --average B C --output_dir soup          the mean of several students' weights
    python save_best_checkpoint.py best --onnx                                also model.onnx (needs requirements-eval.txt)
"""
from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from torch import Tensor

import train_6layer_deltanet as script
from train_6layer_deltanet import (ARCHITECTURE_KEYS, HUB_SOURCES, DeltaNetStudent, RunLock, UserError, checkpoint_steps, config,
                                   file_sha256, find_checkpoint, load_teacher, read_record, read_student, save_model, student_from,
                                   trainable_state, write_atomic, write_json)

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
            raise UserError(f"{run_dir}: no checkpoint with a recorded score; run test_checkpoints.py on it, or name one of "
                            f"the steps {steps if steps else '(there are none)'}")
        score, step, split = max(scored)
        return run_dir / f"checkpoint_{-step}.pt", f"it has the highest {split} Spearman of the run's checkpoints"
    number = name.removeprefix("checkpoint_").removesuffix(".pt")
    if number.isdigit() and int(number) in steps:
        return run_dir / f"checkpoint_{int(number)}.pt", f"step {int(number)} was named by hand"
    raise UserError(f"{name}: neither a path nor a checkpoint of {run_dir}, which has steps {steps if steps else 'none'}; "
                    "give a path, a step, best or last")


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
        raise UserError(f"{info['file']}: has no recorded {key}, {folder} holds a model with {theirs:.4f}; measure it with "
                        "test_checkpoints.py, or --force")
    if old.get("evaluation") != info["evaluation"]:
        raise UserError(f"{folder}: its model was scored on {old.get('evaluation')}, this one on {info['evaluation']}; they "
                        "cannot be compared; --force overwrites it")
    if theirs > ours:
        raise UserError(f"{folder}: holds a better model (step {old.get('step')}, {key} {theirs:.4f}; this one has {ours:.4f}); "
                        "--force overwrites it")


def model_card(student: DeltaNetStudent, cfg: dict[str, Any], info: dict[str, Any], chosen: str) -> str:
    """README.md of a saved folder: how to load, scores and how they came about, architecture, data, limits, licence."""
    total, c = sum(p.numel() for p in student.parameters()), student.config
    trained = sum(t.numel() for t in trainable_state(student).values())
    teacher = info["teacher"] or {}
    name = "STS-B" if info["evaluation"] == "stsb" else info["evaluation"]
    rows = "".join(f"| {name} {key.replace('_', ', ', 1).replace('_', ' ')} | {value:.4f} | "
                   + (f"{teacher[key]:.4f} |\n" if key in teacher else "not recorded |\n") for key, value in info["scores"].items())
    scores = f"| evaluation | this model | teacher |\n|---|---:|---:|\n{rows}" if rows else "No score was recorded.\n"
    split, first = cfg["best_model_split"], info["init"] or {}
    start = f"Started as {first.get('file')}, step {first.get('step')} of an earlier run" if first else \
        f"Embeddings, norms and FFNs started as the teacher's; projections started {cfg['projection_init']}"
    choice = (f"Checkpoint of step {info['step']}; {chosen}. The run kept its best model by the {split} split"
              + (", so its own test score chose it and is slightly optimistic." if split == "test" else "."))
    if info["kind"] == "export":
        choice += " The weights were stored in float16; the scores are of the float32 weights they were rounded from."
    names = [f"{n} ({HUB_SOURCES[n][0]})" if n in HUB_SOURCES else n for n in info["sources"] or ()]
    data = f"Sentence pairs of {len(names)} sources: {', '.join(names)}" if names else "The training sources were not recorded"
    if cfg["long_share"]:
        data += f". {cfg['long_share']:.0%} of the steps were of documents of up to {cfg['long_length']:,} tokens, with a query each"
    unmeasured = "other languages were" if cfg["long_share"] else "retrieval, long documents and other languages were"
    parts = [f"{key.replace('_', ' ')}: {'yes' if getattr(c, key) else 'no'}" for key in ARCHITECTURE_KEYS[3:]]
    return f"""---
language: en
license: apache-2.0
{CARD_MARK}
pipeline_tag: sentence-similarity
base_model: {cfg['teacher_model'] if not Path(cfg['teacher_model']).is_dir() else config['teacher_model']}
tags: [sentence-transformers, feature-extraction, linear-attention, deltanet]
---

# Hierarchical DeltaNet distilled from all-MiniLM-L6-v2

A sentence encoder without attention: {c.num_layers} layers of a delta-rule recurrence, time linear in the text's length.

## Load

```python
from sentence_transformers import SentenceTransformer
model = SentenceTransformer("FOLDER", trust_remote_code=True)
vectors = model.encode(["A man is eating food.", "Somebody eats a meal."])  # unit length, {c.d_model} numbers each
```

With transformers alone: `AutoModel.from_pretrained("FOLDER", trust_remote_code=True)` and
`AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)` give `last_hidden_state`; the embedding is its mean over
the real tokens, scaled to unit length. Needs PyTorch 2.6 or newer; the code that runs is `modeling_deltanet.py`.

## Scores

{scores}
{choice}

## Architecture

{total:,} parameters, {trained:,} of them trained ({'the embeddings too' if cfg['train_embeddings'] else 'the embeddings are the teacher’s'}).
Width {c.d_model}, {c.num_heads} heads, FFN {c.ffn_size}; {', '.join(parts)}.
{start}. Trained to {info['step']} of
{cfg['total_steps']} steps of {cfg['batch_size']} pairs, seed {cfg['seed']}; every setting is in `training_config.json`.

## Data

{data}. The scored sentences were dropped from the training pairs.

## Limits

English only. Trained on texts of at most {script.longest_read(cfg, info['init'])} tokens, and `SentenceTransformer` cuts texts there.
Similarities are those of general sentences; {unmeasured} not measured. What is unfair in the
teacher's and the data's view of people is copied too.

## Licence

Apache-2.0, as the teacher, whose weights it contains. The training data have licences of their own, and
some of the sources named above are for non-commercial or research use only: look there before a use that is not research.
"""


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
    write_json(folder / "config.json", cfg | {key: config[key] for key in script.FOLDER_KEYS})
    write_json(folder / "metrics.json", {**record, "weights": "float16", "sha256": file_sha256(folder / "student.safetensors")})
    return ["student.safetensors", "config.json", "metrics.json"]


class ScanRecurrence:
    """Stands in for the parts that ONNX cannot express, with the same results: the parallel form needs a triangular solve,
    which ONNX has not, and its doubling depends on the length. So the recurrence itself is exported, as one ONNX Scan."""

    @staticmethod
    def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, transition: Tensor, read: Tensor, **_: Any) -> tuple[Tensor, None]:
        """`recurrent_hierarchical_delta_rule` for (H, B, T, ...) without an initial state."""
        from torch._higher_order_ops.scan import scan

        def step(state: Tensor, at: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            q, k, v, beta, m, r = at
            state = (m[..., None, None] * state.unsqueeze(-4)).sum(-3)
            error = v.unsqueeze(-2) - (state * k[..., None, :, None]).sum(-2)
            state = state + (beta.unsqueeze(-1) * k)[..., None, :, None] * error.unsqueeze(-2)
            return state, ((r[..., None, None] * state).sum(-3) * q.unsqueeze(-1)).sum(-2)

        start = q.new_zeros(*q.shape[:2], 2, q.shape[-1], v.shape[-1])
        return scan(step, start, tuple(x.movedim(2, 0).contiguous() for x in (q, k, v, beta, transition, read)))[1].movedim(0, 2), None

    @staticmethod
    def apply(x: Tensor, w: Tensor) -> Tensor:
        """`ShortConvolution.apply` without writing in place."""
        padded = F.pad(x, (0, 0, len(w) - 1, 0))
        return sum(padded[..., len(w) - 1 - i:padded.shape[-2] - i, :] * w[i] for i in range(len(w)))


class OnnxModel(nn.Module):
    """(input_ids, attention_mask) -> last_hidden_state and the unit sentence_embedding."""

    def __init__(self, student: DeltaNetStudent):
        super().__init__()
        self.student = student

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.student(input_ids, attention_mask).last_hidden_state
        return hidden, script.mean_pool(hidden, attention_mask)


@torch.no_grad()
def export_onnx(student: DeltaNetStudent, path: Path, temporary: Path) -> dict[str, Any]:
    """Write model.onnx with dynamic batch and length; returns its largest difference from the student at each length."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install -r requirements-eval.txt") from None
    generator = torch.Generator().manual_seed(0)

    def example(batch: int, length: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(1000, student.config.vocab_size, (batch, length), generator=generator)
        return ids, (torch.arange(length) < torch.linspace(length, max(1, length // 2), batch).long()[:, None]).long()

    names, dims = ("input_ids", "attention_mask"), {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    kept = script.ShortConvolution, [mixer.delta_rule for mixer in student.deltanet_layers]
    script.ShortConvolution = ScanRecurrence
    for mixer in student.deltanet_layers:
        mixer.delta_rule = ScanRecurrence.delta_rule
    try:
        torch.onnx.export(OnnxModel(student).eval(), example(3, 21), dynamo=True, verbose=False, input_names=names,
                          output_names=("last_hidden_state", "sentence_embedding"),
                          dynamic_shapes={name: dims for name in names}).save(temporary, external_data=False)
    finally:
        script.ShortConvolution = kept[0]
        for mixer, delta_rule in zip(student.deltanet_layers, kept[1]):
            mixer.delta_rule = delta_rule
    session, result = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"]), {}
    for length in (5, 37, 128, 512):
        inputs = example(2, length)
        found = session.run(None, {name: x.numpy() for name, x in zip(names, inputs)})
        expected = OnnxModel(student).eval()(*inputs)
        real = inputs[1].bool()  # what stands at padding is nobody's
        result[f"onnx_error_{length}"] = max((torch.from_numpy(found[0]) - expected[0])[real].abs().max().item(),
                                             (torch.from_numpy(found[1]) - expected[1]).abs().max().item())
    if not max(result.values()) < 1e-4:
        raise UserError(f"{path}: onnxruntime differs from the student by {max(result.values()):.1e}; nothing was written")
    write_atomic(path, lambda file: file.write(temporary.read_bytes()))
    return result


def save(args: argparse.Namespace) -> dict[str, Any]:
    """Do what the command line says; returns what was written."""
    source, chosen = find_source(args.checkpoint, Path(args.run_dir))
    state, cfg, info = read_student(source)
    chosen = info.get("chosen") or chosen
    info["scores"] = {} if args.average else measured_scores(info)  # an average's are not known yet
    home, split = Path(info["file"]).parent, cfg["best_model_split"]
    folder = Path(args.export_trained or args.output_dir or (args.run_dir if info["kind"] == "export" else home))
    if info["kind"] == "export" and folder.resolve() == home.resolve():
        raise UserError(f"{folder}: holds the export itself; choose another --output_dir")
    card = folder / "README.md"
    if not args.force:
        names = ("metrics.json", "student.safetensors") if args.export_trained else ("scores.json", "pytorch_model.bin")
        refuse_worse(folder, *names, info, split)
        if not args.export_trained and card.is_file() and CARD_MARK not in card.read_text(encoding="utf-8", errors="replace"):
            raise UserError(f"{card}: is not a model card; choose another --output_dir, or --force")
    teacher, tokenizer, _ = load_teacher(cfg | ({"teacher_model": args.teacher_model} if args.teacher_model else {}))
    student = student_from(state, cfg, info["file"], teacher)
    if args.average:
        chosen = average(args, student, cfg, info, teacher)
    record = {"step": info["step"], "evaluation": info["evaluation"], **info["scores"], "best_model_split": split,
              "chosen": chosen, "sources": info["sources"], "teacher": info["teacher"],
              "source": Path(info["file"]).name, "source_sha256": info["sha256"],
              **({"init": info["init"]} if info["init"] else {})}
    result = {"folder": str(folder), "step": info["step"], "scores": info["scores"], "source": info["file"]}
    if args.export_trained:
        return result | {"files": export_trained(folder, student, cfg, record)}
    lock = RunLock(folder, lambda line: None) if (folder / ".lock").exists() else None  # a training writes its best model here
    try:
        save_model(folder, student, tokenizer, cfg, record)
        write_atomic(card, lambda file: file.write(model_card(student, cfg, info, chosen).encode()))
    finally:
        if lock:
            lock.release()
    if args.onnx:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                result["onnx"] = export_onnx(student, folder / "model.onnx", Path(scratch) / "model.onnx")
            except (RuntimeError, ValueError, TypeError) as error:  # of torch's exporter or onnxruntime
                raise UserError(f"{folder}: the ONNX export failed ({(str(error).splitlines() or [''])[0][:160]})") from None
    return result | {"files": sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()
                                     and not p.name.startswith((".", "checkpoint_")))}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 when the model was written, 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="checkpoint file, saved folder, or in --run_dir: a file name, a step, best, last")
    parser.add_argument("--output_dir", help="folder to write (default: the checkpoint's own; for an export, --run_dir)")
    parser.add_argument("--run_dir", default=config["output_dir"], help="where bare names are looked up (default: %(default)s)")
    parser.add_argument("--teacher_model", help="teacher's folder or id (default: the one it was trained with)")
    parser.add_argument("--export_trained", metavar="DIR", help="write only the compact form, into DIR")
    parser.add_argument("--average", nargs="+", default=[], metavar="STUDENT", help="average its weights with these students'")
    parser.add_argument("--weights", nargs="+", type=float, help="of CHECKPOINT and of each of --average (default: equal)")
    parser.add_argument("--onnx", action="store_true", help="also write model.onnx, checked with onnxruntime")
    parser.add_argument("--force", action="store_true", help="overwrite a better model")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")
    args = parser.parse_args(argv)
    transformers.utils.logging.set_verbosity_error(), transformers.utils.logging.disable_progress_bar()
    try:
        result = save(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or args.output_dir}: cannot be read or written ({error.strerror or error})", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"{result['source']} (step {result['step']}) -> {result['folder']}")
        for key, value in [*result["scores"].items(), *result.get("onnx", {}).items()]:
            print(f"  {key:<24} {value:.4g}" if isinstance(value, float) else f"  {key:<24} {value}")
        print("  files: " + ", ".join(result["files"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
