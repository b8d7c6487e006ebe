"""What the benchmarks share: command line, machine, data, interleaved timing, fresh processes, tables and JSON."""
from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402

import train_6layer_deltanet as script  # noqa: E402
from detect_hardware import find_hardware, peak_rss, read_text  # noqa: E402

Seconds = dict[str, list[float]]


# ----------------------------------------------------------------------------------------------------------------------
# Command line, machine, data


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The module's docstring as it is written, and every default."""


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark."""
    p = argparse.ArgumentParser(description=doc, formatter_class=Help)
    p.add_argument("--data_dir", default="", help="as in training; empty: data/generated, else one made for this run")
    p.add_argument("--cache_dir", default="",
                   help="as in training; without one: training's for a data_dir, else a temporary one")
    p.add_argument("--preset", default="match_teacher", choices=[*script.PRESETS, "specification"],
                   help="config of the step")
    p.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's choice")
    p.add_argument("--device", default="auto", choices=script.CHOICES["device"], help="as in training")
    p.add_argument("--repeats", type=int, default=5, help="timed rounds")
    p.add_argument("--quick", action="store_true",
                   help="small sizes, under a minute: shows that it works, not how fast")
    p.add_argument("--json", type=Path, help="write the result here too")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    return p


def run(p: argparse.ArgumentParser, measure: Callable[..., dict[str, Any]], page: Callable[[dict[str, Any]], str],
        worker: Callable[..., dict[str, Any]], argv: list[str] | None = None) -> int:
    """Measure, print the page, write the JSON; returns the exit status.

    With --worker: answer a request (see `fresh`).
    """
    args = p.parse_args(argv)
    transformers.utils.logging.set_verbosity_error(), transformers.utils.logging.disable_progress_bar()
    try:
        if args.worker:
            print("\n" + json.dumps(worker(**json.loads(args.worker))))
            return 0
        if args.repeats < 1 or args.threads < 0:
            p.error("--repeats must be at least 1, --threads at least 0")
        if args.json and not args.json.absolute().parent.is_dir():
            raise script.UserError(f"--json {args.json}: no such folder")
        with tempfile.TemporaryDirectory() as folder:
            result = measure(args, Path(folder))
        result = {"bench": Path(sys.modules[measure.__module__].__file__).stem, "quick": args.quick, **result}
        print(page(result))
        if args.json:
            script.write_json(args.json, result)
    except (script.UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def note(text: str) -> None:
    """Progress, on the error stream: the output is the page alone."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def configure(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """The training config of the preset with what the command line and `more` say."""
    words = [] if args.preset == "specification" else ["--preset", args.preset]
    chosen = {"data_dir": args.data_dir, "threads": args.threads, "device": args.device, **more}
    return script.parse_config([*words, *(w for key, value in chosen.items() for w in (f"--{key}", str(value)))])


def find_data(args: argparse.Namespace, folder: Path, pairs: int) -> tuple[dict[str, str], str]:
    """Config keys data_dir and cache_dir, and what the data is.

    Without a data_dir and data/generated, `pairs` are generated.
    """
    data_dir, name = Path(args.data_dir), f"data_dir {Path(args.data_dir).resolve().name}"
    if not data_dir.is_dir():
        raise script.UserError(f"data_dir {data_dir}: no such folder")
    if not args.data_dir:
        data_dir, name = ROOT / "data" / "generated", "the generated corpus, not real text"
    if not args.data_dir and not data_dir.is_dir():
        data_dir, name = folder / "generated", "a corpus generated for this run, not real text"
        command = [sys.executable, ROOT / "bench" / "make_corpus.py", "--output_dir", data_dir, "--pairs", str(pairs)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["no message"]
            raise script.UserError(f"make_corpus.py failed: {said[-1][:200]}")
    cache = args.cache_dir or (script.config["cache_dir"] if args.data_dir else str(folder / "cache"))
    return {"data_dir": str(data_dir), "cache_dir": cache}, name


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure depends on beside the code: hardware, versions, threads, load, commit."""
    found, environment = find_hardware(), script.run_environment(device)
    kept = ("cores", "usable_cores", "memory_gib", "avx512", "bf16")
    return {"cpu": found["cpu"]["name"], **{k: found["cpu"][k] for k in kept},
            "gpu": found["gpus"][0]["name"] if device.type == "cuda" else None, "device": device.type,
            "threads": torch.get_num_threads(), "load_at_start": os.getloadavg()[0],
            **{k: environment[k] for k in ("python", "platform", "torch", "transformers", "datasets", "numpy",
                                           "git_commit")}}


