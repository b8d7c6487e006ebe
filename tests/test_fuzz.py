"""Hostile and broken input: mutated checkpoints and data files through loaders and scripts, any ids into the model.

Every outcome must be one clear line (UserError, which the scripts print with a status that is not 0) or values that are
whole. Each mutation is a pure function of its number, so a failure is seen again with `-k` and the number it names.
"""
from __future__ import annotations

import copy
import gzip
import json
import os
import pickle
import random
import resource
import shutil
import zipfile
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import forked  # the benches are found from here on
import kill_soak
import save_best_checkpoint
import test_checkpoints as scan_checkpoints
import test_mteb_local
import train_6layer_deltanet as script
from forked import ROOT

MUTATIONS = 500
scan_checkpoints.__test__ = test_mteb_local.__test__ = False  # scripts, not tests


class Tiny:
    """A finished tiny run, its config, a student and an optimiser to load into, and the tiny teacher."""

    def __init__(self, folder: Path):
        self.cfg = kill_soak.make_tiny(folder) | {"total_steps": 4, "save_interval": 2,
                                                  "output_dir": str(folder / "run")}
        self.run = folder / "run"
        assert self.train(folder / "log") == 0, (folder / "log").read_text()
        self.full = script.check_config(script.config | self.cfg)
        self.full["sts_name"] = script.evaluation_name(self.full)  # as in the run, or all would be refused for it
        self.teacher, self.tokenizer, _ = script.load_teacher(self.full)
        self.path = self.run / "checkpoint_4.pt"
        self.content, self.bytes = script.load_file(self.path), self.path.read_bytes()
        self.student = script.build_student(self.full, self.teacher)
        self.optimizer = script.build_optimizer(self.student, self.full)

    def train(self, log: Path, **changes: Any) -> int:
        """The exit status of the training script."""
        return forked.server().wait(forked.server().start(self.cfg | changes, log), 300)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, few_sts_rows):
    return Tiny(tmp_path_factory.mktemp("fuzz"))


