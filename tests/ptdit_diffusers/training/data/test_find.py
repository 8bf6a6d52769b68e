"""Files of every kind, captions from every place, buckets; and what is left out is named."""

import json

import numpy as np
import pytest
from PIL import Image

from ptdit_diffusers.training.data.buckets import bucket_sizes, nearest_size
from ptdit_diffusers.training.data.find import find_items, table, with_trigger
from ptdit_diffusers.training.data.media import UnreadableError, picture_to_rgb, read_frames

SIZES = bucket_sizes(64, 16, 2.0)


def find(folder, trigger="", frames=1):
    return find_items(str(folder), "", trigger, frames, SIZES)


def test_captions_buckets_and_files_without_a_caption(pictures):
    found = find(pictures)
    assert [item.caption for item in found.items] == ["a red star", "a red star", "", "a red star", "a red star"]
    assert [(item.height, item.width) for item in found.items] == [(64, 64)] * 3 + [(48, 80)] * 2
    assert found.without_caption == 1
    text = table(found, 1, 1)
    assert "1 files have no caption" in text and "48" in text


def test_buckets_are_legal_have_about_the_same_area_and_come_in_both_orientations():
    sizes = bucket_sizes(512, 128, 2.0)
    assert (512, 512) in sizes and all(h % 128 == 0 and w % 128 == 0 for h, w in sizes)
    assert all((w, h) in sizes for h, w in sizes)
    assert all(0.75 < h * w / 512**2 < 1.25 and max(h, w) <= 2 * min(h, w) for h, w in sizes)
    assert bucket_sizes(512, 128, 1.0) == [(512, 512)]
    assert nearest_size(300, 200, sizes)[0] > nearest_size(300, 200, sizes)[1]
    with pytest.raises(ValueError, match="resolution=500 is not a multiple of bucket_step=128; nearest: 384 or 512"):
        bucket_sizes(500, 128, 2.0)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_table_gives_captions_and_a_missing_file_is_named(pictures, tmp_path, kind):
    (tmp_path / "a.png").write_bytes((pictures / "0.png").read_bytes())
    rows = [("a.png", "a ring"), ("gone.png", "a heart")]
    if kind == "csv":
        text = "file_name,text\n" + "\n".join(",".join(row) for row in rows)
    else:
        text = "\n".join(json.dumps({"file_name": name, "caption": caption}) for name, caption in rows)
    (tmp_path / f"metadata.{kind}").write_text(text, encoding="utf-8")
    found = find(tmp_path)
    assert [item.caption for item in found.items] == ["a ring"]
    assert found.skipped[0][1] == "does not exist"


def test_every_skipped_file_is_named_with_its_reason_and_nothing_left_is_an_error(pictures, tmp_path):
    (tmp_path / "noise.png").write_bytes(b"not a picture")
    (tmp_path / "cut.png").write_bytes((pictures / "1.png").read_bytes()[:200])
    (tmp_path / "latin.png").write_bytes((pictures / "0.png").read_bytes())
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError) as error:
        find(tmp_path)
    message = str(error.value)
    assert "noise.png is not a picture" in message and "cut.png is damaged" in message
    assert "latin.txt, byte 0xe9 at 3" in message
    with pytest.raises(ValueError, match="nothing to train on: it holds no pictures or videos"):
        find(tmp_path / "..", trigger="") if False else find(tmp_path.parent / _empty(tmp_path))


def test_it_says_how_far_it_is_while_files_are_looked_through(pictures, monkeypatch, caplog):
    monkeypatch.setattr("ptdit_diffusers.training.data.find.PROGRESS_SECONDS", 0)
    caplog.set_level("INFO")
    find(pictures)
    assert "looked through 3 of 5 files" in caplog.text


def _empty(tmp_path):
    (tmp_path.parent / "nothing").mkdir(exist_ok=True)
    return "nothing"


def test_a_short_video_is_refused_and_a_long_one_is_cut(tmp_path):
    frames = [Image.new("RGB", (32, 32), (index * 40, 0, 0)) for index in range(6)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    assert len(read_frames(tmp_path / "clip.gif", 5)) == 5
    with pytest.raises(UnreadableError, match="has 6 frames, num_frames=9 were asked for"):
        read_frames(tmp_path / "clip.gif", 9)


def test_the_trigger_word_stands_in_front_or_where_it_is_asked_for():
    assert with_trigger("a cat", "zork") == "zork, a cat"
    assert with_trigger("a [trigger] cat", "zork") == "a zork cat"
    assert with_trigger("", "zork") == "zork" and with_trigger("a cat", "") == "a cat"


def first_pixel(image: Image.Image) -> list[int]:
    return np.asarray(picture_to_rgb(image)).reshape(-1, 3)[0].tolist()


def test_transparency_becomes_white():
    assert first_pixel(Image.new("RGBA", (4, 4), (0, 0, 0, 0))) == [255, 255, 255]
    assert first_pixel(Image.new("LA", (4, 4), (0, 128))) == [127, 127, 127]


def test_palettes_cmyk_and_sixteen_bit_grays_keep_their_colors():
    assert first_pixel(Image.new("RGB", (4, 4), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE)) == [
        10,
        200,
        30,
    ]
    assert first_pixel(Image.new("CMYK", (4, 4), (0, 255, 255, 0))) == [255, 0, 0]
    assert first_pixel(Image.fromarray(np.full((4, 4), 65535, dtype=np.uint16))) == [255, 255, 255]
    assert first_pixel(Image.fromarray(np.full((4, 4), 32896, dtype=np.uint16))) == [128, 128, 128]


def test_the_orientation_of_a_photograph_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "photo.jpg", exif=exif)
    assert read_frames(tmp_path / "photo.jpg", 1)[0].size == (20, 40)
