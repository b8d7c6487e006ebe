"""Speed of `encode`: against SentenceTransformer with the teacher's weights, both in onnxruntime too; on long texts.

    python bench/encode.py            16 to 512 tokens against MiniLM; 2,048 to 32,768 against its architecture
    python bench/encode.py --data_dir DIR    real texts too: of its pairs, and the sentences of STS-B dev
    python bench/encode.py --long     16 to 512 tokens alone
    python bench/encode.py --threads 2 --json results/bench/encode.json --plot results/bench/throughput.png
    python bench/encode.py --quick    does it work? under a minute

Both encoders get the same list of texts, tokenise them and return numpy vectors, in batches of `--batch_size` texts,
less where that were more tokens than the student's `encode` puts into a batch (2,048 on a CPU, 16,384 on CUDA). A text
of N tokens is N - 2 words of the vocabulary, of one token each, between [CLS] and [SEP]. The student has the teacher's
projections and no training: its speed does not depend on the weights.

On a CPU both take further turns with their linear layers in int8: the student as its config's `int8` has it, MiniLM by
PyTorch's `quantize_dynamic`. Then onnxruntime takes its turns on the same texts: the student's `--onnx` and `--int8`
files, and the teacher's own, exported by PyTorch and quantised in the same way.

Real texts, of different lengths, are read by both through SentenceTransformer, `--batch_size` at a time, sorted by
their characters as it does, a batch padded to its longest text. On a CPU the student leaves the padding out.

Long texts are encoded one at a time. The attention architecture is a random BERT of the teacher's shapes whose position
table is as long as the text, with PyTorch's scaled_dot_product_attention. Memory: peak of one text above the loaded,
used model, in a fresh process for each length. A length is not run where memory or `--time_limit` would not do, and the
row says so.
"""
from __future__ import annotations

import argparse
import copy
import sys
import warnings
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import numpy as np
import torch
from common import (configure, fresh, growth, headline, interleaved, machine, mib, note, one_layer, parser, rate,
                    ratio, resident, run, script, shown, spread, table)
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from delta_onnx import OnnxModel, need, quantise_onnx, write_onnx
from detect_hardware import find_hardware

LENGTHS = (16, 32, 64, 128, 256, 512)
LONG = (2048, 8192, 32768)
SHORT = 512  # tokens; what the time per token of long texts is compared with


def vocabulary(tokenizer: Any) -> list[str]:
    """Real words that are one token each."""
    words = [w for w in tokenizer.get_vocab() if w.isascii() and w.isalpha() and w.islower() and len(w) > 2]
    return sorted(words)


def make_texts(tokenizer: Any, length: int, count: int, seed: int = 0) -> list[str]:
    """`count` texts of exactly `length` tokens, [CLS] and [SEP] included."""
    words, rng = vocabulary(tokenizer), np.random.default_rng([seed, length])
    texts = [" ".join(words[i] for i in row) for row in rng.integers(len(words), size=(count, length - 2))]
    if any(len(ids) != length for ids in script.tokenise(tokenizer, texts, None)):
        raise script.UserError(f"texts of {length} tokens cannot be made: this tokenizer splits its own words")
    return texts


def sentence_transformer(folder: Path, device: torch.device) -> Any:
    """SentenceTransformer on the teacher's folder, reading 512 tokens."""
    from sentence_transformers import SentenceTransformer
    modules = None
    if not (folder / "modules.json").is_file():  # as in a hub cache that holds only what training needs
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
        transformer = Transformer(str(folder))
        modules = [transformer, Pooling(transformer.get_embedding_dimension(), pooling_mode="mean"), Normalize()]
    model = SentenceTransformer(None if modules else str(folder), modules=modules, device=str(device))
    model.max_seq_length = 512
    return model.eval()


