"""Clips: figures stay in the picture and do what is said, captions use known words, held-out clips are kept apart."""

import numpy as np
import pytest

from scripts.datasets.shapes.captions import caption_words
from scripts.datasets.shapes.motion import (
    DIRECTIONS,
    FRAMES,
    HELD_OUT_MOTIONS,
    MOTIONS,
    Actor,
    Clip,
    Placement,
    is_held_out_clip,
    render_clip,
    sample_clip,
)
from scripts.datasets.shapes.motion_captions import CLIP_VOCABULARY, describe_clip
from scripts.datasets.shapes.palette import FIGURE_RGB
from scripts.datasets.shapes.shapes import placed_outline
from scripts.datasets.shapes.words import COLOR_WORDS


def clips(number: int, held_out: bool | None = False) -> list[Clip]:
    return [sample_clip(np.random.default_rng([5, index]), held_out) for index in range(number)]


def outline_at(actor: Actor, time: float) -> np.ndarray:
    placement = actor.at(time)
    return placed_outline(actor.shape, placement.x, placement.y, placement.radius, placement.angle)


def test_figures_stay_inside_the_picture_and_never_touch():
    for clip in clips(400):
        for time in np.linspace(0, 1, FRAMES):
            boxes = [(points.min(0), points.max(0)) for points in (outline_at(actor, time) for actor in clip.actors)]
            assert all((low >= 0).all() and (high <= 1).all() for low, high in boxes), clip
            if len(boxes) == 2:
                (low, high), (other_low, other_high) = boxes
                assert ((high < other_low) | (other_high < low)).any(), clip


def test_every_figure_does_what_its_motion_says():
    seen = set()
    for actor in (actor for clip in clips(600) for actor in clip.actors):
        first, middle, last = actor.at(0), actor.at(0.5), actor.at(1)
        seen.add(actor.motion)
        if actor.motion in DIRECTIONS:
            across, down = DIRECTIONS[actor.motion]
            assert 0.34 - 1e-9 <= (last.x - first.x) * across + (last.y - first.y) * down <= 0.42 + 1e-9
            assert first.y == last.y if across else first.x == last.x
        elif actor.motion == "bounces":
            assert abs(first.y - last.y) < 1e-9 and 0.19 - 1e-9 <= first.y - middle.y <= 0.24 + 1e-9
            assert middle.y < actor.at(0.25).y == pytest.approx(actor.at(0.75).y)
        elif actor.motion in ("grows", "shrinks"):
            ratio = last.radius / first.radius
            assert ratio > 1.9 if actor.motion == "grows" else ratio < 1 / 1.9
        elif actor.motion == "rotates":
            assert 84 <= last.angle - first.angle <= 96 and actor.shape not in ("circle", "ring")
        else:
            assert first == last
    assert seen == {*MOTIONS, "stays"}


def test_a_color_changes_gradually_and_completely():
    placement = Placement(0.5, 0.5, 0.2, 0.0)
    clip = Clip((Actor("square", "red", "", "changes", placement, placement, "blue"),), "white", "plain")
    frames = render_clip(clip, 64)
    assert frames.shape == (FRAMES, 64, 64, 3) and frames.dtype == np.uint8
    middle = frames[:, 32, 32].astype(float)
    assert np.abs(middle[0] - FIGURE_RGB["red"]).max() < 20 and np.abs(middle[-1] - FIGURE_RGB["blue"]).max() < 20
    assert (np.diff(middle[:, 0]) <= 0).all() and (np.diff(middle[:, 2]) >= 0).all()
    assert np.array_equal(frames[0, :8], frames[-1, :8])  # the background stands still
    assert np.array_equal(frames, render_clip(clip, 64))


@pytest.mark.parametrize("held_out", [False, True])
def test_held_out_clips_are_kept_apart(held_out):
    assert {is_held_out_clip(clip) for clip in clips(200, held_out)} == {held_out}
    possible = 10 * (8 * len(MOTIONS) - 2)  # circles and rings do not rotate
    assert 0.06 < len(HELD_OUT_MOTIONS) / possible < 0.14


def place_of(color: str, caption: str) -> int:
    return min(place for word in COLOR_WORDS.get(color, (color,)) if (place := caption.find(word)) >= 0)


def test_captions_use_known_words_and_say_what_is_there():
    for index, clip in enumerate(clips(1500, None)):
        caption, canonical = describe_clip(clip, np.random.default_rng([6, index]))
        assert set(caption_words(f"{caption} {canonical}")) <= set(CLIP_VOCABULARY), caption
        *figures, background = canonical.split(" ; ")
        assert background in ("background any", f"background {clip.pattern} {clip.background}")
        assert len(figures) == len(clip.actors)
        for actor in clip.actors:
            assert any(f" {actor.color} {actor.shape} " in figure for figure in figures), (caption, canonical)
        if "cross" in figures[0].split()[4:]:
            assert {actor.motion for actor in clip.actors} == {"left", "right"}
            right, left = sorted(clip.actors, key=lambda actor: actor.motion == "left")
            assert place_of(right.color, caption) < place_of(left.color, caption)  # the first that is named
        else:
            assert {figure.split()[4] for figure in figures} == {actor.motion for actor in clip.actors}


def test_a_clip_backwards_shows_the_same_frames_backwards():
    for clip in clips(60):
        backwards = clip.reversed()
        if any(actor.motion == "rotates" for actor in clip.actors):
            assert backwards is None  # figures rotate clockwise only
            assert all(actor.end.angle - actor.start.angle > 60 for actor in clip.actors if actor.motion == "rotates")
            continue
        assert backwards.reversed() == clip
        assert (render_clip(backwards, 32) == render_clip(clip, 32)[::-1]).mean() > 0.999
        for actor, other in zip(clip.actors, backwards.actors, strict=True):
            if actor.motion in ("left", "right", "up", "down", "grows", "shrinks"):
                assert other.motion != actor.motion
            else:
                assert other.motion == actor.motion
