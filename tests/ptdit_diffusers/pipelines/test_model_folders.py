"""A model folder whose parts do not fit their weights or each other is refused before anything is loaded."""

import json
import shutil
import time
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


@pytest.mark.parametrize(
    ("part", "key"), [("transformer", "num_layers"), ("text_encoder", "num_layers"), ("vae", "num_res_blocks")]
)
def test_more_layers_than_the_weights_have_are_refused_before_they_are_built(folder, part, key):
    change(folder / part / "config.json", **{key: 10**8})
    begin = time.process_time()
    with pytest.raises(ValueError, match=f"{key}=1e.08, but its weights have [12] layers"):
        check_folder(folder)
    assert time.process_time() - begin < 1


@pytest.mark.parametrize("damage", ["cut", "long", "deep", "list", "shape"])
def test_a_header_that_is_none_is_refused(folder, damage):
    (path,) = (folder / "vae").glob("*.safetensors")
    headers = {"deep": b"[" * 200000, "list": b"[1]", "shape": b'{"a": {"dtype": "F32"}}', "cut": b"{", "long": b"{}"}
    size = 2**40 if damage == "long" else 2 * len(headers[damage]) if damage == "cut" else len(headers[damage])
    path.write_bytes(size.to_bytes(8, "little") + headers[damage])
    with pytest.raises(ValueError, match="is no safetensors file, or only a part of one"):
        check_folder(folder)


@pytest.mark.parametrize(("key", "value"), [("dtype", ""), ("dtype", 1e30), ("dense_act_fn", [])])
def test_a_configuration_that_builds_nothing_is_refused(folder, key, value):
    change(folder / "text_encoder" / "config.json", **{key: value})
    with pytest.raises(ValueError, match="text_encoder/config.json: there is no T5EncoderModel of this configuration"):
        check_folder(folder)
