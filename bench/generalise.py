"""Does a student follow its teacher beyond STS-B? Held-out sentences of every source, other lengths, and the embeddings' shape.

    python bench/generalise.py --checkpoint results/best --data_dir DIR --json results/generalise.json

- sources: `--sentences` sentences of every training source that the student's run did not draw: its seed, batch size, steps and
  sources say which it drew (whole windows of 256 steps are left out). The data must be that of the training: only the sources'
  names are compared. A source with fewer than 200 left is not measured, one with fewer than asked for on what it has: neighbours are
  easier among few, and by chance 10 / (texts - 1). Agreement: Spearman correlation of the student's and the teacher's cosines over
  all pairs of these sentences. Neighbours: share of the teacher's 10 nearest sentences that are among the student's 10 nearest.
  `--drawn none` is for a student that was trained on other data.
- lengths: the same on texts of exactly 16 to 512 tokens, cut from held-out sentences that are joined until they are long enough (as
  `joined_share` joins them for training, but from all sources); and on held-out texts that are themselves 96 to 512 tokens long.
- shape: mean cosine of two sentences; effective rank (exponential of the entropy of the covariance's spectrum, Roy and Vetterli
  2007) of 384; norm of the mean-pooled vector before it is scaled to 1. Collapsed or lopsided embeddings differ from the teacher's.
- worst: the STS-B dev pairs whose rank among the student's cosines is farthest from their rank among the gold scores, by their line
  in the file; the teacher's distance is beside it. Ties have their mean rank.
"""
from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import numpy as np
import torch
from common import configure, find_data, machine, note, parser, run, script, shown, table
from scipy.stats import rankdata, spearmanr

LENGTHS = (16, 32, 64, 128, 256, 512)
NEIGHBOURS = 10
ENOUGH = 200  # texts; among fewer, 10 nearest are found by chance too often


def agreement(student: np.ndarray, teacher: np.ndarray) -> dict[str, float]:
    """Of two sets of unit vectors (N, D) of the same N texts: Spearman of all their cosines, overlap of nearest neighbours."""
    cosines, upper = [x @ x.T for x in (student, teacher)], np.triu_indices(len(student), 1)
    nearest = [np.argsort(np.where(np.eye(len(c)), -2, c), axis=1)[:, -NEIGHBOURS:] for c in cosines]
    return {"texts": len(student), "agreement": float(spearmanr(*(c[upper] for c in cosines)).statistic),
            "neighbours": float(np.mean([len(np.intersect1d(a, b)) / NEIGHBOURS for a, b in zip(*nearest)])),
            **{f"{name}_mean_cosine": float(c[upper].mean()) for name, c in zip(("student", "teacher"), cosines)}}


def effective_rank(vectors: np.ndarray) -> float:
    """exp(entropy) of the normalised eigenvalues of the covariance of vectors (N, D)."""
    values = np.linalg.svd(vectors - vectors.mean(0), compute_uv=False) ** 2
    share = values[values > 0] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


@torch.inference_mode()
def pooled_norms(model: Any, tokenizer: Any, texts: list[str]) -> np.ndarray:
    """Norms of the mean-pooled vectors before normalisation, (N,)."""
    norms = []
    for start in range(0, len(texts), 32):
        ids, mask = (x.to(model.device) for x in script.pad_batch(script.tokenise(tokenizer, texts[start:start + 32], 128)))
        hidden, weights = model(input_ids=ids, attention_mask=mask).last_hidden_state, mask.unsqueeze(-1)
        norms += ((hidden * weights).sum(1) / weights.sum(1)).norm(dim=-1).tolist()
    return np.array(norms)


