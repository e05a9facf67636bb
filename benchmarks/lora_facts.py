"""Invented people with invented facts, for the benchmark of the parametric tier."""

import random

from memcube.parametric.facts import Fact

_FIRST = [
    "Zorvan",
    "Tilda",
    "Brannoc",
    "Ysolde",
    "Kaveh",
    "Mirabel",
    "Otis",
    "Petra",
    "Lazlo",
    "Hanneke",
    "Dario",
    "Freya",
    "Amadou",
    "Sunniva",
    "Rasmus",
    "Nuala",
    "Ignace",
    "Bettina",
    "Thaddeus",
    "Coralie",
]
_LAST = [
    "Pell",
    "Marrow",
    "Ackland",
    "Quist",
    "Tamsin",
    "Verhoeven",
    "Okoro",
    "Lindqvist",
    "Baptiste",
    "Crane",
    "Szabo",
    "Halloran",
    "Ferreira",
    "Nyberg",
    "Ostrowski",
    "Delacroix",
    "Whitlock",
    "Imanov",
    "Rademaker",
    "Solis",
]
_OBJECTS = {
    "favourite drink": "kumquat tea|birch sap|cold cocoa with mint|plum nectar|fennel lemonade|beetroot kvass|salted almond milk|rosehip punch|pear cider|chicory coffee",
    "home town": "Brellin|Castermoor|Ostvik|Palomera|Dunhaven|Kirkelund|Varnay|Sandgate|Trebova|Mistral Bay",
    "job": "a beekeeper|a lighthouse keeper|a clock repairer|a glass blower|a bridge inspector|a map maker|a piano tuner|a ferry captain|a puppet carver|a seed collector",
    "pet": "a blue parrot|a tortoise|a hedgehog|an iguana|a lame donkey|a white ferret|a raven|a pygmy goat|a chameleon|an old greyhound",
    "hobby": "origami|fencing|stargazing|bookbinding|curling|falconry|mosaic making|cave diving|kite building|topiary",
    "favourite dish": "chestnut dumplings|pickled herring|saffron risotto|lentil pancakes|stuffed quinces|nettle soup|goat curry|rye gnocchi|squid stew|walnut ravioli",
    "instrument": "the oboe|the zither|the bagpipes|the marimba|the accordion|the harp|the sitar|the cello|the ocarina|the banjo",
    "birthplace": "Numeria|Hollow Creek|Tarsk|Lower Wend|Fjallnes|Corvana|Amber Hill|Zelenka|Port Sorrow|Ildefonso",
    "vehicle": "a yellow scooter|a hearse|a green jeep|a sidecar|a milk float|a tandem|a steam car|a snowmobile|a tuk-tuk|a fire engine",
    "subject of study": "linguistics|botany|numismatics|meteorology|theology|oceanography|heraldry|metallurgy|entomology|egyptology",
    "fear": "moths|escalators|clowns|balloons|owls|mirrors|fog|tunnels|geese|dolls",
    "allergy": "celery|kiwi|mustard|lupin|sesame|paprika|mango|buckwheat|cinnamon|garlic",
}


def invented_facts(num_people: int, facts_each: int, *, seed: int) -> list[Fact]:
    """Facts of people who don't exist. No object is shared by two people."""
    rng = random.Random(seed)
    people = [f"{a} {b}" for a, b in zip(rng.sample(_FIRST, num_people), _LAST, strict=False)]
    left = {noun: rng.sample(line.split("|"), 10) for noun, line in _OBJECTS.items()}
    facts: list[Fact] = []
    for who in people:
        most = sorted(left, key=lambda noun: (-len(left[noun]), rng.random()))
        nouns = rng.sample(most[: max(facts_each, 7)], facts_each)
        facts += [Fact(subject=who, relation=noun, object=left[noun].pop()) for noun in nouns]
    return facts
