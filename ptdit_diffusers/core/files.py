"""Small helpers for files: hashes, writing by rename, and the files of sharded weights."""

import hashlib
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .checkpoint_names import ConversionError
from .documents import read_json
from .folder_files import move, usual_rights


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, as sha256sum prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to, and rename it to `path` at the end; after an error nothing is left.

    A kill leaves the old file or the new one. No two writers share the temporary name, and the file gets the rights
    that any new file has: some libraries make theirs readable for one user alone.
    """
    temporary = path.with_name(f".{path.stem[:100]}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        rights = usual_rights(path.parent)
        yield temporary
        temporary.chmod(rights)
        move(temporary, path)
    finally:  # after a success there is nothing left to remove
        temporary.unlink(missing_ok=True)


def replace_json(path: Path, content: Any) -> None:
    """Write JSON as `new_file` does."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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
