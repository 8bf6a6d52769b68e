"""Checks a model folder before its weights are loaded: every component key by key and shape by shape."""

import inspect
from collections.abc import Collection
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import T5Config, T5EncoderModel

from ptdit_diffusers.core.checkpoint_names import check_weights, shapes_of
from ptdit_diffusers.core.model_folder import (
    PARTS,
    check_fit,
    check_layers,
    check_types,
    count_words,
    read_config,
    weights_shapes,
)
from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from ptdit_diffusers.models.transformer_diffit import DiffiT2DModel
from ptdit_diffusers.models.transformer_dit import DiT2DModel
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from ptdit_diffusers.models.unet_diffit import DiffiTUNet2DModel

CLASSES = {
    "PTDiTTransformer3DModel": PTDiTTransformer3DModel,
    "DiT2DModel": DiT2DModel,
    "DiffiT2DModel": DiffiT2DModel,
    "DiffiTUNet2DModel": DiffiTUNet2DModel,
    "AutoencoderKLOpenSoraPlan": AutoencoderKLOpenSoraPlan,
    "T5EncoderModel": T5EncoderModel,
}
TIED = {"shared.weight", "encoder.embed_tokens.weight"}  # names of one weight of T5
BUFFERS = {"pos_embed", "relative_position_index"}  # last names of buffers in official files; computed here


def check_folder(folder: Path, without: Collection[str] = (), variant: str | None = None) -> None:
    """Check the components of a folder that this package knows; diffusers would fill in what is missing at random.

    Args:
        folder: A local folder of a pipeline.
        without: Components that are not loaded from it.
        variant: Which files of weights are loaded, see `weights_shapes`.

    Raises:
        ValueError: A file is damaged, a configuration asks for more layers than the weights have, a value has a wrong
            type, or components do not fit their weights or each other.
    """
    check_layers(folder, without)
    index = read_config(folder / "model_index.json")
    configs = {}
    for name, entry in index.items():
        if name in without or not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
            continue
        if name == "scheduler":
            _check_scheduler(folder / name / "scheduler_config.json", entry[1])
        elif name in PARTS and entry[1] in CLASSES and (folder / name / "config.json").is_file():
            configs[name] = _check_component(folder / name, CLASSES[entry[1]], variant)
    check_fit(configs, count_words(folder / "tokenizer" / "tokenizer.json") if "tokenizer" not in without else None)


def _check_component(folder: Path, cls: type, variant: str | None = None) -> dict[str, Any]:
    """Check one component, and return its configuration with defaults."""
    path = folder / "config.json"
    given = read_config(path)
    is_text = cls is T5EncoderModel
    defaults = T5Config().to_dict() if is_text else _defaults(cls)
    sizes = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets")
    check_types(path, given, {key: defaults[key] for key in sizes} if is_text else defaults)
    found = weights_shapes(folder, variant)
    if found is not None and "quantization_config" not in given:
        try:
            with torch.device("meta"):
                model = cls(T5Config.from_dict(given)) if is_text else cls.from_config(given)
        except Exception as error:  # of many kinds: the configuration may hold anything
            raise ValueError(f"{path}: there is no {cls.__name__} of this configuration: {error}") from error
        expected = shapes_of(model.state_dict())
        one_of_two = TIED & set(found) if is_text else set()
        expected = {
            name: shape for name, shape in expected.items() if name not in TIED or name in one_of_two or not one_of_two
        }
        found = {
            name: shape for name, shape in found.items() if name.rpartition(".")[2] not in BUFFERS or name in expected
        }
        check_weights(folder, cls.__name__, expected, found)
    return defaults | given


def _check_scheduler(path: Path, class_name: str) -> None:
    cls = getattr(diffusers, class_name, None)
    if cls is None or not path.is_file():
        return
    positive = {"num_train_timesteps", "base_image_seq_len", "max_image_seq_len"}
    defaults = {key: value for key, value in _defaults(cls).items() if type(value) is not int or key in positive}
    check_types(path, read_config(path), defaults)


def _defaults(cls: type) -> dict[str, Any]:
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}
