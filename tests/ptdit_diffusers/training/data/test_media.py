"""Clips by content, phone videos the right way up, and a name for everything that cannot be read."""

import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ptdit_diffusers.training.data.buckets import bucket_sizes
from ptdit_diffusers.training.data.find import find_items, table
from ptdit_diffusers.training.data.media import UnreadableError, is_clip, read_frames

SIZES = bucket_sizes(64, 16, 2.0)


def write_clip(path: Path, frames: int = 5) -> Path:
    first, *more = [Image.new("RGB", (32, 32), (index * 40, 0, 0)) for index in range(frames)]
    first.save(path, save_all=True, append_images=more, duration=100)
    return path


@pytest.mark.parametrize("ending", ["webp", "png", "apng", "gif"])
def test_a_file_that_moves_is_a_clip_whatever_its_ending(tmp_path, ending):
    write_clip(tmp_path / f"clip.{ending}")
    write_clip(tmp_path / f"still.{ending}", 1)
    assert is_clip(tmp_path / f"clip.{ending}") and not is_clip(tmp_path / f"still.{ending}")
    found = find_items(str(tmp_path), "", "", 5, SIZES)
    assert {item.path.stem: item.frames for item in found.items} == {"clip": 5, "still": 1}
    found = find_items(str(tmp_path), "", "", 1, SIZES)
    assert "1 clips: only their first frame is trained on" in table(found, 1, 1)


def test_pages_of_a_document_are_no_frames(tmp_path):
    assert not is_clip(write_clip(tmp_path / "pages.tiff"))


def test_a_phone_video_stands_upright(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height = 64, 32
        pixels = np.zeros((32, 64, 3), np.uint8)
        pixels[:, :32] = 255  # white on the left
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    data = bytearray((tmp_path / "clip.mp4").read_bytes())
    place = data.index(b"tkhd") + 4 + 40  # the matrix of the track; 16.16 fixed point
    numbers = [0, 1 << 16, 0, (-1 << 16) & 0xFFFFFFFF, 0, 0]  # show it turned clockwise by 90 degrees
    data[place : place + 24] = b"".join(number.to_bytes(4, "big") for number in numbers)
    (tmp_path / "clip.mp4").write_bytes(data)
    frame = read_frames(tmp_path / "clip.mp4", 1)[0]
    assert frame.size == (32, 64)
    assert frame.getpixel((16, 10))[0] > 200 and frame.getpixel((16, 54))[0] < 50  # left is above now


def damaged_gif(path: Path) -> None:
    write_clip(path.with_suffix(".gif"))
    path.with_suffix(".gif").rename(path)
    path.write_bytes(path.read_bytes()[:-40])


def large_text(path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * (2 << 20), zip=True)
    Image.new("RGB", (32, 32)).save(path, pnginfo=info)


def bomb(path: Path) -> None:
    Image.new("RGB", (32, 32)).save(path, format="PNG")
    data = bytearray(path.read_bytes())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name, make, reason",
    [
        ("bad.gif", damaged_gif, "is damaged"),
        ("bad.png", large_text, "holds more than a mebibyte of text; save it without its metadata"),
        ("bad.png", bomb, r"is too large \(Image size \(3600000000 pixels\)"),
        ("bad.jpg", lambda path: path.write_bytes(b"%!PS-Adobe EPSF-3.0"), "is not a picture"),
        ("bad.png", lambda path: path.write_bytes(b""), "is not a picture"),
    ],
    ids=["damaged GIF", "text chunk", "decompression bomb", "PostScript", "empty"],
)
def test_a_bad_file_is_named_and_the_others_are_read(tmp_path, name, make, reason):
    Image.new("RGB", (32, 32)).save(tmp_path / "good.png")
    make(tmp_path / name)
    with pytest.raises(UnreadableError, match=reason):
        is_clip(tmp_path / name)
        read_frames(tmp_path / name, 5)
    found = find_items(str(tmp_path), "", "", 5, SIZES)
    assert [item.path.name for item in found.items] == ["good.png"]
    assert [Path(path).name for path, _ in found.skipped] == [name]


def test_a_file_that_may_not_be_opened_is_not_called_damaged(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(UnreadableError, match=r"cannot be opened \(Permission denied\)"):
        read_frames(tmp_path / "a.png", 1)
