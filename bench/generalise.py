"""Does a student follow its teacher beyond STS-B? Held-out sentences of every source, other lengths, embeddings' shape.

    python bench/generalise.py --checkpoint results/best --data_dir DIR --json results/generalise.json
    python bench/generalise.py --checkpoint runs/second --model results/best --model runs/soup --data_dir DIR

What is held out from what: a text is measured that was in no batch of the student's run, nor of the run that its
`init_student` came from, and so on back, nor of any `--model`'s. A run's seed, batch size, steps and sources say which
texts it drew (whole windows of 256 steps are left out); of a run with `source_focus` only its `held_out_share` of all
texts, which are in none of its pairs, and the texts that stood with nothing else, are sure. The data must be that of
the training: only the sources' names are compared. `--drawn none` is for students trained on other data.

- sources: `--sentences` such sentences of every training source. A source with fewer than 200 left is not measured, one
  with fewer than asked for on what it has: neighbours are easier among few, and by chance 10 / (texts - 1). Agreement:
  Spearman correlation of the student's and the teacher's cosines over all pairs of these sentences. Neighbours: share
  of the teacher's 10 nearest sentences that are among the student's 10 nearest.
- retrieval: of every source whose second texts are passages (on average twice as many words as the first ones, and
  these at least three: questions with answers, titles with texts), up to `--queries` first texts whose pair is held
  out, both sides; each ranks `--candidates` of the source's second texts by cosine: those of the queries, then others,
  seen in training or not. nDCG@10 (Jarvelin and Kekalainen 2002, doi:10.1145/582415.582418) with all of a query's
  pairs in the file as its right answers. Texts are cut at 256 tokens. Sources with fewer than 30 queries are left out.
- models: the checkpoint and each `--model` on the same texts: means over sources, that of the five worst too, and STS-B
  dev.
- lengths: the same on texts of exactly 16 to 512 tokens, cut from held-out sentences that are joined until they are
  long enough (as `joined_share` joins them for training, but from all sources); and on held-out texts that are
  themselves 96 to 512 tokens long.
- shape: mean cosine of two sentences; effective rank (exponential of the entropy of the covariance's spectrum, Roy and
  Vetterli 2007) of 384; norm of the mean-pooled vector before it is scaled to 1. Collapsed or lopsided embeddings
  differ from the teacher's.
- worst: the STS-B dev pairs whose rank among the student's cosines is farthest from their rank among the gold scores,
  by their line in the file; the teacher's distance is beside it. Ties have their mean rank.
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
QUERIES = 30  # of a source; with fewer, its nDCG says nothing
# By source: queries, candidates, right candidates of each query.
Retrieval = dict[str, tuple[list[str], list[str], list[set[int]]]]


def agreement(student: np.ndarray, teacher: np.ndarray) -> dict[str, float]:
    """Of two sets of unit vectors (N, D) of the same N texts: Spearman of all their cosines, shared neighbours."""
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
        tokens, device = script.tokenise(tokenizer, texts[start:start + 32], 128), next(model.parameters()).device
        ids, mask = (x.to(device) for x in script.pad_batch(tokens))
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


def seen_keys(cfg: dict[str, Any], info: dict[str, Any], tokenizer: Any) -> set[int]:
    """Keys of all texts that the student of config `cfg` and record `info`, or its initial student, was trained on."""
    data = script.load_training_data(cfg | {"long_share": 0.0}, tokenizer, note)  # documents are no sentences
    if sorted(data.names) != sorted(info.get("sources") or data.names):
        raise script.UserError(f"{cfg['data_dir']}: holds other sources than {info['file']} was trained on; "
                               "give those, or --drawn none")
    if not cfg["source_focus"]:
        keys = drawn_keys(data, info["step"] or 0)
    elif cfg["held_out_share"]:
        keys = {key for table in data.tables for side in ("anchor", "positive", "negative")
                for batch in table.iter(1 << 16) for key in batch[f"key_{side}"].to_pylist()}
    else:
        raise script.UserError(f"{info['file']}: drew its sources by their distances and held nothing out: "
                               "what it saw is not known")
    if init := info.get("init"):
        earlier = cfg | script.recorded_config(init.get("config"), Path(init["file"]))
        here = {k: cfg[k] for k in (*script.FOLDER_KEYS, "sts_name")}
        keys |= seen_keys(earlier | here, init, tokenizer)
    return keys


def held_out(cfg: dict[str, Any], drawn: set[int], count: int) -> dict[str, list[str]]:
    """Up to `count` distinct sentences of each source whose keys are not in `drawn`, in a seeded order."""
    found = {}
    for name, file in script.find_sources(cfg):
        if file is None:
            raise script.UserError(f"source {name}: is on the hub; "
                                   "give a --data_dir that holds the training data's files")
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


def retrieval_sets(cfg: dict[str, Any], seen: set[int], queries: int, candidates: int) -> Retrieval:
    """What each source of questions or titles with passages gives: held-out queries, candidates and right answers."""
    found = {}
    for name, file in script.find_sources(cfg):
        pairs = [row[:2] for row in script.read_pairs(file)]
        first, second = (np.mean([len(pair[side].split()) for pair in pairs]) for side in (0, 1))
        if first < 3 or second < 2 * first:
            continue
        keys = [tuple(int.from_bytes(script.text_key(text), "little", signed=True) for text in pair) for pair in pairs]
        text = {key: t for ks, pair in zip(keys, pairs) for key, t in zip(ks, pair)}
        answers: dict[int, set[int]] = {}
        for query, answer in keys:
            answers.setdefault(query, set()).add(answer)
        held = sorted({query for query, answer in keys
                       if not {query, answer} & seen and answers[query].isdisjoint(seen)})
        rng = random.Random(f"{cfg['seed']} {name} retrieval")
        rng.shuffle(held)
        held = held[:queries]
        if len(held) < QUERIES:
            continue
        right = sorted(set().union(*(answers[query] for query in held)) - set(held))
        others = sorted({answer for _, answer in keys}.difference(right, held))
        rng.shuffle(others)
        chosen = [*right, *others][:max(candidates, len(right))]
        place = {key: i for i, key in enumerate(chosen)}
        held = [query for query in held if answers[query] & place.keys()]
        right = [{place[k] for k in answers[q] & place.keys()} for q in held]
        found[name] = [text[k] for k in held], [text[k] for k in chosen], right
    return found


def ndcg(queries: np.ndarray, candidates: np.ndarray, right: list[set[int]], depth: int = 10) -> np.ndarray:
    """nDCG at `depth` of each query, (Q,): its unit vectors (Q, D) against the candidates' (N, D), relevance 0 or 1."""
    discount = 1 / np.log2(np.arange(2, depth + 2))
    best = np.argsort(-(queries @ candidates.T), axis=1, kind="stable")[:, :depth]
    gains = np.array([[i in answers for i in row] for row, answers in zip(best, right)], float)
    return gains @ discount[:gains.shape[1]] / np.array([discount[:len(answers)].sum() for answers in right])


