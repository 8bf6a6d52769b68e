"""The command verifies files, models and itself, for pictures, clips and views alike."""

import json
from pathlib import Path

import pytest
from PIL import Image

from scripts.datasets.shapes import Group, Placement, Scene, render
from scripts.verify import main

DOCS = Path(__file__).resolve().parents[2] / "docs"


def star_above_ring() -> Scene:
    star = Group("star", "green", "", (Placement(0.5, 0.25, 0.155, 0.0),))
    ring = Group("ring", "purple", "", (Placement(0.5, 0.7, 0.155, 0.0),))
    return Scene((star, ring), ((0, "above", 1),), "white", "plain")


def test_the_command_tells_right_pictures_from_wrong_ones(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = str(tmp_path / "picture.png")
    Image.fromarray(render(star_above_ring())).save(file)
    assert main(["--picture", file, "--prompt", "a green star above a purple donut"]) == 0
    assert capsys.readouterr().out == "right\n"
    assert main(["--picture", file, "--prompt", "a green star below a purple ring"]) == 1
    assert capsys.readouterr().out == "wrong: green star is not below purple ring\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--picture", "picture.png"],
        ["--picture", "missing.png", "--prompt", "a red circle"],
        ["--picture", "missing.png", "--prompt", "a sunset"],
        ["--check-truth", "0"],
        ["--check-truth", "1", "--length", "5"],
        ["views", "--check-truth", "0"],
        ["clips", "--picture", "picture.png", "--prompt", "a red circle moves left"],
        ["figures", "--picture", "picture.png", "--prompt", "a red circle"],
        ["figures", "--check-truth", "1", "--length", "5"],
    ],
)
def test_the_command_refuses_bad_input_with_exit_code_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        main(arguments)
    assert refusal.value.code == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["pictures", "--check-truth", "8"],
        ["figures", "--check-truth", "8"],
        ["figures", "--check-truth", "8", "--size", "32"],
        ["clips", "--check-truth", "1", "--size", "64", "--length", "5"],
        ["views", "--check-truth", "1", "--size", "64", "--length", "4"],
    ],
    ids=" ".join,
)
def test_the_command_checks_the_verifiers_on_true_samples(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(arguments) == 0
    assert "passed" in (out := capsys.readouterr().out) and "right colours" in out


def evaluate(world: str, model: Path, output: Path, *options: str) -> dict:
    arguments = [world, "--model", str(model), "--steps", "1", "--device", "cpu", "--output", str(output), *options]
    assert main(arguments) == 0
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


def assert_keys_of_the_published_results(results: dict, model: str, samples: str) -> None:
    published = json.loads((DOCS / model / "results.json").read_text(encoding="utf-8"))
    assert set(published) <= set(results)
    for key in ("settings", "versions", "table", "means"):
        assert set(published.get(key, ())) <= set(results.get(key, ()))
    first, made = published[samples][0], results[samples][0]
    assert set(first) <= set(made) and set(first.get("verdict", ())) <= set(made["verdict"])
    assert published["held_out"] == results["held_out"]


def test_the_command_verifies_a_model_of_pictures_and_writes_results(tiny_model_folder: Path, tmp_path: Path) -> None:
    results = evaluate("pictures", tiny_model_folder, tmp_path, "--prompts", "3", "--batch", "2")
    assert_keys_of_the_published_results(results, "shapes-128", "pictures")
    assert len(results["pictures"]) == 3 and results["table"]["right colours"]["asked"] >= 6
    assert results["settings"]["steps"] == 1 and set(results["pictures"][0]["found"]) == {
        "figures",
        "background",
        "pattern",
    }
    assert len(list((tmp_path / "pictures").iterdir())) == 3 and (tmp_path / "sheet_01.png").exists()


@pytest.mark.slow
def test_the_command_verifies_a_model_of_clips_and_writes_results(tiny_model_folder: Path, tmp_path: Path) -> None:
    results = evaluate("clips", tiny_model_folder, tmp_path, "--prompts", "2", "--length", "5", "--size", "64")
    assert_keys_of_the_published_results(results, "clips-128", "series")
    assert len(results["series"]) == 2 and results["table"]["asked motions"]["asked"] >= 2
    assert results["means"]["flicker, bytes, true pictures"] < 0.1 and results["held_out"]
    assert Image.open(tmp_path / "strips" / "0001.png").size == (5 * 64, 64) and (tmp_path / "sheet_01.png").exists()
