"""Teach the embedded model a word with a LoRA: "lines", horizontal lines on the background, from 20 pictures.

    python -m scripts.teach_word --output runs/lines

Writes pictures, captions and the run to the folder, then sheet.png (fixed seeds; columns are LoRA scales 0, 0.5 and 1)
and results.json: how often the lines appear with the word in the prompt and without, and the verifier's table for the
words that the model knew before, at each scale.

The word is in the vocabulary of the text encoder, but in no training caption: it has an embedding of its own and no
meaning yet. Words outside the vocabulary all become the same unknown token.
"""

import argparse
import gc
import json
import logging
import shutil
import sys
import time
from pathlib import Path

import numpy as np
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
# Less noisy pictures show whether they have lines, and the word is not needed; so most times are near noise.
TRAINING = ["--time-mean", "2", "--caption-dropout", "0"]
TAILS = (
    " on a {} background with lines",
    " on {} background with lines",
    ", {} background with lines",
    " against a {} background with lines",
)


def lined_scene(choice: np.random.Generator) -> Scene:
    """Return a training scene of one or two groups, with a lined background."""
    while len((scene := sample_scene(choice, held_out=False)).groups) > 2 or scene.background == "black":
        pass
    return Scene(scene.groups, scene.relations, scene.background, PATTERN)


def lined_caption(scene: Scene, choice: np.random.Generator) -> str:
    """Return a caption of the figures and the background with the word."""
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


def write_training_data(folder: Path, number: int) -> None:
    """Write pictures and captions with the word."""
    folder.mkdir(parents=True)
    for index in range(number):
        choice = np.random.default_rng([77, index])
        scene = lined_scene(choice)
        Image.fromarray(render(scene, SIZE)).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(lined_caption(scene, choice), encoding="utf-8")


def evaluation_prompts(number: int) -> list[tuple[str, str]]:
    """Return prompts with the word, and the same without, of scenes that are not in the training data."""
    prompts = []
    for index in range(number):
        choice = np.random.default_rng([78, index])
        scene = lined_scene(choice)
        caption = lined_caption(scene, choice)
        prompts.append((caption, without_word(caption)))
    return prompts


def without_word(caption: str) -> str:
    """Return a caption without the word."""
    return caption.replace(f" with {WORD}", "")


# --- detecting the lines ---------------------------------------------------------------------------------------------


def pattern_of(picture: np.ndarray) -> str:
    """Return the name of the pattern on the rim of a picture (H, W, 3) of bytes, by correlation with each pattern."""
    gray = picture.astype(np.float32).mean(axis=2)
    rim = np.ones(gray.shape, dtype=bool)
    rim[RIM:-RIM, RIM:-RIM] = False
    found = {name: abs(_correlation(gray, template(name), rim)) for name in (*PATTERNS[1:], PATTERN)}
    best = max(found, key=found.get)
    return best if found[best] > 0.35 else "plain"


def template(name: str) -> np.ndarray:
    """Return a pattern (SIZE, SIZE) as rendered on white without figures, minus the plain background."""
    empty = [Scene((), (), "white", kind) for kind in (name, "plain")]
    patterned, plain = (render(scene, SIZE).astype(np.float32).mean(axis=2) for scene in empty)
    return patterned - plain


def _correlation(gray: np.ndarray, pattern: np.ndarray, rim: np.ndarray) -> float:
    values = gray[rim]
    middle = np.median(values)
    spread = 3 * max(np.median(abs(values - middle)), 1)
    values = np.clip(values, middle - spread, middle + spread)  # a figure that reaches the rim counts little
    return float(np.nan_to_num(np.corrcoef(values, pattern[rim])[0, 1]))


def check_detector(number: int) -> dict[str, float]:
    """Return for each pattern the share of rendered pictures in which `pattern_of` finds it."""
    shares = {}
    for name in (*PATTERNS, PATTERN):
        scenes = [sample_scene(np.random.default_rng([79, index]), None) for index in range(number)]
        patterned = [Scene(scene.groups, scene.relations, scene.background, name) for scene in scenes]
        shares[name] = sum(pattern_of(render(scene, SIZE)) == name for scene in patterned) / number
    return shares


# --- before and after ------------------------------------------------------------------------------------------------


def model_at(scale: float, run: Path, base: str, folder: Path) -> Path:
    """Write a model folder with the LoRA fused at a scale, which every tool can load."""
    pipe = PTDiTPipeline.from_pretrained(base)
    pipe.load_lora_weights(run / "lora")
    pipe.fuse_lora(lora_scale=scale)
    pipe.unload_lora_weights()
    pipe.save_pretrained(folder)
    del pipe
    gc.collect()
    return folder


