"""Data from the Hub, the finished LoRA to the Hub and from there into a pipeline; the Hub is a local server."""

import shutil

import pytest
from huggingface_hub import constants

from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline
from tests.hub_server import TOKEN, hub_server


@pytest.fixture
def hub(tmp_path, monkeypatch):
    place = tmp_path / "repositories"
    place.mkdir()
    with hub_server(place) as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr("lora.export.HfApi", lambda: __import__("huggingface_hub").HfApi(server.url))
        yield server


def test_a_data_set_of_the_hub_is_trained_on(hub, train, pictures, tmp_path, capsys):
    shutil.copytree(pictures, hub.folder / "someone" / "shapes")
    words = ["--cache-dir", tmp_path / "cache", "--max-steps", "1"]
    assert train("out", "--data", "hub:someone/shapes", *words) == 0
    assert {name for name in hub.fetched() if name.endswith(".png")} == {f"{index}.png" for index in range(5)}
    assert train("other", "--data", "hub:someone/nothing", *words) == 2
    assert "data 'someone/nothing' is no folder and cannot be had from the Hub: " in capsys.readouterr().err


def test_the_finished_lora_is_uploaded_and_loads_from_there(hub, train, tmp_path, tiny_model_folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert train("out", "--max-steps", "1", "--push-to-hub", "me/mine") == 0
    uploaded = {path.relative_to(hub.folder / "me/mine").as_posix() for path in (hub.folder / "me/mine").rglob("*.*")}
    assert {"README.md", "pytorch_lora_weights.safetensors", "comfyui/out.safetensors", "settings.json"} <= uploaded
    pipe = PTDiTPipeline.from_pretrained(tiny_model_folder, vae=None, text_encoder=None, tokenizer=None)
    pipe.load_lora_weights("me/mine", weight_name="pytorch_lora_weights.safetensors", adapter_name="mine")
    assert pipe.get_list_adapters() == {"transformer": ["mine"]}


def test_without_a_login_nothing_is_trained(hub, train, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert train("out", "--max-steps", "1", "--push-to-hub", "me/mine") == 2
    assert "push_to_hub='me/mine' needs a login to the Hub (hf auth login)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
