"""Facts: what a statement says, as a subject, a relation and an object.

A known relation (``RELATIONS``) has its own wordings; any other attribute ("Ada's shoe size is 39")
gets those of its noun. A statement that fits no wording is no fact here: the caller is told, and may
have a model read it (``facts_llm``).

Each relation's wordings are in three sets that never meet: those trained on, those that stop the
training early, and those that the gate asks. All are templates over ``{s}``, ``{o}`` and ``{n}``.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple


class CubeVersion(NamedTuple):
    """The version of a cube that a fact was read from."""

    id: str
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """``relation`` is a noun, such as "favourite drink": the subject's relation is the object."""

    subject: str
    relation: str
    object: str
    source: CubeVersion | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wordings:
    """Questions for the object, and for the subject, in one of the three sets."""

    asks: tuple[str, ...]
    asks_back: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """``states[0]`` is the sentence that answers. What is read back is any of ``states``."""

    noun: str
    states: tuple[str, ...]
    train: Wordings
    early: Wordings
    gate: Wordings


def _own(
    noun: str,
    states: Sequence[str],
    asks: Sequence[str],
    asks_back: Sequence[str],
    early: tuple[str, str],
    gate: tuple[Sequence[str], Sequence[str]],
) -> Relation:
    """A relation with wordings of its own before those of its noun."""
    plain = _of_noun(noun)
    return Relation(
        noun=noun,
        states=(*states, *plain.states),
        train=Wordings(
            asks=(*asks, *plain.train.asks), asks_back=(*asks_back, *plain.train.asks_back)
        ),
        early=Wordings(asks=(early[0],), asks_back=(early[1],)),
        gate=Wordings(asks=tuple(gate[0]), asks_back=tuple(gate[1])),
    )


def _of_noun(noun: str) -> Relation:
    """The wordings that any attribute has."""

    def named(*templates: str) -> tuple[str, ...]:
        return tuple(template.replace("{n}", noun) for template in templates)

    return Relation(
        noun=noun,
        states=named("{s}'s {n} is {o}.", "The {n} of {s} is {o}."),
        train=Wordings(
            asks=named(
                "What is {s}'s {n}?",
                "What is the {n} of {s}?",
                "Tell me {s}'s {n}.",
                "Do you know {s}'s {n}?",
                "Name the {n} of {s}.",
                "{s}: what is the {n}?",
                "I forgot {s}'s {n}. What is it?",
                "About {s}: which {n}?",
            ),
            asks_back=named(
                "Whose {n} is {o}?",
                "Whose {n} is it: {o}?",
                "Which person's {n} is {o}?",
                "{o} is the {n} of which person?",
                "Name the person whose {n} is {o}.",
            ),
        ),
        early=Wordings(
            asks=named("Please remind me what {s}'s {n} is."),
            asks_back=named("I know somebody's {n} is {o}. Whose?"),
        ),
        gate=Wordings(
            asks=named(
                "Can you say what {s}'s {n} would be?",
                "I need the {n} that {s} has. Which one is it?",
                "When it comes to {s}, what do you know of the {n}?",
            ),
            asks_back=named(
                "Of which person is {o} the {n}?",
                "Somebody has {o} as {n}. Who might that be?",
            ),
        ),
    )


