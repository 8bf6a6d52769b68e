"""Configuration of class-conditional transformers for a host that loads files itself: sizes, and what sampling needs.

Independent of file formats.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .backbones.diffit import DiffiTBackbone
from .backbones.diffit_parameters import DiffiTParameters
from .backbones.dit import DiTBackbone
from .backbones.dit_parameters import ClassParameters, DiTParameters
from .checkpoint_names import PACKED_CONFIG, Shapes, clean_names, shapes_of
from .configuration import (
    CLASS_SAMPLING_FIELDS,
    EPSILON,
    FLOW,
    STABLE_DIFFUSION_SCALE,
    carried_config,
    known_fields,
)
from .diffit_checkpoints import diffit_config, is_diffit, single_file_diffit
from .dit_checkpoints import dit_config, is_dit, official_shapes, single_file_dit
from .documents import read_json

PREDICTIONS = (EPSILON, FLOW)


@dataclass(frozen=True)
class ClassSystem:
    """A kind of class-conditional transformer.

    Attributes:
        recognizes: Whether weights of these names are its.
        config: Shapes under official names, the file and what is given -> the whole configuration.
        weights: A loaded checkpoint -> its weights under the names of the backbone.
        parameters, backbone: Its classes.
    """

    recognizes: Callable[[Iterable[str]], bool]
    config: Callable[[Shapes, Any, Mapping[str, Any]], dict[str, Any]]
    weights: Callable[[Mapping[str, Any]], dict[str, Tensor]]
    parameters: type[ClassParameters]
    backbone: type[DiTBackbone]


CLASS_SYSTEMS = {
    "DiT": ClassSystem(is_dit, dit_config, single_file_dit, DiTParameters, DiTBackbone),
    "DiffiT": ClassSystem(is_diffit, diffit_config, single_file_diffit, DiffiTParameters, DiffiTBackbone),
}


def class_folder_config(folder: Path) -> dict[str, Any]:
    """Return the transformer's configuration in a folder of diffusers, with what index, VAE and scheduler add to it.

    Args:
        folder: A folder of `ClassToImagePipeline`.

    Returns:
        Fields of the system's parameters and of `CLASS_SAMPLING_FIELDS`; some may be missing.
    """
    config = known_fields(read_json(folder / "transformer/config.json"), "class_transformer")
    index, vae = read_json(folder / "model_index.json"), folder / "vae/config.json"
    scheduler = folder / "scheduler/scheduler_config.json"
    config["id2label"] = index.get("id2label")
    if vae.is_file():
        config["latent_scale"] = read_json(vae).get("scaling_factor", STABLE_DIFFUSION_SCALE)
    if "FlowMatch" in str((index.get("scheduler") or ("", ""))[1]):
        config["prediction_type"] = FLOW
        if scheduler.is_file():
            config["shift"] = read_json(scheduler).get("shift", CLASS_SAMPLING_FIELDS["shift"])
    return config


def loaded_class_config(
    state_dict: Mapping[str, Tensor], key_prefix: str = "", metadata: Mapping[str, str] | None = None
) -> dict[str, Any] | None:
    """Return the configuration of a DiT or DiffiT that a host has loaded, None if these are weights of another model.

    Args:
        state_dict: Given name -> tensor, under official names or those of diffusers' class; values are not read, so
            weights may be quantized.
        key_prefix: What the host itself puts before all names of the network.
        metadata: As in `carried_config`.

    Returns:
        The fields of the system's parameters and of `CLASS_SAMPLING_FIELDS`, and the name of the system as "system".

    Raises:
        ConversionError: As in `dit_config` and `diffit_config`.
        ValueError: What the file carries is not legal.
    """
    given = {name[len(key_prefix) :]: value for name, value in state_dict.items() if name.startswith(key_prefix)}
    if not any("embedding_table" in name for name in given):  # no class-conditional model; spares cleaning all names
        return None
    weights = {clean: given[name] for clean, name in clean_names(given).items()}
    title = next((title for title, system in CLASS_SYSTEMS.items() if system.recognizes(weights)), None)
    if title is None:
        return None
    system, carried = CLASS_SYSTEMS[title], carried_config(weights, metadata, "class_transformer")
    shapes = shapes_of({name: value for name, value in weights.items() if name != PACKED_CONFIG})
    sizes = {name: value for name, value in carried.items() if name not in CLASS_SAMPLING_FIELDS}
    parameters = system.parameters.from_config(system.config(official_shapes(shapes), "this file", sizes))
    sampling = {name: carried.get(name, default) for name, default in CLASS_SAMPLING_FIELDS.items()}
    check_sampling(sampling)
    return {"system": title, **asdict(parameters), **sampling}


def check_sampling(sampling: Mapping[str, Any]) -> None:
    """Check what a file says about sampling.

    Raises:
        ValueError: A value is not legal; names it.
    """
    if sampling["prediction_type"] not in PREDICTIONS:
        raise ValueError(f"prediction_type={sampling['prediction_type']!r} must be one of {', '.join(PREDICTIONS)}.")
    for name in ("latent_scale", "shift"):
        if type(sampling[name]) not in (int, float) or not 0 < sampling[name] < 1e6:
            raise ValueError(f"{name}={sampling[name]!r} must be a number above 0.")
    names = sampling["id2label"]
    if names is not None and not (
        isinstance(names, dict) and all(str(key).isdecimal() and isinstance(name, str) for key, name in names.items())
    ):
        raise ValueError("id2label must give a name for each class number.")
