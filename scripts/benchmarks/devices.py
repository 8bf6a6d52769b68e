"""Processor time, wall time and memory of one forward that 1, 2, ... processes of this machine share.

    python -m scripts.benchmarks.devices --devices 1 2 4 --output docs/benchmarks/devices.json

Each process has one thread; memory is that of tensors without the weights. A picture has 64 windows, as officially.
Wall time means something only up to as many processes as there are idle cores; processor time is counted by the system
for each process and leaves waiting out, so it shows how the work is divided.
"""

import argparse
import statistics
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from ptdit_diffusers.core.files import replace_json
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from ptdit_diffusers.training.record import hardware, versions
from scripts.benchmarks.memory import peak_bytes

REPEATS = 3
TEXT_TOKENS = 120


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmarks.devices", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--devices", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes (default: 1 2 4)")
    add("--pixels", type=int, default=1024, help="side of the picture, a multiple of 16 (default: 1024)")
    add("--layers", type=int, default=2, help="blocks (default: 2; the official model has 28)")
    add("--heads", type=int, default=16, help="heads of width 72 (default: 16, as the official model)")
    add("--output", type=Path, required=True, help="JSON file")
    args = parser.parse_args(arguments)
    rows = [measure(count, args.pixels, args.layers, args.heads) for count in args.devices]
    found = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "pixels": args.pixels,
        "layers": args.layers,
        "width": 72 * args.heads,
        "samples": 2,
        "dtype": "float32",
        "rows": rows,
        "hardware": hardware(),
        "versions": versions(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    replace_json(args.output, found)
    for row in rows:
        sys.stdout.write("  ".join(f"{name} {value}" for name, value in row.items()) + "\n")
    return 0


def measure(count: int, pixels: int, layers: int, heads: int) -> dict[str, Any]:
    """Return what the processes of one number measured: the busiest one's times and the largest memory."""
    with tempfile.TemporaryDirectory() as folder:
        options = count, Path(folder), pixels, layers, heads
        torch.multiprocessing.start_processes(share, options, nprocs=count, start_method="spawn")
        found = [torch.load(path, weights_only=True) for path in sorted(Path(folder).glob("*.pt"))]
    assert len(found) == count
    return {"devices": count, **{name: round(max(each[name] for each in found), 3) for name in found[0]}}


@torch.no_grad()
def share(rank: int, count: int, folder: Path, pixels: int, layers: int, heads: int) -> None:
    """Measure the forward in one of the processes, and write the result to `folder`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    side = pixels // 8
    window = (1, side // 16, side // 16)
    options = {"sample_size": side, "use_additional_conditions": False, "window_size": window, "proxy_ratio": window}
    network = PTDiTTransformer3DModel(heads, num_layers=layers, **options)
    if count > 1:
        from diffusers import ContextParallelConfig

        meeting_point = (folder / "meeting_point").as_uri()
        dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=count)
        network.enable_parallelism(config=ContextParallelConfig(ulysses_degree=count))
    inputs = {
        "hidden_states": torch.randn(2, 4, 1, side, side),
        "encoder_hidden_states": torch.randn(2, TEXT_TOKENS, network.config.caption_channels),
        "timestep": torch.full((2,), 500.0),
    }
    times = []
    for _ in range(REPEATS + 1):  # the first one fills caches
        wall, processor = time.perf_counter(), time.process_time()
        network(**inputs)
        times.append((time.perf_counter() - wall, time.process_time() - processor))
    walls, processors = zip(*times[1:], strict=True)
    result = {
        "seconds": statistics.median(walls),
        "processor_seconds": statistics.median(processors),
        "memory_mb": peak_bytes(lambda: network(**inputs), "cpu") / 1e6,
    }
    torch.save(result, folder / f"{rank}.pt")
    if count > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
