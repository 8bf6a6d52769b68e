"""The verifiers by the name of their data set, and what the command `scripts.verify` asks of each.

A verifier reads a sample's pixels, compares them with a request, and says what is right. It shares no code with the
data set; only here, where true samples check it, do both meet.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from scripts.datasets.registry import DATA_SETS, DataSet
from scripts.datasets.shapes import held_out_list
from scripts.datasets.shapes.motion import HELD_OUT_MOTIONS, MOTIONS
from scripts.datasets.solids import HELD_OUT_SOLIDS
from scripts.verifiers import disturbances as disturb
from scripts.verifiers.clips.prompt import read_clip_prompt
from scripts.verifiers.clips.verdict import ClipVerdict, verify_clip
from scripts.verifiers.pictures.figures import read_picture
from scripts.verifiers.pictures.prompt import Request, read_prompt
from scripts.verifiers.pictures.verdict import request_of_scene, verify_picture
from scripts.verifiers.pictures.wrong_requests import wrong_requests
from scripts.verifiers.views.prompt import read_views_prompt
from scripts.verifiers.views.verdict import verify_views

Disturbance = Callable[[np.ndarray, np.random.Generator], np.ndarray]
Answers = Iterable[bool | None]  # None is not asked for
ASKED_MOTIONS = (*MOTIONS, "stays", "cross")  # what a prompt may ask a figure to do


@dataclass(frozen=True)
class Task:
    """A prompt, its canonical form, and what it describes."""

    number: int
    prompt: str
    canonical: str
    scene: Any


@dataclass(frozen=True)
class TrueCase:
    """What a true sample shows, what is asked of it, and the generator of its disturbances."""

    scene: Any
    request: Any
    rng: np.random.Generator


@dataclass(frozen=True)
class Row:
    """A row of the table: what it is a share of, and verdict -> rights and wrongs."""

    of: str
    answers: Callable[[Any], Answers]


@dataclass(frozen=True)
class Verifier:
    """How samples of one data set are verified.

    Attributes:
        data_set: Where tasks and true samples come from.
        length_argument: Of the pipeline's call, "" where a sample is one picture.
        size: Of true samples, pixels a side.
        prompts, batch, per_sheet, sheets, columns, steps, guidance: Defaults of the command.
        rows: Of the table, by name.
        required: Rows that must be right in `least` of the true samples.
        held_out: Combinations that training never sees, as sorted lines.
        request: Task -> what its prompt asks for.
        read: Pictures -> what they show, without regard to the prompt.
        compare: (request, what was read) -> verdict, with `wrong`, one line per mistake, and `right`.
        disturbances: Harmless ones, by name; the first leaves everything as it is.
        spoilers: Disturbances that make a true sample wrong, by name.
        scene_request: Scene -> all that can be asked of it; None asks what its caption gives.
        wrong_requests: (request, generator) -> requests that differ in one respect, by its name.
        found: Whether what was read is an entry of results.json.
        measured, measure: A number that is reported beside right and wrong: its name, and verdict -> number.
    """

    data_set: DataSet
    length_argument: str
    size: int
    prompts: int
    batch: int
    per_sheet: int
    sheets: int
    columns: int
    rows: dict[str, Row]
    required: tuple[str, ...]
    least: float
    held_out: list[str]
    request: Callable[[Task], Any]
    read: Callable[[np.ndarray], Any]
    compare: Callable[[Any, Any], Any]
    disturbances: dict[str, Disturbance]
    spoilers: dict[str, Disturbance] = field(default_factory=dict)
    scene_request: Callable[[Any], Any] | None = None
    wrong_requests: Callable[[Any, np.random.Generator], dict[str, Any]] = lambda request, rng: {}
    found: bool = False
    measured: str = ""
    measure: Callable[[Any], float] | None = None
    steps: int = 30
    guidance: float = 4.0

    @property
    def of(self) -> dict[str, str]:
        """What each row is a share of."""
        return {name: row.of for name, row in self.rows.items()}

    def task(self, number: int, seed: int, held_out: bool | None) -> Task:
        """Return task `number`, which depends on the seed and the number only."""
        rng = np.random.default_rng([seed, number])
        scene = self.data_set.sample(rng, held_out)
        return Task(number, *self.data_set.describe(scene, rng), scene)

    def verify(self, request: Any, pictures: np.ndarray) -> Any:
        """Return the verdict on pictures (F, H, W, 3) of bytes."""
        return self.compare(request, self.read(pictures))

    def true_case(self, number: int, seed: int) -> TrueCase:
        """Return a true sample and what is asked of it."""
        if self.scene_request is None:
            task = self.task(number, seed, None)
            return TrueCase(task.scene, self.request(task), np.random.default_rng([seed, number, 1]))
        rng = np.random.default_rng([seed, number])
        scene = self.data_set.sample(rng, None)
        return TrueCase(scene, self.scene_request(scene), rng)

    def wrong_cases(self, case: TrueCase, pictures: np.ndarray) -> Iterator[tuple[str, Any, np.ndarray]]:
        """Yield names, requests and pictures that do not fit each other."""
        for name, request in self.wrong_requests(case.request, case.rng).items():
            yield f"wrong {name} noticed", request, pictures
        for name, spoil in self.spoilers.items():  # each with the same random numbers
            yield f"{name}: noticed", case.request, spoil(pictures, deepcopy(case.rng))

    def true_samples(
        self, count: int, seed: int, size: int | None, length: int | None
    ) -> Iterator[tuple[TrueCase, np.ndarray]]:
        """Yield true samples and their pictures."""
        for number in range(count):
            case = self.true_case(number, seed)
            yield case, self.data_set.render(case.scene, size or self.size, length or self.data_set.length)

    def true_verdicts(
        self, count: int, seed: int, disturbance: str, size: int | None = None, length: int | None = None
    ) -> Iterator[Any]:
        """Yield the verdicts on true samples under a harmless disturbance."""
        for case, pictures in self.true_samples(count, seed, size, length):
            yield self.verify(case.request, self.disturbances[disturbance](pictures, case.rng))

    def noticed(
        self, count: int, seed: int, size: int | None = None, length: int | None = None
    ) -> dict[str, tuple[int, int]]:
        """Return for each kind of wrong case: (how many were found wrong, how many there were)."""
        found, asked = Counter(), Counter()
        for case, pictures in self.true_samples(count, seed, size, length):
            reading = self.read(pictures)
            for name, request, shown in self.wrong_cases(case, pictures):
                verdict = self.compare(request, reading if shown is pictures else self.read(shown))
                found[name] += not verdict.right
                asked[name] += 1
        return {name: (found[name], asked[name]) for name in asked}

    def answers(self, verdict: Any) -> dict[str, list[bool | None]]:
        """Return the rights and wrongs of one verdict for each row."""
        return {name: list(row.answers(verdict)) for name, row in self.rows.items()}

    def tally(self, verdicts: Iterable[Any]) -> dict[str, tuple[int, int]]:
        """Return (right, asked) for each row of the table."""
        sums = {row: [0, 0] for row in self.rows}
        for verdict in verdicts:
            for row, answers in self.answers(verdict).items():
                asked = [answer for answer in answers if answer is not None]
                sums[row][0] += sum(asked)
                sums[row][1] += len(asked)
        return {row: (right, asked) for row, (right, asked) in sums.items()}


# --- pictures --------------------------------------------------------------------------------------------------------


PICTURES = Verifier(
    data_set=DATA_SETS["pictures"],
    length_argument="",
    size=128,
    prompts=500,
    batch=25,
    per_sheet=30,
    sheets=4,
    columns=6,
    rows={
        "right colours": Row("figures asked for", lambda verdict: [each.color_right for each in verdict.objects]),
        "right shapes": Row("figures asked for", lambda verdict: [each.shape_right for each in verdict.objects]),
        "right relations": Row("relations asked for", lambda verdict: [each.holds for each in verdict.relations]),
        "right relations, figures right too": Row(
            "relations asked for", lambda verdict: [each.strict for each in verdict.relations]
        ),
        "right counts": Row("groups asked for", lambda verdict: verdict.counts),
        "right sizes": Row(
            "figures whose size is given", lambda verdict: [each.size_right for each in verdict.objects]
        ),
        "right background colours": Row("prompts that give it", lambda verdict: [verdict.background_right]),
        "right background patterns": Row("prompts that give it", lambda verdict: [verdict.pattern_right]),
        "all colours right": Row("prompts", lambda verdict: [all(each.color_right for each in verdict.objects)]),
        "all shapes right": Row("prompts", lambda verdict: [all(each.shape_right for each in verdict.objects)]),
        "all relations right": Row(
            "prompts with a relation",
            lambda verdict: [all(each.holds for each in verdict.relations)] if verdict.relations else [],
        ),
        "no figure too many or too few": Row("prompts", lambda verdict: [verdict.figures_right]),
        "everything right": Row("prompts", lambda verdict: [verdict.right]),
    },
    required=("right colours", "right shapes", "right relations"),
    least=0.99,
    held_out=held_out_list(),
    request=lambda task: request_of_scene(task.scene, task.prompt),
    scene_request=request_of_scene,
    wrong_requests=wrong_requests,
    read=lambda pictures: read_picture(pictures[0]),
    compare=lambda request, reading: verify_picture(reading, request),
    disturbances={
        "as rendered": disturb.unchanged,
        "blurred (sigma 0.7 pixels)": disturb.blur,
        "JPEG, quality 75": disturb.compress,
        "noise (sigma 4 of 255)": disturb.add_noise,
        "colors off by 5 %": disturb.recolor,
        "blurred, recolored and JPEG": disturb.blur_recolor_compress,
    },
    found=True,
)


# --- pictures of one figure ------------------------------------------------------------------------------------------


def wrong_classes(request: Request, rng: np.random.Generator) -> dict[str, Request]:
    """Return requests for the same shape in another color, and for another shape in the same color."""
    wrong = wrong_requests(request, rng)
    return {name: wrong[name] for name in ("color", "shape")}


FIGURES = replace(
    PICTURES,
    data_set=DATA_SETS["figures"],
    prompts=1000,
    batch=50,
    per_sheet=80,
    sheets=1,
    columns=8,
    steps=50,
    guidance=1.5,
    rows={
        "right class": Row("pictures", lambda verdict: [verdict.right]),
        "right colours": PICTURES.rows["right colours"],
        "right shapes": PICTURES.rows["right shapes"],
        "one figure": Row("pictures", lambda verdict: [verdict.figures_right]),
    },
    required=("right class",),
    held_out=[],
    request=lambda task: read_prompt(f"a {task.prompt}"),
    scene_request=None,
    wrong_requests=wrong_classes,
)


# --- clips and views -------------------------------------------------------------------------------------------------


def _motions_right(verdict: ClipVerdict, name: str = "") -> list[bool]:
    """Return whether the figures of which a motion is asked, or this one, do it."""
    pairs = zip(verdict.asked, verdict.motions, strict=True)
    return [right for asked, right in pairs if asked and name in ("", asked)]


_SERIES: dict[str, Any] = {
    "size": 128,
    "batch": 10,
    "per_sheet": 20,
    "sheets": 2,
    "columns": 2,
    "least": 0.97,
    "read": lambda pictures: pictures,
    "disturbances": {"as rendered": disturb.unchanged, "blurred and noisy": disturb.soften},
}
CLIPS = Verifier(
    **_SERIES,
    data_set=DATA_SETS["clips"],
    length_argument="num_frames",
    prompts=300,
    rows={
        "asked motions": Row("figures whose motion is given", _motions_right),
        "right figure and colour": Row("figures asked for", lambda verdict: verdict.objects),
        "right colours": Row("figures asked for", lambda verdict: verdict.colors),
        "right shapes": Row("figures asked for", lambda verdict: verdict.shapes),
        "no figure too many": Row("clips", lambda verdict: [verdict.surplus == 0]),
        "everything right": Row("clips", lambda verdict: [verdict.right]),
        **{
            f"motion: {name}": Row("figures asked for it", partial(_motions_right, name=name))
            for name in ASKED_MOTIONS
        },
    },
    required=("asked motions", "right colours", "right shapes"),
    held_out=sorted(map(" ".join, HELD_OUT_MOTIONS)),
    request=lambda task: read_clip_prompt(task.prompt),
    spoilers={"standing still": disturb.freeze, "shuffled": disturb.shuffle},
    compare=verify_clip,
    measured="flicker, bytes",
    measure=lambda verdict: verdict.flicker,
)
VIEWS = Verifier(
    **_SERIES,
    data_set=DATA_SETS["views"],
    length_argument="num_views",
    prompts=200,
    rows={
        "azimuth order right": Row("objects", lambda verdict: [verdict.order]),
        "mean overlap at least 0.80": Row("objects", lambda verdict: [verdict.overlap >= 0.8]),
        "one object in all views": Row("objects", lambda verdict: [verdict.one_object]),
        "right solids": Row("solids asked for", lambda verdict: verdict.solids),
        "right colours": Row("solids asked for", lambda verdict: verdict.colors),
        "right marks": Row("solids asked for", lambda verdict: verdict.marks),
        "right relations": Row("objects", lambda verdict: [verdict.relation]),
        "right camera height": Row("prompts that give it", lambda verdict: [verdict.view]),
        "right background": Row("prompts that give it", lambda verdict: [verdict.background]),
        "everything right": Row("objects", lambda verdict: [verdict.right]),
    },
    required=("azimuth order right", "one object in all views", "right solids", "right colours", "right marks"),
    held_out=sorted(map(" ".join, HELD_OUT_SOLIDS)),
    request=lambda task: read_views_prompt(task.prompt),
    spoilers={
        "the other way round": disturb.reverse_but_first,
        "shuffled": disturb.shuffle,
        "the first view only": disturb.freeze,
        "one view of another object": disturb.exchange_one_view,
    },
    compare=verify_views,
    measured="overlap",
    measure=lambda verdict: verdict.overlap,
)
VERIFIERS: dict[str, Verifier] = {"pictures": PICTURES, "figures": FIGURES, "clips": CLIPS, "views": VIEWS}
