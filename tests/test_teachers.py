"""Teachers other than the default: depth, width, pooling, prompt, tokenizer; whole runs with small random ones."""
import gzip
import json
import signal
import string
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, BertTokenizerFast, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

import save_best_checkpoint
import train_6layer_deltanet as script

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed (requirements-eval.txt)")
from sentence_transformers import SentenceTransformer  # noqa: E402

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXTS = ["a cat", "Why does the train stop here?", "query", "one two three four five six seven eight", "a"]


def bert_tokenizer(scratch: Path) -> BertTokenizerFast:
    """Words of a few syllables, and letters for the rest."""
    words = ["query", "the", "##ing", *string.ascii_lowercase, *(f"##{c}" for c in string.ascii_lowercase),
             *string.digits, *(f"##{c}" for c in string.digits), *string.punctuation]
    (scratch / "vocab.txt").write_text("\n".join([*SPECIAL, *words]) + "\n")
    return BertTokenizerFast(vocab=str(scratch / "vocab.txt"))


def roberta_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes between <s> and </s>, whose padding is number 1 as RoBERTa's is."""
    vocab = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="<s>", sep_token="</s>", pad_token="<pad>")


def make_teacher(folder: Path, kind: str = "bert", layers: int = 2, width: int = 32, pooling: str | tuple = "mean",
                 prompt: str = "", dense: bool = False, include_prompt: bool = True) -> str:
    """A random teacher of 64 positions, saved by sentence-transformers; its weights are large, so that texts differ."""
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
    scratch = folder.with_name(f"{folder.name}_parts")
    scratch.mkdir(parents=True)
    tokenizer = bert_tokenizer(scratch) if kind == "bert" else roberta_tokenizer()
    shapes = {"vocab_size": len(tokenizer), "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2,
              "intermediate_size": 48, "initializer_range": 0.1}
    torch.manual_seed(0)
    model = BertModel(BertConfig(**shapes, max_position_embeddings=64)) if kind == "bert" else \
        RobertaModel(RobertaConfig(**shapes, max_position_embeddings=66, type_vocab_size=1, pad_token_id=1))
    model.save_pretrained(scratch), tokenizer.save_pretrained(scratch)
    modules = [Transformer(str(scratch)), Pooling(width, pooling_mode=pooling, include_prompt=include_prompt),
               *([Dense(width, width)] if dense else []), Normalize()]
    SentenceTransformer(modules=modules, device="cpu", prompts={"task": prompt},
                        default_prompt_name="task" if prompt else None).save(str(folder))
    return str(folder)


def small(teacher: str, **changes) -> dict:
    return script.check_config(script.config | {"teacher_model": teacher, "d_model": 32, "num_heads": 2,
                                                "num_layers": 2} | changes)


# ---- reading


@pytest.mark.parametrize("kind, options", [
    ("bert", {}), ("bert", {"pooling": "cls"}), ("bert", {"prompt": "query: "}),
    ("bert", {"pooling": "cls", "prompt": "query: "}),
    ("roberta", {}), ("roberta", {"pooling": "cls"})])
def test_a_teacher_embeds_as_in_sentence_transformers(kind, options, tmp_path):
    folder = make_teacher(tmp_path / "teacher", kind, **options)
    teacher, tokenizer, origin = script.load_teacher(small(folder))
    expected = SentenceTransformer(folder, device="cpu").encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(script.encode(teacher, tokenizer, TEXTS), expected, atol=1e-5)
    assert not teacher.training
    assert (" cls " in origin) == ("pooling" in options) and ("'query: '" in origin) == ("prompt" in options)
    tokens = script.tokenise(tokenizer, TEXTS, None)
    longest = max(map(len, tokens))
    micro = script.MicroBatch.of(tokens, [np.arange(len(TEXTS))], [(longest, longest)])
    script.Trainer(script.build_student(small(folder), teacher), teacher, small(folder)).teach(micro)
    np.testing.assert_allclose(micro.target, expected, atol=1e-5)
    assert [x.shape for x in micro.states[0]] == [(len(TEXTS), longest, 32)] * (1 if teacher.cls else 2)


