"""The goldens of DiT: tiny models with weights of the official code, their inputs and what they must give."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ptdit_diffusers.models.transformer_dit import DiT2DModel

FOLDER = Path(__file__).resolve().parents[1] / "golden" / "dit"
# Max abs difference of outputs. The reference's rounding is 1e-5; its exp() of the frequencies depends on the CPU and
# moves outputs by up to 5e-5 more.
LIMIT = 1e-4


@cache
def load(case: str) -> dict[str, Tensor]:
    """Tensors of a case, without the weights."""
    return {key: value for key, value in load_file(FOLDER / f"{case}.safetensors").items() if "weights." not in key}


def weights(case: str) -> dict[str, Tensor]:
    """Weights of a case under official names, in float32."""
    tensors = load_file(FOLDER / f"{case}.safetensors")
    return {key.removeprefix("weights."): value.float() for key, value in tensors.items() if "weights." in key}


def config(case: str, folder: Path = FOLDER) -> dict[str, Any]:
    """Configuration of a case, as arguments of `DiT2DModel`."""
    with safe_open(folder / f"{case}.safetensors", "pt") as file:
        given = json.loads(file.metadata()["config"])
    return {
        "num_attention_heads": given["num_heads"],
        "attention_head_dim": given["hidden_size"] // given["num_heads"],
        "num_layers": given["depth"],
        "patch_size": given["patch_size"],
        "in_channels": given["in_channels"],
        "out_channels": given["in_channels"] * (2 if given["learn_sigma"] else 1),
        "sample_size": given["input_size"],
        "num_classes": given["num_classes"],
    }


def model(case: str) -> DiT2DModel:
    """The model of a case with the golden weights, in eval mode."""
    transformer = DiT2DModel(**config(case))
    transformer.load_state_dict(weights(case))
    return transformer.eval()


def diffusers_weights(case: str) -> dict[str, Tensor]:
    """Weights of a case under the names of diffusers' class, which repeats its embeddings in every block."""
    official = weights(case)
    official.pop("pos_embed")
    renamed: dict[str, Tensor] = {}
    for name, value in official.items():
        layer, _, kind = name.rpartition(".")
        if layer.startswith("blocks."):
            _, block, layer = layer.split(".", 2)
            prefix = f"transformer_blocks.{block}."
            if layer == "attn.qkv":
                for part, rows in zip("qkv", value.chunk(3), strict=True):
                    renamed[f"{prefix}attn1.to_{part}.{kind}"] = rows
                continue
            names = {
                "adaLN_modulation.1": "norm1.linear",
                "attn.proj": "attn1.to_out.0",
                "mlp.fc1": "ff.net.0.proj",
                "mlp.fc2": "ff.net.2",
            }
            renamed[f"{prefix}{names[layer]}.{kind}"] = value
        elif layer.startswith(("t_embedder", "y_embedder")):
            names = {
                "t_embedder.mlp.0": "timestep_embedder.linear_1",
                "t_embedder.mlp.2": "timestep_embedder.linear_2",
                "y_embedder.embedding_table": "class_embedder.embedding_table",
            }
            for block in range(config(case)["num_layers"]):
                renamed[f"transformer_blocks.{block}.norm1.emb.{names[layer]}.{kind}"] = value.clone()
        else:
            names = {
                "x_embedder.proj": "pos_embed.proj",
                "final_layer.adaLN_modulation.1": "proj_out_1",
                "final_layer.linear": "proj_out_2",
            }
            renamed[f"{names[layer]}.{kind}"] = value
    return renamed
