"""`from_single_file` of transformers and VAE on every file that `convert` takes, with the same checks.

diffusers' own loader looks for a configuration on the Hub when none is given, opens `state_dict` before anyone is
asked, so that averaged weights beside it are lost, and leaves weights that the file lacks without values. So files of
this machine are read here, and diffusers gets finished names and a configuration; of GGUF only the configuration. All
else (links, dictionaries) goes to diffusers as it is.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import GGUFQuantizationConfig
from diffusers.loaders import FromOriginalModelMixin

from ..models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from ..models.transformer_ptdit import PTDiTTransformer3DModel
from .containers import Weights
from .dit import DIFFIT, DIT, System, asked_of, open_class_transformer
from .networks import build, checked_config, open_transformer, open_vae

Options = dict[str, Any]


def given_config(cls: type, options: Options) -> Options | None:
    """Return the configuration named in a call, changed by arguments of the class; None if none is named."""
    if options.get("config") is None:
        return None
    options["config"] = str(options["config"])  # diffusers takes no other kind of path
    config = cls.load_config(
        options["config"],
        subfolder=options.get("subfolder"),
        revision=options.get("config_revision"),
        token=options.get("token"),
        local_files_only=options.get("local_files_only"),
    )
    return config | {name: value for name, value in options.items() if name in config}


def gguf_config(path: Path, options: Options) -> Options:
    """Return the configuration of a transformer in a GGUF file after a check of its shapes.

    Raises:
        ConversionError: It is not exactly such a transformer.
    """
    from .quantize import read_gguf

    return checked_config(path, *read_gguf(path), options)


def class_gguf_config(system: System, path: Path, options: Options) -> Options:
    """Return the configuration of a DiT or DiffiT in a GGUF file."""
    from .quantize import read_gguf

    shapes, carried = read_gguf(path)
    return system.config(shapes, path, carried | asked_of(system, options))


def loader(
    open_file: Callable[[Path, Options | None, Options], tuple[Weights, Options]],
    read_gguf_config: Callable[[Path, Options], Options] = gguf_config,
    finish: Callable[[Any], None] = lambda model: None,
) -> classmethod:
    """Build the method for one class.

    Args:
        open_file: (path, configuration or None, options of the call) to checked weights and the whole configuration.
        read_gguf_config: (path of a GGUF file, options of the call) to the whole configuration.
        finish: Called with the loaded model.
    """

    def from_single_file(cls: type, pretrained_model_link_or_path_or_dict: Any, **options: Any) -> Any:
        """Load a checkpoint file: torch or safetensors, nested or not, or the index of a sharded one.

        Args:
            pretrained_model_link_or_path_or_dict: The file.
            options: As of diffusers' `from_single_file`, e.g. `dtype`. Without `config` the configuration is what the
                file carries and its weights show; arguments of the class, e.g. `window_size`, win over it.

        Raises:
            ConversionError: The file cannot be read, wants to run code, or is not exactly such a model.
        """
        given = pretrained_model_link_or_path_or_dict

        def load(*arguments: Any, **named: Any) -> Any:
            model = FromOriginalModelMixin.from_single_file.__func__(*arguments, **named)
            finish(model)
            return model

        if not isinstance(given, (str, os.PathLike)) or not os.path.isfile(given):
            return load(cls, given, **options)
        path, config = Path(given), given_config(cls, options)
        if path.suffix == ".gguf":
            checkpoint, config = str(path), config or read_gguf_config(path, options)
            compute = options.get("dtype") or options.get("torch_dtype") or torch.bfloat16
            options.setdefault("quantization_config", GGUFQuantizationConfig(compute_dtype=compute))
        else:
            weights, config = open_file(path, config, options)
            checkpoint = dict(weights.stream(weights.facts))
        with TemporaryDirectory() as folder:
            if options.get("config") is None:
                build(cls.from_config, {"config": config}).save_config(folder)
                options |= {"config": folder, "subfolder": None}
            return load(cls, checkpoint, **options)

    return classmethod(from_single_file)


def register_single_file_loaders() -> None:
    """Give transformer and VAE their `from_single_file`; without it they have diffusers' own."""
    PTDiTTransformer3DModel.from_single_file = loader(open_transformer)
    AutoencoderKLOpenSoraPlan.from_single_file = loader(open_vae)
    for system in (DIT, DIFFIT):
        system.model.from_single_file = loader(
            partial(open_class_transformer, system),
            partial(class_gguf_config, system),
            system.model.restore_positions,
        )
