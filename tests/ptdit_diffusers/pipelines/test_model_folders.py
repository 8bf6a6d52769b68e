"""A model folder whose parts do not fit their weights or each other is refused before anything is loaded."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ptdit_diffusers.pipelines.model_folders import check_folder


@pytest.fixture
def folder(tiny_model_folder, tmp_path) -> Path:
    return shutil.copytree(tiny_model_folder, tmp_path / "model")


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_folder_as_saved_is_taken(folder):
    check_folder(folder)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_missing_weight_is_named(folder, part):
    (path,) = (folder / part).glob("*.safetensors")
    weights = load_file(path)
    name = sorted(weights)[0]
    del weights[name]
    save_file(weights, path)
    with pytest.raises(ValueError, match=f"1 missing: {name}"):
        check_folder(folder)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("transformer/config.json", "num_layers", "two"),
        ("vae/config.json", "hidden_size", 8.5),
        ("text_encoder/config.json", "d_model", None),
        ("scheduler/scheduler_config.json", "base_image_seq_len", 0),
    ],
)
def test_a_value_of_a_wrong_type_names_file_and_key(folder, file, key, value):
    change(folder / file, **{key: value})
    with pytest.raises(ValueError, match=rf"{file}: {key} is"):
        check_folder(folder)
