"""The goldens from files to pictures: written as the released files are, converted by the command, loaded and run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import T5Config, T5EncoderModel

from ptdit_diffusers import PTDiTPipeline
from ptdit_diffusers.cli import main
from tests.ptdit_diffusers.pipelines.test_pipeline_ptdit import GOLDEN, LATENT_LIMIT, PROMPTS, letter_tokenizer

T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
BUCKETS = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "pipeline_e2e.safetensors")


@pytest.fixture(scope="module")
def converted(golden, tmp_path_factory) -> Path:
    """The model of the end-to-end golden, from a nested .pt, a training checkpoint of the VAE and a T5 folder."""
    place = tmp_path_factory.mktemp("official")
    transformer = load_file(GOLDEN / "dit_weights.safetensors")
    torch.save({"model": {f"module.{name}": value for name, value in transformer.items()}}, place / "t2i.pt")
    vae = load_file(GOLDEN / "causalvae.safetensors")
    vae = {f"module.{name[8:]}": value.float() for name, value in vae.items() if name.startswith("weights.")}
    worse = {name: torch.zeros_like(value) for name, value in vae.items()}
    torch.save({"state_dict": {"gen_model": worse}, "ema_state_dict": vae}, place / "checkpoint.ckpt")
    text_encoder = T5EncoderModel(T5Config(**T5, **BUCKETS, feed_forward_proj="gated-gelu"))
    weights = {name.removeprefix("t5."): value for name, value in golden.items() if name.startswith("t5.")}
    text_encoder.load_state_dict({**weights, "encoder.embed_tokens.weight": weights["shared.weight"]})
    text_encoder.save_pretrained(place / "t5" / "text_encoder")
    letter_tokenizer().save_pretrained(place / "t5" / "tokenizer")
    sources = ["--transformer", place / "t2i.pt", "--vae", place / "checkpoint.ckpt", "--text-encoder", place / "t5"]
    options = ["--num-heads", "4", "--window-size", "1", "4", "4", "--output", place / "model"]
    assert main(["convert", *map(str, sources), *map(str, options)]) == 0
    return place / "model"


@pytest.mark.parametrize("output_type", ["latent", "pil"])
def test_a_converted_model_repeats_the_reference_end_to_end(converted, golden, output_type):
    pipe = PTDiTPipeline.from_pretrained(converted)
    pipe.set_progress_bar_config(disable=True)
    windows = {"window_size": (1, 4, 4), "proxy_ratio": (1, 4, 4)}  # not the 64 windows of the released model
    made = pipe(
        PROMPTS, num_inference_steps=6, latents=golden["noise"], max_sequence_length=24, output_type=output_type,
        height=golden["noise"].shape[-2] * 8, width=golden["noise"].shape[-1] * 8, **windows,
    ).images  # fmt: skip
    if output_type == "latent":
        assert (made - golden["final_latents"]).abs().max() <= LATENT_LIMIT
    else:
        pixels = np.stack([np.asarray(picture, dtype=int) for picture in made])
        assert np.abs(pixels - golden["returned_uint8"][:, :, 0].numpy().astype(int)).max() <= 1
