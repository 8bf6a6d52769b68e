"""What a model makes of held-out prompts, in numbers: requests, readings of a judge, baselines, copying, sheets."""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ptdit_diffusers.core.files import replace_json
from scripts.datasets.emoji.captions import main_caption
from scripts.datasets.emoji.drawing import COLORS, WHITE, on_ground, visibility
from scripts.datasets.emoji.icons import FAMILIES, STYLES
from scripts.datasets.emoji.pictures import Picture, load, read_index, style_numbers
from scripts.datasets.emoji.shards import VISIBLE
from scripts.datasets.emoji.split import Split, place, read_split
from scripts.emoji.judges import concept_codes, judge_path
from scripts.emoji.sheets import write_sheets
from scripts.evaluation.records import now, versions
from scripts.verifiers.emoji.judge import Judge, Reading, load_judge
from scripts.verifiers.emoji.plain_style import PlainStyle
from scripts.verifiers.emoji.scores import (
    Asked,
    frechet_distance,
    ground_color,
    kernel_distance,
    nearest,
    shares,
    small,
)

KINDS = {  # what is asked -> what it is
    "trained": "pictures of training",
    "pairs": "concept and style seen, never together",
    "tones": "role and tone of skin seen, never together",
    "genders": "role and gender seen, never together",
    "grounds": "style and ground seen, never together",
    "unseen": "concept never seen",
}
COLUMNS = ("concept", "concept_5", "style", "both", "tone", "concept_tone", "ground", "all")
SETTINGS = ("model", "lora", "shape", "number", "steps", "guidance", "seed")
PACKAGES = ("torch", "diffusers", "numpy")


@dataclass(frozen=True)
class Request:
    """A prompt and the true picture of it."""

    kind: str
    picture: Picture
    ground: str

    @property
    def prompt(self) -> str:
        """What the model is asked for."""
        return main_caption(self.picture.emoji, self.picture.style, self.ground)


def requests(folder: Path, pictures: Sequence[Picture], split: Split, number: int) -> list[Request]:
    """Return at most `number` requests of each kind, always the same ones."""
    selected = [each for each in pictures if each.selected]
    found = []
    for kind in KINDS:
        if kind == "grounds":
            found += ground_requests(folder, selected, split, number)
            continue
        wanted = "" if kind == "trained" else kind
        members = [
            each for each in selected if split.kind(each) == wanted and (kind == "tones" or not each.emoji.tone)
        ]
        members = [each for each in members if visibility(load(folder, each), COLORS[WHITE]) >= VISIBLE]
        members = sorted(members, key=lambda each: place(f"evaluate {kind}", each.file))[:number]
        found += [Request(kind, each, WHITE) for each in members]
    return found


