"""A seeded corpus of English sentence pairs with graded similarity, made without any download: for `make quickstart`.

    python bench/make_corpus.py [--output_dir data/generated] [--pairs 30000] [--seed 42] [--force]

A scene (who does what to what, where and when) is sampled from topic lexicons whose slots fit each other, then put into
words. Two wordings of one scene are a positive pair; a wording of an edited scene is a hard negative or a lower grade.
Writes train/generated.jsonl.gz (lists of anchor, positive and, for about half, hard negative), sts/generated-dev.tsv.gz
and -test.tsv.gz (sentence, sentence, score from 0, unrelated, to 5, the same) and generated.json. Equal arguments give
equal files.
"""
from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import json
import os
import random
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

VERSION = 2
EVAL_ROWS = {"dev": 1500, "test": 1379}
FILES = {"train": "train/generated.jsonl.gz", "dev": "sts/generated-dev.tsv.gz", "test": "sts/generated-test.tsv.gz"}
RECORD = "generated.json"

# who: people @ places; do: verb/opposite > objects [adjectives]. "a|b" are synonyms, an object* is a person.
LEXICON = """
# cooking
who chef|cook, baker, kitchen assistant|kitchen helper @ in the kitchen, at the restaurant, in the school cafeteria
do bake/burn > cake, pie, loaf of bread [large|big, small|little]; grill/freeze > steak, sausage, chicken breast;
  chop|cut up > onion, carrot, mushroom [large|big, fresh]; peel > potato, apple, orange [small|little, ripe]
# sport
who player, team captain, young athlete, goalkeeper|goalie @ in the stadium|at the stadium, at the sports club, in the
  park
do kick/catch > ball, penalty; win/lose > match|game, race, tournament|competition [important, difficult|hard];
  lift|raise/drop > trophy, weight, silver cup [heavy]; break > world record, club record, school record
# medicine
who doctor|physician, nurse, medical student @ in the hospital|at the hospital, at the clinic, in the emergency room
do calm|reassure/frighten|scare > patient*, visitor*, boy* [nervous|anxious]; order/cancel > blood test,
  operation|surgery, checkup; treat|care for > patient*, child*, soldier* [sick|ill, injured|hurt]; examine|check >
  patient*, X-ray, eye, knee
# travel
who tourist, traveler, tour guide, backpacker @ in Rome, in Japan, at the airport, in the old town
do book|reserve/cancel > hotel room, flight, boat trip [cheap|inexpensive]; pack/unpack > suitcase, backpack, bag
  [large|big, heavy]; catch/miss > train, bus, ferry; rent|hire/return > car, boat, scooter
# software
who programmer|developer, software engineer, intern, data scientist @ at the office, at home, on the test server
do fix|repair/cause > bug, memory leak, crash [serious, strange|odd]; write/delete|remove > script, function, unit
  test [short, simple]; install/uninstall > program, driver, plug-in [new]; restart|reboot/shut down > server,
  computer, database [slow, old]
# animals
who zookeeper, vet|veterinarian, farmer @ at the zoo, in the stable, at the animal shelter
do catch/release|set free > snake, parrot, raccoon; feed > elephant, monkey, penguin, goat [hungry, young]; weigh >
  lion cub, puppy, kitten, turtle; wash|clean > pony, donkey [dirty]
# music
who musician, music student, street performer, music teacher @ on the stage|on stage, in the studio, at the festival
do record/delete > album, song, drum solo [new]; buy|purchase/sell > drum, flute, amplifier [old, small|little]; play
  > guitar, violin, piano, trumpet [old, expensive|costly]; write|compose > song, melody, opera [short, sad]
# school
who teacher, professor, tutor @ at school|in school, in the classroom, at the university
do grade|mark/lose > test, essay, exam [long, short]; praise/punish > class, student*, child* [quiet]; prepare/cancel
  > lesson, field trip, lecture; explain > rule, theorem, poem [difficult|hard]
# gardening
who gardener, neighbor, landscaper @ in the garden, behind the house, in the greenhouse
do plant/dig up > tree, rose bush, tulip, tomato plant [small|little, young]; pick/throw away > tomato, strawberry,
  pear, cucumber [ripe]; water > flower, plant, herb [dry]; prune|trim > hedge, apple tree, vine [tall, old]
"""

IRREGULAR = {first: (rest[0], rest[-1]) for first, *rest in map(str.split, (
    "begin began begun; break broke broken; buy bought; catch caught; cut cut; dig dug; feed fed; freeze froze frozen; "
    "lose lost; sell sold; set set; shut shut; throw threw thrown; win won; write wrote written").split("; "))}
