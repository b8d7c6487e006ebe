"""The benchmarks' own command lines with --quick: exit status, table, the JSON's keys with positive finite numbers."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from forked import ROOT

sys.path.insert(0, str(ROOT / "bench"))

SPREAD = {"median", "min", "max"}
PARTS = {"teacher", "mixers", "FFNs", "rest of student", "losses", "optimiser"}


def bench(name: str, *arguments: str) -> forked.Done:
    """A benchmark's run on one thread, its output captured."""
    return forked.run(ROOT / "bench" / f"{name}.py", *arguments, timeout=600,
                      env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})


def quick(name: str, folder: Path, *arguments: str) -> dict:
    """The JSON of a `--quick` run, which took about a minute of the processor at most.

    (The clock would count other programs too.)
    """
    done = bench(name, "--quick", "--json", str(folder / "result.json"), *arguments)
    assert done.returncode == 0, done.stderr
    assert done.seconds < 90
    result = json.loads((folder / "result.json").read_text())
    assert result["bench"] == name and result["quick"] is True
    for key in ("cpu", "threads", "torch", "transformers", "python", "platform"):
        assert result["machine"][key], key
    assert result["machine"]["cpu"] in done.stdout and f"{result['settings']['repeats']} repeats" in done.stdout
    return result


def positive(row: dict, *keys: str) -> None:
    """Each key holds a positive finite number, or a spread of such."""
    for key in keys:
        values = row[key]
        if isinstance(values, dict):
            assert set(values) == SPREAD and values["min"] <= values["median"] <= values["max"], key
        for value in values.values() if isinstance(values, dict) else [values]:
            assert isinstance(value, (int, float)) and math.isfinite(value) and value > 0, (key, value)


def test_train_step(tmp_path):
    result = quick("train_step", tmp_path)
    assert [row["texts"] for row in result["rows"]] == ["mix", "16 tokens"]
    for row in result["rows"]:
        positive(row, "pairs", "sentences", "tokens", "speed_against_attention", "floor_share", "linear_floor_share",
                 "floor_seconds", "linear_floor_seconds", "floor_gflop_first_batch", "counted_gflop_first_batch")
        # What is left of the step's own products: the losses', a few sentences by a few.
        assert row["floor_gflop_first_batch"] == pytest.approx(row["counted_gflop_first_batch"], rel=0.1)
        assert 0 <= row["padding"] < 1 and row["linear_floor_share"]["median"] < row["floor_share"]["median"] < 1
        for kind in ("student", "attention"):
            positive(row[kind], "step_seconds", "pairs_per_s", "tokens_per_s")
            positive(row[kind]["parts"], *PARTS)
            assert sum(row[kind]["parts"].values()) == pytest.approx(1)
    positive(result["rows"][0]["student"], "peak_bytes"), positive(result["rows"][0]["attention"], "peak_bytes")
    positive(result["reference"], "student_seconds", "reference_seconds", "speed_against_reference")


def test_encode(tmp_path, corpus):
    result = quick("encode", tmp_path, "--plot", str(tmp_path / "plot.png"), "--data_dir", str(corpus))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [row["length"] for row in result["rows"]] == [16, 128]
    assert [row["length"] for row in result["long"]] == [1024]
    for row in result["rows"]:
        positive(row, "texts", "speed_against_minilm")
        for kind in ("student", "minilm", "student_onnx", "teacher_onnx", "student_int8", "teacher_int8",
                     "student_torch_int8", "minilm_torch_int8"):
            positive(row[kind], "seconds", "sentences_per_s", "tokens_per_s")
        positive(row, "student_onnx_against_minilm", "onnx_against_teacher_onnx",
                 "int8_against_onnx", "int8_against_teacher_int8", "student_torch_int8_against_minilm",
                 "torch_int8_against_torch", "torch_int8_against_minilm_torch_int8")
    assert [(row["name"], row["texts"]) for row in result["real"]] == [("sentences", 16), ("pairs", 16)]
    for row in result["real"]:
        positive(row, "tokens", "median_length", "student_against_minilm", "student_torch_int8_against_minilm")
        for kind in ("student", "minilm", "student_torch_int8", "minilm_torch_int8"):
            positive(row[kind], "seconds", "texts_per_s")
    for row in result["long"]:
        assert row["attention_not_run"] is None
        positive(row, "seconds", "seconds_per_token", "tokens_per_s", "time_per_token_over_short", "attention_seconds",
                 "speed_against_attention", "student_peak_bytes", "attention_peak_bytes", "student_bytes_per_token")


