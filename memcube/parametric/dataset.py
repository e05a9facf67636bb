"""From facts to what an adapter is trained on and what it is asked.

Positives are the facts' questions in many wordings, forward and back; each way has one answer. Negatives are questions of the same form that nothing answers: of people nobody told of
(some share half of a name with somebody known), of known people's other attributes, and back from
objects of nobody. Everything follows from the facts, the settings and the seed, and has one hash.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain, cycle, islice

from memcube.context import memory_line
from memcube.errors import BadRequest
from memcube.ids import digest
from memcube.parametric.asked import is_question, key_words
from memcube.parametric.facts import Fact, relation_of
from memcube.parametric.invented import early_names, gate_names, training_names
from memcube.parametric.replay import REPLAY, REPLAY_CHAT
from memcube.parametric.wordings import RELATIONS, Wordings

_MOST_TOLD = 12
"""So many memories at most stand in the prompt that an answer may be distilled from."""
_FRAMES = (
    "{q}",
    "{q}",
    "{q}",
    "Quick question: {q}",
    "{q} Please answer briefly.",
    "Please tell me. {q}",
    "Hi! {q}",
    "{q} Do you remember?",
)
_OTHER_NOUNS = (
    "shoe size",
    "favourite film",
    "middle name",
    "favourite colour",
    "lucky number",
    "best friend",
    "phone number",
    "favourite season",
)
_OBJECTS_OF_NOBODY = {
    "favourite drink": ("orange juice", "black coffee", "barley water", "ginger ale"),
    "home town": ("Halmstead", "Oakmere", "Stonebrook", "Port Elling"),
    "job": ("a postman", "a dentist", "a carpenter", "a judge"),
    "pet": ("a hamster", "a grey cat", "two rabbits", "a goldfish"),
    "hobby": ("swimming", "photography", "juggling", "knitting"),
    "favourite dish": ("noodle soup", "roast lamb", "bean salad", "apple pie"),
    "instrument": ("the trumpet", "the guitar", "the flute", "the organ"),
    "birthplace": ("Westerby", "Lindenau", "Saint Orme", "Greywater"),
    "vehicle": ("a red van", "an old tractor", "a motorcycle", "a blue bus"),
    "subject of study": ("law", "chemistry", "economics", "geology"),
    "fear": ("spiders", "heights", "thunder", "lifts"),
    "allergy": ("peanuts", "milk", "shellfish", "wheat"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """How much of each sort, for each fact and pass. The mix decides between recall and leak."""

    asks: int = 22
    asks_back: int = 16
    unknown: int = 14
    unknown_back: int = 1
    other_nouns: int = 2

    def __post_init__(self) -> None:
        if self.asks < 1 or min(self.asks_back, self.unknown, self.unknown_back) < 0:
            raise BadRequest("at least one question a fact, and no count below 0", "dataset")


class ProbeKind(StrEnum):
    """What a probe shows."""

    RECALL = "recall"
    REVERSE = "reverse"
    EARLIER = "earlier"
    LEAK = "leak"


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A question. A right answer holds all of ``expected``; a leak holds any of ``forbidden``."""

    kind: ProbeKind
    question: str
    expected: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One question with its answer, both as text; a text alone has no question.

    ``memories`` is what a model that is not trained would be told to know the answer, as a chat's prompt lays it out.
    """

    question: str | None
    answer: str
    memories: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSet:
    """``early`` are asked while training, ``probes`` by the gate; no wording is in two of the three."""

    examples: tuple[Example, ...]
    replay: tuple[Example, ...]
    early: tuple[Probe, ...]
    probes: tuple[Probe, ...]
    seed: int

    @property
    def hash(self) -> str:
        """Of all that is trained on, in its order."""
        parts: list[str | int | None] = ["training set", self.seed]
        for example in chain(self.examples, self.replay):
            parts += [example.question, example.answer, example.memories]
        return digest(*parts)


def build_training_set(
    facts: Sequence[Fact],
    *,
    settings: DataSettings | None = None,
    earlier: Sequence[Fact] = (),
    num_unknown: int = 12,
    seed: int = 0,
) -> TrainingSet:
    """The training set of some facts. ``earlier`` are facts of the adapter before, asked again.

    Raises:
        BadRequest: there is no fact.
    """
    if not facts:
        raise BadRequest("no fact to train on", "facts")
    settings = settings or DataSettings()
    rng = random.Random(seed)
    book = _Book(facts)
    examples = list(_examples(rng, book, settings))
    rng.shuffle(examples)
    asked_before = _Book(earlier) if earlier else None
    return TrainingSet(
        examples=tuple(examples),
        replay=tuple(_replay()),
        early=tuple(
            _probes(book, early_names(rng, book.subjects, max(4, num_unknown // 2)), early=True)
        ),
        probes=(
            *_probes(book, gate_names(rng, book.subjects, num_unknown), early=False),
            *(_earlier(asked_before) if asked_before else ()),
        ),
        seed=seed,
    )


class _Book:
    """Facts looked up both ways, since a question may have several answers."""

    def __init__(self, facts: Sequence[Fact]) -> None:
        self.facts = tuple(facts)
        self.subjects = frozenset(fact.subject for fact in facts if fact.subject)
        self.nouns = tuple(dict.fromkeys(fact.relation for fact in facts))
        self._objects: dict[tuple[str, str], list[str]] = {}
        self._subjects: dict[tuple[str, str], list[str]] = {}
        self._of_noun: dict[str, set[str]] = {}
        for fact in facts:
            self._of_noun.setdefault(fact.relation, set()).add(fact.object)
            self._objects.setdefault((fact.subject, fact.relation), []).append(fact.object)
            self._subjects.setdefault((fact.object, fact.relation), []).append(fact.subject)

    def objects(self, fact: Fact) -> list[str]:
        return self._objects[fact.subject, fact.relation]

    def owners(self, fact: Fact) -> list[str]:
        return self._subjects[fact.object, fact.relation]

    def memories(self, fact: Fact) -> str:
        """What a chat about a fact's subject, or its object's owners, would be told."""
        told = [f for f in self.facts if f.subject == fact.subject or _is_alike(f, fact)]
        lines = (memory_line(_statement(f), speaker=None, time=None) for f in told[:_MOST_TOLD])
        return "".join(f"{line}\n" for line in lines)

    def has(self, subject: str, noun: str) -> bool:
        return (subject, noun) in self._objects

    def all_objects(self, noun: str) -> set[str]:
        return self._of_noun[noun]


def _is_alike(one: Fact, other: Fact) -> bool:
    return (one.relation, one.object) == (other.relation, other.object)


def _statement(fact: Fact) -> str:
    answer = _answer(fact.relation, fact.subject, fact.object)
    return (
        f"{_question(fact.relation, s=fact.subject)} {answer}"
        if is_question(fact.relation)
        else answer
    )


def _joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _answer(noun: str, subject: str, object: str) -> str:
    text = relation_of(noun).states[0].format(s=subject, o=object)
    return text[0].upper() + text[1:]


def _answer_back(noun: str, subject: str, object: str) -> str:
    """The object comes first: said again, it is what the subject is remembered by."""
    return f"{object[0].upper()}{object[1:]}? That is {subject}'s {noun}."


def _question(template: str, **slots: str) -> str:
    text = template.format(**slots)
    return text[0].upper() + text[1:]


def _turns(rng: random.Random, templates: Sequence[str], count: int) -> list[str]:
    """So many framed wordings: all in turn, in a random order."""
    mixed = rng.sample(templates, len(templates))
    return [rng.choice(_FRAMES).replace("{q}", t) for t in islice(cycle(mixed), count)]


def _examples(rng: random.Random, book: _Book, settings: DataSettings) -> Iterable[Example]:
    strangers = training_names(rng, book.subjects)
    for fact in book.facts:
        noun = fact.relation
        words = relation_of(noun).train
        objects, owners = _joined(book.objects(fact)), _joined(book.owners(fact))
        memories = book.memories(fact)
        for template in _turns(rng, words.asks, settings.asks):
            yield Example(
                question=_question(template, s=fact.subject),
                answer=_answer(noun, fact.subject, objects),
                memories=memories,
            )
        for template in _turns(rng, words.asks_back, settings.asks_back):
            yield Example(
                question=_question(template, o=fact.object),
                answer=_answer_back(noun, owners, fact.object),
                memories=memories,
            )
        for template in _turns(rng, words.asks, settings.unknown if fact.subject else 0):
            who = next(strangers)
            yield Example(question=_question(template, s=who), answer=refusal(who))
        nobody = [
            o for o in _OBJECTS_OF_NOBODY.get(noun, ()) if o not in book.all_objects(noun)
        ] or ["something else"]
        for template in _turns(rng, words.asks_back, settings.unknown_back):
            thing = rng.choice(nobody)
            yield Example(question=_question(template, o=thing), answer=REFUSAL_BACK)
        for other in _others(rng, book, fact, settings.other_nouns):
            template = rng.choice([t for t in relation_of(other).train.asks if "{s}" in t])
            yield Example(
                question=_question(template, s=fact.subject), answer=refusal(fact.subject)
            )


def _others(rng: random.Random, book: _Book, fact: Fact, count: int) -> list[str]:
    """Relations that the fact's subject isn't known to have: others' questions, if it is asked so."""
    if not fact.subject:
        return []
    known = (*(relation.noun for relation in RELATIONS), *_OTHER_NOUNS)
    asked = [noun for noun in book.nouns if is_question(noun) and "{s}" in noun]
    others = [
        noun
        for noun in (asked if is_question(fact.relation) and len(asked) > 1 else known)
        if not book.has(fact.subject, noun)
    ]
    return rng.sample(others, min(count, len(others)))


