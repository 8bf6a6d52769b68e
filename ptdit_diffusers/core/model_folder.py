"""Whether the parts of a model folder fit their weights and each other, read from JSON and headers alone."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoint_names import Shapes
from .documents import parse_json

PARTS = ("transformer", "vae", "text_encoder")
LARGEST_HEADER = 100_000_000  # bytes, as of the safetensors library
_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a text", tuple: "a list of integers"}


def read_config(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ValueError: There is no file, or something else in it.
    """
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ValueError(f"{path} cannot be read: {problem}") from problem
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds {type(config).__name__}, and must hold an object of names and values")
    return config


def check_types(path: Path, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Check the values of a configuration against the types of a class's defaults, and that integers are positive.

    Raises:
        ValueError: Names the file, the key, the value and what it must be.
    """
    for key, value in config.items():
        kind = type(defaults.get(key))
        legal = {
            bool: isinstance(value, bool),
            int: type(value) is int and value > 0,
            float: type(value) in (int, float),
            str: isinstance(value, str),
            tuple: isinstance(value, list) and all(type(part) is int and part > 0 for part in value),
        }.get(kind, True)
        if not legal:
            what = _KINDS[kind] + (" above 0" if kind is int else "")
            raise ValueError(f"{path}: {key} is {value!r}, and must be {what}")


def weights_shapes(folder: Path) -> Shapes | None:
    """Return name -> shape of the safetensors files in the folder of a component; None if there are none.

    Raises:
        ValueError: A file is damaged.
    """
    names = re.compile(r"(diffusion_pytorch_model|model)(-\d+-of-\d+)?\.safetensors")
    files = sorted(path for path in folder.glob("*.safetensors") if names.fullmatch(path.name))
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = parse_json(file.read(min(size, LARGEST_HEADER)))
            shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
            raise ValueError(f"{path} is no safetensors file, or only a part of one") from problem
    return shapes if files else None


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