PLURALS = {"child": "children", "loaf": "loaves", "man": "men", "potato": "potatoes", "quiz": "quizzes",
           "tomato": "tomatoes", "woman": "women"}
NUMBERS = ["two|a couple of", "three", "four", "five", "six|half a dozen", "seven", "eight"]
PEOPLE = ["man", "woman", "boy", "girl", "teenager", "old man|elderly man", "old woman|elderly woman"]
MANNERS = ["again|once more", "for the first time", "without any help|without help from anyone",
           "in a hurry|in great haste", "with a friend|together with a friend", "very carefully|with great care"]
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
TIMES = {
    "past": ["yesterday", "last week", "this morning|earlier this morning", "two weeks ago|a fortnight ago",
             "a few days ago|some days ago", *(f"on {day}" for day in DAYS)],
    "progressive": ["right now|at the moment", "today", "this week"],
    "future": ["tomorrow", "next week", "this evening|tonight", "soon|before long", *(f"next {day}" for day in DAYS)],
    "present": ["every day|each day", "once a week|every week", *(f"every {day}|on {day}s" for day in DAYS)]}
REMARKS = ["Nobody had expected this.|This came as a surprise to everyone.",
           "No one knows why.|The reason is still unknown.",
           "It was not the first time.|The same thing had happened before.",
           "A crowd of people came to watch.|Many people gathered to see it.",
           "Nothing like this had happened for years.|It had been years since anything like this happened."]

# A line "# name share tenses" starts a construction; each line below it is one meaning with its wordings, "kind: " in
# front where it has a name. Slots: S subject, P place, T time, FT and FP the same fronted, M manner, Z a remark; V, G,
# F, NF, Q the verb phrase as infinitive, gerund, finite, negated, question; PF, PN, PQ the passive, negated, question.
GRAMMAR = """
# statement 16 past,past,progressive,future,present
S F M P T.|PF M P T.|PF P M T.|FT S F M P.|FT PF P M.|FP S F M T.|IT S who F M P T.
# negation 4 past,progressive,future
S NF P T.|PN P T.|FT S NF P.|it is not true that S F P T.
# passage 8 past
S F M P T. Z|PF M P T. Z|FT S F M P. Z|FT PF P M. Z|FP S F M T. Z|IT S who F M P T. Z
# yes-no-question 6 past,progressive,future
Q M P T?|PQ M P T?|is it true that S F M P T?|do you know whether S F M P T?|can you tell me if S F M P T?
# wh-question 10 past,future
who: who F1 P T?|who ISIT that F1 P T?|do you know who F1 P T?|can you tell me who F1 P T?
obj: WHAT Q P T?|WHAT ISIT that S F P T?|do you know WHAT S F P T?|can you tell me WHAT S F P T?
place: where Q T?|where PQ T?|do you know where S F T?|can you tell me where S F T?
time: when Q P?|when PQ P?|do you know when S F P?|can you tell me when S F P?
why: why Q P T?|why PQ P T?|for what reason Q P T?|what is the reason why S F P T?
# intention 8 past
S managed to V P T.|S succeeded in G P T.|FT S managed to V P.
S failed to V P T.|S did not manage to V P T.|S WAS unable to V P T.
S tried to V P T.|S attempted to V P T.|S made an attempt to V P T.
S WAS allowed to V P T.|S had permission to V P T.
S had to V P T.|S WAS forced to V P T.|S WAS obliged to V P T.
# instruction 5 present
please V P.|make sure to V P.|remember to V P.|do not forget to V P.|you should V P.
do not V P.|you must not V P.|please avoid G P.|you should never V P.
"""
NEGATED = {"statement": "negation", "negation": "statement"}
SLOT = re.compile(r"\b[A-Z][A-Z0-9]*\b")


class Frame(NamedTuple):
    verb: str
    opposite: str
    objects: tuple[str, ...]
    adjectives: tuple[str, ...]


class Topic(NamedTuple):
    name: str
    agents: tuple[str, ...]
    places: tuple[str, ...]
    frames: tuple[Frame, ...]


class NP(NamedTuple):
    """A noun phrase; det is "the", "a", "the+" (plural), or a number "two|a couple of"."""
    words: str
    det: str
    adj: str = ""


class Scene(NamedTuple):
    """What a sentence says: a construction, its kind, and the values of its roles."""
    topic: Topic
    family: str
    kind: str
    x: dict[str, Any]


