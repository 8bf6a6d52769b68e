"""Many random inputs: python -m tests.fuzz --inputs 25000 [--only lora] [--seed 0]

Each thousand runs in a process of its own with bounded memory, which is ended when one input takes too long, so that
nothing hides what follows. Prints what was found; the exit code is 1 if there was anything.
"""

import argparse
import faulthandler
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz.targets import TARGETS, Place, try_inputs
from tests.processes import LIBRARIES

PORTION = 1000  # inputs of one process
MEMORY = 8 * 2**30  # bytes of address space
HANG = 600  # seconds for one input on a busy machine, after which its process ends


def portions(count: int, only: str | None) -> Iterator[tuple[str, int]]:
    """Yield kinds of inputs and how many of each, together `count`."""
    for name, target in TARGETS.items():
        wanted = count if name == only else 0 if only else -(-count * target.share // 100)
        for first in range(0, wanted, PORTION):
            yield name, min(PORTION, wanted - first)


def run_portion(name: str, count: int, seed: int, model: Path, report: str) -> None:
    """Try inputs in a fork; exit code 1 and a report for a finding."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with tempfile.TemporaryDirectory() as folder, open(report, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        place = Place.build(Path(folder), model)
        try:
            try_inputs(name, place, count, seed, lambda: faulthandler.dump_traceback_later(HANG, exit=True, file=file))
        except BaseException:
            traceback.print_exc()
            raise SystemExit(1) from None
        finally:
            faulthandler.cancel_dump_traceback_later()


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=25000, metavar="N", help="inputs of all kinds (default: 25000)")
    parser.add_argument("--only", choices=TARGETS, help="one kind")
    parser.add_argument("--seed", type=int, default=0, help="other inputs for each number (default: 0)")
    flags = parser.parse_args()
    for library in LIBRARIES:
        __import__(library)
    from ptdit_diffusers import embedded_model_path

    context, begin, tried, found = multiprocessing.get_context("fork"), time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as reports:
        for number, (name, count) in enumerate(portions(flags.inputs, flags.only)):
            report = f"{reports}/{number}"
            words = (name, count, flags.seed * 10_000 + number, embedded_model_path("shapes-128"), report)
            process = context.Process(target=run_portion, args=words)
            process.start()
            process.join()
            tried += count
            if process.exitcode:
                found += 1
                text = Path(report).read_text(encoding="utf-8", errors="replace")
                sys.stdout.write(f"{name}, seed {words[2]}: exit {process.exitcode}\n{text[-6000:]}\n")
            sys.stdout.write(f"{tried} inputs after {time.monotonic() - begin:.0f} s, {found} findings ({name})\n")
            sys.stdout.flush()
    return int(found > 0)


if __name__ == "__main__":
    raise SystemExit(main())
