"""Compare a clip with its prompt: is the right figure there all the time, and does it do what was asked?"""

from dataclasses import dataclass
from itertools import permutations

import numpy as np

from scripts.verifiers.clips.prompt import AskedFigure, ClipRequest
from scripts.verifiers.clips.tracking import Track, flicker, follow

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


@dataclass(frozen=True)
class ClipVerdict:
    """Per figure: the motion asked for; color, shape, motion right. Per clip: figures too many, flicker in bytes."""

    asked: tuple[str, ...]
    colors: tuple[bool, ...]
    shapes: tuple[bool, ...]
    motions: tuple[bool, ...]
    surplus: int
    flicker: float

    @property
    def objects(self) -> tuple[bool, ...]:
        """Color and shape of the same figure."""
        return tuple(color and shape for color, shape in zip(self.colors, self.shapes, strict=True))

    @property
    def wrong(self) -> tuple[str, ...]:
        """One line per mistake."""
        parts = {"colour": self.colors, "shape": self.shapes, "motion": self.motions}
        wrong = [f"{name} wrong" for name, answers in parts.items() if not all(answers)]
        return (*wrong, *([f"{self.surplus} too many"] if self.surplus else ()))

    @property
    def right(self) -> bool:
        """Everything that was asked, and nothing else."""
        return not self.wrong


def verify_clip(request: ClipRequest, frames: np.ndarray) -> ClipVerdict:
    """Compare what a prompt asks for with a clip of bytes (F, H, W, 3)."""
    tracks = follow(frames)
    wanted = request.figures
    candidates = tracks[: len(wanted) + 2]
    padded = [*candidates, *[None] * len(wanted)]
    best = max(permutations(padded, len(wanted)), key=lambda chosen: _fit(wanted, chosen))
    colors = tuple(track is not None and figure_color(asked, track) for asked, track in zip(wanted, best, strict=True))
    shapes = tuple(
        track is not None and asked.figure.shape in ("", track.shape)
        for asked, track in zip(wanted, best, strict=True)
    )
    motions = tuple(_moves_right(asked, track, best) for asked, track in zip(wanted, best, strict=True))
    asked = tuple(each.motion for each in wanted)
    return ClipVerdict(asked, colors, shapes, motions, max(0, len(tracks) - len(wanted)), flicker(frames, tracks))


def figure_color(asked: AskedFigure, track: Track) -> bool:
    """Return whether a track begins in the color that was asked for."""
    return asked.figure.color in ("", track.color)


def _moves_right(asked: AskedFigure, track: Track | None, chosen: tuple[Track | None, ...]) -> bool:
    if track is None:
        return False
    if asked.motion == "cross":
        motions = [other.motion for other in chosen if other is not None]
        return len(motions) == 2 and OPPOSITE.get(motions[0]) == motions[1]
    if asked.motion == "changes":
        return track.motion == "changes" and asked.new_color in ("", track.new_color)
    return asked.motion in ("", track.motion)


def _fit(wanted: tuple[AskedFigure, ...], chosen: tuple[Track | None, ...]) -> float:
    """Return how much of what was asked these tracks give, color before shape before motion."""
    return sum(
        1 + 4 * figure_color(asked, track) + 2 * (asked.figure.shape == track.shape) + (asked.motion == track.motion)
        for asked, track in zip(wanted, chosen, strict=True)
        if track is not None
    )
