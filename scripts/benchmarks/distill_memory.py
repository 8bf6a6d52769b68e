"""Peak memory and time of a distillation at the official size, with random weights, through the real command.

    python -m scripts.benchmarks.distill_memory --preset 12gb --resolution 512 --output docs/few-steps/memory.json

The base is that of `scripts.benchmarks.lora_memory`: the official transformer with random weights. Each stage runs in
a process of its own: "paths" makes two paths of one guided step, "segments" makes one optimizer step, with the errors
on a held-out path before and after it, and "tdm" goes on from it with one step of student and fake score. More steps
need no more memory. The numbers of the student mean nothing.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts.benchmarks.lora_memory import TEXT_TOKENS, write_random_base
from scripts.evaluation.records import now, processor, read_record, versions, write_record

STAGE = (
    "import sys, torch; from lora.distill import main; "
    "from ptdit_diffusers.training.record import memory_gib; code = main(sys.argv[1:]); "
    "sys.stdout.write(f'{memory_gib(torch.device(\"cpu\"))}'); sys.exit(code)"
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmarks.distill_memory", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--preset", default="12gb", help="preset of the distillation (default: 12gb)")
    parser.add_argument("--resolution", type=int, default=512, help="pixels a side (default: 512)")
    parser.add_argument("--layers", type=int, default=28, help="blocks (default: 28, the official number)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; a line of measurements is added to it")
    args, further = parser.parse_known_args(arguments)
    found = {"date": now(), "preset": args.preset, "options": further, "resolution": args.resolution}
    found |= {"layers": args.layers, "stages": {}}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_random_base(folder / "base", args.layers)
        (folder / "prompts.txt").write_text("word " * TEXT_TOKENS + "\n", encoding="utf-8")
        words = ["--config", args.preset, "--base", str(folder / "base"), "--prompts", str(folder / "prompts.txt")]
        words += ["--paths-dir", str(folder / "states"), "--resolution", str(args.resolution)]
        words += "--paths 2 --held-out 1 --steps 1 --points 1 --teacher-steps 1 --max-steps 1 --warmup 0".split()
        words += ["--accumulation", "1", "--log-every", "1", "--checkpoint-every", "0", *further]
        start = ["--start", str(folder / "segments" / "lora")]
        for stage in ("paths", "segments", "tdm"):
            started = time.monotonic()
            own = ["--stage", stage, "--output-dir", str(folder / stage), *(start if stage == "tdm" else ())]
            done = subprocess.run([sys.executable, "-c", STAGE, *words, *own], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                return done.returncode
            seconds = round(time.monotonic() - started, 1)
            found["stages"][stage] = {"peak_memory_gib": float(done.stdout.split()[-1]), "seconds": seconds}
        run = json.loads((folder / "segments" / "run.json").read_text(encoding="utf-8"))
        lines = [(folder / stage / "log.jsonl").read_text().splitlines() for stage in ("segments", "tdm")]
        size = (folder / "segments" / "lora" / "pytorch_lora_weights.safetensors").stat().st_size
    losses = [line["loss"] for line in map(json.loads, sum(lines, [])) if "loss" in line]
    found |= {
        "trained_values": run["parameters"],
        "lora_file_mb": round(size / 1e6, 1),
        "loss_is_finite": all(map(math.isfinite, losses)) and len(losses) == len(lines),
    }
    found |= {"processor": processor(), "versions": versions(("torch", "diffusers", "peft"))}
    write_record(args.output, [*read_record(args.output, []), found])
    sys.stdout.write(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
