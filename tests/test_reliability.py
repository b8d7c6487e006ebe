"""Faults injected on purpose: kills, damaged files, signals, full disks, numbers that are not finite, two runs at once.

Runs are forked from one process (see forked.py and bench/kill_soak.py), so that the imports are paid once; what
concerns the imports themselves is tested with the real command line.
"""
from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

import pytest
import torch

import forked  # the benches are found from here on
import kill_soak
import train_6layer_deltanet as script
from forked import ROOT


class Process:
    """A run of the training script on the tiny setup, in the folder `output`.

    `fault` is a function of this file and its arguments.
    """

    def __init__(self, cfg: dict[str, Any], output: Path, *fault: Any, **changes: Any):
        self.folder, self.log, self.status = output, output.with_name(f"{output.name}-{time.time()}.log"), None
        prepare = ["test_reliability", fault[0].__name__, *fault[1:]] if fault else None
        self.pid = forked.server().start(cfg | changes | {"output_dir": str(output)}, self.log, prepare)

    def poll(self) -> int | None:
        if self.status is None:
            self.status = forked.server().poll(self.pid)
        return self.status

    def until(self, condition: Callable[[], Any], seconds: float = 300) -> None:
        """Wait for `condition()`; the run must not end before."""
        limit = time.time() + seconds
        while not condition():
            assert self.poll() is None and time.time() < limit, self.text()
            time.sleep(0.01)

    def until_lines(self, count: int) -> "Process":
        self.until(lambda: kill_soak.lines_in(self.folder / "metrics.jsonl") >= count)
        return self

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = 300) -> int:
        """The exit status; whatever happened, there is no traceback."""
        limit = time.time() + seconds
        while self.poll() is None:
            if time.time() > limit:
                os.kill(self.pid, signal.SIGKILL)
                pytest.fail(f"still running after {seconds} s: {self.text()}")
            time.sleep(0.01)
        assert "Traceback" not in self.text(), self.text()
        return self.status

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, few_sts_rows) -> dict[str, Any]:
    """Config overrides of a tiny run."""
    return kill_soak.make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    """A run of 20 steps that was left alone: checkpoints 5, 10, 15, 20. Tests copy it."""
    output = tmp_path_factory.mktemp("finished") / "run"
    run = Process(tiny, output, eval_interval=10)
    assert run.wait() == 0, run.text()
    return output


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def mark(folder: Path, step: int) -> dict[str, Any]:
    return json.loads((folder / f"checkpoint_{step}.json").read_text())


def test_killed_run_equals_undisturbed_run(few_sts_rows, tmp_path, monkeypatch):
    monkeypatch.setattr(kill_soak, "Runs", forked.server)
    monkeypatch.setattr(forked.server(), "close", lambda: None)
    result = kill_soak.soak(tmp_path, 5, say=lambda line: None)
    assert result["kills"] == 5 and all(result["equal"].values()), result


def test_same_seed_same_metrics(tiny, finished, tmp_path):
    assert Process(tiny, tmp_path / "again", eval_interval=10).wait() == 0
    assert kill_soak.metrics(tmp_path / "again") == kill_soak.metrics(finished)
    assert kill_soak.metrics(finished)[-1]["step"] == 20


# Checkpoints


