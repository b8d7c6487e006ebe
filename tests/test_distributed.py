"""Several Gloo processes under the real torchrun: the run of one process, and what happens when one of them fails.

Starting a process costs seconds of imports, so several tests look at one run. As a script, this file is what torchrun
starts where something has to be observed or broken inside:
`test_distributed.py '[["function", "argument"], [words], [words]]'` calls the function, then the training script's
`main` with each list of words.
"""
from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tests")]

import forked  # noqa: E402
import kill_soak  # noqa: E402
import train_6layer_deltanet as script  # noqa: E402

RANK = int(os.environ.get("RANK", 0))


class Torchrun:
    """torchrun with `count` processes of the training script on `cfg`, or of this file where it is given `inside`."""

    def __init__(self, count: int, folder: Path, cfg: dict[str, Any], *options: str, inside: list[Any] | None = None):
        self.log, self.folder = folder.with_name(f"{folder.name}-{count}.log"), folder
        program = [__file__, json.dumps(inside)] if inside else \
            [str(ROOT / "train_6layer_deltanet.py"), *kill_soak.command_line(cfg | {"output_dir": folder})]
        with open(self.log, "w") as log:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
            env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            self.launcher = subprocess.Popen([*command, *options, *program], stdout=log, stderr=log, env=env)

    def pid(self, rank: int) -> int:
        """The process id of a rank."""
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                parent = int((path.parent / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if parent == self.launcher.pid and f"\0RANK={rank}\0" in "\0" + path.read_text():
                    return int(path.parent.name)
            except OSError:  # gone by now
                continue
        raise AssertionError(f"no process of rank {rank}: {self.text()}")

    def text(self) -> str:
        return self.log.read_text()

    def until(self, condition: Callable[[], Any], seconds: float = 200) -> None:
        """Wait for `condition()`; the launcher must not end before."""
        limit = time.time() + seconds
        while not condition():
            assert self.launcher.poll() is None and time.time() < limit, self.text()
            time.sleep(0.02)

    def until_steps(self, more: int) -> None:
        """Until a running job has taken `more` steps from now; log_interval must be 1."""
        path = self.folder / "metrics.jsonl"
        before = kill_soak.lines_in(path)
        self.until(lambda: kill_soak.lines_in(path) >= before + more)

    def wait(self, seconds: float = 300) -> int:
        try:
            return self.launcher.wait(seconds)
        finally:
            if self.launcher.poll() is None:
                self.launcher.kill()


def dump_first_step(path: str) -> None:
    """Write step 1's losses and gradients, without and with dropout, to `path`-MICRO-BATCHES-RANK.pt.

    Beside them how many forward passes this process took, and the weights.
    """
    original, forward, names = script.Trainer.step_gradients, script.Trainer.forward, ("dropout", "state_dropout")
    taken = []

    def step_gradients(self, batch, step, cached=None):
        rates, found = [getattr(self.student.config, name) for name in names], {}
        for kind, values in {"off": [0.0, 0.0], "on": rates}.items() if step == 1 else ():
            for name, value in zip(names, values):
                setattr(self.student.config, name, value)
            taken.clear()
            losses = {n: x.item() for n, x in original(self, copy.deepcopy(batch), step, cached).items()}
            gradients = {n: p.grad.clone() for n, p in self.student.named_parameters() if p.grad is not None}
            found[kind] = losses, gradients, len(taken)
            self.student.zero_grad(set_to_none=True)
            weights = {n: p.detach().clone() for n, p in self.student.named_parameters()}
            torch.save([found, weights], f"{path}-{len(batch)}-{RANK}.pt")
        return original(self, batch, step, cached)

    def counted(self, *arguments):
        taken.append(arguments)
        return forward(self, *arguments)

    script.Trainer.step_gradients, script.Trainer.forward = step_gradients, counted


def spoil_and_slow_rank_1(_: str) -> None:
    """On rank 1: no finite loss in step 2, no finite embeddings in step 3, and every forward pass takes long."""
    step_gradients, forward = script.Trainer.step_gradients, script.Trainer.forward

    def spoiled_step(self, batch, step, cached=None):
        self.now = step
        spoilt = {"distillation": torch.tensor(float("nan"))} if step == 2 else {}
        return step_gradients(self, batch, step, cached) | spoilt

    def spoiled_forward(self, *arguments):
        time.sleep(0.3)
        vectors, local = forward(self, *arguments)
        return vectors * (float("inf") if self.now == 3 else 1.0), local

    if RANK == 1:
        script.Trainer.step_gradients, script.Trainer.forward = spoiled_step, spoiled_forward


# Equal to one process


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Any]:
    """Micro-batches of 3, 3, 2, 2 and 2 pairs, which 2 and 4 processes share unevenly; hard negatives; dropout on."""
    return kill_soak.make_tiny(tmp_path_factory.mktemp("tiny")) | {
        "batch_size": 12, "gradient_accumulation_steps": 5, "peak_learning_rate": 1e-3,
        "guided_contrastive": True, "source_focus": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


# A micro-batch for each of two processes, which then keep the graph of their forward passes; one process caches.
ONE_EACH = {"gradient_accumulation_steps": 2, "total_steps": 3}


def words(cfg: dict[str, Any], output: Path, **changes: Any) -> list[str]:
    return kill_soak.command_line(cfg | changes | {"output_dir": str(output)})


@pytest.fixture(scope="module")
def two(tiny, folder) -> Path:
    inside = [["dump_first_step", str(folder / "step-of-2")], words(tiny, folder / "two"),
              words(tiny, folder / "two-at-once", **ONE_EACH)]
    run = Torchrun(2, folder / "two", tiny, inside=inside)
    assert run.wait() == 0, run.text()
    assert "processes: 2; pairs per step: 12; micro-batch: 2 x 5; negatives per anchor: 11" in run.text()
    assert run.text().count("step 20/20") == 1, run.text()
    assert "Traceback" not in run.text() and "UserWarning" not in run.text(), run.text()
    return folder / "two"


def cut(whole: Path, output: Path) -> Path:
    """A copy of a run as it was at step 10."""
    shutil.copytree(whole, output)
    for path in output.glob("checkpoint_[12][50].*"):
        path.unlink()
    return output


@pytest.fixture(scope="module")
def four(tiny, two, folder) -> Path:
    resumed = words(tiny, cut(two, folder / "two-then-four"), resume_from_step=-1)
    inside = [["dump_first_step", str(folder / "step-of-4")], words(tiny, folder / "four"), resumed]
    run = Torchrun(4, folder / "four", tiny, inside=inside)
    assert run.wait() == 0, run.text()
    assert run.text().count("resumed from") == 1
    return folder / "four"


@pytest.fixture(scope="module")
def one(tiny, two, folder) -> Path:
    runs = forked.server()
    dump = ["test_distributed", "dump_first_step", str(folder / "step-of-1")]
    for output, changes, prepare in (("one", {}, dump), ("one-at-once", ONE_EACH, dump),
                                     ("two-then-one", {"resume_from_step": -1}, None)):
        if prepare is None:
            cut(two, folder / output)
        log = folder / f"{output}.log"
        run = runs.start(tiny | changes | {"output_dir": str(folder / output)}, log, prepare)
        assert runs.wait(run) == 0, log.read_text()
    return folder / "one"


FOUR = pytest.mark.slow  # processes; two show the same in half the time


@pytest.fixture(params=[2, pytest.param(4, marks=FOUR)])
def several(request, one) -> tuple[int, Path]:
    return request.param, request.getfixturevalue({2: "two", 4: "four"}[request.param])


def weights(folder: Path, step: int = 20) -> dict[str, torch.Tensor]:
    return script.load_file(folder / f"checkpoint_{step}.pt")["student"]


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def check_first_step(folder: Path, count: int, parts: int, dropout: str, tolerance: float = 1e-5) -> list[int]:
    """Compare step 1's losses and gradients of `count` processes with one's, in `parts` micro-batches.

    Returns the forward passes of the one, then of each of the others.
    """
    expected, _ = torch.load(folder / f"step-of-1-{parts}-0.pt")
    losses, gradients, forwards = expected[dropout]
    counts = [forwards]
    assert set(losses) == {*script.LOSS_WEIGHTS, "total"} and min(losses.values()) > 0
    assert dropout == "off" or abs(losses["total"] - expected["off"][0]["total"]) > 1e-3
    for rank in range(count):
        found, _ = torch.load(folder / f"step-of-{count}-{parts}-{rank}.pt")
        counts.append(found[dropout][2])
        assert found[dropout][0] == pytest.approx(losses, abs=1e-6, rel=0)
        assert found[dropout][1].keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (found[dropout][1][name] - gradient).norm() <= tolerance * gradient.norm(), name
    return counts


@pytest.mark.parametrize("dropout", ["off", "on"])
def test_losses_and_gradients_of_the_first_step(several, folder, dropout):
    count, _ = several
    alone, *each = check_first_step(folder, count, 5, dropout)
    assert alone == sum(each) == 10 and max(each) <= 2 * -(-5 // count)  # gradient caching: each micro-batch twice


@pytest.mark.parametrize("dropout", ["off", "on"])
def test_a_micro_batch_for_each_process_goes_forward_once(one, folder, dropout):
    # One process caches: its losses are of a forward pass without gradients, where layers are rounded otherwise.
    assert check_first_step(folder, 2, 2, dropout, 1e-4) == [4, 1, 1]


def test_weights_after_steps_of_a_micro_batch_for_each_process(two, one, folder):
    found, expected = (weights(folder / name, 3) for name in ("two-at-once", "one-at-once"))
    start = torch.load(folder / "step-of-1-2-0.pt")[1]
    assert furthest(expected, {name: start[name] for name in expected}) > 1e-3 and furthest(found, expected) < 1e-4


def test_weights_after_20_steps(several, one, folder):
    start = torch.load(folder / "step-of-1-5-0.pt")[1]
    moved = furthest(weights(one), {name: start[name] for name in weights(one)})
    assert moved > 1e-3 and furthest(weights(several[1]), weights(one)) < 1e-4


def test_evaluation_is_that_of_one_process(several, tiny):
    """Scores of the last weights, computed here again by one process."""
    cfg, folder = script.config | tiny | {"sts_name": "stsb"}, several[1]
    teacher, tokenizer, _ = script.load_teacher(cfg)
    student = script.open_student(folder / "checkpoint_20.pt", teacher)[0]
    found = kill_soak.metrics(folder)[-1]
    for split, rows in script.load_sts_splits(cfg).items():
        scores = script.evaluate_sts(student, tokenizer, rows, 16, script.sts_cosines(teacher, tokenizer, rows, 16))
        assert {key: found[f"sts/{split}_{key}"] for key in scores} == pytest.approx(scores, abs=1e-6)
        assert len(scores) == 3


@pytest.mark.parametrize("later", ["one", pytest.param("four", marks=FOUR)])
def test_checkpoint_of_two_is_resumed_by(later, request, one, two, folder):
    request.getfixturevalue(later)
    resumed = folder / f"two-then-{later}"
    assert kill_soak.metrics(resumed)[-1]["step"] == 20 and furthest(weights(resumed), weights(one)) < 1e-4
    assert script.load_file(two / "checkpoint_20.pt").keys() == script.load_file(one / "checkpoint_20.pt").keys()


def test_fewer_micro_batches_than_processes_is_one_line(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert script.main(words(tiny, tmp_path / "run")) == 2
    assert capsys.readouterr().err == "error: gradient_accumulation_steps is 5: each of the 8 processes needs a " \
                                      "micro-batch; set --gradient_accumulation_steps 8 or more\n"
    assert not (tmp_path / "run").exists()


# Faults


@pytest.mark.slow
def test_restarts_end_with_the_same_weights(tiny, two, folder):
    """Rank 1 hangs and is named, later it is killed; the job restarts by itself each time, and ends as undisturbed."""
    cfg = tiny | {"log_interval": 1, "save_interval": 2, "resume_from_step": -1, "peer_timeout": 4}
    run = Torchrun(2, folder / "restarted", cfg, "--max-restarts", "3")
    run.until_steps(4)
    os.kill(run.pid(1), signal.SIGSTOP)
    run.until(lambda: re.search(r"error: rank 0, step \d+: no answer from rank 1 \(", run.text()), 30)
    os.kill(run.pid(1), signal.SIGKILL)
    run.until(lambda: run.text().count("resumed from") == 1)
    run.until_steps(4)
    os.kill(run.pid(1), signal.SIGKILL)
    assert run.wait() == 0, run.text()
    assert run.text().count("resumed from") == 2 and "rank0]: Traceback" not in run.text(), run.text()
    assert kill_soak.same(weights(folder / "restarted"), weights(two))
    assert [line["step"] for line in kill_soak.metrics(folder / "restarted") if "lr" in line] == list(range(1, 21))


@pytest.mark.slow
def test_sigterm_to_one_saves_once_and_a_killed_process_ends_the_job(tiny, folder):
    cfg = tiny | {"log_interval": 1, "save_interval": 1000, "total_steps": 1000, "resume_from_step": -1}
    run = Torchrun(2, folder / "ended", cfg, "--max-restarts", "1")
    run.until_steps(3)
    os.kill(run.pid(1), signal.SIGTERM)
    run.until(lambda: "resumed from" in run.text())
    steps = script.checkpoint_steps(folder / "ended")
    assert len(steps) == 1 and f"SIGTERM received; newest checkpoint in {folder / 'ended'}: {steps}" in run.text()
    assert "exitcode: 143" in run.text() and "Traceback" not in run.text().split("resumed from")[0], run.text()
    run.until_steps(3)
    killed = time.time()
    os.kill(run.pid(1), signal.SIGKILL)
    assert run.wait(60) != 0 and time.time() - killed < 60
    assert re.search(r"Root Cause.*\n.*\n.*\n.*\n *rank *: 1 .*\n *exitcode *: -9", run.text()), run.text()
    assert "[rank0]: Traceback" not in run.text() and script.checkpoint_steps(folder / "ended") == steps


def test_bad_numbers_of_one_the_slowest_and_sigterm_to_the_launcher(tiny, folder):
    cfg = tiny | {"log_interval": 1, "save_interval": 1000, "total_steps": 1000}
    output = folder / "spoiled"
    run = Torchrun(2, output, cfg, inside=[["spoil_and_slow_rank_1", ""], words(cfg, output)])
    run.until_steps(8)
    run.launcher.terminate()
    assert run.wait(60) != 0
    lines = kill_soak.metrics(output)
    assert [(line["bad/step"], line["bad/loss"]) for line in lines if "bad/step" in line] == \
        [(2, "a number of another process"), (3, "contrastive")]
    ends = [line for line in lines if "lr" in line]
    assert all(line["speed/slowest_rank"] == 1 and line["speed/slowest_rank_excess"] > 0.2 for line in ends)
    assert "; slowest: rank 1, +" in run.text()
    assert script.checkpoint_steps(output) == [lines[-1]["step"]], run.text()
    assert run.text().count("SIGTERM received; newest") == 1, run.text()


if __name__ == "__main__":
    (function, argument), *lines = json.loads(sys.argv[1])
    globals()[function](argument)
    for number, line in enumerate(lines):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # names of their own in torchrun's store
        if status := script.main(line):
            sys.exit(status)
