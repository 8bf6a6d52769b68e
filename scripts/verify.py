"""Judges pictures of the drawn world by their pixels: the renderer's (to check the verifier), a model's, a file.

    python -m scripts.verify --check-truth 500
    python -m scripts.verify --model shapes-128 --prompts 500 --output DIR
    python -m scripts.verify --picture FILE --prompt "a red circle above a blue star"

Exit code 0: right; 1: wrong (the truth check misses 99 %, or the picture is not what was asked for); 2: bad input.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from scripts.datasets.shapes import describe, held_out_list, sample_scene
from scripts.verifiers.pictures.figures import read_picture
from scripts.verifiers.pictures.prompt import read_prompt
from scripts.verifiers.pictures.truth import DISTURBANCES, noticed, truth
from scripts.verifiers.pictures.verdict import request_of_scene, verify_picture
from scripts.verifiers.report import ROWS, add_up, table, write_results, write_sheets

LIMIT = 0.99  # share of colors, shapes and relations that the verifier must read right as drawn
PER_SHEET = 30


def check_truth(count: int, seed: int) -> int:
    """Judges drawn pictures against their own scenes and against wrong requests; writes the tables to stdout."""
    passed = True
    for name in DISTURBANCES:
        start = time.process_time()
        tally = add_up(verdict for _, _, verdict in truth(count, seed, name))
        spent = (time.process_time() - start) / count * 1000
        sys.stdout.write(f"\n{count} scenes, {name} ({spent:.0f} ms of processor time each)\n{table(tally)}")
        if name == "as drawn":
            rows = ("right colours", "right shapes", "right relations")
            passed = all(tally[row][0] >= LIMIT * tally[row][1] for row in rows)
    sys.stdout.write(f"\n{count} scenes, as drawn, against wrong requests\n{table(noticed(count, seed))}")
    sys.stdout.write(f"\n{'passed' if passed else 'FAILED'}: limit {100 * LIMIT:.0f} % as drawn\n")
    return 0 if passed else 1


def check_picture(file: str, prompt: str) -> int:
    """Judges one picture file against a prompt; writes what is wrong to stdout."""
    request = read_prompt(prompt)
    try:
        with Image.open(file) as image:
            array = np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"picture {file!r} cannot be read ({error}); give the path of a PNG or JPEG file.") from error
    verdict = verify_picture(read_picture(array), request)
    sys.stdout.write("right\n" if verdict.all_right else f"wrong: {'; '.join(verdict.wrong)}\n")
    return 0 if verdict.all_right else 1


def _tasks(count: int, seed: int) -> list[dict]:
    """Held-out scenes with their captions; number i depends on the seed and i only."""
    tasks = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        scene = sample_scene(rng, held_out=True)
        caption, canonical = describe(scene, rng)
        tasks.append({"number": index, "prompt": caption, "canonical": canonical, "scene": scene})
    return tasks


def generate(args: argparse.Namespace, prompts: list[str], output: str, **size: int) -> Iterator[np.ndarray]:
    """Pictures (H, W, 3) or series (F, H, W, 3) of bytes, one per prompt; each depends on seed and number only.

    Args:
        args: Settings of the command: model, device, batch, steps, guidance, seed.
        prompts: What to draw.
        output: Field of the pipeline's output: "images", "frames" or "views".
        size: Further arguments of the pipeline's call.
    """
    import torch

    from ptdit_diffusers import PTDiTPipeline

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe = PTDiTPipeline.from_pretrained(args.model).to(device)
    pipe.set_progress_bar_config(disable=True)
    for start in range(0, len(prompts), args.batch):
        batch = prompts[start : start + args.batch]
        seeds = range(start, start + len(batch))
        generators = [torch.Generator("cpu").manual_seed(args.seed * 1_000_003 + number) for number in seeds]
        made = pipe(
            batch,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            generator=generators,
            output_type="np",
            **size,
        )
        yield from (np.asarray(getattr(made, output)) * 255).round().astype(np.uint8)
        sys.stderr.write(f"{start + len(batch)} of {len(prompts)} {output}\n")


def check_model(args: argparse.Namespace) -> int:
    """Has a model draw held-out prompts, judges the pictures and writes results, table, sheets and pictures."""
    output = Path(args.output)
    (output / "pictures").mkdir(parents=True, exist_ok=True)
    tasks = _tasks(args.prompts, args.seed)
    start = time.time()
    pictures, verdicts, records = [], [], []
    for task, picture in zip(tasks, generate(args, [task["prompt"] for task in tasks], "images"), strict=True):
        reading = read_picture(picture)
        request = request_of_scene(task["scene"], task["prompt"])
        verdict = verify_picture(reading, request)
        Image.fromarray(picture).save(output / "pictures" / f"{task['number']:04d}.png")
        pictures.append(picture)
        verdicts.append(verdict)
        shown = asdict(reading)
        del shown["silhouettes"]  # pixels
        found = {"asked": asdict(request), "found": shown, "verdict": asdict(verdict)}
        right = {"all_right": verdict.all_right}
        records.append({key: task[key] for key in ("number", "prompt", "canonical")} | right | found)
    names = ("model", "prompts", "seed", "steps", "guidance", "batch")
    settings = {name: getattr(args, name) for name in names}
    rest = {"held_out": held_out_list(), "pictures": records}
    text = write_results(output, settings, time.time() - start, add_up(verdicts), ROWS, rest)
    write_sheets(output, args.sheets, PER_SHEET, pictures, [task["prompt"] for task in tasks], verdicts)
    sys.stdout.write(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.verify", description="Judge pictures of the drawn world by their pixels."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check-truth", type=int, metavar="N", help="check the verifier on N drawn scenes")
    what.add_argument("--model", help="folder or short name of a model to judge on held-out prompts")
    what.add_argument("--picture", metavar="FILE", help="picture to judge; needs --prompt")
    parser.add_argument("--prompt", help="what --picture should show")
    parser.add_argument("--prompts", type=int, default=500, help="held-out prompts for --model (default 500)")
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes, captions and noise (default 0)")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps (default 30)")
    parser.add_argument("--guidance", type=float, default=4.0, help="guidance scale (default 4)")
    parser.add_argument("--batch", type=int, default=25, help="pictures made at a time (default 25)")
    parser.add_argument("--device", help="torch device (default cuda where there is one, else cpu)")
    parser.add_argument(
        "--sheets", type=int, default=4, help=f"sheets of the first {PER_SHEET} pictures each (default 4)"
    )
    parser.add_argument("--output", default="verify_output", help="folder for --model (default verify_output)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(arguments)
    for name in ("check_truth", "prompts", "steps", "batch"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}={value} is less than 1; nearest: 1.")
    try:
        if args.check_truth:
            return check_truth(args.check_truth, args.seed)
        if args.model:
            return check_model(args)
        if not args.prompt:
            raise ValueError("--picture is given without --prompt; say what it should show.")
        return check_picture(args.picture, args.prompt)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
