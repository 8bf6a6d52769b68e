"""JSON of files that may come from anyone: whatever is wrong with it is a `ValueError`. Needs no torch."""

import json
from pathlib import Path
from typing import Any

METADATA = "__metadata__"  # entry of a safetensors header
LARGEST_HEADER = 100_000_000  # bytes, the limit of safetensors itself


def parse_json(text: str | bytes) -> Any:
    """Return the content of JSON text.

    Raises:
        ValueError: It is no JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        OSError: The file cannot be read.
        ValueError: As `parse_json`.
    """
    return parse_json(path.read_text(encoding="utf-8"))


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file that holds an object.

    Raises:
        OSError: The file cannot be read.
        ValueError: It holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not an object")
    return content


def read_header(path: Path) -> dict[str, Any]:
    """Return the header of a safetensors file: the entry of each tensor, and METADATA.

    Raises:
        ValueError: It is cut off, or no JSON object.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > min(LARGEST_HEADER, path.stat().st_size):
            raise ValueError("its header is cut off")
        header = parse_json(file.read(size))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header


def header_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, texts by name; none where it has none.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        return {str(name): str(value) for name, value in read_header(path).get(METADATA, {}).items()}
    except (OSError, ValueError, AttributeError) as problem:
        raise ValueError(f"{path} is no safetensors file, or only a part of one") from problem
