"""`from_single_file` of transformer and VAE on every file that `convert` takes, with the same checks.

diffusers' own loader looks for a configuration on the Hub when none is given, opens `state_dict` before anyone is
asked, so that averaged weights beside it are lost, and leaves weights without values that the file does not have. So
files of this machine are read by `Weights`, and diffusers gets finished names and a configuration; of GGUF only the
configuration. All else (links, dictionaries) goes to diffusers as it is.
"""

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import GGUFQuantizationConfig
from diffusers.loaders import FromOriginalModelMixin

from ptdit_diffusers.core.configuration import infer_transformer, known_heads
from ptdit_diffusers.core.sizes import RELEASED_WINDOW

from ..models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from ..models.transformer_ptdit import PTDiTTransformer3DModel
from .containers import Weights
from .networks import build, open_transformer, open_vae

Options = dict[str, Any]


def transformer_options(path: Path, inferred: Options, asked: Options) -> Options:
    """Configuration of a transformer file; what is not in the weights is as asked, else the released model's."""
    dim = inferred["attention_head_dim"]
    heads = asked.get("num_attention_heads") or known_heads(path, dim)
    window = asked.get("window_size") or RELEASED_WINDOW
    rest = {"attention_head_dim": dim // heads, "window_size": window, "proxy_ratio": window}
    return inferred | {"num_attention_heads": heads} | rest


def given_config(cls: type, options: Options) -> Options | None:
    """The configuration that was given with a file, and what arguments of the class change in it; None without one."""
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


def gguf_config(path: Path, asked: Options) -> Options:
    """Configuration of a transformer in a GGUF file: what the file says, else what its shapes tell."""
    from .quantize import read_gguf

    config, shapes = read_gguf(path)
    return config or transformer_options(path, infer_transformer(shapes), asked)


def loader(open_file: Callable[..., tuple[Weights, Options]], complete: Callable[..., Options]) -> classmethod:
    """The method for one class.

    Args:
        open_file: (path, configuration or None) to checked weights and the configuration, else what their shapes tell.
        complete: (path, what the shapes tell, options of the call) to the whole configuration.
    """

    def from_single_file(cls: type, pretrained_model_link_or_path_or_dict: Any, **options: Any) -> Any:
        """Load a checkpoint file: torch or safetensors, nested or not, or the index of a sharded one.

        Args:
            pretrained_model_link_or_path_or_dict: The file.
            options: As of diffusers' `from_single_file`, e.g. `dtype`. Without `config` the sizes are those of the
                weights; arguments of the class go first, e.g. `num_attention_heads` or `window_size`.

        Raises:
            ConversionError: The file cannot be read, wants to run code, or is not exactly such a model.
        """
        given = pretrained_model_link_or_path_or_dict
        load = FromOriginalModelMixin.from_single_file.__func__
        if not isinstance(given, (str, os.PathLike)) or not os.path.isfile(given):
            return load(cls, given, **options)
        path = Path(given)
        if path.suffix == ".gguf":
            checkpoint, config = str(path), lambda: gguf_config(path, options)
            compute = options.get("dtype") or options.get("torch_dtype") or torch.bfloat16
            options.setdefault("quantization_config", GGUFQuantizationConfig(compute_dtype=compute))
        else:
            weights, known = open_file(path, given_config(cls, options))
            checkpoint, config = dict(weights.stream(weights.facts)), lambda: complete(path, known, options)
        with TemporaryDirectory() as folder:
            if options.get("config") is None:
                build(cls.from_config, {"config": config()}).save_config(folder)
                options |= {"config": folder, "subfolder": None}
            return load(cls, checkpoint, **options)

    return classmethod(from_single_file)


def register_single_file_loaders() -> None:
    """Give transformer and VAE their `from_single_file`; without it they have diffusers' own."""
    PTDiTTransformer3DModel.from_single_file = loader(open_transformer, transformer_options)
    AutoencoderKLOpenSoraPlan.from_single_file = loader(open_vae, lambda path, inferred, asked: inferred)
