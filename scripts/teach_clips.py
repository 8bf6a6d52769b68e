"""Teach the embedded video model a word with a LoRA: "lines", horizontal lines on the background, from clips.

    python -m scripts.teach_clips --output runs/lined-clips

Writes clips, captions and the run to the folder, then strips.png (before and after, fixed seeds) and results.json: in
how many clips the lines appear with the word in the prompt and without, and in how many the motion is still right.
The word and its detector are those of `scripts.teach_word`.
"""

import argparse
import json
import logging
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from lora.train import main as train
from ptdit_diffusers import PTDiTPipeline
from ptdit_diffusers.core.files import replace_json
from ptdit_diffusers.training.record import hardware, versions
from scripts.datasets.shapes.motion import Clip, render_clip, sample_clip
from scripts.datasets.shapes.motion_captions import verb
from scripts.evaluation.generate import generate, load_pipeline, to_bytes
from scripts.teach_word import PATTERN, SIZE, TAILS, pattern_of, without_word
from scripts.verifiers.clips.prompt import ClipRequest, read_clip_prompt
from scripts.verifiers.clips.verdict import verify_clip

logger = logging.getLogger("teach_clips")

SHOWN = 6  # clips on the sheet


def lined_clip(choice: np.random.Generator) -> Clip:
    """Return a training clip of one figure, with a lined background."""
    while len((clip := sample_clip(choice, held_out=False)).actors) > 1 or clip.background == "black":
        pass
    return replace(clip, pattern=PATTERN)


def lined_caption(clip: Clip, choice: np.random.Generator) -> str:
    """Return a caption of the motion and the background with the word."""
    actor = clip.actors[0]
    figure = f"a {actor.size} {actor.color} {actor.shape}".replace("  ", " ")
    return f"{figure} {verb(actor, choice)[0]}" + str(choice.choice(TAILS)).format(clip.background)


def captioned_clips(number: int, seed: int) -> list[tuple[Clip, str]]:
    """Return clips and captions with the word."""
    made = []
    for index in range(number):
        choice = np.random.default_rng([seed, index])
        clip = lined_clip(choice)
        made.append((clip, lined_caption(clip, choice)))
    return made


def write_training_data(folder: Path, number: int) -> None:
    """Write animated PNGs and captions: each clip with lines and the word, and without both."""
    folder.mkdir(parents=True)
    for index, (clip, caption) in enumerate(captioned_clips(number, 77)):
        for name, shown, text in (
            ("lines", clip, caption),
            ("plain", replace(clip, pattern="plain"), without_word(caption)),
        ):
            first, *more = map(Image.fromarray, render_clip(shown, SIZE))
            first.save(folder / f"{index:02d}-{name}.png", save_all=True, append_images=more, duration=125)
            (folder / f"{index:02d}-{name}.txt").write_text(text, encoding="utf-8")


def generate_clips(pipe: PTDiTPipeline, prompts: list[str], steps: int) -> list[np.ndarray]:
    """Return one clip (17, SIZE, SIZE, 3) of bytes per prompt; clip i has seed i."""
    return list(map(to_bytes, generate(pipe, prompts, batch=1, num_frames=17, num_inference_steps=steps)))


def evaluate(pipe: PTDiTPipeline, prompts: list[str], steps: int) -> tuple[dict[str, int], list[np.ndarray]]:
    """Return counts for clips with the word and without, and the clips with the word."""
    with_word = generate_clips(pipe, prompts, steps)
    without = generate_clips(pipe, list(map(without_word, prompts)), steps)
    requests = [read_clip_prompt(without_word(prompt)) for prompt in prompts]
    counts = {
        "lines_when_asked": sum(is_lined(clip) for clip in with_word),
        "lines_when_not_asked": sum(is_lined(clip) for clip in without),
        "motion_right_when_asked": sum(map(moves_right, requests, with_word)),
        "motion_right_when_not_asked": sum(map(moves_right, requests, without)),
        "of": len(prompts),
    }
    return counts, with_word


def moves_right(request: ClipRequest, clip: np.ndarray) -> bool:
    """Return whether every figure moves as requested."""
    return all(verify_clip(request, clip).motions)


def is_lined(clip: np.ndarray) -> bool:
    """Return whether most frames have lines."""
    return sum(pattern_of(frame) == PATTERN for frame in clip) > len(clip) / 2


def write_strips(before: list[np.ndarray], after: list[np.ndarray], target: Path) -> None:
    """Write every fourth frame of the first clips, without the LoRA on the left, with it on the right."""
    rows = [
        np.concatenate([*first[::4], np.full((SIZE, 8, 3), 255, np.uint8), *second[::4]], axis=1)
        for first, second in zip(before[:SHOWN], after[:SHOWN], strict=True)
    ]
    Image.fromarray(np.concatenate(rows)).save(target)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m scripts.teach_clips", description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, type=Path, help="folder to make")
    parser.add_argument("--model", default="clips-128", help="folder or short name (default: clips-128)")
    parser.add_argument(
        "--clips", type=int, default=16, help="training clips, each with and without lines (default: 16)"
    )
    parser.add_argument("--train-steps", type=int, default=150, help="optimizer steps (default: 150)")
    parser.add_argument("--prompts", type=int, default=12, help="prompts with the word (default: 12)")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps (default: 30)")
    args = parser.parse_args(arguments)
    if args.output.exists():
        parser.error(f"--output {args.output} exists; give a new folder.")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    write_training_data(args.output / "clips", args.clips)
    prompts = [caption for _, caption in captioned_clips(args.prompts, 78)]
    start = time.process_time()
    code = train(
        ["--config", "embedded-cpu", "--base", args.model, "--data", str(args.output / "clips")]
        + ["--num-frames", "17", "--batch-size", "2", "--max-steps", str(args.train_steps)]
        + ["--time-mean", "2", "--caption-dropout", "0", "--output-dir", str(args.output / "run")]
    )
    if code:
        return code
    facts = {"training_cpu_seconds": round(time.process_time() - start), "prompts": prompts}
    pipe = load_pipeline(args.model)
    facts["before"], before = evaluate(pipe, prompts, args.steps)
    pipe.load_lora_weights(args.output / "run" / "lora")
    facts["after"], after = evaluate(pipe, prompts, args.steps)
    write_strips(before, after, args.output / "strips.png")
    settings = {name: value if isinstance(value, int) else str(value) for name, value in vars(args).items()}
    replace_json(
        args.output / "results.json", {"settings": settings, "hardware": hardware(), "versions": versions(), **facts}
    )
    logger.info("before %s, after %s", json.dumps(facts["before"]), json.dumps(facts["after"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
