"""Encoded shards: parts without locks, nothing encoded twice, damage found at first open; tars read by an index."""

import errno
import io
import json
import logging
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ptdit_diffusers.training.base_model import BaseModel
from ptdit_diffusers.training.data.buckets import bucket_sizes
from ptdit_diffusers.training.data.duplicates import average_hash, grouped, joined
from ptdit_diffusers.training.data.encode import BATCH, PictureEncoder, video
from ptdit_diffusers.training.data.media import read_frames
from ptdit_diffusers.training.data.shards import (
    BadShardError,
    Encoded,
    ShardWriter,
    held_out,
    members_by_bucket,
    merge,
    part_path,
    where,
    write_part,
)
from ptdit_diffusers.training.data.sources import DataSource
from ptdit_diffusers.training.data.tars import list_tar, tar_names

SIZES = {64: bucket_sizes(64, 16, 2.0)}


@pytest.fixture(scope="module")
def vae(tiny_model_folder):
    return BaseModel(str(tiny_model_folder)).load_vae(torch.float32, torch.device("cpu"))


def encode(vae, source, folder: Path, part=0, parts=1, **options) -> PictureEncoder:
    """Encode one part of a source, as the command does."""
    encoder = PictureEncoder(vae, ShardWriter(folder, f"{part}-", only=parts > 1), SIZES, **options)
    source = source if isinstance(source, DataSource) else DataSource(str(source))
    encoder.encode(source.pictures(part, parts))
    write_part(part_path(folder, "data", part, parts), encoder.found, encoder.skipped)
    return encoder


