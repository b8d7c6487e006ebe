"""The CPU kernel alone and the model alone, of this version and of earlier ones that take turns with it.

    python bench/kernel.py --threads 1 --against REVISION ... --json OUT    git revisions; a minute or two for each
    python bench/kernel.py --quick                                          does it work? under a minute

- forward: the mixer's operator without gradients; both: with its backward pass; nanoseconds a token and head, of texts
  of random numbers without padding, the convolution, flux, coupling and gates on.
- model: MiniLM's time over the student's, both given the same token ids and no padding: no tokenising, no pooling.
A shape is TEXTSxTOKENS of a call; --data_dir, --cache_dir and --device mean nothing here. Earlier versions are read
from git (script and kernel files) and must have the same operator. Numba compiles each once. Where other programs use
the machine, compare the smallest figures.
"""
from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).resolve().parent))
import torch
from common import (ROOT, configure, headline, interleaved, machine, note, one_layer, parser, ratio, run, script, shown,
                    spread, table)

NOW, MINILM = "now", "MiniLM"
SHAPES = ("128x16", "64x32", "32x64", "16x128", "4x512")


def git(revision: str, *words: str) -> bytes:
    """What git says to `words` about `revision`."""
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True)
    if done.returncode:
        said = done.stderr.decode().strip().splitlines() or ["git failed"]
        raise script.UserError(f"--against {revision}: {said[-1]}")
    return done.stdout


def load_version(revision: str, folder: Path) -> ModuleType:
    """The training script as git has it at `revision`, with its kernel files, from copies in `folder`."""
    folder.mkdir()
    for name in ("train_6layer_deltanet.py", *script.KERNEL_FILES):
        (folder / name).write_bytes(git(revision, "show", f"{revision}:{name}"))
    name = f"version_{folder.name}"
    spec = importlib.util.spec_from_file_location(name, folder / "train_6layer_deltanet.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mixer_calls(version: ModuleType, cfg: dict[str, Any], texts: int, tokens: int) -> tuple[Callable, Callable]:
    """The operator forward, and forward and backward, on random inputs."""
    heads = cfg["num_heads"]
    inputs = script.kernel.mixer_example(torch.device("cpu"), heads, cfg["d_model"] // heads, texts, tokens)[:-1]
    inputs[1], inputs[2], wanted = torch.ones_like(inputs[1]), None, [x for x in inputs if x.requires_grad]
    call = lambda: version.kernel.hierarchical_mixer(*inputs, reverse_heads=heads // 2)[0]  # noqa: E731
    weights = torch.linspace(-1, 1, cfg["d_model"]).expand(texts, tokens, -1).contiguous()
    return torch.no_grad()(call), lambda: torch.autograd.grad(call(), wanted, weights)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every shape's times, of every version."""
    if args.quick:
        args.shapes, args.repeats = ["2x16", "1x40"], 5
    shapes = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape) for shape in args.shapes]
    if not all(shapes):
        raise script.UserError(f"--shapes {' '.join(args.shapes)}: each must be TEXTSxTOKENS, as 16x128")
    cfg = configure(args, device="cpu")
    if args.quick:
        cfg |= one_layer(cfg, folder)
    device = script.choose_device(cfg)
    if not script.kernel.has_kernel(torch.empty(0), cfg["d_model"] // cfg["num_heads"]):
        raise script.UserError("the CPU kernel needs Numba: pip install numba")
    commits = {git(r, "rev-parse", "--short", f"{r}^{{commit}}").decode().strip(): r for r in args.against}
    versions = {NOW: script} | {c: load_version(r, folder / str(i)) for i, (c, r) in enumerate(commits.items())}
    teacher, _, origin = script.load_teacher(cfg)
    students = {name: v.build_student(v.config | {k: x for k, x in cfg.items() if k in v.config}, teacher).eval()
                for name, v in versions.items()}
    rows = []
    for texts, tokens in ([int(x) for x in shape.groups()] for shape in shapes):
        note(f"{texts} texts of {tokens} tokens")
        scale, row = 1e9 / (texts * tokens * cfg["num_heads"]), {"texts": texts, "tokens": tokens}
        calls = {name: mixer_calls(v, cfg, texts, tokens) for name, v in versions.items()}
        ids = torch.randint(1000, 20000, (texts, tokens), generator=torch.Generator().manual_seed(0))
        models = {MINILM: teacher.model} | students
        with torch.inference_mode():
            seconds = {"model": interleaved({name: lambda _, m=m: m(input_ids=ids, attention_mask=torch.ones_like(ids))
                                             for name, m in models.items()}, [None], args.repeats)}
        for i, part in enumerate(("forward", "both")):
            seconds[part] = interleaved({name: lambda _, c=c: c[i]() for name, c in calls.items()}, [None],
                                        args.repeats)
        row |= {part: {name: spread(seconds[part][name], scale) for name in versions} for part in ("forward", "both")}
        row["model"] = {name: ratio(seconds["model"][MINILM], seconds["model"][name]) for name in versions}
        rows.append(row)
    return {"machine": machine(device), "rows": rows,
            "settings": {"repeats": args.repeats, "teacher": origin, "versions": [*versions], "shapes": args.shapes}}


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = headline("The CPU kernel", result)
    for part, title, form in (("forward", "forward, ns a token and head", ",.0f"),
                              ("both", "forward and backward, ns a token and head", ",.0f"),
                              ("model", "the model, times as fast as MiniLM", ".2f")):
        lines += table(title, result["rows"], {"texts x tokens": lambda r: f"{r['texts']} x {r['tokens']}"} | {
            name: lambda r, n=name, p=part, f=form: shown(r[p][n], f) for name in result["settings"]["versions"]})
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input or a failed measurement."""
    p = parser(__doc__)
    p.add_argument("--shapes", nargs="+", default=[*SHAPES], metavar="TEXTSxTOKENS", help="of a call")
    p.add_argument("--against", nargs="*", default=[], metavar="REVISION", help="git revisions to compare with")
    p.set_defaults(threads=1, repeats=15)
    return run(p, measure, page, lambda: {}, argv)


if __name__ == "__main__":
    sys.exit(main())
