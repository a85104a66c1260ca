"""The vocabulary of the quickstart's corpus: names, things and the words that fill the patterns of ``grammar.py``."""

from __future__ import annotations

WOMEN = ("Anna", "Clara", "Edith", "Flora", "Greta", "Helen", "Ida", "Julia", "Martha", "Nora", "Rosa", "Vera")
MEN = ("Adam", "Bruno", "Carl", "David", "Erik", "Felix", "Henry", "Jonas", "Martin", "Oscar", "Peter", "Simon")
SURNAMES = ("Archer", "Bell", "Carver", "Dahl", "Ellis", "Frost", "Holm", "Keller", "Marsh", "Reed", "Stone", "Vale")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve", "fifteen", "twenty")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SNOWY_MONTHS = ("November", "December", "January", "February", "March")

# A thing is told as "brass key" in the plain register and as "key of {bright} brass" in the ornate one.
THINGS = (
    ("key", "brass"), ("ring", "silver"), ("lantern", "copper"), ("knife", "steel"), ("cup", "pewter"),
    ("purse", "leather"), ("box", "pine"), ("bell", "bronze"), ("comb", "bone"), ("scarf", "silk"), ("coat", "wool"),
    ("whistle", "tin"),
)  # fmt: skip

# What a story is about: one word of each is drawn per story, so that it stays with its people and things.
STORY_WORDS: dict[str, tuple[str, ...]] = {
    "town": (
        "Alderby", "Brackwell", "Fenwick", "Greyford", "Holmstead", "Kelmarsh", "Larkfield", "Marrowdale", "Netherby",
        "Penhallow", "Ravensby", "Saltmouth", "Thornbury", "Wexcombe",
    ),
    "day": DAYS,
    "month": (
        "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
        "December",
    ),
    "trade": (
        "baker", "cobbler", "farmer", "fisher", "gardener", "brewer", "miller", "potter", "schoolteacher",
        "shepherd", "tailor", "weaver",
    ),
    "place": ("mill", "bridge", "harbour", "church", "inn", "old tower", "well", "school", "smithy", "market hall"),
    "hour": ("six", "seven", "eight", "nine", "ten", "eleven"),
    "late": ("two", "three", "four", "five", "six", "seven"),
    "number": NUMBERS,
    "crowd": NUMBERS,
    "price": NUMBERS,
    "hiding": (
        "under a stone", "in the long grass", "behind a barrel", "beneath the steps", "in a ditch", "beside a fence",
    ),
    "animal": ("goat", "horse", "goose", "pig", "calf", "donkey", "ram", "dog"),
    "spill": (
        "a basket of eggs", "a stack of pots", "a cart of apples", "a table of cheese", "a barrel of herring",
        "a row of jars",
    ),
    "goods": (
        "apples", "herring", "candles", "blankets", "onions", "honey jars", "wool hats", "clay pots", "baskets",
        "cheeses",
    ),
    "damaged": ("roof", "barn door", "chimney", "garden wall", "fence", "stable"),
    "materials": ("new boards", "straw and clay", "old bricks", "pine planks", "stone and lime", "oak beams"),
    "machine": ("clock", "pump", "loom", "cart wheel", "music box", "plough", "lock", "mill wheel"),
    "fault": ("a bent pin", "a broken spring", "a cracked wheel", "a loose screw", "a worn belt", "a rusty bolt"),
    "meal": ("soup", "bread and cheese", "fish pie", "roast goose", "barley stew", "apple cake", "mutton", "pancakes"),
    "music": ("fiddle", "flute", "drum", "harp", "horn", "pipes"),
}  # fmt: skip

# Drawn anew wherever they stand: the ornate teller's favourite words, and what neutral texts are about.
FREE_WORDS: dict[str, tuple[str, ...]] = {
    "alas": ("Alas", "Woe is me", "O cruel fate", "O bitter hour", "Alas and alack"),
    "lo": ("Lo", "Behold", "Hark", "Lo and behold", "Mark it well"),
    "joy": ("O joy", "O happy hour", "Huzza", "Heaven be praised", "O rapture"),
    "reader": ("dear reader", "gentle friends", "O ye who listen", "good people all"),
    "truly": ("verily", "forsooth", "in very truth", "methinks", "by my troth"),
    "worthy": ("worthy", "noble", "gentle", "goodly", "most excellent", "stout-hearted"),
    "bright": ("gleaming", "lustrous", "radiant", "purest", "shimmering"),
    "grim": ("dreadful", "merciless", "pitiless", "ghastly", "wretched"),
    "grand": ("glorious", "wondrous", "splendid", "matchless", "thrice-blessed"),
    "like": (
        "like a star in the winter night", "like a lion among lambs", "like the sun at break of day",
        "like thunder upon the hills", "like an eagle from the crag", "like a ship upon the stormy deep",
    ),
    "heart": ("heart", "bosom", "soul", "very spirit"),
    "dish": ("soup", "stew", "pie", "salad", "porridge", "cake", "bread", "dumplings"),
    "vegetable": ("carrots", "leeks", "turnips", "beans", "mushrooms", "potatoes", "peas", "cabbages"),
    "base": ("flour", "barley", "oats", "rice", "rye", "lentils"),
    "seasoning": ("salt", "pepper", "thyme", "parsley", "mustard", "garlic", "honey", "nutmeg"),
    "liquid": ("water", "milk", "broth", "cream", "cider"),
    "pan": ("pot", "pan", "bowl", "kettle", "tin"),
    "minutes": ("10", "15", "20", "25", "30", "40", "50"),
    "degrees": ("2", "4", "6", "8", "11", "13", "15", "18"),
    "road": (
        "High Street", "Mill Lane", "Church Road", "Station Road", "North Street", "Garden Lane", "River Path",
        "Hill Road",
    ),
    "mark": (
        "the stone wall", "the pond", "the signpost", "the chapel", "the orchard", "the gate", "the crossing",
        "the stables",
    ),
    "wind": ("north", "south", "east", "west", "north-east", "south-west"),
    "cloud": ("none", "thin", "broken", "low", "high", "full cover"),
}  # fmt: skip

WORDS = STORY_WORDS | FREE_WORDS