class Code:
    """Unpickled without care, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def rezip(path: Path, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> None:
    """Write every member of the archive `path` anew."""
    with zipfile.ZipFile(path) as archive:
        members = [(item.filename, change(item.filename, archive.read(item))) for item in archive.infolist()]
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)


JUNK = (None, "text", -1, 10 ** 30, float("nan"), [], {}, [1, 2], {"a": 1}, b"bytes", True, torch.zeros(3),
        torch.tensor(float("nan")))


def mutate(tiny: Tiny, path: Path, number: int) -> tuple[str, bool]:
    """Write mutation `number` of the checkpoint to `path`; its kind, and whether it must be refused."""
    rng = random.Random(number)
    kind = KINDS[number % len(KINDS)]
    raw, content, must = bytearray(tiny.bytes), copy.deepcopy(tiny.content), True
    states = [content["student"], rng.choice(list(content["optimizer"]["state"].values()))]
    where = rng.choice(states)
    name = rng.choice([k for k in where if k != "step"])
    if kind == "bit flips":
        for _ in range(rng.choice([1, 1, 8, 200])):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        must = False  # the loader alone cannot know; the commit mark does
    elif kind == "truncation":
        raw = raw[:rng.choice([0, 1, 100, len(raw) - 1, rng.randrange(len(raw))])]
    elif kind == "zero fill":
        start = rng.randrange(len(raw))
        size = rng.choice([1, 100, 4096, len(raw)])
        raw[start:start + size] = bytes(len(raw[start:start + size]))
        must = False
    elif kind == "swapped file":
        other = rng.choice(["pytorch_model.bin", "checkpoint_4.json", "metrics.jsonl", "vocab.txt",
                            "training_curves.png", "teacher"])
        source = tiny.run / other if other != "teacher" else Path(tiny.cfg["teacher_model"]) / "model.safetensors"
        raw = bytearray((source if source.exists() else tiny.run / "config.json").read_bytes())
    elif kind == "code":
        content[rng.choice(list(content))] = Code(path.with_name("pwned"))
        if rng.random() < 0.5:
            path.write_bytes(pickle.dumps(content | {"student": {}, "optimizer": {}}, protocol=rng.choice([0, 2, 4])))
            return kind, must
    elif kind == "renamed key":
        target, key = rng.choice([(content, rng.choice([k for k in content if k != "schedule"])), (where, name)])
        target[rng.choice(["", "_orig_mod." + str(key), str(key).upper()])] = target.pop(key)
    elif kind == "wrong shape":
        t = where[name]
        where[name] = rng.choice([t[None], t.repeat_interleave(2, 0), t.flatten()[:-1], torch.zeros(0),
                                  t.unsqueeze(-1)])
    elif kind == "wrong value":
        bad = rng.choice([float("nan"), float("inf"), -float("inf")])
        t = where[name]
        where[name] = rng.choice([torch.full_like(t, bad), t.to(torch.complex64), torch.zeros_like(t, device="meta")])
    elif kind == "wrong type":
        key = rng.choice(["student", "optimizer", "progress", "best", "config", "step"])
        right = (dict, bool, int) if key == "step" else (dict, bool)
        content[key] = rng.choice([j for j in JUNK if not isinstance(j, right)])
    elif kind == "wrong type inside":
        key = rng.choice(["optimizer", "progress", "best", "config", "student"])
        target = content[key]
        inner = rng.choice(list(target))
        target[inner] = rng.choice(JUNK)
        must = False  # an unknown or a free key's value may be anything
    elif kind == "other architecture":
        change = rng.choice([{"num_layers": 3}, {"d_model": 64}, {"short_convolution": False},
                             {"hierarchical_memory": False}])
        teacher = tiny.teacher.config
        other = script.DeltaNetStudent(script.DeltaNetConfig(
            ffn_size=teacher.intermediate_size, vocab_size=teacher.vocab_size,
            max_positions=teacher.max_position_embeddings,
            **{k: tiny.full[k] for k in script.ARCHITECTURE_KEYS} | change))
        content["student"] = script.trainable_state(other)
        if rng.random() < 0.5:
            content["config"] = content["config"] | change
        else:
            must = "num_layers" in change or "d_model" in change  # a switch's tensors are the same without it
    elif kind == "huge tensor":
        way = rng.randrange(4)
        if way == 0:
            where[name] = torch.zeros(1).expand(1 << 40)
        elif way == 1:
            where[name] = torch.empty(1 << 40, device="meta")
        else:
            torch.save(content, path)
            if way == 2:  # a record that unpacks to a hundred times its size
                rezip(path, lambda n, c: bytes(30_000_000) if n.endswith("/data/0") else c, zipfile.ZIP_DEFLATED)
            else:  # a storage that declares more elements than its record holds
                huge = b"J\x00\x00\x00\x7f"
                rezip(path, lambda n, c: c.replace(b"M\x00\x04", huge).replace(b"K ", huge)
                      if n.endswith("data.pkl") else c)
            return kind, must
    if kind in ("bit flips", "truncation", "zero fill", "swapped file"):
        path.write_bytes(raw)
    else:
        torch.save(content, path)
    return kind, must


KINDS = ("bit flips", "truncation", "zero fill", "swapped file", "code", "renamed key", "wrong shape", "wrong value",
         "wrong type", "wrong type inside", "other architecture", "huge tensor")


def sign(path: Path) -> None:
    """A commit mark that fits, as someone hostile would write it."""
    path.with_suffix(".json").write_text(json.dumps({
        "step": int(path.stem.split("_")[1]), "bytes": path.stat().st_size, "sha256": script.file_sha256(path)}))


def one_line(error: Exception, path: Path) -> None:
    """The message names the file and is one line of a length that is read."""
    assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 1000, str(error)


@pytest.mark.parametrize("numbers", [range(100), pytest.param(range(100, MUTATIONS), marks=pytest.mark.slow)])
def test_mutated_checkpoints_through_the_loaders(tiny, tmp_path, numbers):
    """Refused by the commit mark; signed again, refused by the loaders or loaded whole. Memory stays bounded."""
    before, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    good = tiny.path.with_suffix(".json").read_text()
    for number in numbers:
        path = tmp_path / "checkpoint_4.pt"
        kind, must = mutate(tiny, path, number)
        path.with_suffix(".json").write_text(good)
        if path.read_bytes() != tiny.bytes:
            with pytest.raises(script.UserError, match="damaged"):
                script.find_checkpoint(tmp_path, 4)
        optimizer = script.build_optimizer(tiny.student, tiny.full)
        try:
            content = script.resume(path, tiny.student, optimizer, tiny.full)
            assert not must, (number, kind)
            for p in tiny.student.parameters():
                assert torch.isfinite(p).all()
                p.grad = torch.zeros_like(p)
            optimizer.step()
            assert isinstance(content["step"], int)
        except script.UserError as error:
            refused += 1
            one_line(error, path)
        except Exception as error:
            raise AssertionError(f"mutation {number} ({kind}): {error!r}") from error
        try:
            script.open_student(path, tiny.teacher)
        except script.UserError as error:
            one_line(error, path)
        except Exception as error:
            raise AssertionError(f"mutation {number} ({kind}) through open_student: {error!r}") from error
    assert refused > 0.7 * len(numbers) and not (tmp_path / "pwned").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_keys_that_are_no_more_stop_nothing(tiny, tmp_path, capsys):
    """A checkpoint of an earlier version resumes and opens; what had an effect there is said."""
    path, config = tmp_path / "checkpoint_4.pt", tiny.content["config"]
    torch.save(tiny.content | {"config": config | {"similarity_distill_weight": 20.0, "guided_margin": 0.0}}, path)
    content = script.resume(path, tiny.student, script.build_optimizer(tiny.student, config), config)
    assert content["step"] == 4 and script.read_student(path)[1].keys() == script.config.keys()
    notes = capsys.readouterr().out
    assert "similarity_distill_weight = 20.0, a key that is no more" in notes and "guided_margin" not in notes


def quiet_main(main: Callable[[list[str]], int], argv: list[str], capsys: Any) -> tuple[int, str]:
    """Exit status and output of a script's `main`."""
    capsys.readouterr()
    status = main(argv)
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_mutated_checkpoints_through_every_script(tiny, tmp_path, capsys):
    """One mutation of each kind that must be refused, through each `main`: a line naming the file, a status not 0."""
    numbers = {}
    for number in range(len(KINDS)):
        kind, must = mutate(tiny, tmp_path / "probe.pt", number)
        if must and kind not in ("wrong type", "renamed key"):
            numbers.setdefault(kind, number)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_bytes((tiny.run / "run.json").read_bytes())
    for i, number in enumerate(numbers.values(), 1):
        mutate(tiny, folder / f"checkpoint_{i}.pt", number)
        sign(folder / f"checkpoint_{i}.pt")
    student = [i for i, _ in enumerate(numbers, 1) if not loads_as_student(tiny, folder / f"checkpoint_{i}.pt")]
    assert len(student) >= 5
    status, text = quiet_main(scan_checkpoints.main, [str(folder), "--split", "test"], capsys)
    assert status == 1 and text.count("error:") >= len(student)
    for i in student:
        path = str(folder / f"checkpoint_{i}.pt")
        status, text = quiet_main(save_best_checkpoint.main, [path, "--output_dir", str(tmp_path / "out")], capsys)
        assert status == 2 and "error: " in text and f"checkpoint_{i}.pt" in text and not (tmp_path / "out").exists()
        status, text = quiet_main(test_mteb_local.main, ["--checkpoint", path, "--output_dir", str(tmp_path / "mteb"),
                                                         "--data_dir", tiny.cfg["data_dir"]], capsys)
        assert status == 2 and "error: " in text and f"checkpoint_{i}.pt" in text
    for i in range(1, len(numbers) + 1):
        log = tmp_path / f"train_{i}.log"
        assert tiny.train(log, output_dir=str(folder), resume_from_step=i) == 2, log.read_text()
        assert f"checkpoint_{i}.pt" in log.read_text() and "Traceback" not in log.read_text()
    assert not list(tmp_path.rglob("pwned"))


