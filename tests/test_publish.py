"""Metrics and models for other tools: `--report_to`, and `save_best_checkpoint.py --push_to_hub`.

TensorBoard's files are read back; wandb, trackio and the hub are stood in for by what they are called with.
"""
from __future__ import annotations

import base64
import json
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import kill_soak  # noqa: E402
import save_best_checkpoint  # noqa: E402
import train_6layer_deltanet as script  # noqa: E402


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Any]:
    """Config overrides of a tiny run of 4 steps."""
    changes = {"total_steps": 4, "save_interval": 2, "log_interval": 1, "eval_interval": 2}
    return kill_soak.make_tiny(tmp_path_factory.mktemp("tiny")) | changes


@pytest.fixture(autouse=True)
def signals():
    """A run's handlers end with its test."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def train(cfg: dict[str, Any], folder: Path, **changes: Any) -> int:
    return script.main(kill_soak.command_line(cfg | {"output_dir": str(folder)} | changes))


def numbers(folder: Path) -> dict[tuple[str, int], float]:
    """The numbers of metrics.jsonl, by name and step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(key, line["step"]): value for line in lines for key, value in line.items()
            if key != "step" and isinstance(value, (int, float))}


def events(path: Path) -> Iterator[Any]:
    """The events of a TensorBoard file: records of a length (8 bytes), a checksum (4), the event, a checksum (4)."""
    from tensorboardX.proto.event_pb2 import Event
    content = path.read_bytes()
    while content:
        size = struct.unpack("<Q", content[:8])[0]
        yield Event.FromString(content[12:12 + size])
        content = content[16 + size:]


