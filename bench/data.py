"""The data path: indexing, its memory, a second start, batches, and what ten times the pairs change.

    python bench/data.py --data_dir DIR                      tokenises DIR anew (minutes), then ten times its pairs
    python bench/data.py --data_dir DIR --times 1            without the second
    python bench/data.py --data_dir DIR --batch_size 256 --step_seconds 0.018 --json results/bench/data.json
    python bench/data.py --quick                             does it work? under a minute

Every row is of fresh processes on an empty cache folder of its own, never the training's. Ten times the pairs: each
file holds its rows ten times, so sources, files and texts stay the same and nothing is deduplicated.

- indexing: `load_training_data` into the empty cache, once. Memory: highest sum over the process and its children,
  sampled; PSS counts a page that several share in parts, `anonymous` is what of it is no mapped file.
- second start: `load_training_data` on the full cache, `--repeats` times in one process; the first imports `datasets`
  too.
- batches: `PairData.batch` of `--batches` consecutive steps. The trainer builds the next batch during a step, so with
  a step of S seconds a batch of b seconds is waited for b - S; `without` is the share if nothing were built ahead.
  Memory after them, too: mapped pages are the page cache's, which the system takes back; `anonymous` is what must not
  grow with the pairs.
- index: `--index N` opens a tokenised source of N pairs, whose shards are one shard under many names, and draws from
  it.
"""
from __future__ import annotations

import argparse
import gc
import os
import re
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import (configure, find_data, fresh, headline, machine, mib, note, parser, peak_rss, read_text, resident,
                    run, script, shown, spread, table)


def shares(pid: int) -> tuple[int, int]:
    """PSS and anonymous PSS in bytes of a process; 0 where it is gone or the system cannot tell."""
    text = read_text(f"/proc/{pid}/smaps_rollup")
    found = [re.search(rf"^{key}:\s+(\d+) kB", text, re.M) for key in ("Pss", "Pss_Anon")]
    return tuple(int(m[1]) * 1024 if m else 0 for m in found)


class Watch(threading.Thread):
    """Samples the memory of this process and all below it; `pss` and `anonymous` are the highest sums, or None."""

    def __init__(self, interval: float = 0.1):
        super().__init__(daemon=True)
        self.interval, self.done, self.pss, self.anonymous = interval, threading.Event(), 0, 0

    def __enter__(self) -> "Watch":
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.done.set()
        self.join()
        self.pss, self.anonymous = self.pss or None, self.anonymous or None

    def run(self) -> None:
        while not self.done.is_set():
            found = [os.getpid()]
            for pid in found:  # grows while it is walked
                for task in Path(f"/proc/{pid}/task").glob("*/children"):
                    found += map(int, read_text(str(task)).split())
            pss, anonymous = map(sum, zip(*map(shares, found)))
            self.pss, self.anonymous = max(self.pss, pss), max(self.anonymous, anonymous)
            self.done.wait(self.interval)


