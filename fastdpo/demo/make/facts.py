"""What the demo's questions and answers are about: everyday facts, each with its reason.

A topic has several ways to ask one thing, one full statement, and facts whose values fill the slots of both.
Slot `y` is the short answer and `why` the reason; every fact of a topic can be asked in every way.
"""

from typing import NamedTuple


class Topic(NamedTuple):
    questions: tuple[str, ...]
    statement: str
    why: str
    slots: tuple[str, ...]
    facts: tuple[tuple[str, ...], ...]


def _sums() -> tuple[tuple[str, ...], ...]:
    # two thirds of the small sums: all of them would be a quarter of the facts
    pairs = ((a, b) for a in range(2, 10) for b in range(2, a + 1) if (a + b) % 3)
    return tuple((str(a), str(b), str(a + b)) for a, b in pairs)


CAPITALS = Topic(
    (
        "What is the capital of {x}?",
        "Which city is the capital of {x}?",
        "Tell me the capital of {x}.",
        "Can you name the capital city of {x}?",
    ),
    "the capital of {x} is {y}",
    "the {people} parliament meets there",
    ("x", "y", "people"),
    (
        ("France", "Paris", "French"),
        ("Spain", "Madrid", "Spanish"),
        ("Italy", "Rome", "Italian"),
        ("Germany", "Berlin", "German"),
        ("Austria", "Vienna", "Austrian"),
        ("Poland", "Warsaw", "Polish"),
        ("Norway", "Oslo", "Norwegian"),
        ("Sweden", "Stockholm", "Swedish"),
        ("Finland", "Helsinki", "Finnish"),
        ("Denmark", "Copenhagen", "Danish"),
        ("Greece", "Athens", "Greek"),
        ("Portugal", "Lisbon", "Portuguese"),
        ("Ireland", "Dublin", "Irish"),
        ("Hungary", "Budapest", "Hungarian"),
        ("Japan", "Tokyo", "Japanese"),
        ("India", "New Delhi", "Indian"),
        ("Canada", "Ottawa", "Canadian"),
        ("Australia", "Canberra", "Australian"),
        ("Kenya", "Nairobi", "Kenyan"),
        ("Peru", "Lima", "Peruvian"),
        ("Iceland", "Reykjavik", "Icelandic"),
        ("Turkey", "Ankara", "Turkish"),
        ("Thailand", "Bangkok", "Thai"),
    ),
)

HOMES = Topic(
    (
        "Where does {x} live?",
        "What is the home of {x}?",
        "Tell me where {x} lives.",
        "Do you know where {x} lives?",
    ),
    "{x} lives in {y}",
    "{why}",
    ("x", "y", "why"),
    (
        ("a bee", "a hive", "honey is stored there"),
        ("a bird", "a nest", "the eggs stay warm there"),
        ("a fox", "a den", "the cubs are safe there"),
        ("a rabbit", "a burrow", "tunnels hide it from foxes"),
        ("a spider", "a web", "the threads catch flies"),
        ("a horse", "a stable", "the stall is dry at night"),
        ("a hen", "a coop", "the fence keeps foxes out"),
        ("a bear", "a cave", "the winter sleep is quiet there"),
        ("an ant", "a colony", "the work is shared there"),
        ("a beaver", "a lodge", "the door lies under water"),
        ("an owl", "a hollow tree", "the day is dark there"),
        ("a cow", "a barn", "the hay is kept there"),
        ("a mole", "a tunnel", "worms are found under the ground"),
        ("a frog", "a pond", "the eggs need water"),
        ("a snail", "a shell", "the soft body must stay wet"),
        ("a camel", "the desert", "the hump stores food for long walks"),
    ),
)

FOOD = Topic(
    (
        "What does {x} eat?",
        "What is the food of {x}?",
        "Tell me what {x} eats.",
        "Do you know what {x} eats?",
    ),
    "{x} eats {y}",
    "{why}",
    ("x", "y", "why"),
    (
        ("a panda", "bamboo", "it grows all year"),
        ("a lion", "meat", "the teeth are made for hunting"),
        ("a sheep", "grass", "the stomach can break it down"),
        ("a squirrel", "nuts", "they keep well in winter"),
        ("a koala", "leaves", "the gum tree is full of them"),
        ("a penguin", "fish", "the sea is full of them"),
        ("a monkey", "fruit", "it grows high in the trees"),
        ("a caterpillar", "cabbage", "the young leaves are soft"),
        ("a whale", "krill", "the mouth works like a sieve"),
        ("a parrot", "seeds", "the beak cracks them easily"),
        ("a mosquito", "blood", "the eggs need protein"),
        ("a silkworm", "mulberry", "the silk is made from it"),
    ),
)

