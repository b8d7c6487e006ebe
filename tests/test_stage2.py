"""The later stages: guided contrastive loss, batches of one source, drawn by distance, held-out texts, averages."""
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

import forked  # the benches are found from here on
import generalise
import kill_soak
import save_best_checkpoint
import train_6layer_deltanet as script


def units(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def naive_guided(sides, keys, guide, scale, smoothing):
    """`contrastive_loss` as the sentence of its docstring says it, a query at a time."""
    n, total = len(sides[0]), 0.0
    flat = [(side, i) for side in range(3) for i in range(len(sides[side]))]
    key = {where: int(k) for where, k in zip(flat, keys)}
    cosine = lambda of, x, y: (of[x[0]][x[1]] @ of[y[0]][y[1]]).item()  # noqa: E731
    for side, other, kinds in ((0, 1, (0, 1, 2)), (1, 0, (0, 1))):
        for i in range(n):
            query, answer = (side, i), (other, i)
            left = [c for c in flat if c[0] in kinds and c != answer and key[c] not in (key[query], key[answer])
                    and not cosine(guide, query, c) > cosine(guide, query, answer)]
            scores = torch.tensor([scale * cosine(sides, query, c) for c in [answer, *left]])
            total += F.cross_entropy(scores[None], torch.tensor([0]), label_smoothing=smoothing).item()
    return total / (2 * n)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_guided_loss_equals_a_naive_loop(smoothing):
    sides, guide = ([units(6, 5, seed=s), units(6, 5, seed=s + 1), units(2, 5, seed=s + 2)] for s in (0, 10))
    # Positive 5 is anchor 2, negative 1 is positive 0.
    keys = torch.tensor([0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 2, 20, 10])
    found = script.contrastive_loss(*sides, keys, 20.0, smoothing, tuple(guide))
    assert found.item() == pytest.approx(naive_guided(sides, keys, guide, 20.0, smoothing), rel=1e-5)
    assert abs(found - script.contrastive_loss(*sides, keys, 20.0, smoothing)) > 0.01


def test_planted_false_negative_is_left_out_and_gradients_are_right():
    a, p, n = units(4, 8), units(4, 8, seed=1), units(0, 8)
    teacher = [x.clone() for x in (a, p, n)]
    teacher[0], teacher[1] = F.normalize(p + 0.5 * a, dim=-1), p.clone()
    teacher[1][2] = teacher[0][0]  # the teacher places positive 2 on anchor 0, nearer than anchor 0's own
    keys = torch.arange(8)
    # alone, only positive 2 moves: whatever its cosine with anchor 0, anchor 0's softmax must not see it
    for x in (a, p):
        x.requires_grad_()
    loss = lambda a, p, guide: script.contrastive_loss(a, p, n, keys, 20.0, 0.0, guide)  # noqa: E731
    torch.autograd.gradcheck(lambda a, p: loss(a, p, tuple(teacher)), (a, p))

    def pull(guide):
        """Derivative of the loss when positive 2 alone moves in anchor 0's direction, by anchor 0's softmax alone."""
        p2 = p.detach().clone().requires_grad_()
        first = script.contrastive_loss(a.detach(), p2, n, keys, 20.0, 0.0, guide)
        others = a.detach().clone()
        others[0] = 0.0  # anchor 0 asks nothing: what is left is what the other queries say
        return torch.autograd.grad(first, p2)[0][2] - torch.autograd.grad(
            script.contrastive_loss(others, p2, n, keys, 20.0, 0.0, guide), p2)[0][2]

    student_guide = (a.detach(), p.detach(), n)  # nothing planted
    expected = loss(a, p, tuple(teacher)).item()
    assert naive_guided([a, p, n], keys, teacher, 20.0, 0.0) == pytest.approx(expected, rel=1e-5)
    assert pull(tuple(teacher)) @ a[0].detach() < 0.5 * (pull(student_guide) @ a[0].detach()).abs()


def test_unguided_loss_is_what_it_was():
    """The loss before there was a guide, in its own words."""
    a, p, n = units(5, 7), units(5, 7, seed=1), units(3, 7, seed=2)
    keys = torch.tensor([0, 1, 2, 3, 4, 5, 6, 1, 8, 9, 5, 11, 12])
    own, (key_a, key_p, key_n) = torch.eye(5, dtype=torch.bool), keys.split([5, 5, 3])

    def direction(queries, candidates, candidate_keys):
        same = (candidate_keys == key_a[:, None]) | (candidate_keys == key_p[:, None])
        target = F.pad(own, (0, len(candidates) - 5))
        valid = target | ~same
        log_p = (20.0 * queries @ candidates.T).masked_fill(~valid, -torch.inf).log_softmax(1)
        spread = log_p.masked_fill(~valid, 0).sum(1) / valid.sum(1)
        return -((1 - 0.1) * log_p[target] + 0.1 * spread).mean()

    before = 0.5 * (direction(a, torch.cat([p, n]), torch.cat([key_p, key_n])) + direction(p, a, key_a))
    assert torch.equal(script.contrastive_loss(a, p, n, keys), before)


# ---- data


class Rows(list):
    """A source of N rows whose tokens nobody asks for: of the i-th anchor there are i % 7, of the positive i % 5."""

    def with_format(self, _):
        return self

    @property
    def data(self):
        return {side: pa.array([[0] * (i % n) for i in self]) for side, n in (("anchor", 7), ("positive", 5))}


def plan_only(sizes, **changes):
    cfg = script.check_config(script.config | {"batch_size": 4, "gradient_accumulation_steps": 1} | changes)
    return script.PairData([(str(i), Rows(range(n))) for i, n in enumerate(sizes)], cfg)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, few_sts_rows):
    """A tiny teacher and three sources: about 170 pairs, 40 pairs, 3 pairs."""
    cfg = kill_soak.make_tiny(tmp_path_factory.mktemp("tiny"))
    rng = random.Random(5)
    for name, count in (("other", 40), ("small", 3)):
        rows = [json.dumps([f"{kill_soak.sentence(rng, longest)} {name} {i}" for longest in (6, 9)])
                for i in range(count)]
        kill_soak.write_lines(Path(cfg["data_dir"]) / "train" / f"{name}.jsonl.gz", rows)
    return cfg


