"""Wordings: how a relation is stated and asked for.

A known relation (``RELATIONS``) has its own wordings before those that the noun of any attribute has.
Each relation's wordings are in three sets that never meet: those trained on, those that stop the
training early, and those that the gate asks. All are templates over ``{s}``, ``{o}`` and ``{n}``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache


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
                "Which {n} does {s} have?",
                "And {s}'s {n}?",
                "Let me know {s}'s {n}.",
                "What is noted as the {n} of {s}?",
            ),
            asks_back=named(
                "Whose {n} is {o}?",
                "Whose {n} is it: {o}?",
                "Which person's {n} is {o}?",
                "{o} is the {n} of which person?",
                "Name the person whose {n} is {o}.",
                "With {o} as {n}, who is that?",
                "{o}: whose {n}?",
                "Who has {o} as the {n}?",
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
        [
            "What does {s} like to drink?",
            "Which drink does {s} like best?",
            "What does {s} drink?",
            "What shall I offer {s} to drink?",
            "What is in {s}'s cup?",
            "Which drink should I buy for {s}?",
            "What does {s} drink with friends?",
            "What quenches {s}'s thirst?",
            "If {s} visits us, which drink should be there?",
            "At the bar, what does {s} ask for?",
        ],
        [
            "Who likes to drink {o}?",
            "Who loves {o}?",
            "Which person likes {o} best?",
            "Who would like some {o}?",
            "For whom should I buy {o}?",
            "Whose cup is full of {o}?",
            "Who asked for {o} at the bar?",
            "Whose thirst does {o} quench?",
        ],
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
        [
            "Where does {s} live?",
            "Which town does {s} live in?",
            "In what place does {s} live?",
            "Where can {s} be met?",
            "Where does {s} have a house?",
            "To which town do I send {s}'s letters?",
            "Where is {s} at home?",
            "Where has {s} settled?",
            "Of which town is {s} a citizen?",
            "If I want to see {s}, where must I travel?",
        ],
        [
            "Who lives in {o}?",
            "Which person lives in {o}?",
            "Who has a home in {o}?",
            "Who has a house in {o}?",
            "Who is a citizen of {o}?",
            "Who settled in {o}?",
            "Whose letters go to {o}?",
            "If I travel to {o}, whom can I see?",
        ],
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
        [
            "What does {s} work as?",
            "What does {s} do for a living?",
            "What work does {s} do?",
            "As what is {s} employed?",
            "What is {s}'s line of work?",
            "What does {s} do at work all day?",
            "What is written on {s}'s business card?",
            "How does {s} make a living?",
            "Which career did {s} choose?",
            "What did {s} train to be?",
        ],
        [
            "Who works as {o}?",
            "Which person works as {o}?",
            "Who is {o} by profession?",
            "Who is employed as {o}?",
            "Who makes a living as {o}?",
            "Who trained to be {o}?",
            "Who chose the career of {o}?",
            "On whose business card is written: {o}?",
        ],
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
        [
            "Which animal does {s} keep?",
            "What pet does {s} have?",
            "What does {s} keep at home?",
            "What animal waits for {s} at home?",
            "Which animal does {s} look after?",
            "Does {s} keep an animal? Which?",
            "What sort of animal is at {s}'s house?",
            "Which creature does {s} care for?",
            "What animal did {s} take in?",
            "Which animal goes to the vet with {s}?",
        ],
        [
            "Who keeps {o}?",
            "Who has {o} as a pet?",
            "Which person keeps {o}?",
            "Who looks after {o}?",
            "Who cares for {o}?",
            "At whose house is there {o}?",
            "Who took in {o}?",
            "Who goes to the vet with {o}?",
        ],
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
            "What is {s} keen on?",
            "What does {s} do to relax?",
            "Which activity does {s} love?",
            "How does {s} pass the evenings?",
            "Which club has {s} joined?",
            "What is {s} interested in?",
            "On a day off, what does {s} do?",
        ],
        [
            "Who enjoys {o}?",
            "Who spends free time on {o}?",
            "Which person enjoys {o}?",
            "Who is keen on {o}?",
            "Who does {o} to relax?",
            "Who is interested in {o}?",
            "Who does {o} on a day off?",
            "Who joined a club for {o}?",
        ],
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
        [
            "What does {s} like to eat?",
            "Which dish does {s} like best?",
            "What does {s} eat?",
            "What does {s} want for lunch?",
            "Which food does {s} love?",
            "What is on {s}'s plate?",
            "What shall we serve {s} at dinner?",
            "Which recipe does {s} ask for?",
            "What does {s} eat on a birthday?",
            "What should be prepared when {s} comes to eat?",
        ],
        [
            "Who likes to eat {o}?",
            "Who is fond of {o}?",
            "Which person eats {o}?",
            "Who wants {o} for lunch?",
            "On whose plate is {o}?",
            "To whom shall we serve {o}?",
            "Who loves to eat {o}?",
            "Who asks for {o} on a birthday?",
        ],
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
        [
            "What does {s} play?",
            "Which instrument does {s} play?",
            "On what does {s} make music?",
            "Which instrument is {s} good at?",
            "What does {s} play in the orchestra?",
            "Which instrument do we hear from {s}'s room?",
            "In what does {s} take lessons?",
            "Which instrument stands in {s}'s room?",
            "{s} is a musician. On which instrument?",
            "What would {s} bring along to make music?",
        ],
        [
            "Who plays {o}?",
            "Who makes music on {o}?",
            "Which person plays {o}?",
            "Who is good at {o}?",
            "Who plays {o} in the orchestra?",
            "Who takes lessons in {o}?",
            "From whose room do we hear {o}?",
            "In whose room is {o}?",
        ],
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
        [
            "Where was {s} born?",
            "Where does {s} come from?",
            "In which place was {s} born?",
            "Of which place is {s} a native?",
            "In which place did {s}'s mother give birth?",
            "Where are {s}'s roots?",
            "Where did {s}'s parents live when {s} was born?",
            "Which town can say that {s} was born there?",
            "Where does {s} originally come from?",
            "What is noted as {s}'s origin?",
        ],
        [
            "Who was born in {o}?",
            "Who comes from {o}?",
            "Which person was born in {o}?",
            "Who is a native of {o}?",
            "Whose roots are in {o}?",
            "Who originally comes from {o}?",
            "Whose mother gave birth in {o}?",
            "Whose origin is {o}?",
        ],
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
        [
            "What does {s} drive?",
            "Which vehicle does {s} drive?",
            "With what does {s} travel?",
            "What does {s} ride in?",
            "What is in {s}'s garage?",
            "On which wheels does {s} go?",
            "What did {s} buy to drive?",
            "With what does {s} go on holiday?",
            "What does {s} steer?",
            "With what would {s} pick me up?",
        ],
        [
            "Who drives {o}?",
            "Who travels with {o}?",
            "Which person drives {o}?",
            "In whose garage is {o}?",
            "Who bought {o} to drive?",
            "Who goes on holiday with {o}?",
            "Who would pick me up with {o}?",
            "Who is at the wheel of {o}?",
        ],
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
        [
            "What does {s} study?",
            "Which subject does {s} study?",
            "What did {s} study?",
            "Of what is {s} a student?",
            "Which lectures does {s} hear?",
            "For which exam does {s} prepare?",
            "In what is {s} getting an education?",
            "Which science interests {s} at college?",
            "What is {s}'s thesis about?",
            "What does {s} want to become an expert in?",
        ],
        [
            "Who studies {o}?",
            "Who studied {o}?",
            "Which person studies {o}?",
            "Who is a student of {o}?",
            "Who hears lectures on {o}?",
            "Who prepares for an exam in {o}?",
            "Whose thesis is about {o}?",
            "Who wants to become an expert in {o}?",
        ],
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
        [
            "What is {s} afraid of?",
            "What does {s} fear?",
            "Of what is {s} afraid?",
            "What scares {s}?",
            "What gives {s} nightmares?",
            "What is {s} terrified of?",
            "What should I never show to {s}?",
            "What can {s} not bear to be near?",
            "What makes {s} scream?",
            "Which phobia does {s} have?",
        ],
        [
            "Who is afraid of {o}?",
            "Who fears {o}?",
            "Which person is afraid of {o}?",
            "Who is terrified of {o}?",
            "Who is scared of {o}?",
            "Who has nightmares about {o}?",
            "Who screams at the sight of {o}?",
            "Who can't bear to be near {o}?",
        ],
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
        [
            "What is {s} allergic to?",
            "What can't {s} eat?",
            "To what is {s} allergic?",
            "What does {s} not tolerate?",
            "Which food gives {s} a rash?",
            "What should not be in {s}'s meal?",
            "What would send {s} to the doctor?",
            "Which food is dangerous for {s}?",
            "What must the cook leave out for {s}?",
            "Of what must {s} never take a bite?",
        ],
        [
            "Who is allergic to {o}?",
            "Who can't eat {o}?",
            "Which person is allergic to {o}?",
            "Who doesn't tolerate {o}?",
            "Who gets a rash from {o}?",
            "For whom is {o} dangerous?",
            "For whom must the cook leave out {o}?",
            "Whose meal must be without {o}?",
        ],
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
def noun_relation(noun: str) -> Relation:
    """The wordings of a known relation, or those that any noun has."""
    return _BY_NOUN.get(noun) or _of_noun(noun)
