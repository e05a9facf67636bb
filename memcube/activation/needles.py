"""Memories made from templates, with facts that only one of them holds, and questions for these.

What the fidelity gate and the benchmark run on: no data file is needed, and each seed gives other
people, places, codes and words. Lines look as ``memcube.context`` lays memories out.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count

from memcube.context import CLOSING, OPENING, memory_line

Tokenize = Callable[[str], list[int]]

_NAMES = [
    "Anna",
    "Ben",
    "Carla",
    "Dmitri",
    "Elif",
    "Farid",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Kira",
    "Liam",
    "Maya",
    "Noor",
    "Olga",
    "Pavel",
    "Quinn",
    "Rosa",
    "Sven",
    "Tara",
    "Umar",
    "Vera",
    "Wen",
    "Yusuf",
    "Zoe",
    "Amara",
    "Bruno",
    "Chloe",
]
_PLACES = [
    "Bergen",
    "Porto",
    "Leipzig",
    "Osaka",
    "Quito",
    "Lyon",
    "Tartu",
    "Galway",
    "Cusco",
    "Malmo",
    "Split",
    "Turin",
    "Kazan",
    "Davos",
    "Gent",
    "Haifa",
    "Izmir",
    "Jena",
    "Kobe",
    "Lugano",
    "Nantes",
    "Oulu",
    "Perth",
    "Riga",
]
_COLOURS = [
    "red",
    "blue",
    "green",
    "yellow",
    "white",
    "black",
    "purple",
    "orange",
    "silver",
    "brown",
]
_THINGS = [
    "flowerpot",
    "toolbox",
    "suitcase",
    "lantern",
    "umbrella",
    "teapot",
    "ladder",
    "bicycle",
    "drum",
    "basket",
    "bench",
    "barrel",
    "bookcase",
    "mirror",
    "rug",
    "clock",
]
_FOODS = [
    "lentil soup",
    "mushroom risotto",
    "plum dumplings",
    "fish tacos",
    "pumpkin curry",
    "rye bread",
    "fig tart",
    "onion pie",
    "bean stew",
    "lemon cake",
    "beet salad",
    "rice pudding",
]
_PETS = [
    "Biscuit",
    "Comet",
    "Domino",
    "Fennel",
    "Goblin",
    "Hazel",
    "Juniper",
    "Maple",
    "Nacho",
    "Pepper",
    "Tofu",
    "Waffle",
    "Ziggy",
    "Mango",
]
_HOBBIES = [
    "pottery",
    "rock climbing",
    "chess",
    "birdwatching",
    "salsa dancing",
    "beekeeping",
    "archery",
    "woodcarving",
    "kayaking",
    "calligraphy",
    "astronomy",
    "fencing",
]
_JOBS = [
    "nurse",
    "architect",
    "baker",
    "electrician",
    "translator",
    "geologist",
    "librarian",
    "pilot",
    "tailor",
    "vet",
    "violinist",
    "surveyor",
]
_MONTHS = [
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
]
_ITEMS = [
    "a raincoat",
    "two tickets",
    "a used printer",
    "walking boots",
    "a box of candles",
    "a desk lamp",
    "a map of the region",
    "some seeds",
    "a sewing kit",
    "a phone charger",
    "a pair of skis",
    "a coffee mill",
]

_FILLERS = (
    "I went to {place} with {name} last weekend and we stayed {n} nights, the weather was {mood}.",
    "My sister wants to learn {hobby}, so we looked for a course that starts in {month}.",
    "We cooked {food} for {n} people yesterday; it took longer than I thought, but it was {mood}.",
    "Can you remind me to call the {job} about the invoice before the end of {month}?",
    "I bought {item} for {name}, the shop had only {n} left.",
    "{name} says that the meeting about the budget is moved to the {n}th of {month}.",
    "The train to {place} was {n} minutes late, so I missed the start of the {hobby} evening.",
    "I prefer window seats and I never drink coffee after four, please keep that in mind.",
    "Our neighbour painted the fence {colour}, which looks {mood} beside the {thing}.",
    "For the trip to {place} we need {item}, sun cream and something to read.",
    "I read about {hobby} all evening; the book has {n} chapters and is rather {mood}.",
    "{name} used to work as a {job} in {place} before the company closed in {month}.",
    "The doctor told me to walk for {n} minutes a day and to eat less {food}.",
    "We might adopt a cat, but {name} is allergic, so nothing is decided yet.",
    "Last {month} I lost {item} somewhere between {place} and the airport.",
    "The recipe for {food} needs {n} spoons of oil, I always take less than that.",
    "I have been a {job} for {n} years and I still like it, mostly because of the people.",
    "{name} and I disagree about the holidays: one wants {place}, the other the mountains.",
    "Please write down that the {thing} in the hall must be repaired before {month}.",
    "Thanks, that was helpful. I will try the {colour} one first and tell you how it went.",
)
_MOODS = ["lovely", "awful", "strange", "quiet", "cheerful", "dull", "noisy", "splendid"]


@dataclass(frozen=True, slots=True)
class _Fact:
    statement: str
    question: str
    answer: str


def _facts(rng: random.Random, who: str, place: str) -> list[_Fact]:
    """One fact of each kind about a person at a place."""
    colour, thing, food = rng.choice(_COLOURS), rng.choice(_THINGS), rng.choice(_FOODS)
    code, day, month = str(rng.randint(1000, 9999)), rng.randint(2, 28), rng.choice(_MONTHS)
    pet, hobby, job = rng.choice(_PETS), rng.choice(_HOBBIES), rng.choice(_JOBS)
    friend = rng.choice([name for name in _NAMES if name != who])
    return [
        _Fact(
            f"The code of {who}'s locker in {place} is {code}.",
            f"What is the code of {who}'s locker in {place}?",
            code,
        ),
        _Fact(
            f"{who} hid the spare key in {place} under the {colour} {thing}.",
            f"Under what did {who} hide the spare key in {place}?",
            f"{colour} {thing}",
        ),
        _Fact(
            f"The dog that {who} found in {place} is called {pet}.",
            f"What is the name of the dog that {who} found in {place}?",
            pet,
        ),
        _Fact(
            f"{who} will move to {place} on {month} {day}.",
            f"On which date will {who} move to {place}?",
            f"{month} {day}",
        ),
        _Fact(
            f"The dish that {who} ordered at the restaurant in {place} was {food}.",
            f"Which dish did {who} order at the restaurant in {place}?",
            food,
        ),
        _Fact(
            f"The hobby that {who} took up in {place} is {hobby}.",
            f"Which hobby did {who} take up in {place}?",
            hobby,
        ),
        _Fact(
            f"In {place}, {who} is employed as a {job}.",
            f"What is {who} employed as in {place}?",
            job,
        ),
        _Fact(
            f"The person who lent {who} the money in {place} was {friend}.",
            f"Who lent {who} the money in {place}?",
            friend,
        ),
    ]


_NUM_KINDS = len(_facts(random.Random(0), "", ""))


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """``ids`` are all that follows the memories. Segment ``segment`` alone holds the answer."""

    segment: int
    ids: tuple[int, ...]
    text: str
    answer: str

    def answered_by(self, text: str) -> bool:
        """Whether a text says it, whatever is around it."""
        return self.answer.lower() in " ".join(text.lower().split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A shared prefix, segments of memories behind it, and a question for each segment."""

    prefix_ids: tuple[int, ...]
    segments: tuple[tuple[int, ...], ...]
    questions: tuple[Question, ...]


