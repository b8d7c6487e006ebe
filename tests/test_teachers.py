"""Teachers other than the default: depth, width, pooling, prompt, tokenizer; whole runs with small random ones."""
import contextlib
import json
import signal
import string
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, BertTokenizerFast, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

import train_6layer_deltanet as script

SentenceTransformer = pytest.importorskip("sentence_transformers", reason="needs requirements-eval.txt").SentenceTransformer
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
TEXTS = ["a cat", "Why does the train stop here?", "query", "one two three four five six seven eight", "a"]


def bert_tokenizer(scratch: Path) -> BertTokenizerFast:
    """Words of a few syllables, and letters for the rest."""
    words = ["query", "the", "##ing", *string.ascii_lowercase, *(f"##{c}" for c in string.ascii_lowercase),
             *string.digits, *(f"##{c}" for c in string.digits), *string.punctuation]
    (scratch / "vocab.txt").write_text("\n".join([*SPECIAL.values(), *words]) + "\n")
    return BertTokenizerFast(vocab=str(scratch / "vocab.txt"))


def roberta_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes between <s> and </s>, whose padding is number 1 as RoBERTa's is."""
    vocab = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", cls_token="<s>", eos_token="</s>", sep_token="</s>",
                                   pad_token="<pad>", unk_token="<pad>")


def make_teacher(folder: Path, kind: str = "bert", layers: int = 2, width: int = 32, pooling: str | tuple = "mean",
                 prompt: str = "", positions: int = 64, more: tuple = (), **pooling_options) -> str:
    """A random teacher, saved by sentence-transformers; its words differ by more than BERT's initialisation makes them."""
    from sentence_transformers.models import Normalize, Pooling, Transformer
    scratch = folder.with_name(f"{folder.name}_parts")
    scratch.mkdir(parents=True)
    tokenizer = bert_tokenizer(scratch) if kind == "bert" else roberta_tokenizer()
    shapes = {"vocab_size": len(tokenizer), "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2,
              "intermediate_size": 48, "initializer_range": 0.1}
    torch.manual_seed(0)
    model = BertModel(BertConfig(**shapes, max_position_embeddings=positions)) if kind == "bert" else \
        RobertaModel(RobertaConfig(**shapes, max_position_embeddings=positions + 2, type_vocab_size=1, pad_token_id=1,
                                   bos_token_id=0, eos_token_id=2))
    model.save_pretrained(scratch), tokenizer.save_pretrained(scratch)
    modules = [Transformer(str(scratch)), Pooling(width, pooling_mode=pooling, **pooling_options), *more, Normalize()]
    SentenceTransformer(modules=modules, device="cpu", prompts={"task": prompt},
                        default_prompt_name="task" if prompt else None).save(str(folder))
    return str(folder)


def small(teacher: str, **changes) -> dict:
    return script.check_config(script.config | {"teacher_model": teacher, "d_model": 32, "num_heads": 2, "num_layers": 2,
                                                "threads": 1} | changes)


# ---- reading


@pytest.mark.parametrize("kind, options", [
    ("bert", {}), ("bert", {"pooling": "cls"}), ("bert", {"prompt": "query: "}), ("bert", {"pooling": "cls", "prompt": "query: "}),
    ("roberta", {}), ("roberta", {"pooling": "cls"})])
def test_a_teacher_embeds_as_in_sentence_transformers(kind, options, tmp_path):
    folder = make_teacher(tmp_path / "teacher", kind, **options)
    teacher, tokenizer, origin = script.load_teacher(small(folder))
    expected = SentenceTransformer(folder, device="cpu").encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(script.encode(teacher, tokenizer, TEXTS), expected, atol=1e-5)
    assert not teacher.training and (" cls " in origin) == ("pooling" in options) and ("'query: '" in origin) == ("prompt" in options)
    ids, mask = script.pad_batch(script.tokenise(tokenizer, TEXTS, None))
    trained_on = script.Trainer(script.build_student(small(folder), teacher), teacher, small(folder))
    micro = {"groups": [(ids, mask)], "restore": torch.arange(len(TEXTS))}
    trained_on.teach(micro)
    np.testing.assert_allclose(micro["target"], expected, atol=1e-5)
    assert all(x.shape == (*ids.shape, 32) for x in micro["states"][0])


