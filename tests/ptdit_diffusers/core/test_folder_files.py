"""Model folders of strangers: only known names, no links out of the folder, nothing of the user's is deleted."""

import json

import pytest

from ptdit_diffusers.core.documents import parse_json
from ptdit_diffusers.core.folder_files import first_foreign, is_model_file, model_files, move, new_folder, read_index

INDEX = {"_class_name": "PTDiTPipeline", "vae": ["diffusers", "X"], "scheduler": [None, None], "id2label": {"0": "a"}}


def test_json_that_is_nested_deeply_is_a_value_error():
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 200000)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"../victim": ["diffusers", "X"]}, "names the component '../victim'"),
        ({"/etc": ["diffusers", "X"]}, "names the component '/etc'"),
        ({"vae": []}, "not a library and a class"),
        ({"vae": [1, "X"]}, "not a library and a class"),
        ({"_class_name": ["pipeline", "PTDiTPipeline"]}, "no pipeline class"),
    ],
)
def test_an_index_names_only_components_that_there_are(tmp_path, change, message):
    (tmp_path / "model_index.json").write_text(json.dumps(INDEX))
    assert read_index(tmp_path) == INDEX
    (tmp_path / "model_index.json").write_text(json.dumps(INDEX | change))
    with pytest.raises(ValueError, match=message):
        read_index(tmp_path)


@pytest.mark.parametrize(
    "name, ours",
    [
        ("model_index.json", True),
        ("vae/config.json", True),
        ("transformer/diffusion_pytorch_model-00001-of-00002.safetensors", True),
        ("text_encoder/model.safetensors.index.json", True),
        ("tokenizer/spiece.model", True),
        ("transformer-q4_k.gguf", True),
        ("tokenizer/notes.txt", False),
        (".git/config.json", False),
        ("vae/../config.json", False),
        ("vae/sub/config.json", False),
        ("train.py", False),
    ],
)
def test_a_model_consists_of_known_files(name, ours):
    assert is_model_file(name) == ours


def test_a_link_out_of_the_model_is_refused_and_the_links_of_the_hub_cache_are_not(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1234"
    (snapshot / "vae").mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "x").write_text("{}")
    (tmp_path / "token").write_text("SECRET")
    config = snapshot / "vae" / "config.json"
    config.symlink_to(tmp_path / "models--a--b" / "blobs" / "x")
    assert model_files(snapshot) == ["vae/config.json"]
    config.unlink()
    config.symlink_to(tmp_path / "token")
    with pytest.raises(ValueError, match="link to a file outside"):
        model_files(snapshot)


def test_a_folder_is_replaced_at_the_end_and_put_back_after_an_error(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("x")
    assert first_foreign(output, "new".__eq__) == "old" and first_foreign(output, "old".__eq__) is None
    with pytest.raises(RuntimeError), new_folder(output) as folder:
        (folder / "new").write_text("x")
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]
    with new_folder(output) as folder:
        (folder / "new").write_text("x")
        assert (output / "old").is_file()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


@pytest.mark.parametrize("refusals", [0, 1, 4, 5])
def test_a_renaming_that_is_refused_for_a_moment_is_tried_again(tmp_path, monkeypatch, refusals):
    """Windows refuses to rename what a virus scanner looks at."""
    (tmp_path / "new").write_text("new")
    (tmp_path / "old").write_text("old")
    replace, tries, waited = type(tmp_path).replace, [], []

    def scanned(path, target):
        tries.append(path)
        if len(tries) <= refusals:
            raise PermissionError(13, "Access is denied")
        return replace(path, target)

    monkeypatch.setattr(type(tmp_path), "replace", scanned)
    monkeypatch.setattr("time.sleep", waited.append)
    if refusals == 5:
        with pytest.raises(PermissionError):
            move(tmp_path / "new", tmp_path / "old")
    else:
        move(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old").read_text() == ("old" if refusals == 5 else "new")
    assert sum(waited) < 2
