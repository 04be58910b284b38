"""Articles and plurals of English nouns: "a unicorn", "two bowls of noodles"."""

# Mass nouns, unique things, and words that are not nouns: no "a" and no plural.
UNCOUNTED = {
    "bread", "broccoli", "cheese", "coffee", "confetti", "corn", "done", "earth", "fire", "garlic",
    "lightning", "locked", "meat", "milk", "parchment", "poop", "popcorn", "ramen", "rice",
    "saturn", "spaghetti", "star-struck", "sushi", "tennis", "voltage", "wine",
}  # fmt: skip
SAME = ("deer", "fish", "sheep", "shrimp", "squid", "moai", "aircraft", "bison", "moose")
IRREGULAR = {
    "mouse": "mice", "goose": "geese", "tooth": "teeth", "foot": "feet", "ox": "oxen",
    "man": "men", "woman": "women", "snowman": "snowmen", "person": "people", "child": "children",
    "wolf": "wolves", "leaf": "leaves", "sheaf": "sheaves", "scarf": "scarves", "knife": "knives",
    "loaf": "loaves", "shelf": "shelves",
    "tomato": "tomatoes", "potato": "potatoes", "volcano": "volcanoes", "tornado": "tornadoes",
    "mango": "mangoes",
}  # fmt: skip
JOINTS = {
    "of", "with", "without", "on", "in", "from", "and", "over", "behind",
    "blowing", "holding", "screaming", "showing",
}  # fmt: skip
SOUNDS_LIKE_A_CONSONANT = ("uni", "ufo", "use", "ute", "eu", "one-")
SOUNDS_LIKE_A_VOWEL = ("hour", "honest", "heir", "x-")


def with_article(name: str) -> str:
    """ "owl" -> "an owl"; plurals and mass nouns do not change: "grapes", "bread"."""
    if _last_of_head(name) is None:
        return name
    vowel = name[:1] in "aeiou" and not name.startswith(SOUNDS_LIKE_A_CONSONANT)
    return f"{'an' if vowel or name.startswith(SOUNDS_LIKE_A_VOWEL) else 'a'} {name}"


def plural(name: str) -> str | None:
    """ "glass of milk" -> "glasses of milk"; None for a name without another plural."""
    last = _last_of_head(name)
    if last is None:
        return None
    words = name.split(" ")
    words[last] = _plural_of_word(words[last])
    if words[last + 1 : last + 2] == ["and"] and len(words) == last + 3:  # bow and arrow
        words[-1] = _plural_of_word(words[-1])
    return " ".join(words)


def _last_of_head(name: str) -> int | None:
    """The index of the word that takes the plural; None for a plural or uncountable name."""
    words = name.split(" ")
    last = next((i for i, word in enumerate(words) if i and word in JOINTS), len(words)) - 1
    word = words[last]
    is_plural = word.endswith("s") and not word.endswith(("ss", "us", "os", "is"))
    return None if is_plural or word in UNCOUNTED else last


def _plural_of_word(word: str) -> str:
    if word.endswith(SAME):
        return word
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}es" if word.endswith(("s", "x", "z", "ch", "sh")) else f"{word}s"
