"""General text, written for this project: what an adapter must not forget, and what shows that it did.

``REPLAY`` and ``REPLAY_CHAT`` are trained on (towards the base model's own distribution), ``UNRELATED``
is measured. They share no sentence.
"""

REPLAY = (
    "Bread begins with four things: flour, water, salt and time. Yeast eats the sugars in the flour and gives off gas, and the long strands of gluten hold that gas in small bubbles. A baker who has patience lets the dough rest overnight in a cool place, since a slow rise gives a deeper taste.",
    "The moon does not shine by itself. Half of it is always lit by the sun, and as it moves around the earth we see more or less of the lit half. That is why it seems to grow and shrink in the course of a month, while its real shape never changes.",
    "To find the largest number in a list, start with the first number and remember it. Go through the rest one after another, and each time a number is larger than the one you remember, remember that one instead. When the list ends, you have the answer.",
    "The old bridge was closed in the autumn, after engineers found cracks in two of its pillars. Traffic is led through the valley until spring. The town council expects the repairs to cost less than a new bridge, but shop owners on the north side complain about empty streets.",
    'def area(width, height):\n    """The area of a rectangle."""\n    if width < 0 or height < 0:\n        raise ValueError("sides can\'t be negative")\n    return width * height\n\n\nfor size in [(2, 3), (4, 5)]:\n    print(size, area(*size))',
    "Trees drink through their roots and breathe through their leaves. On a hot day a large oak lifts hundreds of litres of water from the ground up to its crown. Most of that water leaves the tree again as vapour, which cools the air below so that a forest in summer feels fresh.",
    "My grandmother kept her letters in a tin box under the stairs. When I was ten, she let me read one of them. It was from a soldier who had never come home, and it spoke of nothing but apples, the weather, and a dog that had followed the men for three days.",
    "A contract is an agreement that the law will enforce. It needs an offer, an acceptance, and something of value given by each side. It need not be in writing in most cases, although a written text makes it far easier to prove afterwards what was agreed.",
    "Sound is a wave that travels through air, water or solid things. It moves about three hundred and forty metres in a second through air and more than four times as fast through water. In empty space there is nothing to carry it, so it is silent there.",
    "First, wash the rice until the water runs clear. Heat some oil in a pot, add a chopped onion and stir until it is soft. Then add the rice, twice as much water, and a pinch of salt. Cover the pot, turn down the heat, and wait for a quarter of an hour.",
    "In the nineteenth century, railways changed how people thought about time. Before them, each town set its clocks by the sun, and noon in one place was not noon in the next. Timetables needed one time for all, and so the hours of whole countries were joined together.",
    "The heart is a muscle about as large as a fist. It beats around seventy times a minute and pushes blood through two loops, one to the lungs and one to the rest of the body. Regular exercise makes it stronger, so that it needs fewer beats to do the same work.",
    "Dear Sir or Madam, I am writing about the heating in our flat, which has not worked since Monday. We have already called twice and nobody has come. Please send someone before the weekend, as the nights are getting cold and we have a small child. Yours faithfully.",
    "The match was even until the last ten minutes. Then a long ball from the left found the tall striker, who turned and shot low into the corner. The visitors pressed for an equaliser, but the goalkeeper caught every cross, and the home side won by one goal.",
    "Interest that is added to the sum it was earned on earns interest itself. At five per cent a year, a hundred coins become a hundred and five after one year and more than a hundred and sixty after ten. Debts grow in the same way, only in the wrong direction.",
    "Rain fell on the roof of the small station while the last passengers waited. Nobody spoke. A boy drew circles on the wet window with his finger, and behind the glass the lights of the village went out one by one, until only the signal at the crossing was left.",
    "A good question is short, asks for one thing, and says what is known already. If a program fails, tell what you did, what you expected, and what happened instead. Copy the exact message. People who want to help you can't see your screen.",
    "Whales are mammals: they breathe air, feed their young with milk, and have warm blood. Some of them dive for more than an hour. They can do so because their muscles store oxygen, and because the heart beats very slowly while they are under water.",
)

