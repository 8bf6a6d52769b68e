"""Frames of a clip: at a rate, and from a place on."""

import pytest
from PIL import Image

from ptdit_diffusers.training.data import media
from ptdit_diffusers.training.data.find import find_items
from ptdit_diffusers.training.data.media import UnreadableError, count_frames, read_alpha, read_frames


@pytest.fixture
def clip(tmp_path):
    """Twelve frames of 50 ms, frame i is gray of brightness 20 i; the first two stand for 100 ms."""
    frames = [Image.new("RGBA", (64, 64), (20 * i, 20 * i, 20 * i, 255 - i)) for i in range(12)]
    path = tmp_path / "clip.png"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[100, 100] + [50] * 10, loop=0)
    return path


def brightness(frames) -> list[int]:
    return [frame.convert("RGBA").getpixel((0, 0))[0] // 20 for frame in frames]


def test_frames_are_taken_at_a_rate_from_a_place_on(clip):
    assert len(read_frames(clip, 12)) == count_frames(clip) == 12
    assert [frame.getpixel((0, 0)) for frame in read_alpha(clip, 3, 1)] == [254, 253, 252]
    assert count_frames(clip, 10) == 7 and count_frames(clip, 5) == 4
    fast, slow = read_alpha(clip, 7, fps=10), read_alpha(clip, 3, 1, 5)  # 0.0, 0.1, 0.2 s; 0.2, 0.4, 0.6 s
    assert [255 - frame.getpixel((0, 0)) for frame in fast] == [0, 1, 2, 4, 6, 8, 10]
    assert [255 - frame.getpixel((0, 0)) for frame in slow] == [2, 6, 10]
    with pytest.raises(UnreadableError, match="has 5 frames, num_frames=9 were asked for"):
        read_frames(clip, 9, 7)
    with pytest.raises(UnreadableError, match="has fewer than 20 frames a second .fps."):
        read_frames(clip, 2, fps=20)


def test_a_file_gives_several_pieces_and_pictures_stay_pictures(clip):
    Image.new("RGB", (64, 64)).save(clip.with_name("still.jpg"))
    options = (str(clip.parent), "", "", 5, [(64, 64)])
    found = find_items(*options, all_pieces=True).items
    assert [(item.name, item.begin, item.frames) for item in found] == [
        ("clip.png", 0, 5), ("clip.png from frame 5", 5, 5), ("still.jpg", 0, 1)
    ]  # fmt: skip
    assert found[0].hashes == found[1].hashes  # pieces of a file are held out together
    assert len(find_items(*options).items) == 2
    slow = find_items(*options, fps=10.0, all_pieces=True).items
    assert [(item.name, item.fps) for item in slow] == [("clip.png", 10.0), ("still.jpg", 0.0)]


@pytest.mark.parametrize("start", [-0.04, 2.5])
def test_a_clip_that_does_not_begin_at_second_0_gives_the_same_frames(clip, start, monkeypatch):
    opened = media._opened
    expected = brightness(read_frames(clip, 7, fps=10))
    monkeypatch.setattr(media, "_opened", lambda *each: ((start + time, frame) for time, frame in opened(*each)))
    assert brightness(read_frames(clip, 7, fps=10)) == expected and count_frames(clip, 5) == 4
