"""Verify pictures, figures, clips and views by their pixels: rendered ones (to check it), a model's, or a file.

    python -m scripts.verify --check-truth 500
    python -m scripts.verify --model shapes-128 --prompts 500 --output DIR
    python -m scripts.verify figures --model dit-128 --output DIR
    python -m scripts.verify clips --model clips-128 --prompts 300 --output DIR
    python -m scripts.verify views --model views-96 --prompts 200 --size 96 --output DIR
    python -m scripts.verify --picture FILE --prompt "a red circle above a blue star"

DIR gets results.json, table.txt, every sample as a picture or a strip of pictures, and sheets of the first samples.
Exit code 0: right; 1: wrong (the verifier misses its limit on rendered samples, or the picture is not what was asked
for); 2: bad input.
"""

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from scripts.evaluation.options import add_sampling_options, make_parser
from scripts.evaluation.report import strip, table, write_results, write_sheets
from scripts.verifiers.pictures.prompt import read_prompt
from scripts.verifiers.registry import VERIFIERS, Verifier

LEAST = {"check_truth": 1, "prompts": 1, "length": 2, "size": 32, "steps": 1, "batch": 1}  # of the options


def check_truth(verifier: Verifier, args: argparse.Namespace) -> int:
    """Verify rendered samples, disturbed ones and wrong ones; write the tables to stdout."""
    count, passed = args.check_truth, True
    for name in verifier.disturbances:
        start = time.process_time()
        verdicts = list(verifier.true_verdicts(count, args.seed, name, args.size, args.length))
        tally = verifier.tally(verdicts)
        spent = (time.process_time() - start) / count * 1000
        sys.stdout.write(f"\n{count} samples, {name} ({spent:.0f} ms of processor time each)\n")
        sys.stdout.write(table(tally, {name: row.of for name, row in verifier.rows.items()}))
        if verifier.measure is not None:
            sys.stdout.write(f"mean {verifier.measured}: {np.mean(list(map(verifier.measure, verdicts))):.3f}\n")
        if name == "as rendered":
            passed = all(tally[row][0] >= verifier.least * tally[row][1] for row in verifier.required)
    noticed = verifier.noticed(count, args.seed, args.size, args.length)
    sys.stdout.write(f"\n{count} samples, made wrong\n{table(noticed, {})}")
    sys.stdout.write(f"\n{'passed' if passed else 'FAILED'}: limit {100 * verifier.least:.0f} % as rendered\n")
    return 0 if passed else 1


def check_picture(file: str, prompt: str) -> int:
    """Verify one picture file against a prompt; write what is wrong to stdout."""
    request = read_prompt(prompt)
    try:
        with Image.open(file) as image:
            pictures = np.asarray(image.convert("RGB"))[None]
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"picture {file!r} cannot be read ({error}); give the path of a PNG or JPEG file.") from error
    verdict = VERIFIERS["pictures"].verify(request, pictures)
    sys.stdout.write("right\n" if verdict.right else f"wrong: {'; '.join(verdict.wrong)}\n")
    return 0 if verdict.right else 1


def check_model(verifier: Verifier, args: argparse.Namespace) -> int:
    """Let a model generate held-out prompts, verify its samples; write results, table, sheets and the samples."""
    from scripts.evaluation.generate import generate, load_pipeline, to_bytes

    single, output = not verifier.length_argument, Path(args.output)
    folder = output / ("pictures" if single else "strips")
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [verifier.task(number, args.seed, True) for number in range(args.prompts)]
    prompts = [task.prompt for task in tasks]
    start = time.time()
    arguments = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    arguments |= {"height": args.size, "width": args.size} if args.size else {}
    arguments |= {} if single else {verifier.length_argument: args.length}
    pipe = load_pipeline(args.model, args.device)
    samples = generate(pipe, prompts, seed=args.seed * 1_000_003, batch=args.batch, **arguments)
    verdicts, records, shown = [], [], []
    for task, sample in zip(tasks, samples, strict=True):
        pictures = to_bytes(sample[None] if single else sample)
        Image.fromarray(strip(pictures)).save(folder / f"{task.number:04d}.png")
        request, reading = verifier.request(task), verifier.read(pictures)
        verdicts.append(verifier.compare(request, reading))
        found = {"found": as_json(reading)} if verifier.found else {}
        record = {key: getattr(task, key) for key in ("number", "prompt", "canonical")}
        record |= {"all_right": verdicts[-1].right, "wrong": verdicts[-1].wrong}
        record |= measurements(verifier, task, verdicts[-1], args)
        records.append(record | {"asked": as_json(request), **found, "verdict": as_json(verdicts[-1])})
        if len(shown) < args.sheets * verifier.per_sheet:
            shown.append(pictures)
    names = ("world", "model", "prompts", "length", "size", "seed", "steps", "guidance", "batch")
    settings = {name: value for name in names if (value := getattr(args, name)) is not None}
    measured = [] if verifier.measure is None else [verifier.measured, f"{verifier.measured}, true pictures"]
    means = {name: round(float(np.mean([record[name] for record in records])), 4) for name in measured}
    rest = {"means": means} if means else {}
    rest |= {"held_out": verifier.held_out, "pictures" if single else "series": records}
    text = write_results(output, settings, time.time() - start, verifier.tally(verdicts), verifier.of, rest)
    write_sheets(output, args.sheets, verifier.per_sheet, shown, prompts, verdicts, verifier.columns)
    sys.stdout.write(text)
    return 0