def test_kernel(tmp_path):
    result = quick("kernel", tmp_path)
    assert result["settings"]["versions"] == ["now"]
    assert [(row["texts"], row["tokens"]) for row in result["rows"]] == [(2, 16), (1, 40)]
    for row in result["rows"]:
        for part in ("forward", "both", "model"):
            positive(row[part], "now")
        assert row["both"]["now"]["min"] > row["forward"]["now"]["min"]


def test_kernel_of_a_revision(tmp_path, monkeypatch):
    """The version that git has is loaded, not the files at hand; a revision that there is not is one clear line."""
    import kernel

    names, repository = ("train_6layer_deltanet.py", *kernel.script.KERNEL_FILES), tmp_path / "repository"
    repository.mkdir()
    for name in names:
        (repository / name).write_text((ROOT / name).read_text() + f"# of the revision: {name}\n")
    for words in ("init -q", "add .", "-c user.name=A -c user.email=a@example.org commit -q -m first"):
        subprocess.run(["git", "-C", str(repository), *words.split()], check=True)
    for name in names:
        (repository / name).write_text("not what was committed\n")
    monkeypatch.setattr(kernel, "ROOT", repository)
    version = kernel.load_version("HEAD", tmp_path / "copy")
    assert version.kernel is not kernel.script.kernel
    assert version.KERNEL_FILES["delta_kernel.py"].endswith(b"# of the revision: delta_kernel.py\n")
    with pytest.raises(kernel.script.UserError, match="--against no-such: "):
        kernel.load_version("no-such", tmp_path / "none")


def test_data(tmp_path):
    result = quick("data", tmp_path)
    assert [row["times"] for row in result["indexing"]] == [row["times"] for row in result["starts"]] == [1, 2]
    for row in result["indexing"]:
        positive(row, "pairs", "sources", "seconds", "pairs_per_s",
                 "peak_bytes", "tree_pss_bytes", "tree_anonymous_bytes")
    for row in result["starts"]:
        positive(row, "seconds", "first_seconds", "batch_seconds", "batch_mean_seconds", "padding", "peak_bytes",
                 "anonymous_opened", "mapped_bytes")
        assert row["padding"] < 1 and all(0 <= w["wait_share"] <= w["wait_share_without"] < 1 for w in row["waiting"])
    assert result["indexing"][1]["pairs"] == 2 * result["indexing"][0]["pairs"]  # nothing deduplicated
    positive(result["index"], "pairs", "start_seconds", "window_seconds", "anonymous_after_windows")


@pytest.mark.slow
def test_scale(tmp_path):
    result = quick("scale", tmp_path)
    rows = {row["part"]: row for row in result["rows"]}
    assert list(rows) == ["compute", "waiting", "gather", "reduction", "data", "step"]
    for part in ("compute", "data", "step"):
        positive(rows[part], "one", "predicted", "measured")
    positive(rows["gather"], "predicted", "measured")
    positive(rows["reduction"], "predicted"), positive(rows["waiting"], "measured")
    for key in ("one", "predicted", "measured"):  # one round: the parts are the step
        value = {part: row[key] if key == "predicted" else row[key]["median"] for part, row in rows.items()}
        assert sum(value.values()) == pytest.approx(2 * value["step"])
    assert result["sizes"]["gather_bytes"] == 2 * 384 * 4 * result["sizes"]["sentences"]
    assert result["sizes"]["gradient_bytes"] == pytest.approx(4 * 10.8e6, rel=0.02)
    positive(result["constants"], "slow_down", "latency_s", "byte_s", "data_pair_s", "batch_pair_s", "window_pair_s")
    clusters = [(row["nodes"], row["gpus"], row["pairs"]) for row in result["cluster"]]
    assert clusters == [(1, 1, 256), (1, 8, 2048), (2, 8, 4096), (8, 8, 16384)]
    for row in result["cluster"]:
        positive(row, "compute", "losses", "device", "batch", "window", "loss_matrix_bytes")


