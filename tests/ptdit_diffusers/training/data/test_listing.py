"""Which files of a folder are data: wherever it lies, whatever lies beside them; what is left out is named."""

import os
import sys

import pytest

from ptdit_diffusers.training.data.listing import list_data


@pytest.fixture
def folder(tmp_path):
    return filled(tmp_path / "data")


def filled(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or ("a.png",):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def read(listing):
    return [entry.path.name for entry in listing.entries if not entry.problem]


def problems(listing, folder):
    return {str(entry.path.relative_to(folder)): entry.problem for entry in listing.entries if entry.problem}


def test_only_names_inside_the_data_are_hidden_never_the_folders_above(tmp_path, monkeypatch):
    data = filled(tmp_path / ".cache" / "hub" / "pictures", "a.png", ".b.png", ".git/c.png", "d.txt")
    listing = list_data(str(data))
    assert read(listing) == ["a.png"]
    assert problems(listing, data).keys() == {".b.png", ".git"}
    (data / "inner").mkdir()
    monkeypatch.chdir(data / "inner")
    assert read(list_data("..")) == read(list_data(os.path.join("..", "inner", ".."))) == ["a.png"]


def test_files_of_other_kinds_are_named_and_counted(folder):
    filled(folder, "b.HEIC", "c.avif", "d.ts", "e.jfif", "f.m4v", "g.npz", "h.npz", "README.md", "i.txt", "a.TXT")
    listing = list_data(str(folder))
    assert read(listing) == ["a.png", "e.jfif", "f.m4v"]
    assert problems(listing, folder) == {
        "b.HEIC": "is of a kind that is not read (.heic); save it as PNG or JPEG",
        "c.avif": "is of a kind that is not read (.avif); save it as PNG or JPEG",
        "d.ts": "is of a kind that is not read (.ts); save it as MP4",
    }
    assert listing.others == {".npz": 2} and [path.name for path in listing.lonely] == ["i.txt"]
    assert listing.entries[0].caption == "x"  # from a.TXT


def test_pictures_that_the_table_does_not_name_are_named(folder):
    filled(folder, "forgotten.png", "deep/b.png", "deep/c.png", "a.txt")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "one"}\n{"file_name": "deep\\\\b.png"}\n')
    listing = list_data(str(folder))
    assert [(entry.path.name, entry.caption) for entry in listing.entries if not entry.problem] == [
        ("a.png", "one"), ("b.png", "")
    ]  # fmt: skip
    assert problems(listing, folder) == dict.fromkeys(
        ["forgotten.png", os.path.join("deep", "c.png")], "is not in metadata.jsonl"
    )


def test_names_that_differ_in_case_only_are_told_apart_and_the_nearest_is_named(folder):
    filled(folder, "b.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "one"}\n{"file_name": "B.png"}\n')
    if (folder / "A.png").exists():
        pytest.skip("this file system does not tell them apart")
    assert problems(list_data(str(folder)), folder)["B.png"] == "does not exist; nearest: 'b.png'"
    filled(folder, "A.png")
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "one"}\n{"file_name": "A.png", "text": "two"}'
    )
    listing = list_data(str(folder))
    assert [(each.path.name, each.caption) for each in listing.entries[:2]] == [("a.png", "one"), ("A.png", "two")]


def test_a_table_below_the_folder_counts_for_its_own_folder_and_only_the_split_train_is_read(folder):
    filled(folder, "train/b.png", "train/c.png", "test/d.png", "more/e.png")
    (folder / "train" / "metadata.csv").write_text("file_name,text\nb.png,two\n")
    (folder / "a.txt").write_text("one")
    listing = list_data(str(folder))
    found = {entry.path.name: entry.caption for entry in listing.entries if not entry.problem}
    assert found == {"a.png": "one", "b.png": "two", "e.png": ""}
    assert problems(listing, folder) == {
        "test": "is another split than train; give it as data if it is meant",
        os.path.join("train", "c.png"): f"is not in {os.path.join('train', 'metadata.csv')}",
    }


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege")
def test_linked_folders_are_followed_once_and_only_when_they_may_be(folder, tmp_path):
    elsewhere = filled(tmp_path / "elsewhere", "z.png")
    (folder / "more").symlink_to(elsewhere)
    (folder / "again").symlink_to(folder)
    (folder / "gone.png").symlink_to(folder / "nothing")
    listing = list_data(str(folder))
    assert read(listing) == ["a.png"]
    assert problems(listing, folder) == {
        "again": "is a link to a folder that is read where it lies",
        "gone.png": "is not an ordinary file",
        "more": "is a link to a folder that lies outside of the data folder; --outside-files takes it",
    }
    assert read(list_data(str(folder), outside_files=True)) == ["a.png", "z.png"]


def test_a_folder_that_cannot_be_opened_is_named_and_the_rest_is_read(folder, monkeypatch):
    filled(folder, "closed/b.png")
    scandir = os.scandir

    def scan(path):
        if os.path.basename(path) == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    listing = list_data(str(folder))
    assert read(listing) == ["a.png"]
    assert problems(listing, folder) == {"closed": "cannot be opened (Permission denied)"}


def test_what_a_training_wrote_into_the_data_is_no_data(folder):
    filled(folder, "run/sheet.png", "old/run.json", "old/log.jsonl", "old/sheet.png", "cache/latents-1.safetensors")
    filled(folder, "cache/prior/0.png", "lora/pytorch_lora_weights.safetensors", "lora/loss.png")
    listing = list_data(str(folder), own=[folder / "run"])
    assert read(listing) == ["a.png"]
    assert sorted(path.name for path in listing.own) == ["cache", "lora", "old", "run"]


@pytest.mark.parametrize("caption, problem", [
    ("caf\u00e9".encode("latin-1"), "has a caption that is not UTF-8 (a.txt, byte 0xe9 at 3)"),
    ("a red star".encode("utf-16-le"), "has a caption with zero bytes (a.txt)"),
    (b"x" * 90_000, "has a caption of more than 20000 characters"),
    (b"x" * 20_001, "has a caption of 20001 characters; at most 20000 are read"),
])  # fmt: skip
def test_a_caption_that_cannot_be_read_is_named(folder, caption, problem):
    (folder / "a.txt").write_bytes(caption)
    assert problems(list_data(str(folder)), folder) == {"a.png": problem}