def of_length(texts: list[str], tokenizer: Any, length: int, count: int) -> list[str]:
    """`count` texts of `length` tokens, cut from the texts joined one after the other."""
    made, words = [], []
    for ids in script.tokenise(tokenizer, texts, None):
        words += ids[1:-1]
        if len(words) >= length - 2:
            text, words = tokenizer.decode(words[:length - 2]), []
            whole = len(script.tokenise(tokenizer, [text], None)[0]) == length  # not always what was decoded
            made += [text] if whole else []
            if len(made) == count:
                break
    return made


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All tables."""
    if args.quick:
        args.sentences, args.texts, args.queries, args.candidates = 2 * ENOUGH, ENOUGH, 30, 200
    if min(args.sentences, args.texts) < ENOUGH:
        raise script.UserError(f"--sentences and --texts must be at least {ENOUGH}")
    lengths = LENGTHS[:1] if args.quick else LENGTHS
    data, name = find_data(args, folder, 2000)
    base = configure(args, **data)
    device = script.choose_device(base)
    teacher, tokenizer, _ = script.load_teacher(base)
    paths, students, seen = [args.checkpoint, *args.model], [], set()
    for path in paths:
        student, cfg, info = script.open_student(path, teacher)
        cfg = script.config | {k: v for k, v in cfg.items() if k in script.config}
        cfg |= {k: base[k] for k in ("data_dir", "cache_dir", "sts_name")}
        students.append((student, cfg, info))
        if args.drawn == "config":
            if not info.get("step"):
                raise script.UserError(f"{path}: does not say how many steps it was trained; "
                                       "use --drawn none if it never saw this data")
            seen |= seen_keys(cfg, info, tokenizer)
            note(f"{path}: {len(seen):,} texts seen until step {info['step']}")
    teacher.to(device)
    student, cfg, info = students[0]
    student.to(device)
    steps = info.get("step")
    kept = held_out(cfg, seen, args.sentences)
    both = student, teacher
    encode = lambda texts, limit: [script.encode(m, tokenizer, texts, 64, limit) for m in both]  # noqa: E731
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
        raise script.UserError(f"{base['data_dir']}: no source has {ENOUGH} sentences left that {args.checkpoint} "
                               "was not trained on")
    pool = [text for texts in kept.values() for text in texts]
    random.Random(cfg["seed"]).shuffle(pool)
    lengths_found = []
    long = [text for text, ids in zip(pool, script.tokenise(tokenizer, pool, None)) if 96 <= len(ids) <= 512]
    for length in (*lengths, "96+, whole"):
        texts = of_length(pool, tokenizer, length, args.texts) if isinstance(length, int) else long[:args.texts]
        enough = len(texts) >= ENOUGH
        row = agreement(*encode(texts, 512)) if enough else {"texts": len(texts), **nothing}
        lengths_found.append({"length": length, **row})
        note(f"{length} tokens: {len(texts)} texts, agreement {shown(lengths_found[-1]['agreement'], '.4f')}")
    shape = {}
    for i, (which, model) in enumerate((("student", student), ("teacher", teacher))):
        vectors, norms = np.concatenate([pair[i] for pair in every]), pooled_norms(model, tokenizer, pool[:1000])
        cosines = (vectors @ vectors.T)[np.triu_indices(len(vectors), 1)]
        shape[which] = {"texts": len(vectors), "mean_cosine": float(cosines.mean()),
                        "effective_rank": effective_rank(vectors),
                        "norm_mean": float(norms.mean()), "norm_deviation": float(norms.std())}
    rows = script.load_sts(cfg, "dev")[:100 if args.quick else None]
    cosines = [script.sts_cosines(m, tokenizer, rows, 128) for m in (student, teacher)]
    gold, ranks = rankdata([row[2] for row in rows]), [rankdata(c) for c in cosines]
    worst = [{"line": int(i) + 1, "gold": rows[i][2],
              "student_cosine": float(cosines[0][i]), "teacher_cosine": float(cosines[1][i]),
              "student_rank_error": float((ranks[0] - gold)[i] / len(rows)),
              "teacher_rank_error": float((ranks[1] - gold)[i] / len(rows))}
             for i in np.argsort(-np.abs(ranks[0] - gold), kind="stable")[:10]]
    asked, retrieval, models = retrieval_sets(cfg, seen, args.queries, args.candidates), [], []
    found = {}
    for which, model in (("teacher", teacher), *zip(paths, (x[0] for x in students))):
        model.to(device)
        scores = {source: ndcg(*(script.encode(model, tokenizer, texts, 64, 256) for texts in sets[:2]), sets[2])
                  for source, sets in asked.items()}
        found[which] = scores
        measured = [row for row in sources if row["agreement"] is not None and model is not teacher]
        agreements = [row["agreement"] for row in measured]
        if model is not student:
            pairs = ([script.encode(m, tokenizer, kept[row["source"]], 64, 128) for m in (model, teacher)]
                     for row in measured)
            agreements = [agreement(*pair)["agreement"] for pair in pairs]
        models.append({"model": str(which), "agreement": float(np.mean(agreements)) if agreements else None,
                       "worst_five": float(np.mean(sorted(agreements)[:5])) if agreements else None,
                       "ndcg": float(np.mean([x.mean() for x in scores.values()])) if scores else None,
                       "dev_spearman": script.evaluate_sts(model, tokenizer, rows, 128)["spearman"]})
        note(f"{which}: nDCG@10 {shown(models[-1]['ndcg'], '.4f')}")
    for source, sets in asked.items():
        apart = found[paths[0]][source] - found["teacher"][source]
        retrieval.append({"source": source, "queries": len(sets[0]), "candidates": len(sets[1]),
                          "ndcg": float(found[paths[0]][source].mean()),
                          "teacher_ndcg": float(found["teacher"][source].mean()),
                          "difference": float(apart.mean()),
                          "standard_error": float(apart.std(ddof=1) / len(apart) ** 0.5)})
    return {"machine": machine(device), "settings": {
        "checkpoint": str(args.checkpoint), "step": steps, "sentences": args.sentences, "texts": args.texts,
        "data": name, "repeats": 1, "queries": args.queries, "candidates": args.candidates, "drawn": args.drawn,
        "texts_drawn": len(seen)}, "sources": sources, "lengths": lengths_found, "retrieval": retrieval,
        "models": models, "shape": shape, "worst": worst}


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    s, m = result["settings"], result["machine"]
    columns = {"texts": lambda r: str(r["texts"]), "agreement": lambda r: shown(r["agreement"], ".4f"),
               "neighbours": lambda r: shown(r["neighbours"], ".3f"),
               "mean cosine": lambda r: shown(r["student_mean_cosine"], ".3f"),
               "teacher's": lambda r: shown(r["teacher_mean_cosine"], ".3f")}
    lines = [f"Student {s['checkpoint']}, step {s['step']}; {s['data']}; {m['cpu']}, {m['threads']} threads, "
             f"PyTorch {m['torch']}, commit {m['git_commit']}; 1 repeats"]
    lines += table("held-out sentences of every source", result["sources"],
                   {"source": lambda r: r["source"], **columns})
    lines += table("texts of other lengths", result["lengths"], {"tokens": lambda r: str(r["length"]), **columns})
    percent = lambda key, form=".1f": lambda r: shown(r[key] and 100 * r[key], form)  # noqa: E731
    lines += table("retrieval on held-out pairs, nDCG@10 of 100", result["retrieval"], {
        "source": lambda r: r["source"], "queries": lambda r: str(r["queries"]),
        "candidates": lambda r: str(r["candidates"]),
        "student": percent("ndcg"), "teacher": percent("teacher_ndcg"), "difference": percent("difference", "+.1f"),
        "its standard error": percent("standard_error")})
    lines += table("models", result["models"], {
        "model": lambda r: r["model"], "agreement": lambda r: shown(r["agreement"], ".4f"),
        "worst five": lambda r: shown(r["worst_five"], ".4f"), "nDCG@10": percent("ndcg", ".2f"),
        "STS-B dev": lambda r: shown(r["dev_spearman"], ".4f")})
    lines += table("shape of the embeddings", [{"model": k, **v} for k, v in result["shape"].items()], {
        "model": lambda r: r["model"], "texts": lambda r: str(r["texts"]),
        "mean cosine": lambda r: shown(r["mean_cosine"], ".4f"),
        "effective rank": lambda r: shown(r["effective_rank"], ".1f"), "norm": lambda r: shown(r["norm_mean"]),
        "deviation": lambda r: shown(r["norm_deviation"])})
    lines += table("the ten worst dev pairs; errors: its rank less gold's, as shares of the set", result["worst"], {
        "line": lambda r: str(r["line"]), "gold": lambda r: shown(r["gold"]),
        "cosine": lambda r: shown(r["student_cosine"], ".3f"),
        "teacher's": lambda r: shown(r["teacher_cosine"], ".3f"),
        "rank error": lambda r: shown(r["student_rank_error"], "+.2f"),
        "teacher's error": lambda r: shown(r["teacher_rank_error"], "+.2f")})
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input."""
    p = parser(__doc__)
    p.add_argument("--checkpoint", default="results/best", help="a checkpoint, model folder or exported student")
    p.add_argument("--model", action="append", default=[],
                   help="another student to compare on the same texts; can be repeated")
    p.add_argument("--queries", type=int, default=300, help="retrieval: held-out queries of every source at most")
    p.add_argument("--candidates", type=int, default=5000, help="retrieval: passages that each query ranks")
    p.add_argument("--sentences", type=int, default=2000, help="held-out sentences of every source")
    p.add_argument("--texts", type=int, default=300, help="texts of each length")
    p.add_argument("--drawn", default="config", choices=("config", "none"), help="what the student was trained on")
    return run(p, measure, page, lambda: {}, argv)


if __name__ == "__main__":
    sys.exit(main())
