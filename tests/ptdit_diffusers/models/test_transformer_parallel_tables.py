"""The computed tables of docs/parallel.md follow from the transformer's plan, the measured one from its file."""

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from ptdit_diffusers.core.backbones.cuts import Triple
from ptdit_diffusers.core.backbones.proxies import ProxyPlan, SharedProxies
from ptdit_diffusers.core.backbones.shares import Plan, Share, best_plan, cuts_of, halo

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "parallel.md").read_text(encoding="utf-8")
DIM, BLOCKS = 1152, 28
CASES = {  # name in the tables -> token grid, windows
    "1024 px": ((1, 64, 64), (1, 8, 8)),
    "2048 px": ((1, 128, 128), (1, 16, 16)),
    "4096 px": ((1, 256, 256), (1, 32, 32)),
    "512 px, 24 latent frames, windows (4, 4, 4)": ((24, 32, 32), (4, 4, 4)),
    "512 px, 72 latent frames, windows (4, 4, 4)": ((72, 32, 32), (4, 4, 4)),
    "512 px, 72 latent frames, windows of one frame": ((72, 32, 32), (1, 8, 8)),
}
LINKS = (  # FLOP/s, bytes/s, seconds of waiting, bytes of a number
    (400e12, 300e9, 20e-6, 2),
    (120e12, 20e9, 30e-6, 2),
    (120e12, 1.1e9, 150e-6, 2),
    (1e12, 1.1e9, 250e-6, 4),
)


def rows_of(heading: str) -> list[list[str]]:
    """Return the cells of a table whose first heading begins so."""
    table = PAGE[PAGE.index(f"| {heading}") :].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def received(grid: Triple, window: Triple, devices: int) -> tuple[Plan, int]:
    """Return the plan, and the vectors that the busiest device gets in a block."""
    proxies = ProxyPlan(grid, window, window)
    plan = best_plan(grid, window, True, proxies.number(), DIM, devices)
    shares = [
        Share(grid, plan.axis, plan.bounds, SimpleNamespace(rank=rank, count=devices)) for rank in range(devices)
    ]
    return plan, max(SharedProxies(proxies, share).received(True) for share in shares)


def seconds(case: str, devices: int, samples: int, link: tuple[float, float, float, int]) -> float:
    """Return the computed time of a block for a number of samples, on so many devices."""
    grid, window = CASES[case]
    plan, vectors = received(grid, window, devices)
    speed, bandwidth, wait, size = link
    work = samples * 2 * plan.work * DIM**2 / speed
    if devices == 1:
        return work
    cuts = cuts_of(grid[plan.axis], window[plan.axis], True)
    messages = 1 + sum(any(halo(span, [borders]) for span in pairwise(plan.bounds)) for borders in cuts)
    return work + messages * wait + samples * vectors * DIM * size / bandwidth


def test_the_bytes():
    rows = rows_of("MB received in a block")
    assert len(rows) == 9
    for case, devices, *cells in rows:
        (frames, height, width), p = CASES[case][0], int(devices)
        tokens = frames * height * width
        vectors = [
            received(*CASES[case], p)[1],
            4 * tokens * (p - 1) / p**2,
            2 * tokens * (p - 1) / p,
            tokens / BLOCKS,
        ]
        sizes = [2 * each * DIM * 2 / 1e6 for each in vectors]
        assert cells == [f"{sizes[0]:.2f}", *(f"{size:.1f}" for size in sizes[1:])], case


def test_the_efficiencies():
    rows = rows_of("computed")
    assert len(rows) == 6
    for case, devices, *cells in rows:
        for cell, link in zip(cells, LINKS, strict=True):
            p, alone = int(devices), seconds(case, 1, 2, link)
            windows, halves = (
                alone / (p * each) for each in (seconds(case, p, 2, link), seconds(case, p // 2, 1, link))
            )
            assert [float(each) for each in cell.split()] == pytest.approx([windows, halves], abs=0.0051), case


def test_the_measured_times_and_memory_are_those_of_the_file():
    path = Path(__file__).resolve().parents[3] / "docs" / "benchmarks" / "devices.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    expected = [[str(r["devices"]), f"{r['processor_seconds']:.2f} s", f"{r['memory_mb']:.0f} MB"] for r in rows]
    assert rows_of("processes") == expected
