"""The words of captions of solids, beside those of shapes."""

from scripts.datasets.shapes.words import choices

# The first is the canonical word and the commonest.
SOLID_WORDS: dict[str, tuple[str, ...]] = {
    "cube": ("cube", "cube", "block"),
    "ball": ("ball", "ball", "sphere"),
    "cone": ("cone",),
    "cylinder": ("cylinder",),
    "torus": ("torus",),
    "pyramid": ("pyramid",),
    "mug": ("mug", "mug", "cup"),
}
MARK_WORDS: dict[str, tuple[str, ...]] = {
    "stripe": ("stripe", "stripe", "line"),
    "dot": ("dot", "dot", "spot"),
}
RELATION_WORDS: dict[str, tuple[str, ...]] = {
    "on": ("on", "on", "on top of", "standing on", "sitting on", "placed on"),
    "beside": ("beside", "beside", "next to", "to the left of", "left of"),
}
# For the second named first.
INVERSE_WORDS: dict[str, tuple[str, ...]] = {
    "on": ("under", "below", "underneath"),
    "beside": ("to the right of", "right of"),
}
VIEWS = choices(
    "a turntable of|turntable views of|a turntable view of|views of|several views of|views from all sides of|"
    "a 3d model of|a 3d model of|a 3d render of|3d views of|show me|render|rotate"
)
ELEVATION_WORDS: dict[str, tuple[str, ...]] = {
    "above": ("seen from above", "from above", "viewed from above"),
    "side": ("seen from the side", "from the side", "viewed from the side", "at eye level"),
}
SENTENCE_WORDS = "a an the with and that has is in any one view of background plain on beside"
