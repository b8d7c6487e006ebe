"""Retrieval of long documents: is one pass of the student better than the average of a document's pieces?

    python bench/documents.py --data_dir DIR --threads 1 --json results/documents.json --plot results/documents.png
    python bench/documents.py --data_dir DIR --checkpoint runs/first --parts quality

Quality: nDCG@10 x 100 of every query among its source's documents, for every DATA_DIR/long/NAME.jsonl.gz (a JSON list
["query", "document"] a line; each query has one right document). The documents are those that training leaves aside
(`kept_aside` of the training script: the smallest text keys of their queries, a tenth of a source, at least 64, at most
a third), of each source the first by that key, up to `--documents` or `--tokens`, but at least 16. Ways to a vector:
- BM25 (bm25s, English stop words), the yardstick; it has no vector;
- teacher or student at 256 or 512 tokens: the text is cut there;
- windows: pieces of 256 tokens that do not overlap, each read alone, the mean of their unit vectors; best window: as
  many vectors as pieces, of which the one nearest to the query counts;
- target (`--parts target`): what the student is trained to give, the teacher's windows overlapping by half, mean over
  tokens (see `window_table`);
- whole: one pass of the student; late chunking (arXiv:2409.04701): the same pass, means over the same pieces, of which
  the nearest counts.
Standard errors are over queries. Vectors are kept in --cache_dir by model, code and text: an interrupted run goes on
where it was, and another student's run reads the teacher's from there.

Passkey: as LongEmbed makes it (arXiv:2404.12096), a name's key at a random place among filler sentences; share of the
queries whose document comes first among `--passkeys` of the same length.

Speed: tokens of the document over seconds, interleaved; memory: peak above the loaded model, in a fresh process. The
last row is a document of 100,000 words of one token each, read once.
"""
from __future__ import annotations

import argparse
import hashlib
import sys
from functools import partial
from pathlib import Path
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).resolve().parent))
import numpy as np
import torch
from common import (configure, find_data, fresh, growth, headline, interleaved, machine, mib, note, parser, rate, ratio,
                    run, script, shown, spread, table, timed)

WINDOW = 256
WAYS = {"bm25": "BM25", "teacher_256": "teacher at 256", "teacher_512": "teacher at 512",
        "teacher_windows": "teacher's windows", "teacher_best": "teacher's best window", "target": "target",
        "student_256": "student at 256", "student_windows": "student's windows",
        "student_best": "student's best window", "late": "late chunking", "whole": "student whole"}
SEVERAL = {  # ways with several vectors a document, of which the nearest counts, and how many each document has
    "teacher_best": "window_counts", "student_best": "window_counts", "late": "late_counts"}
DIFFERENCES = {"student whole less teacher's windows": ("whole", "teacher_windows"),
               "student whole less its target": ("whole", "target"), "student whole less BM25": ("whole", "bm25"),
               "late chunking less teacher's best window": ("late", "teacher_best"),
               "late chunking less student's best window": ("late", "student_best"),
               "student at 256 less teacher at 256": ("student_256", "teacher_256")}
LENGTHS = (0, 512, 1024, 2048, 4096, 1 << 20)  # edges, in tokens
LEAST = 16  # documents of a source, however long
PASSKEY = (256, 512, 1024, 2048, 4096, 8192, 16384)
FILLER = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
FIRST = ("Ada", "Bruno", "Clara", "David", "Elena", "Frank", "Grace", "Henry", "Irene", "Jonas")
LAST = ("Abbott", "Barker", "Carter", "Dawson", "Ellis", "Foster", "Graham", "Harper", "Irving", "Jensen")
Vectors = dict[str, np.ndarray]


# ----------------------------------------------------------------------------------------------------------------------
# Vectors


