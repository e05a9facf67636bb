"""What cubes say, sentence by sentence, each about somebody who is named.

A turn of a conversation speaks of its speaker as "I": said of the speaker by name it can be read as a
fact (``facts``). What a cube quotes of others, asks or supposes is left as it is, and fits no wording.
"""

import re
from collections.abc import Iterable, Iterator

from memcube.cube import MemCube
from memcube.parametric.facts import CubeVersion, Read, read_facts

_ASKED = re.compile(r"\s*Q(?:uestion)?: ", re.IGNORECASE)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_LEAD = re.compile(
    r"^(?:(?:well|oh|hi|hey|yes|also|and|so|please remember that|remember that|remember:|by the way),? )+",
    re.IGNORECASE,
)
_MINE = re.compile(r"\b[Mm]y\b")
# The verbs of the wordings in ``facts``, and what they are when somebody else is spoken of.
_OF_OTHERS = {
    "am": "is",
    "'m": "is",
    "was": "was",
    "like": "likes",
    "live": "lives",
    "work": "works",
    "have": "has",
    "spend": "spends",
    "play": "plays",
    "make": "makes",
    "drive": "drives",
    "study": "studies",
}
_I = re.compile(
    rf"I(?P<verb>'m| (?:{'|'.join(v for v in _OF_OTHERS if v[0] != chr(39))}))\b(?P<rest>.*)"
)


def read_cubes(cubes: Iterable[MemCube]) -> Read:
    """The facts of cubes by the wordings of ``facts``, and the sentences that fit none."""
    return read_facts(statements_of(cubes))


def statements_of(cubes: Iterable[MemCube]) -> Iterator[tuple[CubeVersion, str]]:
    """The sentences of leaves, in their order, with the version that each stands in."""
    for cube in cubes:
        source = CubeVersion(cube.id, cube.version)
        speaker = cube.descriptive.speaker
        if _ASKED.match(cube.text):
            yield source, cube.text
            continue
        for sentence in _SENTENCE.split(cube.text):
            if text := _LEAD.sub("", sentence.strip()):
                yield source, of_speaker(text, speaker) if speaker else text


def of_speaker(sentence: str, speaker: str) -> str:
    """A sentence in which "I" and "my" are said of the speaker by name."""
    sentence = sentence[:1].upper() + sentence[1:]
    if sentence.startswith("My "):
        return f"{speaker}'s {_MINE.sub('their', sentence[3:])}"
    found = _I.fullmatch(sentence)
    if found is None:
        return sentence
    verb = _OF_OTHERS[found["verb"].strip()]
    return f"{speaker} {verb}{_MINE.sub('their', found['rest'])}"