def ground_requests(folder: Path, selected: Sequence[Picture], split: Split, number: int) -> list[Request]:
    """Return trained pictures on grounds that were never seen with their style."""
    found = []
    share = max(1, number // len(split.grounds))
    for style, ground in sorted(split.grounds):
        members = [each for each in selected if each.style == style and not split.kind(each) and not each.emoji.tone]
        members = sorted(members, key=lambda each: place(f"evaluate {ground}", each.file))
        visible = (each for each in members if visibility(load(folder, each), COLORS[ground]) >= VISIBLE)
        found += [Request("grounds", each, ground) for each, _ in zip(visible, range(share), strict=False)]
    return found


def truths(folder: Path, found: Sequence[Request]) -> np.ndarray:
    """Return the true pictures (N, H, W, 3) of requests."""
    return np.stack([on_ground(load(folder, each.picture), COLORS[each.ground]) for each in found])


def asked_of(found: Sequence[Request], codes: Sequence[str]) -> Asked:
    """Return what pictures of requests should show."""
    number = {code: index for index, code in enumerate(codes)}
    return Asked(
        np.array([number[each.picture.emoji.base] for each in found]),
        style_numbers(each.picture for each in found),
        np.array([each.picture.emoji.tone for each in found]),
    )


def grounds_right(pictures: np.ndarray, found: Sequence[Request]) -> np.ndarray:
    """Return whether the named color that is nearest to each border is the one asked for (N,)."""
    names, colors = list(COLORS), np.array(list(COLORS.values()), np.float32)
    distances = ((ground_color(pictures)[:, None] - colors) ** 2).sum(-1)
    return np.array([names[best] for best in distances.argmin(1)]) == np.array([each.ground for each in found])


def twin_groups(pictures: Sequence[Picture], codes: Sequence[str]) -> np.ndarray:
    """Return the group of near-duplicates of each concept (K,), as the number of one of them."""
    twins = {each.emoji.base: each.twins for each in pictures if each.everywhere}
    number = {code: index for index, code in enumerate(codes)}
    return np.array([number[twins[code]] for code in codes])


def table(
    found: Sequence[Request], pictures: np.ndarray, reading: Reading, codes: Sequence[str], groups: np.ndarray
) -> dict:
    """Return the shares that are right, kind by kind; groups are those of all concepts, asked for or not."""
    asked, right, rows = asked_of(found, codes), grounds_right(pictures, found), {}
    for kind in KINDS:
        mine = np.array([index for index, each in enumerate(found) if each.kind == kind], int)
        if len(mine):
            part = Reading(*(values[mine] for values in vars(reading).values()))
            few = Asked(*(values[mine] for values in vars(asked).values()))
            rows[kind] = {
                "pictures": len(mine),
                **shares(part, few, groups, right[mine] if kind == "grounds" else None),
            }
    return rows


@dataclass(frozen=True)
class Trained:
    """The pictures of training, on white, as a judge and as pixels see them."""

    pictures: list[Picture]
    pixels: np.ndarray  # (M, H, W, 3)
    embeddings: np.ndarray
    small: np.ndarray


def trained_pictures(folder: Path, pictures: Sequence[Picture], split: Split, judge: Judge) -> Trained:
    """Return the pictures that training sees."""
    known = [each for each in pictures if each.selected and not split.kind(each)]
    pixels = np.stack([on_ground(load(folder, each), COLORS[WHITE]) for each in known])
    return Trained(known, pixels, judge.read(pixels).embeddings, small(pixels))


def copying(found: Sequence[Request], pictures: np.ndarray, reading: Reading, trained: Trained) -> dict:
    """Return how near pictures of held-out pairs come to pictures of training, and to which."""
    mine = np.array([index for index, each in enumerate(found) if each.kind == "pairs"], int)
    if not len(mine):
        return {}
    rows = {"judge": (reading.embeddings[mine], trained.embeddings), "pixels": (small(pictures[mine]), trained.small)}
    numbers = {}
    for name, (values, known) in rows.items():
        best, distance = nearest(values, known)
        others = [
            trained.pictures[number].emoji.base == found[index].picture.emoji.base
            for number, index in zip(best, mine, strict=True)
        ]
        numbers[name] = {
            "distance": round(float(distance.mean()), 4),
            "least": round(float(distance.min()), 4),
            "other_style_of_the_concept": round(float(np.mean(others)), 4),
        }
    return numbers


def baselines(
    found: Sequence[Request], judge: Judge, trained: Trained, codes: Sequence[str], groups: np.ndarray
) -> dict:
    """Return what copying gives for held-out pairs: the nearest other style of the concept, and the right style of a
    random concept.
    """
    pairs = [each for each in found if each.kind == "pairs"]
    if not pairs:
        return {}
    by_concept: dict[str, list[int]] = {}
    for number, each in enumerate(trained.pictures):
        if not each.emoji.tone:
            by_concept.setdefault(each.emoji.base, []).append(number)
    choice, copies, randoms = np.random.default_rng(0), [], []
    for each in pairs:
        family = FAMILIES[each.picture.style]
        options = [n for n in by_concept[each.picture.emoji.base] if FAMILIES[trained.pictures[n].style] != family]
        same = [n for n, other in enumerate(trained.pictures) if other.style == each.picture.style]
        copies.append(int(options[choice.integers(len(options))]))
        randoms.append(int(same[choice.integers(len(same))]))
    result = {}
    for name, numbers in (("another style of the concept", copies), ("a random concept in the style", randoms)):
        pixels = trained.pixels[numbers]
        result[name] = table(pairs, pixels, judge.read(pixels), codes, groups)["pairs"]
    return result


def plain_styles(found: Sequence[Request], pictures: np.ndarray, judge: PlainStyle) -> dict[str, float]:
    """Return how often the style of pictures on white is right by colors and edges alone, kind by kind."""
    rows = {}
    for kind in KINDS:
        mine = [index for index, each in enumerate(found) if each.kind == kind and each.ground == WHITE]
        if mine:
            asked = style_numbers(found[index].picture for index in mine)
            rows[kind] = round(float((judge.read(pictures[mine]) == asked).mean()), 4)
    return rows


def set_distances(made: np.ndarray, true: np.ndarray) -> dict[str, dict]:
    """Return distances between the features (N, D) of pictures and of true ones, beside those of halves.

    Halves are of the same sizes: one of the true pictures against the other half of them, or of the pictures.
    """
    order, names = np.random.default_rng(0).permutation(len(true)), ("mean", "deviation")
    one, other = order[::2], order[1::2]
    return {
        "kernel_distance": dict(zip(names, kernel_distance(made, true), strict=True)),
        "kernel_distance_of_true_halves": dict(zip(names, kernel_distance(true[one], true[other]), strict=True)),
        "frechet_distance_of_halves": {
            "made": frechet_distance(made[one], true[other]),
            "true": frechet_distance(true[one], true[other]),
        },
    }


def as_text(rows: dict, truth: dict) -> str:
    """Return the table: percentages of the pictures, and of true pictures in parentheses."""
    lines = [f"{'':9}{'pictures':>9}" + "".join(f"{name:>16}" for name in COLUMNS)]
    for kind, row in rows.items():
        cells = [f"{100 * row[name]:.1f} ({100 * truth[kind][name]:.1f})" if name in row else "" for name in COLUMNS]
        lines.append(f"{kind:9}{row['pictures']:>9}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines) + "\n"


def evaluate(args: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Make pictures, judge them, and write results.json, table.txt and sheets.

    Raises:
        ValueError: Data, judge or model are missing.
    """
    judge, start = load_judge(judge_path(args.data, args.shape)), time.time()
    pictures, split = read_index(args.data), read_split()
    if judge.concepts != (codes := concept_codes(pictures)):
        raise ValueError(f"{judge_path(args.data, args.shape)} was trained on other pictures; train it again.")
    found = requests(args.data, pictures, split, args.number)
    true = truths(args.data, found)
    made = make_pictures(found, args) if args.model else true
    trained = trained_pictures(args.data, pictures, split, judge)
    reading, true_reading = judge.read(made), judge.read(true)
    groups = twin_groups(pictures, codes)
    rows, truth = table(found, made, reading, codes, groups), table(found, true, true_reading, codes, groups)
    plain_style = PlainStyle.learn(trained.pixels, style_numbers(trained.pictures))
    results = {
        "date": now(),
        "seconds": round(time.time() - start, 1),
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "versions": versions(PACKAGES),
        "kinds": KINDS,
        "table": rounded(rows),
        "true_pictures": rounded(truth),
        "baselines_for_pairs": rounded(baselines(found, judge, trained, codes, groups)),
        "copying_of_pairs": copying(found, made, reading, trained),
        "copying_of_true_pairs": copying(found, true, true_reading, trained),
        "style_by_colors_and_edges": plain_styles(found, made, plain_style),
        "style_by_colors_and_edges_of_true_pictures": plain_styles(found, true, plain_style),
        **set_distances(reading.features, true_reading.features),
        "pictures": [
            {"kind": each.kind, "prompt": each.prompt, "seed": args.seed + index}
            | {"read": [codes[int(reading.concepts[index, 0])], list(STYLES.values())[int(reading.styles[index])]]}
            for index, each in enumerate(found)
        ],
    }
    args.output.mkdir(parents=True, exist_ok=True)
    replace_json(args.output / "results.json", results)
    text = as_text(rows, truth)
    (args.output / "table.txt").write_text(text, encoding="utf-8")
    write_sheets(args.output, found, made, true, reading, trained)
    say(text + summary(results))


def make_pictures(found: Sequence[Request], args: argparse.Namespace, name: str = "pictures") -> np.ndarray:
    """Return the model's pictures (N, H, W, 3) of requests; they are also written, one by one, to a folder."""
    from scripts.evaluation.generate import generate, load_pipeline, to_bytes

    pipe = load_pipeline(args.model, args.device)
    if args.lora:
        pipe.load_lora_weights(args.lora)
    folder = args.output / name
    folder.mkdir(parents=True, exist_ok=True)
    options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance, "height": 128, "width": 128}
    pictures = []
    for index, sample in enumerate(
        generate(pipe, [each.prompt for each in found], seed=args.seed, batch=args.batch, **options)
    ):
        pictures.append(to_bytes(sample))
        Image.fromarray(pictures[-1]).save(folder / f"{index:04d}.png")
    return np.stack(pictures)


def rounded(rows: dict) -> dict:
    """Return shares with four digits."""
    return {name: {key: round(value, 4) for key, value in row.items()} for name, row in rows.items()}


def summary(results: dict) -> str:
    """Return baselines, copying and the distance between sets as lines."""
    lines = ["shares in percent, those of true pictures in parentheses"]
    for name, row in results["baselines_for_pairs"].items():
        numbers = ", ".join(f"{key} {100 * row[key]:.1f}" for key in ("concept", "style", "both"))
        lines.append(f"pairs, {name}: {numbers}")
    for name, row in results["copying_of_pairs"].items():
        true, key = results["copying_of_true_pairs"][name], "other_style_of_the_concept"
        lines.append(
            f"pairs, nearest picture of training by {name}: distance {row['distance']:.3f} "
            f"(true {true['distance']:.3f}); the same concept in another style {100 * row[key]:.0f} % "
            f"(true {100 * true[key]:.0f} %)"
        )
    made, true = (results[f"style_by_colors_and_edges{end}"] for end in ("", "_of_true_pictures"))
    shown = ", ".join(f"{kind} {100 * made[kind]:.1f} ({100 * true[kind]:.1f})" for kind in made)
    lines.append(f"style by colors and edges alone: {shown}")
    made, true = results["kernel_distance"], results["kernel_distance_of_true_halves"]
    halves = f"halves of true pictures {true['mean']:.2f} +- {true['deviation']:.2f}"
    lines.append(f"kernel distance x 1000: {made['mean']:.2f} +- {made['deviation']:.2f}; {halves}")
    made, true = (results["frechet_distance_of_halves"][name] for name in ("made", "true"))
    lines.append(f"Frechet distance of halves: {made:.2f}; of true ones {true:.2f}")
    return "\n".join(lines)
