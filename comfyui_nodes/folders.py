"""Model folders of diffusers that are already on disk: find them by name, and load MODEL, CLIP and VAE.

Names come from a list that is built here, so a graph cannot name a path. Nothing is downloaded.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import comfy.diffusers_convert
import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from torch import Tensor

from ptdit_diffusers.core.backbones.diffit_parameters import DiffiTParameters
from ptdit_diffusers.core.backbones.dit_parameters import DiTParameters
from ptdit_diffusers.core.backbones.parameters import PTDiTParameters, VAEParameters
from ptdit_diffusers.core.backbones.ptdit import PTDiTBackbone
from ptdit_diffusers.core.checkpoint_names import (
    PACKED_CONFIG,
    check_weights,
    official_transformer_state_dict,
    shapes_of,
)
from ptdit_diffusers.core.class_configuration import CLASS_SYSTEMS, class_folder_config
from ptdit_diffusers.core.configuration import folder_config, pack_config
from ptdit_diffusers.core.dit_checkpoints import POSITION_TABLE
from ptdit_diffusers.core.documents import read_json
from ptdit_diffusers.core.embedded import embedded_model_names, embedded_model_path, weights_folder
from ptdit_diffusers.core.files import shard_files
from ptdit_diffusers.core.folder_files import read_index
from ptdit_diffusers.core.model_folder import PARTS, check_fit, check_types, count_words, read_config
from ptdit_diffusers.core.vocabulary import data_set_of

from .network import check_names
from .text import folder_clip, t5_config
from .vae import PTDiTVAE, preview_factors

EMBEDDED = " (comes with the nodes)"
FIRST = "shapes-128"
WEIGHT_DTYPES = {
    "default": None,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e4m3fn_fast": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
CLASS_TRANSFORMERS = {"DiT2DModel": "DiT", "DiffiT2DModel": "DiffiT"}  # class in diffusers -> one of `CLASS_SYSTEMS`
DEFAULTS = {  # class in diffusers -> its configuration
    "PTDiTTransformer3DModel": asdict(PTDiTParameters()),
    "DiT2DModel": asdict(DiTParameters()),
    "DiffiT2DModel": asdict(DiffiTParameters()),
    "AutoencoderKLOpenSoraPlan": asdict(VAEParameters()),
}


def is_model_folder(folder: Path) -> bool:
    """Return whether a folder holds a PT-DiT, DiT or DiffiT in diffusers' layout."""
    try:
        return read_index(folder)["_class_name"] == "PTDiTPipeline" or class_system(folder) is not None
    except (OSError, ValueError):
        return False


def class_system(folder: Path) -> str | None:
    """Return which of `CLASS_SYSTEMS` makes the pictures of a folder, None if they are made from text."""
    index = read_index(folder)
    if index["_class_name"] != "ClassToImagePipeline":
        return None
    return CLASS_TRANSFORMERS.get((index.get("transformer") or (None, None))[1])


def makes_videos(folder: Path) -> bool:
    """Return whether the model of the folder was trained on several frames that are no views of an object."""
    if folder_config(folder).get("sample_frames", 1) == 1:
        return False
    tokenizer = folder / "tokenizer/tokenizer.json"
    words = read_json(tokenizer).get("model", {}).get("vocab", ()) if tokenizer.is_file() else ()
    return not isinstance(words, dict) or data_set_of(words) != "views"


def default_folder(names: list[str]) -> str:
    """Return the folder to start with: the embedded model of pictures, which suits the other nodes' defaults."""
    return next((name for name in names if name == FIRST + EMBEDDED), names[0])