def loads_as_student(tiny: Tiny, path: Path) -> bool:
    """Whether the student in it is whole: mutations of the optimiser's state concern the training script alone."""
    try:
        script.open_student(path, tiny.teacher)
        return True
    except script.UserError:
        return False


def test_code_in_a_pickle_runs_nothing(tiny, tmp_path):
    """By the real command lines: the file is named, what it would call too, and nothing runs."""
    path = tmp_path / "checkpoint_4.pt"
    torch.save(tiny.content | {"best": Code(tmp_path / "pwned")}, path)
    sign(path)
    with pytest.raises(script.UserError, match=r"checkpoint_4.pt.*posix.system"):
        script.load_file(path)
    done = forked.run(ROOT / "save_best_checkpoint.py", path, "--output_dir", tmp_path / "out", timeout=120)
    assert done.returncode == 2 and "checkpoint_4.pt" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "out").exists()


# Data files


def pairs_file(path: Path, lines: list[bytes]) -> Path:
    path.write_bytes(gzip.compress(b"\n".join(lines) + b"\n", 1))
    return path


BAD_LINES = {
    "one string": [b'"text"'], "numbers": [b"[1, 2]", b"3", b"[[1], [2]]", b"1" * 5000],
    "null": [b"null", b'["a", null]', b"[null, null]"], "not UTF-8": [b'["\xff\xfe", "b"]', b'["caf\xe9", "b"]'],
    "not JSON": [b"['a', 'b']", b'["a", "b"', b"[" * 100_000, b"a,b", b'["a" "b"]'],
    "object": [b'{"anchor": "a", "positive": "b"}'], "one text": [b'["a"]', b"[]"],
    "four texts": [b'["a", "b", "c", "d"]'], "empty text": [b'["a", ""]', b'["  ", "b"]'],
    "surrogate": [b'["\\ud800", "b"]'], "10 MB line": [b'["' + b"a" * 10_000_000 + b'", "b"]'],
    "NUL bytes": [b"\0" * 100, b'["a", "b"]\0'],
}