def measurements(verifier: Verifier, task: Any, verdict: Any, args: argparse.Namespace) -> dict[str, float]:
    """Return the verifier's number for a sample and for a true one of the same task."""
    if verifier.measure is None:
        return {}
    true = verifier.verify(verifier.request(task), verifier.data_set.render(task.scene, args.size, args.length))
    return {
        verifier.measured: round(verifier.measure(verdict), 4),
        f"{verifier.measured}, true pictures": round(verifier.measure(true), 4),
    }


def as_json(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass, but pixels, under the keys of the published results, which spell "colour"."""

    def entry(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key.replace("color", "colour"): each for key, each in items if key != "silhouettes"}

    return asdict(value, dict_factory=entry)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options, with the defaults of the verifier; exit where one is bad."""
    parser = make_parser("scripts.verify", __doc__)
    add = parser.add_argument
    add("world", nargs="?", choices=tuple(VERIFIERS), default="pictures", metavar="DATA_SET",
        help="pictures (default), figures (one in a picture) or clips of shapes, or views of solids")  # fmt: skip
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check-truth", type=int, metavar="N", help="check the verifier on N rendered samples")
    what.add_argument("--model", help="folder or short name of a model to verify on held-out prompts")
    what.add_argument("--picture", metavar="FILE", help="picture to verify; needs --prompt")
    add("--prompt", help="what --picture should show")
    add(
        "--prompts",
        type=int,
        help="held-out prompts for --model (default 500 pictures, 1000 figures, 300 clips, 200 views)",
    )
    add("--length", type=int, help="pictures of a clip or of views (default 17 frames, 8 views)")
    add("--size", type=int, help="pixels a side (default: pictures as the model has them, else 128)")
    add_sampling_options(parser, seed=0)
    add("--steps", type=int, help="denoising steps (default 30, figures 50)")
    add("--guidance", type=float, help="guidance scale (default 4, figures 1.5)")
    add("--batch", type=int, help="samples generated at a time (default 25 pictures, 10 clips or views)")
    add("--device", help="torch device (default cuda where there is one, else cpu)")
    add("--sheets", type=int, help="sheets of the first samples (default 4 of 30 pictures, 2 of 20 clips or views)")
    add("--output", default="verify_output", help="folder for --model (default verify_output)")
    args = parser.parse_args(arguments)
    for name, low in LEAST.items():
        value = getattr(args, name)
        if value is not None and value < low:
            parser.error(f"--{name.replace('_', '-')}={value} is less than {low}; nearest: {low}.")
    if args.picture and not args.prompt:
        parser.error("--picture is given without --prompt; name what it should show.")
    single = not VERIFIERS[args.world].length_argument
    if args.world != "pictures" and args.picture:
        parser.error(f"--picture is a picture of shapes; {args.world} cannot be read from one file.")
    if single and args.length is not None:
        parser.error("--length is for clips and views; a picture has none.")
    verifier = VERIFIERS[args.world]
    defaults = {name: getattr(verifier, name) for name in ("prompts", "batch", "sheets", "steps", "guidance")}
    if not single:
        defaults |= {"length": verifier.data_set.length, "size": verifier.size}
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parse(arguments)
    try:
        if args.picture:
            return check_picture(args.picture, args.prompt)
        check = check_truth if args.check_truth else check_model
        return check(VERIFIERS[args.world], args)
    except ValueError as error:
        sys.stderr.write(f"python -m scripts.verify: error: {error}\n")
        raise SystemExit(2) from error


if __name__ == "__main__":
    sys.exit(main())
