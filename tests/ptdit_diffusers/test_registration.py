"""After importing our pipeline diffusers' own loaders find our classes, in every spelling and form."""

import json

import diffusers
import pytest
import torch
from diffusers import AutoModel, AutoPipelineForText2Image, DiffusionPipeline

import ptdit_diffusers
from ptdit_diffusers import PTDiTPipeline, PTDiTTransformer3DModel
from ptdit_diffusers.registration import register


def test_diffusers_loads_the_folder_as_one_of_its_own(tiny_model_folder):
    for loader in (DiffusionPipeline, AutoPipelineForText2Image, PTDiTPipeline):
        pipe = loader.from_pretrained(str(tiny_model_folder))
        assert type(pipe) is PTDiTPipeline
        assert type(pipe.transformer) is PTDiTTransformer3DModel
    assert type(AutoModel.from_pretrained(str(tiny_model_folder), subfolder="transformer")) is PTDiTTransformer3DModel


def test_the_index_may_name_our_package_as_the_library(tiny_model_folder, tmp_path):
    index = json.loads((tiny_model_folder / "model_index.json").read_text(encoding="utf-8"))
    assert index["transformer"] == ["diffusers", "PTDiTTransformer3DModel"]
    for part in tiny_model_folder.iterdir():
        if part.is_dir():
            (tmp_path / part.name).symlink_to(part)
    index["transformer"] = ["ptdit_diffusers", "PTDiTTransformer3DModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    assert type(DiffusionPipeline.from_pretrained(str(tmp_path)).transformer) is PTDiTTransformer3DModel


def test_registering_twice_changes_nothing():
    before = diffusers.PTDiTPipeline
    register(PTDiTPipeline, ptdit_diffusers.PTDiTPipelineOutput)
    assert diffusers.PTDiTPipeline is before is diffusers.pipelines.PTDiTPipeline


@torch.no_grad()
def test_first_block_cache_and_layer_skipping_know_our_block(tiny_model_folder):
    from diffusers import FirstBlockCacheConfig

    pipe = PTDiTPipeline.from_pretrained(str(tiny_model_folder))
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 3, "output_type": "latent"}
    plain = pipe("a red star", generator=torch.manual_seed(0), **arguments).images
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    cached = pipe("a red star", generator=torch.manual_seed(0), **arguments).images
    assert torch.allclose(plain, cached, atol=1e-5)


def test_a_raw_training_checkpoint_of_the_vae_is_refused_instead_of_read_without_its_averages(tmp_path):
    vae = ptdit_diffusers.AutoencoderKLOpenSoraPlan(
        hidden_size=8, hidden_size_mult=(1, 1, 1, 1), num_res_blocks=1, norm_num_groups=4
    )
    vae.save_pretrained(tmp_path / "config")
    weights = vae.state_dict()
    load = ptdit_diffusers.AutoencoderKLOpenSoraPlan.from_single_file
    torch.save({"state_dict": {"gen_model": weights}, "ema_state_dict": weights}, tmp_path / "raw.ckpt")
    with pytest.raises(ValueError, match="ptdit convert"):
        load(str(tmp_path / "raw.ckpt"), config=str(tmp_path / "config"))
    torch.save({"state_dict": weights}, tmp_path / "flat.ckpt")
    again = load(str(tmp_path / "flat.ckpt"), config=str(tmp_path / "config"))
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="PTDiTPipelin"):
        _ = ptdit_diffusers.PTDiTPipelin