def test_tensorboard_shows_what_metrics_hold_and_a_resumed_run_appends(tiny, tmp_path):
    pytest.importorskip("tensorboardX")
    assert train(tiny, tmp_path / "run", report_to="tensorboard") == 0
    assert train(tiny, tmp_path / "run", report_to="tensorboard", resume_from_step=2) == 0
    files = sorted((tmp_path / "run" / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) == 2
    shown, restarts = {}, []
    for event in (event for file in files for event in events(file)):
        if event.HasField("session_log"):  # TensorBoard drops what it holds from this step on
            restarts.append(event.step)
            shown = {key: value for key, value in shown.items() if key[1] < event.step}
        shown |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    assert shown == pytest.approx(numbers(tmp_path / "run"), rel=1e-6) and restarts[-1] == 3
    assert {("loss/total", 1), ("loss/total", 4), ("sts/validation_spearman", 0)} <= set(shown)


class Tracker(SimpleNamespace):
    """wandb or trackio, whose calls are alike: keeps what it is called with."""

    def __init__(self):
        super().__init__(begun=[], logged={}, finished=0)

    def init(self, **options: Any) -> Tracker:
        self.begun.append(options)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged |= {(key, step): value for key, value in values.items()}

    def finish(self) -> None:
        self.finished += 1


def test_wandb_is_told_and_a_resumed_run_goes_on_in_its_report(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", tracker := Tracker())
    assert train(tiny, tmp_path / "run", report_to="wandb") == 0
    assert train(tiny, tmp_path / "run", report_to="wandb", resume_from_step=2) == 0
    first, second = tracker.begun
    assert first["id"] == second["id"] == first["name"] and first["name"].startswith("run-") and tracker.finished == 2
    assert all(begun["resume"] == "allow" and begun["config"]["batch_size"] == 4 for begun in tracker.begun)
    assert tracker.logged == numbers(tmp_path / "run")


def test_trackio_has_the_calls_of_wandb_but_no_id(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", tracker := Tracker())
    report = script.Report("trackio", tmp_path, "run-1", 0, {"seed": 1})
    report.write(7, {"lr": 0.5, "bad/loss": "distillation", "bad/batch": [1, 2]})
    report.close()
    assert tracker.begun == [{"project": "deltanet", "name": "run-1", "config": {"seed": 1}, "resume": "allow"}]
    assert tracker.logged == {("lr", 7): 0.5} and tracker.finished == 1


def test_report_that_cannot_be_is_one_line_and_one_that_breaks_is_left(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trackio", None)  # as if it were not installed
    assert train(tiny, tmp_path / "run", report_to="trackio") == 2
    error = capsys.readouterr().err
    assert error.endswith("error: report_to trackio: trackio is not installed; pip install trackio\n")
    assert train(tiny, tmp_path / "run", report_to="paper") == 2
    assert "tensorboard, wandb, trackio" in capsys.readouterr().err

    monkeypatch.setitem(sys.modules, "wandb", tracker := Tracker())
    monkeypatch.setattr(Tracker, "log", lambda *_, **__: 1 / 0)
    assert train(tiny, tmp_path / "run", report_to="wandb") == 0 and len(tracker.begun) == 1
    out = capsys.readouterr().out
    assert out.count("warning: report_to wandb: stopped at step 0 (division by zero)") == out.count("report_to") == 1
    assert ("loss/total", 4) in numbers(tmp_path / "run")
    monkeypatch.setattr(Tracker, "init", lambda *_, **__: 1 / 0)
    assert train(tiny, tmp_path / "more", report_to="wandb") == 2
    assert "error: report_to wandb: cannot be started (division by zero)\n" in capsys.readouterr().err


# The hub


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub 2 asks of the hub for a commit of small files; `server.asked` keeps it."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, self.headers["Authorization"], body))
        home, answer, status = f"http://{self.headers['Host']}/some/model", {"error": "unknown"}, 404
        if self.server.refuse:
            answer, status = {"error": "You have no right to this"}, 403
        elif self.path == "/api/repos/create":
            answer, status = {"url": home}, 200
        elif self.path == "/api/validate-yaml":  # of the card's header
            answer, status = {"errors": [], "warnings": []}, 200
        elif self.path == "/api/models/some/model/preupload/main":
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]
            answer, status = {"files": files}, 200
        elif self.path == "/api/models/some/model/commit/main":
            answer, status = {"commitUrl": f"{home}/commit/1", "commitOid": "1", "success": True}, 200
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    """A local server in the hub's place, and a token for it."""
    from huggingface_hub import constants
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.refuse = [], False
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.shutdown()
    server.server_close()


SCORES = {"validation_pearson": 0.87, "validation_spearman": 0.86, "test_pearson": 0.83, "test_spearman": 0.826675}


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory) -> str:
    """A checkpoint of an untrained student with SCORES in its commit mark."""
    cfg = script.check_config(script.config | tiny | {"sts_name": "stsb"})
    student = script.build_student(cfg, script.load_teacher(cfg)[0])
    return str(script.save_checkpoint(tmp_path_factory.mktemp("run"), 0, student, script.build_optimizer(student, cfg),
                                      cfg, {}, {"sums": {}}, {"scores": {"step": 0, **SCORES}}))


def push(checkpoint: str, folder: Path, name: str, *more: str) -> int:
    return save_best_checkpoint.main([checkpoint, "--output_dir", str(folder), "--push_to_hub", name, *more])


def test_push_to_hub_sends_the_whole_model_in_one_commit(hub, checkpoint, tiny, tmp_path, capsys):
    out = tmp_path / "out"
    assert push(checkpoint, out, "some/model", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["hub"] == f"http://127.0.0.1:{hub.server_port}/some/model"
    assert {token for _, token, _ in hub.asked} == {"Bearer hf_secret"}
    [commit] = [body for path, _, body in hub.asked if path.endswith("/commit/main")]
    head, *entries = [json.loads(line) for line in commit.splitlines()]
    assert head["value"]["summary"].startswith("Step 0: checkpoint_0.pt")
    sent = {entry["value"]["path"]: base64.b64decode(entry["value"]["content"]) for entry in entries}
    assert sorted(sent) == result["files"]
    assert {"pytorch_model.bin", "tokenizer.json", "1_Pooling/config.json"} < set(sent)
    for name in set(sent) - {"training_config.json"}:
        assert sent[name] == (out / name).read_bytes(), name
    assert tiny["data_dir"] not in sent["training_config.json"].decode()  # no folder of this machine
    assert json.loads(sent["training_config.json"])["batch_size"] == 4
    assert 'SentenceTransformer("some/model"' in sent["README.md"].decode()

    from huggingface_hub import ModelCard
    found = {(r.dataset_name, r.dataset_split, r.metric_type): r.metric_value
             for r in ModelCard.load(out / "README.md").data.eval_results}
    assert found == {("MTEB STSBenchmark", split, f"cosine_{metric}"): round(100 * SCORES[f"{split}_{metric}"], 4)
                     for split in ("test", "validation") for metric in ("pearson", "spearman")}


def test_push_to_hub_that_cannot_be_is_one_line(hub, checkpoint, tmp_path, monkeypatch, capsys):
    from huggingface_hub import constants

    def refused(name: str) -> str:
        assert push(checkpoint, tmp_path / "out", name) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: push_to_hub") and error.count("\n") == 1 and len(error) < 400
        return error

    for name in ("model", "some/model/more", "some/a b", "/model", ""):
        refused(name)
    with monkeypatch.context() as patch:
        patch.delenv("HF_TOKEN")
        patch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        assert "HF_TOKEN" in refused("some/model")
    assert not hub.asked and not (tmp_path / "out").exists()  # said before anything was done
    hub.refuse = True
    assert "is written, but was not sent" in (error := refused("some/model")) and "403" in error
    assert (tmp_path / "out" / "pytorch_model.bin").exists()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        assert "not sent" in refused("some/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "not sent" in refused("some/model")
