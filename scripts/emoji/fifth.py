"""A fifth style from twenty pictures: the folder for `ptdit lora`, and what a model makes with that LoRA.

The set is drawn in black lines by the authors of two of the four sets. No model has seen it.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ptdit_diffusers.core.files import replace_json
from scripts.datasets.emoji.drawing import COLORS, WHITE, draw, on_ground
from scripts.datasets.emoji.icons import FIFTH, read_svgs
from scripts.datasets.emoji.pictures import Picture, read_index, style_numbers
from scripts.datasets.emoji.shards import Sample, make_sample, png, write_folder
from scripts.datasets.emoji.split import Split, place, read_split
from scripts.emoji.evaluate import (
    PACKAGES,
    SETTINGS,
    Request,
    asked_of,
    make_pictures,
    requests,
    rounded,
    table,
    trained_pictures,
    truths,
    twin_groups,
)
from scripts.emoji.judges import concept_codes, judge_path
from scripts.emoji.sheets import COLUMNS, grid
from scripts.evaluation.records import now, versions
from scripts.verifiers.emoji.judge import load_judge
from scripts.verifiers.emoji.plain_style import PlainStyle
from scripts.verifiers.emoji.scores import nearest, shares, small

LEARNED = 20  # pictures of the LoRA


def fifth_pictures(pictures: Sequence[Picture], split: Split) -> list[Picture]:
    """Return the fifth set as pictures, in a fixed order: of concepts that the model knows in every style."""
    hidden = {each.emoji.base for each in pictures if split.kind(each)}
    known = [
        replace(each, style=FIFTH)
        for each in pictures
        if each.style == "fluent" and each.selected and not each.emoji.tone and each.emoji.base not in hidden
    ]
    return sorted(known, key=lambda each: place(FIFTH, each.emoji.code))


def drawn(folder: Path, pictures: Sequence[Picture]) -> np.ndarray:
    """Return pictures of the fifth set on white (N, H, W, 3)."""
    svgs = read_svgs(folder / "packages", FIFTH)
    return np.stack([on_ground(draw(svgs[each.emoji.code], FIFTH), COLORS[WHITE]) for each in pictures])


def write_fifth(folder: Path, output: Path) -> int:
    """Write the pictures of the LoRA with their plainest captions, and return how many there are.

    Raises:
        ValueError: The folder exists, or the data are missing.
    """
    chosen = fifth_pictures(read_index(folder), read_split())[:LEARNED]
    found: list[Sample] = [
        make_sample(each, png(pixels), WHITE, 0) for each, pixels in zip(chosen, drawn(folder, chosen), strict=True)
    ]
    return write_folder(output, found)


def evaluate_fifth(args: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Make things in the fifth style, and pictures of training in the four others, without the LoRA and with it.

    Raises:
        ValueError: Data, judge, model or LoRA are missing.
    """
    judge, pictures, split = load_judge(judge_path(args.data, args.shape)), read_index(args.data), read_split()
    codes = concept_codes(pictures)
    groups = twin_groups(pictures, codes)
    fifth = fifth_pictures(pictures, split)
    asked, others = fifth[LEARNED : LEARNED + args.number], fifth[LEARNED + args.number :]
    wanted = [Request("fifth", each, WHITE) for each in asked]
    kept = [each for each in requests(args.data, pictures, split, args.number) if each.kind == "trained"]
    true, learned = drawn(args.data, asked), drawn(args.data, fifth[:LEARNED])
    trained = trained_pictures(args.data, pictures, split, judge)
    known = np.concatenate([trained.pixels, drawn(args.data, others)])
    plain_style = PlainStyle.learn(known, style_numbers([*trained.pictures, *others]))

    def judged(four: np.ndarray) -> dict[str, float]:
        return rounded(table(kept, four, judge.read(four), codes, groups))["trained"]

    results = {
        "date": now(),
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "versions": versions(PACKAGES),
        "learned": [each.emoji.label for each in fifth[:LEARNED]],
    }
    made = {"true": true}
    results["four_styles_true"] = judged(truths(args.data, kept))
    for name, lora in (("without", None), ("with", args.lora)):
        options = argparse.Namespace(**{**vars(args), "lora": lora})
        both = make_pictures([*wanted, *kept], options, f"pictures-{name}")
        made[name] = both[: len(wanted)]
        results[f"four_styles_{name}"] = judged(both[len(wanted) :])
    for name, values in made.items():
        reading = replace(judge.read(values), styles=plain_style.read(values))  # the judge knows four styles
        right = shares(reading, asked_of(wanted, codes), groups)
        _, distance = nearest(small(values), small(learned))
        results[name] = {
            "pictures": len(values),
            **{key: round(share, 4) for key, share in right.items()},
            "to_true": round(float(np.linalg.norm(small(values) - small(true), axis=1).mean()), 4),
            "to_nearest_learned": round(float(distance.mean()), 4),
        }
    replace_json(args.output / "results.json", results)
    shown = range(min(len(asked), COLUMNS * COLUMNS // 2))
    cells = [[made["without"][index], made["with"][index]] for index in shown]
    lines = ["without the LoRA | with the LoRA of twenty pictures"]
    grid(cells, [wanted[index].prompt for index in shown], COLUMNS // 2, lines).save(args.output / "samples.png")
    for name in ("without", "with", "true"):
        say(f"{name}: {results[name]}; the four styles: {results[f'four_styles_{name}']}")
