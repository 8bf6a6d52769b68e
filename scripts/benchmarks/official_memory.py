"""Peak resident memory and time of `ptdit convert` and `ptdit generate` at the official sizes, with random weights.

Each row is one command in a process of its own; the peak is what the system says of that process. It counts pages of
mapped weight files, which the system can take back, so memory that is no mapped file is watched as well. First
`python -m scripts.benchmarks.official_files FILES`, then
`python -m scripts.benchmarks.official_memory FILES --rows convert 256`.
Rows are merged into docs/benchmarks/official_size.json.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "benchmarks" / "official_size.json"
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
    """The rows by name: words after `python`."""
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
    """Run one command and say how long it took and how much memory was resident at its peak."""
    start, peaks = time.monotonic(), {"RssAnon": 0.0}
    with subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE) as run:
        threading.Thread(target=watch, args=(run.pid, peaks), daemon=True).start()
        said = run.stdout.read().decode()
        _, status, usage = os.wait4(run.pid, 0)
        run.returncode = os.waitstatus_to_exitcode(status)
    if run.returncode:
        raise SystemExit(f"python {' '.join(words)} ended with {run.returncode}: {said}")
    return {
        "peak_resident_gb": round(usage.ru_maxrss * 1024 / 10**9, 2),
        "peak_without_mapped_files_gb": round(peaks["RssAnon"], 2),
        "seconds": round(time.monotonic() - start, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "said": [line for line in said.splitlines() if line.startswith("saved")][-1].rpartition("/")[2],
    }


def watch(process: int, peaks: dict[str, float]) -> None:
    """Follow memory of a process that is no mapped file, until the process ends. Linux only."""
    try:
        while True:
            lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
            found = next(line for line in lines if line.startswith("RssAnon"))
            peaks["RssAnon"] = max(peaks["RssAnon"], int(found.split()[1]) * 1024 / 10**9)
            time.sleep(0.05)
    except (OSError, StopIteration):
        return


def main(files: Path, patterns: list[str]) -> None:
    """Measure the rows whose names contain one of the patterns."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"rows": {}}
    for name, words in commands(files).items():
        if not any(pattern in name for pattern in patterns):
            continue
        row = measure(words)
        row |= {"date": date.today().isoformat(), "cpu": cpu(), "torch": torch.__version__}
        row["threads"] = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
        results["rows"][name] = row
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        sys.stdout.write(f"{name}: {row}\n")
        sys.stdout.flush()
    shutil.rmtree(files / "one", ignore_errors=True)


def cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", type=Path, help="folder that scripts.benchmarks.official_files made")
    parser.add_argument("--rows", nargs="+", default=[""], help="parts of names of rows (default: all)")
    arguments = parser.parse_args()
    main(arguments.files.resolve(), arguments.rows)
