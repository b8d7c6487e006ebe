"""bench/make_corpus.py: repeatable, no leakage, graded scores, well-formed English sentences, clear errors."""
from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import make_corpus  # noqa: E402

SMALL = ("--pairs", "20")


def run(folder: Path, *options: str, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bench" / "make_corpus.py"), "--output_dir", str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": hash_seed})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def lines(path: Path) -> list[str]:
    return gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "new" / "folder"
    assert run(folder, *SMALL).returncode == 0
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The files of the default arguments: train rows, dev and test rows (sentence, sentence, score), summary."""
    folder = tmp_path_factory.mktemp("corpus") / "out"
    done = run(folder)
    assert done.returncode == 0, done.stderr
    rows = {split: [line.split("\t") for line in lines(folder / make_corpus.FILES[split])] for split in ("dev", "test")}
    return {"train": [json.loads(line) for line in lines(folder / make_corpus.FILES["train"])], **rows,
            "summary": json.loads(done.stdout)}


@pytest.fixture(scope="module")
def sentences(corpus: dict) -> list[str]:
    graded = [t for split in ("dev", "test") for row in corpus[split] for t in row[:2]]
    return [t for row in corpus["train"] for t in row] + graded


def test_same_arguments_give_same_bytes(small: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "again", *SMALL, hash_seed="1").returncode == 0
    assert contents(tmp_path / "again") == contents(small)
    assert set(contents(small)) == {*make_corpus.FILES.values(), make_corpus.RECORD}


def test_other_seed_differs() -> None:
    def train(seed: int) -> list:
        return make_corpus.collect(20, make_corpus.Maker(seed).train_pair)
    assert train(1) == train(1) != train(2)


def test_second_run_does_nothing(small: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in small.rglob("*")}
    done = run(small, *SMALL)
    assert done.returncode == 0 and json.loads(done.stdout)["written"] is False
    assert {p: p.stat().st_mtime_ns for p in small.rglob("*")} == before


def test_changed_file_needs_force(tmp_path: Path, small: Path) -> None:
    shutil.copytree(small, tmp_path, dirs_exist_ok=True)
    record = json.loads((tmp_path / make_corpus.RECORD).read_text())
    assert make_corpus.made_before(tmp_path, record) == record
    (tmp_path / make_corpus.FILES["dev"]).write_bytes(b"")
    failed = run(tmp_path, *SMALL)
    assert failed.returncode == 2 and "--force" in failed.stderr
    assert run(tmp_path, *SMALL, "--force").returncode == 0 and contents(tmp_path) == contents(small)
    (tmp_path / make_corpus.FILES["dev"]).unlink()
    assert make_corpus.made_before(tmp_path, record) is None


def test_counts(corpus: dict) -> None:
    texts = [make_corpus.bare(t) for row in corpus["train"] for t in row]
    counts = corpus["summary"]["counts"]
    assert len(corpus["train"]) == counts["pairs"] == 30000
    assert len(set(texts)) == counts["distinct_sentences"] > 40000
    assert 0.4 < sum(len(row) == 3 for row in corpus["train"]) / 30000 < 0.6
    assert (len(corpus["dev"]), len(corpus["test"])) == (1500, 1379)
    assert counts["topics"] == len(make_corpus.lexicon()) >= 9


def test_no_sentence_in_two_splits(corpus: dict) -> None:
    keys = {"train": {make_corpus.bare(t) for row in corpus["train"] for t in row},
            **{s: {make_corpus.bare(t) for row in corpus[s] for t in row[:2]} for s in ("dev", "test")}}
    assert not keys["train"] & keys["dev"] and not keys["train"] & keys["test"] and not keys["dev"] & keys["test"]


@pytest.mark.parametrize("split", ["dev", "test"])
def test_scores_cover_the_range_evenly(corpus: dict, split: str) -> None:
    scores = Counter(float(row[2]) for row in corpus[split])
    assert sorted(scores) == [0, 1, 2, 3, 4, 5]
    assert max(scores.values()) - min(scores.values()) <= 1


def test_scores_follow_shared_words(corpus: dict) -> None:
    def shared(a: str, b: str) -> float:
        one, two = (set(re.findall(r"\w+", t.lower())) for t in (a, b))
        return len(one & two) / len(one | two)
    mean = {g: sum(found) / len(found) for g in range(6)
            if (found := [shared(a, b) for a, b, s in corpus["test"] if float(s) == g])}
    assert max(mean[0], mean[1]) < mean[2] < min(mean[3], mean[4], mean[5])


def test_texts_of_a_row_differ(corpus: dict) -> None:
    for row in corpus["train"]:
        assert len(row) in (2, 3) and len({make_corpus.bare(t) for t in row}) == len(row), row
    for row in corpus["dev"] + corpus["test"]:
        assert len(row) == 3 and make_corpus.bare(row[0]) != make_corpus.bare(row[1]), row


def test_sentences_are_well_formed(sentences: list[str]) -> None:
    for text in sentences:
        assert text == text.strip() and re.fullmatch(r"""[A-Za-z0-9 ,.?:"'-]+""", text), text
        assert not re.search(r"  | [,.?]|[,.?:]{2}|\b(None|[B-HJ-WYZ]|[A-Z]{3,}(?<!USB))\b", text), text
        assert text[-1] not in ".?" or text[0].isupper(), text
        wrong_past = r"\b(break|buy|catch|cutt?|digg?|feed|freez|los|sell|shutt?|throw|winn?|writ)ed\b"
        assert not re.search(wrong_past, text), text
        assert not re.search(r"\b(the|a|an) (the|a|an)\b|\b(\w+) \3\b(?<!-in in)", text), text
        assert text[-1] in ".?" and len(text.split()) > 2, text