RELATIONS = (
    _own(
        "favourite drink",
        ["{s} likes to drink {o}."],
        ["What does {s} like to drink?", "Which drink does {s} like best?", "What does {s} drink?"],
        ["Who likes to drink {o}?", "Who loves {o}?", "Which person likes {o} best?"],
        ("What would {s} order to drink?", "Who would order {o}?"),
        (
            [
                "What should I pour for {s}?",
                "Which beverage does {s} prefer?",
                "{s} is thirsty. What drink would please {s}?",
            ],
            ["Whom should I serve {o}?", "Who prefers {o}?"],
        ),
    ),
    _own(
        "home town",
        ["{s} lives in {o}.", "{s}'s home is in {o}."],
        ["Where does {s} live?", "Which town does {s} live in?", "In what place does {s} live?"],
        ["Who lives in {o}?", "Which person lives in {o}?", "Who has a home in {o}?"],
        ("Where is {s}'s home?", "Whose home is in {o}?"),
        (
            [
                "In which town would I find {s}?",
                "Where should I go to visit {s}?",
                "Which place does {s} call home?",
            ],
            ["Whom could I visit in {o}?", "Who calls {o} home?"],
        ),
    ),
    _own(
        "job",
        ["{s} works as {o}.", "{s} is {o} by profession."],
        ["What does {s} work as?", "What does {s} do for a living?", "What work does {s} do?"],
        ["Who works as {o}?", "Which person works as {o}?", "Who is {o} by profession?"],
        ("What is {s} by trade?", "Who is {o} by trade?"),
        (
            [
                "What is {s}'s occupation?",
                "How does {s} earn money?",
                "Which profession does {s} have?",
            ],
            ["Who earns money as {o}?", "Whose occupation is {o}?"],
        ),
    ),
    _own(
        "pet",
        ["{s} has {o} as a pet."],
        ["Which animal does {s} keep?", "What pet does {s} have?", "What does {s} keep at home?"],
        ["Who keeps {o}?", "Who has {o} as a pet?", "Which person keeps {o}?"],
        ("Which animal lives with {s}?", "With whom does {o} live?"),
        (
            [
                "What kind of animal does {s} own?",
                "Which animal does {s} feed every day?",
                "{s} has an animal. Which one?",
            ],
            ["Who owns {o}?", "Who feeds {o} every day?"],
        ),
    ),
    _own(
        "hobby",
        ["{s} spends free time on {o}."],
        [
            "What does {s} enjoy?",
            "What does {s} do in free time?",
            "How does {s} spend free time?",
        ],
        ["Who enjoys {o}?", "Who spends free time on {o}?", "Which person enjoys {o}?"],
        ("What does {s} do at weekends?", "Who does {o} at weekends?"),
        (
            [
                "Which pastime does {s} have?",
                "What does {s} do for fun?",
                "After work, what is {s} busy with?",
            ],
            ["Who does {o} for fun?", "Whose pastime is {o}?"],
        ),
    ),
    _own(
        "favourite dish",
        ["{s} likes to eat {o}."],
        ["What does {s} like to eat?", "Which dish does {s} like best?", "What does {s} eat?"],
        ["Who likes to eat {o}?", "Who is fond of {o}?", "Which person eats {o}?"],
        ("What would {s} order for dinner?", "Who would order {o} for dinner?"),
        (
            [
                "Which meal should I cook for {s}?",
                "What food makes {s} happy?",
                "{s} is hungry. Which meal would please {s}?",
            ],
            ["For whom should I cook {o}?", "Whom does a plate of {o} make happy?"],
        ),
    ),
    _own(
        "instrument",
        ["{s} plays {o}.", "{s} makes music on {o}."],
        ["What does {s} play?", "Which instrument does {s} play?", "On what does {s} make music?"],
        ["Who plays {o}?", "Who makes music on {o}?", "Which person plays {o}?"],
        ("What does {s} play in the band?", "Who plays {o} in the band?"),
        (
            [
                "Which instrument did {s} learn?",
                "What would {s} play at a concert?",
                "What does {s} practise on every evening?",
            ],
            ["Who learned {o}?", "Who could play {o} at a concert?"],
        ),
    ),
    _own(
        "birthplace",
        ["{s} was born in {o}."],
        ["Where was {s} born?", "Where does {s} come from?", "In which place was {s} born?"],
        ["Who was born in {o}?", "Who comes from {o}?", "Which person was born in {o}?"],
        ("From where is {s}?", "Who is from {o}?"),
        (
            [
                "In which town did {s} come into the world?",
                "Where did the life of {s} begin?",
                "Which place does {s}'s passport name as the place of birth?",
            ],
            ["Who came into the world in {o}?", "Whose life began in {o}?"],
        ),
    ),
    _own(
        "vehicle",
        ["{s} drives {o}."],
        ["What does {s} drive?", "Which vehicle does {s} drive?", "With what does {s} travel?"],
        ["Who drives {o}?", "Who travels with {o}?", "Which person drives {o}?"],
        ("With what does {s} come to work?", "Who comes to work with {o}?"),
        (
            [
                "What would be parked before {s}'s house?",
                "How does {s} get around?",
                "Which vehicle belongs to {s}?",
            ],
            ["To whom does {o} belong?", "Who gets around with {o}?"],
        ),
    ),
    _own(
        "subject of study",
        ["{s} studies {o}."],
        ["What does {s} study?", "Which subject does {s} study?", "What did {s} study?"],
        ["Who studies {o}?", "Who studied {o}?", "Which person studies {o}?"],
        ("What does {s} learn at the university?", "Who learns {o} at the university?"),
        (
            [
                "Which courses does {s} take?",
                "In which field does {s} want a degree?",
                "What are {s}'s textbooks about?",
            ],
            ["Who takes courses in {o}?", "Who wants a degree in {o}?"],
        ),
    ),
    _own(
        "fear",
        ["{s} is afraid of {o}."],
        ["What is {s} afraid of?", "What does {s} fear?", "Of what is {s} afraid?"],
        ["Who is afraid of {o}?", "Who fears {o}?", "Which person is afraid of {o}?"],
        ("What frightens {s}?", "Whom do {o} frighten?"),
        (
            [
                "What does {s} dread?",
                "What makes {s} nervous?",
                "From what would {s} run away?",
            ],
            ["Who dreads {o}?", "Who would run away from {o}?"],
        ),
    ),
    _own(
        "allergy",
        ["{s} is allergic to {o}."],
        ["What is {s} allergic to?", "What can't {s} eat?", "To what is {s} allergic?"],
        ["Who is allergic to {o}?", "Who can't eat {o}?", "Which person is allergic to {o}?"],
        ("What must {s} avoid at table?", "Who must avoid {o} at table?"),
        (
            [
                "What makes {s} ill when eaten?",
                "Which food should I keep away from {s}?",
                "What does {s} have a bad reaction to?",
            ],
            ["Who has a bad reaction to {o}?", "From whom should I keep {o} away?"],
        ),
    ),
)

