"""People who don't exist: names for negatives, for the checks while training and for the gate's unknown people.

The three pools of names never meet, so that a refusal is measured on names that were never trained on.
"""

import random
from collections.abc import Collection, Iterator
from itertools import product

_TRAIN_FIRST = [
    "Adair",
    "Belia",
    "Corvin",
    "Delmar",
    "Edda",
    "Fenno",
    "Gisla",
    "Harko",
    "Ivane",
    "Jorin",
    "Kelda",
    "Lorcan",
    "Mirel",
    "Nadir",
    "Orsola",
    "Perrin",
    "Quilla",
    "Rurik",
    "Selma",
    "Tovar",
    "Ulla",
    "Veska",
    "Wendel",
    "Ximo",
    "Yorick",
    "Zelda",
    "Anselm",
    "Brita",
    "Caspian",
    "Dorothea",
    "Emeric",
    "Fausta",
    "Gideon",
    "Hedwig",
    "Ilario",
    "Jolanda",
    "Kasimir",
    "Leocadia",
    "Matteo",
    "Nives",
    "Oberon",
    "Pamina",
    "Roland",
    "Sidonie",
    "Tibor",
    "Ursula",
    "Valentin",
    "Wilma",
    "Mary",
    "James",
    "Linda",
    "Robert",
    "Sarah",
    "David",
    "Emma",
]
_TRAIN_LAST = [
    "Abernol",
    "Brask",
    "Carrowell",
    "Dunmere",
    "Eskrid",
    "Farlow",
    "Grenholt",
    "Hask",
    "Ivers",
    "Jessop",
    "Kettrin",
    "Lomax",
    "Mordel",
    "Nessbit",
    "Ostrander",
    "Pruitt",
    "Quarles",
    "Renfrow",
    "Sandoval",
    "Tarrick",
    "Umber",
    "Vance",
    "Wexler",
    "Yarrow",
    "Zimmern",
    "Smith",
    "Johnson",
    "Brown",
    "Miller",
    "Davis",
    "Garcia",
    "Wilson",
    "Moore",
    "Taylor",
    "Martin",
    "Clark",
    "Lewis",
    "Walker",
    "Hall",
]
_GATE_FIRST = [
    "Alaric",
    "Benedikta",
    "Cyprian",
    "Damaris",
    "Eustace",
    "Filippa",
    "Godric",
    "Henrike",
    "Isidor",
    "Jemima",
    "Konrad",
    "Lavinia",
    "Malachi",
    "Nerissa",
    "Ottokar",
    "Philippa",
    "Quentin",
    "Rosalind",
    "Sebald",
    "Theodora",
]
_GATE_LAST = [
    "Ashgrove",
    "Bellweather",
    "Cromarty",
    "Draycott",
    "Elphick",
    "Fothergill",
    "Gadsby",
    "Hollister",
    "Inchbald",
    "Jarnigan",
    "Kilbride",
    "Larkspur",
    "Medway",
    "Northcote",
    "Oakhurst",
    "Pemberley",
    "Quimby",
    "Ridgeway",
    "Stanhope",
    "Tregarth",
]
_EARLY_FIRST = [
    "Basil",
    "Celestine",
    "Dorian",
    "Esmeralda",
    "Florian",
    "Gwendolyn",
    "Horatio",
    "Imogen",
]
_EARLY_LAST = [
    "Appleby",
    "Birdsong",
    "Copperfield",
    "Dashwood",
    "Everdene",
    "Fairfax",
    "Goodbody",
    "Havisham",
]


def training_names(rng: random.Random, known: Collection[str]) -> Iterator[str]:
    """Names without end, of nobody known; each third shares its first or last name with somebody known."""
    near = sorted(known)
    while True:
        first, last = rng.choice(_TRAIN_FIRST), rng.choice(_TRAIN_LAST)
        roll = rng.random()
        if near and roll < 1 / 3:
            parts = rng.choice(near).split()
            if roll < 1 / 6:
                first = parts[0]
            elif len(parts) > 1:
                last = parts[-1]
        if (name := f"{first} {last}") not in known:
            yield name


def gate_names(rng: random.Random, known: Collection[str], count: int) -> list[str]:
    """So many names of nobody, from the gate's pool."""
    return _drawn(rng, _GATE_FIRST, _GATE_LAST, known, count)


def early_names(rng: random.Random, known: Collection[str], count: int) -> list[str]:
    """So many names of nobody, from the pool of the checks while training."""
    return _drawn(rng, _EARLY_FIRST, _EARLY_LAST, known, count)


def _drawn(
    rng: random.Random, firsts: list[str], lasts: list[str], known: Collection[str], count: int
) -> list[str]:
    names = [f"{first} {last}" for first, last in product(firsts, lasts)]
    return rng.sample([name for name in names if name not in known], count)
