"""The training script: config, model, losses, data, gradient caching, resume, evaluation."""
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import forked
import train_6layer_deltanet as script
from forked import ROOT


def small_config(**changes):
    return script.check_config(script.config | {"threads": 1} | changes)


# ---- config


def test_specification_defaults():
    expected = dict(
        d_model=384, num_heads=12, num_layers=6, fast_decay_init=0.30, slow_decay_init=0.85, batch_size=256,
        gradient_accumulation_steps=4, max_length=128, total_steps=200000, warmup_steps=1000, peak_learning_rate=2e-5,
        weight_decay=0.1, gradient_clip=1.0, eval_interval=2000, save_interval=1000, log_interval=50,
        resume_from_step=0, contrastive_scale=20.0, label_smoothing=0.1, distillation_weight=1.0,
        layer_distill_weight=1.5, orthogonal_reg_weight=0.01, ortho_state_reg_weight=0.002, spearman_loss_weight=0.3,
        ranking_loss_weight=0.2, ranking_margin=0.05, state_dropout=0.10, dropout=0.15, seed=42,
        best_model_split="test", output_dir="deltanet_minilm_6layers_FIXED_FROM_SCRATCH")
    assert {key: script.config[key] for key in expected} == expected


def test_help_lists_every_key_with_its_comment(capsys):
    assert set(script.config_comments()) == set(script.config)
    with pytest.raises(SystemExit):
        script.parse_config(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{key} " in shown for key in script.config)


@pytest.mark.parametrize("argv, message", [
    (["--batchsize", "3"], "did you mean 'batch_size'"), (["--batch_size", "many"], "--batch_size: invalid int"),
    (["--bidirectional", "maybe"], "true or false"), (["--preset", "none"], "match_teacher"),
    (["--seed"], "--seed.* expected one argument"),
    (["--dropout", "nan"], "finite"), (["--precision", "fp8"], "bf16"), (["surplus"], "unknown argument .surplus")])
def test_bad_arguments_are_one_line(argv, message):
    with pytest.raises(script.UserError, match=message) as error:
        script.parse_config(argv)
    assert "\n" not in str(error.value)


def test_command_line_overrides_the_preset():
    cfg = script.parse_config(["--batch_size=8", "--preset", "match_teacher", "--bidirectional", "false",
                               "--resume", "latest"])
    assert (cfg["batch_size"], cfg["bidirectional"], cfg["resume_from_step"]) == (8, False, -1)
    assert cfg["projection_init"] == "teacher" and all(set(p) <= set(script.config) for p in script.PRESETS.values())


def test_import_starts_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train_6layer_deltanet"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
                            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)})
    assert not result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["deltanet"]  # the kernels' files


# ---- model


def test_size_and_no_attention():
    with torch.device("meta"):
        student = script.DeltaNetStudent(script.DeltaNetConfig())
    count = sum(p.numel() for p in student.parameters())
    assert abs(count - 22.7e6) <= 0.15e6, count
    names = [type(m).__name__.lower() for m in student.modules()]
    assert not any("attention" in name for name in names)
    parts = [name for name, _ in student.named_children()]
    assert parts[-4:] == ["deltanet_layers", "deltanet_norms", "deltanet_ffns", "ffn_norms"]


def test_initial_projections_are_orthogonal_and_retentions_at_their_start():
    torch.manual_seed(0)
    mixer = script.EnhancedHierarchicalDeltaNet(script.DeltaNetConfig())
    for weight in mixer.projections():
        torch.testing.assert_close(weight.T @ weight, torch.eye(384), atol=1e-5, rtol=0)
    start = torch.sigmoid(mixer.gate_proj.bias).view(5, 12)
    torch.testing.assert_close(start[1:3], torch.tensor([[0.30], [0.85]]).expand(2, 12))


def test_student_copies_the_teacher(teacher_and_tokenizer):
    teacher, _ = teacher_and_tokenizer
    student = script.build_student(small_config(), teacher)
    bert = teacher.model
    torch.testing.assert_close(student.word_embeddings.weight, bert.embeddings.word_embeddings.weight)
    torch.testing.assert_close(student.deltanet_ffns[3].up.weight, bert.encoder.layer[3].intermediate.dense.weight)
    trained = script.trainable_state(student)
    assert not any("embedding" in name for name in trained)
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training
    tensors = {id(p) for group in script.build_optimizer(student, small_config()).param_groups for p in group["params"]}
    assert tensors == {id(p) for p in student.parameters() if p.requires_grad}