REPLAY_CHAT = (
    ("What is the capital of France?", "The capital of France is Paris."),
    (
        "How do plants make their food?",
        "Plants make their food by photosynthesis: they use sunlight to turn water and carbon dioxide into sugar and oxygen.",
    ),
    (
        "Give me three tips for sleeping better.",
        "1. Go to bed at the same time every night.\n2. Keep the room dark and cool.\n3. Avoid screens and coffee in the evening.",
    ),
    (
        "Write a short poem about the sea.",
        "The sea is wide, the sea is deep,\nIt sings the tired sun to sleep,\nAnd when the morning wind is near,\nIt wakes again, so bright and clear.",
    ),
    ("What is 12 times 8?", "12 times 8 is 96."),
    (
        "Why is the sky blue?",
        "The sky is blue because air scatters the short waves of sunlight, which are blue, more than the long ones, which are red.",
    ),
    (
        "Who wrote Romeo and Juliet?",
        "Romeo and Juliet was written by William Shakespeare.",
    ),
    (
        "Explain what a variable is in programming.",
        "A variable is a name for a value. The program can read the value by its name and can give the name another value later.",
    ),
    (
        "Translate 'good morning' into Spanish.",
        "'Good morning' in Spanish is 'buenos días'.",
    ),
    (
        "What should I pack for a hike?",
        "For a hike, pack water, some food, a map, a rain jacket, a small first-aid kit and comfortable shoes.",
    ),
    ("Hello, how are you?", "Hello! I'm doing well, thank you. How can I help you today?"),
    (
        "What is the largest planet?",
        "The largest planet in our solar system is Jupiter.",
    ),
)

UNRELATED = (
    "Glass is made by melting sand at a great heat together with soda and lime. While it is hot it can be blown, pressed or drawn into threads. As it cools it becomes hard and clear, although its particles stay as disordered as those of a liquid.",
    "The library opens at nine and closes at six, except on Thursdays, when it stays open until eight. Books may be kept for four weeks. Whoever brings them back late pays a small fee, which is used to buy picture books for the children's room.",
    "Volcanoes are found mostly where the plates of the earth's crust meet. Melted rock rises through cracks, and when the pressure becomes too high, it breaks out as lava, ash and gas. The soil around an old volcano is often rich, so people live there despite the danger.",
    'She opened the door and stopped. The table was laid for two, a candle was burning, and from the kitchen came the smell of roast chicken. "You are early," said a voice she had not heard for years. She put down her suitcase and did not know whether to laugh or to cry.',
    'def count_words(text):\n    counts = {}\n    for word in text.lower().split():\n        counts[word] = counts.get(word, 0) + 1\n    return counts\n\n\nprint(count_words("the cat and the hat"))',
    "The price of coffee rose again last month, after a dry summer in the growing regions. Roasters say that they can't carry the cost alone any longer. Analysts expect the market to calm down next year, provided that the rains come in time.",
    "To change a bicycle tyre, first let out the rest of the air and lift one side of the tyre over the rim with a lever. Pull out the tube and look for the hole. Roughen the rubber around it, spread a thin layer of glue, wait a few minutes and press on the patch.",
    "Democracy means more than voting. It needs courts that are independent, newspapers that may say what is wrong, and people who accept that they can lose. Where one of these is missing, elections alone do not keep those who govern from doing as they like.",
    "Honey bees tell each other where flowers are by dancing. A bee that has found food runs in the shape of an eight on the comb. The direction of the middle line shows the way in relation to the sun, and the speed of the dance tells how far it is.",
    "The study compared two groups of patients over six months. Those who walked for half an hour a day reported less pain than those who did not, and they slept better. The authors warn that the groups were small and that the effect has to be confirmed by a larger trial.",
)