def test_launches(tmp_path):
    result = quick("launches", tmp_path)
    whole, parts, preset = result["rows"]
    settings = [(row["preset"], row["micro_batches"]) for row in result["rows"]]
    assert settings == [("specification", 1), ("specification", 4), ("match_teacher", 1)]
    for row in result["rows"]:
        positive(row["operators"], "teacher", "forward", "losses", "backward", "optimiser")
        assert sum(row["operators"].values()) == row["total"]
        assert row["launch_milliseconds"]["5"] == pytest.approx(row["total"] / 200)
    assert parts["operators"]["teacher"] == 4 * whole["operators"]["teacher"] and preset["total"] < whole["total"]
    assert whole["total"] <= 1200 and parts["total"] <= 7000  # what the step may cost
    ratio = parts["arithmetic"][0]["tflop"] / whole["arithmetic"][0]["tflop"]
    assert ratio == pytest.approx(1.24, abs=0.06)  # a second forward pass
    assert 7 < result["kept_gib"] <= 9


def test_ablate(tmp_path):
    result = quick("ablate", tmp_path)
    assert [(row["variant"], len(row["runs"])) for row in result["rows"]] == [("base", 3), ("no layer distill loss", 3)]
    for row in result["rows"]:
        for run in row["runs"]:
            positive(run, "steps", "dev_spearman", "dev_teacher_agreement")
    first, second = (row["runs"] for row in result["rows"])
    assert "layer_distill" in first[0]["last_losses"] and "layer_distill" not in second[0]["last_losses"]
    assert len({run["dev_spearman"] for run in first + second}) == 6  # what is changed, and the seed, does something


def test_generalise(tmp_path, corpus):
    result = quick("generalise", tmp_path, "--drawn", "none", "--data_dir", str(corpus), "--cache_dir", str(tmp_path))
    assert [row["length"] for row in result["lengths"]] == [16, "96+, whole"] and len(result["worst"]) == 10
    for row in [*result["sources"], result["lengths"][0]]:  # no generated text has 96 tokens
        positive(row, "agreement", "neighbours")
        assert row["texts"] >= 200, row
        assert 0.7 < row["agreement"] < 1 and 0.4 < row["neighbours"] < 1, row  # by chance 0 and 0.05 or less
    for row in result["shape"].values():
        positive(row, "effective_rank", "norm_mean")
    done = bench("generalise", "--data_dir", str(corpus), "--cache_dir", str(tmp_path))  # not what it was trained on
    assert done.returncode == 2 and "other sources" in done.stderr.splitlines()[-1]


def test_documents(tmp_path, documents):
    result = quick("documents", tmp_path, "--data_dir", str(documents), "--cache_dir", str(tmp_path / "cache"),
                   "--plot", str(tmp_path / "plot.png"), "--parts", "quality", "passkey", "speed", "target")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    ways = ("bm25", "teacher_256", "teacher_512", "teacher_windows", "teacher_best", "target", "student_256",
            "student_windows", "student_best", "late", "whole")
    assert [row["source"] for row in result["sources"]] == ["first", "second", "mean"]
    for row in result["sources"]:
        assert all(60 < row[way] <= 100 for way in ways), row  # the query is the first sentence; by chance 38
    assert [row["length"] for row in result["passkey"]] == [256, 512] and result["passkey"][0]["bm25"] == 1
    for row in result["passkey"]:
        assert all(0 <= row[way] <= 1 for way in row if way != "length")
    positive(result["speed"][0], "speed_against_teacher_windows")
    for way in ("teacher_windows", "target", "student_windows", "whole"):
        positive(result["speed"][0][way], "tokens_per_s")
    positive(result["speed"][1]["whole"], "tokens_per_s", "peak_bytes")


def test_the_nearest_piece_of_a_document_counts():
    """Windows and pieces of a pass are not equally many; each way has the best of its own ones of each document."""
    import documents
    import numpy as np

    rng = np.random.default_rng(0)
    counts = {"window_counts": np.array([1, 2, 1]), "late_counts": np.array([2, 2, 1])}
    vectors = {way: rng.normal(size=(counts[name].sum(), 4)) for way, name in documents.SEVERAL.items()}
    vectors |= {f"{model}_query": rng.normal(size=(3, 4)) for model in ("teacher", "student")} | counts
    scores = documents.all_scores(vectors)
    assert scores.keys() == documents.SEVERAL.keys()
    for way, name in documents.SEVERAL.items():
        queries = vectors[("teacher" if way == "teacher_best" else "student") + "_query"]
        parts = np.split(vectors[way], np.cumsum(counts[name])[:-1])
        expected = np.stack([(queries @ part.T).max(1) for part in parts], 1)
        assert np.allclose(scores[way], expected, atol=1e-12), way


def test_help_and_bad_input(tmp_path):
    done = bench("data", "--help")
    assert done.returncode == 0 and "--json" in done.stdout and "--quick" in done.stdout
    done = bench("data", "--data_dir", str(tmp_path / "none"))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