def mutate_pairs(path: Path, number: int, good: list[bytes]) -> tuple[str, int | None]:
    """Write mutation `number` of a pairs file; its kind, and its wrong line (0: somewhere; None: it may be right)."""
    rng, lines = random.Random(number), list(good)
    kinds = [*BAD_LINES, "not gzip", "empty file", "empty gzip", "only blanks", "truncated gzip", "bit flips",
             "line bytes", "harmless"]
    kind = kinds[number % len(kinds)]
    if kind in BAD_LINES:
        if kind == "10 MB line" and number >= 2 * len(kinds):
            kind = "null"  # ten megabytes twice are enough
        at = rng.randrange(len(lines))
        lines.insert(at, rng.choice(BAD_LINES[kind]))
        pairs_file(path, lines)
        return kind, at + 1
    if kind == "harmless":
        harmless = [b"", b"   ", b'["\\u0000", "b"]', '["\u00e9", "\U0001f600"]'.encode(), b'["a", "b"]\r']
        lines.insert(rng.randrange(len(lines)), rng.choice(harmless))
        pairs_file(path, lines)
        return kind, None
    whole = pairs_file(path, lines).read_bytes()
    if kind == "line bytes":
        at = rng.randrange(len(lines))
        line = bytearray(lines[at])
        line[rng.randrange(len(line))] = rng.randrange(256)
        pairs_file(path, lines[:at] + [bytes(line)] + lines[at + 1:])
        return kind, None
    if kind == "bit flips":
        raw = bytearray(whole)
        for _ in range(rng.choice([1, 5])):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        path.write_bytes(raw)
        return kind, None
    path.write_bytes({"not gzip": b"\n".join(lines), "empty file": b"", "empty gzip": gzip.compress(b""),
                      "only blanks": gzip.compress(b" \n\n\t\n" * rng.randrange(1, 50)),
                      "truncated gzip": whole[:rng.randrange(1, len(whole))]}[kind])
    return kind, 0


def test_mutated_pairs(tiny, tmp_path):
    path, folder = tmp_path / "pairs.jsonl.gz", tmp_path / "cache" / "pairs"
    good = [json.dumps([kill_soak.sentence(random.Random(i)) for _ in range(2 + i % 2)]).encode() for i in range(40)]
    for number in range(MUTATIONS):
        kind, line = mutate_pairs(path, number, good)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            _, meta = script.tokenise_source(lambda: script.read_pairs(path), tiny.tokenizer, 16, set(), folder)
            assert line is None, (number, kind)
            assert 0 < meta["pairs"] <= len(good) + 1
        except script.UserError as error:
            one_line(error, path)
            assert kind != "harmless" and (not line or f"line {line}:" in str(error)), (number, kind, str(error))
        except Exception as error:
            raise AssertionError(f"mutation {number} ({kind}): {error!r}") from error
        assert not list(folder.glob(".*.tmp-*")), (number, kind)