def test_encode_sorts_and_restores_the_order(teacher_and_tokenizer):
    teacher, tokenizer = teacher_and_tokenizer
    student = script.build_student(small_config(), teacher)
    sentences = ["one two three", "", "a longer sentence than all of the others here", "short", "word " * 200]
    vectors = student.encode(sentences, tokenizer, batch_size=2, max_length=None)
    assert vectors.shape == (5, 384) and isinstance(vectors, np.ndarray) and student.training
    for sentence, vector in zip(sentences, vectors):
        alone = student.encode(sentence, tokenizer, max_length=None, convert_to_tensor=True)
        assert alone.shape == (384,) and np.abs(alone.numpy() - vector).max() < 1e-5
    assert student.encode([], tokenizer).shape == (0, 384)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_embeddings_do_not_depend_on_padding_or_batch_mates(teacher_and_tokenizer, bidirectional):
    teacher, tokenizer = teacher_and_tokenizer
    student = script.build_student(small_config(bidirectional=bidirectional), teacher).eval()
    with torch.no_grad():  # a student with working gates, not the zeros of initialisation
        for p in student.deltanet_layers.parameters():
            p.add_(0.02 * torch.randn_like(p))
    ids = tokenizer("A man is playing a large flute.")["input_ids"]
    others = tokenizer(["Short.", "The weather in the mountains was colder than anyone expected it to be in May."])
    others = others["input_ids"]
    results = []
    with torch.inference_mode():
        for length, mates in ((len(ids), []), (16, []), (128, []), (40, others)):
            table = torch.zeros(1 + len(mates), length, dtype=torch.long)
            mask = torch.zeros_like(table)
            for i, row in enumerate([ids, *mates]):
                table[i, :len(row)], mask[i, :len(row)] = torch.tensor(row), 1
            results.append(script.mean_pool(student(table, mask).last_hidden_state, mask)[0])
    for other in results[1:]:
        assert (other - results[0]).abs().max() < 1e-5


@pytest.fixture
def compilable():
    """A small student and teacher, batches, and a function that gives all their outputs and gradients."""
    from transformers import BertConfig, BertModel
    teacher = script.Teacher(BertModel(BertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64), add_pooling_layer=False))
    cfg = small_config(d_model=32, num_heads=4, num_layers=3, compile="true")
    student = script.build_student(cfg, teacher).train()
    sizes = (3, 9), (5, 24), (2, 100), (1, 9)
    batches = [(torch.randint(1000, 2000, size), torch.ones(size, dtype=torch.long)) for size in sizes]
    batches[1][1][:, 20:] = 0

    def step(ids, mask):
        student.zero_grad()
        torch.manual_seed(0)
        with torch.no_grad():
            first, _ = student.hidden_states(ids, mask)
        states, _ = student.hidden_states(ids, mask)
        sum((x * torch.randn_like(x)).sum() for x in states).backward()
        return [*first, *(x.detach() for x in states), *script.teacher_states(teacher, ids, mask),
                *(p.grad.clone() for p in student.parameters() if p.grad is not None)]

    yield student, teacher, cfg, batches, step
    torch._dynamo.reset()