def load(cfg, **changes):
    cfg = script.check_config(script.config | cfg | changes)
    return script.load_training_data(cfg, script.load_teacher(cfg)[1], log=lambda _: None)


def test_batches_of_one_source(tiny, monkeypatch):
    monkeypatch.setattr(script.PairData, "WINDOW", 32)
    data, again = (load(tiny, one_source_batches=True, source_alpha=0.5) for _ in range(2))
    owner, seen = {}, {name: 0 for name in data.names}
    for i, table in enumerate(data.tables):
        owner |= {(a, p): i for a, p in zip(*(table[:][f"key_{s}"].to_pylist() for s in ("anchor", "positive")))}
    for step in range(1, 6 * data.WINDOW + 1):
        batch = data.batch(step)
        pairs = [(a, p) for m in batch for a, p in zip(m.keys[:m.pairs].tolist(), m.keys[m.pairs:].tolist())]
        sources = {owner[pair] for pair in pairs}
        assert len(pairs) == 4 and len(sources) == 1 and {int(x) for m in batch for x in m.strata} == sources
        name = data.names[sources.pop()]
        seen[name] += 1
        assert len(set(pairs)) == (3 if name == "small" else 4)  # twice only where there are fewer than a batch's
    shares = np.sqrt([len(table) for table in data.tables])
    expected = dict(zip(data.names, shares / shares.sum()))
    assert all(abs(seen[name] / (6 * data.WINDOW) - share) < 0.04 for name, share in expected.items()), seen
    last = data.batch(150)
    assert [m.keys.tolist() for m in last] == [m.keys.tolist() for m in again.batch(150)]  # asked first of a new object


