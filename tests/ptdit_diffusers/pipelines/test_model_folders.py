"""A model folder whose parts do not fit their weights or each other is refused before anything is loaded."""

import json
import shutil
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ptdit_diffusers import PTDiTPipeline
from ptdit_diffusers.pipelines.model_folders import check_folder


@pytest.fixture
def folder(tiny_model_folder, tmp_path) -> Path:
    return shutil.copytree(tiny_model_folder, tmp_path / "model")


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def lose_a_weight(path: Path) -> str:
    weights = load_file(path)
    name = sorted(weights)[0]
    del weights[name]
    save_file(weights, path)
    return name


def test_a_folder_as_saved_is_taken(folder):
    check_folder(folder)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_missing_weight_is_named(folder, part):
    (path,) = (folder / part).glob("*.safetensors")
    name = lose_a_weight(path)
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


@pytest.mark.parametrize("shards", ["10GB", "20KB"])
def test_a_variant_is_checked_as_the_plain_files_are(folder, shards):
    pipe = PTDiTPipeline.from_pretrained(folder)
    pipe.save_pretrained(folder, variant="half", max_shard_size=shards)
    for path in folder.glob("*/*.safetensors"):
        if "half" not in path.name:
            path.unlink()
    assert PTDiTPipeline.from_pretrained(folder, variant="half").transformer is not None
    name = lose_a_weight(sorted((folder / "transformer").glob("*.safetensors"))[-1])
    with pytest.raises(ValueError, match=f"1 missing: {name}"):
        PTDiTPipeline.from_pretrained(folder, variant="half")


def test_a_model_of_the_hub_is_checked_as_a_folder_is(folder, tmp_path, monkeypatch):
    cache = tmp_path / "hub" / "models--someone--tiny"
    snapshot = cache / "snapshots" / ("0" * 40)
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache.parent))
    found = PTDiTPipeline.from_pretrained("someone/tiny", cache_dir=str(cache.parent))
    assert found.transformer.config.num_layers == 2
    (path,) = (snapshot / "vae").glob("*.safetensors")
    name = lose_a_weight(path)
    with pytest.raises(ValueError, match=f"1 missing: {name}"):
        PTDiTPipeline.from_pretrained("someone/tiny", cache_dir=str(cache.parent))
