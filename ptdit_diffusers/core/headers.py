"""What the headers of safetensors files say, compared with configurations before a model is built. Needs no torch."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .documents import parse_json, read_mapping

MOST_LAYERS = 512
LARGEST_HEADER = 100_000_000  # bytes, the limit of safetensors itself
# Component -> its setting with the number of layers, and how names of the layers of one stack begin.
LAYERS = {
    "transformer": ("num_layers", ("transformer_blocks.", "blocks.")),
    "text_encoder": ("num_layers", ("encoder.block.",)),
    "vae": ("num_res_blocks", ("encoder.down.0.block.",)),
}
IMAGE_VAE = ("layers_per_block", ("encoder.down_blocks.0.resnets.",))  # of diffusers


def header_names(path: Path) -> list[str]:
    """Return the names of the weights in a safetensors file.

    Raises:
        OSError: The file cannot be read.
        ValueError: It has no such header.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > min(LARGEST_HEADER, path.stat().st_size):
            raise ValueError("it is no safetensors file, or cut off")
        header = parse_json(file.read(size))
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    return [name for name in header if name != "__metadata__"]


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
        try:
            config = read_mapping(path)
            names = [name for file in files for name in header_names(file)]
        except (OSError, ValueError) as error:
            raise ValueError(f"{path.parent} cannot be read: {error}") from error
        if component == "vae" and setting not in config:
            setting, stacks = IMAGE_VAE
        check_count(path, setting, config.get(setting), layers_of(names, stacks))


def layers_of(names: list[str], stacks: tuple[str, ...]) -> int:
    """Return how many layers the longest of these stacks has."""
    return max(len({name[len(at) :].split(".")[0] for name in names if name.startswith(at)}) for at in stacks)


def check_count(path: Path, setting: str, asked: Any, found: int) -> None:
    """Refuse a number of layers that is larger than what was found, or than `MOST_LAYERS` where none was."""
    if asked is not None and not (isinstance(asked, int) and asked <= (found or MOST_LAYERS)):
        raise ValueError(f"{path} has {setting}={json.dumps(asked)[:40]}, but its weights have {found} layers")