def test_windows_are_split_exactly_in_the_mean():
    data = plan_only([5000, 50, 1, 700], one_source_batches=True)
    whole = np.array([data.split(i) for i in range(400)])
    assert (whole.sum(1) == 4 * data.WINDOW).all() and (whole % 4 == 0).all()
    assert np.abs(whole.mean(0) / (4 * data.WINDOW) - data.shares).max() < 0.001
    assert (np.ptp(whole, axis=0) <= 4 * 2).all()


def test_sources_and_lengths_far_from_the_teacher_are_drawn_more_often():
    sizes, alone = [1000, 500, 3], {"source_focus": 2.0, "source_alpha": 0.0}
    data = plan_only(sizes, **alone)
    assert [source for source, _ in data.strata] == [0] * 4 + [1] * 4 + [2] * 3
    for number, size in enumerate(sizes):  # each row in one stratum, none longer than one of the next
        members = [rows for source, rows in data.strata if source == number]
        assert sorted(np.concatenate(members)) == list(range(size)) and np.ptp([len(x) for x in members]) <= 1
        lengths = [[max(i % 7, i % 5) for i in rows] for rows in members]
        assert all(max(low) <= min(high) for low, high in zip(lengths, lengths[1:])) and sorted(members[0])[0] == 0
    assert np.allclose(data.shares, np.repeat(1 / 3, 3).repeat([4, 4, 3]) / np.repeat([4, 4, 3], [4, 4, 3]))
    distances = np.array([[1.0, 2, 3, 4, 5, 5, 5, 5, 0, 0, 0], [10.0] * 8 + [0] * 3])  # the third is not drawn yet
    data.plan(1, distances)
    shares = (data.drawn_before(2) - data.drawn_before(1)) / (4 * data.WINDOW)
    weights = data.shares * np.append(distances[0, :8] / distances[0].sum() * 8, [1] * 3) ** 2
    assert np.abs(shares - weights / weights.sum()).max() < 0.002
    again = plan_only(sizes, **alone)
    again.seek({}, data.plans(0))
    assert (again.drawn_before(2) == data.drawn_before(2)).all()
    for strata, changes in (([250] * 4 + [125] * 4 + [3], {**alone, "one_source_batches": True}), (sizes, {})):
        assert [len(rows) for _, rows in plan_only(sizes, **changes).strata] == strata  # none less than a batch
    for plans in (None, {0: [1, 2]}, {0: [1] * 10 + [-3]}, {"x": [1] * 11}):
        with pytest.raises(script.UserError, match="source_focus"):
            again.seek({}, plans)


def test_rows_of_a_stratum_are_of_its_lengths(tiny, monkeypatch):
    monkeypatch.setattr(script.PairData, "WINDOW", 64)
    data = load(tiny, source_focus=1.0)
    bounds, known = [], {}
    for number, (source, members) in enumerate(data.strata):
        rows = data.tables[source][:]
        texts = [[len(x) for x in rows[side].to_pylist()] for side in ("anchor", "positive")]
        keys = list(zip(*(rows[f"key_{side}"].to_pylist() for side in ("anchor", "positive"))))
        lengths = [max(texts[0][i], texts[1][i]) for i in members]
        bounds.append((min(lengths), max(lengths)))
        known |= {keys[i]: number for i in members}
    seen: dict[tuple, int] = {}
    for window in range(3):
        rows = data.read_window(window)
        for row in zip(*(rows[name].tolist() for name in (
                "stratum", "epoch", "anchor_length", "positive_length", "key_anchor", "key_positive"))):
            stratum, epoch, *lengths, anchor, positive = row
            assert bounds[stratum][0] <= max(lengths) <= bounds[stratum][1]
            assert known[anchor, positive] == stratum
            seen[stratum, epoch, anchor, positive] = seen.get((stratum, epoch, anchor, positive), 0) + 1
    assert set(seen.values()) == {1} and {stratum for stratum, *_ in seen} == set(range(len(bounds)))
    plain = load(tiny)
    assert all(isinstance(members, range) for _, members in plain.strata)  # no memory a row


