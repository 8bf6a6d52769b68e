"""Latency, peak memory and counted products of PT-DiT and other models, in one run, taking turns, with spread.

    python -m scripts.benchmarks.speed --pixels 512 1024 --out docs/benchmarks/cpu.json
    python -m scripts.benchmarks.speed --pixels 512 --frames 1 2 4 8 16 24 36 48 72 --models ptdit wan --out FILE
    python -m scripts.benchmarks.speed --plot docs/benchmarks/cpu.json

Weights are random: speed does not depend on them. Blocks are alike, so a few tell the ratio of all. Models and what is
compared: `scripts/benchmarks/models.py`.
"""

import argparse
import gc
import json
import math
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from scripts.benchmarks.memory import peak_bytes
from scripts.benchmarks.models import PICTURES, VIDEOS, Job, bare_products, build, inputs, prepare
from scripts.benchmarks.savings import measure_savings
from scripts.benchmarks.timing import on_one_thread, take_turns
from scripts.evaluation.options import make_parser
from scripts.evaluation.records import processor, read_record, write_record


def counted_macs(name: str, job: Job) -> int:
    """Return the multiply-accumulates of one forward by torch's counter, without computing anything."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = build("ptdit" if name in ("bare", "fused") else name, job)
        if name == "bare":
            bare_products(model, job, torch.float32)()
        else:
            if name == "fused":
                for block in model.transformer_blocks:  # fuse_linear_layers wants loaded weights
                    block.fuse()
            model.forward(**inputs(name, job, torch.float32))
    return counter.get_total_flops() // 2


@torch.inference_mode()
def measure(job: Job, names: list[str], dtype: torch.dtype, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of one size; models take turns."""
    device, functions, rows = arguments.device, {}, {}
    for name in names:
        model, function = prepare(name, job, dtype, device, arguments.compile)
        if arguments.compile or device != "cpu":
            function()  # kernels are chosen, graphs compiled
        parameters = sum(parameter.numel() for parameter in model.parameters())
        functions[name] = function
        rows[name] = {
            "model": name,
            "frames": job.frames,
            "pixels": job.pixels,
            "dtype": str(dtype).split(".")[1],
        }
        rows[name] |= {"parameters": parameters, "gmacs": round(counted_macs(name, job) / 1e9, 2)}
        rows[name]["peak_mib"] = None if arguments.compile and device == "cpu" else round(
            peak_bytes(function, device) / 2**20, 1)  # fmt: skip
    times = take_turns(functions, arguments.repeats, device)
    for name in names:
        rows[name] |= {
            "median_s": round(statistics.median(times[name]), 5),
            "min_s": round(min(times[name]), 5),
            "max_s": round(max(times[name]), 5),
        }
        if "bare" in names:
            ratios = [one / floor for one, floor in zip(times[name], times["bare"], strict=True)]
            rows[name]["to_bare"] = round(statistics.median(ratios), 3)
    functions.clear()
    gc.collect()
    return list(rows.values())


def hardware(device: str) -> dict[str, Any]:
    """Return what the numbers depend on."""
    import diffusers

    name = torch.cuda.get_device_name() if device.startswith("cuda") else processor()
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    tuning = {key: value for key, value in os.environ.items() if key.startswith(("MALLOC_", "TORCHINDUCTOR_FREEZING"))}
    counted = {"threads": torch.get_num_threads(), "clock": "processor" if on_one_thread(device) else "wall"}
    return {"device": name, **counted, "system": platform.system(), **versions, "environment": tuning}


def growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return how time and memory of each model grow between its two longest videos, as exponents: 1 is linear."""
    table = []
    for key in dict.fromkeys((row["model"], row["dtype"], row["pixels"]) for row in rows):
        line = [row for row in rows if (row["model"], row["dtype"], row["pixels"]) == key and row["model"] != "bare"]
        line = sorted(line, key=lambda row: row["frames"])[-2:]
        if len(line) < 2 or line[0]["frames"] == line[1]["frames"]:
            continue
        longer = math.log(line[1]["frames"] / line[0]["frames"])
        exponents = {
            name: round(math.log(line[1][column] / line[0][column]) / longer, 3)
            for name, column in (("seconds", "median_s"), ("memory", "peak_mib"), ("macs", "gmacs"))
            if line[0][column] and line[1][column]
        }
        frames = [row["frames"] for row in line]
        table.append(dict(zip(("model", "dtype", "pixels"), key, strict=True)) | {"frames": frames} | exponents)
    return table


def panels_of(rows: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return title and rows of each panel by number type: pictures, and models of videos with their single frames."""
    videos = {row["model"] for row in rows if row["frames"] > 1}
    panels = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        some = [row for row in rows if row["dtype"] == dtype]
        if {row["model"] for row in some} - videos:
            panels.append((f"picture, {dtype}", [row for row in some if row["frames"] == 1]))
        if videos:
            panels.append((f"video, {dtype}", [row for row in some if row["model"] in videos]))
    return panels