def listed(text: str, sep: str = ",") -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(sep) if part.strip())


@functools.cache
def lexicon() -> tuple[Topic, ...]:
    """LEXICON parsed."""
    topics = []
    for part in listed(re.sub(r"\n +", " ", LEXICON), "# "):
        name, *lines = part.split("\n")
        rest = dict(line.split(" ", 1) for line in lines)
        agents, places = rest["who"].split("@")
        frames = []
        for frame in listed(rest["do"], ";"):
            verbs, objects, adjectives = re.fullmatch(r"(.*?) > ([^[]*)(?:\[(.*)\])?", frame).groups("")
            frames.append(Frame(*(*listed(verbs, "/"), "")[:2], listed(objects), listed(adjectives)))
        topics.append(Topic(name, listed(agents), listed(places), tuple(frames)))
    return tuple(topics)


@functools.cache
def families() -> dict[str, tuple[int, list[str], dict[str, list[str]]]]:
    """GRAMMAR parsed: of each construction its share, its tenses, and the templates of each of its kinds."""
    out = {}
    for part in listed(GRAMMAR, "# "):
        head, *lines = part.split("\n")
        name, share, tenses = (*head.split(), "")[:3]
        kinds = {}
        for i, line in enumerate(lines):
            kind, text = re.fullmatch(r"(?:(\w+): )?(.*)", line).groups()
            kinds[kind or str(i)] = text.split("|")
        out[name] = (int(share), list(listed(tenses)), kinds)
    return out


def pick(rng: random.Random, seq: Sequence[Any]) -> Any:
    # Only random() is documented to give the same sequence in every Python version.
    return seq[int(rng.random() * len(seq))]


def syn(rng: random.Random, group: str) -> str:
    return pick(rng, group.split("|"))


def other(rng: random.Random, seq: Iterable[Any], *used: Any) -> Any:
    """A member of seq that is not in used, or None."""
    left = [item for item in seq if item not in used]
    return pick(rng, left) if left else None


def doubled(word: str) -> str:
    """The word with its last consonant doubled if its ending asks for that: "chop" -> "chopp"."""
    return word + word[-1] if re.fullmatch(r"(trans|be|for)?[^aeiou]*[aeiou][^aeiouwxy]", word) else word


def plural(text: str) -> str:
    """Plural of a noun phrase; the head is the word before " of ", else the last one."""
    head, of, rest = text.partition(" of ")
    stem, space, last = head.rpartition(" ")
    regular = last + "es" if re.search(r"(s|x|z|ch|sh)$", last) else re.sub(r"(?<=[^aeiou])y$", "ie", last) + "s"
    return stem + space + PLURALS.get(last, regular) + of + rest


def inflect(verb: str, form: str) -> str:
    """form: base, s, past, pp or ing; only the first word changes."""
    word, space, rest = verb.partition(" ")
    if form == "s":
        word = {"have": "has", "go": "goes", "redo": "redoes"}.get(word) or plural(word)
    elif form == "ing":
        word = {"die": "dy"}.get(word, re.sub(r"(?<=[^e])e$", "", doubled(word))) + "ing"
    elif form != "base" and word in IRREGULAR:
        word = IRREGULAR[word][form == "pp"]
    elif form != "base":
        word = word + "d" if word.endswith("e") else re.sub(r"(?<=[^aeiou])y$", "i", doubled(word)) + "ed"
    return word + space + rest


def split_verb(verb: str, tense: str, many: bool, passive: bool = False) -> tuple[str, str]:
    """Auxiliary and remainder of a finite verb: ("did", "chop"), ("is", "being chopped")."""
    was, be, do = ("were", "are", "do") if many else ("was", "is", "does")
    if passive:
        pp = inflect(verb, "pp")
        return {"past": (was, pp), "present": (be, pp), "progressive": (be, "being " + pp),
                "future": ("will", "be " + pp)}[tense]
    return {"past": ("did", verb), "present": (do, verb), "progressive": (be, inflect(verb, "ing")),
            "future": ("will", verb)}[tense]


def finite(verb: str, tense: str, many: bool, neg: bool = False) -> str:
    aux, rest = split_verb(verb, tense, many)
    if not neg and aux in ("did", "do", "does"):
        return inflect(verb, {"did": "past", "do": "base", "does": "s"}[aux])
    return f"{aux}{' not' * neg} {rest}".strip()