_BY_NOUN = {relation.noun: relation for relation in RELATIONS}


@cache
def relation_of(noun: str) -> Relation:
    """The wordings of a known relation, or those that any noun has."""
    return _BY_NOUN.get(noun) or _of_noun(noun)


# -- reading statements

_NAME = r"(?P<s>[A-Z][\w'.-]*(?: (?:[a-z]{1,3} )?[A-Z][\w'.-]*){0,3}?)"
# "drives to work" names no vehicle, and who plays chess plays no instrument.
_OBJECT = r"(?P<o>(?!(?:to|for|with|in|at|on|by|from|and|as|very|too|not) )[^.!?]{1,120}?)"
_INSTRUMENT = r"(?P<o>(?:the|an?) [^.!?]{1,120}?)"
_NOUN = r"(?P<n>[a-z][a-z -]{1,40}?)"
_OPEN = (r"{s}'s {n} is {o}.", r"The {n} of {s} is {o}.")


def _pattern(template: str, object: str = _OBJECT) -> re.Pattern[str]:
    text = re.escape(template.removesuffix(".")).replace(r"\ ", " ")
    for slot, pattern in (("s", _NAME), ("o", object), ("n", _NOUN)):
        text = text.replace(rf"\{{{slot}\}}", pattern)
    return re.compile(rf"{text}[.!]?")


_KNOWN = [
    (relation.noun, _pattern(state, _INSTRUMENT if relation.noun == "instrument" else _OBJECT))
    for relation in RELATIONS
    for state in relation.states
]
_ANY = [_pattern(template) for template in _OPEN]


def read_fact(statement: str, source: CubeVersion | None = None) -> Fact | None:
    """What one sentence says of one subject; None where no wording fits it."""
    text = " ".join(statement.split())
    for noun, pattern in _KNOWN:
        if found := pattern.fullmatch(text):
            return Fact(subject=found["s"], relation=noun, object=found["o"], source=source)
    for pattern in _ANY:
        if found := pattern.fullmatch(text):
            return Fact(subject=found["s"], relation=found["n"], object=found["o"], source=source)
    return None


class Read(NamedTuple):
    """``unread`` are the statements that no wording fits."""

    facts: list[Fact]
    unread: list[tuple[CubeVersion, str]]


def read_facts(statements: Iterable[tuple[CubeVersion, str]]) -> Read:
    """The facts of statements, in their order; of two that say the same, the first."""
    facts: dict[tuple[str, str, str], Fact] = {}
    unread: list[tuple[CubeVersion, str]] = []
    for source, text in statements:
        fact = read_fact(text, source)
        if fact is None:
            unread.append((source, text))
        else:
            facts.setdefault((fact.subject, fact.relation, fact.object), fact)
    return Read(list(facts.values()), unread)
