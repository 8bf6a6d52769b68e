"""Accuracy, diversity and time over forwards: a teacher with several samplers and caches, and students of few steps.

    python -m scripts.benchmarks.few_steps --student runs/shapes-128-4steps/lora --output docs/few-steps/results.json
    python -m scripts.benchmarks.few_steps clips --model clips-128 --student DIR --output FILE --prompts 300

Each row generates the same held-out prompts from the same noise. `forwards` are those of the network per sample: a
guided step has two, and of a cache only the share of blocks that it computes counts. Rows that the JSON has are kept,
so a stopped call goes on when it is made again. `--development` takes other prompts, of combinations that training
has: choose with them. The plot is written beside the JSON, as PNG; latents go to a folder beside it. `--seconds` times
all rows that the JSON has in one run, on one batch of prompts, so that they can be compared.
"""

import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FirstBlockCacheConfig, SeaCacheConfig, UniPCMultistepScheduler
from safetensors.torch import load_file
from torch import Tensor

from ptdit_diffusers import PTDiTPipeline
from ptdit_diffusers.core.few_steps import LORA_FILE, embedded_student, read_distillation
from ptdit_diffusers.training.latents import write_tensors
from scripts.benchmarks.psnr import psnr
from scripts.evaluation.generate import generate, load_pipeline, to_bytes
from scripts.evaluation.options import add_sampling_options, make_parser
from scripts.evaluation.records import now, processor, read_record, versions, write_record
from scripts.evaluation.report import wilson
from scripts.verifiers.registry import VERIFIERS, Verifier

TEACHER_STEPS, STUDENT_STEPS, GUIDANCES = (30, 16, 10, 8, 6, 4), (1, 2, 3, 4, 6, 8), (4.0, 2.0)
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
CACHES = {
    "FirstBlockCache": lambda: FirstBlockCacheConfig(threshold=0.15),
    "SeaCache": lambda: SeaCacheConfig(
        raw_vision_callback=lambda module, args, kwargs: list(kwargs["hidden_states"].unbind(0))
    ),
}
ALL_RIGHT = "everything right"  # the question about a whole sample
REFERENCE = "teacher, euler, guidance 4, 30 steps"
SETTINGS = "data_set model prompts seed length size development diversity_prompts diversity_seeds".split()


@dataclass(frozen=True)
class Row:
    """One way to sample. `student` is the name of a student, "" the teacher."""

    steps: int
    guidance: float
    sampler: str = "euler"
    cache: str = ""
    student: str = ""

    @property
    def series(self) -> str:
        """What the rows of one line in the plot have in common."""
        how = f", {self.cache}" if self.cache else ""
        return f"{self.student or 'teacher'}, {self.sampler}, guidance {self.guidance:g}{how}"

    @property
    def name(self) -> str:
        """Name of the row."""
        return f"{self.series}, {self.steps} steps"


def all_rows(students: list[str]) -> list[Row]:
    """Return the rows of the table; the reference is the first."""
    rows = [Row(steps, guidance, sampler) for guidance in GUIDANCES for sampler in ("euler", "unipc")
            for steps in TEACHER_STEPS]  # fmt: skip
    rows += [Row(30, 4.0, cache=cache) for cache in CACHES]
    return rows + [Row(steps, 1.0, student=name) for name in students for steps in STUDENT_STEPS]