def generate_pictures(folder: Path, prompts: list[str], steps: int) -> list[np.ndarray]:
    """Return one picture of bytes per prompt; picture i has seed i."""
    made = generate(load_pipeline(folder), prompts, batch=8, num_inference_steps=steps)
    return [to_bytes(np.float64(picture)) for picture in made]


def write_sheet(columns: list[list[np.ndarray]], prompts: list[str], target: Path, rows: int) -> None:
    """Write a sheet with a row per prompt and a column per scale."""
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


def evaluate_scale(scale: float, folder: Path, args: argparse.Namespace) -> tuple[dict, list[np.ndarray]]:
    """Return the results at one scale, and the pictures of the prompts with the word."""
    model = model_at(scale, folder / "run", args.model, folder / "fused")
    prompts = evaluation_prompts(args.prompts)
    with_word = generate_pictures(model, [prompt for prompt, _ in prompts], args.steps)
    without = generate_pictures(model, [prompt for _, prompt in prompts], args.steps)
    result = {
        "lines_when_asked": sum(pattern_of(picture) == PATTERN for picture in with_word),
        "lines_when_not_asked": sum(pattern_of(picture) == PATTERN for picture in without),
        "of": len(prompts),
    }
    if args.verify:
        output = folder / f"verify-{scale}"
        options = ["--prompts", str(args.verify), "--steps", str(args.steps), "--sheets", "1", "--output", str(output)]
        verify(["--model", str(model), *options])
        result["verifier"] = json.loads((output / "results.json").read_text(encoding="utf-8"))["table"]
    shutil.rmtree(model)
    logger.info("scale %s: %s", scale, result)
    return result, with_word


def prior_prompts(folder: Path, number: int) -> list[str]:
    """Return what the LoRA must keep: the captions in the folder without the word, and as many of the data set."""
    captions = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]
    rng = [np.random.default_rng([80, index]) for index in range(number)]
    others = [describe(sample_scene(one, held_out=False), one)[0] for one in rng]
    return [without_word(caption) for caption in captions[:number]] + others


def learn(folder: Path, args: argparse.Namespace) -> float:
    """Write the training data and train; return the seconds of CPU time that it took."""
    write_training_data(folder / "pictures", args.pictures)
    prior = prior_prompts(folder / "pictures", args.prior)
    (folder / "prior.txt").write_text("\n".join(prior), encoding="utf-8")
    start = time.process_time()
    shown = [prompt for prompt, _ in evaluation_prompts(2)]
    code = train(
        ["--config", "embedded-cpu", "--base", args.model, "--data", str(folder / "pictures")]
        + ["--output-dir", str(folder / "run"), "--max-steps", str(args.train_steps), *TRAINING]
        + (["--prior-prompts", str(folder / "prior.txt"), "--prior-weight", "2"] if prior else [])
        + ["--validation-prompts", *shown]
    )
    if code:
        raise SystemExit(code)
    return time.process_time() - start


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m scripts.teach_word", description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, type=Path, help="folder to make")
    parser.add_argument("--model", default="shapes-128", help="folder or short name (default: shapes-128)")
    parser.add_argument("--pictures", type=int, default=20, help="pictures to train on (default: 20)")
    parser.add_argument("--prior", type=int, default=20, help="pictures of each kind to keep (default: 20)")
    parser.add_argument("--train-steps", type=int, default=300, help="optimizer steps (default: 300)")
    parser.add_argument("--prompts", type=int, default=24, help="prompts with the word (default: 24)")
    parser.add_argument("--verify", type=int, default=80, help="held-out prompts per scale; 0 = none (default: 80)")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps (default: 30)")
    args = parser.parse_args(arguments)
    if args.output.exists():
        parser.error(f"--output {args.output} exists; give a new folder.")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args.output.mkdir(parents=True)
    detector = check_detector(30)
    logger.info("share of rendered patterns that the detector finds: %s", detector)
    seconds = learn(args.output, args)
    results, columns = {}, []
    for scale in SCALES:
        results[str(scale)], pictures = evaluate_scale(scale, args.output, args)
        columns.append(pictures)
    prompts = [prompt for prompt, _ in evaluation_prompts(args.prompts)]
    write_sheet(columns, prompts, args.output / "sheet.png", 8)
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
