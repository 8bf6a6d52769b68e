"""The two worlds whose pictures come in series: clips of moving figures and views of solids.

Owns what the command `verify_sequences` asks of a world: tasks with true pictures, verdicts, rows of the table, and
the ways in which true pictures are spoilt to check the judge.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from scripts.datasets.shapes.motion import FRAMES, HELD_OUT_MOTIONS, MOTIONS, render_clip, sample_clip
from scripts.datasets.shapes.motion_captions import describe_clip
from scripts.datasets.solids import HELD_OUT_SOLIDS, describe_object, render_views, sample_object
from scripts.verifiers.clips.prompt import read_clip_prompt
from scripts.verifiers.clips.verdict import ClipVerdict, verify_clip
from scripts.verifiers.views.prompt import read_views_prompt
from scripts.verifiers.views.verdict import ViewsVerdict, verify_views

Spoiler = Callable[[np.ndarray, np.random.Generator], np.ndarray]
Answers = dict[str, list[bool | None]]
ASKED = (*MOTIONS, "stays", "cross")  # what a prompt may ask a figure to do
LEAST = 0.97  # share that a judge must get right on true pictures


@dataclass(frozen=True)
class Task:
    """A prompt, its regular form, and what it describes."""

    number: int
    prompt: str
    canonical: str
    scene: Any


def soft(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pictures (F, H, W, 3) as a small model leaves them: a blur of 1 pixel and noise of 4 bytes in 64 pixels."""
    sigma = pictures.shape[1] / 64
    blurred = ndimage.gaussian_filter(pictures.astype(float), (0, sigma, sigma, 0))
    return np.clip(blurred + rng.normal(0, 4, pictures.shape), 0, 255).round().astype(np.uint8)


def still(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The first picture all the time."""
    return np.repeat(pictures[:1], len(pictures), axis=0)


def reversed_but_first(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The other way round."""
    return np.concatenate([pictures[:1], pictures[:0:-1]])


def shuffled(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """No picture where it was."""
    order = rng.permutation(len(pictures))
    while (order == np.arange(len(order))).any():
        order = rng.permutation(len(pictures))
    return pictures[order]


def with_a_stranger(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One view of another object among the others."""
    number = int(rng.integers(len(pictures)))
    other = render_views(sample_object(rng, None), len(pictures), pictures.shape[1])
    return np.concatenate([pictures[:number], other[number : number + 1], pictures[number + 1 :]])


@dataclass(frozen=True)
class Series:
    """What the command asks of a world.

    Attributes:
        keyword, output: argument of the pipeline that says how many pictures a series has; field that it returns.
        length: how many by default.
        prompts: how many by default.
        rows: of the table, with what each is a share of.
        judged: the rows that the judge must get right on true pictures.
        measured: name of the number that is reported beside right and wrong.
        spoilers: how true pictures are made wrong.
        held_out: combinations that training never sees.
        sample: (generator, held_out) -> a scene.
        describe: (scene, generator) -> prompt and its regular form.
        render: (scene, length, size) -> true pictures (length, size, size, 3).
        judge: (prompt, pictures) -> verdict.
        answers: verdict -> rights and wrongs for each row; None is not asked for.
        number: verdict -> what is measured.
    """

    keyword: str
    output: str
    length: int
    prompts: int
    rows: dict[str, str]
    judged: tuple[str, ...]
    measured: str
    spoilers: dict[str, Spoiler]
    held_out: frozenset[tuple[str, str, str]]
    sample: Callable[[np.random.Generator, bool | None], Any]
    describe: Callable[[Any, np.random.Generator], tuple[str, str]]
    render: Callable[[Any, int, int], np.ndarray]
    verify_picture: Callable[[str, np.ndarray], Any]
    answers: Callable[[Any], Answers]
    number: Callable[[Any], float]

    def task(self, number: int, seed: int, held_out: bool | None) -> Task:
        """Task i depends on the seed and i only."""
        rng = np.random.default_rng([seed, number])
        scene = self.sample(rng, held_out)
        return Task(number, *self.describe(scene, rng), scene)


def _clip_answers(verdict: ClipVerdict) -> Answers:
    moves = [(asked, right) for asked, right in zip(verdict.asked, verdict.motions, strict=True) if asked]
    return {
        "asked motions": [right for _, right in moves],
        "right figure and colour": list(verdict.objects),
        "right colours": list(verdict.colors),
        "right shapes": list(verdict.shapes),
        "no figure too many": [verdict.surplus == 0],
        "everything right": [verdict.right],
        **{f"motion: {name}": [right for asked, right in moves if asked == name] for name in ASKED},
    }


def _views_answers(verdict: ViewsVerdict) -> Answers:
    return {
        "azimuth order right": [verdict.order],
        "mean overlap at least 0.80": [verdict.overlap >= 0.8],
        "one object in all views": [verdict.one_object],
        "right solids": list(verdict.solids),
        "right colours": list(verdict.colors),
        "right marks": list(verdict.marks),
        "right relations": [verdict.relation],
        "right camera height": [verdict.view],
        "right background": [verdict.background],
        "everything right": [verdict.right],
    }


SERIES: dict[str, Series] = {
    "clips": Series(
        keyword="num_frames",
        output="frames",
        length=FRAMES,
        prompts=300,
        rows={
            "asked motions": "figures whose motion is said",
            "right figure and colour": "figures asked for",
            "right colours": "figures asked for",
            "right shapes": "figures asked for",
            "no figure too many": "clips",
            "everything right": "clips",
            **{f"motion: {name}": "figures asked for it" for name in ASKED},
        },
        judged=("asked motions", "right colours", "right shapes"),
        measured="flicker, bytes",
        spoilers={"standing still": still, "shuffled": shuffled},
        held_out=HELD_OUT_MOTIONS,
        sample=sample_clip,
        describe=describe_clip,
        render=lambda clip, length, size: render_clip(clip, size, length),
        verify_picture=lambda prompt, pictures: verify_clip(read_clip_prompt(prompt), pictures),
        answers=_clip_answers,
        number=lambda verdict: verdict.flicker,
    ),
    "views": Series(
        keyword="num_views",
        output="views",
        length=8,
        prompts=200,
        rows={
            "azimuth order right": "objects",
            "mean overlap at least 0.80": "objects",
            "one object in all views": "objects",
            "right solids": "solids asked for",
            "right colours": "solids asked for",
            "right marks": "solids asked for",
            "right relations": "objects",
            "right camera height": "prompts that say it",
            "right background": "prompts that say it",
            "everything right": "objects",
        },
        judged=("azimuth order right", "one object in all views", "right solids", "right colours", "right marks"),
        measured="overlap",
        spoilers={
            "the other way round": reversed_but_first,
            "shuffled": shuffled,
            "the first view only": still,
            "one view of another object": with_a_stranger,
        },
        held_out=HELD_OUT_SOLIDS,
        sample=sample_object,
        describe=describe_object,
        render=render_views,
        verify_picture=lambda prompt, pictures: verify_views(read_views_prompt(prompt), pictures),
        answers=_views_answers,
        number=lambda verdict: verdict.overlap,
    ),
}
