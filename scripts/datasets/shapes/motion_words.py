"""The words for motion: what a figure does, after it ("moves right") and as a participle ("moving right")."""

from .words import choices

DIRECTION_WORDS: dict[str, tuple[str, ...]] = {
    "left": ("left", "to the left", "to the left side", "towards the left", "from right to left"),
    "right": ("right", "to the right", "to the right side", "towards the right", "from left to right"),
    "up": ("up", "upwards", "to the top", "towards the top", "from bottom to top"),
    "down": ("down", "downwards", "to the bottom", "towards the bottom", "from top to bottom"),
}
# (one does, many do, doing) of verbs that take a direction, and of those that stand alone.
MOVES = (
    ("moves", "move", "moving"),
    ("moves", "move", "moving"),
    ("moves", "move", "moving"),
    ("slides", "slide", "sliding"),
    ("glides", "glide", "gliding"),
    ("goes", "go", "going"),
    ("travels", "travel", "travelling"),
)
ALONE: dict[str, tuple[tuple[str, str, str], ...]] = {
    "rotates": (
        ("rotates", "rotate", "rotating"),
        ("rotates", "rotate", "rotating"),
        ("spins", "spin", "spinning"),
        ("turns around", "turn around", "turning around"),
    ),
    "grows": (
        ("grows", "grow", "growing"),
        ("gets bigger", "get bigger", "getting bigger"),
        ("gets larger", "get larger", "getting larger"),
        ("grows larger", "grow larger", "growing larger"),
    ),
    "shrinks": (
        ("shrinks", "shrink", "shrinking"),
        ("gets smaller", "get smaller", "getting smaller"),
        ("becomes smaller", "become smaller", "becoming smaller"),
    ),
    "bounces": (
        ("bounces", "bounce", "bouncing"),
        ("bounces up and down", "bounce up and down", "bouncing up and down"),
        ("jumps up and down", "jump up and down", "jumping up and down"),
    ),
    "stays": (
        ("stands still", "stand still", "standing still"),
        ("stays still", "stay still", "staying still"),
        ("does not move", "do not move", "not moving"),
        ("rests", "rest", "resting"),
    ),
}
CHANGES = (
    ("turns {c}", "turn {c}", "turning {c}"),
    ("becomes {c}", "become {c}", "becoming {c}"),
    ("changes to {c}", "change to {c}", "changing to {c}"),
    ("changes its colour to {c}", "change its colour to {c}", "changing its colour to {c}"),
    ("changes color to {c}", "change color to {c}", "changing color to {c}"),
)
CROSSINGS = choices(
    "{a} and {b} cross|{a} and {b} cross each other|{a} and {b} pass each other|{a} passes {b}|{a} crosses {b}"
)
VIDEOS = choices(
    "a video of|a video of|a clip of|an animation of|a short video of|an animation showing|video of|show me|"
    "animate|make a video of"
)
