"""The two worlds whose pictures come in series: clips of moving figures and views of solids.

Owns what the command `verify_sequences` asks of a world: tasks with true pictures, verdicts, rows of the table, and
the ways in which true pictures are spoilt to check the judge.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy
from scipy import ndimage

from scripts.drawn_world.motion import FRAMES, HELD_OUT_MOTIONS, render_clip, sample_clip
from scripts.drawn_world.motion_captions import describe_clip
from scripts.solid_world import HELD_OUT_SOLIDS, describe_object, render_views, sample_object
from scripts.verifier.clip_judge import ClipVerdict, judge_clip
from scripts.verifier.motion_prompt import read_clip_prompt
from scripts.verifier.views_judge import ViewsVerdict, judge_views
from scripts.verifier.views_prompt import read_views_prompt

Spoiler = Callable[[numpy.ndarray, numpy.random.Generator], numpy.ndarray]
Answers = dict[str, list[bool | None]]
FEWEST = 0.8  # mean overlap of silhouettes that counts as one


@dataclass(frozen=True)
class Task:
    """A prompt, its regular form, what it describes, and the picture size that its true pictures are drawn at."""

    number: int
    prompt: str
    canonical: str
    scene: Any


def soft(pictures: numpy.ndarray, rng: numpy.random.Generator) -> numpy.ndarray:
    """Pictures (F, H, W, 3) as a small model leaves them: a blur of 1 pixel and noise of 4 bytes in 64 pixels."""
    sigma = pictures.shape[1] / 64
    blurred = ndimage.gaussian_filter(pictures.astype(float), (0, sigma, sigma, 0))
    return numpy.clip(blurred + rng.normal(0, 4, pictures.shape), 0, 255).round().astype(numpy.uint8)


def still(pictures: numpy.ndarray, rng: numpy.random.Generator) -> numpy.ndarray:
    """The first picture all the time."""
    return numpy.repeat(pictures[:1], len(pictures), axis=0)


def reversed_but_first(pictures: numpy.ndarray, rng: numpy.random.Generator) -> numpy.ndarray:
    """The other way round."""
    return numpy.concatenate([pictures[:1], pictures[:0:-1]])


def shuffled(pictures: numpy.ndarray, rng: numpy.random.Generator) -> numpy.ndarray:
    """No picture where it was."""
    order = rng.permutation(len(pictures))
    while (order == numpy.arange(len(order))).any():
        order = rng.permutation(len(pictures))
    return pictures[order]


def with_a_stranger(pictures: numpy.ndarray, rng: numpy.random.Generator) -> numpy.ndarray:
    """One view of another object among the others."""
    number = int(rng.integers(len(pictures)))
    other = render_views(sample_object(rng, None), len(pictures), pictures.shape[1])
    return numpy.concatenate([pictures[:number], other[number : number + 1], pictures[number + 1 :]])


class World(ABC):
    """What the command asks of a world.

    Attributes:
        rows: of the table, with what each is a share of.
        judged: the rows that the judge must get right on true pictures.
        least: share of them that it must.
        spoilers: how true pictures are made wrong.
        keyword: argument of the pipeline that says how many pictures a series has.
        output: field of what the pipeline returns.
    """

    rows: ClassVar[dict[str, str]]
    judged: ClassVar[tuple[str, ...]]
    least: ClassVar[float] = 0.97
    spoilers: ClassVar[dict[str, Spoiler]]
    keyword: ClassVar[str]
    output: ClassVar[str]
    length: ClassVar[int]
    held_out: ClassVar[frozenset[tuple[str, str, str]]]

    def task(self, number: int, seed: int, held_out: bool | None) -> Task:
        """Task i depends on the seed and i only."""
        rng = numpy.random.default_rng([seed, number])
        scene = self.sample(rng, held_out)
        return Task(number, *self.describe(scene, rng), scene)

    @abstractmethod
    def sample(self, rng: numpy.random.Generator, held_out: bool | None) -> Any: ...

    @abstractmethod
    def describe(self, scene: Any, rng: numpy.random.Generator) -> tuple[str, str]: ...

    @abstractmethod
    def draw(self, scene: Any, length: int, size: int) -> numpy.ndarray:
        """True pictures (length, size, size, 3)."""

    @abstractmethod
    def judge(self, prompt: str, pictures: numpy.ndarray) -> Any: ...

    @abstractmethod
    def answers(self, verdict: Any) -> Answers:
        """Rights and wrongs for each row; None is not asked for."""

    @abstractmethod
    def number(self, verdict: Any) -> float:
        """What is measured beside right and wrong: flicker in bytes, or overlap."""


class Clips(World):
    """Figures that move: 17 frames; the number is the flicker."""

    rows: ClassVar = {
        "asked motions": "figures asked for",
        "right figure and colour": "figures asked for",
        "right colours": "figures asked for",
        "right shapes": "figures asked for",
        "no figure too many": "clips",
        "everything right": "clips",
    }
    judged: ClassVar = ("asked motions", "right colours", "right shapes")
    spoilers: ClassVar = {"standing still": still, "shuffled": shuffled}
    keyword, output, length, held_out = "num_frames", "frames", FRAMES, HELD_OUT_MOTIONS
    measured = "flicker, bytes"

    def sample(self, rng: numpy.random.Generator, held_out: bool | None) -> Any:
        return sample_clip(rng, held_out)

    def describe(self, scene: Any, rng: numpy.random.Generator) -> tuple[str, str]:
        return describe_clip(scene, rng)

    def draw(self, scene: Any, length: int, size: int) -> numpy.ndarray:
        return render_clip(scene, size, length)

    def judge(self, prompt: str, pictures: numpy.ndarray) -> ClipVerdict:
        return judge_clip(read_clip_prompt(prompt), pictures)

    def answers(self, verdict: ClipVerdict) -> Answers:
        return {
            "asked motions": list(verdict.motions),
            "right figure and colour": list(verdict.objects),
            "right colours": list(verdict.colours),
            "right shapes": list(verdict.shapes),
            "no figure too many": [verdict.surplus == 0],
            "everything right": [verdict.right],
        }

    def number(self, verdict: ClipVerdict) -> float:
        return verdict.flicker


class Solids(World):
    """Views of solids: 8 to 24; the number is the mean overlap of silhouettes."""

    rows: ClassVar = {
        "azimuth order right": "objects",
        f"mean overlap at least {FEWEST:.2f}": "objects",
        "one object in all views": "objects",
        "right solids": "solids asked for",
        "right colours": "solids asked for",
        "right marks": "solids asked for",
        "right relations": "objects",
        "right camera height": "prompts that say it",
        "right background": "prompts that say it",
        "everything right": "objects",
    }
    judged: ClassVar = (
        "azimuth order right",
        "one object in all views",
        "right solids",
        "right colours",
        "right marks",
    )
    spoilers: ClassVar = {
        "the other way round": reversed_but_first,
        "shuffled": shuffled,
        "the first view only": still,
        "one view of another object": with_a_stranger,
    }
    keyword, output, length, held_out = "num_views", "views", 8, HELD_OUT_SOLIDS
    measured = "overlap"

    def sample(self, rng: numpy.random.Generator, held_out: bool | None) -> Any:
        return sample_object(rng, held_out)

    def describe(self, scene: Any, rng: numpy.random.Generator) -> tuple[str, str]:
        return describe_object(scene, rng)

    def draw(self, scene: Any, length: int, size: int) -> numpy.ndarray:
        return render_views(scene, length, size)

    def judge(self, prompt: str, pictures: numpy.ndarray) -> ViewsVerdict:
        return judge_views(read_views_prompt(prompt), pictures)

    def answers(self, verdict: ViewsVerdict) -> Answers:
        return {
            "azimuth order right": [verdict.order],
            f"mean overlap at least {FEWEST:.2f}": [verdict.overlap >= FEWEST],
            "one object in all views": [verdict.one_object],
            "right solids": list(verdict.solids),
            "right colours": list(verdict.colours),
            "right marks": list(verdict.marks),
            "right relations": [verdict.relation],
            "right camera height": [verdict.view],
            "right background": [verdict.background],
            "everything right": [verdict.right],
        }

    def number(self, verdict: ViewsVerdict) -> float:
        return verdict.overlap


WORLDS: dict[str, World] = {"clips": Clips(), "views": Solids()}
