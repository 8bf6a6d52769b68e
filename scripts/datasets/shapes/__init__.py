"""The shapes data set: scenes of simple figures, their pictures and their captions."""

from .captions import VOCABULARY, describe, describe_with_form
from .classes import CLASSES, class_name, sample_figure
from .render import render
from .scenes import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT,
    PATTERNS,
    RELATIONS,
    SHAPES,
    Group,
    Placement,
    Scene,
    held_out_list,
    is_held_out,
    sample_scene,
)

__all__ = [
    "BACKGROUNDS",
    "CLASSES",
    "COLORS",
    "HELD_OUT",
    "PATTERNS",
    "RELATIONS",
    "SHAPES",
    "Group",
    "Scene",
    "VOCABULARY",
    "Placement",
    "class_name",
    "describe",
    "describe_with_form",
    "held_out_list",
    "is_held_out",
    "render",
    "sample_figure",
    "sample_scene",
]
