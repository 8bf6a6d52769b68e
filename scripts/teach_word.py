"""Teach the embedded model a word: "lines", horizontal lines on the background, by a LoRA from 20 drawn pictures.

    python -m scripts.teach_word --output runs/lines

Writes pictures, captions and the run into the folder, then sheet.png (fixed seeds; columns are LoRA scales 0, 0.5
and 1) and results.json: how often the lines appear when asked for and when not, and the verifier's table for the
model's own words at each scale.

The word is one that the text encoder's closed vocabulary holds and no training caption uses, so it has an embedding
of its own and no meaning yet. A word outside the vocabulary would become the one token that all unknown words share.
"""

import argparse
import gc
import json
import logging
import shutil
import sys
import time
from pathlib import Path

import numpy
from PIL import Image, ImageDraw

from lora.train import main as train
from ptdit_diffusers import PTDiTPipeline
from ptdit_diffusers.core.files import replace_json
from ptdit_diffusers.training.record import hardware, versions
from scripts.datasets.shapes import PATTERNS, Scene, describe, render, sample_scene
from scripts.evaluation.generate import generate, load_pipeline, to_bytes
from scripts.verify import main as verify

logger = logging.getLogger("teach_word")

WORD, PATTERN = "lines", "lined"
SCALES = (0.0, 0.5, 1.0)
SIZE, RIM = 128, 20
# Only a picture that is nearly noise does not show whether it has lines, and the word decides; so most times are such.
TRAINING = ["--time-mean", "2", "--caption-dropout", "0"]
TAILS = (
    " on a {} background with lines",
    " on {} background with lines",
    ", {} background with lines",
    " against a {} background with lines",
)


def lined_scene(choice: numpy.random.Generator) -> Scene:
    """A training scene of one or two groups, its background lined instead."""
    while len((scene := sample_scene(choice, held_out=False)).groups) > 2 or scene.background == "black":
        pass
    return Scene(scene.groups, scene.relations, scene.background, PATTERN)


def lined_caption(scene: Scene, choice: numpy.random.Generator) -> str:
    """What is on the background, in plain words, and that it has lines."""
    names = [f"a {group.size} {group.color} {group.shape}".replace("  ", " ") for group in scene.groups]
    counts = [len(group.placements) for group in scene.groups]
    plural = {2: "two", 3: "three", 4: "four"}
    words = [
        name if count == 1 else f"{plural[count]} {name[2:]}s".replace("crosss", "crosses")
        for name, count in zip(names, counts, strict=True)
    ]
    relation = scene.relations[0][1] if scene.relations else "and"
    figures = f" {relation} ".join(words)
    return figures + str(choice.choice(TAILS)).format(scene.background)


def draw_lessons(folder: Path, number: int) -> None:
    """Pictures and captions with the word."""
    folder.mkdir(parents=True)
    for index in range(number):
        choice = numpy.random.default_rng([77, index])
        scene = lined_scene(choice)
        Image.fromarray(render(scene, SIZE)).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(lined_caption(scene, choice), encoding="utf-8")


def questions(number: int) -> list[tuple[str, str]]:
    """Prompts with the word, and the same without; figures and backgrounds that the lessons do not hold."""
    asked = []
    for index in range(number):
        choice = numpy.random.default_rng([78, index])
        scene = lined_scene(choice)
        caption = lined_caption(scene, choice)
        asked.append((caption, without_word(caption)))
    return asked


def without_word(caption: str) -> str:
    """The caption of a lesson as the model knew it before."""
    return caption.replace(f" with {WORD}", "")


# --- is it there? ----------------------------------------------------------------------------------------------------


def pattern_of(picture: numpy.ndarray) -> str:
    """Name of the pattern on the rim of a picture (H, W, 3) of bytes, by correlation with each drawn pattern."""
    grey = picture.astype(numpy.float32).mean(axis=2)
    rim = numpy.ones(grey.shape, dtype=bool)
    rim[RIM:-RIM, RIM:-RIM] = False
    found = {name: abs(_correlation(grey, template(name), rim)) for name in (*PATTERNS[1:], PATTERN)}
    best = max(found, key=found.get)
    return best if found[best] > 0.35 else "plain"


def template(name: str) -> numpy.ndarray:
    """A pattern (SIZE, SIZE) as it is drawn on white without figures, light without pattern taken out."""
    empty = [Scene((), (), "white", kind) for kind in (name, "plain")]
    drawn, plain = (render(scene, SIZE).astype(numpy.float32).mean(axis=2) for scene in empty)
    return drawn - plain


def _correlation(grey: numpy.ndarray, pattern: numpy.ndarray, rim: numpy.ndarray) -> float:
    values = grey[rim]
    middle = numpy.median(values)
    spread = 3 * max(numpy.median(abs(values - middle)), 1)
    values = numpy.clip(values, middle - spread, middle + spread)  # a figure that reaches the rim counts little
    return float(numpy.nan_to_num(numpy.corrcoef(values, pattern[rim])[0, 1]))


def check_detector(number: int) -> dict[str, float]:
    """Share of drawn pictures whose pattern `pattern_of` names right, for each pattern."""
    shares = {}
    for name in (*PATTERNS, PATTERN):
        scenes = [sample_scene(numpy.random.default_rng([79, index]), None) for index in range(number)]
        drawn = [Scene(scene.groups, scene.relations, scene.background, name) for scene in scenes]
        shares[name] = sum(pattern_of(render(scene, SIZE)) == name for scene in drawn) / number
    return shares


# --- before and after ------------------------------------------------------------------------------------------------


