"""Emoji from packages to shards: checksums, joining, drawing, captions, and what is held out."""

import dataclasses
import json
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ptdit_diffusers.training.data.sources import DataSource
from scripts.datasets.emoji import packages
from scripts.datasets.emoji.captions import captions, main_caption
from scripts.datasets.emoji.drawing import GROUNDS, draw, on_ground, smaller, visibility
from scripts.datasets.emoji.icons import STYLES, Emoji, svg_text, with_inherited_transforms
from scripts.datasets.emoji.pictures import Picture, near_duplicates, read_index
from scripts.datasets.emoji.shards import Sample, write_folder, write_tars
from scripts.datasets.emoji.split import FILE, HIDDEN_TONES, choose, read_split
from scripts.emoji.__main__ import main
from tests.scripts.datasets.emoji_packages import write_packages

COOK = Emoji("1f9d1", "cook", ("chef",), 5, "people-body", "person-role", "1f9d1")
DOG = Emoji(
    "1f436", "dog face", ("dog", "pet", "puppy", "hound", "bark"), 0, "animals-nature", "animal-mammal", "1f436"
)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small packages."""
    for name, package in write_packages(tmp_path / "data" / "packages").items():
        monkeypatch.setitem(packages.PACKAGES, name, package)
    packages._check_once.cache_clear()
    return tmp_path / "data"


def test_the_commands_make_shards_and_a_folder_that_the_trainer_reads(data, tmp_path, capsys):
    assert main(["fetch", str(data)]) == 0  # all are there
    assert main(["draw", str(data), "--processes", "1"]) == 0
    codes = {"1f436", "2600", "1f350", "1f68c", "1f9d1-200d-1f373", "1f9d1-1f3fb-200d-1f373"}
    assert {each.emoji.code for each in read_index(data)} == codes
    assert main(["shards", str(data)]) == 0
    found = list(DataSource(str(data / "train")).pictures())
    assert {each.name.split("-")[0] for each in found} == {f"000000.tar:{style.split('-')[0]}" for style in STYLES}
    white = [each for each in found if "-white." in each.name]
    assert len(white) * 2 == len(found) and not any(each.problem for each in found)
    assert {"a dog face, soft 3D", "a cook with light skin, flat"} <= {
        text for each in white for text in each.facts.captions
    }
    red = next(each for each in found if "-red." in each.name)
    assert all("red background" in text for text in red.facts.captions)
    with tarfile.open(data / "vae" / "000000.tar") as tar:
        facts = json.load(tar.extractfile(next(name for name in tar.getnames() if name.endswith(".json"))))
    assert facts["licence"] in ("Apache-2.0", "MIT", "CC-BY-4.0")
    assert len(facts["caption"]) == len(facts["weights"]) and facts["weights"][0] == max(facts["weights"])
    assert main(["folder", str(data), "--output", str(tmp_path / "cats"), "--number", "5"]) == 0
    assert DataSource(str(tmp_path / "cats")).count() == 5
    assert main(["folder", str(data), "--output", str(tmp_path / "cats")]) == 2
    assert "exists" in capsys.readouterr().err
    (data / "vae").rename(tmp_path / "vae")
    train = (data / "train" / "000000.tar").stat()
    assert main(["shards", str(data)]) == 0  # goes on after a stop
    assert f"{data / 'train'} is there" in capsys.readouterr().out
    assert (data / "train" / "000000.tar").stat() == train
    assert (data / "vae" / "000000.tar").read_bytes() == (tmp_path / "vae" / "000000.tar").read_bytes()


@pytest.mark.parametrize("write", [write_folder, write_tars])
def test_what_a_stopped_call_wrote_is_not_kept(tmp_path, write):
    one, other = (Sample(key, b"", [(key, 1.0)], "MIT", key) for key in "ab")

    def stopped() -> Iterator[Sample]:
        yield one
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "new", stopped())
    assert not list(tmp_path.iterdir())
    (tmp_path / ".new.part").mkdir()
    (tmp_path / ".new.part" / "a.png").touch()  # of a killed call
    assert write(tmp_path / "new", [other]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["new"] and not (tmp_path / "new" / "a.png").exists()


def test_a_package_with_another_checksum_is_refused(data, capsys):
    (data / "packages" / packages.PACKAGES["noto"].file).write_bytes(b"something else")
    assert main(["fetch", str(data)]) == 2
    assert "is not @iconify-json/noto 1.2.9: its sha512" in capsys.readouterr().err


def test_what_cannot_be_downloaded_leaves_nothing_behind(tmp_path, capsys, monkeypatch):
    assert main(["fetch", str(tmp_path), "--registry", (tmp_path / "none").as_uri()]) == 1
    assert "cannot be downloaded" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert main(["fetch", str(tmp_path)]) == 1
    assert "npm is not installed" in capsys.readouterr().err
    assert not list((tmp_path / "packages").iterdir())


def test_a_registry_may_be_a_folder_of_files(data, tmp_path):
    for package in packages.PACKAGES.values():
        place = tmp_path / "registry" / package.path
        place.parent.mkdir(parents=True)
        shutil.copy(data / "packages" / package.file, place)
    assert main(["fetch", str(tmp_path / "new"), "--registry", (tmp_path / "registry").as_uri()]) == 0
    assert len(list((tmp_path / "new" / "packages").glob("*.tgz"))) == 6


def test_a_wrong_download_is_named_by_its_address_and_not_kept(data, tmp_path, capsys):
    place = tmp_path / "registry" / packages.PACKAGES["noto"].path
    place.parent.mkdir(parents=True)
    place.write_bytes(b"something else")
    assert main(["fetch", str(tmp_path / "new"), "--registry", (tmp_path / "registry").as_uri()]) == 2
    error = capsys.readouterr().err
    assert (
        f"{place.as_uri().replace('%40', '@')} is not" in error and "was not kept" in error and "remove" not in error
    )
    assert not list((tmp_path / "new" / "packages").iterdir())


def test_missing_steps_and_resvg_are_named(data, capsys, monkeypatch):
    assert main(["shards", str(data)]) == 2
    assert "python -m scripts.emoji draw" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ValueError, match=r"\.\[emoji\]"):
        draw("<svg/>", "noto")


def test_icons_are_padded_to_squares_and_gradients_inherit_their_transform():
    icons = {"icons": {"a": {"body": "<g/>", "height": 25}}, "width": 36, "height": 36}
    assert 'viewBox="0 -5.5 36 36"' in svg_text("twemoji", "a", icons)
    first = '<radialGradient id="a" gradientTransform="scale(2)"><stop/></radialGradient>'
    assert 'href="#a" gradientTransform="scale(2)"/>' in with_inherited_transforms(
        f'{first}<radialGradient id="b" href="#a"/>'
    )
    own = f'{first}<radialGradient id="b" gradientTransform="scale(3)" href="#a"/>'
    assert with_inherited_transforms(own) == own


def test_averaged_colors_count_by_their_alpha_and_grounds_show_through():
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (200, 100, 0, 255)
    assert smaller(pixels, 2).tolist() == [[[200, 100, 0, 64]]]
    assert on_ground(pixels, (10, 20, 30))[1, 1].tolist() == [10, 20, 30]
    assert visibility(np.full((4, 4, 4), 255, np.uint8), (255, 255, 255)) == 0


def test_captions_say_style_tone_and_ground_and_the_plainest_is_first():
    assert main_caption(COOK, "noto", "orange") == "a cook with dark skin, shaded, on an orange background"
    found = captions(DOG, "twemoji", "blue", np.random.default_rng(0))
    assert found[0][0].startswith("a dog face, bold flat")
    assert all("bold flat" in text and "blue background" in text for text, _ in found)
    assert any("dog face" not in text for text, _ in found)  # tags alone
    white = [text for seed in range(20) for text, _ in captions(DOG, "noto", "white", np.random.default_rng(seed))]
    assert 0.1 < np.mean(["white background" in text for text in white]) < 0.4


def test_near_duplicates_in_one_set_make_a_group_in_all():
    choice = np.random.default_rng(0)
    a, b = (choice.random((8, 8, 3)).astype(np.float32) for _ in range(2))
    groups = near_duplicates({"noto": {"x": a, "y": b, "z": a + 0.01}, "twemoji": {"x": a, "y": b, "z": b[::-1]}})
    assert groups == {"x": "x", "y": "y", "z": "x"}


def selection() -> list[Picture]:
    """Roles of three genders, and things, some of them near-duplicates."""
    found = []
    for number in range(240):
        gender, role = number % 3, number // 3
        label = ("", "man ", "woman ")[gender] + f"role{role}" if role < 28 else f"thing{number}"
        group = ("people-body", "person-role") if role < 28 else ("food-drink", "food-fruit")
        emoji = Emoji(f"{number:x}", label, (), 0, *group, f"{number:x}")
        twins = f"{number - number % 2:x}" if role >= 60 else emoji.code
        found += [Picture(style, emoji, True, twins) for style in STYLES]
    return found


def test_what_is_held_out_is_chosen_by_whole_groups_once(monkeypatch):
    pictures = selection()
    values = choose(pictures)
    assert values == choose(pictures[::-1])
    twins = {each.emoji.label: each.twins for each in pictures}
    names = [name for kind in ("unseen", "genders", "tones", "pairs") for name in values[kind]]
    assert len(names) == len(set(names)) and len(values["genders"]) == len(values["tones"]) == 12
    for kind in ("unseen", "pairs"):
        inside = {twins[name] for name in values[kind]}
        assert {name for name in twins if twins[name] in inside} == set(values[kind])
    assert len(values["grounds"]) == 8 and {ground for _, ground in values["grounds"]} <= set(GROUNDS)


def test_the_file_of_names_holds_out_what_the_card_says():
    split, values = read_split(), json.loads(FILE.read_text(encoding="utf-8"))
    assert set(split.pairs.values()) == {"noto", "fluent", "twemoji"}
    assert len(split.tones) == len(split.genders) == 12
    assert not set(values["pairs"]) & split.unseen
    label = min(split.tones)
    cook = dataclasses.replace(COOK, label=label, tone=HIDDEN_TONES[0])
    assert split.kind(Picture("noto", cook, True, "")) == "tones"
    assert not split.kind(Picture("noto", dataclasses.replace(cook, tone=1), True, ""))
    label, family = next(iter(split.pairs.items()))
    kinds = {style: split.kind(Picture(style, dataclasses.replace(DOG, label=label), True, "")) for style in STYLES}
    assert {style.split("-")[0] for style, kind in kinds.items() if kind == "pairs"} == {family}


def test_a_tar_says_which_samples_show_one_picture(tmp_path):
    shown = [Sample(f"noto-{number}", b"", [("a dog", 1.0)], "MIT", "noto") for number in range(2)]
    assert write_tars(tmp_path / "new", shown) == 2
    with tarfile.open(tmp_path / "new" / "000000.tar") as tar:
        facts = [json.load(tar.extractfile(name)) for name in tar.getnames() if name.endswith(".json")]
    assert [each["picture"] for each in facts] == ["noto", "noto"]
