"""Everything about a GPU that the documentation calls "not measured", in one run of about ten minutes.

    python -m scripts.benchmarks.gpu                                     # on a machine with a large GPU
    python -m scripts.benchmarks.gpu --tiny --device cpu --out FILE      # a rehearsal, whose numbers mean nothing
    python -m scripts.benchmarks.gpu --tables                            # draw the tables of docs/gpu.md again

Each part runs in a process of its own with a time limit. What a part found is written when it ends, so a run that was
stopped goes on where it stopped. Parts that failed, ran out of memory or out of time are named and run again the next
time. Weights are random, nothing is downloaded; the model folder of the official size (12 GB) is made in a temporary
folder, which `--folder` keeps for the next run.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scripts.benchmarks import gpu_parts, speed
from scripts.evaluation.options import make_parser
from scripts.evaluation.records import BENCHMARKS, now, read_record, write_record

RESULTS, PAGE = BENCHMARKS / "gpu.json", BENCHMARKS.parent / "gpu.md"
MARK = "<!-- tables: python -m scripts.benchmarks.gpu --tables -->\n"
LEAST = 20  # seconds that are needed to begin a part
FILES = "official size: files"
FORMS = ("eager", "compiled")
MODELS = ("bare", "ptdit", "fused", "ptdit-864", "pixart", "dit", "wan")
PRESETS = ("12gb", "24gb", "multi-gpu")


class Part(NamedTuple):
    """A part of the run: its time limit in seconds, and what returns its rows."""

    limit: int
    run: Callable[[], list[dict[str, Any]]]


def parts_of(tiny: bool, device: str, folder: Path) -> dict[str, Part]:
    """Return the parts by name, the most wanted first."""
    sizes = {f"pictures, {pixels} px": (pixels, 1) for pixels in ((32,) if tiny else (1024, 2048, 4096))}
    sizes |= {f"video, {frames} latent frames": (512, frames) for frames in ((2,) if tiny else (24, 48))}
    speeds = {
        form: {
            f"{name}, {form}": Part(120, partial(gpu_parts.speeds, *size, form == "compiled", tiny, device))
            for name, size in sizes.items()
        }
        for form in FORMS
    }
    parts = speeds["eager"] | {FILES: Part(150, partial(gpu_parts.make_folder, folder, tiny, device))}
    for option in gpu_parts.options(device):
        parts[f"official size: {option}"] = Part(90, partial(gpu_parts.official, option, folder, tiny, device))
    for preset in PRESETS:
        parts[f"LoRA: {preset}"] = Part(90, partial(gpu_parts.lora, preset, tiny))
    if device.startswith("cuda"):  # compilers are slow, and on a CPU tested elsewhere
        parts |= {"tests that need a GPU": Part(120, gpu_parts.gpu_tests)} | speeds["compiled"]
    return parts


def run_part(name: str, words: list[str], limit: float) -> dict[str, Any]:
    """Run one part in a process; return its rows, or why there are none."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        rows = Path(place) / "rows.json"
        command = [sys.executable, "-m", "scripts.benchmarks.gpu", *words, "--part", name, "--rows", str(rows)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
            said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()] or ["no word"]
            status = f"failed: {said[-1].strip()}" if done.returncode or not rows.is_file() else "done"
            if "OutOfMemoryError" in status or "out of memory" in status:
                status = "out of memory"
        except subprocess.TimeoutExpired:
            status = "out of time"
        found = read_record(rows, [])
    seconds = round(time.monotonic() - start, 1)
    return {"status": status, "date": now(), "seconds": seconds, "rows": found if status == "done" else []}


def measure(arguments: argparse.Namespace, words: list[str]) -> bool:
    """Run the parts that are not done yet, as long as there is time; return whether all are done."""
    record = read_record(arguments.out, {"parts": {}})
    record["hardware"], deadline = speed.hardware(arguments.device), time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as place:
        folder = arguments.folder or Path(place) / "model"
        parts = parts_of(arguments.tiny, arguments.device, folder)
        for name, part in parts.items():
            if _is_done(record, name) and (name != FILES or not _wanted(record, parts, folder)):
                print(f"{name}: done before", flush=True)
                continue
            left = deadline - time.monotonic()
            if left < LEAST:
                print(f"{name}: no time left; run the command again", flush=True)
                continue
            found = run_part(name, [*words, "--folder", str(folder)], min(part.limit, left))
            record["parts"][name] = found
            write_record(arguments.out, record)
            print(f"{name}: {found['status']}, {found['seconds']} s", flush=True)
    return all(_is_done(record, name) for name in parts)