def mutate_sts(path: Path, number: int, good: list[str]) -> tuple[str, int | None]:
    """Write mutation `number` of an STS file; as `mutate_pairs`."""
    rng, lines = random.Random(number), list(good)
    at = rng.randrange(len(lines))
    a, b, score = lines[at].split("\t")
    fields = {"missing column": [f"{a}\t{b}", f"{a}\t{score}", a, ""],
              "score out of range": [f"{a}\t{b}\t{s}" for s in ("5.01", "-0.1", "1e9")],
              "NaN": [f"{a}\t{b}\t{s}" for s in ("nan", "inf", "-inf", "NaN")],
              "not a number": [f"{a}\t{b}\t{s}" for s in ("", "three", "1,5", "0x1")],
              "four columns": [f"{a}\t{b}\t{score}\t1"], "swapped columns": [f"{score}\t{a}\t{b}"]}
    kinds = [*fields, "duplicate", "one row short", "empty", "not gzip", "not UTF-8", "truncated", "bit flips",
             "10 MB line", "NUL bytes"]
    kind = kinds[number % len(kinds)]
    if kind == "10 MB line" and number > 2 * len(kinds):
        kind = "NUL bytes"
    raw = None
    if kind in fields:
        lines[at] = rng.choice(fields[kind])
    elif kind == "10 MB line":
        lines[at] = "a" * 10_000_000
    elif kind == "NUL bytes":
        lines[at] = "\0" * 10
    elif kind == "duplicate":
        lines.insert(at, lines[at])
    elif kind == "one row short":
        lines.pop(at)
    elif kind == "empty":
        lines = []
    elif kind == "not gzip":
        raw = "\n".join(lines).encode()
    elif kind == "not UTF-8":
        lines[at] = "caf\udce9" + lines[at]
    raw = raw or gzip.compress("".join(line + "\n" for line in lines).encode("utf-8", "surrogateescape"), 1)
    if kind == "truncated":
        raw = raw[:rng.randrange(len(raw) - 8)]
    elif kind == "bit flips":
        raw = bytearray(raw)
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)
    named = kind in fields or kind in ("10 MB line", "NUL bytes")
    return kind, at + 1 if named else None if kind == "bit flips" else 0


def test_mutated_sts(few_sts_rows, tmp_path):
    cfg = script.config | {"data_dir": str(tmp_path)}
    path = tmp_path / "sts" / "stsb-test.tsv.gz"
    path.parent.mkdir()
    rng = random.Random(0)
    good = [f"{kill_soak.sentence(rng)}\t{kill_soak.sentence(rng)}\t{rng.uniform(0, 5):.2f}"
            for _ in range(script.STS_ROWS["test"])]
    for number in range(MUTATIONS):
        kind, line = mutate_sts(path, number, good)
        try:
            rows = script.load_sts(cfg, "test")
            assert line is None and len(rows) == len(good), (number, kind)
            assert all(0 <= score <= 5 for _, _, score in rows)
        except script.UserError as error:
            one_line(error, path)
            assert not line or f"line {line}:" in str(error), (number, kind, str(error))
        except Exception as error:
            raise AssertionError(f"mutation {number} ({kind}): {error!r}") from error


@pytest.mark.parametrize("where", ["train", "sts"])
def test_bad_data_through_the_command_line(tiny, tmp_path, where):
    data = Path(shutil.copytree(tiny.cfg["data_dir"], tmp_path / "data"))
    file = data / "train" / "pairs.jsonl.gz" if where == "train" else data / "sts" / "stsb-dev.tsv.gz"
    file.write_bytes(gzip.compress(b'"text"\n'))
    assert tiny.train(tmp_path / "log", data_dir=str(data), output_dir=str(tmp_path / "out")) == 2
    text = (tmp_path / "log").read_text()
    assert f"{file}, line 1:" in text and "Traceback" not in text


# The model


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(1, 512) | st.integers(1, 40), rows=st.integers(1, 3), seed=st.integers(0, 2 ** 32 - 1),
       data=st.data())
def test_any_ids_and_any_mask_give_finite_unit_vectors(tiny, length, rows, seed, data):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, tiny.teacher.config.vocab_size, (rows, length), generator=generator)
    share = data.draw(st.sampled_from([0.0, 0.02, 0.5, 0.95, 1.0]))
    mask = (torch.rand(rows, length, generator=generator) < share).long()
    mask[torch.arange(rows), torch.randint(0, length, (rows,), generator=generator)] = 1
    if data.draw(st.booleans()):
        ids[:] = ids[0, 0]  # one token repeated
    with torch.no_grad():
        vectors = script.mean_pool(tiny.student.eval()(ids, mask).last_hidden_state, mask)
    assert torch.isfinite(vectors).all()
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(rows), atol=1e-5, rtol=0)


@pytest.mark.parametrize("sentences", [[""], ["", "a dog runs", " "], ["\0", "\n"], []])
def test_empty_sentences_are_encoded(tiny, sentences):
    vectors = script.encode(tiny.student, tiny.tokenizer, sentences, convert_to_tensor=True)
    assert vectors.shape == (len(sentences), 32)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(sentences)), atol=1e-5, rtol=0)
