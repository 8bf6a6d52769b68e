"""The solids data set: objects of shaded solids, their views from all around, and their captions."""

from .captions import VIEW_VOCABULARY, describe_object
from .objects import HELD_OUT_SOLIDS, Part, SolidObject, is_held_out_object, sample_object
from .render import render_views

__all__ = [
    "HELD_OUT_SOLIDS",
    "Part",
    "SolidObject",
    "VIEW_VOCABULARY",
    "describe_object",
    "is_held_out_object",
    "render_views",
    "sample_object",
]