def test_compiled_parts_give_the_same_with_few_graphs(compilable, monkeypatch):
    from torch._dynamo.testing import CompileCounter
    student, teacher, cfg, batches, step = compilable
    lines, counter, cpu = [], CompileCounter(), torch.device("cpu")
    with monkeypatch.context() as patch:  # a compiled FFN is PyTorch's own, which rounds otherwise than the kernel
        patch.setattr(script.FeedForward, "forward", lambda self, x: self.down(torch.nn.functional.gelu(self.up(x))))
        expected = [step(*batch) for batch in batches]
    assert not script.compile_models(student, teacher, cfg | {"compile": "auto"}, cpu, lines.append, counter)
    assert script.compile_models(student, teacher, cfg, cpu, lines.append, counter) and not lines
    counts = [counter.frame_count]
    for call in (lambda: student.hidden_states(*batches[0]), lambda: script.teacher_states(teacher, *batches[0])):
        call()
        counts.append(counter.frame_count)
    assert counts[0] == 2 and counts[2] == counts[1] <= 4  # the student, with and without gradients; the teacher
    for batch, values in zip(batches, expected):
        torch.testing.assert_close(step(*batch), values, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 16
    twin = script.copy.deepcopy(student)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert not twin.hidden_states(*batches[0])[0][-1].any()  # its own weights, not the original's


def test_a_teacher_that_has_not_run_yet_is_compiled(compilable):
    """Its first call takes a lock, which cannot be traced."""
    student, teacher, cfg, batches, _ = compilable
    assert script.compile_models(student, teacher, cfg, torch.device("cpu"), pytest.fail, "eager")
    found, teacher.compiled = script.teacher_states(teacher, *batches[1]), None
    for x, y in zip(found, script.teacher_states(teacher, *batches[1]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_every_use_of_a_compiled_student_has_its_graph(compilable):
    """A whole run's kinds of calls are more than PyTorch's default limit of 8, beyond which the next one fails."""
    from torch._dynamo.testing import CompileCounter
    student, teacher, cfg, batches, _ = compilable
    counter = CompileCounter()
    assert script.compile_models(student, teacher, cfg, torch.device("cpu"), pytest.fail, counter)
    for training in (False, True):
        student.train(training)
        for context in (torch.inference_mode, torch.no_grad, torch.enable_grad):
            for batch in (batches[0], batches[3]):
                for last_alone in (False, True):
                    with context():
                        student.hidden_states(*batch, last_alone=last_alone)
    assert counter.frame_count > 8


def test_in_training_one_graph_serves_batches_of_any_size(compilable, monkeypatch):
    """Without gradients long texts go through a layer some heads at a time: no question of training's."""
    from torch._dynamo.testing import CompileCounter
    student, teacher, cfg, _, _ = compilable
    counter = CompileCounter()
    monkeypatch.setattr(script, "PIECE", 200)  # the compiled models are checked on 72 tokens
    assert script.compile_models(student, teacher, cfg, torch.device("cpu"), pytest.fail, counter)
    student.train()
    counts = []
    for shape in ((2, 16), (3, 24), (12, 24)):
        states, _ = student.hidden_states(torch.randint(9, shape), torch.ones(shape, dtype=torch.int64))
        sum(x.sum() for x in states).backward()
        counts.append(counter.frame_count)
    assert counts[1] == counts[2]


def test_without_a_compiler_one_line_says_so(compilable, monkeypatch):
    student, teacher, cfg, batches, step = compilable
    from torch._inductor import config as inductor
    lines = []
    with inductor.patch({"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}):
        assert not script.compile_models(student, teacher, cfg, torch.device("cpu"), lines.append)
    assert len(lines) == 1 and "running without" in lines[0] and "\n" not in lines[0], lines
    off = lambda x: x if x is None or not x.is_floating_point() else x + 0.01  # noqa: E731
    wrong = lambda graph, inputs: lambda *a: [off(x) for x in graph(*a)]  # noqa: E731
    torch._dynamo.reset()
    assert not script.compile_models(student, teacher, cfg, torch.device("cpu"), lines.append, wrong)
    assert len(lines) == 2 and "off by" in lines[1]
    step(*batches[0])
    with pytest.raises(script.UserError, match="deterministic"):
        small_config(compile="true", deterministic=True)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler g++: torch.compile is not tested")
def test_inductor_gives_the_same(compilable):
    student, teacher, cfg, batches, _ = compilable

    def gradients():
        student.zero_grad()
        states, _ = student.hidden_states(*batches[1])
        weights = torch.linspace(-1, 1, states[0].numel()).sin().view_as(states[0])
        sum((x * weights).sum() for x in states).backward()
        return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}

    student.config.dropout = student.config.state_dropout = 0.0
    expected = gradients()
    assert script.compile_models(student, teacher, cfg, torch.device("cpu"), print)
    for name, grad in gradients().items():
        assert (grad - expected[name]).norm() < 1e-3 * expected[name].norm() + 1e-6, name


def test_tampered_or_missing_teacher_is_one_line(tmp_path):
    with pytest.raises(script.UserError, match="no such folder"):
        script.find_teacher(str(tmp_path / "none"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(script.UserError, match="cannot be loaded"):
        script.load_teacher(small_config(teacher_model=str(tmp_path)))
    code = ("import sys, train_6layer_deltanet as s; s.PACKAGED_SHA256 = '0' * 64\n"
            "try: s.find_teacher(s.config['teacher_model'])\nexcept s.UserError as e: print(e)")
    out = forked.run("-c", code=code).stdout
    assert "sha256 differs" in out


# ---- losses


def test_contrastive_loss_by_hand():
    a, p = torch.eye(3)[:2], torch.tensor([[0.6, 0.8, 0.0], [0.0, 1.0, 0.0]])
    n = torch.tensor([[0.0, 0.0, 1.0]])
    keys = torch.arange(5)
    logits = 20 * torch.tensor([[0.6, 0.0, 0.0], [0.8, 1.0, 0.0]])
    rows = F.cross_entropy(logits, torch.arange(2), label_smoothing=0.1)
    columns = F.cross_entropy(logits[:, :2].T, torch.arange(2), label_smoothing=0.1)
    torch.testing.assert_close(script.contrastive_loss(a, p, n, keys), (rows + columns) / 2)


def test_contrastive_loss_does_not_count_duplicates_as_negatives():
    a, p = torch.eye(3)[:2], torch.eye(3)[:2]
    keys = torch.tensor([0, 1, 2, 2])  # both positives are the same text
    loss = script.contrastive_loss(a, p, torch.zeros(0, 3), keys, label_smoothing=0.0)
    assert loss.item() == 0.0  # no candidate but the target is left


def test_distillation_losses_by_hand():
    s, t = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert script.embedding_distillation_loss(s, t).item() == 1.0
    states, target = [torch.ones(1, 3, 2)] * 2, [torch.zeros(1, 3, 2), 3 * torch.ones(1, 3, 2)]
    assert script.layer_distillation_loss(states, target, torch.tensor([[1, 1, 0]])).item() == 2.5
    states[0] = states[0].clone()
    states[0][0, 2] = 1e6  # padding
    assert script.layer_distillation_loss(states, target, torch.tensor([[1, 1, 0]])).item() == 2.5


def test_orthogonal_losses_by_hand():
    cfg = script.DeltaNetConfig(d_model=4, num_heads=2, num_layers=1, vocab_size=9, ffn_size=8)
    student = script.DeltaNetStudent(cfg)
    with torch.no_grad():
        student.deltanet_layers[0].o_proj.weight.copy_(2 * torch.eye(4))  # ||4 I - I||^2 = 36, others are orthogonal
    assert script.orthogonal_regularisation_loss(student).item() == pytest.approx(36 / 4, abs=1e-4)
    fast = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    slow = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert script.state_overlap(torch.stack([fast, slow])).item() == pytest.approx(0.5)
    assert script.state_overlap(torch.stack([fast, fast.flip(1)])).item() == 0.0


def test_spearman_loss_by_hand_and_its_gradient():
    teacher = torch.tensor([0.1, 0.2, 0.3, 0.9])
    assert script.spearman_loss(teacher, teacher, 1e-4).item() == pytest.approx(0, abs=1e-5)
    assert script.spearman_loss(-teacher, teacher, 1e-4).item() == pytest.approx(2, abs=1e-5)
    student = torch.tensor([0.1, 0.3, 0.2, 0.9])  # one swap: 1 - 6 * 2 / (4 * 15) = 0.8
    assert script.spearman_loss(student, teacher, 1e-4).item() == pytest.approx(0.2, abs=1e-5)
    from scipy.stats import spearmanr
    torch.manual_seed(0)
    student, teacher = torch.randn(40, requires_grad=True), torch.randn(40)
    before = spearmanr(student.detach(), teacher).statistic
    for _ in range(5):
        script.spearman_loss(student, teacher, 0.5).backward()
        with torch.no_grad():
            student -= 2.0 * student.grad
        student.grad = None
    assert spearmanr(student.detach(), teacher).statistic > before + 0.05


def test_ranking_loss_by_hand():
    teacher, student = torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0.60, 0.58, 0.50])
    # pairs (0,1): 0.05 - 0.02, (0,2): kept, (1,2): kept
    assert script.pairwise_ranking_loss(student, teacher, 0.05).item() == pytest.approx(0.03 / 3, abs=1e-6)


def test_spread_pairs_span_the_range():
    similarity = torch.cat([torch.zeros(1000), torch.linspace(0, 1, 24)]).view(32, 32)
    chosen = similarity.flatten()[script.spread_pairs(similarity, 16)]
    assert chosen.min() == 0 and chosen.max() == 1 and (chosen > 0.5).sum() >= 6


# ---- data


def write_rows(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("line", ["not json", '["one"]', '["a", 3]', '["a", null]', '{"a": "b"}', '["a", " "]',
                                  '["a","b","c","d"]'])
def test_broken_line_names_file_and_line(tmp_path, line):
    path = write_rows(tmp_path / "x.jsonl.gz", ['["a", "b"]', line])
    with pytest.raises(script.UserError, match=r"x\.jsonl\.gz, line 2"):
        list(script.read_pairs(path))


@pytest.fixture(scope="module")
def generated(corpus, teacher_and_tokenizer, tmp_path_factory):
    cfg = small_config(data_dir=str(corpus), sts_name="generated", batch_size=16,
                       cache_dir=str(tmp_path_factory.mktemp("cache")))
    return cfg, script.load_training_data(cfg, teacher_and_tokenizer[1])


def test_pairs_with_an_evaluation_text_are_dropped(corpus, teacher_and_tokenizer, tmp_path):
    shutil.copytree(corpus / "sts", tmp_path / "sts")
    leaked = script.load_sts(small_config(data_dir=str(corpus), sts_name="generated"), "test")[0][0]
    write_rows(tmp_path / "train" / "x.jsonl.gz", [json.dumps(["A clean text.", "Another one."]),
                                                   json.dumps(["A text.", leaked.upper().replace(" ", "  ") + "!!"])])
    cfg = small_config(data_dir=str(tmp_path), sts_name="generated", cache_dir=str(tmp_path / "cache"))
    data = script.load_training_data(cfg, teacher_and_tokenizer[1])
    assert (data.size, data.leaks) == (1, 1)


def test_changed_file_is_seen(corpus, teacher_and_tokenizer, tmp_path):
    shutil.copytree(corpus / "sts", tmp_path / "sts")
    cfg = small_config(data_dir=str(tmp_path), sts_name="generated", cache_dir=str(tmp_path / "cache"))
    for count in (1, 2):
        write_rows(tmp_path / "x.jsonl.gz", [json.dumps([f"Text {i}.", f"Another {i}."]) for i in range(count)])
        assert script.load_training_data(cfg, teacher_and_tokenizer[1]).size == count


def test_batch_is_a_function_of_seed_and_step(generated):
    cfg, data = generated
    tables = [t.with_format(None) for t in data.tables]
    again = script.PairData(list(zip(data.names, tables)), cfg)
    other = script.PairData(list(zip(data.names, tables)), cfg | {"seed": 1})
    first = [m.keys for m in data.batch(300)]
    data.batch(1)
    assert all(torch.equal(a, m.keys) for a, m in zip(first, again.batch(300)))
    assert not all(torch.equal(a, m.keys) for a, m in zip(first, other.batch(300)))


def test_every_pair_is_drawn_equally_often_and_padding_is_little(generated):
    cfg, data = generated
    counts, real, padded, lengths = {}, 0, 0, set(script.pad_lengths(cfg))
    for step in range(1, data.WINDOW + 1):
        micro_batches = data.batch(step)
        assert sum(m.pairs for m in micro_batches) == cfg["batch_size"]
        for m in micro_batches:
            for pair in zip(m.keys[:m.pairs].tolist(), m.keys[m.pairs:2 * m.pairs].tolist()):
                counts[pair] = counts.get(pair, 0) + 1
            for ids, mask in m.groups:
                real, padded = real + int(mask.sum()), padded + mask.numel()
                assert ids.shape[1] in lengths
    assert len(counts) == data.size and max(counts.values()) - min(counts.values()) <= 1
    assert 1 - real / padded < 0.15


def test_joined_texts_are_whole_neighbours_cut_at_a_length(generated):
    cfg, data = generated
    plain = data.build_window(3)[0]
    other = script.PairData(list(zip(data.names, data.tables)), cfg | {"joined_share": 0.25})
    joined = other.build_window(3)[0]
    sides = {side: [[text.tolist() for text in rows[side]] for rows in (plain, joined)]
             for side in ("anchor", "positive")}
    changed, lengths, free = 0, [], 0
    for i in range(len(plain["anchor_length"])):
        if all(alone[i] == together[i] for alone, together in sides.values()):
            continue
        changed, used = changed + 1, []
        assert i >= free  # no text is in two joined ones
        assert joined["negative_length"][i] == 0
        for alone, together in sides.values():
            text, whole, j = together[i], [], i
            while j < len(alone) and len(whole) < len(text) - 2:
                whole, j = whole + alone[j][1:-1], j + 1
            assert (text[0], text[-1]) == (alone[i][0], alone[i][-1]) and text[1:-1] == whole[:len(text) - 2]
            assert len(text) <= 512 and len(text) >= len(alone[i])
            used.append(j)
        assert used[0] == used[1]  # both sides of the same pairs
        free = used[0]
        lengths.append(max(len(together[i]) for _, together in sides.values()))
    share = changed / len(plain["anchor_length"])
    assert 0.04 < share <= 0.25 and max(lengths) > 300 and np.median(lengths) > 64
    assert (plain["key_anchor"] == joined["key_anchor"]).all()


def test_small_sources_are_drawn_in_every_window_or_refused():
    class Table(list):
        def with_format(self, _):
            return self
    sources = [(str(n), Table(range(n))) for n in (3000, 1, 2500)]
    data = script.PairData(sources, small_config(batch_size=2, gradient_accumulation_steps=1))
    drawn = np.array([data.drawn(w * data.WINDOW * 2) for w in range(200)])
    assert (np.diff(drawn, axis=0) >= 0).all() and (drawn.sum(1) == np.arange(200) * data.WINDOW * 2).all()
    many = [(str(n), Table(range(9))) for n in range(300)]
    with pytest.raises(script.UserError, match="too small"):
        script.PairData(many, small_config(batch_size=2, gradient_accumulation_steps=1))


def test_permutation_is_one():
    for size in (1, 2, 3, 100, 1000):
        assert sorted(script.permuted(np.arange(size), size, 5)) == list(range(size))


def test_missing_source_stops_the_run_unless_allowed(corpus, teacher_and_tokenizer, tmp_path):
    cfg = small_config(data_dir=str(corpus), sts_name="generated", sources="local,snli", cache_dir=str(tmp_path / "c"))
    with pytest.raises(script.UserError, match="snli.*cannot be loaded"):
        script.load_training_data(cfg, teacher_and_tokenizer[1])
    data = script.load_training_data(cfg | {"allow_missing_sources": True}, teacher_and_tokenizer[1])
    assert data.left_out == ["snli"]


def test_hub_rows_keep_only_the_same_meaning():
    rows = lambda *a: list(script.hub_rows(*a))  # noqa: E731
    assert rows("qqp", {"question1": "a", "question2": "b", "label": 0}) == []
    assert rows("qqp", {"question1": "a", "question2": "b", "label": 1}) == [("a", "b", None)]
    assert rows("snli", {"premise": "a", "hypothesis": "b", "label": 1}) == []
    passages = {"passage_text": ["x", "y"], "is_selected": [0, 1]}
    assert rows("msmarco", {"query": "q", "passages": passages}) == [("q", "y", "x")]


# ---- gradients, evaluation, resume


@pytest.mark.parametrize("packs", [True, False])
def test_cached_gradients_equal_one_backward_with_dropout(generated, teacher_and_tokenizer, packs):
    cfg, data = generated
    teacher, _ = teacher_and_tokenizer
    student = script.build_student(cfg, teacher).train()
    gradients = {}
    for cached in (True, False):
        student.zero_grad()
        trainer = script.Trainer(student, teacher, cfg)
        trainer.packs = packs
        losses = trainer.step_gradients(data.batch(1), 1, cached)
        values = {n: x.item() for n, x in losses.items()}
        gradients[cached] = ({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}, values)
    assert set(gradients[True][0]) == set(script.trainable_state(student))
    for name, expected in gradients[False][0].items():
        torch.testing.assert_close(gradients[True][0][name], expected, rtol=1e-4, atol=1e-6, msg=name)
    assert gradients[True][1] == pytest.approx(gradients[False][1], rel=1e-5)


@pytest.mark.parametrize("cached, most", [(True, 2048), (False, 2048), (True, 20), (False, 7)])  # 7: than most texts
def test_packed_gradients_equal_those_of_padded_texts(generated, teacher_and_tokenizer, cached, most, monkeypatch):
    cfg, data = generated
    pack = script.MicroBatch.pack
    monkeypatch.setattr(script.MicroBatch, "pack", lambda micro: pack(micro, most))
    teacher, _ = teacher_and_tokenizer
    student = script.build_student(cfg | {"dropout": 0.0, "state_dropout": 0.0}, teacher).train()
    trainer, found = script.Trainer(student, teacher, cfg), {}
    batch = data.batch(1)
    assert trainer.packs and sum(m.tokens for m in batch) < sum(m.padded for m in batch)
    for trainer.packs in (True, False):
        student.zero_grad()
        losses = {name: x.item() for name, x in trainer.step_gradients(batch, 1, cached).items()}
        found[trainer.packs] = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}, losses
    assert found[True][1] == pytest.approx(found[False][1], rel=1e-5) and {*script.LOSS_WEIGHTS} <= {*found[True][1]}
    for name, expected in found[False][0].items():
        torch.testing.assert_close(found[True][0][name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_teacher_scores_on_sts_b(data_dir, teacher_and_tokenizer):
    cfg = small_config(data_dir=str(data_dir), sts_name="stsb")
    scores = script.evaluate_sts(*teacher_and_tokenizer, script.load_sts(cfg, "test"))
    assert scores["spearman"] == pytest.approx(0.8203, abs=5e-5)


def test_constant_similarities_are_no_score(teacher_and_tokenizer):
    with pytest.raises(ValueError, match="no correlation"):
        script.evaluate_sts(*teacher_and_tokenizer, [("a", "b", 2.0), ("b", "c", 2.0), ("c", "a", 2.0)])


@pytest.mark.parametrize("change", ["row", "column", "score"])
def test_wrong_sts_file_is_named(corpus, tmp_path, change):
    lines = gzip.open(corpus / "sts" / "generated-dev.tsv.gz", "rt").read().splitlines()
    lines[9] = {"row": None, "column": "only one", "score": "a\tb\t5.5"}[change]
    write_rows(tmp_path / "sts" / "stsb-dev.tsv.gz", [line for line in lines if line is not None])
    with pytest.raises(script.UserError, match="1499 pairs" if change == "row" else "line 10"):
        script.load_sts(small_config(data_dir=str(tmp_path), sts_name="stsb"), "dev")


def test_learning_rate_is_linear_and_ends_at_zero():
    cfg = small_config(total_steps=100, warmup_steps=10, peak_learning_rate=1.0)
    assert [script.learning_rate(s, cfg) for s in (5, 10, 55, 100)] == [0.5, 1.0, 0.5, 0.0]


def tiny_command(corpus, tiny_teacher, output: Path, *extra: str) -> list[Any]:
    """The real command line with tiny settings."""
    return [ROOT / "train_6layer_deltanet.py", "--teacher_model", tiny_teacher, "--data_dir", corpus, "--d_model", "32",
            "--num_heads", "2", "--num_layers", "2", "--batch_size", "8", "--threads", "1",
            "--gradient_accumulation_steps", "2", "--total_steps", "12", "--warmup_steps", "3", "--log_interval", "4",
            "--eval_interval", "6", "--save_interval", "3", "--peak_learning_rate", "1e-3", "--cache_dir",
            output.parent / "cache", "--output_dir", output, *extra]


def tiny_run(corpus, tiny_teacher, output: Path, *extra: str) -> forked.Done:
    return forked.run(*tiny_command(corpus, tiny_teacher, output, *extra), cwd=output.parent)


def test_whole_run_and_resume_are_bit_identical(corpus, tiny_teacher, tmp_path):
    whole = tiny_run(corpus, tiny_teacher, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    for name in ("pytorch_model.bin", "config.json", "final_model/pytorch_model.bin", "metrics.jsonl",
                 "training_curves.png", "run.json", "results.json", "checkpoint_3.pt", "checkpoint_3.json",
                 "tokenizer.json"):
        assert (tmp_path / "whole" / name).stat().st_size > 0, name
    assert "negatives per anchor: 7" in whole.stdout and "teacher: local folder" in whole.stdout

    (tmp_path / "parts").mkdir()
    for name in ("checkpoint_3.pt", "checkpoint_3.json", "metrics.jsonl"):
        (tmp_path / "parts" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    resumed = tiny_run(corpus, tiny_teacher, tmp_path / "parts", "--resume_from_step", "3")
    assert resumed.returncode == 0, resumed.stderr
    a, b = (torch.load(tmp_path / d / "checkpoint_12.pt", weights_only=True) for d in ("whole", "parts"))
    assert all(torch.equal(a["student"][k], b["student"][k]) for k in a["student"])
    states = [c["optimizer"]["state"] for c in (a, b)]
    entries = [(i, k) for i in states[0] for k in ("step", "exp_avg", "exp_avg_sq")]
    assert all(torch.equal(states[0][i][k], states[1][i][k]) for i, k in entries)
    assert a["best"] == b["best"]
    lines = [[{k: v for k, v in json.loads(line).items() if not k.startswith("speed/")} for line in
              (tmp_path / d / "metrics.jsonl").read_text().splitlines()] for d in ("whole", "parts")]
    assert lines[0] == lines[1]
    assert {"loss/total", "loss/contrastive", "loss/spearman", "lr", "grad_norm"} <= set(lines[0][1])

    missing = tiny_run(corpus, tiny_teacher, tmp_path / "whole", "--resume_from_step", "5")
    assert missing.returncode == 2 and "[3, 6, 9, 12]" in missing.stderr and "Traceback" not in missing.stderr
    other = tiny_run(corpus, tiny_teacher, tmp_path / "whole", "--resume_from_step", "6", "--dropout", "0.5")
    assert other.returncode == 2 and "dropout" in other.stderr
    again = tiny_run(corpus, tiny_teacher, tmp_path / "whole")
    assert again.returncode == 2 and "--resume latest" in again.stderr


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler g++: torch.compile is not tested")
def test_a_whole_run_is_compiled(corpus, tiny_teacher, tmp_path):
    """As a default run on one GPU is; the first micro-batches and the evaluation come after the compiled check."""
    command = tiny_command(corpus, tiny_teacher, tmp_path / "run", "--compile", "true")
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "compile: student and teacher" in done.stdout, done.stderr
    assert (tmp_path / "run" / "checkpoint_12.pt").is_file()


@pytest.mark.slow
def test_two_threads_in_processes_of_their_own_resume_bit_identically(corpus, tiny_teacher, tmp_path):
    """Not forked: OpenMP's threads, which the kernel shares with PyTorch, are there."""
    for name, extra in (("whole", ()), ("parts", ("--resume_from_step", "3"))):
        if extra:
            (tmp_path / name).mkdir()
            for file in ("checkpoint_3.pt", "checkpoint_3.json", "metrics.jsonl"):
                (tmp_path / name / file).write_bytes((tmp_path / "whole" / file).read_bytes())
        command = tiny_command(corpus, tiny_teacher, tmp_path / name, "--threads", "2", *extra)
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    a, b = (torch.load(tmp_path / d / "checkpoint_12.pt", weights_only=True)["student"] for d in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_bf16_autocast_trains_and_keeps_the_core_in_float32(corpus, tiny_teacher, tmp_path):
    run = tiny_run(corpus, tiny_teacher, tmp_path / "bf16", "--precision", "bf16", "--total_steps", "2",
                   "--warmup_steps", "0")
    assert run.returncode == 0, run.stderr
    last = json.loads((tmp_path / "bf16" / "checkpoint_2.json").read_text())
    assert last["step"] == 2 and all(np.isfinite(v) for v in last["losses"].values())
    mixer = script.EnhancedHierarchicalDeltaNet(script.DeltaNetConfig(d_model=32, num_heads=2)).eval()
    seen, x, mask = [], torch.randn(2, 5, 32), torch.ones(2, 5)
    chunked = script.kernel.chunk_hierarchical_delta_rule
    mixer.mixer = lambda *inputs, **kw: script.kernel.parallel_mixer(
        *inputs, **kw, delta_rule=lambda *a, **k: seen.extend(a) or chunked(*a, **k))
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = mixer(x, mask)
        mixer.mixer = None
        kernel, _ = mixer(x, mask)
    assert out.dtype == kernel.dtype == torch.bfloat16 and {x.dtype for x in seen} == {torch.float32}
    torch.testing.assert_close(kernel, out, rtol=0.02, atol=1e-3)


def tiny_trainer(generated, tiny_teacher, **changes):
    """A trainer of two small layers with dropout, and the generated corpus's first batch in three micro-batches."""
    cfg = small_config(teacher_model=tiny_teacher, d_model=32, num_heads=2, num_layers=2, gradient_accumulation_steps=3,
                       batch_size=12, **changes)
    teacher, _, _ = script.load_teacher(cfg)
    data = script.PairData(list(zip(generated[1].names, [t.with_format(None) for t in generated[1].tables])), cfg)
    student = script.build_student(cfg, teacher).train()
    return script.Trainer(student, teacher, cfg), data


def test_a_batch_in_one_go_or_in_fewer_groups_has_the_same_gradients(generated, tiny_teacher):
    """What `measure_memory` sets on a GPU: a batch that fits is one micro-batch, a group must spare enough tokens."""
    lengths = ",".join(map(str, range(4, 128)))  # texts of the corpus differ by a few tokens
    trainer, data = tiny_trainer(generated, tiny_teacher, dropout=0.0, state_dropout=0.0, pad_lengths=lengths)
    trainer.packs = False
    expected, parts = gradients(trainer, data), data.batch(1)
    tokens = sum(len(m.restore) for m in parts) * max(ids.shape[1] for m in parts for ids, _ in m.groups)
    limits = (tokens - 1, 0, 3), (tokens, 0, 1), (0, 10 ** 6, 3), (tokens, 10 ** 6, 1)
    for data.at_once, data.group_tokens, micro_batches in limits:
        batch = data.batch(1)
        assert len(batch) == micro_batches and sum(m.pairs for m in batch) == 12
        assert {len(m.groups) for m in batch} == {1} if data.group_tokens else max(len(m.groups) for m in batch) > 1
        keys = [sorted(torch.cat([m.keys for m in x]).tolist()) for x in (batch, parts)]
        assert keys[0] == keys[1]
        for name, gradient in gradients(trainer, data).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert script.tokens_at_once(used=100, tokens=10, free=1000) == 90


def gradients(trainer, data) -> dict[str, torch.Tensor]:
    trainer.student.zero_grad(set_to_none=True)
    trainer.step_gradients(data.batch(1), 1)
    return {name: p.grad.clone() for name, p in trainer.student.named_parameters() if p.grad is not None}