def pieces(ids: list[int], width: int = WINDOW) -> list[list[int]]:
    """A text's tokens as texts of at most `width` tokens that do not overlap, each between [CLS] and [SEP]."""
    inner, room = ids[1:-1], width - 2
    return [[ids[0], *inner[i:i + room], ids[-1]] for i in range(0, max(1, len(inner)), room)]


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of x (N, D) at unit length."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def averaged(vectors: np.ndarray, counts: list[int]) -> np.ndarray:
    """Unit means (N, D) of the first counts[0] rows, the next counts[1], ..."""
    return unit(np.stack([part.mean(0) for part in np.split(vectors, np.cumsum(counts)[:-1])]))


@torch.inference_mode()
def whole_and_pieces(model: Any, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """One pass over a document: its vector (D,), and those of its pieces (P, D), each the mean of its own states."""
    hidden = model(input_ids=torch.tensor([ids], device=model.device)).last_hidden_state[0].float()
    mean = lambda x: torch.nn.functional.normalize(x.mean(0), dim=0).cpu().numpy()  # noqa: E731
    return mean(hidden), np.stack([mean(x) for x in hidden.split(WINDOW - 2)])


def target(teacher: Any, ids: list[int]) -> np.ndarray:
    """The vector (D,) that the student is trained to give for a document."""
    ids, mask = (x.to(next(teacher.parameters()).device) for x in script.pad_batch([ids]))
    return teacher.pool(script.teacher_states(teacher, ids, mask)[-1].float(), mask)[0].cpu().numpy()


def window_vectors(name: str, model: Any, queries: list[list[int]], documents: list[list[int]]) -> Vectors:
    """Vectors of queries (cut at 512 tokens), of documents as means of their pieces, of these, and of first pieces."""
    cut = [pieces(d) for d in documents]
    windows, counts = script.encode_tokens(model, sum(cut, [])).numpy(), [len(c) for c in cut]
    return {f"{name}_query": script.encode_tokens(model, [pieces(q, 512)[0] for q in queries]).numpy(),
            f"{name}_windows": averaged(windows, counts), f"{name}_256": windows[np.cumsum(counts) - counts],
            f"{name}_best": windows, "window_counts": np.array(counts)}


def whole_vectors(student: Any, documents: list[list[int]]) -> Vectors:
    """Vectors of documents in one pass; `late` has a row for each of the `late_counts` pieces of a document."""
    whole, late = zip(*(whole_and_pieces(student, d) for d in documents))
    return {"whole": np.stack(whole), "late": np.concatenate(late), "late_counts": np.array([len(x) for x in late])}


def kept(folder: Path, model: str, tokens: list[list[int]], call: Callable[[], Vectors]) -> Vectors:
    """`call()`, or what it returned for the same model (a digest) and texts in an earlier run."""
    text = b"".join(np.array(t, np.int32).tobytes() + b"|" for t in tokens)
    digest = hashlib.sha256(model.encode() + text).hexdigest()
    path = folder / f"documents-{digest[:24]}.npz"
    if path.is_file():
        with np.load(path) as file:
            return dict(file)
    found = call()
    folder.mkdir(parents=True, exist_ok=True)
    script.write_atomic(path, lambda file: np.savez(file, **found))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Quality


def ndcg(scores: np.ndarray) -> np.ndarray:
    """nDCG@10 x 100 of every query (N,), from scores (N, N); query i's right document is i. Ties count half."""
    own = np.diag(scores)[:, None]
    rank = 1 + (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2
    return np.where(rank <= 10, 100 / np.log2(1 + rank), 0.0)


def bm25_scores(queries: list[str], documents: list[str]) -> np.ndarray:
    """(queries, documents); a query of stop words alone scores 0 everywhere."""
    try:
        import bm25s
    except ImportError:
        raise script.UserError("bm25s is not installed; pip install -r requirements-eval.txt") from None
    words = partial(bm25s.tokenize, stopwords="en", return_ids=False, show_progress=False)
    index = bm25s.BM25()
    index.index(words(documents), show_progress=False)
    return np.stack([index.get_scores(w) if w else np.zeros(len(documents)) for w in words(queries)])


def all_scores(vectors: Vectors) -> Vectors:
    """Scores (queries, documents) of every way but BM25."""
    model = lambda way: "teacher" if way == "target" or way.startswith("teacher") else "student"  # noqa: E731
    scores = {way: vectors[f"{model(way)}_query"] @ vectors[way].T for way in WAYS if way in vectors}
    for way in scores.keys() & SEVERAL.keys():
        counts = vectors[SEVERAL[way]]
        scores[way] = np.maximum.reduceat(scores[way], np.cumsum(counts) - counts, axis=1)
    return scores


def read_documents(data_dir: str) -> dict[str, list[tuple[str, str]]]:
    """The (query, document) rows of each source that training leaves aside, by the queries' keys."""
    found = {}
    for file in sorted(Path(data_dir).glob("long/*.jsonl.gz")):
        rows = [row[:2] for row in script.read_pairs(file)]
        keys = np.array([int.from_bytes(script.text_key(query), "little", signed=True) for query, _ in rows])
        aside = np.flatnonzero(script.kept_aside(keys))
        found[file.name.removesuffix(".jsonl.gz")] = [rows[i] for i in aside[np.argsort(keys[aside])]]
    if not found:
        raise script.UserError(f"{data_dir}: holds no long/*.jsonl.gz")
    return found


def quality(args: argparse.Namespace, read: Callable[..., Vectors], tokenizer: Any, data_dir: str) -> dict[str, Any]:
    """nDCG@10 of every source, their mean, by length, and differences with standard errors."""
    sources, values, lengths = [], [], []
    documents = read_documents(data_dir)
    for name in list(documents)[:2 if args.quick else None]:
        queries, texts = zip(*documents[name][:args.documents])
        ids = [script.tokenise(tokenizer, side, None) for side in (queries, texts)]
        count = max(LEAST, int(np.searchsorted(np.cumsum([len(x) for x in ids[1]]), args.tokens)))
        queries, texts, ids = queries[:count], texts[:count], [side[:count] for side in ids]
        scores = {"bm25": bm25_scores(queries, texts), **all_scores(read(*ids))}
        values.append({way: ndcg(x) for way, x in scores.items()})
        lengths.append(np.array([len(x) for x in ids[1]]))
        sources.append({"source": name, "documents": len(texts), "tokens": float(np.median(lengths[-1])),
                        **{way: float(v.mean()) for way, v in values[-1].items()}})
        note(f"{name}: {len(texts)} documents, {lengths[-1].sum():,} tokens; "
             + ", ".join(f"{WAYS[way]} {sources[-1][way]:.1f}" for way in scores))
    mean = {"source": "mean", "documents": sum(r["documents"] for r in sources), "tokens": None,
            **{way: float(np.mean([r[way] for r in sources])) for way in values[0]}}
    differences = []
    for label, (a, b) in ((label, ways) for label, ways in DIFFERENCES.items() if not set(ways) - set(values[0])):
        each = [v[a] - v[b] for v in values]
        differences.append({"difference": label, "mean": float(np.mean([d.mean() for d in each])),
                            "standard_error": float(np.sqrt(sum(d.var(ddof=1) / len(d) for d in each)) / len(each))})
    pooled, of = {way: np.concatenate([v[way] for v in values]) for way in values[0]}, np.concatenate(lengths)
    by_length = [{"from": low, "to": high, "documents": int(chosen.sum()),
                  **{way: float(v[chosen].mean()) for way, v in pooled.items()}}
                 for low, high in zip(LENGTHS, LENGTHS[1:]) if (chosen := (of > low) & (of <= high)).sum() >= 10]
    return {"sources": [*sources, mean], "differences": differences, "lengths": by_length}


def passkey_texts(tokenizer: Any, length: int, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Queries and documents (token ids) of `length` tokens each, the same for every model."""
    rng = np.random.default_rng(length)
    inner = lambda text: script.tokenise(tokenizer, [text], None)[0][1:-1]  # noqa: E731
    cls, sep = script.tokenise(tokenizer, [""], None)[0]
    filler, ends = [], [0]
    while len(filler) < length:
        filler += inner(FILLER[(len(ends) - 1) % len(FILLER)])
        ends.append(len(filler))
    queries, documents = [], []
    for name in rng.permutation([f"{a} {b}" for a in FIRST for b in LAST])[:count]:
        key = rng.integers(10000, 100000)
        needle = inner(f"{name}'s pass key is {key}. Remember it. {key} is the pass key for {name}.")
        room = length - 2 - len(needle)
        at = rng.choice([end for end in ends if end <= room])
        documents.append([cls, *filler[:at], *needle, *filler[at:room], sep])
        queries.append(script.tokenise(tokenizer, [f"what is the pass key for {name}?"], None)[0])
    return queries, documents


def passkeys(args: argparse.Namespace, read: Callable[..., Vectors], tokenizer: Any) -> list[dict[str, Any]]:
    """Accuracy of every way at every length."""
    rows = []
    for length in PASSKEY[:2 if args.quick else None]:
        queries, documents = passkey_texts(tokenizer, length, args.passkeys)
        scores = {"bm25": bm25_scores(*([tokenizer.decode(x[1:-1]) for x in side] for side in (queries, documents))),
                  **all_scores(read(queries, documents))}
        first = {way: s.argmax(1) == np.arange(len(s)) for way, s in scores.items()}
        rows.append({"length": length, **{way: float(found.mean()) for way, found in first.items()}})
        note(f"passkey, {length} tokens: " + ", ".join(f"{WAYS[way]} {rows[-1][way]:.2f}" for way in scores))
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Speed and memory


def random_words(tokenizer: Any, count: int) -> list[int]:
    """A text of `count` words of one token each."""
    vocabulary = tokenizer.get_vocab().items()
    words = sorted(i for w, i in vocabulary if w.isascii() and w.isalpha() and w.islower() and len(w) > 2)
    cls, sep = script.tokenise(tokenizer, [""], None)[0]
    return [cls, *np.random.default_rng(0).choice(words, count).tolist(), sep]


def speed(args: argparse.Namespace, teacher: Any, student: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Tokens a second and peak memory of each way on one document of several lengths."""
    rows = []
    ways = ways_to_read(teacher, student)
    for length in (512,) if args.quick else (512, 2048, 8192):
        document = random_words(tokenizer, length - 2)
        note(f"speed, {length:,} tokens")
        seconds = interleaved(ways, [document], args.repeats)
        rows.append({"tokens": length, **{way: {"tokens_per_s": rate(length, s)} for way, s in seconds.items()},
                     "speed_against_teacher_windows": ratio(seconds["teacher_windows"], seconds["whole"])})
    words = 1000 if args.quick else 100_000
    note(f"one document of {words:,} words")
    rows.append({"tokens": words + 2, "speed_against_teacher_windows": None, "whole": {}})
    for way in ["whole"] if args.quick else ways:
        lengths = [r["tokens"] for r in rows if way in r]
        found = fresh(__file__, way=way, checkpoint=str(args.checkpoint), lengths=lengths, threads=args.threads)
        for row, peak in zip(rows, found["growth"]):
            row[way]["peak_bytes"] = peak
        if way == "whole":
            rows[-1][way]["tokens_per_s"] = spread([(words + 2) / found["seconds"][-1]])
    return rows


def ways_to_read(teacher: Any, student: Any) -> dict[str, Callable[[list[int]], Any]]:
    """What is timed: from a document's token ids to its vector or vectors."""
    return {"teacher_windows": lambda d: script.encode_tokens(teacher, pieces(d)),
            "target": lambda d: target(teacher, d),
            "student_windows": lambda d: script.encode_tokens(student, pieces(d)),
            "whole": lambda d: script.encode_tokens(student, [d])}


def worker(way: str, checkpoint: str, lengths: list[int], threads: int) -> dict[str, Any]:
    """Seconds of one document of each length, and peak bytes above the loaded, used models."""
    device = script.choose_device(script.config | {"threads": threads})
    teacher, tokenizer, _ = script.load_teacher(script.config)
    student = script.open_student(checkpoint, teacher)[0].to(device)
    read, seconds, peaks = ways_to_read(teacher.to(device), student)[way], [], []
    read(random_words(tokenizer, 16))
    for length in lengths:
        document = random_words(tokenizer, length - 2)
        once = partial(read, document)
        peaks.append(growth(lambda: seconds.append(timed(once)), device))  # noqa: B023  called at once
    return {"growth": peaks, "seconds": seconds}


# ----------------------------------------------------------------------------------------------------------------------
# The whole


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All tables of the parts asked for."""
    if args.quick:
        args.documents, args.passkeys, args.repeats = 12, 4, 1
    elif args.documents < LEAST or not 2 <= args.passkeys <= len(FIRST) * len(LAST):
        raise script.UserError(f"--documents must be at least {LEAST}, --passkeys 2 to {len(FIRST) * len(LAST)}")
    if unknown := set(args.parts) - {"quality", "passkey", "speed", "target"}:
        raise script.UserError(f"--parts: no part {min(unknown)!r}; there are quality, passkey, speed, target")
    if args.plot and not args.plot.absolute().parent.is_dir():
        raise script.UserError(f"--plot {args.plot}: no such folder")
    if not args.data_dir:
        raise script.UserError("--data_dir must name a folder with long/*.jsonl.gz: no documents are generated")
    data, name = find_data(args, folder, 2000)
    cfg = configure(args, **data)
    device = script.choose_device(cfg)
    teacher, tokenizer, _ = script.load_teacher(cfg)
    student, _, info = script.open_student(args.checkpoint, teacher)
    teacher.to(device), student.to(device)
    weights = script.file_sha256(script.find_teacher(cfg["teacher_model"])[0] / "model.safetensors")
    code, cache = hashlib.sha256(script.modelling_source().encode()).hexdigest(), Path(cfg["cache_dir"])

    def read(queries: list[list[int]], documents: list[list[int]], more: bool = True) -> Vectors:
        """Vectors of both models; `more`: the teacher's at 512 tokens and the target too."""
        of_teacher, of_student, found = f"teacher {weights}", f"student {info['sha256']} {code}", {}
        for name, model, of_model in (("teacher", teacher, of_teacher), ("student", student, of_student)):
            found |= kept(cache, f"{of_model} windows, pieces", queries + documents,
                          partial(window_vectors, name, model, queries, documents))
        found |= kept(cache, f"{of_student} whole", documents, lambda: whole_vectors(student, documents))
        if more:
            found |= kept(cache, f"{of_teacher} 512", documents, lambda: {
                "teacher_512": script.encode_tokens(teacher, [pieces(d, 512)[0] for d in documents]).numpy()})
        if more and "target" in args.parts:
            found |= kept(cache, f"{of_teacher} target", documents, lambda: {
                "target": np.stack([target(teacher, d) for d in documents])})
        return found

    result = {"machine": machine(device), "settings": {
        "checkpoint": str(args.checkpoint), "step": info.get("step"), "data": name, "documents": args.documents,
        "tokens": args.tokens, "passkeys": args.passkeys, "repeats": args.repeats}}
    if "quality" in args.parts:
        result |= quality(args, read, tokenizer, data["data_dir"])
    if "passkey" in args.parts:
        result["passkey"] = passkeys(args, partial(read, more=False), tokenizer)
    if "speed" in args.parts:
        result["speed"] = speed(args, teacher, student, tokenizer)
    if args.plot:
        plot(result, args.plot)
    return result


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    s = result["settings"]
    lines = headline(f"Documents: student {s['checkpoint']}, step {s['step']}; {s['data']}, {s['documents']} documents "
                     f"or {s['tokens']:,} tokens a source", result)
    there = lambda row: [(way, label) for way, label in WAYS.items() if way in row]  # noqa: E731
    ways = lambda form, row: {label: lambda r, way=way: shown(r[way], form) for way, label in there(row)}  # noqa: E731
    if "sources" in result:
        title = "nDCG@10 x 100 of each source's queries among its documents; median tokens of a document"
        lines += table(title, result["sources"], {
            "source": lambda r: r["source"], "documents": lambda r: str(r["documents"]),
            "tokens": lambda r: shown(r["tokens"], ",.0f"), **ways(".1f", result["sources"][0])})
        lines += table("differences of nDCG@10 x 100, mean over sources", result["differences"], {
            "": lambda r: r["difference"], "mean": lambda r: shown(r["mean"], "+.1f"),
            "standard error": lambda r: shown(r["standard_error"], ".1f")})
        lines += table("the same by the length of the right document", result["lengths"], {
            "tokens": lambda r: f"{r['from'] + 1:,} to {r['to']:,}" if r["to"] < LENGTHS[-1] else f"over {r['from']:,}",
            "documents": lambda r: str(r["documents"]), **ways(".1f", result["sources"][0])})
    if "passkey" in result:
        lines += table(f"passkey: share found among {s['passkeys']} documents", result["passkey"], {
            "tokens": lambda r: f"{r['length']:,}", **ways(".2f", result["passkey"][0])})
    if "speed" in result:
        timed_ways = there(result["speed"][0])
        cells = {label: lambda r, way=way: shown(r.get(way) and r[way]["tokens_per_s"], ",.0f")
                 for way, label in timed_ways}
        lines += table("tokens a second, one document at a time", result["speed"], {
            "tokens": lambda r: f"{r['tokens']:,}", **cells,
            "whole x teacher's windows": lambda r: shown(r["speed_against_teacher_windows"], ".2f")})
        lines += table("peak MiB above the models", result["speed"], {"tokens": lambda r: f"{r['tokens']:,}", **{
            label: lambda r, way=way: mib(r.get(way, {}).get("peak_bytes"))
            for way, label in timed_ways}})
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Quality over the right document's length, and passkeys found over length."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5))
    rows, keys = result.get("lengths", []), result.get("passkey", [])
    for number, (way, label) in enumerate(WAYS.items()):
        style = {"marker": "o", "color": plt.cm.tab20(2 * number % 20 + 2 * number // 20), "label": label}
        style["ls"] = "-" if way in ("whole", "teacher_windows") else "--"
        if rows and way in rows[0]:
            axes[0].plot([max(256, r["from"]) for r in rows], [r[way] for r in rows], **style)
        if keys and way in keys[0]:
            axes[1].plot([r["length"] for r in keys], [r[way] for r in keys], **style)
    axes[0].set(xscale="log", xlabel="tokens of the right document, at least", ylabel="nDCG@10 x 100",
                title="documents")
    axes[1].set(xscale="log", xlabel="tokens of a document", ylabel="share found", title="passkey")
    for axis, ticks in ((axes[0], [max(256, r["from"]) for r in rows]), (axes[1], [r["length"] for r in keys])):
        axis.set_xticks(ticks, [f"{t:,}" for t in ticks], fontsize=7), axis.minorticks_off(), axis.grid(alpha=0.3)
    axes[0 if rows else 1].legend(fontsize=7)
    figure.tight_layout()
    script.write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=100))
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input."""
    p = parser(__doc__)
    p.add_argument("--checkpoint", default="results/best", help="a checkpoint, model folder or exported student")
    p.add_argument("--documents", type=int, default=200, help="documents of every source at most")
    p.add_argument("--tokens", type=int, default=150_000, help="tokens of a source's documents at most, from 16 on")
    p.add_argument("--passkeys", type=int, default=10, help="documents and queries of every length")
    p.add_argument("--parts", nargs="+", default=["quality", "passkey", "speed"], help="what to measure")
    p.add_argument("--plot", type=Path, help="write quality over length as a PNG too")
    return run(p, measure, page, worker, argv)


if __name__ == "__main__":
    sys.exit(main())