def article(text: str) -> str:
    vowel = re.match(r"[aeiouAEIO]|X-ray", text) and not re.match(r"uni[^nmd]|use|one\b", text)
    return ("an " if vowel else "a ") + text


def render(rng: random.Random, np: NP) -> str:
    words = syn(rng, np.words.rstrip("*"))
    words = words if np.det in ("the", "a") else plural(words)
    words = f"{syn(rng, np.adj)} {words}".strip()
    return article(words) if np.det == "a" else f"{syn(rng, np.det).rstrip('+')} {words}"


def slots(rng: random.Random, sc: Scene) -> dict[str, str]:
    """Fillers of the template slots of a scene; a slot that does not apply is not there."""
    x = sc.x
    v, s, o, many = syn(rng, x["verb"]), render(rng, x["who"]), render(rng, x["obj"]), x["who"].det not in ("the", "a")
    place, time = ("" if sc.kind == role else syn(rng, x[role]) for role in ("place", "time"))
    o, tense = "" if sc.kind == "obj" else o, x["tense"]
    aux, rest = split_verb(v, tense, many)
    passive_aux, passive = split_verb(v, tense, x["obj"].det not in ("the", "a"), True)
    it = ["it", "was" if tense == "past" else "is"]
    return {"S": s, "O": o, "P": place, "T": time, "M": syn(rng, x["manner"]), "Z": syn(rng, x["remark"]),
            "V": f"{v} {o}", "G": f"{inflect(v, 'ing')} {o}", "F": f"{finite(v, tense, many)} {o}",
            "F1": f"{finite(v, tense, False)} {o}", "NF": f"{finite(v, tense, many, True)} {o}",
            "Q": f"{aux} {s} {rest} {o}", "PF": f"{o} {passive_aux} {passive} by {s}",
            "PN": f"{o} {passive_aux} not {passive} by {s}", "PQ": f"{passive_aux} {o} {passive} by {s}",
            "WAS": "were" if many else "was", "IT": " ".join(it), "ISIT": " ".join(it[::-1]),
            "WHAT": "who" if x["obj"].words.endswith("*") else "what",
            **({"FP": f"{place},"} if place else {}), **({"FT": f"{time},"} if time else {})}


def wording(rng: random.Random, sc: Scene, used: set[str]) -> str:
    """A sentence for the scene, of a template that is not in used if there is one; adds its template to used."""
    fillers = slots(rng, sc)
    options = [t for t in families()[sc.family][2][sc.kind]
               if all(slot in fillers for slot in ("FP", "FT") if slot in SLOT.findall(t))]
    template = pick(rng, [t for t in options if t not in used] or options)
    used.add(template)
    text = " ".join(SLOT.sub(lambda m: fillers.get(m[0], m[0]), template).split())
    text = text.replace(" ,", ",").replace(" .", ".").replace(" ?", "?")
    return text[0].upper() + text[1:]


@functools.cache
def bare(text: str) -> str:
    """Lower case without punctuation and spaces, for comparing sentences."""
    return re.sub(r"[\W_]+", "", text.lower())


def realise(rng: random.Random, sc: Scene | None, n: int = 1) -> list[str]:
    """n different sentences for the scene, of different templates where there are enough; fewer if it has fewer."""
    out, used = {}, set()
    for _ in range(4 * n if sc else 0):
        if len(out) < n:
            text = wording(rng, sc, used)
            out.setdefault(bare(text), text)
    return list(out.values())


def new_np(rng: random.Random, words: str, adjectives: Sequence[str] = ()) -> NP:
    det = pick(rng, ("the", "the", "a", "a", "the+", *NUMBERS)[:5 + int(rng.random() * 4)])
    return NP(words, det, pick(rng, adjectives) if adjectives and rng.random() < 0.35 else "")


def new_scene(rng: random.Random, topic: Topic, name: str) -> Scene:
    """A random scene of one topic and family."""
    (_, tenses, kinds), frame = families()[name], pick(rng, topic.frames)
    kind, tense = pick(rng, list(kinds)), pick(rng, tenses)
    plain = not frame.opposite or name == "instruction" or rng.random() < 0.65
    return Scene(topic, name, kind, {
        "who": new_np(rng, pick(rng, PEOPLE if rng.random() < 0.25 else topic.agents)),
        "verb": frame.verb if plain else frame.opposite, "frame": frame, "tense": tense,
        "obj": new_np(rng, pick(rng, frame.objects), frame.adjectives),
        "place": pick(rng, topic.places) if rng.random() < 0.6 or kind == "place" else "",
        "time": pick(rng, TIMES[tense]) if rng.random() < 0.6 or kind == "time" else "",
        "manner": pick(rng, MANNERS) if rng.random() < 0.15 else "", "remark": pick(rng, REMARKS)})


