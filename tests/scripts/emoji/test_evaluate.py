"""Judge and evaluation from the command line, on small packages; true pictures are judged."""

import json
from pathlib import Path

import numpy as np
import pytest

from scripts.datasets.emoji import packages, split
from scripts.datasets.emoji.icons import Emoji
from scripts.datasets.emoji.pictures import Picture
from scripts.emoji import fifth
from scripts.emoji.__main__ import main
from scripts.emoji.evaluate import Request, table, truths, twin_groups
from scripts.verifiers.emoji.judge import Reading
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
    assert results["style_by_colors_and_edges"] == results["style_by_colors_and_edges_of_true_pictures"]
    assert results["frechet_distance_of_halves"]["made"] == results["frechet_distance_of_halves"]["true"]
    assert {path.name for path in output.glob("*.png")} == {
        "samples-trained.png", "samples-pairs.png", "samples-grounds.png", "neighbors.png"
    }  # fmt: skip
    assert "concept" in (output / "table.txt").read_text(encoding="utf-8")


def test_near_duplicates_count_half_whether_they_were_asked_for_or_not():
    codes = ["a", "b", "c"]
    emoji = {code: Emoji(code, code, (), 0, "objects", "", code) for code in codes}
    pictures = [Picture("noto", emoji[code], True, twins) for code, twins in (("a", "a"), ("b", "a"), ("c", "c"))]
    groups = twin_groups(pictures, codes)
    assert groups.tolist() == [0, 0, 2]
    white = np.full((1, 128, 128, 3), 255, np.uint8)
    for asked, read, credit in ((0, 1, 0.5), (1, 0, 0.5), (0, 2, 0), (1, 1, 1)):
        reading = Reading(np.full((1, 5), read), *np.zeros((4, 1), int))
        rows = table([Request("pairs", pictures[asked], "white")], white, reading, codes, groups)
        assert rows["pairs"]["concept"] == credit


def test_a_fifth_style_is_written_for_a_lora_and_judged_apart_from_the_four(data, tmp_path, monkeypatch):
    """With true pictures in place of a model's: with the LoRA in the fifth style, without it in the wrong one."""
    monkeypatch.setattr(fifth, "LEARNED", 1)
    assert main(["fifth", str(data), "--output", str(tmp_path / "ink")]) == 0
    (line,) = map(json.loads, (tmp_path / "ink" / "metadata.jsonl").read_text(encoding="utf-8").splitlines())
    assert line["text"].endswith(", black ink") and line["licence"] == "MIT" and "dog" not in line["text"]
    assert main(["judge", str(data), "--samples", "64"]) == 0

    def pictures(found, args, name):
        assert name == ("pictures-with" if args.lora else "pictures-without")
        true = [fifth.drawn(data, [each.picture])[0] for each in found if each.kind == "fifth"]
        return np.concatenate([true if args.lora else [255 - true[0]] * len(true), truths(data, found[len(true) :])])

    monkeypatch.setattr(fifth, "make_pictures", pictures)
    options = ["--model", "none", "--lora", "some", "--output", str(tmp_path / "out"), "--number", "2"]
    (tmp_path / "out").mkdir()
    assert main(["evaluate-fifth", str(data), *options]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["learned"] and results["with"]["pictures"] == 2
    assert results["with"] == results["true"] and results["with"]["to_true"] == 0 < results["without"]["to_true"]
    assert results["four_styles_with"] == results["four_styles_without"] == results["four_styles_true"]
    assert (tmp_path / "out" / "samples.png").is_file()
