"""`ptdit inspect`: what it says of pictures and tars, and what it refuses."""

import io
import tarfile

import pytest
from PIL import Image

from ptdit_diffusers.cli import main


def test_it_counts_names_advises_and_measures(drawn, tiny_model_folder, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(4):
        (data / f"{number}.png").write_bytes((drawn / f"{number:04d}.png").read_bytes())
        (data / f"{number}.txt").write_text("a zebra" if number else "a red star", encoding="utf-8")
    (data / "copy.png").write_bytes((data / "1.png").read_bytes())
    (data / "broken.png").write_bytes(b"no picture")
    assert main(["inspect", str(data), "--start", str(tiny_model_folder)]) == 0
    seen = capsys.readouterr().out
    assert "5 pictures and clips (5 .png), 1 left out" in seen and "left out broken.png: is not a picture" in seen
    assert "smallest 40x128, middle 128x128" in seen and "bucket 64x64: 5" in seen
    assert "1 have no caption and get data.default_caption: copy.png" in seen
    assert "2 are near-duplicates, in 1 groups, for example 1.png, copy.png" in seen
    assert "the text encoder does not know 1 words: 'zebra' (3); text: {grow: true} adds them" in seen
    assert "vae: {train: decoder} mends a part of it" in seen  # random weights reconstruct nothing
    assert "train: all trains" in seen and "train: lora trains" in seen and "encoding takes about" in seen


def test_it_looks_into_some_of_the_tars(tiny_model_folder, tmp_path, capsys):
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    for number in range(4):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for name, content in (("a.png", file.getvalue()), ("a.txt", b"a red star")):
                info = tarfile.TarInfo(f"{number}{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    assert main(["inspect", f"{tmp_path}/{{0..3}}.tar", "--sample", "2", "--start", str(tiny_model_folder)]) == 0
    assert "2 pictures and clips (2 .png), 0 left out, of 2 tars" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["/nowhere"], "is neither a folder nor a file"),
        ([], "give DATA or --config"),
        (["{empty}"], "has nothing to train on: no pictures"),
        (["{drawn}", "--resolution", "100"], "is not a multiple of 64"),
    ],
)
def test_what_cannot_be_looked_at_is_refused_in_one_line(words, message, drawn, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    words = [word.format(empty=tmp_path / "empty", drawn=drawn) for word in words]
    assert main(["inspect", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
