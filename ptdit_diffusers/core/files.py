"""Small helpers for files: hashes, writing JSON by rename, and the files of sharded weights."""

import hashlib
import json
from pathlib import Path
from typing import Any

from .checkpoint_names import ConversionError
from .documents import read_json


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, as sha256sum prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def replace_json(path: Path, content: dict[str, Any]) -> None:
    """Write to a temporary file and rename it, so that a kill leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def shard_names(index: Path, source: Any) -> list[str]:
    """Return the names of the files that the index of sharded weights lists; `source` names it in messages.

    Raises:
        ConversionError: It is not such an index, or lists a file of another folder.
    """
    try:
        names = sorted(set(read_json(index)["weight_map"].values()), key=str)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{source} is not an index of sharded weights (no weight_map)") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ConversionError(f"{source} names {name!r}, which is not beside it")
    return names


def shard_files(index: Path) -> list[Path]:
    """Return the files of sharded weights, which lie beside their index.

    Raises:
        ConversionError: See `shard_names`; or a file is missing.
    """
    files = [index.parent / name for name in shard_names(index, index)]
    for file in files:
        if not file.is_file():
            raise ConversionError(f"{index} names {file.name}, which is missing; fetch it, too")
    return files