def _is_done(record: dict[str, Any], name: str) -> bool:
    return record["parts"].get(name, {}).get("status") == "done"


def _wanted(record: dict[str, Any], parts: dict[str, Part], folder: Path) -> bool:
    """Whether the model folder is needed again: it is gone, and a part that reads it is not done."""
    readers = [name for name in parts if name.startswith("official size: ") and name != FILES]
    return not (folder / "model_index.json").is_file() and not all(_is_done(record, name) for name in readers)


# --- tables ----------------------------------------------------------------------------------------------------------


def tables(record: dict[str, Any]) -> str:
    """Return the tables of a record in Markdown; what was not measured says so, or why not."""
    parts, lines = record.get("parts", {}), []
    if "hardware" in record:
        hardware = record["hardware"]
        lines += [f"{hardware['device']}, torch {hardware['torch']}, diffusers {hardware['diffusers']}.", ""]
    lines += [f"| {' | '.join(['bf16, 2 blocks, seconds per forward', *MODELS])} |", "| --- " * 8 + "|"]
    for name in parts_of(False, "cuda", Path()):
        if name.endswith(FORMS):
            rows = {row["model"]: row for row in _rows(parts, name)}
            cells = [f"{rows[model]['median_s']:.4f}" if model in rows else "" for model in MODELS]
            lines.append(f"| {name} | {' | '.join(cells if rows else [_status(parts, name), *[''] * 6])} |")
    head = "official size, 1024 x 1024, T5-XXL, bf16 | peak on the GPU | peak in main memory | load | a step | decode"
    lines += ["", f"| {head} |", "| --- " * 6 + "|"]
    for option in gpu_parts.options("cuda"):
        name = f"official size: {option}"
        cells = [_status(parts, name), "", "", "", ""]
        for row in _rows(parts, name):
            cells = [f"{row['gpu_gb']} GB", f"{row['host_gb']} GB", *(f"{row[key]} s" for key in gpu_parts.TIMES)]
        lines.append(f"| {option} | {' | '.join(cells)} |")
    lines += ["", "| LoRA preset | pixels | peak on the GPU | seconds per step |", "| --- " * 4 + "|"]
    for preset in PRESETS:
        cells = ["", _status(parts, f"LoRA: {preset}"), ""]
        for row in _rows(parts, f"LoRA: {preset}"):
            cells = [str(row["resolution"]), f"{row['peak_memory_gib']} GiB", str(row["seconds_per_step"])]
        lines.append(f"| {preset} | {' | '.join(cells)} |")
    lines += ["", f"Tests that need a GPU: {_status(parts, 'tests that need a GPU')}."]
    return "\n".join(lines) + "\n"


def _rows(parts: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return parts.get(name, {}).get("rows", [])


def _status(parts: dict[str, Any], name: str) -> str:
    return parts[name]["status"].partition(":")[0] if name in parts else "not measured"


def write_tables() -> None:
    """Replace the tables of docs/gpu.md by those of the published record."""
    head = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    PAGE.write_text(head + MARK + "\n" + tables(read_record(RESULTS, {})), encoding="utf-8", newline="\n")


def main(argv: list[str] | None = None) -> int:
    """Measure, run one part, or draw the tables; return 1 if a part is not done."""
    parser = make_parser("scripts.benchmarks.gpu", __doc__)
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--minutes", type=float, default=10, help="time for the whole run (default: 10)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON to go on with (default: docs/benchmarks)")
    parser.add_argument("--folder", type=Path, help="where the model folder of the official size is, or goes")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to rehearse on a CPU")
    parser.add_argument("--tables", action="store_true", help="only draw the tables of docs/gpu.md")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.tables:
        write_tables()
        return 0
    if arguments.part:
        part = parts_of(arguments.tiny, arguments.device, arguments.folder)[arguments.part]
        arguments.rows.write_text(json.dumps(part.run()), encoding="utf-8")
        return 0
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device; rehearse with --tiny --device cpu --out FILE")
    words = ["--device", arguments.device, *(["--tiny"] if arguments.tiny else [])]
    return 0 if measure(arguments, words) else 1


if __name__ == "__main__":
    sys.exit(main())