def model_folders() -> dict[str, Path]:
    """Return name in the list -> folder: embedded models, models/diffusers, and snapshots of the Hub's cache."""
    embedded = {name + EMBEDDED: embedded_model_path(name) for name in embedded_model_names()}
    found = {name: folder for name, folder in embedded.items() if is_model_folder(folder)}  # not the pixels' DiffiT
    for base in folder_paths.get_folder_paths("diffusers"):
        for folder in sorted(Path(base).glob("*")) if os.path.isdir(base) else ():
            if is_model_folder(folder):
                found[folder.name] = folder
    home = os.environ.get("HF_HOME") or os.path.join(os.path.expanduser("~"), ".cache", "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))
    for folder in sorted(cache.glob("models--*--*/snapshots/*")):
        if is_model_folder(folder):
            owner, name = folder.parents[1].name.split("--")[1:3]
            found[f"{owner}/{name} @ {folder.name[:7]}"] = folder
    return found


def named_folder(name: str) -> Path:
    """Return the folder of a name in the list.

    Raises:
        ValueError: The name is not in the list; names those that are.
    """
    folders = model_folders()
    if name not in folders:
        raise ValueError(f"there is no PT-DiT folder {name!r}; found: {', '.join(folders)}.")
    return folders[name]


def check_parts(folder: Path) -> None:
    """Check, before weights are read, that the configurations in a folder are sound and fit each other.

    Raises:
        ValueError: They do not; names the file or the components.
    """
    configs = {}
    for name in PARTS:
        path = folder / name / "config.json"
        if path.is_file():
            given = read_config(path)
            defaults = DEFAULTS.get(given.get("_class_name"), {})
            check_types(path, given, defaults)
            configs[name] = defaults | given
    check_fit(configs, count_words(folder / "tokenizer" / "tokenizer.json"))


def check_network(folder: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Check that weights are exactly those of the transformer of a model folder; ComfyUI would leave gaps random.

    Raises:
        ConversionError: They are not; names the first ones.
    """
    title = class_system(folder)
    if title is None:
        backbone, parameters, weights = PTDiTBackbone, PTDiTParameters, official_transformer_state_dict(weights)
    else:
        backbone, parameters = CLASS_SYSTEMS[title].backbone, CLASS_SYSTEMS[title].parameters
    with torch.device("meta"):  # no memory before the weights are known to fit
        network = backbone()
        network.build(parameters.from_config(config))
    expected, found = shapes_of(network.state_dict()), shapes_of(weights)
    if POSITION_TABLE in expected:  # computed where it is not stored
        found.setdefault(POSITION_TABLE, expected[POSITION_TABLE])
    check_weights(folder / "transformer", f"the {title or 'PT-DiT'} of its config.json", expected, found)


def read_component(folder: Path) -> dict[str, Tensor]:
    """Return all weights of a component, sharded or not.

    Raises:
        ValueError: There are none, or a shard is missing or in another folder.
    """
    folder = weights_folder(folder)
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    files = shard_files(indexes[0]) if indexes else sorted(folder.glob("*.safetensors"))[:1]
    if not files:
        raise ValueError(f"{folder} holds no .safetensors weights.")
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= comfy.utils.load_torch_file(str(file))
    return weights


def network_config(folder: Path, vae: comfy.sd.VAE | None) -> dict[str, Any]:
    """Return the configuration of the transformer, with what sampling needs and preview factors of the folder."""
    config = class_folder_config(folder) if class_system(folder) else folder_config(folder)
    if isinstance(vae, PTDiTVAE) and vae.parameters.hidden_size < 64:  # small, so not the released one; quick to fit
        config["latent_rgb"] = preview_factors(vae, config["latent_scale"])
    return config


def load_folder_model(path: str, weight_dtype: str, config: dict[str, Any], disable_dynamic: bool = False) -> Any:
    """Load the MODEL of the folder's transformer with ComfyUI's own loader.

    Raises:
        ValueError: The folder does not hold exactly the weights of such a transformer.
    """
    weights = read_component(Path(path) / "transformer")
    check_network(Path(path), weights, config)
    weights[PACKED_CONFIG] = pack_config(config)
    options: dict[str, Any] = {}
    if WEIGHT_DTYPES[weight_dtype] is not None:
        options["dtype"] = WEIGHT_DTYPES[weight_dtype]
    if weight_dtype.endswith("_fast"):
        options["fp8_optimizations"] = True
    keywords = {"disable_dynamic": True} if disable_dynamic else {}
    model = comfy.sd.load_diffusion_model_state_dict(weights, model_options=options, **keywords)
    model.cached_patcher_init = (load_folder_model, (path, weight_dtype, config))
    return model


def load_folder_vae(folder: Path, pictures: bool = True) -> comfy.sd.VAE | None:
    """Load the VAE of the folder, ours or Stable Diffusion's, or return None if it has none.

    Args:
        folder: The model folder.
        pictures: As in `PTDiTVAE`.
    """
    config = folder / "vae/config.json"
    if not config.is_file():
        return None
    if read_json(config).get("_class_name") == "AutoencoderKL":
        weights = read_component(folder / "vae")
        vae = comfy.sd.VAE(sd=dict(weights))
        vae.throw_exception_if_invalid()
        check_names("the VAE", vae.first_stage_model, comfy.diffusers_convert.convert_vae_state_dict(weights))
        return vae
    parameters = VAEParameters.from_config(read_json(config))
    return PTDiTVAE(read_component(folder / "vae"), parameters, pictures, name=f"{folder.name}/vae")


def load_folder_clip(folder: Path) -> comfy.sd.CLIP | None:
    """Load the CLIP of the folder's T5, or return None if it has none."""
    if not (folder / "text_encoder" / "config.json").is_file():
        return None
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    return folder_clip(
        t5_config(folder / "text_encoder" / "config.json"),
        read_component(folder / "text_encoder"),
        tokenizer if tokenizer.is_file() else None,
    )