def drawn_keys(data: script.PairData, steps: int) -> set[int]:
    """Keys of all texts of the windows that the first `steps` steps were drawn from."""
    keys: set[int] = set()
    for number in range(-(-steps // data.WINDOW)):
        rows, _ = data.build_window(number)
        for side in ("anchor", "positive", "negative"):
            keys.update(rows[f"key_{side}"].tolist())
    return keys


def held_out(cfg: dict[str, Any], drawn: set[int], count: int) -> dict[str, list[str]]:
    """Up to `count` distinct sentences of each source whose keys are not in `drawn`, in a seeded order."""
    found = {}
    for name, file in script.find_sources(cfg):
        if file is None:
            raise script.UserError(f"source {name}: is on the hub; give a --data_dir that holds the training data's files")
        texts = {}
        for row in script.read_pairs(file):
            for text in row[:2]:
                key = script.text_key(text)
                if int.from_bytes(key, "little", signed=True) not in drawn:
                    texts.setdefault(key, text)
        order = sorted(texts)
        random.Random(f"{cfg['seed']} {name}").shuffle(order)
        found[name] = [texts[key] for key in order[:count]]
    return found


def of_length(texts: list[str], tokenizer: Any, length: int, count: int) -> list[str]:
    """`count` texts of `length` tokens, cut from the texts joined one after the other."""
    made, words = [], []
    for ids in script.tokenise(tokenizer, texts, None):
        words += ids[1:-1]
        if len(words) >= length - 2:
            text, words = tokenizer.decode(words[:length - 2]), []
            made += [text] if len(script.tokenise(tokenizer, [text], None)[0]) == length else []  # not always what was decoded
            if len(made) == count:
                break
    return made


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All tables."""
    if args.quick:
        args.sentences, args.texts = 3 * ENOUGH, ENOUGH
    if min(args.sentences, args.texts) < ENOUGH:
        raise script.UserError(f"--sentences and --texts must be at least {ENOUGH}")
    lengths = LENGTHS[:1] if args.quick else LENGTHS
    data, name = find_data(args, folder, 2000)
    base = configure(args, **data)
    device = script.choose_device(base)
    teacher, tokenizer, _ = script.load_teacher(base)
    student, cfg, info = script.open_student(args.checkpoint, teacher)
    teacher.to(device), student.to(device)
    cfg = script.config | {k: v for k, v in cfg.items() if k in script.config}
    cfg |= {k: base[k] for k in ("data_dir", "cache_dir", "sts_name")}
    steps, drawn = info.get("step"), set()
    if args.drawn == "config":
        if not steps:
            raise script.UserError(f"{args.checkpoint}: does not say how many steps it was trained; use --drawn none if it never saw this data")
        found = script.load_training_data(cfg, tokenizer, note)
        if sorted(found.names) != sorted(info.get("sources") or found.names):
            raise script.UserError(f"{base['data_dir']}: holds other sources than {args.checkpoint} was trained on; give those, or --drawn none")
        drawn = drawn_keys(found, steps)
        note(f"{len(drawn):,} texts were drawn in {steps} steps")
    kept = held_out(cfg, drawn, args.sentences)
    encode = lambda texts, limit: [script.encode(m, tokenizer, texts, 64, limit) for m in (student, teacher)]  # noqa: E731
    nothing = dict.fromkeys(("agreement", "neighbours", "student_mean_cosine", "teacher_mean_cosine"))
    sources, every = [], []
    for source, texts in kept.items():
        if len(texts) < ENOUGH:
            sources.append({"source": source, "texts": len(texts), **nothing})
            continue
        vectors = encode(texts, 128)
        sources.append({"source": source, **agreement(*vectors)})
        every.append([v[:100] for v in vectors])
        note(f"{source}: {len(texts)} texts, agreement {sources[-1]['agreement']:.4f}")
    if not every:
        raise script.UserError(f"{base['data_dir']}: no source has {ENOUGH} sentences left that {args.checkpoint} was not trained on")
    pool = [text for texts in kept.values() for text in texts]
    random.Random(cfg["seed"]).shuffle(pool)
    lengths_found = []
    long = [text for text, ids in zip(pool, script.tokenise(tokenizer, pool, None)) if 96 <= len(ids) <= 512]
    for length in (*lengths, "96+, whole"):
        texts = of_length(pool, tokenizer, length, args.texts) if isinstance(length, int) else long[:args.texts]
        lengths_found.append({"length": length, **(agreement(*encode(texts, 512)) if len(texts) >= ENOUGH else {"texts": len(texts), **nothing})})
        note(f"{length} tokens: {len(texts)} texts, agreement {shown(lengths_found[-1]['agreement'], '.4f')}")
    shape = {}
    for i, (which, model) in enumerate((("student", student), ("teacher", teacher))):
        vectors, norms = np.concatenate([pair[i] for pair in every]), pooled_norms(model, tokenizer, pool[:1000])
        cosines = (vectors @ vectors.T)[np.triu_indices(len(vectors), 1)]
        shape[which] = {"texts": len(vectors), "mean_cosine": float(cosines.mean()), "effective_rank": effective_rank(vectors),
                        "norm_mean": float(norms.mean()), "norm_deviation": float(norms.std())}
    rows = script.load_sts(cfg, "dev")
    cosines = [script.sts_cosines(m, tokenizer, rows, 128) for m in (student, teacher)]
    gold, ranks = rankdata([row[2] for row in rows]), [rankdata(c) for c in cosines]
    worst = [{"line": int(i) + 1, "gold": rows[i][2], "student_cosine": float(cosines[0][i]), "teacher_cosine": float(cosines[1][i]),
              "student_rank_error": float((ranks[0] - gold)[i] / len(rows)), "teacher_rank_error": float((ranks[1] - gold)[i] / len(rows))}
             for i in np.argsort(-np.abs(ranks[0] - gold), kind="stable")[:10]]
    return {"machine": machine(device), "settings": {
        "checkpoint": str(args.checkpoint), "step": steps, "sentences": args.sentences, "texts": args.texts, "data": name, "repeats": 1,
        "drawn": args.drawn, "texts_drawn": len(drawn)}, "sources": sources, "lengths": lengths_found, "shape": shape, "worst": worst}


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    s, m = result["settings"], result["machine"]
    columns = {"texts": lambda r: str(r["texts"]), "agreement": lambda r: shown(r["agreement"], ".4f"),
               "neighbours": lambda r: shown(r["neighbours"], ".3f"), "mean cosine": lambda r: shown(r["student_mean_cosine"], ".3f"),
               "teacher's": lambda r: shown(r["teacher_mean_cosine"], ".3f")}
    lines = [f"Student {s['checkpoint']}, step {s['step']}; {s['data']}; {m['cpu']}, {m['threads']} threads, PyTorch {m['torch']}, commit "
             f"{m['git_commit']}; 1 repeats"]
    lines += table("held-out sentences of every source", result["sources"], {"source": lambda r: r["source"], **columns})
    lines += table("texts of other lengths", result["lengths"], {"tokens": lambda r: str(r["length"]), **columns})
    lines += table("shape of the embeddings", [{"model": k, **v} for k, v in result["shape"].items()], {
        "model": lambda r: r["model"], "texts": lambda r: str(r["texts"]), "mean cosine": lambda r: shown(r["mean_cosine"], ".4f"),
        "effective rank": lambda r: shown(r["effective_rank"], ".1f"), "norm": lambda r: shown(r["norm_mean"]),
        "deviation": lambda r: shown(r["norm_deviation"])})
    lines += table("the ten worst dev pairs; errors: its rank less gold's, as shares of the set", result["worst"], {
        "line": lambda r: str(r["line"]), "gold": lambda r: shown(r["gold"]), "cosine": lambda r: shown(r["student_cosine"], ".3f"),
        "teacher's": lambda r: shown(r["teacher_cosine"], ".3f"), "rank error": lambda r: shown(r["student_rank_error"], "+.2f"),
        "teacher's error": lambda r: shown(r["teacher_rank_error"], "+.2f")})
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input."""
    p = parser(__doc__)
    p.add_argument("--checkpoint", default="results/best", help="a checkpoint, model folder or exported student")
    p.add_argument("--sentences", type=int, default=2000, help="held-out sentences of every source")
    p.add_argument("--texts", type=int, default=300, help="texts of each length")
    p.add_argument("--drawn", default="config", choices=("config", "none"), help="what the student was trained on")
    return run(p, measure, page, lambda: {}, argv)


if __name__ == "__main__":
    sys.exit(main())