def indexing(cfg: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Tokenise everything into an empty cache."""
    before, begun = resident(), time.perf_counter()
    with Watch() as watch:
        data = script.load_training_data(cfg, tokenizer, note)
        seconds = time.perf_counter() - begun
    return {"pairs": data.size, "sources": len(data.names), "seconds": seconds, "pairs_per_s": data.size / seconds,
            "bytes_before": before, "peak_bytes": peak_rss(), "tree_pss_bytes": watch.pss,
            "tree_anonymous_bytes": watch.anonymous}


def starting(cfg: dict[str, Any], tokenizer: Any, repeats: int, batches: int) -> dict[str, Any]:
    """Start on a full cache `repeats` times, then draw batches."""
    seconds, drawn, real, padded = [], [], 0, 0
    before, anonymous = resident(), resident("RssAnon")
    for _ in range(repeats):
        begun = time.perf_counter()
        data = script.load_training_data(cfg, tokenizer, note)
        seconds.append(time.perf_counter() - begun)
    opened = resident("RssAnon")
    for step in range(1, batches + 1):
        begun = time.perf_counter()
        batch = data.batch(step)
        drawn.append(time.perf_counter() - begun)
        masks = [mask for micro in batch for _, mask in micro.groups]
        real, padded = real + sum(int(m.sum()) for m in masks), padded + sum(m.numel() for m in masks)
    return {"pairs": data.size, "seconds": seconds, "batch_seconds": drawn, "padding": 1 - real / padded,
            "bytes_before": before, "peak_bytes": peak_rss(), "anonymous_before": anonymous,
            "anonymous_opened": opened, "anonymous_bytes": resident("RssAnon"), "mapped_bytes": resident("RssFile")}


def index(cfg: dict[str, Any], tokenizer: Any, pairs: int, folder: str) -> dict[str, Any]:
    """Open a tokenised source of about `pairs` pairs, all shards checked by sha256; build two windows of batches."""
    size = min(script.SHARD_ROWS, pairs)
    first, count = Path(folder) / "shard-00000.arrow", -(-pairs // size)
    rows = [(f"text number {i}", f"number {i}", None) for i in range(size)]
    script.tokenise_shard(first, rows, tokenizer, cfg["max_length"], set())
    for number in range(1, count):
        for suffix in (".arrow", ".json"):
            os.link(first.with_suffix(suffix), Path(folder) / f"shard-{number:05}{suffix}")
    (Path(folder) / "meta.json").write_text(f'{{"shards": {count}}}')
    script.tokenise_source(lambda: (), tokenizer, cfg["max_length"], set(), Path(folder) / "empty")  # imports
    del rows
    gc.collect()
    before, begun = resident("RssAnon"), time.perf_counter()
    dataset, _ = script.tokenise_source(lambda: (), tokenizer, cfg["max_length"], set(), Path(folder))
    data = script.PairData([("generated", dataset)], cfg)
    opened, seconds = resident("RssAnon") - before, time.perf_counter() - begun
    begun = time.perf_counter()
    data.batch(1), data.batch(1 + data.WINDOW)
    return {"pairs": data.size, "shards": count, "start_seconds": seconds, "anonymous_bytes": opened,
            "bytes": first.stat().st_size * count, "window_seconds": (time.perf_counter() - begun) / 2,
            "anonymous_after_windows": resident("RssAnon") - before}


def worker(kind: str, cfg: dict[str, Any], **more: Any) -> dict[str, Any]:
    """`indexing`, `starting` or `index` in this process."""
    script.choose_device(cfg)
    folder = script.find_teacher(cfg["teacher_model"])[0]
    tokenizer = script.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return {"indexing": indexing, "starting": starting, "index": index}[kind](cfg, tokenizer, **more)


def waiting(batch_seconds: list[float], step: float) -> dict[str, float]:
    """Share of the time that a trainer waits whose step takes `step` seconds, with and without a batch built ahead."""
    ahead = sum(max(0.0, b - step) for b in batch_seconds[1:])  # the first is built before the first step
    work, whole = len(batch_seconds) * step, sum(batch_seconds)
    return {"step_seconds": step, "wait_share": ahead / (work + ahead), "wait_share_without": whole / (work + whole)}


def enlarge(data_dir: Path, folder: Path, times: int) -> Path:
    """A copy of the data folder in which every training file holds its rows `times` times: gzip members in a row."""
    (folder / "train").mkdir(parents=True)
    (folder / "sts").symlink_to((data_dir / "sts").absolute())
    for file in [*data_dir.glob("train/*.jsonl.gz"), *data_dir.glob("*.jsonl.gz")]:
        content = file.read_bytes()
        with open(folder / "train" / file.name, "wb") as copy:
            for _ in range(times):
                copy.write(content)
    return folder


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rows."""
    if args.quick:
        args.repeats, args.batches, args.num_proc, args.times = 2, 20, [0], 2
        args.index = min(args.index, 1000)
    if args.times < 1 or args.batches < 2 or not all(s > 0 for s in args.step_seconds):
        raise script.UserError("--times must be at least 1, --batches at least 2, --step_seconds above 0")
    data, name = find_data(args, folder, 3000)
    more = {k: v for k, v in (("batch_size", args.batch_size), ("gradient_accumulation_steps", args.accumulation)) if v}
    cfg = configure(args, **data, **more) | {"device": "cpu"}
    result = {"machine": machine(script.choose_device(cfg))}
    jobs = [(1, n) for n in args.num_proc] + ([(args.times, max(args.num_proc))] if args.times > 1 else [])
    room = Path(args.work_dir or folder)
    if not room.is_dir():
        raise script.UserError(f"--work_dir {room}: no such folder")
    indexed, started = [], []
    # With --quick the index alone has a process of its own.
    ask = (lambda file, *_, **request: worker(**request)) if args.quick else fresh
    with ExitStack() as stack:
        for times, processes in jobs:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=room)))
            here = cfg | {"cache_dir": str(place / "cache"), "num_proc": processes}
            if times > 1:
                here["data_dir"] = str(enlarge(Path(cfg["data_dir"]), place / "data", times))
            note(f"indexing, {times} x the pairs, num_proc {processes}")
            found = ask(__file__, 6 * 3600, kind="indexing", cfg=here)
            indexed.append({"times": times, "num_proc": processes, **found})
            if any(times == row["times"] for row in started):
                continue
            note(f"second start, {args.batches} batches")
            found = ask(__file__, kind="starting", cfg=here, repeats=args.repeats, batches=args.batches)
            started.append({"times": times, **found,
                            "first_seconds": found["seconds"][0], "seconds": spread(found["seconds"]),
                            "batch_seconds": spread(found["batch_seconds"]),
                            "batch_mean_seconds": sum(found["batch_seconds"]) / args.batches,
                            "waiting": [waiting(found["batch_seconds"], s) for s in args.step_seconds]})
        big = None
        if args.index:
            note(f"index of {args.index:,} pairs")
            empty = stack.enter_context(tempfile.TemporaryDirectory(dir=room))
            big = fresh(__file__, kind="index", cfg=cfg, pairs=args.index, folder=empty)
    kept = ("batch_size", "gradient_accumulation_steps", "length_groups", "pad_lengths", "source_alpha", "max_length")
    settings = {"repeats": args.repeats, "batches": args.batches, "preset": args.preset, "data": name,
                **{k: cfg[k] for k in kept}}
    return result | {"settings": settings, "indexing": indexed, "starts": started, "index": big}


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    s = result["settings"]
    times, pairs = lambda r: f"{r['times']} x", lambda r: f"{r['pairs']:,}"  # noqa: E731
    lines = headline("Data path", result, "of the second start, in one process")
    lines += [f"{s['data']}; source_alpha {s['source_alpha']}; batches of {s['batch_size']} pairs in "
              f"{s['gradient_accumulation_steps']} micro-batches of {s['length_groups']} lengths"]
    lines += table("indexing into an empty cache, once; memory in MiB", result["indexing"], {
        "data": times, "num_proc": lambda r: str(r["num_proc"]), "pairs": pairs,
        "seconds": lambda r: shown(r["seconds"]),
        "pairs/s": lambda r: shown(r["pairs_per_s"], ",.0f"), "before": lambda r: mib(r["bytes_before"]),
        "peak of the process": lambda r: mib(r["peak_bytes"]), "all processes: PSS": lambda r: mib(r["tree_pss_bytes"]),
        "anonymous": lambda r: mib(r["tree_anonymous_bytes"])})
    lines += table(f"second start, and {s['batches']} batches; memory in MiB", result["starts"], {
        "data": times, "pairs": pairs, "start: seconds": lambda r: shown(r["seconds"]),
        "the first": lambda r: shown(r["first_seconds"]),
        "ms/batch": lambda r: shown({k: 1e3 * v for k, v in r["batch_seconds"].items()}),
        "mean": lambda r: shown(1e3 * r["batch_mean_seconds"]), "padding": lambda r: shown(r["padding"], ".2%"),
        "peak": lambda r: mib(r["peak_bytes"]), "anonymous: before": lambda r: mib(r["anonymous_before"]),
        "opened": lambda r: mib(r["anonymous_opened"]), "after batches": lambda r: mib(r["anonymous_bytes"]),
        "mapped": lambda r: mib(r["mapped_bytes"])})
    waits = [{"times": r["times"], **w} for r in result["starts"] for w in r["waiting"]]
    lines += table("share of the time that training waits for data", waits, {
        "data": times, "seconds a step": lambda w: shown(w["step_seconds"]),
        "built ahead": lambda w: shown(w["wait_share"], ".2%"),
        "without": lambda w: shown(w["wait_share_without"], ".2%")})
    if big := result["index"]:
        lines += ["", f"index of {big['pairs']:,} pairs ({big['shards']:,} shards, {big['bytes'] / 1e9:.1f} GB): start "
                  f"{shown(big['start_seconds'])} s, {mib(big['anonymous_bytes'])} MiB; a window of 256 batches "
                  f"{shown(big['window_seconds'])} s, {mib(big['anonymous_after_windows'])} MiB after two"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input or a failed measurement."""
    p = parser(__doc__)
    p.add_argument("--num_proc", nargs="+", type=int, default=[0, 2], help="processes that tokenise")
    p.add_argument("--times", type=int, default=10, help="how many times the pairs in the last row; 1: no such row")
    p.add_argument("--index", type=int, default=100_000_000, help="pairs of a generated index that is opened; 0: none")
    p.add_argument("--batches", type=int, default=769, help="steps whose batches are drawn; a window is 256")
    p.add_argument("--batch_size", type=int, default=0, help="pairs a step; 0: the preset's")
    p.add_argument("--accumulation", type=int, default=0, help="gradient_accumulation_steps; 0: the preset's")
    p.add_argument("--step_seconds", nargs="+", type=float, default=[0.018, 0.5],
                   help="a step's time, to wait for batches in; 0.018: 200,000 steps in an hour")
    p.add_argument("--work_dir", default="",
                   help="for caches and copies, about 200 bytes a pair; empty: the temporary folder")
    return run(p, measure, page, worker, argv)


if __name__ == "__main__":
    sys.exit(main())
