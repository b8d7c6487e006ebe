"""The four helper scripts and the saved folder, through their command lines, with the real libraries.

A run of the training script with a tiny teacher stands in for a long one; what depends on the real one uses that.
"""
from __future__ import annotations

import argparse
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
from torch.utils.flop_counter import FlopCounterMode

import delta_onnx
import detect_hardware
import forked
import save_best_checkpoint
import test_checkpoints as scanner
import test_mteb_local
import train_6layer_deltanet as script

ROOT = Path(script.__file__).parent
SENTENCES = ["A man is eating food.", "The CAT sleeps on a red sofa!", "", "Déjà vu: naïve café", "word " * 200]


def run(name: str, *options: Any, status: int = 0) -> str:
    """stdout of a helper run as a user does, without a network."""
    done = forked.run(ROOT / name, *options)
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
    run("train_6layer_deltanet.py", "--preset", "match_teacher", "--teacher_model", tiny_teacher, "--d_model", 32,
        "--num_layers", 2, "--num_heads", 2, "--data_dir", corpus, "--sts_name", "generated",
        "--cache_dir", folder.parent / "cache", "--total_steps", 4, "--warmup_steps", 1, "--eval_interval", 1,
        "--save_interval", 1, "--log_interval", 1, "--batch_size", 8, "--peak_learning_rate", 0.01,
        "--output_dir", folder)
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
folders, sentences = sys.argv[1:], json.load(sys.stdin)
assert importlib.util.find_spec("train_6layer_deltanet") is None
for name in ("datasets", "scipy", "sentence_transformers", "tqdm.notebook"):
    sys.modules[name] = None  # only torch and transformers
from transformers import AutoModel, AutoTokenizer
results = {}
for folder in folders:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    own = model.encode(sentences)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    x = tokenizer(sentences, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = model(input_ids=x["input_ids"], attention_mask=x["attention_mask"]).last_hidden_state
    mask = x["attention_mask"].unsqueeze(-1)
    plain = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    results[folder] = {"plain": plain.numpy(), "own": own}
for name in ("datasets", "scipy", "sentence_transformers", "tqdm.notebook"):
    del sys.modules[name]
from sentence_transformers import SentenceTransformer
for number, folder in enumerate(folders):
    st = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
    assert st.similarity_fn_name == "cosine" and not any(st.prompts.values()) and st.max_seq_length == 256
    half = SentenceTransformer(folder, trust_remote_code=True, device="cpu", model_kwargs={"dtype": torch.bfloat16})
    int8 = SentenceTransformer(folder, trust_remote_code=True, device="cpu", config_kwargs={"int8": True})
    states = st.encode(sentences[0], output_value="token_embeddings")
    np.savez(f"{number}.npz", **results[folder], st=st.encode(sentences), half=half.encode(sentences), states=states,
             int8=int8.encode(sentences))
"""


@pytest.fixture(scope="module")
def elsewhere(tiny_run, tmp_path_factory) -> tuple[dict[str, Path], Path]:
    """Three saved folders, and where a process that knows only the libraries left what each gives, in their order."""
    out = tmp_path_factory.mktemp("elsewhere")
    folders = {"best": tiny_run, "final": tiny_run / "final_model", "saved": out / "saved"}
    run("save_best_checkpoint.py", tiny_run / "checkpoint_2.pt", "--output_dir", folders["saved"])
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(out / "modules")}
    done = subprocess.run([sys.executable, "-c", LOAD_EVERYWHERE, *map(str, folders.values())], cwd=out, env=env,
                          input=json.dumps(SENTENCES), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folders, out


@pytest.mark.parametrize("which", ["best", "final", "saved"])
def test_saved_folder_opens_elsewhere_and_gives_the_same_embeddings(which, tiny_run, elsewhere):
    folders, out = elsewhere
    student, tokenizer, _ = opened(tiny_run / "checkpoint_2.pt" if which == "saved" else folders[which])
    expected = script.encode(student, tokenizer, SENTENCES, max_length=256)
    found = np.load(out / f"{[*folders].index(which)}.npz")
    assert np.abs(found["plain"] - expected).max() < 1e-5
    assert np.abs(found["st"] - expected).max() < 1e-5 and np.abs(found["own"] - expected).max() < 1e-5
    assert ((found["half"] * expected).sum(1) > 0.99).all() and (found["half"] != found["st"]).any()
    assert ((found["int8"] * expected).sum(1) > 0.99).all() and np.abs(found["int8"] - expected).max() > 1e-4
    mean = found["states"].mean(0)  # of the tokens' states, which late chunking averages piece by piece
    assert np.abs(mean / np.linalg.norm(mean) - expected[0]).max() < 1e-5


def test_modelling_file_needs_only_torch_and_transformers(tiny_run):
    tree = ast.parse((tiny_run / "modeling_deltanet.py").read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    others = {n.split(".")[0] for n in names} - sys.stdlib_module_names
    beside = {"delta_mixer", "delta_kernel", "delta_kernel_cuda"}
    assert others <= {"numpy", "torch", "tqdm", "transformers"} | beside


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
    done = subprocess.run([sys.executable, "-c", code, tiny_run, tmp_path / "out.npy"], cwd=tmp_path,
                          capture_output=True, text=True)  # a process of its own: a forked one has the kernel already
    assert done.returncode == 0 and done.stderr.count("without the package numba") == 1, done.stderr
    student, tokenizer, _ = opened(tiny_run)
    expected = script.encode(student, tokenizer, ["A man eats.", "It rains."])
    assert np.abs(np.load(tmp_path / "out.npy") - expected).max() < 1e-5


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


def recorded(folder: Path) -> dict[int, float]:
    """Spearman on validation, by step, as metrics.jsonl has it."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if line["step"]
            for key in line if key.endswith("/validation_spearman")}