def one_layer(cfg: dict[str, Any], folder: Path) -> dict[str, Any]:
    """For --quick: config keys of a teacher that ends after the real one's first layer, and of its student.

    The teacher is written into `folder`.
    """
    teacher, tokenizer, _ = script.load_teacher(cfg)
    model = teacher.model
    model.encoder.layer, model.config.num_hidden_layers = model.encoder.layer[:1], 1
    model.save_pretrained(folder / "teacher"), tokenizer.save_pretrained(folder / "teacher")
    return {"teacher_model": str(folder / "teacher"), "num_layers": 1}


INTERLEAVED = "interleaved in one process; ratios are taken within a repeat"


def headline(title: str, result: dict[str, Any], method: str = INTERLEAVED) -> list[str]:
    """The first lines of a page: what was measured, where, with what."""
    m, repeats = result["machine"], result["settings"]["repeats"]
    memory = f", {m['memory_gib']:.0f} GiB" if m["memory_gib"] else ""
    return [title + (" (--quick: shows that it works, not how fast)" if result["quick"] else ""),
            f"{m['gpu'] or m['cpu']}, {m['cores']} cores ({m['usable_cores']} usable{memory}), {m['threads']} threads, "
            f"load {m['load_at_start']:.1f} at start; commit {m['git_commit']}",
            f"PyTorch {m['torch']}, transformers {m['transformers']}, datasets {m['datasets']}, "
            f"Python {m['python']}, {m['platform']}",
            f"{repeats} repeats, {method}; figures are median (smallest to largest)"]


# ----------------------------------------------------------------------------------------------------------------------
# Time


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call, the device's work included."""
    synchronise()
    begun = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - begun


def interleaved(cases: dict[str, Callable[[Any], Any]], inputs: list[Any], repeats: int,
                warm_up: bool = True) -> Seconds:
    """Seconds of each case over all inputs, a number a repeat. On each input the cases take turns: A, B, A, B, ..."""
    seconds = {name: [0.0] * repeats for name in cases}
    for turn in range(-1 if warm_up else 0, repeats):
        for x in inputs:
            for name, case in cases.items():
                took = timed(lambda: case(x))  # noqa: B023  called at once
                if turn >= 0:
                    seconds[name][turn] += took
    return seconds


def spread(values: list[float], scale: float = 1.0) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": scale * statistics.median(values), "min": scale * min(values), "max": scale * max(values)}


def rate(count: float, seconds: list[float]) -> dict[str, float]:
    """`count` a second, as a spread."""
    return spread([count / s for s in seconds])


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """The quotient of two cases within each repeat, as a spread."""
    return spread([a / b for a, b in zip(above, below)])


# ----------------------------------------------------------------------------------------------------------------------
# Memory


def fresh(file: str, timeout: float = 3600, **request: Any) -> dict[str, Any]:
    """What `worker(**request)` of the benchmark `file` returns in a new process, so that its peak memory is its own."""
    # Without this, the allocator keeps freed blocks of many sizes, and the peak is not what the work needs.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    try:
        done = subprocess.run([sys.executable, file, "--worker", json.dumps(request)], capture_output=True, text=True,
                              timeout=timeout, env=env)
    except subprocess.TimeoutExpired:
        raise script.UserError(f"{Path(file).name} --worker took more than {timeout:.0f} s") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1][:300].removeprefix("error: ")
        raise script.UserError(f"{Path(file).name} --worker failed (status {done.returncode}): {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def resident(key: str = "VmRSS") -> int:
    """A line of /proc/self/status in bytes: VmRSS, VmHWM, RssAnon, RssFile; 0 where there is none."""
    found = re.search(rf"^{key}:\s+(\d+) kB", read_text("/proc/self/status"), re.M)
    return int(found[1]) * 1024 if found else 0


def growth(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes by which memory at its highest during the call exceeds that before it; None if the system cannot tell."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the present
    except OSError:
        return None
    before = resident()
    call()
    return peak_rss() - before


# ----------------------------------------------------------------------------------------------------------------------
# Page


def shown(value: Any, form: str = ".3g") -> str:
    """A number, or a spread as `median (smallest to largest)`, for people; a dash for None."""
    if isinstance(value, dict):
        return f"{shown(value['median'], form)} ({shown(value['min'], form)} to {shown(value['max'], form)})"
    return "-" if value is None else value if isinstance(value, str) else format(value, form)


def table(title: str, rows: list[Any], columns: dict[str, Callable[[Any], str]]) -> list[str]:
    """Lines of a table with a line for each of `rows`; each column's header gives the cell of a row."""
    cells = [[*columns], *([cell(row) for cell in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["", title, *("  " + "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths)))
                         for line in cells)]


def mib(value: float | None) -> str:
    return shown(value and value / 2**20, ",.0f")
