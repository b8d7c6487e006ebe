"""The four helper scripts and the saved folder, through their command lines, with the real libraries.

A run of the training script with a tiny teacher stands in for a long one; what depends on the real teacher uses the real one.
"""
from __future__ import annotations

import ast
import gzip
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import detect_hardware
import save_best_checkpoint
import test_checkpoints as scanner
import test_mteb_local
import train_6layer_deltanet as script

ROOT = Path(script.__file__).parent
SENTENCES = ["A man is eating food.", "The CAT sleeps on a red sofa!", "", "Déjà vu: naïve café", "word " * 200]


def run(name: str, *options: Any, status: int = 0) -> str:
    """stdout of a helper run as a user does, without a network."""
    done = subprocess.run([sys.executable, str(ROOT / name), *map(str, options)], capture_output=True, text=True,
                          env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture(autouse=True)
def quiet_again():
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory, tiny_teacher, corpus) -> Path:
    """Output folder of a 4-step training run: checkpoints 1 to 4, all evaluated, best and final model."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    run("train_6layer_deltanet.py", "--preset", "match_teacher", "--teacher_model", tiny_teacher, "--d_model", 32, "--num_layers", 2,
        "--num_heads", 2, "--data_dir", corpus, "--sts_name", "generated", "--cache_dir", folder.parent / "cache", "--total_steps", 4,
        "--warmup_steps", 1, "--eval_interval", 1, "--save_interval", 1, "--log_interval", 1, "--batch_size", 8,
        "--peak_learning_rate", 0.01, "--output_dir", folder)
    return folder


@pytest.fixture
def copy(tiny_run, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "tiny"))


def opened(folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """The student of a checkpoint or a folder, its tokenizer, and its record."""
    cfg = script.read_student(folder)[1]
    teacher, tokenizer, _ = script.load_teacher(cfg)
    student, _, info = script.open_student(folder, teacher)
    return student, tokenizer, info


# The saved folder

LOAD_EVERYWHERE = """
import importlib.util, json, sys
import numpy as np, torch
folder, out = sys.argv[1:]
sentences = json.load(sys.stdin)
assert importlib.util.find_spec("train_6layer_deltanet") is None
for name in ("datasets", "scipy", "sentence_transformers", "tqdm.notebook"):
    sys.modules[name] = None  # only torch and transformers
from transformers import AutoModel, AutoTokenizer
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
own = model.encode(sentences)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
x = tokenizer(sentences, padding=True, truncation=True, max_length=256, return_tensors="pt")
with torch.no_grad():
    hidden = model(input_ids=x["input_ids"], attention_mask=x["attention_mask"]).last_hidden_state
mask = x["attention_mask"].unsqueeze(-1)
plain = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
for name in ("datasets", "scipy", "sentence_transformers", "tqdm.notebook"):
    del sys.modules[name]