def version_of(vae, source, folder: Path, parts=1, **options) -> Encoded:
    for part in range(parts):
        encode(vae, source, folder, part, parts, **options)
    return Encoded(merge(folder, "data", parts, {}), 64)


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def png(seed: int, size=(64, 64)) -> bytes:
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize(size, Image.Resampling.BILINEAR).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def tars(tmp_path) -> Path:
    """Two tars with three pictures each, in the format of webdataset."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for shard in range(2):
        files = {}
        for number in range(3):
            key = f"{shard}{number}"
            facts = {"caption": ["a red star", "star"], "weights": [3, 1], "quality": 5 + number, "thing": number // 2}
            files |= {f"{key}.png": png(10 * shard + number), f"{key}.json": json.dumps(facts).encode()}
        write_tar(folder / f"{shard:03d}.tar", files)
    return folder


def test_a_folder_is_encoded_once_and_a_new_picture_alone_gets_a_new_version(vae, pictures, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for path in pictures.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    encoded = version_of(vae, data, tmp_path / "encoded", flip=True)
    assert len(encoded.index) == 5 and encoded.manifest["skipped"] == []
    assert sorted(encoded.buckets) == [(1, 48, 80), (1, 64, 64)]
    line = encoded.caption_lines(0)
    pixels = read_frames(data / line["name"], 1)[0]
    values = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
    posterior = vae.encode(values).latent_dist
    mean, std = encoded.latents(0)
    torch.testing.assert_close(mean, posterior.mean[0], atol=2e-3, rtol=2e-3)  # half precision
    torch.testing.assert_close(std, posterior.std[0], atol=2e-3, rtol=2e-3)
    flipped = vae.encode(values.flip(-1)).latent_dist
    torch.testing.assert_close(encoded.latents(0, mirrored=True)[0], flipped.mean[0], atol=2e-3, rtol=2e-3)
    (data / "new.png").write_bytes(png(99))
    again = encode(vae, data, tmp_path / "encoded", flip=True)
    assert again.encoded == 1 and len(again.found) == 6
    newer = Encoded(merge(tmp_path / "encoded", "data", 1, {}), 64)
    assert len(newer.index) == 6 and newer.version != encoded.version
    assert len(Encoded(encoded.version, 64).index) == 5  # the old version stays


def test_samples_of_one_name_of_a_group_share_one(vae, tars, tmp_path):
    apart = version_of(vae, tars, tmp_path / "apart")
    together = version_of(vae, DataSource(str(tars), group_column="thing"), tmp_path / "together")
    assert len(set(apart.index["group"].tolist())) == 6
    things = {}
    for number, group in enumerate(together.index["group"].tolist()):
        name = together.caption_lines(number)["name"]  # 000.tar:02.png
        things.setdefault(int(name.split(":")[1][1]) // 2, set()).add(group)
    assert sorted(map(len, things.values())) == [1, 1] and things[0] != things[1]
    hashes = np.arange(4, dtype=np.uint64)
    assert joined(hashes, ["", "a", "a", ""]).tolist() == [0, 1, 1, 3]
    assert joined(hashes[[0, 0, 1, 2]], ["a", "", "b", "a"]).tolist() == [0, 0, 1, 0]  # what is alike stays so, too


def test_parts_of_tars_together_are_the_whole(vae, tars, tmp_path):
    whole = version_of(vae, tars, tmp_path / "whole")
    two = version_of(vae, tars, tmp_path / "two", parts=2)
    five = version_of(vae, f"{tars}/{{000..001}}.tar", tmp_path / "five", parts=5)  # more parts than tars
    names = [{each.caption_lines(number)["name"] for number in range(6)} for each in (whole, two, five)]
    assert names[0] == names[1] == names[2] and len(names[0]) == 6
    line = whole.caption_lines(0)
    assert line["captions"] == ["a red star", "star"] and line["weights"] == [3, 1]
    assert where(whole.index, "quality >= 6").sum() == 4
    assert whole.manifest["texts"] == 12 and list(whole.all_captions())[:2] == ["a red star", "star"]
    with pytest.raises(ValueError, match="where='sharp' is no condition"):
        where(whole.index, "sharp")


def test_views_are_encoded_one_by_one_and_mirrored_ones_turn_the_other_way(vae, tmp_path, caplog):
    folder = tmp_path / "data" / "mug.views"
    folder.mkdir(parents=True)
    for number in range(8):
        (folder / f"{number}.png").write_bytes(png(number))
    (tmp_path / "data" / "mug.txt").write_text("a mug")
    encoded = version_of(vae, tmp_path / "data", tmp_path / "encoded", num_views=4, flip=True)
    assert encoded.buckets == [(13, 64, 64)] and encoded.caption_lines(0)["captions"] == ["a mug"]
    mean, mirrored = encoded.latents(0)[0], encoded.latents(0, mirrored=True)[0]
    for view, (file, other) in enumerate([(0, 0), (2, 6), (4, 4), (6, 2)]):  # every second of the eight
        one, turned = (read_frames(folder / f"{number}.png", 1)[0] for number in (file, other))
        for latent, picture, mirror in ((mean, one, False), (mirrored, turned, True)):
            expected = vae.encode(video([picture], mirror)[None]).latent_dist.mean[0, :, 0]
            torch.testing.assert_close(latent[:, view], expected, atol=2e-3, rtol=2e-3)
    for count, reason in {
        0: "holds 8 views; data.num_views says",
        3: "has 8 views, which is no multiple",
    }.items():
        encoder = encode(vae, tmp_path / "data", tmp_path / "none", num_views=count)
        assert not encoder.found and reason in encoder.skipped[0][1]


def test_views_in_a_tar_are_numbered_files_and_what_is_wrong_with_them_is_named(vae, tmp_path):
    folder = tmp_path / "data" / "mug.views"
    folder.mkdir(parents=True)
    files = {f"things/mug.{number}.png": png(number) for number in (10, *range(10), 11)}  # 10 comes after 9
    for number in range(12):
        (folder / f"{number:02d}.png").write_bytes(files[f"things/mug.{number}.png"])
    (tmp_path / "data" / "mug.txt").write_text("a mug")
    write_tar(tmp_path / "000.tar", {**files, "things/mug.txt": b"a mug"})
    encoded = version_of(vae, tmp_path / "000.tar", tmp_path / "encoded", num_views=4, flip=True)
    line = encoded.caption_lines(0)
    assert line["name"] == "000.tar:things/mug" and line["captions"] == ["a mug"]
    assert len(encoded.index) == 1 and encoded.buckets == [(13, 64, 64)]
    again = encode(vae, tmp_path / "data", tmp_path / "encoded", num_views=4, flip=True)
    assert again.encoded == 0 and len(again.found) == 1  # a folder of the same views is the same sample
    bad = {"gap.0.png": png(0), "gap.2.png": png(2), "one.1.png": png(1), "six.0.png": b"", "six.00.png": b""}
    bad |= {"film.0.png": png(0), "film.1.mp4": b"", "new.0.png": png(0), "new.1.heic": b""}
    bad |= {f"odd.{number}.png": png(number) for number in range(3)} | {"odd.txt": b"three"}
    encoder = encode(vae, write_tar(tmp_path / "001.tar", bad), tmp_path / "bad", num_views=2)
    assert not encoder.found and dict(encoder.skipped) == {
        "001.tar:gap": "has 2 views, of which the last is 2; 1 is missing (they begin at 0)",
        "001.tar:one": "has 1 views, of which the last is 1; 0 is missing (they begin at 0)",
        "001.tar:six": "has view 0 twice",
        "001.tar:film": "has a view 1 that is no picture (.mp4)",
        "001.tar:new": "has a view 1 that is of a kind that is not read (.heic); save it as PNG or JPEG",
        "001.tar:odd": "has 3 views, which is no multiple of num_views=2",
    }


def test_a_part_that_is_missing_is_named(vae, tars, tmp_path):
    encode(vae, tars, tmp_path / "encoded", 0, 2)
    with pytest.raises(ValueError, match="1 of 2 parts are not encoded yet: 1; run them"):
        merge(tmp_path / "encoded", "data", 2, {})


def test_bad_tars_and_pictures_are_named_and_counted_and_the_rest_is_encoded(vae, tars, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    whole = (tars / "000.tar").read_bytes()
    (tars / "002.tar").write_bytes(whole[:2200])  # one picture, and the next one cut off
    (tars / "003.tar").write_bytes(b"")
    small = png(51)
    header = b"IHDR" + struct.pack(">II", 60_000, 50_000) + small[24:29]  # three gigapixels
    huge = small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]
    files = {
        "a.png": png(50),
        "a.txt": "caf\u00e9".encode("latin-1"),
        "b.png": huge,
        "c.png": b"no picture",
    }
    write_tar(tars / "004.tar", files)
    encoder = encode(vae, tars, tmp_path / "encoded")
    reasons = dict(encoder.skipped)
    assert "has a caption that is not UTF-8 (a.txt, byte 0xe9 at 3)" in reasons["004.tar:a.png"]
    assert "is too large" in reasons["004.tar:b.png"] and "is not a picture" in reasons["004.tar:c.png"]
    assert "is empty" in reasons[str(tars / "003.tar")] and "ends early" in reasons[str(tars / "002.tar")]
    assert len(encoder.found) >= 6 and all(name in caplog.text for name, _ in encoder.skipped)


def test_too_many_bad_files_stop_the_encoding(vae, tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="11 of 11 files cannot be used, more than max_skips=0.001"):
        encode(vae, folder, tmp_path / "encoded", max_skips=0.001)


def test_a_full_disk_stops_the_encoding_and_is_not_taken_for_bad_pictures(vae, tmp_path, monkeypatch, caplog):
    (tmp_path / "pictures").mkdir()
    for number in range(BATCH):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(tmp_path / "pictures" / f"{number}.png")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "add", full)
    with pytest.raises(OSError, match="No space left"):
        encode(vae, tmp_path / "pictures", tmp_path / "encoded")
    assert "skipped" not in caplog.text


@pytest.mark.parametrize("damage", ["missing", "short", "changed"])
def test_a_damaged_shard_is_found_at_its_first_open(vae, tars, tmp_path, damage):
    encoded = version_of(vae, tars, tmp_path / "encoded")
    path = encoded.shard_path(0)
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[-3] ^= 1
        path.write_bytes(content if damage == "changed" else content[:-5])
    with pytest.raises(BadShardError, match=path.name):
        encoded.latents(0)
    if damage == "short":  # the next encoding makes it again
        assert encode(vae, tars, tmp_path / "encoded").encoded == 6


def test_near_duplicates_share_a_group_and_are_held_out_together():
    pictures = [Image.open(io.BytesIO(png(seed))) for seed in range(10)]
    smaller = [picture.resize((48, 48)) for picture in pictures[:3]]
    hashes = np.array([average_hash(picture) for picture in pictures + smaller], np.uint64)
    groups = grouped(hashes)
    assert groups[10:].tolist() == groups[:3].tolist() and len(set(groups.tolist())) == 10
    red, blue = Image.new("RGB", (64, 64), "white"), Image.new("RGB", (64, 64), "white")
    red.paste("red", (0, 0, 32, 64))
    blue.paste("blue", (0, 0, 32, 64))
    assert len(set(grouped(np.array([average_hash(red), average_hash(blue)], np.uint64)).tolist())) == 2
    for seed in range(5):
        mask = held_out(groups, 0.3, seed)
        assert 1 <= mask.sum() <= 4
        assert all(len(set(mask[groups == group].tolist())) == 1 for group in groups)
    assert not held_out(groups, 0, 0).any() and not held_out(np.zeros(3, np.uint64), 0.5, 0).any()


def test_what_is_held_out_stays_where_pictures_are_added_in_front():
    hashes = np.random.default_rng(0).integers(0, 2**63, (40, 3), dtype=np.uint64)
    hidden = held_out(grouped(hashes), 8, 3)
    more = held_out(grouped(np.concatenate([hashes[:1] ^ np.uint64(1), hashes[:1] + np.uint64(99), hashes])), 8, 3)[2:]
    assert hidden.sum() == 8 and (hidden & more).sum() >= 6


def test_a_group_larger_than_what_is_to_be_held_out_is_said(caplog):
    groups = np.array([5] * 7 + list(range(3)), np.uint64)
    sizes = {int(held_out(groups, 3, seed).sum()) for seed in range(20)}
    assert sizes == {1, 2, 3, 7} and "7 samples are held out instead of 3: they are one group" in caplog.text


def test_members_are_sorted_as_they_are_stored():
    from ptdit_diffusers.training.data.shards import INDEX

    index = np.zeros(6, INDEX)
    index["shard"], index["row"], index["bucket"] = [1, 0, 1, 0, 2, 0], [1, 2, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1]
    found = members_by_bucket(index, np.array([1, 1, 1, 1, 1, 1], bool))
    assert found[0].tolist() == [3, 1, 2, 0] and found[1].tolist() == [5, 4]


def test_names_of_tars(tmp_path):
    (tmp_path / "000.tar").touch()
    assert [path.name for path in tar_names(f"{tmp_path}/{{000..002}}.tar")] == ["000.tar", "001.tar", "002.tar"]
    with pytest.raises(ValueError, match="names no tar"):
        tar_names(str(tmp_path / "none.tar"))
    assert list_tar(tmp_path / "001.tar").problem.startswith("is missing")
