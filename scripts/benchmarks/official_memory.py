"""Peak resident memory and time of `ptdit convert` and `ptdit generate` at the official sizes, with random weights.

Each row is one command in a process of its own; the peak is what the system says of that process. It counts pages of
mapped weight files, which the system can take back, so memory that is no mapped file is watched as well. First
`python -m scripts.benchmarks.official_files FILES`, then
`python -m scripts.benchmarks.official_memory FILES --rows convert 256`.
Rows are merged into docs/benchmarks/official_size.json.
"""

import os
import shutil
import subprocess
import sys
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from scripts.benchmarks.memory import watch_process
from scripts.evaluation.options import make_parser
from scripts.evaluation.records import BENCHMARKS, processor, read_record, write_record

ROOT = BENCHMARKS.parents[1]
RESULTS = BENCHMARKS / "official_size.json"
PROMPT = "a red circle above a blue square"
COMMAND = ["-m", "ptdit_diffusers.cli"]
ALL_RESIDENT = """
import sys, torch
from ptdit_diffusers import PTDiTPipeline
model, picture, prompt = sys.argv[1:]
pipe = PTDiTPipeline.from_pretrained(model, dtype=torch.bfloat16)
pipe(prompt, height=1024, width=1024, num_inference_steps=1).images[0].save(picture)
print("saved")
"""
GENERATE = ["generate", PROMPT, "--device", "cpu", "--overwrite"]


def commands(files: Path) -> dict[str, list[str]]:
    """Return the rows by name: arguments after `python`."""
    model, picture = str(files / "model"), str(files / "picture.png")
    transformer = ["--transformer", str(files / "transformer.pt")]
    rest = ["--vae", str(files / "checkpoint.ckpt"), "--text-encoder", str(files / "t5")]
    whole = [*GENERATE, "--model", model, "--output", picture, "--dtype", "bf16"]
    small, large = ["--height", "256", "--width", "256"], ["--height", "1024", "--width", "1024", "--steps", "1"]
    bf16 = ["--dtype", "bf16", "--overwrite"]
    rows = {
        "convert the fp32 transformer to bf16": ["convert", *transformer, *bf16, "--output", str(files / "one")],
        "convert everything to bf16": ["convert", *transformer, *rest, *bf16, "--output", model],
        "256x256, 2 steps, bf16": [*whole, *small, "--steps", "2"],
        "256x256, 2 steps, int8": [*whole, *small, "--steps", "2", "--quantize", "int8"],
        "256x256, 2 steps, fp8": [*whole, *small, "--steps", "2", "--quantize", "fp8"],
        "1024x1024, 1 step, bf16": [*whole, *large],
        "1024x1024, 1 step, int8": [*whole, *large, "--quantize", "int8"],
        "1024x1024, 1 step, fp8": [*whole, *large, "--quantize", "fp8"],
        "1024x1024, 4 steps, bf16": [*whole, *large[:-1], "4"],
    }
    resident = ["-c", ALL_RESIDENT, model, picture, PROMPT]
    return {name: [*COMMAND, *words] for name, words in rows.items()} | {
        "1024x1024, 1 step, all at once in memory, bf16": resident
    }


def measure(words: list[str]) -> dict[str, Any]:
    """Run one command; return how long it took and how much memory was resident at its peak."""
    start, peaks = time.monotonic(), {"RssAnon": 0.0}
    with subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE) as run:
        threading.Thread(target=watch_process, args=(run.pid, peaks), daemon=True).start()
        printed = run.stdout.read().decode()
        _, status, usage = os.wait4(run.pid, 0)
        run.returncode = os.waitstatus_to_exitcode(status)
    if run.returncode:
        raise SystemExit(f"python {' '.join(words)} ended with {run.returncode}: {printed}")
    return {
        "peak_resident_gb": round(usage.ru_maxrss * 1024 / 10**9, 2),
        "peak_without_mapped_files_gb": round(peaks["RssAnon"], 2),
        "seconds": round(time.monotonic() - start, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "said": [line for line in printed.splitlines() if line.startswith("saved")][-1].rpartition("/")[2],
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure the rows whose names contain one of the patterns."""
    parser = make_parser("scripts.benchmarks.official_memory", __doc__)
    parser.add_argument("files", type=Path, help="folder that scripts.benchmarks.official_files made")
    parser.add_argument("--rows", nargs="+", default=[""], help="parts of names of rows (default: all)")
    args = parser.parse_args(arguments)
    files, results = args.files.resolve(), read_record(RESULTS, {"rows": {}})
    for name, words in commands(files).items():
        if not any(pattern in name for pattern in args.rows):
            continue
        row = measure(words)
        row |= {"date": date.today().isoformat(), "cpu": processor(), "torch": torch.__version__}
        row["threads"] = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
        results["rows"][name] = row
        write_record(RESULTS, results)
        sys.stdout.write(f"{name}: {row}\n")
        sys.stdout.flush()
    shutil.rmtree(files / "one", ignore_errors=True)


if __name__ == "__main__":
    main()