def make_cases(
    chat: Callable[[str, str], str],
    tokenize: Tokenize,
    *,
    num_cases: int,
    segment_tokens: int = 256,
    num_segments: tuple[int, ...] = (2, 3, 4),
    seed: int = 0,
) -> list[Case]:
    """Cases of two to four segments. ``chat`` renders a system text and a question for the model."""
    rng = random.Random(seed)
    sizes = [num_segments[index % len(num_segments)] for index in range(num_cases)]
    return [_case(rng, chat, tokenize, size, segment_tokens) for size in sizes]


def _case(
    rng: random.Random,
    chat: Callable[[str, str], str],
    tokenize: Tokenize,
    num_segments: int,
    segment_tokens: int,
) -> Case:
    people, places = rng.sample(_NAMES, num_segments), rng.sample(_PLACES, num_segments)
    # Each fact of a case is of another kind, as a small model takes one code for another.
    kinds = rng.sample(range(_NUM_KINDS), num_segments)
    marker = "\x00"
    segments: list[tuple[int, ...]] = []
    questions: list[Question] = []
    prefix = ""
    at = datetime(2025, 1, 1, tzinfo=UTC) + timedelta(minutes=rng.randrange(400_000))
    for index, (who, place) in enumerate(zip(people, places, strict=True)):
        fact = _facts(rng, who, place)[kinds[index]]
        texts = _texts(rng, fact.statement, {who, place})
        segment, at = _segment(rng, tokenize, texts, segment_tokens, at)
        segments.append(segment)
        text = chat(f"You are a helpful assistant.\n\n{OPENING}{marker}{CLOSING}", fact.question)
        prefix, _, after = text.partition(marker)
        questions.append(
            Question(
                segment=index, ids=tuple(tokenize(after)), text=fact.question, answer=fact.answer
            )
        )
    return Case(
        prefix_ids=tuple(tokenize(prefix)), segments=tuple(segments), questions=tuple(questions)
    )


def _texts(rng: random.Random, statement: str, taken: set[str]) -> Iterator[tuple[str, str]]:
    """Speakers and what they say, without end; the statement is among the first five."""
    names = [name for name in _NAMES if name not in taken]
    places = [place for place in _PLACES if place not in taken]
    at = rng.randrange(5)
    for index in count():
        text = rng.choice(_FILLERS).format(
            name=rng.choice(names),
            place=rng.choice(places),
            n=rng.randint(3, 40),
            hobby=rng.choice(_HOBBIES),
            month=rng.choice(_MONTHS),
            food=rng.choice(_FOODS),
            job=rng.choice(_JOBS),
            item=rng.choice(_ITEMS),
            colour=rng.choice(_COLOURS),
            thing=rng.choice(_THINGS),
            mood=rng.choice(_MOODS),
        )
        yield rng.choice(names), statement if index == at else text


def _segment(
    rng: random.Random,
    tokenize: Tokenize,
    texts: Iterator[tuple[str, str]],
    num_tokens: int,
    at: datetime,
) -> tuple[tuple[int, ...], datetime]:
    """Lines of so many tokens at most, and the time of the last."""
    ids: list[int] = []
    for speaker, text in texts:
        at += timedelta(minutes=rng.randrange(3, 2000))
        line = tokenize(memory_line(text, speaker=speaker, time=at) + "\n")
        if len(ids) + len(line) > num_tokens:
            break
        ids += line
    return tuple(ids), at
