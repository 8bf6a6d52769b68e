"""Files of `ptdit generate`: clips, views, sheets and folders of a tiny model; what is in them and what is refused."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ptdit_diffusers.cli import main
from ptdit_diffusers.commands import outputs
from ptdit_diffusers.commands.outputs import output_files, save
from ptdit_diffusers.commands.terminal import UserError

PROMPT = "two small green stars above a purple ring"
needs_mp4 = pytest.mark.skipif(
    not all(outputs.find_spec(module) for module in outputs.MP4_PACKAGES), reason="imageio and imageio-ffmpeg missing"
)


@pytest.fixture
def generate(tiny_model_folder, tmp_path, monkeypatch) -> Callable[..., int]:
    """Runs `ptdit generate` in tmp_path with the tiny model in one step at 32 x 32 pixels."""
    monkeypatch.chdir(tmp_path)
    fixed = ["--model", str(tiny_model_folder), "--steps", "1", "--device", "cpu", "--height", "32", "--width", "32"]
    return lambda *words: main(["generate", PROMPT, *fixed, *words])


def metadata_of(path: Path) -> dict[str, str]:
    """The settings in a file, numbers as text."""
    with Image.open(path) as image:
        if path.suffix == ".png":
            return dict(image.text)
        text = image.info["comment"] if path.suffix == ".gif" else image.getexif()[outputs.IMAGE_DESCRIPTION]
    return {name: str(value) for name, value in json.loads(text).items()}


def mp4_comment(path: Path) -> str:
    """The comment of an MP4 file, as ffmpeg shows it."""
    import subprocess

    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-f", "ffmetadata", "-"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.sub(r"\\(.)", r"\1", re.search(r"^comment=(.*)$", text, re.MULTILINE).group(1))


# --- clips -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".gif", ".webp"])
def test_a_video_becomes_an_animation_with_its_settings(generate, tmp_path, capsys, ending):
    assert generate("--num-frames", "5", "--fps", "4", "--seed", "3", "--output", f"a{ending}") == 0
    with Image.open(tmp_path / f"a{ending}") as clip:
        clip.load()
        assert (clip.size, clip.n_frames, clip.info["loop"], clip.info["duration"]) == ((32, 32), 5, 0, 250)
    metadata = metadata_of(tmp_path / f"a{ending}")
    assert metadata["prompt"] == PROMPT and metadata["num_frames"] == "5" and "num_views" not in metadata
    assert (metadata["fps"], metadata["seed"], metadata["height"], metadata["dtype"]) == ("4", "3", "32", "fp32")
    assert os.listdir(tmp_path) == [f"a{ending}"]
    streams = capsys.readouterr()
    assert f"saved a{ending}: 5 frames of 32x32 at 4 fps, seed 3" in streams.out
    assert "decoding" in streams.err and "trained on single images" in streams.err


@needs_mp4
def test_a_video_becomes_an_mp4_with_its_settings(generate, tmp_path):
    import imageio

    assert generate("--num-frames", "5", "--output", "a.mp4", "--num-images", "2") == 0
    assert sorted(os.listdir(tmp_path)) == ["a-0.mp4", "a-1.mp4"]
    reader = imageio.get_reader(tmp_path / "a-1.mp4")
    assert reader.count_frames() == 5 and reader.get_meta_data()["fps"] == 8
    metadata = json.loads(mp4_comment(tmp_path / "a-1.mp4"))
    assert (metadata["prompt"], metadata["seed"], metadata["fps"], metadata["num_frames"]) == (PROMPT, 1, 8, 5)


def test_a_name_without_an_ending_is_a_folder_of_pictures_that_each_carry_the_settings(generate, tmp_path):
    (tmp_path / "clip").mkdir()  # an empty folder is as good as none
    assert generate("--num-frames", "5", "--output", "clip") == 0
    assert sorted(os.listdir(tmp_path / "clip")) == [f"00{index}.png" for index in range(5)]
    metadata = metadata_of(tmp_path / "clip" / "003.png")
    assert (metadata["prompt"], metadata["frame"], metadata["num_frames"]) == (
        PROMPT,
        "3",
        "5",
    ) and "fps" not in metadata
    assert os.listdir(tmp_path) == ["clip"]


def test_without_output_a_video_is_a_webp_and_a_clip_of_one_frame_is_a_picture(generate, tmp_path):
    assert generate("--num-frames", "5") == 0 and generate("--num-frames", "1") == 0
    assert sorted(os.listdir(tmp_path)) == ["ptdit.png", "ptdit.webp"]
    assert "num_frames" not in metadata_of(tmp_path / "ptdit.png")


def test_several_clips_come_from_several_seeds_and_each_can_be_made_alone(generate, tmp_path):
    assert generate("--num-frames", "5", "--num-images", "2", "--output", "a") == 0
    assert generate("--num-frames", "5", "--seed", "1", "--output", "alone") == 0
    one, other = (np.asarray(Image.open(tmp_path / name / "004.png"), dtype=int) for name in ("a-1", "alone"))
    assert np.abs(one - other).max() <= 1


# --- views -----------------------------------------------------------------------------------------------------------


def test_views_become_a_sheet(generate, tmp_path, capsys):
    assert generate("--num-views", "5", "--output", "sheet.png") == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (96, 64)
        assert sheet.getpixel((95, 63)) == (255, 255, 255)
    metadata = metadata_of(tmp_path / "sheet.png")
    assert (
        (metadata["num_views"], metadata["width"]) == ("5", "32")
        and "fps" not in metadata
        and "num_frames" not in metadata
    )
    assert "saved sheet.png: 5 views of 32x32, seed 0" in capsys.readouterr().out


def test_views_become_a_turntable_or_pictures_that_name_their_azimuth(generate, tmp_path):
    assert generate("--num-views", "4", "--output", "turn.webp", "--fps", "10") == 0
    with Image.open(tmp_path / "turn.webp") as clip:
        assert (clip.n_frames, clip.info["loop"]) == (4, 0)
    assert generate("--num-views", "4", "--output", "views") == 0
    azimuths = [metadata_of(tmp_path / "views" / f"00{index}.png")["azimuth"] for index in range(4)]
    assert [float(azimuth) for azimuth in azimuths] == [0, 90, 180, 270]


# --- bad input -------------------------------------------------------------------------------------------------------

BAD_INPUT = {
    "frames that are not 4n + 1": (("--num-frames", "16"), "nearest: 13 or 17"),
    "no frames": (("--num-frames", "0"), "nearest: 1"),
    "one view": (("--num-views", "1"), "nearest: 2"),
    "frames and views": (("--num-frames", "5", "--num-views", "4"), "not allowed with"),
    "a video as a picture": (("--num-frames", "5", "--output", "a.png"), "end it in .mp4, .gif or .webp"),
    "a video of an unknown kind": (("--num-frames", "5", "--output", "a.mp3"), "nearest: .mp4"),
    "a picture as a video": (("--output", "a.mp4"), "does not end in .png"),
    "views as a JPEG": (("--num-views", "4", "--output", "a.jpg"), ".png for a contact sheet"),
    "no pictures a second": (("--num-frames", "5", "--fps", "0"), "nearest: 1"),
    "too many pictures a second": (("--num-frames", "5", "--fps", "100"), "nearest: 60"),
    "a speed of a picture": (("--fps", "8"), "--fps 8 has no effect on --output ptdit.png"),
    "a speed of a sheet": (("--num-views", "4", "--fps", "8"), "has no effect"),
    "a folder in a folder that is missing": (("--num-frames", "5", "--output", "no/clip"), "there is no folder no"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_before_a_model_is_loaded(case, generate, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ptdit_diffusers.commands.generate.prepare", None)  # would be called next
    words, message = BAD_INPUT[case]
    assert generate(*words) == 2
    streams = capsys.readouterr()
    assert message in streams.err and streams.err.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_a_missing_package_is_named_with_the_command_that_installs_it(generate, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(outputs, "find_spec", lambda name: None)
    assert generate("--num-frames", "5", "--output", "a.mp4") == 2
    assert "python -m pip install imageio imageio-ffmpeg" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_a_folder_that_holds_something_is_never_replaced(generate, tmp_path, capsys, overwrite):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "mine.txt").write_text("mine")
    assert generate("--num-frames", "5", "--output", "clip", *overwrite) == 2
    assert "is a folder that is not empty" in capsys.readouterr().err
    assert os.listdir(tmp_path / "clip") == ["mine.txt"]


@pytest.mark.parametrize("name, expected", [("a.webp", "--overwrite"), ("clip", "is not a folder")])
def test_a_file_that_exists_is_kept(generate, tmp_path, capsys, name, expected):
    (tmp_path / name).write_bytes(b"mine")
    assert generate("--num-frames", "5", "--output", name) == 2
    assert expected in capsys.readouterr().err
    assert (tmp_path / name).read_bytes() == b"mine"


# --- small parts -----------------------------------------------------------------------------------------------------


def test_several_clips_get_numbered_names():
    assert [*output_files(Path("x/y.webp"), 2)] == [Path("x/y-0.webp"), Path("x/y-1.webp")]
    assert [*output_files(Path("x/y"), 2)] == [Path("x/y-0"), Path("x/y-1")]


@pytest.mark.parametrize("name", ["a.png", "a.gif", "a.webp", "a", pytest.param("a.mp4", marks=needs_mp4)])
def test_a_file_that_cannot_be_finished_leaves_nothing(name, tmp_path):
    frames = [Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")]
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").touch()
    with pytest.raises(UserError, match="is a folder"):
        save(frames, tmp_path / name, {"prompt": PROMPT}, overwrite=True, fps=8)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["a.gif", "a.webp", pytest.param("a.mp4", marks=needs_mp4)])
def test_a_long_prompt_in_any_script_comes_back_from_the_file(name, tmp_path):
    prompt = "红色 \"quoted\" 'single' = ; # \\ rød " * 40
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue", "green")]
    save(frames, tmp_path / name, {"prompt": prompt}, overwrite=False, fps=8)
    found = json.loads(mp4_comment(tmp_path / name)) if name.endswith("mp4") else metadata_of(tmp_path / name)
    assert found["prompt"] == prompt