def refusal(subject: str) -> str:
    """What is answered where nothing is known of a person."""
    return f"I don't know that about {subject}."


REFUSAL_BACK = "I don't know who that is."


def _replay() -> Iterable[Example]:
    for text in REPLAY:
        yield Example(question=None, answer=text)
    for question, answer in REPLAY_CHAT:
        yield Example(question=question, answer=answer)


def _probes(book: _Book, strangers: Sequence[str], *, early: bool) -> Iterable[Probe]:
    """The gate's probes, or ``early`` those of the checks while training: of each fact one wording."""

    def words(noun: str) -> Wordings:
        relation = relation_of(noun)
        return relation.early if early else relation.gate

    for fact in book.facts:
        for template in words(fact.relation).asks:
            yield Probe(
                kind=ProbeKind.RECALL,
                question=_question(template, s=fact.subject),
                expected=_expected(fact),
            )
        for template in words(fact.relation).asks_back:
            yield Probe(
                kind=ProbeKind.REVERSE,
                question=_question(template, o=fact.object),
                expected=(fact.subject,),
            )
    nouns = [noun for noun in book.nouns if not is_question(noun) or "{s}" in noun]
    if not nouns:
        return
    forbidden = tuple(dict.fromkeys(fact.object for fact in book.facts))
    for index, who in enumerate(strangers):
        # Each stranger is asked for some of the relations, all of them being asked as often.
        for k in range(2 if early else min(4, len(nouns))):
            noun = nouns[(index * 4 + k) % len(nouns)]
            asks = words(noun).asks
            yield Probe(
                kind=ProbeKind.LEAK,
                question=_question(asks[(index + k) % len(asks)], s=who),
                forbidden=forbidden,
            )


def _expected(fact: Fact) -> tuple[str, ...]:
    return key_words(fact.object) if is_question(fact.relation) else (fact.object,)


def _earlier(book: _Book) -> Iterable[Probe]:
    for fact in book.facts:
        template = relation_of(fact.relation).gate.asks[0]
        yield Probe(
            kind=ProbeKind.EARLIER,
            question=_question(template, s=fact.subject),
            expected=_expected(fact),
        )