from sentence_transformers import SentenceTransformer
st = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
assert st.similarity_fn_name == "cosine" and not any(st.prompts.values()) and st.max_seq_length == 256
np.savez(out, plain=plain.numpy(), own=own, st=st.encode(sentences))
"""


@pytest.mark.parametrize("which", ["best", "final", "saved"])
def test_saved_folder_opens_elsewhere_and_gives_the_same_embeddings(which, tiny_run, tmp_path):
    folder = {"best": tiny_run, "final": tiny_run / "final_model", "saved": tmp_path / "saved"}[which]
    if which == "saved":
        run("save_best_checkpoint.py", tiny_run / "checkpoint_2.pt", "--output_dir", folder)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", LOAD_EVERYWHERE, str(folder), str(tmp_path / "out.npz")], cwd=tmp_path, env=env,
                          input=json.dumps(SENTENCES), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    student, tokenizer, _ = opened(tiny_run / "checkpoint_2.pt" if which == "saved" else folder)
    expected = script.encode(student, tokenizer, SENTENCES, max_length=256)
    found = np.load(tmp_path / "out.npz")
    assert np.abs(found["plain"] - expected).max() < 1e-5
    assert np.abs(found["st"] - expected).max() < 1e-5 and np.abs(found["own"] - expected).max() < 1e-5


def test_modelling_file_needs_only_torch_and_transformers(tiny_run):
    tree = ast.parse((tiny_run / "modeling_deltanet.py").read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    others = {n.split(".")[0] for n in names} - sys.stdlib_module_names
    assert others <= {"numpy", "torch", "tqdm", "transformers", "delta_kernel"}  # what transformers needs, and the file beside it


def test_saved_folder_without_numba_says_once_that_it_is_slower(tiny_run, tmp_path):
    code = """if True:
        import sys
        sys.modules["numba"] = None  # as if it were not installed
        import numpy as np
        from transformers import AutoModel
        folder, out = sys.argv[1:]
        model = AutoModel.from_pretrained(folder, trust_remote_code=True)
        found = model.encode(["A man eats.", "It rains."])
        np.save(out, model.encode(["A man eats.", "It rains."]))"""
    done = subprocess.run([sys.executable, "-c", code, str(tiny_run), str(tmp_path / "out.npy")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("several times slower") == 1, done.stderr
    student, tokenizer, _ = opened(tiny_run)
    assert np.abs(np.load(tmp_path / "out.npy") - script.encode(student, tokenizer, ["A man eats.", "It rains."])).max() < 1e-5


def test_weights_stand_once_and_scores_belong_to_them(tiny_run):
    assert not list(tiny_run.glob("*.safetensors"))
    record = json.loads((tiny_run / "scores.json").read_text())
    assert record["sha256"] == script.file_sha256(tiny_run / "pytorch_model.bin")


def test_weights_changed_apart_from_their_record_are_refused(copy):
    state = torch.load(copy / "pytorch_model.bin")
    state["deltanet_layers.0.o_proj.bias"] += 1
    torch.save(state, copy / "pytorch_model.bin")
    with pytest.raises(script.UserError, match="sha256"):
        script.read_student(copy)


# save_best_checkpoint.py


def test_names_are_looked_up_and_the_card_says_how_it_was_chosen(copy, tmp_path):
    scores = {step: script.recorded_scores(copy, step)["validation_spearman"] for step in (1, 2, 3, 4)}
    for name, step in (("best", max(scores, key=scores.get)), ("last", 4), ("3", 3), ("checkpoint_3.pt", 3)):
        folder = tmp_path / name
        assert save_best_checkpoint.main([name, "--run_dir", str(copy), "--output_dir", str(folder)]) == 0
        assert json.loads((folder / "scores.json").read_text())["step"] == step
        card = (folder / "README.md").read_text()
        assert f"Checkpoint of step {step};" in card and f"{scores[step]:.4f}" in card
        for word in ("## Load", "## Data", "## Limits", "## Licence", "## Architecture", "license: apache-2.0"):
            assert word in card
        assert str(tmp_path) not in card.split("## Scores")[0].split("base_model")[0]
    assert "highest validation Spearman" in (tmp_path / "best" / "README.md").read_text()


def test_a_better_model_is_only_overwritten_by_force(copy, capsys):
    record = json.loads((copy / "scores.json").read_text())
    scores = {step: script.recorded_scores(copy, step)["validation_spearman"] for step in (1, 2, 3, 4)}
    worst = min(scores, key=scores.get)
    assert scores[worst] < record["validation_spearman"]
    before = (copy / "pytorch_model.bin").read_bytes()
    path = str(copy / f"checkpoint_{worst}.pt")
    assert save_best_checkpoint.main([path]) == 2
    assert "better model" in capsys.readouterr().err and (copy / "pytorch_model.bin").read_bytes() == before
    assert save_best_checkpoint.main([path, "--force"]) == 0
    assert json.loads((copy / "scores.json").read_text())["step"] == worst


def test_compact_export_and_back(copy, tmp_path):
    small, full = tmp_path / "small", tmp_path / "full"
    out = json.loads(run("save_best_checkpoint.py", "last", "--run_dir", copy, "--export_trained", small, "--json"))
    assert sorted(p.name for p in small.iterdir()) == sorted(out["files"]) == ["config.json", "metrics.json", "student.safetensors"]
    run("save_best_checkpoint.py", small, "--output_dir", full)
    vectors = [script.encode(*opened(p)[:2], SENTENCES) for p in (copy / "checkpoint_4.pt", small, full)]
    assert np.abs(vectors[1] - vectors[2]).max() < 1e-6
    assert (vectors[0] * vectors[2]).sum(1).min() > 0.9999
    assert "float16" in (full / "README.md").read_text()


def test_real_export_is_small(teacher_and_tokenizer):
    student = script.build_student(script.config, teacher_and_tokenizer[0])
    assert 2 * sum(t.numel() for t in script.trainable_state(student).values()) < 25e6


def test_onnx(copy, tmp_path):
    pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    out = json.loads(run("save_best_checkpoint.py", "last", "--run_dir", copy, "--output_dir", tmp_path / "o", "--onnx", "--json"))
    assert set(out["onnx"]) == {f"onnx_error_{n}" for n in (5, 37, 128, 512)} and max(out["onnx"].values()) < 1e-4
    import onnx
    shape = onnx.load(tmp_path / "o" / "model.onnx").graph.input[0].type.tensor_type.shape
    assert all(d.dim_param for d in shape.dim)


# test_checkpoints.py


def test_scan_agrees_with_training_and_keeps_its_scores(copy):
    report = json.loads(run("test_checkpoints.py", copy, "--json"))
    assert [r["file"] for r in report["files"]] == [*(f"checkpoint_{n}.pt" for n in (1, 2, 3, 4)), "pytorch_model.bin"]
    assert all(r["agrees"] is True for r in report["files"]) and report["evaluated"] > 0
    assert (copy / "checkpoint_scores.png").read_bytes().startswith(b"\x89PNG")
    assert report["best_by_validation"]["validation_spearman"] == max(r["scores"]["validation_spearman"] for r in report["files"])
    again = scanner.scan(scanner_args(copy))
    assert again["evaluated"] == 0 and again["files"] == report["files"]
    (copy / "checkpoint_scores.json").unlink()
    fresh = scanner.scan(scanner_args(copy))
    assert [r["scores"] for r in fresh["files"]] == [r["scores"] for r in report["files"]]


def scanner_args(folder: Path, **given: Any) -> Any:
    import argparse
    return argparse.Namespace(**{"output_dir": str(folder), "every": 1, "limit": 0, "last": 0, "split": None, "data_dir": None,
                                 "sts_name": None, "teacher_model": None, "device": None, "json": True} | given)


def test_bad_files_are_rows_and_the_scan_goes_on(copy, capsys):
    (copy / "checkpoint_2.pt").write_bytes((copy / "checkpoint_2.pt").read_bytes()[:5000])
    (copy / "checkpoint_3.pt").write_bytes((copy / "checkpoint_3.pt").read_bytes()[:5000])
    (copy / "checkpoint_3.json").unlink()
    torch.save({"weight": torch.ones(2)}, copy / "checkpoint_7.pt")
    (copy / "checkpoint_x.pt").write_text("hello")
    assert scanner.main([str(copy), "--json", "--split", "test"]) == 1
    rows = {r["file"]: r for r in json.loads(capsys.readouterr().out)["files"]}
    assert {name for name, r in rows.items() if "error" in r} == {f"checkpoint_{n}.pt" for n in (2, 3, 7, "x")}
    assert "bytes instead of" in rows["checkpoint_2.pt"]["error"] and "another architecture" in rows["checkpoint_7.pt"]["error"]
    assert rows["checkpoint_4.pt"]["scores"] and list(rows["checkpoint_4.pt"]["scores"]) == ["test_pearson", "test_spearman"]


def test_thinning():
    steps = list(range(1000, 201000, 1000))
    assert scanner.thin(steps, 1, 0, 3) == [198000, 199000, 200000]
    assert scanner.thin(steps, 50, 0, 0) == [50000, 100000, 150000, 200000]
    limited = scanner.thin(steps, 1, 5, 0)
    assert len(limited) == 5 and limited[0] == 1000 and limited[-1] == 200000 and limited == sorted(limited)


# test_mteb_local.py


def test_mteb_gives_each_checkpoint_its_own_training_score(copy, corpus, tmp_path):
    pytest.importorskip("mteb")
    (tmp_path / "sts").mkdir()
    shutil.copy(corpus / "sts" / "generated-test.tsv.gz", tmp_path / "sts" / "STS12.tsv.gz")
    rows = script.read_sts_file(tmp_path / "sts" / "STS12.tsv.gz")
    options = ("--data_dir", tmp_path, "--output_dir", tmp_path / "results", "--tasks", "STS12", "STS13")
    out = run("test_mteb_local.py", "--checkpoint", copy / "checkpoint_1.pt", *options, status=1)  # STS13 has no data here
    assert "STS13: NOT RUN" in out and "not run" in out
    # Another checkpoint under the same name in the same folder: a score kept by name alone would come back.
    shutil.copy(copy / "checkpoint_4.pt", copy / "checkpoint_1.pt")
    (copy / "checkpoint_1.json").unlink()  # the mark of the replaced file
    run("test_mteb_local.py", "--checkpoint", copy / "checkpoint_1.pt", "--compare", copy / "checkpoint_2.pt", copy, *options, status=1)
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    found = [m["scores"]["STS12"] for m in summary["models"]]
    expected = [script.evaluate_sts(*opened(p)[:2], rows)["spearman"] for p in (copy / "checkpoint_4.pt", copy / "checkpoint_2.pt", copy)]
    # This student's cosines lie so close together that the last bit of a float32, which depends on the padding, swaps ranks.
    assert found == pytest.approx(expected, abs=1e-4)
    assert found[0] != found[1] and re.search(r"checkpoint_1 +\|.+checkpoint_2", (tmp_path / "results" / "summary.md").read_text())
    assert len(list((tmp_path / "results" / "results").glob("*checkpoint_1/*/STS12.json"))) == 2


def test_mteb_teacher_and_student_on_stsbenchmark(data_dir, teacher_and_tokenizer, tmp_path):
    pytest.importorskip("mteb")
    cfg = script.parse_config(["--projection_init", "teacher"])
    built = script.build_student(cfg, teacher_and_tokenizer[0])
    script.save_checkpoint(tmp_path, 0, built, script.build_optimizer(built, cfg), cfg, {}, {"sums": {}}, {})
    out = json.loads(run("test_mteb_local.py", "--checkpoint", script.config["teacher_model"], "--compare", tmp_path / "checkpoint_0.pt",
                         "--data_dir", data_dir, "--output_dir", tmp_path / "results", "--json"))
    teacher, student = (m["scores"]["STSBenchmark"] for m in out["models"])
    rows = script.read_sts_file(data_dir / "sts" / "stsb-test.tsv.gz")
    assert len(rows) == 1379 and round(teacher, 4) == 0.8203
    assert teacher == pytest.approx(script.evaluate_sts(*teacher_and_tokenizer, rows)["spearman"], abs=1e-6)
    assert student == pytest.approx(script.evaluate_sts(built, teacher_and_tokenizer[1], rows)["spearman"], abs=1e-5)


# detect_hardware.py


@pytest.mark.parametrize("batch, length, parts", [(32, 64, 1), (16, 128, 2)])
def test_memory_estimate_is_within_a_quarter_of_the_measured_peak(batch, length, parts):
    cfg = script.config | {"batch_size": batch, "max_length": length, "gradient_accumulation_steps": parts, "device": "cpu", "threads": 1}
    peak = detect_hardware.measure(cfg, 600)["peak"]
    assert detect_hardware.estimate_memory(cfg)["total"] == pytest.approx(peak, rel=0.25)


def test_hardware_report_ends_with_a_command_that_training_takes(capsys):
    assert detect_hardware.main(["--measure", "false", "--batch_size", "16", "--max_length", "64"]) == 0
    words = capsys.readouterr().out.splitlines()[-1].split()
    cfg = script.parse_config(words[2:])
    assert words[:2] == ["python", "train_6layer_deltanet.py"] and cfg["batch_size"] == 16 and cfg["max_length"] == 64
    report = json.loads(run("detect_hardware.py", "--measure", "false", "--json"))
    assert [(e["precision"], e["gradient_accumulation_steps"]) for e in report["estimates_gib"]] == \
        [(p, n) for p in ("float32", "bf16") for n in (1, 2, 4, 8)]
    assert report["hardware"]["cpu"]["cores"] and report["setting"]["batch_size"] == 256


# Bad input


def write_tsv(folder: Path, name: str, lines: list[str]) -> Path:
    (folder / "sts").mkdir(exist_ok=True)
    with gzip.open(folder / "sts" / name, "wt") as file:
        file.write("\n".join(lines))
    return folder


def test_bad_input_is_one_line_and_status_2(tmp_path, tiny_run, capsys):
    (tmp_path / "empty").mkdir(), (tmp_path / "other").mkdir()
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"weight": torch.ones(2)}, tmp_path / "foreign.pt")
    shutil.copy(tiny_run / "pytorch_model.bin", tmp_path / "other")  # without its config.json
    content = torch.load(tiny_run / "checkpoint_1.pt", weights_only=True)
    content["config"]["num_layers"] = 3
    torch.save(content, tmp_path / "wrong.pt")
    few = write_tsv(tmp_path, "stsb-test.tsv.gz", ["a\tb\t1.0"])
    cases = [(main, [*before, str(tmp_path / name)], said) for name, said in (
        ("absent.pt", "no such"), ("empty", "holds none"), ("text.pt", "not a whole checkpoint"), ("foreign.pt", "another architecture"),
        ("wrong.pt", "num_layers"), ("other", "config.json"))
        for main, before in ((save_best_checkpoint.main, []), (test_mteb_local.main, ["--output_dir", str(tmp_path / "m"), "--checkpoint"]))]
    cases += [(scanner.main, [str(tmp_path / "absent")], "no such folder"), (scanner.main, [str(tmp_path / "empty")], "holds no checkpoint"),
              (save_best_checkpoint.main, ["9", "--run_dir", str(tiny_run)], "steps [1, 2, 3, 4]"),
              (save_best_checkpoint.main, ["best", "--run_dir", str(tmp_path / "empty")], "no checkpoint"),
              (test_mteb_local.main, ["--checkpoint", str(tiny_run), "--tasks", "STSBenchmrk"], "STSBenchmark"),
              (test_mteb_local.main, ["--checkpoint", str(tiny_run), "--data_dir", str(tmp_path / "absent")], "no such folder"),
              (detect_hardware.main, ["--batch_size", "1"], "batch_size"), (detect_hardware.main, ["--measure", "maybe"], "measure")]
    for main, argv, said in cases:
        assert main(argv) == 2, argv
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and said in error, (argv, error)
    assert test_mteb_local.main(["--checkpoint", str(tiny_run), "--data_dir", str(few), "--output_dir", str(tmp_path / "m")]) == 1
    assert "expected exactly 1379" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["detect_hardware.py", "test_checkpoints.py", "save_best_checkpoint.py", "test_mteb_local.py"])
def test_help(name):
    assert "--json" in run(name, "--help")