def in_int8(student: Any, minilm: Any) -> dict[str, Any]:
    """Copies of both that multiply in int8 in PyTorch."""
    ours, theirs = copy.deepcopy(student), copy.deepcopy(minilm)
    ours.config.int8 = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, that it will go into a package of its own
        torch.ao.quantization.quantize_dynamic(theirs, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
    return {"student_torch_int8": ours, "minilm_torch_int8": theirs}


def load_student(cfg: dict[str, Any]) -> tuple[Any, Any]:
    """An untrained student on the device, and the tokenizer."""
    device = script.choose_device(cfg)
    teacher, tokenizer, _ = script.load_teacher(cfg)
    return script.build_student(cfg, teacher).to(device).eval(), tokenizer


class Hidden(torch.nn.Module):
    """The teacher as a function of two tensors."""

    def __init__(self, teacher: PreTrainedModel):
        super().__init__()
        self.teacher = teacher

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.teacher(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden, script.mean_pool(hidden, attention_mask)


@torch.no_grad()
def write_teacher(teacher: PreTrainedModel, path: Path) -> None:
    """The teacher as an ONNX file of dynamic batch and length, by PyTorch's exporter."""
    inputs, outputs = ("input_ids", "attention_mask"), ("last_hidden_state", "sentence_embedding")
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    example = torch.full((3, 21), 1000), torch.ones(3, 21, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, of its own
        program = torch.onnx.export(Hidden(teacher).eval(), example, dynamo=True, verbose=False, input_names=inputs,
                                    output_names=outputs, dynamic_shapes=dict.fromkeys(inputs, dims))
    program.save(path, external_data=False)


def onnx_models(cfg: dict[str, Any], student: Any, folder: Path) -> dict[str, OnnxModel]:
    """Student and teacher in onnxruntime with PyTorch's number of threads, in float32 and in int8."""
    need("onnx", "onnxruntime", "onnxscript")
    files = {name: folder / f"{name}.onnx" for name in ("student_onnx", "teacher_onnx", "student_int8", "teacher_int8")}
    note("exporting to ONNX")
    write_onnx(student, files["student_onnx"]), write_teacher(script.load_teacher(cfg)[0].model, files["teacher_onnx"])
    quantise_onnx(files["student_onnx"], files["student_int8"])
    quantise_onnx(files["teacher_onnx"], files["teacher_int8"], prefix="")
    return {name: OnnxModel(path, torch.get_num_threads()) for name, path in files.items()}


def long_shapes(cfg: dict[str, Any], positions: int) -> PretrainedConfig:
    """The teacher's config with a table of `positions`, a multiple of 8 as `encode` pads."""
    shapes = AutoConfig.from_pretrained(script.find_teacher(cfg["teacher_model"])[0], local_files_only=True)
    shapes.max_position_embeddings = -(-positions // 8) * 8
    return shapes


def long_attention(cfg: dict[str, Any], positions: int) -> PreTrainedModel:
    """A random BERT of the teacher's shapes that reads `positions` tokens."""
    shapes = long_shapes(cfg, positions)
    return AutoModel.from_config(shapes, attn_implementation="sdpa", add_pooling_layer=False).eval()


def attention_gib(shapes: PretrainedConfig, length: int) -> float:
    """Estimated GiB of one text in the attention architecture: weights, position table, the widest layer's activations.

    scaled_dot_product_attention keeps no length x length matrix where its fused form applies, as it does here.
    """
    d = shapes.hidden_size
    weights = shapes.vocab_size * d + shapes.num_hidden_layers * 12 * d * d + length * d
    return 4 * (weights + length * (10 * d + 2 * shapes.intermediate_size)) / 2**30


def short_rows(args: argparse.Namespace, cfg: dict[str, Any], student: Any, tokenizer: Any,
               scratch: Path) -> list[dict[str, Any]]:
    """The student's `encode` and SentenceTransformer's on the same texts, and on a CPU `encode` with the ONNX files."""
    folder, rows = script.find_teacher(cfg["teacher_model"])[0], []
    minilm = sentence_transformer(folder, next(student.parameters()).device)
    on_cpu = minilm.device.type == "cpu"
    models, int8 = onnx_models(cfg, student, scratch) if on_cpu else {}, in_int8(student, minilm) if on_cpu else {}
    for length in args.lengths:
        count = max(2, args.tokens // length)
        texts = make_texts(tokenizer, length, count)
        batch = min(args.batch_size, max(1, (16384 if minilm.device.type == "cuda" else 2048) // length))
        note(f"{count} texts of {length} tokens")
        ours = lambda model: lambda x: script.encode(  # noqa: E731
            model, tokenizer, x, batch_size=batch, max_length=512)  # noqa: B023
        theirs = lambda model: lambda x: model.encode(  # noqa: E731
            x, batch_size=batch, show_progress_bar=False)  # noqa: B023  called at once, as those of `ours`
        cases = {"student": ours(student), "minilm": theirs(minilm),
                 **{name: (theirs if name.startswith("minilm") else ours)(model) for name, model in int8.items()}}
        in_onnx = {name: ours(model) for name, model in models.items()}
        shapes = {name: case(texts[:2]).shape for name, case in (cases | in_onnx).items()}
        if len(set(shapes.values())) > 1 or len(minilm.tokenizer(texts[0])["input_ids"]) != length:
            raise script.UserError(f"the two encoders do not read the same {length} tokens: {shapes}")
        # Apart: onnxruntime's idle threads go on for a while, and take a fifth from what has its turn next.
        seconds = interleaved(cases, [texts], args.repeats) | interleaved(in_onnx, [texts], args.repeats)
        rows.append({"length": length, "texts": count, "batch_size": batch, **{
            name: {"seconds": spread(s), "sentences_per_s": rate(count, s), "tokens_per_s": rate(count * length, s)}
            for name, s in seconds.items()}, "speed_against_minilm": ratio(seconds["minilm"], seconds["student"]),
            **{f"{name}_against_minilm": ratio(seconds["minilm"], seconds[name]) for name in [*int8, *models]}})
        if models:
            rows[-1] |= {"torch_int8_against_torch": ratio(seconds["student"], seconds["student_torch_int8"]),
                         "torch_int8_against_minilm_torch_int8": ratio(seconds["minilm_torch_int8"],
                                                                       seconds["student_torch_int8"]),
                         "onnx_against_teacher_onnx": ratio(seconds["teacher_onnx"], seconds["student_onnx"]),
                         "int8_against_onnx": ratio(seconds["student_onnx"], seconds["student_int8"]),
                         "int8_against_teacher_int8": ratio(seconds["teacher_int8"], seconds["student_int8"])}
    return rows


def real_texts(cfg: dict[str, Any], count: int) -> dict[str, list[str]]:
    """By name, at most `count` sentences of STS-B dev, and first and second texts of pairs, as many of each source."""
    sources = script.find_sources(cfg)
    pairs = [row for _, file in sources for row in islice(script.read_pairs(file), -(-count // (2 * len(sources))))]
    return {"sentences": [text for row in script.load_sts(cfg, "dev") for text in row[:2]][:count],
            "pairs": [text for row in pairs for text in row[:2]][:count]}


def real_rows(args: argparse.Namespace, cfg: dict[str, Any], student: Any, tokenizer: Any,
              scratch: Path) -> list[dict[str, Any]]:
    """Both through SentenceTransformer, in float32 and on a CPU in int8, on texts of `data_dir`."""
    from sentence_transformers import SentenceTransformer
    minilm, rows = sentence_transformer(script.find_teacher(cfg["teacher_model"])[0], student.device), []
    script.save_model(scratch / "student", student, tokenizer, cfg | {"max_length": 512}, {})
    opened = partial(SentenceTransformer, str(scratch / "student"), trust_remote_code=True, device=str(student.device))
    cases = {"student": opened(), "minilm": minilm}
    if student.device.type == "cpu":
        cases |= {**in_int8(student, minilm), "student_torch_int8": opened(config_kwargs={"int8": True})}
    for name, texts in real_texts(cfg, args.texts).items():
        note(f"{len(texts)} real texts: {name}")
        lengths = sorted(map(len, script.tokenise(tokenizer, texts, 512)))
        seconds = interleaved({case: lambda x, model=model: model.encode(x, batch_size=args.batch_size,
                                                                         show_progress_bar=False)
                               for case, model in cases.items()}, [texts], args.repeats)
        rows.append({"name": name, "texts": len(texts), "tokens": sum(lengths),
                     "median_length": lengths[len(texts) // 2],
                     **{k: {"seconds": spread(s), "texts_per_s": rate(len(texts), s)} for k, s in seconds.items()},
                     **{f"{case}_against_minilm": ratio(seconds["minilm"], seconds[case])
                        for case in cases if case != "minilm"}})
    return rows


def not_run(args: argparse.Namespace, cfg: dict[str, Any], length: int, device: torch.device,
            before: tuple[int, float] | None) -> str | None:
    """Why attention is not run at this length, or None. `before`: a shorter length and its seconds (quadratic)."""
    free = torch.cuda.mem_get_info()[0] / 2**30 if device.type == "cuda" else find_hardware()["cpu"]["free_gib"] or 4.0
    needed = attention_gib(long_shapes(cfg, length), length)
    if needed > 0.8 * free:
        return f"not run: would need {needed:.1f} GiB, {free:.1f} GiB free"
    seconds = (args.long_repeats + 1) * before[1] * (length / before[0]) ** 2 if before else 0.0
    if seconds > args.time_limit:
        return f"not run: would take up to {seconds:.0f} s, --time_limit is {args.time_limit:.0f}"
    return None


def long_rows(args: argparse.Namespace, cfg: dict[str, Any], student: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """One text at a time; each length takes turns with a few texts of SHORT tokens, and with attention if possible."""
    rows, device, before = [], next(student.parameters()).device, None
    read = lambda model, text: script.encode(model, tokenizer, [text], batch_size=1, max_length=None)  # noqa: E731
    short = make_texts(tokenizer, SHORT, args.short_texts, 1)
    for length in sorted(args.long):
        text = make_texts(tokenizer, length, 1)[0]
        note(f"one text of {length:,} tokens")
        cases = {"short": lambda _: [read(student, t) for t in short], "student": lambda t: read(student, t)}
        if not (reason := not_run(args, cfg, length, device, before)):
            attention = long_attention(cfg, length).to(device)
            cases["attention"] = lambda t: read(attention, t)  # noqa: B023  called in this turn of the loop
        seconds = interleaved(cases, [text], args.long_repeats)
        each, each_short = ([s / count for s in seconds[k]]
                            for k, count in (("student", length), ("short", SHORT * len(short))))
        row = {"length": length, "seconds": spread(seconds["student"]), "seconds_per_token": spread(each),
               "tokens_per_s": rate(length, seconds["student"]), "time_per_token_over_short": ratio(each, each_short),
               "attention_not_run": reason, "attention_seconds": None, "speed_against_attention": None}
        if not reason:
            before, attention = (length, min(seconds["attention"])), None
            row |= {"attention_seconds": spread(seconds["attention"]),
                    "speed_against_attention": ratio(seconds["attention"], seconds["student"])}
        kinds, peaks = ["student"] if reason else ["student", "attention"], {}
        for group in [kinds] if args.quick else [[kind] for kind in kinds]:
            peaks |= fresh(__file__, kinds=group, cfg=cfg, length=length)["growth"]
        for kind in ("student", "attention"):
            peak = peaks.get(kind)
            row |= {f"{kind}_peak_bytes": peak, f"{kind}_bytes_per_token": peak and peak / length}
        rows.append(row)
    return rows


def worker(kinds: list[str], cfg: dict[str, Any], length: int) -> dict[str, Any]:
    """Bytes by which one text's peak exceeds the model, which has read a short text before, for each kind of model."""
    student, tokenizer = load_student(cfg)
    device, found = next(student.parameters()).device, {}
    for kind in kinds:
        model = long_attention(cfg, length).to(device) if kind == "attention" else student
        read = lambda text: script.encode(model, tokenizer, [text], batch_size=1, max_length=None)  # noqa: B023, E731
        read(make_texts(tokenizer, 16, 1)[0])
        text = make_texts(tokenizer, length, 1)[0]
        found[kind] = growth(lambda: read(text), device)  # noqa: B023  called at once
    return {"growth": found, "before": resident()}


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rows."""
    if args.quick:
        args.lengths, args.long, args.tokens, args.texts = [16, 128], [1024], 256, 16
        args.repeats, args.long_repeats, args.short_texts = 2, 2, 1
    if args.plot and not args.plot.absolute().parent.is_dir():
        raise script.UserError(f"--plot {args.plot}: no such folder")
    cfg = configure(args)
    cfg |= one_layer(cfg, folder) if args.quick else {}
    student, tokenizer = load_student(cfg)
    result = {"machine": machine(next(student.parameters()).device)}
    short = short_rows(args, cfg, student, tokenizer, folder) if args.lengths else []
    result |= {"settings": {"repeats": args.repeats, "long_repeats": args.long_repeats, "batch_size": args.batch_size,
                            "short_texts": args.short_texts, "time_limit": args.time_limit},
               "rows": short, "real": real_rows(args, cfg, student, tokenizer, folder) if args.data_dir else [],
               "long": long_rows(args, cfg, student, tokenizer) if args.long else []}
    if args.plot:
        plot(result, args.plot)
    return result


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    s = result["settings"]
    lines = headline("Encoding", result)
    lines += table(f"batches of at most {s['batch_size']}; MiniLM: SentenceTransformer with the teacher's weights",
                   result["rows"], {
        "tokens": lambda r: str(r["length"]), "texts": lambda r: str(r["texts"]),
        "sentences/s": lambda r: shown(r["student"]["sentences_per_s"]),
        "tokens/s": lambda r: shown(r["student"]["tokens_per_s"], ",.0f"),
        "MiniLM: sentences/s": lambda r: shown(r["minilm"]["sentences_per_s"]),
        "its tokens/s": lambda r: shown(r["minilm"]["tokens_per_s"], ",.0f"),
        "x MiniLM": lambda r: shown(r["speed_against_minilm"], ".2f")})
    if any("student_onnx" in row for row in result["rows"]):
        against = lambda name: lambda r: shown(r[f"{name}_against_minilm"], ".2f")  # noqa: E731
        lines += table("in int8 in PyTorch, as a multiple of MiniLM's speed in float32; then one against another",
                       result["rows"], {
            "tokens": lambda r: str(r["length"]),
            "student": against("student_torch_int8"), "MiniLM": against("minilm_torch_int8"),
            "student int8 / float32": lambda r: shown(r["torch_int8_against_torch"], ".2f"),
            "student / MiniLM int8": lambda r: shown(r["torch_int8_against_minilm_torch_int8"], ".2f"),
            "student int8 / teacher int8 in onnxruntime": lambda r: shown(
                r["student_torch_int8_against_minilm"]["median"] / r["teacher_int8_against_minilm"]["median"], ".2f")})
        lines += table("the same in onnxruntime, as a multiple of MiniLM's speed in PyTorch; then one against another",
                       result["rows"], {
            "tokens": lambda r: str(r["length"]),
            "student ONNX": against("student_onnx"), "teacher ONNX": against("teacher_onnx"),
            "student int8": against("student_int8"), "teacher int8": against("teacher_int8"),
            "student / teacher ONNX": lambda r: shown(r["onnx_against_teacher_onnx"], ".2f"),
            "student int8 / ONNX": lambda r: shown(r["int8_against_onnx"], ".2f"),
            "student / teacher int8": lambda r: shown(r["int8_against_teacher_int8"], ".2f")})
    if result["real"]:
        names = [name for name in ("student", "student_torch_int8", "minilm_torch_int8") if name in result["real"][0]]
        lines += table("real texts a second, by SentenceTransformer", result["real"], {
            "texts": lambda r: f"{r['texts']} {r['name']}", "tokens, median": lambda r: str(r["median_length"]),
            **{name: lambda r, name=name: shown(r[name]["texts_per_s"]) for name in ("minilm", *names)},
            **{f"{name} / minilm": lambda r, name=name: shown(r[f"{name}_against_minilm"], ".2f") for name in names}})
    lines += table(f"long texts, one at a time, {s['long_repeats']} repeats, beside {s['short_texts']} of {SHORT} "
                   "tokens, also one at a time; peak memory above the model", result["long"], {
        "tokens": lambda r: f"{r['length']:,}", "seconds": lambda r: shown(r["seconds"]),
        "us/token": lambda r: shown(1e6 * r["seconds_per_token"]["median"]),
        f"over {SHORT}'s": lambda r: shown(r["time_per_token_over_short"], ".2f"),
        "MiB": lambda r: mib(r["student_peak_bytes"]),
        "KiB/token": lambda r: shown(r["student_bytes_per_token"] and r["student_bytes_per_token"] / 1024),
        "attention: seconds": lambda r: r["attention_not_run"] or shown(r["attention_seconds"]),
        "its MiB": lambda r: mib(r["attention_peak_bytes"]),
        "x attention": lambda r: shown(r["speed_against_attention"], ".2f")})
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Tokens a second over the text's length, student and teacher, both axes logarithmic."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows, long = result["rows"], result["long"]
    lines = {
        "student": [(r["length"], r["student"]["tokens_per_s"]["median"]) for r in rows]
        + [(r["length"], r["tokens_per_s"]["median"]) for r in long],
        "teacher (SentenceTransformer, reads up to 512)": [
            (r["length"], r["minilm"]["tokens_per_s"]["median"]) for r in rows],
        "its attention architecture without that limit": [
            (r["length"], r["length"] / r["attention_seconds"]["median"]) for r in long if r["attention_seconds"]]}
    figure, axis = plt.subplots(figsize=(7, 4))
    for label, points in lines.items():
        if points:
            axis.plot(*zip(*points), marker="o", label=label)
    axis.set(xscale="log", yscale="log", xlabel="tokens of a text", ylabel="tokens a second", title="encoding")
    axis.set_xticks(ticks := [length for length, _ in lines["student"]], [f"{t:,}" for t in ticks], fontsize=7)
    axis.grid(alpha=0.3), axis.legend(fontsize=8)
    figure.tight_layout()
    script.write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=100))
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input or a failed measurement."""
    p = parser(__doc__)
    p.add_argument("--lengths", nargs="*", type=int, default=list(LENGTHS), help="tokens of the short texts")
    p.add_argument("--long", nargs="*", type=int, default=list(LONG), help="tokens of the long texts")
    p.add_argument("--texts", type=int, default=1500, help="real texts of a kind, of data_dir")
    p.add_argument("--tokens", type=int, default=16384, help="tokens of all texts of a short length")
    p.add_argument("--batch_size", type=int, default=32, help="texts a batch, SentenceTransformer's default")
    p.add_argument("--short_texts", type=int, default=4, help="texts of 512 tokens beside a long one")
    p.add_argument("--long_repeats", type=int, default=3, help="timed rounds of the long texts")
    p.add_argument("--time_limit", type=float, default=900, help="seconds that attention may take at one length")
    p.add_argument("--plot", type=Path, help="write throughput over length as a PNG too")
    return run(p, measure, page, worker, argv)


if __name__ == "__main__":
    sys.exit(main())
