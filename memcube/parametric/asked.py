"""Facts from questions with their answers, as a list of frequent questions holds them.

"Q: Where did Ada learn to sail? A: In Ostvik." is a fact of Ada whose relation is the question itself,
with the name taken out: "Where did {s} learn to sail?". What is trained on are other wordings of it,
made by rules: asked indirectly, with its parts in another order, with another question word, in key
words. The question as it stands is asked by the gate alone.
"""

import re
from functools import cache
from typing import NamedTuple

from memcube.parametric.wordings import Relation, Wordings

_PAIR = re.compile(
    r"(?:Q|Question): ?(?P<q>[^{}]{3,200}?\?) ?(?:A|Answer): ?(?P<a>[^{} ][^{}]{0,119}?)[.!]?"
)
_NEXT = re.compile(r" (?=(?:Q|Question): )")
_NAME = re.compile(
    r"\b[A-Z][a-z][\w.-]*(?: (?:(?:van|von|de|da|di|del|der|la|le) )?[A-Z][a-z][\w.-]*){0,2}"
)
_NO_NAMES = frozenset(
    [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
        "Monday",
        "Tuesday",
        "Wednesday",
        "Thursday",
        "Friday",
        "Saturday",
        "Sunday",
        "Christmas",
        "Easter",
    ]
)
_HELPING = frozenset(
    [
        "do",
        "does",
        "did",
        "is",
        "are",
        "was",
        "were",
        "has",
        "have",
        "had",
        "can",
        "could",
        "will",
        "would",
        "should",
        "may",
        "might",
        "must",
    ]
)
_BEING = frozenset(("is", "are", "was", "were"))
_ASKING = frozenset(["what", "which", "who", "whom", "whose", "when", "where", "why", "how"])
_LEADING = frozenset(["in", "on", "at", "for", "to", "from", "of", "by", "with", "about"])
_LEFT_OUT = frozenset(
    [
        "a",
        "an",
        "the",
        "of",
        "and",
        "or",
        "to",
        "in",
        "on",
        "at",
        "for",
        "with",
        "by",
        "from",
        "as",
        "about",
        "that",
        "this",
        "it",
        "its",
        "her",
        "his",
        "their",
        "she",
        "he",
        "they",
        "be",
        "been",
        "being",
    ]
)
_ASKED_ELSE = {
    "when": ("at what time", "on which date"),
    "where": ("in which place", "at what place"),
    "why": ("for what reason", "for which reason"),
    "who": ("which person", "what person"),
    "how": ("in what way", "in which way"),
    "how many": ("what number of", "which number of"),
    "how long": ("for how much time", "for what time"),
    "how often": ("how many times", "how frequently"),
    "what": ("which thing", "what thing"),
    "what kind of": ("which sort of", "what sort of"),
    "what type of": ("which kind of", "what sort of"),
}


class Asked(NamedTuple):
    """``relation`` is the question with ``{s}`` for the subject's name, which is empty if it names
    nobody."""

    subject: str
    relation: str
    answer: str


def read_pairs(text: str) -> list[Asked]:
    """The questions with their answers that a text of one line is made of; empty if it is anything
    else too."""
    found = [_PAIR.fullmatch(part) for part in _NEXT.split(text)]
    return [_asked(pair) for pair in found if pair] if all(found) else []


def _asked(pair: re.Match[str]) -> Asked:
    question, subject = pair["q"], _subject(pair["q"])
    if subject:
        question = re.sub(rf"\b{re.escape(subject)}\b", "{s}", question)
    return Asked(subject, question, pair["a"])


def is_question(relation: str) -> bool:
    """Whether a fact's relation is a question."""
    return relation.endswith("?")


def key_words(answer: str) -> tuple[str, ...]:
    """The words of an answer that must be said."""
    words = re.findall(r"\w[\w'-]*", answer.lower())
    return tuple(word for word in words if word not in _LEFT_OUT) or (answer,)


@cache
def question_relation(question: str) -> Relation:
    """The wordings of a question that stands for a relation."""
    asking, rest = _parts(question)
    inverted = _inverted(rest)
    indirect = f"{asking or 'whether'} {inverted}"
    about = "About {s}: " if "{s}" in question else "In short: "
    asks = [
        f"Tell me {indirect}.",
        f"Do you know {indirect}?",
        f"I'd like to know {indirect}.",
        f"Can you recall {indirect}?",
        f"I forgot {indirect}.",
        f"Remind me {indirect}.",
        f"Somebody asked me {indirect}.",
        f"{about}{indirect}?",
        f"It would help to know {indirect}.",
    ]
    if asking:
        asks += [f"{inverted}: {asking}?", f"{inverted} - {asking} is it?"]
        asks += [f"{else_} {rest}?" for else_ in _else(asking)]
        asks += [f"Tell me {else_} {inverted}." for else_ in _else(asking)]
    words = [word for word in rest.split() if word.lower() not in _LEFT_OUT | _HELPING]
    if len(words) > 1:
        keys = " ".join(word.strip(",") for word in words)
        asks += [f"{keys}: {asking or 'yes or no'}?", f"{asking}, {keys}?".removeprefix(", ")]
    return Relation(
        noun=question,
        states=("{o}.",),
        train=Wordings(asks=tuple(dict.fromkeys(asks)), asks_back=()),
        early=Wordings(asks=(f"One more thing, please: {indirect}?",), asks_back=()),
        gate=Wordings(asks=(question,), asks_back=()),
    )


def _subject(question: str) -> str:
    """The first name in a question; empty if there is none."""
    first = question.split()[0]
    # The first word has its capital for the sentence's sake.
    start = len(first) if first.lower() in _ASKING | _HELPING | _LEADING else 0
    for found in _NAME.finditer(question, start):
        if not _NO_NAMES & set(found[0].split()):
            return found[0]
    return ""


def _parts(question: str) -> tuple[str, str]:
    """What asks ("what kind of pets"), in lower case, and the rest; neither of them is the other's.
    A question for yes or no has nothing that asks."""
    words = question.removesuffix("?").split()
    words[0] = words[0] if words[0].startswith("{s}") else words[0][0].lower() + words[0][1:]
    if not any(word in _ASKING for word in words[:2]):
        return "", " ".join(words)
    for index, word in enumerate(words):
        if word in _HELPING:
            return " ".join(words[:index]), " ".join(words[index:])
    # "Who taught {s} to sail": no helping verb.
    return words[0], " ".join(words[1:])


def _inverted(rest: str) -> str:
    """The rest with its helping verb behind the subject: "did {s} go" as "{s} did go"."""
    helping, _, after = rest.partition(" ")
    if helping not in _HELPING or not after:
        return rest
    first, _, more = after.partition(" ")
    if first == "{s}":
        return f"{first} {helping} {more}".strip()
    if helping in _BEING:
        front, _, last = after.rpartition(" ")
        return f"{front} {helping} {last}" if last in _LEADING else f"{after} {helping}"
    return rest


def _else(asking: str) -> tuple[str, ...]:
    """Other words that ask for the same."""
    for number in (3, 2, 1):
        words = asking.split()
        if found := _ASKED_ELSE.get(" ".join(words[:number])):
            if number == 1 and len(words) > 1:
                break
            return tuple(" ".join([else_, *words[number:]]) for else_ in found)
    other = {"what": "which", "which": "what"}
    first, _, more = asking.partition(" ")
    return (f"{other[first]} {more}",) if more and first in other else ()