def edit(rng: random.Random, sc: Scene, grade: int) -> Scene | None:
    """The scene with a detail (4), an important detail (3) or most but not all roles (2) changed, or None."""
    x, topic, fresh = sc.x, sc.topic, new_scene(rng, sc.topic, sc.family)
    changes: list[dict[str, Any]] = []
    kinds = [sc._replace(family=NEGATED[sc.family])] if sc.family in NEGATED and grade == 3 else []
    if grade == 4:
        changes = [{role: ""} for role in ("time", "place", "manner") if x[role]]
        changes += [{"time": other(rng, TIMES[x["tense"]], x["time"])}] if x["time"] else []
        changes += [{role: x[role]._replace(adj="")} for role in ("who", "obj") if x[role].adj]
        changes += [{"remark": other(rng, REMARKS, x["remark"])}] if sc.family == "passage" else []
    elif grade == 3:
        changes = [{"who": x["who"]._replace(words=other(rng, topic.agents, x["who"].words))},
                   {"obj": x["obj"]._replace(words=other(rng, x["frame"].objects, x["obj"].words))}]
        changes += [{"verb": other(rng, x["frame"][:2], x["verb"])}] * 2 if x["frame"].opposite else []
        changes += [{"place": other(rng, topic.places, x["place"])}] if x["place"] else []
        changes += [{role: x[role]._replace(det=other(rng, NUMBERS, x[role].det))}
                    for role in ("who", "obj") if x[role].det in NUMBERS]
        new = [kind for kind in families()[sc.family][2] if kind != sc.kind and x.get(kind, True)]
        kinds += [sc._replace(kind=pick(rng, new))] * 2 if new else []
    elif fresh.x["frame"] != x["frame"]:
        changes = [{role: fresh.x[role] for role in ("frame", "verb", "obj")}]
    # A change that the construction does not say, or asks for, would not be seen.
    said = " ".join(families()[sc.family][2][sc.kind])
    shown = {"time": "T", "place": "P", "manner": "M", "who": "S", "remark": "Z"}
    found = [sc._replace(x={**x, **change}) for change in changes if sc.kind not in change and all(
        re.search(rf"\bF?{shown.get(role, '[A-Z]')}\b", said) for role in change)]
    return pick(rng, kinds + found) if kinds + found else None


def split_of(seed: int, sc: Scene) -> str:
    """train, dev or test, by what the scene is about, so that one scene never reaches two of them."""
    who = sc.x["who"].words if sc.family != "instruction" and sc.kind != "who" else ""
    about = f"{sc.x['frame'].verb} {sc.x['obj'].words} {who}"
    return {0: "dev", 1: "test"}.get(zlib.crc32(f"{seed} {sc.topic.name} {about}".encode()) % 7, "train")


class Maker:
    """Draws pairs of two or three sentences, all of them new."""

    def __init__(self, seed: int) -> None:
        self.seed, self.rng = seed, random.Random(seed)
        self.used: set[str] = set()
        self.names = [name for name, (share, *_) in families().items() for _ in range(share)]

    def scene(self, split: str, topic: Topic | None = None, name: str | None = None) -> Scene | None:
        sc = new_scene(self.rng, topic or pick(self.rng, lexicon()), name or pick(self.rng, self.names))
        return sc if split_of(self.seed, sc) == split else None

    def take(self, texts: list[str]) -> list[str] | None:
        """The pair if there are two or more sentences, all new and different; they then count as used."""
        keys = {bare(t) for t in texts}
        if not 1 < len(texts) == len(keys) or keys & self.used:
            return None
        self.used |= keys
        return texts

    def train_pair(self, _: int) -> list[str] | None:
        """[anchor, positive] or, for about half of them, [anchor, positive, hard negative]."""
        sc = self.scene("train")
        if sc is None:
            return None
        texts = realise(self.rng, sc, 2)
        if self.rng.random() < 0.65:
            changed = edit(self.rng, sc, 3 if self.rng.random() < 0.75 else 2)
            if changed and split_of(self.seed, changed) == "train":
                texts += realise(self.rng, changed)
        return self.take(texts)

    def graded_pair(self, split: str, grade: int) -> list[str] | None:
        """Two sentences of one split whose similarity is grade."""
        sc = self.scene(split)
        if sc is None or grade == 5:
            return sc and self.take(realise(self.rng, sc, 2))
        # Few edits stay in a small split, so each scene gets several.
        partners = filter(None, (self.partner(sc, split, grade) for _ in range(30)))
        return self.take(realise(self.rng, sc) + realise(self.rng, next(partners, None)))

    def partner(self, sc: Scene, split: str, grade: int) -> Scene | None:
        """A scene of the same split whose similarity to sc is grade (0 to 4), or None."""
        if grade > 1:
            found = edit(self.rng, sc, grade)
            return found if found and split_of(self.seed, found) == split else None
        topic = sc.topic if grade else other(self.rng, lexicon(), sc.topic)
        found = self.scene(split, topic, sc.family if self.rng.random() < 0.5 else None)
        mine, its = ({s.x["who"].words, s.x["frame"].verb, s.x["obj"].words} for s in (sc, found or sc))
        return found if not mine & its else None