class Bench:
    """Teacher and students, the prompts, and what is measured of a row."""

    def __init__(self, args: Any, verifier: Verifier, students: dict[str, Path]) -> None:
        self.args, self.verifier = args, verifier
        self.latents = args.output.with_suffix(".latents")
        self.tasks = [verifier.task(number, args.seed, not args.development) for number in range(args.prompts)]
        self.teacher = load_pipeline(args.model, "cpu")
        self.euler = self.teacher.scheduler
        self.models = {name: load_pipeline(path, "cpu") for name, path in students.items() if is_model(path)}
        for name, path in students.items():
            if name not in self.models:
                self.teacher.load_lora_weights(path, adapter_name=name)
        if len(self.models) < len(students):
            self.teacher.disable_lora()

    @contextmanager
    def pipeline(self, row: Row) -> Iterator[PTDiTPipeline]:
        """Give the pipeline of a row, with its adapter, scheduler and cache."""
        pipe = self.models.get(row.student, self.teacher)
        if row.student and pipe is self.teacher:
            pipe.enable_lora()
            pipe.set_adapters(row.student)
        if row.sampler == "unipc":
            pipe.scheduler = UniPCMultistepScheduler.from_config(self.euler.config, **FLOW)
        if row.cache:
            pipe.transformer.enable_cache(CACHES[row.cache]())
        try:
            yield pipe
        finally:
            if row.cache:
                pipe.transformer.disable_cache()
            pipe.scheduler = self.euler
            if row.student and pipe is self.teacher:
                pipe.disable_lora()

    def sample(self, pipe: PTDiTPipeline, row: Row, prompts: list[str], seed: int) -> Tensor:
        """Return the latents (N, C, F, H, W) of prompts; sample i has the noise of seed + i."""
        args, argument = self.args, self.verifier.length_argument
        options: dict[str, Any] = {"height": args.size, "width": args.size} if args.size else {}
        options |= {argument: args.length} if argument else {}
        options |= {"num_inference_steps": row.steps, "guidance_scale": row.guidance, "output_type": "latent"}
        return torch.stack(list(generate(pipe, prompts, seed, args.batch, **options)))

    def pictures(self, pipe: PTDiTPipeline, latents: Tensor) -> np.ndarray:
        """Return samples (N, F, H, W, 3) of bytes."""
        views = self.verifier.length_argument == "num_views"
        parts = [pipe.decode_latents(part, "np", views) for part in latents.split(self.args.batch)]
        found = to_bytes(np.concatenate(parts))
        return found if found.ndim == 5 else found[:, None]

    @torch.no_grad()
    def measure(self, row: Row) -> dict[str, Any]:
        """Generate the prompts in one way, verify the samples, and compare them with the reference."""
        prompts = [task.prompt for task in self.tasks]
        with self.pipeline(row) as pipe, counted(pipe) as count:
            latents = self.sample(pipe, row, prompts, self.args.seed * 1_000_003)
            pictures = self.pictures(pipe, latents)
            forwards = count[0] / len(pipe.transformer.transformer_blocks) / len(prompts)
            diversity = self.diversity(pipe, row) if row.student or row.name == REFERENCE else {}
        if row.name == REFERENCE:
            self.keep(latents)
            self.shown = pictures
        tally = self.verifier.tally(
            self.verifier.verify(self.verifier.request(task), each)
            for task, each in zip(self.tasks, pictures, strict=True)
        )
        table = {
            name: {"right": right, "asked": asked, "interval": [round(end, 4) for end in wilson(right, asked)]}
            for name, (right, asked) in tally.items()
        }
        return {
            **asdict(row),
            "series": row.series,
            "forwards": round(forwards, 2),
            "table": table,
            **self.distance(latents, pictures),
            **diversity,
        }

    @torch.no_grad()
    def seconds(self, row: Row) -> dict[str, float]:
        """Return the processor seconds per sample of network and VAE, in one batch of prompts."""
        prompts = [task.prompt for task in self.tasks[: self.args.batch]]
        with self.pipeline(row) as pipe:
            started = time.process_time()
            latents = self.sample(pipe, row, prompts, 0)
            sampled = time.process_time()
            self.pictures(pipe, latents)
            ended = time.process_time()
        return {
            "network": round((sampled - started) / len(prompts), 4), "vae": round((ended - sampled) / len(prompts), 4)
        }  # fmt: skip

    def keep(self, latents: Tensor) -> None:
        """Write the latents of the reference."""
        self.latents.mkdir(parents=True, exist_ok=True)
        write_tensors(self.latents / "reference.safetensors", {"latents": latents})

    @cached_property
    def reference(self) -> Tensor:
        """Latents of the reference; where they are gone and only its row is kept, they are made again."""
        path = self.latents / "reference.safetensors"
        if not path.is_file():
            row = next(each for each in all_rows([]) if each.name == REFERENCE)
            with self.pipeline(row) as pipe:
                self.keep(self.sample(pipe, row, [task.prompt for task in self.tasks], self.args.seed * 1_000_003))
        return load_file(path)["latents"]

    @cached_property
    def shown(self) -> np.ndarray:
        """The samples of the reference."""
        return self.pictures(self.teacher, self.reference)

    def distance(self, latents: Tensor, pictures: np.ndarray) -> dict[str, float]:
        """Return how far samples are from the reference's of the same noise: medians over samples."""
        reference, axes = self.reference, tuple(range(1, latents.ndim))
        error = (latents - reference).square().sum(axes).sqrt() / reference.square().sum(axes).sqrt()
        found = [psnr(one / 255, two / 255) for one, two in zip(pictures, self.shown, strict=True)]
        return {"relative_error": round(float(error.median()), 4), "psnr_db": round(float(np.median(found)), 2)}

    def diversity(self, pipe: PTDiTPipeline, row: Row) -> dict[str, float]:
        """Return how much samples of one prompt differ: latents, and places and sizes as the verifier reads them."""
        args, spreads = self.args, []
        for task in self.tasks[: args.diversity_prompts]:
            latents = self.sample(pipe, row, [task.prompt] * args.diversity_seeds, 10**6)
            spreads.append([float(torch.pdist(latents.flatten(1)).mean()), *self.layout_spread(pipe, latents)])
        names = ("latents", "places", "sizes")
        means = np.nanmean(np.array(spreads), axis=0).tolist()
        return {"spread": {name: round(value, 5) for name, value in zip(names, means, strict=True) if value == value}}

    def layout_spread(self, pipe: PTDiTPipeline, latents: Tensor) -> tuple[float, float]:
        """Return the standard deviation over samples of the largest figure's place and size; nan but for pictures."""
        if self.verifier.length_argument:
            return float("nan"), float("nan")
        readings = [self.verifier.read(each).figures for each in self.pictures(pipe, latents)]
        seen = np.array([(figures[0].x, figures[0].y, figures[0].radius) for figures in readings if figures])
        if len(seen) < 2:
            return float("nan"), float("nan")
        return float(seen[:, :2].std(axis=0).mean()), float(seen[:, 2].std())