def test_names_are_looked_up_and_the_card_says_how_it_was_chosen(copy, tmp_path):
    scores = recorded(copy)
    for name, step in (("best", max(scores, key=scores.get)), ("last", 4), ("3", 3), ("checkpoint_3.pt", 3)):
        folder = tmp_path / name
        assert save_best_checkpoint.main([name, "--run_dir", str(copy), "--output_dir", str(folder)]) == 0
        assert json.loads((folder / "scores.json").read_text())["step"] == step
        card = (folder / "README.md").read_text()
        assert f"Checkpoint of step {step};" in card and f"{scores[step]:.4f}" in card
        for word in ("## Load", "## Data", "## Limits", "## Licence", "## Architecture", "license: other"):
            assert word in card
        assert str(tmp_path) not in card.split("## Scores")[0].split("base_model")[0]
    assert "highest validation Spearman" in (tmp_path / "best" / "README.md").read_text()


def test_a_better_model_is_only_overwritten_by_force(copy, capsys):
    record = json.loads((copy / "scores.json").read_text())
    scores = recorded(copy)
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
    assert sorted(p.name for p in small.iterdir()) == sorted(out["files"])
    assert sorted(out["files"]) == ["config.json", "metrics.json", "student.safetensors"]
    run("save_best_checkpoint.py", small, "--output_dir", full)
    vectors = [script.encode(*opened(p)[:2], SENTENCES) for p in (copy / "checkpoint_4.pt", small, full)]
    assert np.abs(vectors[1] - vectors[2]).max() < 1e-6
    assert (vectors[0] * vectors[2]).sum(1).min() > 0.9999
    assert "float16" in (full / "README.md").read_text()


def test_real_export_is_small(teacher_and_tokenizer):
    student = script.build_student(script.config, teacher_and_tokenizer[0])
    assert 2 * sum(t.numel() for t in script.trainable_state(student).values()) < 25e6