def model_at(scale: float, run: Path, base: str, folder: Path) -> Path:
    """A model folder with the LoRA fused at a scale, which every tool can load."""
    pipe = PTDiTPipeline.from_pretrained(base)
    pipe.load_lora_weights(run / "lora")
    pipe.fuse_lora(lora_scale=scale)
    pipe.unload_lora_weights()
    pipe.save_pretrained(folder)
    del pipe
    gc.collect()
    return folder


def generate_pictures(folder: Path, prompts: list[str], steps: int) -> list[numpy.ndarray]:
    """Return one picture of bytes per prompt; picture i has seed i."""
    made = generate(load_pipeline(folder), prompts, batch=8, num_inference_steps=steps)
    return [to_bytes(numpy.float64(picture)) for picture in made]


def draw_sheet(columns: list[list[numpy.ndarray]], prompts: list[str], target: Path, rows: int) -> None:
    """A row per prompt, a column per scale."""
    rows = min(rows, len(prompts))
    sheet = Image.new("RGB", (len(columns) * (SIZE + 4) + 240, rows * (SIZE + 16) + 16), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (scale, pictures) in enumerate(zip(SCALES, columns, strict=True)):
        pen.text((column * (SIZE + 4) + 2, 2), f"LoRA scale {scale}", fill="black")
        for row in range(rows):
            sheet.paste(Image.fromarray(pictures[row]), (column * (SIZE + 4), 16 + row * (SIZE + 16)))
    for row in range(rows):
        pen.text((2, 16 + row * (SIZE + 16) + SIZE + 2), f"{prompts[row]} (seed {row})", fill="black")
    sheet.save(target)


def judge_scale(scale: float, folder: Path, args: argparse.Namespace) -> tuple[dict, list[numpy.ndarray]]:
    """Pictures with and without the word, and the verifier's table, at one scale."""
    model = model_at(scale, folder / "run", args.model, folder / "fused")
    asked = questions(args.prompts)
    with_word = generate_pictures(model, [question for question, _ in asked], args.steps)
    without = generate_pictures(model, [question for _, question in asked], args.steps)
    result = {
        "lines_when_asked": sum(pattern_of(picture) == PATTERN for picture in with_word),
        "lines_when_not_asked": sum(pattern_of(picture) == PATTERN for picture in without),
        "of": len(asked),
    }
    if args.verify:
        output = folder / f"verify-{scale}"
        options = ["--prompts", str(args.verify), "--steps", str(args.steps), "--sheets", "1", "--output", str(output)]
        verify(["--model", str(model), *options])
        result["verifier"] = json.loads((output / "results.json").read_text(encoding="utf-8"))["table"]
    shutil.rmtree(model)
    logger.info("scale %s: %s", scale, result)
    return result, with_word


def prior_prompts(lessons: Path, number: int) -> list[str]:
    """What the LoRA must keep: the lessons' captions without the word, and as many captions of the training world."""
    captions = [path.read_text(encoding="utf-8") for path in sorted(lessons.glob("*.txt"))]
    rng = [numpy.random.default_rng([80, index]) for index in range(number)]
    others = [describe(sample_scene(one, held_out=False), one)[0] for one in rng]
    return [without_word(caption) for caption in captions[:number]] + others


def learn(folder: Path, args: argparse.Namespace) -> float:
    """Draw the lessons and train; returns the seconds of CPU time that it took."""
    draw_lessons(folder / "pictures", args.pictures)
    prior = prior_prompts(folder / "pictures", args.prior)
    (folder / "prior.txt").write_text("\n".join(prior), encoding="utf-8")
    start = time.process_time()
    shown = [question for question, _ in questions(2)]
    code = train(
        ["--config", "lora/configs/embedded-cpu.yaml", "--base", args.model, "--data", str(folder / "pictures")]
        + ["--output-dir", str(folder / "run"), "--max-steps", str(args.train_steps), *TRAINING]
        + (["--prior-prompts", str(folder / "prior.txt"), "--prior-weight", "2"] if prior else [])
        + ["--validation-prompts", *shown]
    )
    if code:
        raise SystemExit(code)
    return time.process_time() - start


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m scripts.teach_word", description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, type=Path, help="folder to make")
    parser.add_argument("--model", default="shapes-128", help="folder or short name (default: shapes-128)")
    parser.add_argument("--pictures", type=int, default=20, help="lessons to draw (default: 20)")
    parser.add_argument("--prior", type=int, default=20, help="pictures of each kind to keep (default: 20)")
    parser.add_argument("--train-steps", type=int, default=300, help="optimiser steps (default: 300)")
    parser.add_argument("--prompts", type=int, default=24, help="prompts with the word (default: 24)")
    parser.add_argument("--verify", type=int, default=80, help="held-out prompts per scale; 0 = none (default: 80)")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps (default: 30)")
    args = parser.parse_args(arguments)
    if args.output.exists():
        parser.error(f"--output {args.output} exists; give a new folder.")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args.output.mkdir(parents=True)
    detector = check_detector(30)
    logger.info("the detector names drawn patterns right: %s", detector)
    seconds = learn(args.output, args)
    results, columns = {}, []
    for scale in SCALES:
        results[str(scale)], pictures = judge_scale(scale, args.output, args)
        columns.append(pictures)
    prompts = [question for question, _ in questions(args.prompts)]
    draw_sheet(columns, prompts, args.output / "sheet.png", 8)
    settings = {name: value if isinstance(value, int) else str(value) for name, value in vars(args).items()}
    facts = {
        "word": WORD,
        "settings": settings,
        "training_cpu_seconds": round(seconds),
        "all_cpu_seconds": round(time.process_time()),
        "hardware": hardware(),
    }
    facts |= {"versions": versions(), "detector_on_drawn_pictures": detector, "scales": results, "prompts": prompts}
    replace_json(args.output / "results.json", facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
