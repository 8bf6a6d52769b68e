"""Whether the parts of a model folder fit their weights and each other, read from JSON and headers alone."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from .backbones.parameters import MOST_LAYERS
from .checkpoint_names import Shapes
from .configuration import count
from .documents import METADATA, read_header, read_mapping

PARTS = ("transformer", "unet", "vae", "text_encoder")
# Component -> its setting with the number of layers, and how names of the layers of one stack begin.
LAYERS = {
    "transformer": ("num_layers", ("transformer_blocks.", "blocks.")),
    "text_encoder": ("num_layers", ("encoder.block.",)),
    "vae": ("num_res_blocks", ("encoder.down.0.block.",)),
}
IMAGE_VAE = ("layers_per_block", ("encoder.down_blocks.0.resnets.",))  # of diffusers
_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a text", tuple: "a list of integers"}


def read_config(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ValueError: There is no file, or something else in it.
    """
    try:
        return read_mapping(path)
    except (OSError, ValueError) as problem:
        raise ValueError(f"{path} cannot be read: {problem}") from problem


def check_types(path: Path, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Check the values of a configuration against the types of a class's defaults, and that integers are positive.

    Raises:
        ValueError: Names the file, the key, the value and what it must be.
    """
    for key, value in config.items():
        kind = type(defaults.get(key))
        legal = {
            bool: isinstance(value, bool),
            int: type(value) is int and (value > 0 or value == defaults.get(key)),
            float: type(value) in (int, float),
            str: isinstance(value, str),
            tuple: isinstance(value, list) and all(type(part) is int and part > 0 for part in value),
        }.get(kind, True)
        if not legal:
            what = _KINDS[kind] + (" above 0" if kind is int else "")
            raise ValueError(f"{path}: {key} is {value!r}, and must be {what}")


def header_shapes(path: Path) -> Shapes:
    """Return name -> shape of the weights in a safetensors file.

    Raises:
        ValueError: It is damaged.
    """
    try:
        return {name: tuple(entry["shape"]) for name, entry in read_header(path).items() if name != METADATA}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"{path} is no safetensors file, or only a part of one") from problem


def weights_shapes(folder: Path, variant: str | None = None) -> Shapes | None:
    """Return name -> shape of the safetensors files in the folder of a component; None if there are none.

    Args:
        folder: Of the component.
        variant: Part of the names of the files to read, e.g. "fp16"; where no file has it, the plain ones are read.

    Raises:
        ValueError: A file is damaged.
    """
    files: list[Path] = []
    for part in [rf"\.{re.escape(variant)}", ""] if variant else [""]:
        names = re.compile(rf"(diffusion_pytorch_model|model)({part}(-\d+-of-\d+)?|(-\d+-of-\d+)?{part})\.safetensors")
        files = files or sorted(path for path in folder.glob("*.safetensors") if names.fullmatch(path.name))
    return {name: shape for path in files for name, shape in header_shapes(path).items()} if files else None


def check_layers(folder: Path, without: Collection[str] = ()) -> None:
    """Check that the configurations in a model folder ask for no more layers than the weights beside them have.

    diffusers and transformers build what the configuration says before they look at weights. A component without
    safetensors files is left to them, and one in `without` is not looked at.

    Raises:
        ValueError: One does; names it.
    """
    for component, (setting, stacks) in LAYERS.items():
        path = folder / component / "config.json"
        files = sorted(path.parent.glob("*.safetensors"))
        if component in without or not path.is_file() or not files:
            continue
        config = read_config(path)
        shapes = {name: shape for file in files for name, shape in header_shapes(file).items()}
        if component == "vae" and setting not in config:
            setting, stacks = IMAGE_VAE
        check_count(path, setting, config.get(setting), max(count(shapes, stack) for stack in stacks))


def check_count(path: Path, setting: str, asked: Any, found: int) -> None:
    """Refuse a number of layers above what was found, or above `MOST_LAYERS` where none was; other types pass.

    Raises:
        ValueError: Names the file, the setting and both numbers.
    """
    if isinstance(asked, int) and asked > (found or MOST_LAYERS):
        raise ValueError(f"{path} has {setting}={asked:g}, but its weights have {found} layers")


def count_words(path: Path) -> int | None:
    """Return the number of words in the list of a tokenizer with one token per word, or None for other ones."""
    if not path.is_file():
        return None
    model = read_config(path).get("model")
    words = model.get("vocab") if isinstance(model, dict) and model.get("type") == "WordLevel" else None
    return len(words) if isinstance(words, dict) else None


def check_fit(configs: Mapping[str, Mapping[str, Any]], words: int | None = None) -> None:
    """Check that components fit each other; those that are not given are not checked.

    Args:
        configs: Component -> its configuration, with defaults.
        words: Entries of the tokenizer.

    Raises:
        ValueError: Names both components and their sizes.
    """
    pairs = (
        ("vae", "z_channels", "transformer", "in_channels"),
        ("vae", "latent_channels", "transformer", "in_channels"),
        ("text_encoder", "d_model", "transformer", "caption_channels"),
    )
    for one, key, other, other_key in pairs:
        sizes = configs.get(one, {}).get(key), configs.get(other, {}).get(other_key)
        if None not in sizes and sizes[0] != sizes[1]:
            raise ValueError(
                f"{one} and {other} do not fit each other: {key}={sizes[0]}, but {other_key}={sizes[1]}; they are of "
                "different models"
            )
    room = configs.get("text_encoder", {}).get("vocab_size")
    if words is not None and room is not None and words > room:
        raise ValueError(f"the tokenizer has {words} words and the text_encoder vocab_size={room}; they do not fit")
