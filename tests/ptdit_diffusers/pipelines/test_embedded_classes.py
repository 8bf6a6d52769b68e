"""The embedded models of classes: they make what is asked, are small, and share the VAE of shapes-128."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from ptdit_diffusers.cli import main
from ptdit_diffusers.core.class_configuration import loaded_class_config
from ptdit_diffusers.core.embedded import embedded_model_names, embedded_model_path
from ptdit_diffusers.core.folder_files import CLASS_PIPELINES, read_index
from scripts.datasets.shapes import CLASSES
from scripts.evaluation.generate import generate, load_pipeline, to_bytes
from scripts.verifiers.registry import VERIFIERS, Task

pytestmark = pytest.mark.slow
NAMES = [
    name for name in embedded_model_names() if read_index(embedded_model_path(name))["_class_name"] in CLASS_PIPELINES
]
MOST_BYTES = {"dit-128": 15e6, "diffit-128": 12e6, "diffit-32": 12e6}  # of the network


@pytest.mark.parametrize("name", NAMES)
def test_the_network_is_small_and_knows_its_classes_and_the_vae_is_that_of_shapes_128(name):
    folder = embedded_model_path(name)
    index = read_index(folder)
    network = folder / CLASS_PIPELINES[index["_class_name"]]
    assert (network / "diffusion_pytorch_model.safetensors").stat().st_size <= MOST_BYTES[name]
    assert [index["id2label"][str(number)] for number in range(len(CLASSES))] == list(CLASSES)
    for file in (folder / "vae").glob("*"):
        assert file.read_bytes() == (embedded_model_path("shapes-128") / "vae" / file.name).read_bytes()


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("-128")])
def test_the_file_of_the_weights_alone_is_known_to_comfyui(name):
    with safe_open(embedded_model_path(name) / "transformer" / "diffusion_pytorch_model.safetensors", "pt") as file:
        weights, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    config = loaded_class_config(weights, "", metadata)
    assert config["num_attention_heads"] == 3 and config["prediction_type"] == "epsilon"
    assert config["id2label"]["3"] == "red star" and config["latent_scale"] != 1


@pytest.mark.parametrize("name", NAMES)
def test_pictures_show_the_classes_asked_for(name):
    verifier, asked = VERIFIERS["figures"], ["red star", "blue heart", "green ring", "white crescent", "black cross"]
    pictures = generate(load_pipeline(name), asked, seed=7, num_inference_steps=30)
    right = 0
    for number, (prompt, picture) in enumerate(zip(asked, pictures, strict=True)):
        request = verifier.request(Task(number, prompt, prompt, None))
        right += verifier.compare(request, verifier.read(to_bytes(picture[None]))).right
    assert right >= len(asked) - 1


@pytest.mark.parametrize("name", NAMES)
def test_the_command_makes_a_class_and_names_the_nearest_of_one_that_is_not_there(name, tmp_path, capsys):
    from PIL import Image

    file = tmp_path / "star.png"
    command = ["generate", "--model", name, "--steps", "3", "--output", str(file), "--class"]
    assert main([*command, "red star"]) == 0
    side = json.loads(Path(embedded_model_path(name), network_of(name), "config.json").read_text())["sample_size"]
    assert Image.open(file).size == (side * (1 if network_of(name) == "unet" else 8),) * 2
    assert np.asarray(Image.open(file)).std() > 5
    file.unlink()
    assert main([*command, "red stone"]) == 2
    assert "red star" in capsys.readouterr().err and not file.exists()


def network_of(name: str) -> str:
    return CLASS_PIPELINES[read_index(embedded_model_path(name))["_class_name"]]