@contextmanager
def counted(pipe: PTDiTPipeline) -> Iterator[list[int]]:
    """Give a list whose number is how many samples went through feed-forward layers, which caches leave out."""
    count = [0]

    def add(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        count[0] += len(inputs[0])

    hooks = [block.ff.register_forward_pre_hook(add) for block in pipe.transformer.transformer_blocks]
    try:
        yield count
    finally:
        for hook in hooks:
            hook.remove()


def is_model(path: Path) -> bool:
    """Return whether a student is a model folder."""
    return (path / "model_index.json").is_file()


def find_students(names: list[str]) -> dict[str, Path]:
    """Return the folders of the students by name: NAME=FOLDER, or FOLDER, whose name (or parent's) is taken.

    Raises:
        ValueError: A folder holds no student.
    """
    found = {}
    for each in names:
        name, _, folder = each.rpartition("=")
        path = Path(folder)
        if is_model(path):
            facts = (path / "distillation.json").is_file()
        else:
            facts = (path / LORA_FILE).is_file() and read_distillation(path / LORA_FILE) is not None
        if not facts:
            raise ValueError(f"--student {folder!r} holds no student; give the folder `lora` or `model` of a run.")
        own = path.resolve().name
        found[name or (path.resolve().parent.name if own in ("lora", "model") else own)] = path
    return found


def shell_seconds(model: str, prompt: str, times: int = 3) -> dict[str, float]:
    """Return the median wall seconds of `ptdit generate`, loading included, plain and with the model's own student."""
    ways = {"plain": []} | ({"turbo": ["--turbo"]} if embedded_student(model) else {})
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "ptdit_diffusers.cli", "generate", prompt, "--model", model, "--overwrite"]
        for name, flags in ways.items():
            spent = []
            for _ in range(times):
                started = time.monotonic()
                subprocess.run([*words, *flags, "--output", f"{folder}/x.png"], check=True, capture_output=True)
                spent.append(time.monotonic() - started)
            found[name] = round(statistics.median(spent), 2)
    return found


def main_questions(asked: dict[str, Any]) -> list[str]:
    """Return the questions that table and plot show: the first four about single things, and everything together."""
    single = [
        name for name in asked if name.startswith(("right", "asked")) and "," not in name and asked[name]["asked"]
    ]
    return [*single[:4], ALL_RIGHT]