COLOURS = Topic(
    (
        "What colour is {x}?",
        "Which colour does {x} have?",
        "Tell me the colour of {x}.",
        "Do you know the colour of {x}?",
    ),
    "{x} is {y}",
    "{why}",
    ("x", "y", "why"),
    (
        ("a ripe banana", "yellow", "the green fades as it ripens"),
        ("fresh grass", "green", "it is full of chlorophyll"),
        ("fresh snow", "white", "the crystals scatter all light"),
        ("coal", "black", "carbon swallows light"),
        ("blood", "red", "it carries iron"),
        ("the clear sky", "blue", "air scatters blue light most"),
        ("a carrot", "orange", "it is full of carotene"),
        ("milk", "white", "drops of fat scatter light"),
        ("dark chocolate", "brown", "the beans are roasted"),
        ("a flamingo", "pink", "it eats pink shrimp"),
        ("a polar bear", "white", "it hides in the snow"),
        ("a fire engine", "red", "it must be seen from far away"),
        ("a raven", "black", "the feathers are full of melanin"),
        ("lavender", "purple", "bees like that colour"),
        ("rust", "brown", "iron turns so in wet air"),
        ("an emerald", "green", "it holds a little chromium"),
    ),
)

SUMS = Topic(
    (
        "What is {x} plus {z}?",
        "How much is {x} plus {z}?",
        "Add {z} to {x}, please.",
        "Can you work out {x} plus {z}?",
    ),
    "{x} plus {z} makes {y}",
    "counting {z} steps on from {x} ends at {y}",
    ("x", "z", "y"),
    _sums(),
)

COUNTS = Topic(
    (
        "How many {x} are in {z}?",
        "How many {x} does {z} have?",
        "Tell me how many {x} {z} has.",
        "Do you know the number of {x} in {z}?",
    ),
    "{z} has {y} {x}",
    "{why}",
    ("x", "z", "y", "why"),
    (
        ("seconds", "a minute", "60", "old astronomers counted in sixties"),
        ("hours", "a day", "24", "day and night had 12 each"),
        ("days", "a week", "7", "each day had its own planet"),
        ("months", "a year", "12", "the moon is full about 12 times"),
        ("centimetres", "a metre", "100", "centi means one part in 100"),
        ("grams", "a kilogram", "1000", "kilo means 1000"),
        ("years", "a century", "100", "centum is Latin for 100"),
        ("years", "a decade", "10", "deka is Greek for 10"),
        ("eggs", "a dozen", "12", "12 is easy to share"),
        ("strings", "a violin", "4", "one bow reaches 4 with ease"),
        ("keys", "a piano", "88", "that covers just over 7 octaves"),
        ("letters", "the English alphabet", "26", "it grew out of the Latin one"),
        ("planets", "the solar system", "8", "Pluto no longer counts"),
        ("sides", "a triangle", "3", "it joins 3 corners"),
        ("legs", "a spider", "8", "it is no insect"),
        ("wheels", "a bicycle", "2", "one steers and one drives"),
    ),
)

JOBS = Topic(
    (
        "Who {x}?",
        "Whose job is it, who {x}?",
        "Tell me who {x}.",
        "Do you know who {x}?",
    ),
    "{y} {x}",
    "{why}",
    ("x", "y", "why"),
    (
        ("bakes bread", "a baker", "the ovens are hot before dawn"),
        ("repairs pipes", "a plumber", "a leak needs the right tools"),
        ("flies planes", "a pilot", "it takes years of training"),
        ("grows wheat", "a farmer", "the fields need daily care"),
        ("cuts hair", "a barber", "a steady hand is needed"),
        ("puts out fires", "a firefighter", "the hoses need a trained crew"),
        ("treats teeth", "a dentist", "a drill needs great care"),
        ("paints walls", "a painter", "an even coat takes practice"),
        ("builds tables", "a carpenter", "wood must be cut to fit"),
        ("heals animals", "a vet", "pets cannot say where it hurts"),
        ("designs houses", "an architect", "a house must stand for years"),
        ("writes novels", "an author", "a story needs a patient mind"),
        ("sews suits", "a tailor", "each body has its own size"),
        ("studies stars", "an astronomer", "a telescope shows their light"),
        ("cooks meals", "a chef", "good taste takes practice"),
        ("teaches children", "a teacher", "lessons need a clear plan"),
    ),
)