def test_held_out_texts_are_in_no_pair(tiny):
    plain, kept = load(tiny), load(tiny, held_out_share=0.1)
    assert plain.leaks == kept.leaks
    columns = [f"key_{side}" for side in ("anchor", "positive", "negative")]
    keys = [{k for t in data.tables for column in columns for k in t[:][column].to_pylist() if k}
            for data in (plain, kept)]
    out = {k for k in keys[0] if script.is_held_out(k.to_bytes(8, "little", signed=True), 0.1)}
    assert 0.05 < len(out) / len(keys[0]) < 0.15 and not out & keys[1]
    rows = lambda data, good: sum(good(a) and good(p) and good(n) for t in data.tables for a, p, n in zip(  # noqa: E731
        *(t[:][f"key_{s}"].to_pylist() for s in ("anchor", "positive", "negative"))))
    assert kept.size == rows(plain, lambda key: key not in out) < plain.size  # and nothing else is gone


# ---- whole runs


def small_windows() -> None:
    """Windows of 8 steps, so that a short run has several."""
    script.PairData.WINDOW = 8


@pytest.fixture(scope="module")
def run():
    """A function that runs the real command line, forked from one server, and returns what it printed."""
    server = forked.server()

    def start(cfg, output: Path, status: int = 0, **changes) -> str:
        words = {key: str(value) if isinstance(value, Path) else value
                 for key, value in (cfg | {"output_dir": output} | changes).items()}
        log = output.with_name(f"{output.name}.log")
        found, text = server.wait(server.start(words, log, ["test_stage2", "small_windows"])), log.read_text()
        assert found == status and "Traceback" not in text, text
        return text

    return start


def test_second_stage_from_a_student_and_resumed(tiny, run, tmp_path):
    """Starts from the first stage's student; with every key on, a run resumed without it is the same as the whole."""
    first = tmp_path / "first"
    run(tiny, first, total_steps=4, warmup_steps=1, eval_interval=4, peak_learning_rate=1e-3)
    cfg = tiny | {"one_source_batches": True, "guided_contrastive": True, "source_focus": 1.0, "held_out_share": 0.05,
                  "total_steps": 30, "save_interval": 6, "eval_interval": 30, "source_alpha": 0.5}
    whole = tmp_path / "whole"
    assert "student: from checkpoint_4.pt, step 4" in run(cfg, whole, init_student=first / "checkpoint_4.pt")
    start = script.load_file(first / "checkpoint_4.pt")["student"]
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    first_lines = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["sts/validation_spearman"] == first_lines[-1]["sts/validation_spearman"]  # nothing was trained yet
    end = script.load_file(whole / "checkpoint_30.pt")
    assert end["progress"]["init"]["step"] == 4 and end["progress"]["init"]["config"]["total_steps"] == 4
    assert not torch.equal(end["student"]["ffn_norms.0.weight"], start["ffn_norms.0.weight"])
    assert json.loads((whole / "run.json").read_text())["init"]["file"] == "checkpoint_4.pt"
    assert script.read_student(whole)[2]["init"]["step"] == 4
    distances = {k: v for line in lines for k, v in line.items() if k.startswith("distance/")}
    assert set(distances) == {"distance/pairs", "distance/other", "distance/small"}
    assert all(0 < v < 4 for v in distances.values())
    for step in (6, 24):  # inside the first window, and at the end of the third
        part = tmp_path / f"from-{step}"
        part.mkdir()
        for name in (f"checkpoint_{step}.pt", f"checkpoint_{step}.json", "metrics.jsonl"):
            (part / name).write_bytes((whole / name).read_bytes())
        run(cfg, part, resume_from_step=step)
        other = script.load_file(part / "checkpoint_30.pt")
        assert kill_soak.metrics(part) == kill_soak.metrics(whole)
        assert other["progress"] == end["progress"]
        assert all(torch.equal(other["student"][k], end["student"][k]) for k in end["student"])
    said = run(cfg, tmp_path / "bad", status=2, init_student=first / "checkpoint_4.pt", num_heads=4)
    assert "set --num_heads 2" in said
    assert "no such file" in run(cfg, tmp_path / "bad", status=2, init_student=tmp_path / "nothing")

    averaged = tmp_path / "averaged"
    parts = [str(whole / "checkpoint_30.pt"), "--average", str(first / "checkpoint_4.pt"), "--weights", "3", "1"]
    assert save_best_checkpoint.main([*parts, "--output_dir", str(averaged)]) == 0
    mean = script.load_file(averaged / "pytorch_model.bin")
    name = "deltanet_ffns.0.up.weight"
    torch.testing.assert_close(mean[name], 0.75 * end["student"][name] + 0.25 * start[name])
    assert "average" in script.read_student(averaged)[2]["chosen"] and not script.read_student(averaged)[2]["scores"]