def draw(record: dict[str, Any], target: Path) -> None:
    """Draw the share of right answers over forwards, and what is wholly right over seconds, of all series."""
    from matplotlib.figure import Figure

    rows, seconds = record["rows"], record.get("seconds", {})
    shown = main_questions(next(iter(rows.values()))["table"])
    figure = Figure(figsize=(15, 3.6 * (-(-(len(shown) + 1) // 3))), layout="constrained")
    axes = figure.subplots(-(-(len(shown) + 1) // 3), 3, squeeze=False).flatten()
    series = list(dict.fromkeys(row["series"] for row in rows.values()))
    over_forwards = {name: row["forwards"] for name, row in rows.items()}
    over_seconds = {name: sum(seconds[name].values()) for name in rows if name in seconds}
    places = [(question, over_forwards, "forwards") for question in shown]
    places += [(shown[-1], over_seconds, "CPU seconds per sample")] if over_seconds else []
    for axis, (question, across, label) in zip(axes, places, strict=False):
        for number, name in enumerate(series):
            mine = sorted((each for each in across if rows[each]["series"] == name), key=across.__getitem__)
            cells = [rows[each]["table"][question] for each in mine]
            y = np.array([100 * cell["right"] / max(1, cell["asked"]) for cell in cells])
            low, high = (np.array([100 * cell["interval"][end] for cell in cells]) for end in (0, 1))
            style = {"marker": "o", "markersize": 3, "capsize": 2, "color": f"C{number % 10}", "linewidth": 1}
            errors = [np.maximum(y - low, 0), np.maximum(high - y, 0)]
            axis.errorbar([across[each] for each in mine], y, errors, label=name, **style)
        axis.set(title=question, xscale="log", xlabel=label)
        low, high = (round(math.log2(end(across.values()))) for end in (min, max))
        ticks = [2.0**power for power in range(low, high + 1)]
        axis.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in axes[len(places) :]:
        axis.set_axis_off()
    axes[1].legend(fontsize=6, loc="lower right")
    figure.savefig(target, dpi=90)


def table(record: dict[str, Any]) -> str:
    """Return the rows in Markdown."""
    rows = record["rows"]
    shown = main_questions(next(iter(rows.values()))["table"])
    lines = [
        f"| way | forwards | {' | '.join(shown)} | error | diversity | CPU s |",
        "| --- " * (len(shown) + 5) + "|",
    ]
    own = rows.get(REFERENCE, {}).get("spread", {})
    for name, row in rows.items():
        shares = [f"{100 * row['table'][each]['right'] / max(1, row['table'][each]['asked']):.1f}" for each in shown]
        ratio = f"{row['spread']['latents'] / own['latents']:.2f}" if own and "spread" in row else "-"
        spent = record.get("seconds", {}).get(name)
        spent = f"{sum(spent.values()):.2f}" if spent else "-"
        cells = [name, f"{row['forwards']:g}", *shares, f"{row['relative_error']:.3f}", ratio, spent]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = make_parser("scripts.benchmarks.few_steps", __doc__)
    add = parser.add_argument
    add("data_set", nargs="?", choices=("pictures", "clips", "views"), default="pictures")
    add_sampling_options(parser, model="shapes-128", prompts=500, seed=0)
    add("--student", nargs="*", default=[], metavar="[NAME=]FOLDER", help="folders `lora` or `model` of distillations")
    add("--rows", default="", metavar="TEXT", help="only rows whose name holds this; the reference is always made")
    add("--length", type=int, help="frames of a clip, or views")
    add("--size", type=int, help="pixels a side (default: the model's own)")
    add("--batch", type=int, default=25, help="samples at a time (default: %(default)s)")
    add("--development", action="store_true", help="prompts of combinations that training has, to choose with")
    add("--diversity-prompts", type=int, default=50, help="prompts of the diversity (default: %(default)s)")
    add("--diversity-seeds", type=int, default=16, help="seeds of each (default: %(default)s)")
    add("--seconds", action="store_true", help="also time all rows of the file, in this run")
    add("--shell", action="store_true", help="also time `ptdit generate` from the shell, with loading")
    add("--output", type=Path, required=True, metavar="FILE.json")
    args = parser.parse_args(arguments)
    verifier = VERIFIERS[args.data_set]
    args.length = args.length or (verifier.data_set.length if verifier.length_argument else None)
    least = {"prompts": 1, "batch": 1, "diversity_prompts": 1, "diversity_seeds": 3}
    for name, low in least.items():
        if getattr(args, name) < low:
            parser.error(f"--{name.replace('_', '-')}={getattr(args, name)} is less than {low}; nearest: {low}.")
    settings = {name: getattr(args, name) for name in SETTINGS}
    record = read_record(args.output, {"settings": settings, "rows": {}})
    if record["settings"] != settings:
        parser.error(
            f"--output {args.output} holds results of other settings: {record['settings']}; give another file."
        )
    try:
        students = find_students(args.student)
    except ValueError as error:
        parser.error(str(error))
    unnamed = sorted({row["student"] for row in record["rows"].values()} - {"", *students})
    if args.seconds and unnamed:
        parser.error(
            f"--seconds times all rows of {args.output}, also of {', '.join(unnamed)}; name it with --student."
        )
    rows = [row for row in all_rows(list(students)) if args.rows in row.name or row.name == REFERENCE]
    waiting = [row for row in rows if row.name not in record["rows"]]
    bench = Bench(args, verifier, students) if waiting or args.seconds else None
    for row in waiting:
        record["rows"][row.name] = bench.measure(row)
        record |= {"date": now(), "processor": processor(), "versions": versions(("torch", "diffusers"))}
        write_record(args.output, record)
        found = record["rows"][row.name]["table"][ALL_RIGHT]
        sys.stderr.write(f"{row.name}: {ALL_RIGHT} {found['right']} of {found['asked']}\n")
    if args.seconds:
        known = [row for row in all_rows(list(students)) if row.name in record["rows"]]
        record["seconds"] = {row.name: bench.seconds(row) for row in known}
        record["seconds_processor"] = processor()
        write_record(args.output, record)
    if args.shell:
        record["shell_seconds"] = shell_seconds(args.model, bench.tasks[0].prompt if bench else "a red circle")
        write_record(args.output, record)
    draw(record, args.output.with_suffix(".png"))
    sys.stdout.write(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