def test_older_pooling_configs_and_none_are_read(tmp_path):
    folder = Path(make_teacher(tmp_path / "teacher"))
    config = folder / "1_Pooling" / "config.json"
    for flags, cls in (({"cls_token": True, "mean_tokens": False}, True), ({"cls_token": False, "mean_tokens": True}, False)):
        config.write_text(json.dumps({f"pooling_mode_{name}": on for name, on in flags.items()} | {"word_embedding_dimension": 32}))
        assert script.load_teacher(small(str(folder)))[0].cls == cls
    for name in script.READING_FILES:
        (folder / name).unlink()
    assert not script.load_teacher(small(str(folder)))[0].cls


@pytest.mark.parametrize("options", [{"pooling": "cls"}, {"prompt": "query: "}, {"pooling": "cls", "prompt": "query: "}])
def test_long_texts_are_read_by_windows_with_the_prompt_in_each(options, tmp_path):
    teacher, tokenizer, _ = script.load_teacher(small(make_teacher(tmp_path / "teacher", **options)))
    head, generator = 1 + len(teacher.prompt), torch.Generator().manual_seed(0)
    texts = [[2, *torch.randint(5, 60, (n,), generator=generator).tolist(), 3] for n in (20, 64 - head - 1, 90, 200)]
    ids, mask = script.pad_batch(texts)
    found = script.teacher_states(teacher, ids, mask)
    for i, text in enumerate(texts):
        inner, n = text[1:-1], len(text) - 2
        size = 64 - head - 1  # tokens of a text in a window
        starts = [0] if n <= size else [*range(0, n - size, size // 2), n - size]
        windows = [[text[0], *teacher.prompt, *inner[a:a + size], text[-1]] for a in starts]
        states = [teacher.model(torch.tensor([w]), output_hidden_states=True).hidden_states[-1][0] for w in windows]
        own = torch.stack([states[j][head + t - starts[j]] for t in range(n) for j in [min(
            (j for j, a in enumerate(starts) if a <= t < a + size), key=lambda j: abs(t - starts[j] - (size - 1) / 2))]])
        expected = torch.cat([states[0][:head], own, states[-1][-1:]])
        if teacher.cls:
            expected[0] = torch.stack([s[0] for s in states]).mean(0)
        torch.testing.assert_close(found[-1][i, :len(expected)], expected.detach(), atol=1e-5, rtol=1e-4)
    vectors = script.encode_tokens(teacher, texts)  # evaluation reads them the same way
    torch.testing.assert_close(vectors, teacher.pool(found[-1], mask), atol=1e-5, rtol=1e-4)


FAULTS = {"pooling": ({"pooling": "max"}, {}, "its pooling is max"), "poolings": ({"pooling": ("mean", "max")}, {}, "its pooling is mean[+]max"),
          "layers": ({"layers": 3}, {}, "num_layers a divisor"), "narrow": ({"width": 16}, {}, "d_model must be at most"),
          "prompt": ({"prompt": "quer"}, {}, "not made of whole tokens"),
          "left out": ({"prompt": "query: ", "include_prompt": False}, {}, "out of its pooling"),
          "dense": ({}, {"dense": True}, "has a module Dense"), "relu": ({}, {"config": {"hidden_act": "relu"}}, "not gelu"),
          "other": ({}, {"config": {"model_type": "mpnet"}}, "is a mpnet model"),
          "slow": ({}, {"slow": True}, "no fast tokenizer"), "modules": ({}, {"modules": "{"}, "cannot be loaded")}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_one_line(fault, tmp_path):
    from sentence_transformers.models import Dense
    options, change, message = FAULTS[fault]
    folder = Path(make_teacher(tmp_path / "teacher", more=(Dense(32, 32),) if change.get("dense") else (), **options))
    config = json.loads((folder / "config.json").read_text()) | change.get("config", {})
    (folder / "config.json").write_text(json.dumps(config))
    if change.get("slow"):
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.txt").write_text("\n".join([*SPECIAL.values(), *string.ascii_lowercase]) + "\n")
        (folder / "tokenizer_config.json").write_text(json.dumps({
            "tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "basic", "subword_tokenizer_type": "wordpiece"}))
    if "modules" in change:
        (folder / "modules.json").write_text(change["modules"])
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
    torch.testing.assert_close(student.deltanet_ffns[1].up(student.word_embeddings.weight[:9]), up(x), atol=1e-2, rtol=1e-3)
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


RUNS = {"deep, cls": ({"layers": 4, "pooling": "cls"}, ()), "wide, prompt": ({"width": 48, "prompt": "query: "}, ("--keep_projection", "true")),
        "wide, left out": ({"width": 48, "layers": 6, "pooling": "cls"}, ()), "roberta": ({"kind": "roberta"}, ("--learned_positions", "true"))}


@pytest.mark.parametrize("name", RUNS)
def test_whole_run_resume_and_saved_model(name, corpus, tmp_path):
    options, extra = RUNS[name]
    folder = make_teacher(tmp_path / "teacher", **options)
    command = ["--teacher_model", folder, "--data_dir", corpus, "--cache_dir", tmp_path / "cache", "--d_model", 32, "--num_heads", 2,
               "--num_layers", 2, "--batch_size", 8, "--gradient_accumulation_steps", 2, "--max_length", 16, "--threads", 1,
               "--total_steps", 4, "--warmup_steps", 1, "--save_interval", 2, "--log_interval", 2, "--peak_learning_rate", 1e-3, *extra]
    with contextlib.redirect_stdout(None):
        train(*command, "--output_dir", tmp_path / "whole")
    (tmp_path / "parts").mkdir()
    for file in ("checkpoint_2.pt", "checkpoint_2.json", "metrics.jsonl"):
        (tmp_path / "parts" / file).write_bytes((tmp_path / "whole" / file).read_bytes())
    train(*command, "--output_dir", tmp_path / "parts", "--resume", "latest")
    a, b = (torch.load(tmp_path / d / "checkpoint_4.pt", weights_only=True) for d in ("whole", "parts"))
    assert ("projection" in a["student"]) == ("width" in options)
    assert all(torch.equal(a["student"][k], b["student"][k]) for k in a["student"])
    start = script.trainable_state(script.build_student(a["config"], script.load_teacher(a["config"])[0]))
    assert all(not torch.equal(a["student"][k], start[k]) for k in ("projection", "ffn_norms.0.weight") if k in start)

    final = tmp_path / "whole" / "final_model"
    model, (teacher, tokenizer, _) = SentenceTransformer(str(final), trust_remote_code=True, device="cpu"), script.load_teacher(a["config"])
    student, cfg, _ = script.open_student(tmp_path / "whole" / "checkpoint_4.pt", teacher)
    own = script.encode(student, tokenizer, TEXTS, max_length=16, convert_to_tensor=True)
    vectors = torch.from_numpy(model.encode(TEXTS))
    kept = "--keep_projection" in extra
    torch.testing.assert_close(vectors, script.widening(student)(own) if kept else own, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(vectors @ vectors.T, own @ own.T, atol=1e-5, rtol=1e-4)
    assert "projection" not in torch.load(final / "pytorch_model.bin", weights_only=True)
    again, _, _ = script.open_student(final, teacher)
    if kept:
        torch.testing.assert_close(again.projection, load_file(final / "2_Dense" / "model.safetensors")["linear.weight"])
        torch.testing.assert_close(script.widening(again)(own), vectors, atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(script.encode(again, tokenizer, TEXTS, max_length=16), own, atol=1e-5)
