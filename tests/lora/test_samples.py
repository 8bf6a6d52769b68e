"""A resumed run goes on with the data and base weights that it began with, or says what changed."""

import shutil
from dataclasses import replace

import pytest
from PIL import Image

from lora.samples import Sample, changes, from_json, read_samples, to_json, write_samples

ONE = Sample("a.png", "2-vae-aa-1x64x64", "", "text-t5-11", (1, 64, 64), False)
TWO = Sample("b.png", "2-vae-bb-1x64x64", "", "text-t5-22", (1, 64, 64), False)


@pytest.mark.parametrize(
    "now, words",
    [
        ([ONE, TWO], []),
        ([replace(ONE, latents="2-vae-cc-1x64x64"), TWO], ["other pictures in a.png"]),
        ([ONE, replace(TWO, text="text-t5-33")], ["other captions of b.png"]),
        ([replace(ONE, latents="2-vae-aa-1x32x64", bucket=(1, 32, 64)), TWO], ["other sizes of a.png"]),
        ([ONE], ["missing b.png"]),
        ([ONE, TWO, replace(TWO, name="c.png")], ["new c.png"]),
        ([ONE, replace(ONE, text="text-t5-33"), TWO], ["new a.png"]),
        ([replace(one, latents=one.latents.replace("vae", "new")) for one in (ONE, TWO)], ["the VAE"]),
        ([replace(one, text=one.text.replace("t5", "new")) for one in (ONE, TWO)], ["the text encoder"]),
        ([TWO, ONE], ["the order of the files"]),
        ([replace(one, mirrored=one.latents + "-mirrored") for one in (ONE, TWO)],
         ["mirrored now or before, but not both: a.png, b.png"]),
        ([ONE, replace(TWO, held_out=True)], ["held out now or before, but not both: b.png"]),
        ([replace(ONE, latents=ONE.latents + "-crop0x500"), TWO], ["other crops, frames or masks of a.png"]),
        ([ONE, replace(TWO, data_set=1)], ["in another data set: b.png"]),
    ],
)  # fmt: skip
def test_every_change_of_the_data_is_named(now, words):
    assert changes([ONE, TWO], now) == words


def test_samples_are_written_and_read_and_a_damaged_file_is_named(tmp_path):
    write_samples(tmp_path / "run" / "samples.json", [ONE, TWO], {"trigger": "x"})
    assert read_samples(tmp_path / "run" / "samples.json") == ([ONE, TWO], {"trigger": "x"})
    assert from_json(to_json([ONE])) == [ONE]
    (tmp_path / "samples.json").write_text('{"samples": [{"name": 1}]}')
    with pytest.raises(ValueError, match=r"samples\.json is damaged \(.*\); remove it"):
        read_samples(tmp_path / "samples.json")


@pytest.fixture
def begun(train, pictures, tmp_path):
    """A run of two steps of four on pictures that may be changed; call it again to resume."""
    data = tmp_path / "data"
    shutil.copytree(pictures, data)

    def resume(*flags):
        words = ["--data", data, "--cache-dir", tmp_path / "cache", "--max-steps", "4"]
        return train("out", *words, *flags)

    assert resume("--stop-after", "2") == 0
    return data, resume


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: (data / "0.txt").write_text("a green ring"), "other captions of 0.png"),
        (lambda data: Image.new("RGB", (64, 64), "red").save(data / "1.png"), "other pictures in 1.png"),
        (lambda data: (data / "3.png").unlink(), "missing 3.png"),
    ],
    ids=["caption", "picture", "file"],
)
def test_a_resume_names_changed_data_and_refuses(begun, capsys, change, message):
    data, resume = begun
    change(data)
    assert resume("--resume") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"lora: the data changed since this run began: {message}. ")
    assert "go on all the same with --accept-changes" in error


def test_changed_data_are_taken_when_told_and_are_then_those_of_the_run(begun, caplog):
    data, resume = begun
    (data / "0.txt").write_text("a green ring")
    assert resume("--resume", "--accept-changes", "--stop-after", "1") == 0
    assert "going on with changed data: other captions of 0.png" in caplog.text
    assert resume("--resume") == 0


def test_a_resume_without_data_goes_on_with_the_samples_of_the_run(begun, train, tmp_path, pictures):
    data, resume = begun
    Image.new("RGB", (64, 64), "red").save(data / "1.png")
    cache = ["--cache-dir", tmp_path / "cache"]
    assert train("other", "--data", data, *cache, "--max-steps", "1") == 0  # the cache's list is this one's now
    before = read_samples(tmp_path / "out" / "samples.json")[0]
    assert train("out", *cache, "--max-steps", "4", "--resume") == 0
    assert read_samples(tmp_path / "out" / "samples.json")[0] == before


def test_a_resume_on_other_base_weights_is_refused_and_on_the_same_elsewhere_it_is_not(
    train, tiny_model_folder, tmp_path, capsys
):
    base, moved = tmp_path / "base", tmp_path / "moved"
    shutil.copytree(tiny_model_folder, base)
    assert train("out", "--base", base, "--stop-after", "2") == 0
    base.rename(moved)
    assert train("out", "--base", moved, "--stop-after", "1", "--resume") == 0
    (weights,) = (moved / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\x00\x3f")
    capsys.readouterr()
    assert train("out", "--base", moved, "--resume") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "trained on other base weights than those of" in error and "--accept-changes" in error
    assert train("out", "--base", moved, "--resume", "--accept-changes") == 0