def test_commit_mark_describes_the_file(finished):
    assert script.checkpoint_steps(finished) == [5, 10, 15, 20]
    for step in (5, 10, 15, 20):
        path = finished / f"checkpoint_{step}.pt"
        assert mark(finished, step)["sha256"] == script.file_sha256(path)
        assert mark(finished, step)["bytes"] == path.stat().st_size and script.verify_checkpoint(path) is None
        assert mark(finished, step)["losses"]["loss/total"] > 0
    assert not list(finished.rglob(".*.tmp-*"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "one bit": lambda path: flip(path),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "empty": lambda path: path.write_bytes(b""),
    "no commit mark": lambda path: path.with_suffix(".json").unlink(),
    "torn commit mark": lambda path: path.with_suffix(".json").write_text('{"step": 20, "by'),
    "another step's files": lambda path: [shutil.copy(path.with_name(f"checkpoint_10{s}"), path.with_suffix(s))
                                          for s in (".pt", ".json")],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found(copied, damage, capsys):
    DAMAGE[damage](copied / "checkpoint_20.pt")
    assert script.find_checkpoint(copied, -1) == copied / "checkpoint_15.pt"
    assert f"warning: passing over {copied / 'checkpoint_20.pt'}" in capsys.readouterr().out
    with pytest.raises(script.UserError, match="newest whole checkpoint is step 15"):
        script.find_checkpoint(copied, 20)


def test_damaged_newest_is_passed_over_and_the_result_is_the_same(tiny, copied, finished):
    flip(copied / "checkpoint_20.pt")
    exact = Process(tiny, copied, resume_from_step=20)
    assert exact.wait() == 2 and "step 15: use --resume_from_step 15" in exact.text()
    (copied / ".checkpoint_20.pt.tmp-1").write_bytes(b"torn")
    latest = Process(tiny, copied, resume_from_step=-1, eval_interval=10, keep_checkpoints=1)
    assert latest.wait() == 0, latest.text()
    assert f"warning: passing over {copied / 'checkpoint_20.pt'}" in latest.text()
    assert not list(copied.rglob(".*.tmp-*")) and (copied / "checkpoint_20.pt.superseded").exists()
    assert kill_soak.metrics(copied) == kill_soak.metrics(finished)
    assert kill_soak.same(*(script.load_file(f / "checkpoint_20.pt") | {"config": 0} for f in (copied, finished)))


def test_continuing_an_older_step_leaves_no_mixture(tiny, copied, finished):
    run = Process(tiny, copied, resume_from_step=10, eval_interval=10)
    assert run.wait() == 0 and "checkpoint_15 is newer than this continuation" in run.text()
    assert kill_soak.metrics(copied) == kill_soak.metrics(finished)


def test_best_model_of_a_superseded_step_is_replaced(tiny, copied):
    """The folder's best model must be of a step that the continuation has seen: from its checkpoint, or put aside."""
    path, scores = copied / "checkpoint_15.pt", copied / "scores.json"
    content = script.load_file(path)
    content["best"]["test"] |= {"step": 10, "test_spearman": 0.5}
    torch.save(content, path)
    changed = {"bytes": path.stat().st_size, "sha256": script.file_sha256(path)}
    path.with_suffix(".json").write_text(json.dumps(mark(copied, 15) | changed))
    scores.write_text(json.dumps({"step": 20}))
    run = Process(tiny, copied, resume_from_step=15, eval_interval=10)
    assert run.wait() == 0 and "it is the best student until now again, of step 10" in run.text()
    best = script.load_file(copied / "pytorch_model.bin")
    kept = script.load_file(copied / "checkpoint_10.pt")["student"]
    assert all(torch.equal(best[name], tensor) for name, tensor in kept.items())
    assert json.loads(scores.read_text())["step"] == 10 and json.loads(scores.read_text())["test_spearman"] == 0.5

    scores.write_text(json.dumps({"step": 999}))
    (copied / "checkpoint_10.pt").unlink()
    run = Process(tiny, copied, resume_from_step=15, eval_interval=10)
    assert run.wait() == 0 and "renamed to pytorch_model.bin.superseded" in run.text()
    assert json.loads(scores.read_text())["step"] == 20


def test_changed_data_are_refused(tiny, copied, tmp_path):
    other = shutil.copytree(tiny["data_dir"], tmp_path / "data")
    kill_soak.write_lines(other / "train" / "pairs.jsonl.gz", ['["a red dog", "a blue dog"]'] * 50)
    before = {p.name: script.file_sha256(p) for p in copied.glob("checkpoint_*")}
    run = Process(tiny, copied, resume_from_step=15, data_dir=str(other))
    assert run.wait() == 2 and "source pairs: its content is not what checkpoint_15 was trained on" in run.text()
    assert {p.name: script.file_sha256(p) for p in copied.glob("checkpoint_*")} == before


def test_damaged_or_unfinished_shards_are_tokenised_again(tiny, tmp_path, monkeypatch, capsys):
    """A kill while tokenising leaves whole shards, which are used; a flipped bit is found and named."""
    monkeypatch.setattr(script, "SHARD_ROWS", 100)
    cfg = script.check_config(script.config | tiny | {"cache_dir": str(tmp_path / "cache"), "sts_name": "stsb"})
    _, tokenizer, _ = script.load_teacher(cfg)
    load = lambda: script.load_training_data(cfg, tokenizer)  # noqa: E731
    data = load()
    shards = sorted((tmp_path / "cache").rglob("shard-*.arrow"))
    assert len(shards) == 3 and data.size + data.leaks == 300
    flip(shards[1])
    shards[2].with_suffix(".json").unlink(), (shards[2].parent / "meta.json").unlink()
    (shards[0].parent / ".shard-00002.arrow.tmp-1").write_bytes(b"torn")
    times = [p.stat().st_mtime_ns for p in shards]
    assert load().fingerprints == data.fingerprints and not list(tmp_path.rglob(".*.tmp-*"))
    assert [p.stat().st_mtime_ns == t for p, t in zip(shards, times)] == [True, False, False]
    capsys.readouterr()
    flip(shards[0])
    assert load().fingerprints == data.fingerprints
    assert "shard-00000.arrow: its sha256 differs" in capsys.readouterr().out


def small_windows() -> None:
    """Windows of 16 steps, so that a short run crosses from one into the next."""
    script.PairData.WINDOW = 16


@pytest.mark.parametrize("sources", ["local", "none"])
def test_streams_continue_where_they_were(tiny, tmp_path, sources):
    """A streamed data set beside the local one, or alone, shorter than the run: a resumed run is the same as the whole.

    It is resumed in the first window and in the second.
    """
    folder = tmp_path / "stream"
    rng = random.Random(3)
    for part in range(2):
        rows = [{"anchor": kill_soak.sentence(rng, 9), "positive": kill_soak.sentence(rng, 9)} for _ in range(30)]
        kill_soak.write_lines(folder / f"{part}.jsonl.gz", list(map(json.dumps, rows)))
    cfg = tiny | {"streams": str(folder), "sources": sources, "save_interval": 6, "eval_interval": 10}
    whole = tmp_path / "whole"
    run = Process(cfg, whole, small_windows)
    assert run.wait() == 0, run.text()
    places = [script.load_file(whole / f"checkpoint_{step}.pt")["progress"]["streams"][str(folder)] for step in (6, 18)]
    assert places[0] == [0, None] and places[1][0] == 1  # more than one pass
    assert sources == "local" or places[1][1][0] > 0
    for step in (12, 18):
        again = Path(shutil.copytree(whole, tmp_path / f"from-{step}"))
        run = Process(cfg, again, small_windows, resume_from_step=step)
        assert run.wait() == 0, run.text()
        assert kill_soak.metrics(again) == kill_soak.metrics(whole)
        assert kill_soak.same(*(script.load_file(f / "checkpoint_20.pt")["student"] for f in (whole, again)))
    bad = Process(cfg | {"streams": str(tmp_path / "nowhere")}, tmp_path / "bad")
    assert bad.wait() == 2 and "nowhere: cannot be opened" in bad.text()


def test_tokenising_in_processes_gives_the_same(tiny, tmp_path):
    """Two processes; the shards are those of one process."""
    folders = [tmp_path / "0", tmp_path / "2"]
    for folder, count in zip(folders, (0, 2)):
        folder.mkdir()
        run = Process(tiny, folder / "run", cache_dir=str(folder), num_proc=count, total_steps=1)
        assert run.wait() == 0, run.text()
    first, second = ([script.file_sha256(p) for p in sorted(f.rglob("shard-*.arrow"))] for f in folders)
    assert first == second and first


def test_a_new_run_does_not_touch_checkpoints(tiny, copied):
    before = {p.name: script.file_sha256(p) for p in copied.glob("*.*")}
    run = Process(tiny, copied)
    assert run.wait() == 2 and "holds checkpoints up to step 20" in run.text()
    assert {p.name: script.file_sha256(p) for p in copied.glob("*.*")} == before


def test_torn_metrics(tiny, copied):
    with open(copied / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "los')
    torn = Process(tiny, copied, resume_from_step=-1)
    assert torn.wait() == 0, torn.text()
    with open(copied / "metrics.jsonl", "a") as file:
        file.write("\0\0\0\n")
    bad = Process(tiny, copied, resume_from_step=-1)
    assert bad.wait() == 2 and "metrics.jsonl" in bad.text()


# Signals


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_and_ends(tiny, tmp_path, number, status):
    run = Process(tiny, tmp_path / "run", total_steps=10000, save_interval=10000).until_lines(4)
    run.send(number)
    assert run.wait(20) == status, run.text()
    [step] = script.checkpoint_steps(run.folder)
    assert mark(run.folder, step)["why"] == f"{number.name} received" and number.name in run.text()
    assert script.verify_checkpoint(run.folder / f"checkpoint_{step}.pt") is None
    assert kill_soak.metrics(run.folder)[-1]["step"] in (step, step - 1)
    more = Process(tiny, run.folder, resume_from_step=-1, total_steps=step + 2, save_interval=10000)
    assert more.wait() == 0 and script.checkpoint_steps(run.folder) == [step, step + 2], more.text()


def slow_steps() -> None:
    original = script.Run.optimise

    def optimise(self, *args):
        print("a slow step", flush=True)
        limit = time.time() + 60
        while time.time() < limit:
            time.sleep(0.05)
        return original(self, *args)
    script.Run.optimise = optimise


def test_second_interrupt_ends_at_once(tiny, tmp_path):
    run = Process(tiny, tmp_path / "run", slow_steps)
    run.until(lambda: "a slow step" in run.text())
    run.send(signal.SIGINT)
    time.sleep(0.5)
    assert run.poll() is None
    run.send(signal.SIGINT)
    assert run.wait(3) == 130


def test_sigusr1_saves_and_goes_on(tiny, tmp_path):
    run = Process(tiny, tmp_path / "run", total_steps=10000, save_interval=10000).until_lines(3)
    run.send(signal.SIGUSR1)
    run.until(lambda: list(run.folder.glob("checkpoint_*.json")))
    [step] = script.checkpoint_steps(run.folder)
    assert mark(run.folder, step)["why"] == "SIGUSR1"
    run.until_lines(step)  # lines are written every second step: training went on
    run.send(signal.SIGTERM)
    assert run.wait(20) == 143 and len(script.checkpoint_steps(run.folder)) == 2


def endless_tokenising() -> None:
    script.load_training_data = lambda *_: (print("tokenising", flush=True), time.sleep(60))


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_before_training(tiny, tmp_path, number, status):
    run = Process(tiny, tmp_path / "run", endless_tokenising)
    run.until(lambda: "tokenising" in run.text())
    run.send(number)
    assert run.wait(3) == status and not script.checkpoint_steps(run.folder)


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_during_the_imports(tmp_path, number, status, delay):
    command = [sys.executable, ROOT / "train_6layer_deltanet.py", "--output_dir", tmp_path / "run"]
    run = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           env=os.environ | {"HF_HUB_OFFLINE": "1"})
    caught = 0
    while not caught & 1 << signal.SIGTERM - 1:  # from its first line on; Python's own start is not the script's
        caught = int(re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{run.pid}/status").read_text())[1], 16)
    time.sleep(delay)
    run.send_signal(number)
    out, err = run.communicate(timeout=20)
    assert run.returncode == status and "Traceback" not in err + out


# Retention and disk


def test_retention_keeps_the_newest_and_the_best(tiny, tmp_path):
    run = Process(tiny, tmp_path / "run", keep_checkpoints=2, save_interval=2, eval_interval=2, total_steps=14)
    assert run.wait() == 0, run.text()
    best = json.loads((run.folder / "results.json").read_text())["best"]
    assert set(script.checkpoint_steps(run.folder)) == {12, 14} | {b["step"] for b in best.values()} - {0}
    assert all((run.folder / f"checkpoint_{s}.json").exists() for s in script.checkpoint_steps(run.folder))
    assert len(list(run.folder.glob("checkpoint_*.json"))) == len(script.checkpoint_steps(run.folder))


def limit_files(size: int) -> None:
    """Writes beyond `size` bytes fail from here on, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_three_failed_saves_stop_the_run(tiny, copied, finished):
    limit = (finished / "checkpoint_20.pt").stat().st_size // 2
    run = Process(tiny, copied, limit_files, limit, resume_from_step=15, keep_checkpoints=1, save_interval=1)
    assert run.wait() == 2, run.text()
    assert run.text().count("not written (") == 3 and "three checkpoints in a row" in run.text()
    assert script.checkpoint_steps(copied) == [5, 10, 15]
    for step in (5, 10, 15):
        assert script.verify_checkpoint(copied / f"checkpoint_{step}.pt") is None
    assert not list(copied.rglob(".*.tmp-*"))


def full_for_two_saves(limit: int) -> None:
    original, calls = script.save_checkpoint, []

    def save(*args):
        calls.append(1)
        limit_files(limit if len(calls) <= 2 else resource.RLIM_INFINITY)
        try:
            return original(*args)
        finally:
            limit_files(resource.RLIM_INFINITY)
    script.save_checkpoint = save


def test_two_failed_saves_are_survived(tiny, tmp_path, finished):
    limit = (finished / "checkpoint_20.pt").stat().st_size // 2
    run = Process(tiny, tmp_path / "run", full_for_two_saves, limit, eval_interval=10)
    assert run.wait() == 0, run.text()
    assert script.checkpoint_steps(run.folder) == [15, 20] and run.text().count("not written (") == 2
    assert kill_soak.metrics(run.folder) == kill_soak.metrics(finished)


def full_for_the_best_model(folder: str) -> None:
    """The disk is full whenever the best model's weights are written; every evaluation is the best so far."""
    original, evaluate = script.write_atomic, script.Run.evaluate

    def write_atomic(path, write, before=lambda: None):
        limit_files(1000 if path == Path(folder) / "pytorch_model.bin" else resource.RLIM_INFINITY)
        try:
            original(path, write, before)
        finally:
            limit_files(resource.RLIM_INFINITY)
    script.write_atomic = write_atomic
    script.Run.evaluate = lambda self: (self.best.clear(), evaluate(self))


def test_best_model_on_a_full_disk(tiny, copied):
    """A best model that cannot be written leaves the older one whole and does not end the run."""
    before = script.file_sha256(copied / "pytorch_model.bin")
    run = Process(tiny, copied, full_for_the_best_model, str(copied), resume_from_step=15, eval_interval=5)
    assert run.wait() == 0 and "best model of step 20 not written" in run.text(), run.text()
    assert script.file_sha256(copied / "pytorch_model.bin") == before


def test_metrics_on_a_full_disk(tmp_path, capsys):
    """Lines that do not fit are written as soon as there is space, each once and whole."""
    run = script.Run.__new__(script.Run)
    run.metrics_path, run.unwritten, run.step, run.lock = tmp_path / "metrics.jsonl", b"", 0, True
    try:
        for run.step in range(1, 9):
            limit_files(50 if 2 < run.step < 6 else resource.RLIM_INFINITY)
            run.write_metrics({"lr": 0.5})
    finally:
        limit_files(resource.RLIM_INFINITY)
    assert [json.loads(line)["step"] for line in run.metrics_path.read_text().splitlines()] == list(range(1, 9))
    assert "not written yet" in capsys.readouterr().out


def small_disk() -> None:
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(2e8, 1e8, 1e8)


def test_start_says_how_much_disk_and_stops_if_it_is_not_there(tiny, tmp_path):
    run = Process(tiny, tmp_path / "run", small_disk)
    assert run.wait() == 2 and "disk: 4 checkpoints" in run.text() and "do not fit in 0.1 GB" in run.text()


# Bad numbers


def spoil(steps: list[int], where: str) -> None:
    """Make the loss (or only the gradient) of `steps` not a number."""
    original = script.Trainer.step_gradients

    def step_gradients(self, batch, step):
        values = original(self, batch, step)
        if step in steps and where == "loss":
            values["distillation"] = torch.tensor(float("inf"))
        elif step in steps:
            next(p for p in self.student.parameters() if p.grad is not None).grad.view(-1)[0] = float("nan")
        return values
    script.Trainer.step_gradients = step_gradients


@pytest.mark.parametrize("where, name", [("loss", "distillation"), ("gradient", "gradient norm")])
def test_bad_step_is_skipped_and_named(tiny, tmp_path, where, name):
    run = Process(tiny, tmp_path / "run", spoil, [7, 11], where, save_interval=1)
    assert run.wait() == 0, run.text()
    bad = [line for line in kill_soak.metrics(run.folder) if "bad/step" in line]
    assert [{k: v for k, v in line.items() if k != "bad/batch"} for line in bad] == [
        {"step": s, "bad/step": s, "bad/loss": name} for s in (7, 11)]
    assert all(len(line["bad/batch"]) >= 8 and line["bad/batch"] != bad[0]["bad/batch"] for line in bad[1:])
    before, after = (script.load_file(run.folder / f"checkpoint_{s}.pt") for s in (6, 7))
    assert kill_soak.same(before["student"], after["student"])
    assert kill_soak.same(before["optimizer"]["state"], after["optimizer"]["state"])


def test_bad_steps_in_a_row_stop_the_run(tiny, tmp_path):
    """A scale that overflows float32 gives losses that are not finite, without any patch."""
    run = Process(tiny, tmp_path / "run", contrastive_scale=1e39, max_bad_steps=6, save_interval=6)
    assert run.wait() == 2, run.text()
    assert "step 6: contrastive was not finite in 6 steps in a row" in run.text()
    assert "lower peak_learning_rate" in run.text()
    assert not script.checkpoint_steps(run.folder)


def infinite_weight(step: int) -> None:
    """The update of `step` overflows a weight."""
    original = script.Run.optimise

    def optimise(self, *args):
        values = original(self, *args)
        if self.step == step:
            self.student.deltanet_norms[0].weight.data[0] = float("inf")
        return values
    script.Run.optimise = optimise


def test_weights_that_are_not_finite_are_never_saved(tiny, tmp_path):
    run = Process(tiny, tmp_path / "run", infinite_weight, 5)
    assert run.wait() == 2 and "step 5: weights are not finite" in run.text(), run.text()
    assert not script.checkpoint_steps(run.folder)


def wrong_kernel() -> None:
    check, mixer = script.check_mixers, script.kernel.parallel_mixer
    wrong = lambda *a, **k: tuple(x + 0.01 for x in mixer(*a, **k))  # noqa: E731
    script.check_mixers = lambda device: check(device, {"kernel": wrong})


def test_wrong_kernel_stops_the_run(tiny, tmp_path):
    run = Process(tiny, tmp_path / "run", wrong_kernel)
    assert run.wait() == 2 and "differs from its definition" in run.text()


# Two runs at once


def test_second_run_is_told_of_the_first_and_a_dead_ones_lock_is_taken_over(tiny, tmp_path):
    first = Process(tiny, tmp_path / "run", total_steps=10000, save_interval=2).until_lines(3)
    second = Process(tiny, tmp_path / "run", resume_from_step=-1)
    assert second.wait() == 2 and f"pid {first.pid} on {socket.gethostname()}" in second.text()
    first.until(lambda: script.checkpoint_steps(first.folder))
    first.send(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    newest = max(script.checkpoint_steps(first.folder))
    third = Process(tiny, tmp_path / "run", resume_from_step=-1, total_steps=newest + 1)
    assert third.wait() == 0, third.text()
    assert f"taking over the lock that a dead run left (pid {first.pid}" in third.text(), third.text()
    fourth = Process(tiny, tmp_path / "run", resume_from_step=-1, total_steps=newest + 1)
    assert fourth.wait() == 0 and "taking over" not in fourth.text()
