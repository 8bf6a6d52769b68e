"""The `dit_*` goldens: tiny models with the reference's random weights, their inputs and what they must give."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel

FOLDER = Path(__file__).resolve().parents[1] / "golden"
LIMIT = 1e-4  # max abs difference in fp32; the reference's own rounding is up to 8e-6

# case -> (tensor that is right, extra configuration); the reference is wrong where another tensor than `out` is named
CASES = {
    "i_image_square": ("out", {}),
    "ii_proxy_finer": ("out", {}),
    "iii_video_f8": ("out", {}),
    "iiib_video_finer_proxy": ("out", {}),
    "iv_no_shift": ("out", {}),
    "v_batch2": ("out_per_sample_correct", {}),
    "vi_a_resize_square": ("out", {}),
    "vi_b_nonsquare": ("out_positions_fixed", {}),
    "vii_added_conditions": ("out_per_sample_correct", {}),
    "viii_single_window": ("out", {}),
    "ix_ratio_one_h": ("out", {}),
    "x_odd_window": ("out", {}),
}


def load(case: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration of a case."""
    path = FOLDER / f"dit_{case}.safetensors"
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    return load_file(path), config


def model(case: str, **options: Any) -> PTDiTTransformer3DModel:
    """The model of a case with the golden weights, in eval mode."""
    tensors, config = load(case)
    transformer = PTDiTTransformer3DModel(
        num_attention_heads=config["num_heads"],
        attention_head_dim=config["head_dim"],
        num_layers=config["num_layers"],
        caption_channels=config["caption_channels"],
        sample_size=config["sample_size"],
        sample_frames=config["frame"],
        window_size=tuple(config["compress_ratios"]),
        proxy_ratio=tuple(config["proxy_compress_ratios"]),
        shift_window=config["shift_window"],
        **options,
    )
    weights = load_file(FOLDER / "dit_weights.safetensors")
    del weights["pos_embed.pos_embed"]
    weights |= {key.removeprefix("extra."): value for key, value in tensors.items() if key.startswith("extra.")}
    if not config["shift_window"]:
        shifted = ("attn3.", "linear_2.", "proxy_scale_shift_table")
        weights = {
            key: value
            for key, value in weights.items()
            if not (key.startswith("transformer_blocks") and key.split(".", 2)[2].startswith(shifted))
        }
    transformer.load_state_dict(weights)
    return transformer.eval()


def inputs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Arguments of the forward."""
    return {key.removeprefix("in."): value for key, value in tensors.items() if key.startswith("in.")}
