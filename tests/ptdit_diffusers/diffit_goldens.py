"""The goldens of DiffiT: tiny models with weights of the official code, their inputs and what they must give."""

from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ptdit_diffusers.models.transformer_diffit import DiffiT2DModel
from tests.ptdit_diffusers import dit_goldens

FOLDER = Path(__file__).resolve().parents[1] / "golden" / "diffit"
LIMIT = 1e-4  # max abs difference of outputs; the reference's rounding is 4e-6


@cache
def load(case: str) -> dict[str, Tensor]:
    """Tensors of a case, without the weights."""
    return {key: value for key, value in load_file(FOLDER / f"{case}.safetensors").items() if "weights." not in key}


def weights(case: str) -> dict[str, Tensor]:
    """Weights of a case under official names, in float32, with the int64 index buffers of official files."""
    named = {
        key.removeprefix("weights."): value
        for key, value in load_file(FOLDER / f"{case}.safetensors").items()
        if "weights." in key
    }
    return {key: value.float() if value.is_floating_point() else value for key, value in named.items()}


def parameters(case: str) -> dict[str, Tensor]:
    """Weights of a case without the index buffers."""
    return {key: value for key, value in weights(case).items() if "relative_position_index" not in key}


def config(case: str) -> dict[str, Any]:
    """Configuration of a case, as arguments of `DiffiT2DModel`."""
    return dit_goldens.config(case, FOLDER)


def model(case: str) -> DiffiT2DModel:
    """The model of a case with the golden weights, in eval mode."""
    transformer = DiffiT2DModel(**config(case))
    transformer.load_state_dict(weights(case))
    return transformer.eval()
