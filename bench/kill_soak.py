"""Kill a tiny training run at random instants, resume it each time, and compare it with one that was left alone.

    python bench/kill_soak.py --kills 100                  a table; exit status 0 only if everything is equal
    python bench/kill_soak.py --kills 5 --json soak.json   the same as JSON too

Every life of the killed run is a process that runs the training script's `main` with `--resume latest`; it is forked
from a process without threads that has done the imports, so that they are paid once. A share of the kills falls into
the start-up, the others into training, which saves after every step. Compared bit by bit: final weights, optimiser
state, best scores, the best and the final model, and metrics.jsonl.
"""
from __future__ import annotations

import argparse
import gzip
import importlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # faults to inject are functions of the tests

import datasets  # noqa: F401  imported here, so that the forked processes need not
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

import train_6layer_deltanet as script

WORDS = ("a the one two red blue old new small big man woman dog cat bird horse car boat house tree road river sea "
         "hill runs sits eats sees holds near under over behind with slowly fast").split()
TIMES = ("speed/pairs_per_s", "speed/data_wait")  # the fields of metrics.jsonl that may differ


def sentence(rng: random.Random, longest: int = 6) -> str:
    """A few words, at least two."""
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, longest)))


def write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as file:
        file.writelines(line + "\n" for line in lines)


def make_tiny(folder: Path, width: int = 32, layers: int = 2, pairs: int = 300) -> dict[str, Any]:
    """A random teacher, training pairs and STS files under `folder`; returns the config overrides of a run on them."""
    rng = random.Random(1)
    teacher = folder / "teacher"
    teacher.mkdir(parents=True)
    (teacher / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=5 + len(WORDS), hidden_size=width, num_hidden_layers=layers, num_attention_heads=2,
                         intermediate_size=2 * width), add_pooling_layer=False).save_pretrained(teacher)
    BertTokenizerFast(vocab=str(teacher / "vocab.txt")).save_pretrained(teacher)
    rows = [[sentence(rng) for _ in range(2 + (i % 3 == 0))] for i in range(pairs)]
    write_lines(folder / "data" / "train" / "pairs.jsonl.gz", [json.dumps(row) for row in rows])
    for split, count in script.STS_ROWS.items():
        write_lines(folder / "data" / "sts" / f"stsb-{split}.tsv.gz",
                    [f"{sentence(rng, 3)}\t{sentence(rng, 3)}\t{rng.uniform(0, 5):.3f}" for _ in range(count)])
    return {"teacher_model": str(teacher), "data_dir": str(folder / "data"), "cache_dir": str(folder / "cache"),
            "d_model": width, "num_heads": 2, "num_layers": layers, "batch_size": 4, "gradient_accumulation_steps": 2,
            "max_length": 16, "total_steps": 20, "warmup_steps": 4, "eval_interval": 1000, "save_interval": 5,
            "log_interval": 2, "device": "cpu", "threads": 1, "spearman_pairs": 16}


def command_line(cfg: dict[str, Any]) -> list[str]:
    return [word for key, value in cfg.items() for word in (f"--{key}", str(value))]


