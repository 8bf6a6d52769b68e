"""Judges clips and views by their pixels: the renderers' (to check the judge) or a model's on held-out prompts.

    python -m scripts.verify_sequences clips --check-truth 300 --size 64
    python -m scripts.verify_sequences clips --model DIR --prompts 300 --size 64 --output OUT
    python -m scripts.verify_sequences views --model DIR --prompts 200 --size 64 --output OUT

OUT gets results.json, table.txt, every series as a strip of pictures, and sheets of the first strips, not chosen.
Exit code 0: done, and the judge is right; 1: it misses its limit on true pictures; 2: bad input.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from scripts.verifiers.registry import LEAST, SERIES, Series, Spoiler, Task, soft
from scripts.verifiers.report import add_up_answers, table, write_results, write_sheets
from scripts.verify import generate

PER_SHEET, SHOWN = 20, 9  # strips on a sheet, pictures of a strip on it at most


def _true_verdicts(series: Series, args: argparse.Namespace, spoil: Spoiler | None) -> Iterator[object]:
    """Verdicts on true pictures, spoilt or not."""
    for number in range(args.check_truth):
        task = series.task(number, args.seed, None)
        pictures = series.render(task.scene, args.length, args.size)
        if spoil is not None:
            pictures = spoil(pictures, np.random.default_rng([args.seed, number, 1]))
        yield series.verify_picture(task.prompt, pictures)


def check_truth(series: Series, args: argparse.Namespace) -> int:
    """Judges true pictures, softened ones and spoilt ones; writes the tables to stdout."""
    passed = True
    for name, spoil in {"as drawn": None, "blurred and noisy": soft}.items():
        start = time.process_time()
        verdicts = list(_true_verdicts(series, args, spoil))
        tally = add_up_answers(map(series.answers, verdicts), series.rows)
        spent = (time.process_time() - start) / len(verdicts)
        mean = np.mean([series.number(verdict) for verdict in verdicts])
        sys.stdout.write(f"\n{name}, {args.size} pixels, {spent:.2f} s of processor time each\n")
        sys.stdout.write(f"{table(tally, series.rows)}mean {series.measured}: {mean:.3f}\n")
        if spoil is None:
            passed = all(tally[row][0] >= LEAST * tally[row][1] for row in series.judged)
    noticed = {
        f"{name}: noticed": (
            sum(not verdict.right for verdict in _true_verdicts(series, args, spoil)),
            args.check_truth,
        )
        for name, spoil in series.spoilers.items()
    }
    sys.stdout.write(f"\nspoilt\n{table(noticed, {})}")
    sys.stdout.write(f"\n{'passed' if passed else 'FAILED'}: limit {100 * LEAST:.0f} % as drawn\n")
    return 0 if passed else 1


def strip(pictures: np.ndarray, most: int | None = None) -> np.ndarray:
    """Pictures (F, H, W, 3) side by side (H, n * W, 3), at most `most` of them, first and last included."""
    chosen = np.arange(len(pictures))
    if most is not None and len(pictures) > most:
        chosen = np.linspace(0, len(pictures) - 1, most).round().astype(int)
    return np.concatenate(list(pictures[chosen]), axis=1)


def _record(series: Series, task: Task, verdict: object, true: float) -> dict:
    said = {key: getattr(task, key) for key in ("number", "prompt", "canonical")}
    measured = {series.measured: round(series.number(verdict), 4), f"{series.measured}, true pictures": round(true, 4)}
    return said | {"all_right": verdict.right, "wrong": verdict.wrong} | measured | {"verdict": asdict(verdict)}


def check_model(series: Series, args: argparse.Namespace) -> int:
    """Has a model draw held-out prompts, judges the series and writes results, table, sheets and strips."""
    output = Path(args.output)
    (output / "strips").mkdir(parents=True, exist_ok=True)
    tasks = [series.task(number, args.seed, True) for number in range(args.prompts)]
    start = time.time()
    verdicts, records, shown = [], [], []
    size = {"height": args.size, "width": args.size, series.keyword: args.length}
    made = generate(args, [task.prompt for task in tasks], series.output, **size)
    for task, pictures in zip(tasks, made, strict=True):
        verdict = series.verify_picture(task.prompt, pictures)
        true = series.number(series.verify_picture(task.prompt, series.render(task.scene, args.length, args.size)))
        Image.fromarray(strip(pictures)).save(output / "strips" / f"{task.number:04d}.png")
        verdicts.append(verdict)
        records.append(_record(series, task, verdict, true))
        shown.append(strip(pictures, SHOWN))
    tally = add_up_answers(map(series.answers, verdicts), series.rows)
    means = {
        name: round(float(np.mean([record[name] for record in records])), 4)
        for name in (series.measured, f"{series.measured}, true pictures")
    }
    names = ("world", "model", "prompts", "length", "size", "seed", "steps", "guidance", "batch")
    settings = {name: getattr(args, name) for name in names}
    held_out = sorted(" ".join(combination) for combination in series.held_out)
    rest = {"means": means, "held_out": held_out, "series": records}
    text = write_results(output, settings, time.time() - start, tally, series.rows, rest)
    write_sheets(output, args.sheets, PER_SHEET, shown, [task.prompt for task in tasks], verdicts, columns=2)
    sys.stdout.write(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.verify_sequences", description="Judge clips and views by their pixels."
    )
    parser.add_argument("world", choices=tuple(SERIES), help="clips of moving figures, or views of solids")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check-truth", type=int, metavar="N", help="check the judge on N true series")
    what.add_argument("--model", help="folder or short name of a model to judge on held-out prompts")
    parser.add_argument("--prompts", type=int, help="held-out prompts for --model (default 300 clips, 200 views)")
    parser.add_argument("--length", type=int, help="pictures of a series (default 17 frames, 8 views)")
    parser.add_argument("--size", type=int, default=128, help="pixels a side (default 128)")
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes, captions and noise (default 0)")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps (default 30)")
    parser.add_argument("--guidance", type=float, default=4.0, help="guidance scale (default 4)")
    parser.add_argument("--batch", type=int, default=10, help="series made at a time (default 10)")
    parser.add_argument("--device", help="torch device (default cuda where there is one, else cpu)")
    parser.add_argument("--sheets", type=int, default=2, help=f"sheets of the first {PER_SHEET} strips (default 2)")
    parser.add_argument("--output", default="verify_output", help="folder for --model (default verify_output)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(arguments)
    series = SERIES[args.world]
    args.prompts = series.prompts if args.prompts is None else args.prompts
    args.length = series.length if args.length is None else args.length
    least = {"check_truth": 1, "prompts": 1, "length": 2, "size": 32, "steps": 1, "batch": 1}
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and value < low:
            parser.error(f"--{name.replace('_', '-')}={value} is less than {low}; nearest: {low}.")
    try:
        return check_truth(series, args) if args.check_truth else check_model(series, args)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
