"""Tests of core/class_configuration.py: files of DiT and DiffiT are recognized, with what they say about sampling."""

import json

import pytest
import torch

from ptdit_diffusers.core.checkpoint_names import PACKED_CONFIG
from ptdit_diffusers.core.class_configuration import class_folder_config, loaded_class_config
from ptdit_diffusers.core.configuration import pack_config
from tests.ptdit_diffusers import diffit_goldens, dit_goldens

CASE = "dit_p2"


def given(case: str = CASE) -> dict:
    """What a file must say where the width is no known one."""
    return {"num_attention_heads": dit_goldens.config(case)["num_attention_heads"]}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("form", ["official", "diffusers"])
def test_a_dit_is_recognized_under_both_kinds_of_names(prefix, form):
    weights = dit_goldens.weights(CASE) if form == "official" else dit_goldens.diffusers_weights(CASE)
    if form == "diffusers":
        weights = {name: value for name, value in weights.items() if name != "pos_embed"}
    state = {prefix + name: value for name, value in weights.items()} | {"vae.decoder.weight": torch.zeros(1)}
    carried = given() | {"sample_size": dit_goldens.config(CASE)["sample_size"]}
    found = loaded_class_config(state, prefix, {"config": json.dumps(carried)})
    assert found["system"] == "DiT" and found["prediction_type"] == "epsilon" and found["latent_scale"] == 0.18215
    assert {name: found[name] for name in dit_goldens.config(CASE)} == dit_goldens.config(CASE)


def test_a_diffit_is_not_taken_for_a_dit():
    weights = diffit_goldens.weights("diffit_p2")
    found = loaded_class_config(weights)
    assert found["system"] == "DiffiT" and found["window_size"] is None and "block_type" not in found


@pytest.mark.parametrize(
    "names",
    [
        ("transformer_blocks.0.proxy_attn1.to_q.weight", "adaln_single.linear.weight"),  # PT-DiT
        ("x_embedder.proj.weight", "blocks.0.attn.qkv.weight", "y_embedder.y_embedding", "t_block.1.weight"),  # PixArt
        ("x_embedder.proj.weight", "mlp_t5.0.weight", "blocks.0.attn1.Wqkv.weight"),  # HunyuanDiT
        ("x_embedder.proj.weight", "joint_blocks.0.x_block.attn.qkv.weight", "y_embedder.mlp.0.weight"),  # SD 3
    ],
)
def test_other_models_are_left_to_the_host(names):
    assert loaded_class_config({name: torch.zeros(8, 8) for name in names}) is None


def test_what_a_file_says_about_sampling_counts():
    says = given() | {"prediction_type": "flow_prediction", "shift": 3.0, "latent_scale": 0.5}
    packed = dit_goldens.weights(CASE) | {PACKED_CONFIG: pack_config(says | {"id2label": {"0": "star"}})}
    found = loaded_class_config(packed)
    assert (found["prediction_type"], found["shift"], found["latent_scale"]) == ("flow_prediction", 3.0, 0.5)
    assert found["id2label"] == {"0": "star"}


@pytest.mark.parametrize(
    "says, message",
    [
        ({"prediction_type": "v"}, "prediction_type='v' must be one of epsilon, flow_prediction"),
        ({"latent_scale": 0}, "latent_scale=0 must be a number above 0"),
        ({"id2label": ["star"]}, "id2label must give a name for each class number"),
        ({}, "weights do not show the number of heads"),
    ],
)
def test_illegal_values_are_refused(says, message):
    heads = given() if says else {}
    with pytest.raises(ValueError, match=message):
        loaded_class_config(dit_goldens.weights(CASE), metadata={"config": json.dumps(heads | says)})


def test_a_folder_adds_scheduler_vae_and_names(tmp_path):
    def write(name: str, content: dict) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")

    write("transformer/config.json", {"num_layers": 3, "_class_name": "DiT2DModel"})
    index = {
        "_class_name": "ClassToImagePipeline",
        "id2label": {"0": "star"},
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    write("model_index.json", index)
    assert class_folder_config(tmp_path) == {"num_layers": 3, "id2label": {"0": "star"}}
    write("vae/config.json", {"scaling_factor": 0.43})
    write("model_index.json", index | {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]})
    write("scheduler/scheduler_config.json", {"shift": 2.0})
    flow = {"prediction_type": "flow_prediction", "shift": 2.0, "latent_scale": 0.43}
    assert class_folder_config(tmp_path) == {"num_layers": 3, "id2label": {"0": "star"}, **flow}