def plot(source: Path, target: Path) -> None:
    """Plot latency and peak memory over tokens, one line per model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    record = read_record(source, None)
    panels = panels_of(record["rows"])
    figure, axes = plt.subplots(2, len(panels), figsize=(5 * len(panels), 7), squeeze=False, layout="constrained")
    for axis, memory, (title, chosen) in zip(*axes, panels, strict=True):
        for name in dict.fromkeys(row["model"] for row in chosen):
            line = sorted((row["frames"] * (row["pixels"] // 16) ** 2, row) for row in chosen if row["model"] == name)
            low, high = ([abs(row[key] - row["median_s"]) for _, row in line] for key in ("min_s", "max_s"))
            axis.errorbar(
                [tokens for tokens, _ in line],
                [row["median_s"] for _, row in line],
                [low, high],
                marker="o",
                label=name,
            )
            peaks = [(tokens, row["peak_mib"]) for tokens, row in line if row["peak_mib"] is not None]
            memory.plot([tokens for tokens, _ in peaks], [peak for _, peak in peaks], marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds per forward")
        memory.set(xscale="log", yscale="log", xlabel="tokens", ylabel="peak MiB above the weights")
        axis.set_title(f"{title}, {record['settings']['layers']} blocks")
        axis.legend(fontsize=8)
    figure.suptitle(f"{record['hardware']['device']}, torch {record['hardware']['torch']}, random weights", fontsize=9)
    figure.savefig(target, dpi=120)
    plt.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; exit where one is bad."""
    parser = make_parser("scripts.benchmarks.speed", __doc__)
    parser.add_argument("--pixels", type=int, nargs="+", default=[512, 1024], help="sides of square pictures")
    parser.add_argument("--frames", type=int, nargs="+", default=[1], help="latent frames; above 1 is video")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--models", nargs="+", help="default: all that fit pictures, or videos")
    parser.add_argument("--layers", type=int, default=2, help="blocks; the released model has 28")
    parser.add_argument("--heads", type=int, default=16, help="heads of 72; the width is 72 times it")
    parser.add_argument("--text", type=int, default=24, help="text tokens")
    parser.add_argument("--caption", type=int, default=4096, help="width of the text encoder")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="rounds; medians over them")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    parser.add_argument("--savings", action="store_true", help="also each fused product alone")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="only plot JSON, beside it as PNG")
    arguments = parser.parse_args(argv)
    for pixels in arguments.pixels:
        if pixels < 16 or pixels % 16:
            parser.error(f"--pixels {pixels} is not a multiple of 16; nearest: {max(16, round(pixels / 16) * 16)}")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Measure and write, or plot what was written."""
    arguments = parse(argv)
    if arguments.plot is not None:
        plot(arguments.plot, arguments.plot.with_suffix(".png"))
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    settings = {key: value for key, value in vars(arguments).items() if key not in ("out", "plot")}
    record = {"hardware": hardware(arguments.device), "settings": settings, "rows": [], "savings": []}
    for dtype in arguments.dtypes:
        for frames in arguments.frames:
            for pixels in arguments.pixels:
                shared = arguments.layers, arguments.batch, arguments.text, arguments.heads, arguments.caption
                job = Job(frames, pixels, *shared)
                names = arguments.models or list(PICTURES if frames == 1 else VIDEOS)
                for row in measure(job, names, getattr(torch, dtype), arguments):
                    record["rows"].append(row)
                    print(json.dumps(row), flush=True)
                if arguments.savings:
                    table = measure_savings(job, getattr(torch, dtype), arguments.device, arguments.repeats)
                    record["savings"].append({"dtype": dtype, "frames": frames, "pixels": pixels, "products": table})
                    print(json.dumps(record["savings"][-1]), flush=True)
    record["growth"] = growth(record["rows"])
    print(json.dumps(record["growth"]), flush=True)
    if arguments.out is not None:
        write_record(arguments.out, record)


if __name__ == "__main__":
    main()