def fork_run(cfg: dict[str, Any], log: str, prepare: list[Any] | None = None) -> int:
    """Start the training script's `main` in a forked process, its output appended to `log`; returns the pid.

    `prepare` is [module, function, arguments...] to call in it first: a fault to inject.
    """
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1), os.dup2(handle, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if prepare:
            getattr(importlib.import_module(prepare[0]), prepare[1])(*prepare[2:])
        status = script.main(command_line(cfg))
        sys.stdout.flush(), sys.stderr.flush()  # os._exit does not
        os._exit(status)
    except BaseException:  # the child must never go on as a second server
        import traceback
        traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(70)


def serve() -> None:
    """Answer requests, one JSON object a line: start a run, or tell the exit status of one (null while it runs)."""
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, code = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(code) if pid else None
        else:
            answer = fork_run(**request)
        print(json.dumps(answer), flush=True)


class Runs:
    """Runs of the training script, forked from a server process; a caller with threads cannot fork safely itself."""

    def __init__(self):
        env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.server = subprocess.Popen([sys.executable, __file__, "--serve"], stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE, text=True, env=env)

    def ask(self, **request: Any) -> Any:
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, cfg: dict[str, Any], log: Path, prepare: list[Any] | None = None) -> int:
        """The pid of a new run; see `fork_run`."""
        return self.ask(cfg=cfg, log=str(log), prepare=prepare)

    def poll(self, pid: int) -> int | None:
        """The exit status, negative for a signal, or None while it runs; ask no more after a status."""
        return self.ask(poll=pid)

    def wait(self, pid: int, seconds: float = 600) -> int:
        limit = time.time() + seconds
        while (status := self.poll(pid)) is None:
            if time.time() > limit:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        return status

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without their times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def same(a: Any, b: Any) -> bool:
    """Equal bit by bit, through dicts and lists."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def compare(whole: Path, killed: Path, steps: int) -> dict[str, bool]:
    """What of two finished runs is equal."""
    first, second = (script.load_file(folder / f"checkpoint_{steps}.pt") for folder in (whole, killed))
    result = {f"{name} equal": same(first[key], second[key]) for name, key in (
        ("final weights", "student"), ("optimiser state", "optimizer"), ("best scores", "best"),
        ("progress", "progress"))}
    for name in ("pytorch_model.bin", "final_model/pytorch_model.bin"):
        result[f"{name} equal"] = same(*(script.load_file(folder / name) for folder in (whole, killed)))
    scores = [json.loads((folder / "scores.json").read_text()) for folder in (whole, killed)]
    result["scores.json equal"] = same(*scores)
    result["metrics.jsonl equal"] = metrics(whole) == metrics(killed)
    logged = [line["step"] for line in metrics(killed) if "lr" in line]
    result["no step twice, none missing"] = logged == list(range(1, steps + 1))
    result["no temporary file left"] = not list(killed.rglob(".*.tmp-*"))
    return result


def soak(folder: Path, kills: int, seed: int = 0, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run undisturbed, then killed `kills` times; returns what was done and what is equal."""
    rng, steps, runs = random.Random(seed), 3 * kills + 12, Runs()
    cfg = make_tiny(folder) | {"total_steps": steps, "save_interval": 1, "log_interval": 1, "keep_checkpoints": 3,
                               "eval_interval": max(2, steps // 4)}
    whole, killed, log = folder / "whole", folder / "killed", folder / "killed.log"
    begun = time.perf_counter()
    if runs.wait(runs.start(cfg | {"output_dir": str(whole)}, folder / "whole.log")):
        raise SystemExit("error: the undisturbed run failed:\n" + (folder / "whole.log").read_text()[-2000:])
    speeds = [line["speed/pairs_per_s"] for line in map(json.loads, (whole / "metrics.jsonl").open()) if "lr" in line]
    pause = cfg["batch_size"] / statistics.median(speeds)  # seconds of a step, with its checkpoint
    say(f"undisturbed: {steps} steps in {time.perf_counter() - begun:.0f} s")

    steps_in = lambda: path.read_bytes().count(b'"lr"') if path.exists() else 0  # noqa: E731
    resumed = cfg | {"output_dir": str(killed), "resume_from_step": -1}
    done = {"start-up": 0, "training": 0, "training, in a write": 0, "of them in a checkpoint": 0, "finished early": 0}
    startup, path = 1.0, killed / "metrics.jsonl"  # seconds; measured again in every life
    killed_at = set()
    while (count := done["start-up"] + done["training"]) < kills:
        pid, born, early = runs.start(resumed, log), time.time(), count % 5 == 0
        status = target = None
        if early:
            time.sleep(rng.uniform(0, startup))
        # Until this life has cut the metrics to its checkpoint, and then taken 1 to 3 steps.
        while not early and status is None:
            time.sleep(0.005)
            if target is not None and steps_in() >= target:
                startup = 0.5 * startup + 0.5 * (time.time() - born)
                time.sleep(rng.uniform(0, pause))
                break
            if target is None and (killed / "run.json").exists() and (killed / "run.json").stat().st_mtime > born:
                target = steps_in() + rng.randint(1, 3)
            status = runs.poll(pid)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            status = runs.wait(pid)
        if status != -signal.SIGKILL:
            done["finished early"] += 1
            break
        done["start-up" if early else "training"] += 1
        written = [p.name for p in killed.rglob(".*.tmp-*")]
        killed_at |= set() if early else {steps_in()}
        done["training, in a write"] += bool(not early and written)
        done["of them in a checkpoint"] += bool(not early and any(name.startswith(".checkpoint") for name in written))
    status = runs.wait(runs.start(resumed, log))
    runs.close()
    if status:
        raise SystemExit("error: the killed run failed:\n" + log.read_text()[-2000:])
    equal = compare(whole, killed, steps) | {
        "no traceback": "Traceback" not in log.read_text(), "as many kills as asked": count == kills,
        "most kills at different steps": len(killed_at) > done["training"] / 2}
    return {"kills": count, **done, "steps": steps, "different steps killed at": len(killed_at),
            "uncommitted checkpoints passed over": log.read_text().count("warning: passing"),
            "seconds": round(time.perf_counter() - begun), "equal": equal}


def main(argv: list[str] | None = None) -> int:
    """Returns 0 only if the killed run equals the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--json", type=Path, help="write the result here too")
    args = parser.parse_args(argv)
    if args.kills < 1:
        parser.error("--kills must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        result = soak(Path(folder), args.kills, args.seed)
    for key, value in result.items():
        if key != "equal":
            print(f"{key:<36} {value}")
    for key, value in result["equal"].items():
        print(f"{key:<36} {'yes' if value else 'NO'}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if all(result["equal"].values()) else 1


if __name__ == "__main__":
    sys.exit(serve() if sys.argv[1:] == ["--serve"] else main())
