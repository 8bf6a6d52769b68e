"""The verifier of clips: right on true renderings, wrong when the clip does something else."""

import numpy as np
import pytest

from scripts.datasets.shapes.motion import OPPOSITE, render_clip, sample_clip
from scripts.datasets.shapes.motion_captions import describe_clip
from scripts.verifiers.clips.prompt import read_clip_prompt
from scripts.verifiers.clips.tracking import outline_signature, rotation_between
from scripts.verifiers.clips.verdict import verify_clip
from scripts.verifiers.registry import VERIFIERS


def clip_and_caption(index: int):
    rng = np.random.default_rng([31, index])
    clip = sample_clip(rng, None)
    return clip, *describe_clip(clip, rng)


def test_every_caption_is_read_as_it_is_meant():
    for index in range(1500):
        clip, caption, canonical = clip_and_caption(index)
        *figures, background = canonical.split(" ; ")
        request = read_clip_prompt(caption)
        unsaid = "stays" if len(clip.actors) == 2 else ""
        got = {
            (each.figure.color, each.figure.shape, each.motion or unsaid, each.new_color) for each in request.figures
        }
        assert got == {tuple((figure.split() + [""])[2:6]) for figure in figures}, caption
        said = f"{request.pattern or 'plain'} {request.background}" if request.background else "any"
        assert background == f"background {said}", caption


@pytest.mark.parametrize("index", range(6))
def test_a_true_clip_is_right_and_does_not_flicker(index):
    clip, caption, _ = clip_and_caption(index)
    verdict = verify_clip(read_clip_prompt(caption), render_clip(clip, frames=9))
    assert verdict.right and verdict.flicker == 0, (caption, verdict)


def test_motions_are_counted_one_by_one_and_only_where_they_are_said():
    answers = VERIFIERS["clips"].answers
    verdict = verify_clip(
        read_clip_prompt("a red star and a blue ring that moves left"), np.zeros((3, 32, 32, 3), np.uint8)
    )
    assert verdict.asked == ("", "left")
    assert answers(verdict)["asked motions"] == answers(verdict)["motion: left"] == [False]
    assert answers(verdict)["motion: stays"] == []
    assert set(answers(verdict)) == set(VERIFIERS["clips"].rows)


@pytest.mark.parametrize("number", [9, 83])  # its color on the way, a figure is seen twice for a frame or two
def test_a_figure_that_changes_its_color_stays_one(number):
    task = VERIFIERS["clips"].task(number, 0, None)
    verdict = verify_clip(read_clip_prompt(task.prompt), render_clip(task.scene))
    assert verdict.asked == ("changes",) and verdict.right, (task.prompt, verdict)


def test_a_clip_played_backwards_is_wrong_where_it_should_be():
    reversible = (*OPPOSITE, "grows", "shrinks", "changes")
    chosen = [i for i in range(60) if len((clip := clip_and_caption(i)[0]).actors) == 1
              and clip.actors[0].motion in reversible][:4]  # fmt: skip
    for index in chosen:
        clip, caption, _ = clip_and_caption(index)
        verdict = verify_clip(read_clip_prompt(caption), render_clip(clip, frames=9)[::-1])
        assert verdict.motions == (False,), (caption, verdict)


def test_noise_is_counted_as_flicker_and_a_still_clip_moves_nothing():
    clip, _, _ = clip_and_caption(0)
    still = np.repeat(render_clip(clip, frames=2)[:1], 5, axis=0)
    noise = np.random.default_rng(0).integers(0, 5, still.shape, dtype=np.uint8)
    request = read_clip_prompt("a red circle moves left")
    assert verify_clip(request, still).motions == (False,)
    assert 1 < verify_clip(request, np.clip(still.astype(int) - noise, 0, 255).astype(np.uint8)).flicker < 3


def test_rotation_is_measured_in_degrees():
    y, x = np.mgrid[-40:41, -40:41]
    for turn in (5.0, -12.0, 20.0):
        masks = []
        for angle in (0.0, np.radians(turn)):
            across, down = x * np.cos(angle) + y * np.sin(angle), -x * np.sin(angle) + y * np.cos(angle)
            masks.append((abs(across) < 30) & (abs(down) < 12))
        assert abs(rotation_between(*map(outline_signature, masks)) - turn) < 1.5
    disc = outline_signature(x**2 + y**2 < 30**2)
    assert rotation_between(disc, disc) == 0
