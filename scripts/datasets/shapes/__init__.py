"""The drawn world: scenes of simple figures, their pictures and their captions."""

from .captions import VOCABULARY, describe, describe_with_form
from .render import render
from .scenes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    PATTERNS,
    RELATIONS,
    SHAPES,
    Group,
    Scene,
    Thing,
    held_out_list,
    is_held_out,
    sample_scene,
)

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "HELD_OUT",
    "PATTERNS",
    "RELATIONS",
    "SHAPES",
    "Group",
    "Scene",
    "VOCABULARY",
    "Thing",
    "describe",
    "describe_with_form",
    "held_out_list",
    "is_held_out",
    "render",
    "sample_scene",
]