def collect(n: int, draw: Callable[[int], Any]) -> list[Any]:
    """n results of draw(index). Raises ValueError when the lexicon has hardly anything new left to say."""
    out, misses = [], 0
    while len(out) < n:
        found = draw(len(out))
        out += [found] if found else []
        misses = 0 if found else misses + 1
        if misses > 2000:
            raise ValueError(f"only {len(out)} of {n} pairs can be made without repeating a sentence")
    return out


def make(pairs: int, seed: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Contents of the files by name, and the counts. Raises ValueError if pairs is more than can be made."""
    maker, texts = Maker(seed), {}
    for split, n in EVAL_ROWS.items():
        rows = collect(n, lambda i: maker.graded_pair(split, i % 6))
        lines = [f"{a}\t{b}\t{i % 6:.1f}\n" for i, (a, b) in enumerate(rows)]
        texts[split] = sorted(lines, key=lambda _: maker.rng.random())
    rows = collect(pairs, maker.train_pair)
    texts["train"] = [json.dumps(row) + "\n" for row in rows]
    return {FILES[split]: gzip.compress("".join(lines).encode(), mtime=0) for split, lines in texts.items()}, {
        "pairs": pairs, "with_hard_negative": sum(len(row) == 3 for row in rows), "topics": len(lexicon()),
        "distinct_sentences": len({bare(text) for row in rows for text in row}), "constructions": len(families()),
        **{f"{split}_pairs": n for split, n in EVAL_ROWS.items()}}


def made_before(root: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a whole run with these arguments; None for an empty folder or a cut run; else ValueError."""
    try:
        record = json.loads((root / RECORD).read_bytes())
        same = {key: record[key] for key in wanted} == wanted
        found = {name: hashlib.sha256((root / name).read_bytes()).hexdigest() == info["sha256"]
                 for name, info in record["files"].items() if (root / name).is_file()}
    except (OSError, ValueError, KeyError, TypeError):
        same, found = not any(p.is_file() and p.suffix != ".part" for p in root.rglob("*")), {}
    if not same or not all(found.values()):
        raise ValueError(f"{root} holds files of others, of other arguments, or changed ones; --force writes over them")
    return record if len(found) == len(FILES) else None


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("data/generated"), help="folder to write to")
    parser.add_argument("--pairs", type=int, default=30000, help="number of training lines (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="seed of the generator (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="write over what the folder holds")
    args = parser.parse_args(argv)
    if args.pairs < 1 or args.seed < 0:
        parser.error("--pairs must be at least 1" if args.pairs < 1 else "--seed must not be negative")
    root = args.output_dir
    record: dict[str, Any] = {"made_by": "make_corpus.py", "version": VERSION, "seed": args.seed, "pairs": args.pairs}
    try:
        before = None if args.force else made_before(root, record)
        if before is None:
            root.mkdir(parents=True, exist_ok=True)
            (root / (RECORD + ".part")).write_bytes(b"")  # a folder that cannot be written fails before the slow part
            files, record["counts"] = make(args.pairs, args.seed)
            record["files"] = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                               for name, data in files.items()}
            # The record goes first: a run that is cut short then leaves a folder that is still known to be ours.
            for name, data in {RECORD: json.dumps(record, indent=2).encode(), **files}.items():
                (root / name).parent.mkdir(exist_ok=True)
                (root / f"{name}.part").write_bytes(data)
                os.replace(root / f"{name}.part", root / name)  # nobody ever reads half of it
    except OSError as error:
        parser.error(f"cannot use {error.filename or root}: {error.strerror or error}")
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps({**(before or record), "written": before is None}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
