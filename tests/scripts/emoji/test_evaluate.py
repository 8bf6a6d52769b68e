"""Judge and evaluation from the command line, on small packages; true pictures are judged."""

import json
from pathlib import Path

import pytest

from scripts.datasets.emoji import packages, split
from scripts.emoji.__main__ import main
from tests.scripts.datasets.emoji_packages import write_packages

HELD_OUT = {"unseen": [], "genders": [], "tones": [], "pairs": {"dog face": "twemoji"}, "grounds": [["noto", "red"]]}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Drawn pictures of small packages."""
    folder = tmp_path / "data"
    for name, package in write_packages(folder / "packages").items():
        monkeypatch.setitem(packages.PACKAGES, name, package)
    packages._check_once.cache_clear()
    (tmp_path / "split.json").write_text(json.dumps(HELD_OUT), encoding="utf-8")
    monkeypatch.setattr(split, "FILE", tmp_path / "split.json")
    split.read_split.cache_clear()
    assert main(["draw", str(folder), "--processes", "1"]) == 0
    yield folder
    split.read_split.cache_clear()


def test_a_judge_is_trained_and_true_pictures_are_evaluated(data, tmp_path, capsys):
    output = tmp_path / "results"
    assert main(["evaluate", str(data), "--output", str(output)]) == 2
    assert "python -m scripts.emoji judge" in capsys.readouterr().err
    assert main(["judge", str(data), "--samples", "64"]) == 0
    assert "held-out pairs, never seen: concept" in capsys.readouterr().out
    assert main(["evaluate", str(data), "--output", str(output), "--number", "8"]) == 0
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert results["table"] == results["true_pictures"]
    assert {name: row["pictures"] for name, row in results["table"].items()} == {
        "trained": 8,
        "pairs": 1,
        "grounds": 4,
    }
    assert results["table"]["grounds"]["ground"] == 1
    (pair,) = (each for each in results["pictures"] if each["kind"] == "pairs")
    assert pair["prompt"] == "a dog face, bold flat"
    assert results["copying_of_pairs"]["pixels"]["other_style_of_the_concept"] == 1  # circles of one color
    assert set(results["baselines_for_pairs"]) == {"another style of the concept", "a random concept in the style"}
    assert {path.name for path in output.glob("*.png")} == {
        "samples-trained.png", "samples-pairs.png", "samples-grounds.png", "neighbors.png"
    }  # fmt: skip
    assert "concept" in (output / "table.txt").read_text(encoding="utf-8")