def test_articles_agree(sentences: list[str]) -> None:
    for text in sentences:
        for article, word in re.findall(r"\b([Aa]n?) (\S+)", text):
            vowel = word[0].lower() in "aeiou" and not re.match("uni[^nmd]|use|USB", word)
            vowel = vowel or re.match("X-ray|hour|heir", word)
            assert (article.lower() == "an") == bool(vowel), text


def test_verbs_agree(sentences: list[str]) -> None:
    for text in sentences:
        many = re.match(r"(Two|Three|Four|Five|Six|Several|Many) \w+s (is|was|has|does)\b", text)
        one = re.match(r"(A|An) [a-z]+ (are|were|have|do)\b", text)
        assert not many and (not one or text.startswith(("A lot", "A couple", "A number", "A dozen"))), text


def test_lengths_spread(sentences: list[str]) -> None:
    words = sorted(len(t.split()) for t in sentences)
    assert words[0] >= 3 and words[-1] <= 40
    assert words[len(words) // 20] <= 7 and words[-len(words) // 20] >= 17


@pytest.mark.parametrize("verb, forms", [
    ("chop", "chops chopped chopped chopping"), ("begin", "begins began begun beginning"),
    ("free", "frees freed freed freeing"), ("die", "dies died died dying"),
    ("bury", "buries buried buried burying"), ("catch", "catches caught caught catching"),
    ("transmit", "transmits transmitted transmitted transmitting"), ("play", "plays played played playing"),
    ("open", "opens opened opened opening"), ("bake", "bakes baked baked baking")])
def test_inflection(verb: str, forms: str) -> None:
    assert [make_corpus.inflect(verb, form) for form in ("s", "past", "pp", "ing")] == forms.split()


def test_plurals_and_articles() -> None:
    assert [make_corpus.plural(t) for t in ("loaf of bread", "city", "toy", "fox", "police officer")] == [
        "loaves of bread", "cities", "toys", "foxes", "police officers"]
    assert [make_corpus.article(t) for t in ("apple", "unit test", "X-ray", "USB stick")] == [
        "an apple", "a unit test", "an X-ray", "a USB stick"]


def test_bad_input_is_one_line(tmp_path: Path, small: Path) -> None:
    (tmp_path / "file").write_text("text")
    cases = {("--pairs", "0"): tmp_path / "a", ("--pairs", "many"): tmp_path / "a", ("--seed", "-1"): tmp_path / "a",
             ("--pairs", "30"): small, ("--seed", "7"): tmp_path, (): tmp_path / "file",
             SMALL: tmp_path / "file" / "below"}
    for options, folder in cases.items():
        done = run(folder, *options)
        assert done.returncode == 2 and done.stdout == "", (options, done)
        assert re.fullmatch(r"make_corpus\.py: error: .*\n", done.stderr), (options, done.stderr)
    assert not (tmp_path / "a").exists() and (tmp_path / "file").read_text() == "text"


def test_too_many_pairs_is_an_error() -> None:
    with pytest.raises(ValueError, match="only 1 of 5 pairs"):
        make_corpus.collect(5, lambda i: None if i else "pair")


def test_help() -> None:
    assert "--pairs" in run(Path("."), "--help").stdout