def test_older_pooling_configs_and_none_are_read(tmp_path):
    folder = Path(make_teacher(tmp_path / "teacher"))
    config = folder / "1_Pooling" / "config.json"
    for cls in (True, False):
        config.write_text(json.dumps({"pooling_mode_cls_token": cls, "pooling_mode_mean_tokens": not cls}))
        assert script.load_teacher(small(str(folder)))[0].cls == cls
    for name in script.READING_FILES:
        (folder / name).unlink()
    assert not script.load_teacher(small(str(folder)))[0].cls


def test_a_cache_without_modules_json_is_completed_from_the_hub(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    (tmp_path / "model.safetensors").touch()
    reachable = False

    def snapshot_download(name, local_files_only, **_):
        if not local_files_only:
            if not reachable:
                raise OSError("no network")
            (tmp_path / "modules.json").touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert script.find_teacher("some/teacher") == (tmp_path, "hub cache, some/teacher")
    reachable = True
    assert script.find_teacher("some/teacher") == (tmp_path, "hub, some/teacher")
    assert script.find_teacher("some/teacher") == (tmp_path, "hub cache, some/teacher")


@pytest.mark.parametrize("options", [
    {"pooling": "cls"}, {"prompt": "query: "}, {"pooling": "cls", "prompt": "query: "}])
def test_long_texts_are_read_by_windows_with_the_prompt_in_each(options, tmp_path):
    teacher, tokenizer, _ = script.load_teacher(small(make_teacher(tmp_path / "teacher", **options)))
    head, generator = 1 + len(teacher.prompt), torch.Generator().manual_seed(0)
    texts = [[2, *torch.randint(5, 60, (n,), generator=generator).tolist(), 3] for n in (20, 64 - head - 1, 90, 200)]
    ids, mask = script.pad_batch(texts)
    found = script.teacher_states(teacher, ids, mask)
    known = script.teacher_states(teacher, ids, mask, [len(x) for x in texts])
    assert all(torch.equal(x, y) for x, y in zip(found, known, strict=True))
    for i, text in enumerate(texts):
        inner, n = text[1:-1], len(text) - 2
        size = 64 - head - 1  # tokens of a text in a window
        starts = [0] if n <= size else [*range(0, n - size, size // 2), n - size]
        windows = [[text[0], *teacher.prompt, *inner[a:a + size], text[-1]] for a in starts]
        states = [teacher.model(torch.tensor([w]), output_hidden_states=True).hidden_states[-1][0] for w in windows]
        central = [min((j for j, a in enumerate(starts) if a <= t < a + size),
                       key=lambda j: abs(t - starts[j] - (size - 1) / 2)) for t in range(n)]
        own = [states[j][head + t - starts[j]] for t, j in enumerate(central)]
        expected = torch.stack([*states[0][:head], *own, states[-1][-1]])
        if teacher.cls:
            expected[0] = torch.stack([s[0] for s in states]).mean(0)
        torch.testing.assert_close(found[-1][i, :len(expected)], expected.detach(), atol=1e-5, rtol=1e-4)
    vectors = script.encode_tokens(teacher, texts)  # evaluation reads them the same way
    torch.testing.assert_close(vectors, teacher.pool(found[-1], mask), atol=1e-5, rtol=1e-4)


FAULTS = {  # how the teacher is made, what is then written into its config.json, what the error says
    "pooling": ({"pooling": "max"}, {}, "its pooling is max"),
    "poolings": ({"pooling": ("mean", "max")}, {}, "its pooling is mean[+]max"),
    "layers": ({"layers": 3}, {}, "num_layers a divisor"),
    "narrow": ({"width": 16}, {}, "d_model must be at most"),
    "prompt": ({"prompt": "quer"}, {}, "not made of whole tokens"),
    "long prompt": ({"prompt": "query: " * 20}, {}, "leaves no room"),
    "prompt left out": ({"prompt": "query: ", "include_prompt": False}, {}, "out of its pooling"),
    "dense": ({"dense": True}, {}, "has a module Dense"),
    "activation": ({}, {"hidden_act": "relu"}, "not gelu"),
    "structure": ({}, {"model_type": "mpnet"}, "is a mpnet model"),
    "slow tokenizer": ({}, {}, "no fast tokenizer"),
    "modules": ({}, {}, "cannot be loaded")}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_one_line(fault, tmp_path):
    options, change, message = FAULTS[fault]
    folder = Path(make_teacher(tmp_path / "teacher", **options))
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | change))
    if fault == "slow tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *string.ascii_lowercase]) + "\n")
        (folder / "tokenizer_config.json").write_text(json.dumps({
            "tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "basic"}))
    if fault == "modules":
        (folder / "modules.json").write_text("{")
    with pytest.raises(script.UserError, match=message) as error:
        script.load_teacher(small(str(folder)))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


# ---- the student's start


def test_a_deeper_teacher_is_followed_at_every_second_layer(tmp_path):
    cfg = small(make_teacher(tmp_path / "teacher", layers=4), projection_init="teacher")
    teacher, _, _ = script.load_teacher(cfg)
    student = script.build_student(cfg, teacher)
    for i, layer in enumerate((teacher.model.encoder.layer[1], teacher.model.encoder.layer[3])):
        torch.testing.assert_close(student.deltanet_ffns[i].down.weight, layer.output.dense.weight)
        torch.testing.assert_close(student.deltanet_layers[i].qkv_proj.weight[:32], layer.attention.self.query.weight)
    ids, mask = script.pad_batch([[2, 7, 8, 3], [2, 9, 3]])
    expected = teacher.model(ids, mask, output_hidden_states=True).hidden_states
    for found, state in zip(script.teacher_states(teacher, ids, mask), (expected[2], expected[4]), strict=True):
        torch.testing.assert_close(found, state)


def test_a_wider_teacher_starts_the_student_in_its_words_principal_components(tmp_path):
    cfg = small(make_teacher(tmp_path / "teacher", width=48))
    teacher, _, _ = script.load_teacher(cfg)
    words = teacher.model.embeddings.word_embeddings.weight
    with torch.no_grad():
        words.copy_(torch.randn(len(words), 32) @ torch.randn(32, 48))  # of rank 32: nothing is lost
        teacher.model.encoder.layer[1].intermediate.dense.weight.copy_(torch.randn(48, len(words)) @ words / 100)
    student = script.build_student(cfg, teacher)
    widen = script.widening(student)
    torch.testing.assert_close(widen(student.word_embeddings.weight), words, atol=1e-3, rtol=1e-4)
    x = words[:9]
    up = teacher.model.encoder.layer[1].intermediate.dense
    found = student.deltanet_ffns[1].up(student.word_embeddings.weight[:9])
    torch.testing.assert_close(found, up(x), atol=1e-2, rtol=1e-3)
    assert {"word_embeddings.weight", "projection"} <= set(script.trainable_state(student))

    vectors = torch.randn(5, 32)
    with torch.no_grad():
        student.projection.add_(torch.randn(48, 32))  # whatever training makes of it, it is an isometry
    wide = script.widening(student)(vectors)
    torch.testing.assert_close(wide @ wide.T, vectors @ vectors.T)
    F.mse_loss(wide, torch.randn(5, 48)).backward()
    assert student.projection.grad.norm() > 0


# ---- whole runs


def train(*argv: object) -> None:
    """The script's main in this process, with the signals as they were afterwards."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    try:
        assert script.main([str(x) for x in argv]) == 0
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


@pytest.fixture
def few(corpus, tmp_path, monkeypatch) -> Path:
    """A folder with 100 training pairs and 40 scored pairs in each split."""
    monkeypatch.setattr(script, "STS_ROWS", {"dev": 40, "test": 40})
    for file in [*(corpus / "sts").glob("*.gz"), next((corpus / "train").glob("*.gz"))]:
        target = tmp_path / "data" / file.relative_to(corpus)
        target.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(file, "rt") as lines, gzip.open(target, "wt") as out:
            out.writelines(line for line, _ in zip(lines, range(40 if "sts" in str(target) else 100)))
    return tmp_path / "data"


RUNS = {"deep, cls": ({"layers": 4, "pooling": "cls"}, ()),
        "wide, prompt": ({"width": 48, "prompt": "query: "}, ("--keep_projection", "true")),
        "wide, deep, cls": ({"width": 48, "layers": 6, "pooling": "cls"}, ()),
        "roberta": ({"kind": "roberta"}, ("--learned_positions", "true"))}


@pytest.mark.parametrize("name", RUNS)
def test_whole_run_resume_and_saved_model(name, few, tmp_path):
    options, extra = RUNS[name]
    folder = make_teacher(tmp_path / "teacher", **options)
    command = ["--teacher_model", folder, "--data_dir", few, "--cache_dir", tmp_path / "cache", "--d_model", 32,
               "--num_heads", 2, "--num_layers", 2, "--batch_size", 8, "--gradient_accumulation_steps", 2,
               "--max_length", 16, "--threads", torch.get_num_threads(), "--total_steps", 4, "--warmup_steps", 1,
               "--save_interval", 2, "--log_interval", 2, "--peak_learning_rate", 1e-3, *extra]
    train(*command, "--output_dir", tmp_path / "whole")
    (tmp_path / "parts").mkdir()
    for file in ("checkpoint_2.pt", "checkpoint_2.json", "metrics.jsonl"):
        (tmp_path / "parts" / file).write_bytes((tmp_path / "whole" / file).read_bytes())
    train(*command, "--output_dir", tmp_path / "parts", "--resume", "latest")
    a, b = (torch.load(tmp_path / d / "checkpoint_4.pt", weights_only=True) for d in ("whole", "parts"))
    assert ("projection" in a["student"]) == ("width" in options)
    assert all(torch.equal(a["student"][k], b["student"][k]) for k in a["student"])
    teacher, tokenizer, _ = script.load_teacher(a["config"])
    start = script.trainable_state(script.build_student(a["config"], teacher))
    assert all(not torch.equal(a["student"][k], start[k]) for k in ("projection", "ffn_norms.0.weight") if k in start)

    final, kept = tmp_path / "whole" / "final_model", "--keep_projection" in extra
    vectors = SentenceTransformer(str(final), trust_remote_code=True, device="cpu").encode(TEXTS)
    student, _, _ = script.open_student(tmp_path / "whole" / "checkpoint_4.pt", teacher)
    again, _, _ = script.open_student(final, teacher)
    for model in (student, again):
        own = script.encode(model, tokenizer, TEXTS, max_length=16)
        wide = script.widening(model)(torch.from_numpy(own)).detach().numpy() if kept else own
        np.testing.assert_allclose(vectors, wide, atol=1e-5)
        np.testing.assert_allclose(vectors @ vectors.T, own @ own.T, atol=1e-5)
    assert "projection" not in torch.load(final / "pytorch_model.bin", weights_only=True)
    assert (final / "2_Dense").exists() == kept


def test_saving_the_map_of_a_wider_teacher_afterwards(tmp_path, capsys):
    folder = make_teacher(tmp_path / "teacher", width=48)
    cfg = small(folder, data_dir=str(tmp_path))
    teacher, tokenizer, _ = script.load_teacher(cfg)
    student = script.build_student(cfg, teacher)
    (tmp_path / "run").mkdir()
    path = script.save_checkpoint(tmp_path / "run", 3, student, script.build_optimizer(student, cfg), cfg, {}, {}, {})
    for name, options, width in (("own", (), 32), ("wide", ("--keep_projection",), 48)):
        assert save_best_checkpoint.main([str(path), "--output_dir", str(tmp_path / name), *options]) == 0
        vectors = SentenceTransformer(str(tmp_path / name), trust_remote_code=True, device="cpu").encode(TEXTS)
        assert vectors.shape[1] == width
        card = (tmp_path / name / "README.md").read_text()
        assert f"{width} numbers each" in card and "distilled from teacher" in card and "MiniLM" not in card
    late = ["--output_dir", str(tmp_path / "late"), "--keep_projection"]
    assert save_best_checkpoint.main([str(tmp_path / "own"), *late]) == 2
    assert "without the map" in capsys.readouterr().err
    compact = tmp_path / "compact"
    assert save_best_checkpoint.main([str(path), "--export_trained", str(compact)]) == 0
    found = script.open_student(compact, teacher)[0]
    own = [torch.from_numpy(script.encode(model, tokenizer, TEXTS)) for model in (student, found)]
    wide = [script.widening(model)(x).detach() for model, x in zip((student, found), own)]
    torch.testing.assert_close(*wide, atol=0.01, rtol=0.01)  # float16
