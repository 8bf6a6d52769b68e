"""The words captions are made of: synonyms for everything that a scene can contain."""


def choices(texts: str) -> tuple[str, ...]:
    """Return texts that are separated by "|"; one that is repeated is chosen more often."""
    return tuple(texts.split("|"))


# (singular, plural); the first is the canonical word and the commonest.
NOUNS: dict[str, tuple[tuple[str, str], ...]] = {
    "circle": (("circle", "circles"), ("disc", "discs"), ("disk", "disks")),
    "square": (("square", "squares"), ("box", "boxes")),
    "triangle": (("triangle", "triangles"),),
    "star": (("star", "stars"),),
    "heart": (("heart", "hearts"),),
    "ring": (("ring", "rings"), ("donut", "donuts"), ("hoop", "hoops"), ("doughnut", "doughnuts")),
    "cross": (("cross", "crosses"), ("plus", "pluses"), ("plus sign", "plus signs")),
    "crescent": (("crescent", "crescents"), ("moon", "moons"), ("crescent moon", "crescent moons")),
}
COLOR_WORDS: dict[str, tuple[str, ...]] = {"purple": ("purple", "violet"), "gray": ("gray", "grey")}
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "small", "small", "little", "tiny"),
    "large": ("large", "large", "big", "big", "huge"),
}
COUNT_NAMES = ("one", "two", "three", "four")
COUNT_WORDS: tuple[tuple[str, ...], ...] = (
    ("a", "a", "a", "a", "a", "a", "a", "one", "1", "a single"),
    ("two", "two", "two", "two", "two", "2", "2", "a pair of"),
    ("three", "three", "three", "3"),
    ("four", "four", "four", "4"),
)
RELATION_WORDS: dict[str, tuple[str, ...]] = {
    "left of": ("left of", "left of", "to the left of", "to the left of", "on the left of", "on the left side of"),
    "right of": (
        "right of",
        "right of",
        "to the right of",
        "to the right of",
        "on the right of",
        "on the right side of",
    ),
    "above": ("above", "above", "above", "above", "over", "over", "on top of", "higher than"),
    "below": ("below", "below", "below", "under", "under", "underneath", "beneath", "lower than"),
    "inside": ("inside", "inside", "inside", "in", "within", "inside of"),
    "around": ("around", "around", "surrounding", "containing"),
}
# After a verb, and before a pronoun, "containing" and the like read badly.
VERB_RELATION_WORDS: dict[str, tuple[str, ...]] = {**RELATION_WORDS, "around": ("around",)}
RELATION_NAMES = {
    "left of": "left_of",
    "right of": "right_of",
    "above": "above",
    "below": "below",
    "inside": "inside",
    "around": "around",
}
# What may stand instead of "relation it" behind "with": "a ring with a star inside".
BARE_RELATION_WORDS: dict[str, tuple[str, ...]] = {
    "left of": ("to the left", "on the left", "on its left"),
    "right of": ("to the right", "on the right", "on its right"),
    "above": ("above", "on top"),
    "below": ("below", "underneath"),
    "inside": ("inside", "in it", "in the middle"),
    "around": ("around it",),
}
PICTURES = choices(
    "a picture of|a picture of|an image of|a drawing of|an illustration of|a painting of|picture of|a photo of|"
    "a picture with|an image with|a scene with|an image showing"
)
COMMANDS = choices(
    "draw|draw|draw|draw me|please draw|paint|show|show me|make|make me|create|generate|render|can you draw|"
    "could you please draw|i want|i would like|give me|create an image of|generate a picture of|draw a picture of"
)
SIGHTS = choices(
    "you can see|we see|i see|the picture shows|the image shows|this picture shows|this is|here is|"
    "the picture has|the image contains|look at"
)
VERBS = (
    ("is", "are"),
    ("is", "are"),
    ("is", "are"),
    ("sits", "sit"),
    ("lies", "lie"),
    ("stands", "stand"),
    ("floats", "float"),
    ("is placed", "are placed"),
    ("is located", "are located"),
    ("can be seen", "can be seen"),
)
PARTICIPLES = ("placed", "sitting", "lying", "floating", "located", "positioned", "standing", "drawn")
PLACES: dict[str, tuple[str, ...]] = {
    "center": ("in the middle", "in the center", "in the centre", "at the center"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "left": ("on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right side", "at the right"),
    "top_left": ("in the top left corner", "at the top left", "in the upper left"),
    "top_right": ("in the top right corner", "at the top right", "in the upper right"),
    "bottom_left": ("in the bottom left corner", "at the bottom left", "in the lower left"),
    "bottom_right": ("in the bottom right corner", "at the bottom right", "in the lower right"),
}
PATTERN_WORDS: dict[str, tuple[str, ...]] = {
    "plain": ("", "", "", "", "plain", "plain", "simple", "solid"),
    "striped": ("striped", "striped", "striped", "stripy"),
    "dotted": ("dotted", "dotted", "spotted", "polka dot"),
    "checkered": ("checkered", "checkered", "checked", "chequered", "checkerboard"),
}
PATTERN_NOUNS: dict[str, tuple[str, ...]] = {
    "striped": ("stripes",),
    "dotted": ("dots", "spots", "polka dots"),
    "checkered": ("checks",),
}
# {a} is the article with adjectives, {n} the adjectives alone.
BACKGROUND_TAILS = choices(
    " on {a} background| on {a} background| on {a} background| against {a} background| with {a} background|"
    " in front of {a} background| on {a} backdrop| against {a} backdrop|, {n} background|, {n} background|"
    ", {n} background|, {a} background|, with {a} background|, the background is {n}|. the background is {n}|"
    ", background {n}|, background is {n}"
)
BACKGROUND_HEADS = choices(
    "on {a} background, |on {a} background |{n} background, |{n} background with |{a} background with |"
    "against {a} background, |{a} background and "
)
# Words that no caption needs but a user may type; the tokenizer should know them.
EXTRA_WORDS = (
    "about also all along among any artwork as be being beside between both but by canvas clear color colored colors "
    "colour coloured colours corner depicting depict each edge empty exactly figure figures five for from geometric "
    "has have having her his illustration image its just kind like lines little lot made me medium middle minimal my "
    "near next no normal not object objects of off only or other out outside pattern patterned photo pic picture "
    "placed please round scene shape shaped shapes shown showing side sized sketch small so some somewhere stripe "
    "style than that them then these they this three to together too under up upon us very want was were what where "
    "which while who whole will would you your zero six beneath beyond behind onto into lower upper lowest "
    "different same another filled full bright dark light tone tones surrounded encloses enclosing holds "
    "holding contained contains includes including featuring features has displaying display visible standing"
)