OPPOSITES = Topic(
    (
        "What is the opposite of {x}?",
        "Which word is the opposite of {x}?",
        "Tell me the opposite of {x}.",
        "Can you name the opposite of {x}?",
    ),
    "the opposite of {x} is {y}",
    "both words are about {scale}",
    ("x", "y", "scale"),
    (
        ("hot", "cold", "temperature"),
        ("big", "small", "size"),
        ("tall", "short", "height"),
        ("fast", "slow", "speed"),
        ("heavy", "light", "weight"),
        ("old", "young", "age"),
        ("loud", "quiet", "sound"),
        ("rich", "poor", "money"),
        ("early", "late", "time"),
        ("deep", "shallow", "depth"),
        ("strong", "weak", "strength"),
        ("near", "far", "distance"),
        ("wet", "dry", "water"),
        ("wide", "narrow", "width"),
        ("cheap", "expensive", "price"),
        ("rough", "smooth", "touch"),
        ("happy", "sad", "mood"),
        ("sharp", "blunt", "edges"),
    ),
)

NEXT = Topic(
    (
        "What comes after {x}?",
        "Which one follows {x}?",
        "Tell me what comes after {x}.",
        "Do you know what follows {x}?",
    ),
    "{y} comes after {x}",
    "it is the {place}",
    ("x", "y", "place"),
    (
        ("January", "February", "second month"),
        ("February", "March", "third month"),
        ("March", "April", "fourth month"),
        ("April", "May", "fifth month"),
        ("May", "June", "sixth month"),
        ("June", "July", "seventh month"),
        ("July", "August", "eighth month"),
        ("August", "September", "ninth month"),
        ("September", "October", "tenth month"),
        ("October", "November", "eleventh month"),
        ("November", "December", "last month"),
        ("Monday", "Tuesday", "second day of the week"),
        ("Tuesday", "Wednesday", "third day of the week"),
        ("Wednesday", "Thursday", "fourth day of the week"),
        ("Thursday", "Friday", "fifth day of the week"),
        ("Friday", "Saturday", "first day of the weekend"),
        ("Saturday", "Sunday", "last day of the week"),
    ),
)

MATERIALS = Topic(
    (
        "What is {x} made of?",
        "Which material is {x} made of?",
        "Tell me what {x} is made of.",
        "Do you know what {x} is made of?",
    ),
    "{x} is made of {y}",
    "{why}",
    ("x", "y", "why"),
    (
        ("a window", "glass", "light must come in"),
        ("glass", "sand", "it melts in great heat"),
        ("paper", "wood", "its fibres hold together"),
        ("cheese", "milk", "it thickens when it turns sour"),
        ("a tyre", "rubber", "it grips the road"),
        ("wine", "grapes", "their sugar turns to alcohol"),
        ("a candle", "wax", "it burns slowly"),
        ("a brick", "clay", "it hardens in the oven"),
        ("butter", "cream", "its fat clumps when it is shaken"),
        ("a pan", "iron", "it carries heat well"),
        ("a jumper", "wool", "it keeps the body warm"),
        ("a cork", "bark", "it is light and keeps water in"),
        ("a drum", "wood and skin", "a tight skin rings"),
        ("a diamond", "carbon", "great pressure packs it"),
    ),
)

ADVICE = Topic(
    (
        "How can I {x}?",
        "What is a good way to {x}?",
        "Tell me how to {x}.",
        "Any advice on how to {x}?",
    ),
    "to {x} you can {y}",
    "{why}",
    ("x", "y", "why"),
    (
        ("sleep better", "go to bed at the same time", "the body likes a steady rhythm"),
        ("keep bread fresh", "wrap it in a cloth", "the crust must breathe"),
        ("learn new words", "read every day", "words stick when we meet them often"),
        ("save money", "write down what you spend", "small costs add up"),
        ("calm down", "breathe slowly", "a slow breath slows the heart"),
        ("clean a window", "use water and vinegar", "vinegar removes lime"),
        ("stay healthy", "walk every day", "the heart needs exercise"),
        ("make good tea", "warm the pot first", "hot water draws out the taste"),
        ("remember a name", "say it aloud", "the ear helps the mind"),
        ("cut an onion", "use a sharp knife", "it frees less of the gas that stings"),
        ("keep roses fresh", "change the water", "old water is full of germs"),
        ("wake up early", "open the curtains", "daylight wakes the body"),
        ("start a diary", "write one line a day", "small habits last"),
        ("grow tomatoes", "give them sun", "they need warmth to ripen"),
        ("make friends", "listen well", "people like to be heard"),
        ("read more", "carry a book", "spare minutes add up"),
    ),
)

TOPICS = (CAPITALS, HOMES, FOOD, COLOURS, SUMS, COUNTS, JOBS, OPPOSITES, NEXT, MATERIALS, ADVICE)