def test_average_by_hand():
    states = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 6.0])}]
    assert save_best_checkpoint.average_students(states, [1.0, 1.0])["w"].tolist() == [2.0, 4.0]
    assert save_best_checkpoint.average_students(states, [3.0, 1.0])["w"].tolist() == [1.5, 3.0]
    other, not_a_number = {"v": torch.ones(2)}, float("nan")
    for bad, weights in (([states[0], other], [1, 1]), (states, [1.0]), (states, [0.0, 0.0]),
                         (states, [1, not_a_number])):
        with pytest.raises(script.UserError, match="average"):
            save_best_checkpoint.average_students(bad, weights)


# ---- retrieval


def test_ndcg_by_hand():
    candidates = np.eye(12)
    mixed = 0.9 * candidates[5] + 0.4 * candidates[3]
    queries = np.stack([candidates[3], mixed, candidates[:11].T @ np.arange(11, 0, -1)])
    found = generalise.ndcg(queries, candidates, [{3}, {3}, {1, 2, 10}])
    ideal = 1 + 1 / np.log2(3) + 1 / np.log2(4)
    last = (1 / np.log2(3) + 1 / np.log2(4)) / ideal  # place 11 is beyond 10
    assert found == pytest.approx([1.0, 1 / np.log2(3), last])


def test_queries_and_their_answers_were_not_seen(tmp_path):
    passage = lambda i: f"passage {i} of many words that say what the answer to its question is"  # noqa: E731
    rows = [[f"what is question {i}", passage(i)] for i in range(90)] + [["what is question 0", passage(90)]]
    kill_soak.write_lines(tmp_path / "train" / "answers.jsonl.gz", list(map(json.dumps, rows)))
    pairs = [json.dumps([f"this is sentence {i}", f"that is it {i}"]) for i in range(90)]
    kill_soak.write_lines(tmp_path / "train" / "pairs.jsonl.gz", pairs)
    key = lambda text: int.from_bytes(script.text_key(text), "little", signed=True)  # noqa: E731
    seen = {key(rows[i][1]) for i in range(10, 30)} | {key(rows[i][0]) for i in range(30, 40)}
    sets = generalise.retrieval_sets(script.config | {"data_dir": str(tmp_path)}, seen, 50, 60)
    queries, candidates, right = sets.pop("answers")
    assert not sets and len(queries) == len(set(queries)) == 50 and len(candidates) == len(set(candidates)) == 60
    assert not {*queries} & {rows[i][0] for i in range(10, 40)}
    for query, answers in zip(queries, right):
        assert {candidates[i] for i in answers} == {answer for other, answer in rows if other == query}
    cfg, seen = script.config | {"data_dir": str(tmp_path)}, {key(row[1]) for row in rows[:70]}
    assert not generalise.retrieval_sets(cfg, seen, 50, 60)