@pytest.fixture(scope="module")
def onnx_run(tiny_run, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A folder saved with --int8, and what the command printed of its ONNX files."""
    pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    folder = tmp_path_factory.mktemp("onnx")
    out = run("save_best_checkpoint.py", "last", "--run_dir", tiny_run, "--output_dir", folder, "--int8", "--json")
    return folder, json.loads(out)["onnx"]


def test_onnx_and_int8(onnx_run, tiny_run, tmp_path):
    import onnx
    folder, out = onnx_run
    assert max(out[f"onnx_error_{n}"] for n in (1, 5, 37, 128, 512, 2048)) < 1e-4
    assert 0.98 < out["int8_cosine"] < 1 and abs(out["onnx_dev_spearman"] - out["int8_dev_spearman"]) < 0.05
    files = folder / "onnx" / "model.onnx", folder / "onnx" / "model_qint8.onnx"
    for path in files:
        graph = onnx.load(path).graph
        assert all(d.dim_param for x in graph.input for d in x.type.tensor_type.shape.dim)
        assert {node.domain for node in graph.node} <= {"", "com.microsoft"} and len(graph.input) == 2
    # q, k and v, o, up and down of both layers; not the products of the delta rule
    assert sum(node.op_type in ("MatMulInteger", "DynamicQuantizeMatMul") for node in graph.node) == 8
    student, tokenizer, _ = opened(folder)
    models = [delta_onnx.OnnxModel(path, 1) for path in files]
    found_by_all = [script.encode(model, tokenizer, SENTENCES, max_length=256) for model in (student, *models)]
    expected, found, small = found_by_all
    assert np.abs(found - expected).max() < 1e-4 and (small * expected).sum(1).min() > 0.98
    assert np.abs(small - expected).max() > 1e-5  # it is another model
    run("save_best_checkpoint.py", tiny_run / "checkpoint_2.pt", "--output_dir", folder, "--force")
    assert not any(path.exists() for path in files)  # they were of other weights


def test_int8_that_loses_too_much_is_refused(onnx_run, tmp_path, monkeypatch, capsys):
    folder, tokenizer = tmp_path / "out", opened(tiny := onnx_run[0])[1]
    folder.mkdir()
    (source := folder / "model.onnx").write_bytes(written_onnx(opened(tiny)[0]))
    scores = iter([{"spearman": 0.8}, {"spearman": 0.7959}, {"spearman": 0.8}, {"spearman": 0.7961}])
    monkeypatch.setattr(script, "evaluate_sts", lambda *_: next(scores))
    monkeypatch.setattr(script, "load_sts", lambda *_: [])
    arguments = tokenizer, source, folder / "small.onnx", tmp_path, {"data_dir": "", "sts_name": "stsb"}
    with pytest.raises(script.UserError, match="0.0041"):
        delta_onnx.export_int8(*arguments, True)
    assert not (folder / "small.onnx").exists()
    assert delta_onnx.export_int8(*arguments, True)["int8_dev_spearman"] == 0.7961
    assert (folder / "small.onnx").exists()
    assert set(delta_onnx.export_int8(*arguments, False)) == {"int8_cosine"}
    assert "no stsb dev set" in capsys.readouterr().err


def written_onnx(student: Any) -> bytes:
    with torch.no_grad():
        return delta_onnx.StudentGraph(student.eval()).model().SerializeToString()


SWITCHES = ("bidirectional", "hierarchical_memory", "cross_timescale_coupling", "resonance_flux", "short_convolution",
            "read_gates")


@pytest.mark.parametrize("off", ["", *SWITCHES, "learned_positions", "all"])
def test_onnx_of_every_architecture(off, tmp_path):
    """Random students with strong gates at lengths around those of blocks and chunks; padding anywhere, same tokens."""
    pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    torch.manual_seed(0)
    switches = {name: off not in (name, "all") for name in SWITCHES}
    switches["learned_positions"] = off == "learned_positions"
    student = script.DeltaNetStudent(script.DeltaNetConfig(
        d_model=24, num_heads=4, num_layers=2, ffn_size=32, vocab_size=50, max_positions=300, **switches)).eval()
    for name, parameter in student.named_parameters():
        torch.nn.init.normal_(parameter, std=2.0 if "gate" in name else 0.5)
    (tmp_path / "model.onnx").write_bytes(written_onnx(student))
    model = delta_onnx.OnnxModel(tmp_path / "model.onnx", 1)
    for length in (1, 2, 5, 15, 16, 17, 32, 33, 63, 64, 65, 128, 129, 193, 300):  # of 193, a block is all filling
        ids = torch.randint(50, (6, length))
        ids[3], mask = 7, torch.ones(6, length, dtype=torch.int64)
        mask[1, length // 2 + 1:], mask[2, :length // 3], mask[4, length // 3:length // 2] = 0, 0, 0
        mask[5] = 0
        with torch.no_grad():
            hidden = student(ids, mask).last_hidden_state
        found, embedding = model.run(ids, mask)
        assert torch.isfinite(found).all() and torch.isfinite(embedding).all()
        assert (found - hidden)[mask.bool()].abs().max() < 1e-4 * hidden.abs().max(), length
        assert (embedding - script.mean_pool(hidden, mask)).abs().max() < 1e-4, length


def test_onnx_is_stable_on_repeated_tokens(tmp_path):
    """Equal keys, all written with beta near 1 and kept: a power series would blow up. 9,000 tokens."""
    pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    torch.manual_seed(0)
    cfg = script.DeltaNetConfig(d_model=16, num_heads=2, num_layers=1, ffn_size=16, vocab_size=50)
    student = script.DeltaNetStudent(cfg).eval()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.5)
        student.deltanet_layers[0].gate_proj.weight.zero_()
        student.deltanet_layers[0].gate_proj.bias.fill_(12.0)  # beta, retentions and read gates 1 - 6e-6
    (tmp_path / "model.onnx").write_bytes(written_onnx(student))
    ids = torch.full((1, 9000), 7)
    ids[0, 4000:4100] = torch.arange(100) % 50
    found = delta_onnx.OnnxModel(tmp_path / "model.onnx", 1).run(ids, torch.ones_like(ids))[0]
    with torch.no_grad():
        expected = student(ids, torch.ones_like(ids)).last_hidden_state
    assert (found - expected).abs().max() < 1e-4


ONNXRUNTIME_ALONE = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = sys.modules["sentence_transformers"] = None
import numpy as np, onnxruntime
from tokenizers import Tokenizer
folder, out, *sentences = sys.argv[1:]
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
tokenizer.enable_truncation(256), tokenizer.enable_padding()
session = onnxruntime.InferenceSession(f"{folder}/onnx/model.onnx", providers=["CPUExecutionProvider"])
batch = tokenizer.encode_batch(sentences)
inputs = {"input_ids": np.array([x.ids for x in batch]), "attention_mask": np.array([x.attention_mask for x in batch])}
np.save(out, session.run(["sentence_embedding"], inputs)[0])
"""


def test_onnx_of_the_real_model_and_onnxruntime_alone(teacher_and_tokenizer, tmp_path):
    """The lines of docs/speed.md, on a student of the real size."""
    pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    teacher, tokenizer = teacher_and_tokenizer
    student = script.build_student(script.config, teacher).eval()
    assert max(delta_onnx.export_onnx(student, tmp_path / "onnx" / "model.onnx", tmp_path).values()) < 1e-4
    tokenizer.save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", ONNXRUNTIME_ALONE, tmp_path, tmp_path / "out.npy", *SENTENCES],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = script.encode(student, tokenizer, SENTENCES, max_length=256)
    assert np.abs(np.load(tmp_path / "out.npy") - expected).max() < 1e-4


def test_onnx_without_its_package_is_one_line(copy, monkeypatch, capsys):
    monkeypatch.setattr(delta_onnx.importlib.util, "find_spec", lambda name: None)
    before = (copy / "pytorch_model.bin").read_bytes()
    assert save_best_checkpoint.main(["1", "--run_dir", str(copy), "--force", "--onnx"]) == 2
    assert "requirements-eval.txt" in capsys.readouterr().err and (copy / "pytorch_model.bin").read_bytes() == before


# test_checkpoints.py


def test_scan_agrees_with_training_and_keeps_its_scores(copy):
    report = json.loads(run("test_checkpoints.py", copy, "--json"))
    assert [r["file"] for r in report["files"]] == [*(f"checkpoint_{n}.pt" for n in (1, 2, 3, 4)), "pytorch_model.bin"]
    assert all(r["agrees"] is True for r in report["files"]) and report["evaluated"] > 0
    assert (copy / "checkpoint_scores.png").read_bytes().startswith(b"\x89PNG")
    best = max(r["scores"]["validation_spearman"] for r in report["files"])
    assert report["best_by_validation"]["validation_spearman"] == best
    again = scanner.scan(scanner_args(copy))
    assert again["evaluated"] == 0 and again["files"] == report["files"]
    (copy / "checkpoint_scores.json").unlink()
    fresh = scanner.scan(scanner_args(copy))
    assert [r["scores"] for r in fresh["files"]] == [r["scores"] for r in report["files"]]


def scanner_args(folder: Path, **given: Any) -> Any:
    import argparse
    return argparse.Namespace(**{
        "output_dir": str(folder), "every": 1, "limit": 0, "last": 0, "split": None, "data_dir": None,
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
    assert "bytes instead of" in rows["checkpoint_2.pt"]["error"]
    assert "another architecture" in rows["checkpoint_7.pt"]["error"]
    assert list(rows["checkpoint_4.pt"]["scores"]) == ["test_pearson", "test_spearman"]


def test_thinning():
    steps = list(range(1000, 201000, 1000))
    assert scanner.thin(steps, 1, 0, 3) == [198000, 199000, 200000]
    assert scanner.thin(steps, 50, 0, 0) == [50000, 100000, 150000, 200000]
    limited = scanner.thin(steps, 1, 5, 0)
    assert len(limited) == 5 and limited[0] == 1000 and limited[-1] == 200000 and limited == sorted(limited)


# test_mteb_local.py


def test_mteb_gives_each_checkpoint_its_own_training_score(copy, corpus, tmp_path, capsys):
    pytest.importorskip("mteb")
    (tmp_path / "sts").mkdir()
    shutil.copy(corpus / "sts" / "generated-test.tsv.gz", tmp_path / "sts" / "STS12.tsv.gz")
    rows = script.read_sts_file(tmp_path / "sts" / "STS12.tsv.gz")
    options = ("--data_dir", tmp_path, "--output_dir", tmp_path / "results", "--tasks", "STS12", "STS13")
    evaluate = lambda *names: test_mteb_local.main([*map(str, (*names, *options))])  # noqa: E731
    assert evaluate("--checkpoint", copy / "checkpoint_1.pt") == 1  # STS13 has no data here
    out = capsys.readouterr().out
    assert "STS13: NOT RUN" in out and "not run" in out
    # Another checkpoint under the same name in the same folder: a score kept by name alone would come back.
    shutil.copy(copy / "checkpoint_4.pt", copy / "checkpoint_1.pt")
    (copy / "checkpoint_1.json").unlink()  # the mark of the replaced file
    assert evaluate("--checkpoint", copy / "checkpoint_1.pt", "--compare", copy / "checkpoint_2.pt", copy) == 1
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    found = [m["scores"]["STS12"] for m in summary["models"]]
    paths = copy / "checkpoint_4.pt", copy / "checkpoint_2.pt", copy
    expected = [script.evaluate_sts(*opened(p)[:2], rows)["spearman"] for p in paths]
    # This student's cosines lie so close together that the last bit of a float32, which depends on the padding,
    # swaps ranks.
    assert found == pytest.approx(expected, abs=1e-4)
    page = (tmp_path / "results" / "summary.md").read_text()
    assert found[0] != found[1] and re.search(r"checkpoint_1 +\|.+checkpoint_2", page)
    assert len(list((tmp_path / "results" / "results").glob("*checkpoint_1/*/STS12.json"))) == 2
    assert evaluate("--int8", "--checkpoint", copy, "--compare", copy / "checkpoint_2.pt") == 1
    models = json.loads((tmp_path / "results" / "summary.json").read_text())["models"]
    assert [m["model"] for m in models] == [f"local/{copy.name}-int8", f"local/{copy.name}-checkpoint_2-int8"]
    assert 0 < abs(models[0]["scores"]["STS12"] - found[2]) < 0.05


@pytest.mark.slow
def test_mteb_teacher_and_student_on_stsbenchmark(data_dir, teacher_and_tokenizer, tmp_path):
    pytest.importorskip("mteb")
    cfg = script.parse_config(["--projection_init", "teacher"])
    built = script.build_student(cfg, teacher_and_tokenizer[0])
    script.save_checkpoint(tmp_path, 0, built, script.build_optimizer(built, cfg), cfg, {}, {"sums": {}}, {})
    out = json.loads(run("test_mteb_local.py", "--checkpoint", script.config["teacher_model"], "--compare",
                         tmp_path / "checkpoint_0.pt", "--data_dir", data_dir, "--output_dir", tmp_path / "results",
                         "--json"))
    teacher, student = (m["scores"]["STSBenchmark"] for m in out["models"])
    rows = script.read_sts_file(data_dir / "sts" / "stsb-test.tsv.gz")
    assert len(rows) == 1379 and round(teacher, 4) == 0.8203
    assert teacher == pytest.approx(script.evaluate_sts(*teacher_and_tokenizer, rows)["spearman"], abs=1e-6)
    assert student == pytest.approx(script.evaluate_sts(built, teacher_and_tokenizer[1], rows)["spearman"], abs=1e-5)


# detect_hardware.py


@pytest.mark.parametrize("batch, length, parts", [pytest.param(32, 64, 1, marks=pytest.mark.slow), (16, 128, 2)])
def test_memory_estimate_is_within_a_quarter_of_the_measured_peak(batch, length, parts):
    cfg = script.config | {"batch_size": batch, "max_length": length, "gradient_accumulation_steps": parts,
                           "device": "cpu", "threads": 1}
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


@pytest.mark.parametrize("bf16", [True, False])  # by AMX or by AVX512
def test_bf16_is_recommended_where_a_cpu_multiplies_it_faster(bf16, monkeypatch):
    hardware = detect_hardware.find_hardware()
    cpu = hardware["cpu"] | {"amx": False, "bf16": bf16, "free_gib": 64.0}
    monkeypatch.setattr(detect_hardware, "find_hardware", lambda: hardware | {"gpus": [], "cpu": cpu})
    args = argparse.Namespace(batch_size=64, max_length=64, total_steps=10, measure=False)
    assert ("--precision bf16" in detect_hardware.report(args)["command"]) == bf16


def test_gpus_that_are_not_here_are_computed_from_the_operators(tmp_path, monkeypatch, capsys):
    cfg = script.config | detect_hardware.TINY
    monkeypatch.setattr(detect_hardware, "LAUNCHES", tmp_path / "absent.json")
    counted = detect_hardware.count_operators(cfg)
    assert 100 < counted < detect_hardware.count_operators(cfg | {"num_layers": 2}) < 5000
    monkeypatch.setattr(detect_hardware, "LAUNCHES", tmp_path / "launches.json")
    counts = [{"preset": "specification", "micro_batches": n, "total": 700 * n} for n in (4, 1)]
    detect_hardware.LAUNCHES.write_text(json.dumps({"rows": counts}))
    assert detect_hardware.count_operators(cfg) == 700
    found = {(e["gpu"], e["precision"]): e for e in detect_hardware.compute_gpus(script.config, 700)}
    assert len(found) == 8
    for (gpu, precision), e in found.items():
        assert e["gib"] < detect_hardware.GPUS[gpu][0] and e["step_seconds"] >= e["short_step_seconds"] >= 700 * 5e-6
        assert e["hours"] == pytest.approx(e["step_seconds"] * 200_000 / 3600)
        assert precision == "bf16" or e["hours"] > found[gpu, "bf16"]["hours"] > found["H100", "bf16"]["hours"] * 0.99
    assert detect_hardware.main(["--measure", "false"]) == 0
    out = capsys.readouterr().out
    assert "Computed, not measured" in out and out.count("TF32  ") == 4 and "700" in out
    # Tokens of 20 rather than 128 a text: at 0.5 us an operator only work counts, which is at least linear in them.
    monkeypatch.setattr(detect_hardware, "LAUNCH", 5e-7)
    estimates = detect_hardware.compute_gpus(script.config, 100)
    assert all(e["step_seconds"] > 6 * e["short_step_seconds"] for e in estimates)


def test_flops_of_a_step_are_those_that_pytorch_counts():
    """But for what does not grow with the batch, the mixer's kernel, and the gradient of the frozen embeddings."""
    cfg = script.config | {"batch_size": 4, "max_length": 16, "gradient_accumulation_steps": 1, "device": "cpu",
                           "num_layers": 1, "orthogonal_reg_weight": 0.0}
    training = detect_hardware.Training(cfg)
    with FlopCounterMode(display=False) as counter:
        training.step(4)
    assert detect_hardware.step_flops(cfg, 16) == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_a_slow_machine_is_measured_too(monkeypatch):
    """A single step of 2 pairs where even that takes longer than the budget; never none."""
    cfg = script.config | detect_hardware.TINY | {"batch_size": 2, "device": "cpu", "threads": 0, "most_pairs": 64}
    steps, step = [], detect_hardware.Training.step
    slow = lambda self, pairs: steps.append(pairs) or 100 + step(self, pairs)  # noqa: E731
    monkeypatch.setattr(detect_hardware.Training, "step", slow)
    found = detect_hardware.measured_steps(cfg, 8.0)
    assert steps == [2, 2] and found["pairs"] == 2 and found["seconds"] > 100  # the first one is the small student's


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
    out = ["--output_dir", str(tmp_path / "m")]
    cases = [(main, [*before, str(tmp_path / name)], said) for name, said in (
        ("absent.pt", "no such"), ("empty", "holds none"), ("text.pt", "not a whole checkpoint"),
        ("foreign.pt", "another architecture"), ("wrong.pt", "num_layers"), ("other", "config.json"))
        for main, before in ((save_best_checkpoint.main, []), (test_mteb_local.main, [*out, "--checkpoint"]))]
    mteb = "--checkpoint", str(tiny_run)
    cases += [(scanner.main, [str(tmp_path / "absent")], "no such folder"),
              (scanner.main, [str(tmp_path / "empty")], "holds no checkpoint"),
              (save_best_checkpoint.main, ["9", "--run_dir", str(tiny_run)], "steps [1, 2, 3, 4]"),
              (save_best_checkpoint.main, ["best", "--run_dir", str(tmp_path / "empty")], "no checkpoint"),
              (test_mteb_local.main, [*mteb, "--tasks", "STSBenchmrk"], "STSBenchmark"),
              (test_mteb_local.main, [*mteb, "--data_dir", str(tmp_path / "absent")], "no such folder"),
              (detect_hardware.main, ["--batch_size", "1"], "batch_size"),
              (detect_hardware.main, ["--measure", "maybe"], "measure")]
    for main, argv, said in cases:
        assert main(argv) == 2, argv
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and said in error, (argv, error)
    assert test_mteb_local.main([*mteb, "--data_dir", str(few), *out]) == 1
    assert "expected exactly 1379" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["detect_hardware.py", "test_checkpoints.py", "save_best_checkpoint.py",
                                  "test_mteb_local.py"])
def test_help(name):
    assert "--json" in run(name, "--help")
