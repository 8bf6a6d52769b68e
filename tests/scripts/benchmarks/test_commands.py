"""Every benchmark is a command with its help, and writes where the published results are."""

import importlib
from pathlib import Path

import pytest

from scripts.benchmarks import official_memory, quantized
from scripts.evaluation.records import BENCHMARKS, read_record

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = (
    "caches",
    "dit_in_diffusers",
    "guiders",
    "longest_video",
    "official_files",
    "official_memory",
    "quantized",
    "schedulers",
    "speed",
)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"scripts.benchmarks.{name}").main(["--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and f"python -m scripts.benchmarks.{name}" in out


def test_results_are_merged_into_the_published_files():
    assert official_memory.ROOT == ROOT and BENCHMARKS == ROOT / "docs" / "benchmarks"
    for benchmark in (official_memory, quantized):
        assert read_record(benchmark.RESULTS, {})["rows"], benchmark.RESULTS
    rows = read_record(official_memory.RESULTS, {})["rows"]
    assert set(rows) <= set(official_memory.commands(Path("files")))
