"""Long documents: the teacher's windows, batches by tokens, training on them, and encoding in bounded memory."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import forked
import train_6layer_deltanet as script
from forked import ROOT


@pytest.fixture(scope="module")
def cfg(documents, tiny_teacher, tmp_path_factory) -> dict:
    """A run of two small layers, half of whose steps are of long documents."""
    return script.check_config(script.config | {
        "data_dir": str(documents), "cache_dir": str(tmp_path_factory.mktemp("cache")), "sts_name": "generated",
        "teacher_model": str(tiny_teacher), "d_model": 32, "num_heads": 2, "num_layers": 2, "batch_size": 4,
        "threads": 1, "gradient_accumulation_steps": 2, "long_share": 0.5, "long_length": 700, "long_tokens": 1500})


@pytest.fixture(scope="module")
def models(cfg) -> tuple:
    teacher, tokenizer, _ = script.load_teacher(cfg)
    return script.build_student(cfg, teacher), teacher, tokenizer


@pytest.fixture(scope="module")
def data(cfg, models) -> script.PairData:
    return script.load_training_data(cfg, models[2], lambda line: None)


# ---- target


@pytest.mark.parametrize("length", [2, 256, 512, 513, 514, 639, 640, 1000, 8192])
def test_windows_overlap_by_half_and_a_token_is_read_where_it_stands_most_centrally(length):
    positions, place = script.window_table(length)
    assert (positions.flatten()[place] == np.arange(length)).all()
    if length <= 512:
        assert positions.shape == (1, length)
        return
    assert positions.shape[1] == 256 and (positions[:, 0] == 0).all() and (positions[:, -1] == length - 1).all()
    starts = positions[:, 1]
    assert (np.diff(starts)[:-1] == 127).all() and 0 < starts[-1] - starts[-2] <= 127
    assert starts[0] == 1 and positions[-1, -2] == length - 2
    distance = np.abs(np.arange(1, length - 1)[:, None] - (starts + 126.5))
    assert (np.take_along_axis(distance, place[1:-1, None] // 256, 1)[:, 0] == distance.min(1)).all()
    assert place[0] == 0 and place[-1] == positions.size - 1


def test_teacher_states_of_a_batch_are_those_of_each_text_window_by_window(models):
    _, teacher, _ = models
    generator = torch.Generator().manual_seed(0)
    random = lambda n: torch.randint(1000, 30000, (n,), generator=generator).tolist()  # noqa: E731
    texts = [[101, *random(n - 2), 102] for n in (40, 300, 600, 1000)]
    ids, mask = script.pad_batch(texts)
    found = script.teacher_states(teacher, ids, mask)
    assert len(found) == 2 and found[0].shape == (4, 1000, 32)
    for i, text in enumerate(texts):
        expected = torch.zeros(2, len(text), 32)
        best = np.full(len(text), np.inf)
        n = len(text)
        starts = [None] if n <= 512 else [*range(1, n - 255, 127), n - 255]
        for start in starts:
            window = text if start is None else [101, *text[start:start + 254], 102]
            states = teacher.model(torch.tensor([window]), output_hidden_states=True).hidden_states[1:]
            for at in range(len(window)):
                token = at if start is None else {0: 0, 255: n - 1}.get(at, start + at - 1)
                if start is not None and at in (0, 255):  # [CLS] of the first window, [SEP] of the last
                    distance = 0 if start == {0: 1, 255: n - 255}[at] else np.inf
                else:
                    distance = 0 if start is None else abs(at - 127.5)
                if distance < best[token]:
                    best[token] = distance
                    expected[:, token] = torch.stack([s[0, at] for s in states])
        for layer in range(2):
            torch.testing.assert_close(found[layer][i, :n], expected[layer], atol=1e-5, rtol=1e-4)
            assert not found[layer][i, n:].any()


# ---- batches


def rows_of(micro: script.MicroBatch) -> list[list[int]]:
    """The texts of a micro-batch in the order of its keys."""
    texts = [ids[mask.bool()].tolist() for batch in micro.groups for ids, mask in zip(*batch)]
    return [texts[i] for i in micro.restore]


def test_long_batches(cfg, models, data):
    documents, seen = data.documents, []
    epoch = documents.epoch_end(0)
    for number in range(1, epoch + 1):
        batch = documents.batch(number)
        assert len(batch) == 2 and all(micro.long and micro.pairs for micro in batch)
        texts = [(micro, rows_of(micro)) for micro in batch]
        sides = [(a, d, int(key)) for micro, rows in texts
                 for a, d, key in zip(rows, rows[micro.pairs:], micro.keys)]
        tokens = sum(len(d) for _, d, _ in sides)
        assert tokens <= 1500 or len(sides) == 2
        assert all(3 <= len(a) <= 60 and len(d) <= 700 for a, d, _ in sides)
        assert all(text[0] == 101 and text[-1] == 102 for pair in sides for text in pair[:2])
        assert all(d[1:len(a) - 1] == a[1:-1] for a, d, _ in sides)  # its query is its first sentence
        for micro, rows in texts:
            padded = sum(mask.numel() for _, mask in micro.groups)
            assert padded <= sum(-(-max(len(r) * 9 // 8, len(r) + 16) // 8) * 8 for r in rows)
        parts = [sum(map(len, rows[micro.pairs:])) for micro, rows in texts]
        assert max(parts) <= tokens / 2 + 700
        seen += [key for _, _, key in sides]
    aside = {int(key) for table in documents.tables for keys in [table.with_format(None).data["key_anchor"].to_numpy()]
             for key in keys[script.kept_aside(keys)]}
    assert len(aside) == 50 and not aside & set(seen)
    assert len(seen) == len(set(seen)) and len(seen) >= 100 - 2  # all of them, but for less than a batch of each source
    again = script.load_training_data(cfg, models[2], lambda line: None).documents
    for number in (epoch + 3, 2, epoch):  # of the next epoch first
        for a, b in zip(documents.batch(number), again.batch(number), strict=True):
            assert torch.equal(a.keys, b.keys) and rows_of(a) == rows_of(b)
    keys = [torch.cat([m.keys for m in documents.batch(number)]).tolist() for number in (1, epoch + 1)]
    assert keys[0] != keys[1]


@pytest.mark.parametrize("share, expected", [(0.0, []), (0.25, [4, 8, 12]), (1.0, list(range(1, 13)))])
def test_share_of_long_steps(cfg, data, share, expected):
    data = script.PairData([("pairs", table) for table in data.tables], cfg | {"long_share": share})
    data.documents = type("Documents", (), {"batch": lambda self, number, at_once: [number]})()
    found = {step: batch[0] for step in range(1, 13) if isinstance((batch := data.batch(step))[0], int)}
    assert list(found) == expected and list(found.values()) == list(range(1, len(expected) + 1))


def test_documents_that_are_missing_or_too_few_are_one_line(cfg, models, corpus, documents, tmp_path):
    with pytest.raises(script.UserError, match="no .*long"):
        script.load_training_data(cfg | {"data_dir": str(corpus)}, models[2], lambda line: None)
    with pytest.raises(script.UserError, match="first.jsonl.gz: has 50 documents .* 60"):
        script.load_training_data(cfg | {"gradient_accumulation_steps": 60}, models[2], lambda line: None)


# ---- training


@pytest.mark.parametrize("piece, packs", [(16384, True), (64, True), (64, False)])
def test_cached_gradients_of_a_long_batch_equal_one_backward_with_dropout(cfg, models, data, piece, packs, monkeypatch):
    monkeypatch.setattr(script, "PIECE", piece)  # without gradients, too, dropout must not be drawn piece by piece
    student, teacher, _ = models
    student.train()
    batch, found = lambda: data.documents.batch(2), {}
    for cached in (True, False):
        student.zero_grad()
        trainer = script.Trainer(student, teacher, cfg)
        trainer.packs = packs
        losses = trainer.step_gradients(batch(), 2, cached)
        values = {n: x.item() for n, x in losses.items()}
        found[cached] = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}, values
    assert found[True][1] == pytest.approx(found[False][1], rel=1e-5) and found[True][1]["contrastive"] > 0
    assert set(found[True][0]) == set(script.trainable_state(student))
    for name, expected in found[False][0].items():
        torch.testing.assert_close(found[True][0][name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_long_weight_is_of_long_steps_alone(cfg, models, data):
    student, teacher, _ = models
    student.eval()
    values = []
    for short, long in ((1.0, 0.0), (0.0, 1.0)):
        trainer = script.Trainer(student, teacher, cfg | {"contrastive_weight": short, "long_contrastive_weight": long})
        values += [trainer.step_gradients(batch, 1) for batch in (data.batch(1), data.documents.batch(1))]
    assert ["contrastive" in v for v in values] == [True, False, False, True]


def test_run_with_documents_and_resumed(cfg, tmp_path):
    """The whole command line; resumed it ends with the same weights and metrics, and its folder reads long texts."""
    def run(output: Path, *more: str) -> str:
        chosen = cfg | {"total_steps": 10, "warmup_steps": 2, "save_interval": 5, "eval_interval": 10,
                        "log_interval": 5, "output_dir": str(output)}
        words = [w for key, value in chosen.items() if value != script.config[key] for w in (f"--{key}", str(value))]
        done = forked.run(ROOT / "train_6layer_deltanet.py", *words, *more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    whole, part = tmp_path / "whole", tmp_path / "part"
    assert "50 documents are kept aside" in run(whole)
    part.mkdir()
    for name in ("checkpoint_5.pt", "checkpoint_5.json", "metrics.jsonl"):
        (part / name).write_bytes((whole / name).read_bytes())
    run(part, "--resume_from_step", "5")
    ends = [script.load_file(folder / "checkpoint_10.pt") for folder in (whole, part)]
    assert all(torch.equal(ends[0]["student"][k], ends[1]["student"][k]) for k in ends[0]["student"])
    assert "long/first" in ends[0]["progress"]["data"]
    lines = [[{k: v for k, v in json.loads(line).items() if not k.startswith("speed/")}
              for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (whole, part)]
    assert lines[0] == lines[1]
    logged = [line for line in lines[0] if "lr" in line]
    names = {"loss/total", "long/total", "long/contrastive", "long/layer_distill", "long/padding"}
    assert len(logged) == 2 and all(names <= set(line) for line in logged)
    assert json.loads((whole / "final_model" / "sentence_bert_config.json").read_text())["max_seq_length"] == 700


# ---- options of the model


def test_slow_retentions_spread_over_the_heads_of_each_direction(cfg):
    config = script.DeltaNetConfig(slow_decay_max=0.999)
    found = script.slow_retentions(config)
    assert found.shape == (12,) and torch.equal(found[:6], found[6:])
    span = 1 / (1 - found[:6].double())
    torch.testing.assert_close(span[[0, -1]], torch.tensor([1 / 0.15, 1000.0]).double(), rtol=1e-3, atol=0)
    torch.testing.assert_close(span[1:] / span[:-1], (span[-1] / span[0]).pow(1 / 5).expand(5), rtol=1e-3, atol=0)
    bias = script.EnhancedHierarchicalDeltaNet(config).gate_proj.bias
    torch.testing.assert_close(torch.sigmoid(bias[24:36]), found)
    assert (script.slow_retentions(script.DeltaNetConfig()) == 0.85).all()
    with pytest.raises(script.UserError, match="slow_decay_max"):
        script.check_config(cfg | {"slow_decay_max": 0.5})


def test_a_plain_student_starts_one_with_the_options_and_its_length_is_kept(cfg, models, tmp_path, capsys):
    plain, teacher, tokenizer = models
    script.save_model(tmp_path / "plain", plain, tokenizer, cfg, {})
    options = cfg | {"slow_decay_max": 0.99, "long_share": 0.0, "init_student": str(tmp_path / "plain")}
    student = script.build_student(options, teacher)
    init = script.init_student(student, options, teacher)
    assert re.search("slow_decay_max 0.0, this run has 0.99: its retentions move", capsys.readouterr().out)
    before, after = plain.deltanet_layers[1].gate_proj.bias.detach(), student.deltanet_layers[1].gate_proj.bias.detach()
    torch.testing.assert_close(torch.sigmoid(after[4:6]), torch.full((2,), 0.85))  # a direction's only head
    assert torch.equal(before[:4], after[:4])
    script.save_model(tmp_path / "later", student, tokenizer, options, {"init": init})
    assert json.loads((tmp_path / "later" / "config.json").read_text())["max_seq_length"] == 700
    with pytest.raises(script.UserError, match="read_gates"):
        script.init_student(plain, cfg | {"read_gates": False, "init_student": str(tmp_path / "later")}, teacher)


# ---- encoding


def test_a_large_batch_is_read_a_few_texts_at_a_time(models, monkeypatch):
    student = models[0].eval()
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(1000, 30000, (n,), generator=generator).tolist() for n in (90, 5, 70, 100, 33)]
    ids, mask = script.pad_batch([*texts, [0] * 40])
    mask[5] = 0  # a row of padding alone
    with torch.inference_mode():
        expected = student(ids, mask).last_hidden_state
        monkeypatch.setattr(script, "PIECE", 60)  # one text of 104 tokens, half of the heads
        found, seen, embed = student(ids, mask).last_hidden_state, [], student.word_embeddings.forward
        monkeypatch.setattr(student.word_embeddings, "forward", lambda x: seen.append(x.numel()) or embed(x))
        student(ids, mask)
    assert max(seen) <= 104 and len(seen) == 6
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-4)


def test_memory_of_one_long_document():
    """100,000 words, about 130,000 tokens, are to take under 1 GB above the model: here 40,000 tokens, one layer."""
    code = """if True:
        import torch, train_6layer_deltanet as script
        from common import growth
        torch.set_num_threads(1)
        student = script.DeltaNetStudent(script.DeltaNetConfig(num_layers=1)).eval()
        read = lambda n: script.encode_tokens(student, [[101, *range(1000, 21000), *range(1000, 21000)][:n]])
        read(4000)
        print(growth(lambda: read(40_000), torch.device("cpu")))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300, env={
        **os.environ, "PYTHONPATH": str(ROOT / "bench"), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1"})
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() == "None":
        pytest.skip("this system does not tell a process's peak memory from now on")
    assert 40_000 * 384 * 4 < int(done.stdout) < 1e9 * 40_000 / 130_000
