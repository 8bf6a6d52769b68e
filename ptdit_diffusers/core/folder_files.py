"""Model folders: their index, the files that belong to them, and how a folder replaces another. Needs no torch."""

import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .documents import read_mapping

INDEX = "model_index.json"
SCANNER_WAITS = (0.1, 0.2, 0.4, 0.8)  # seconds between tries
COMPONENTS = ("transformer", "unet", "vae", "text_encoder", "tokenizer", "scheduler")
CLASS_PIPELINES = {"ClassToImagePipeline": "transformer", "DiffiTImagePipeline": "unet"}  # pipeline -> its network
_COMPONENT_FILE = re.compile(
    rf"({'|'.join(COMPONENTS)})/("
    r"(diffusion_pytorch_)?model([.-][\w.-]+)?\.safetensors(\.index\.json)?"
    r"|(config|generation_config|scheduler_config|quantization_config)\.json"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|(spiece|tokenizer)\.model|(vocab|merges)\.txt)"
)
_GGUF_FILE = re.compile(r"(transformer|text_encoder)-\w+\.gguf")


def is_model_file(name: str) -> bool:
    """Return whether a path below a model folder, with "/", is one that this package writes."""
    return name == INDEX or bool(_COMPONENT_FILE.fullmatch(name) or _GGUF_FILE.fullmatch(name))


def read_index(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's `model_index.json`; entries of components are [library, class].

    Raises:
        OSError: There is none, or it cannot be read.
        ValueError: It is no index, or names a component that none of our pipelines has, for example one outside of
            the folder.
    """
    index = read_mapping(folder / INDEX)
    if not isinstance(index.get("_class_name"), str):
        raise ValueError("it names no pipeline class")
    for name, source in index.items():
        if not isinstance(source, list):
            continue
        if name not in COMPONENTS:
            raise ValueError(f"it names the component {name!r}; known: {', '.join(COMPONENTS)}")
        if len(source) != 2 or not all(part is None or isinstance(part, str) for part in source):
            raise ValueError(f"its entry of {name} is not a library and a class")
    return index


def inside(path: Path, folder: Path) -> bool:
    """Return whether a file lies in a folder after all links; the Hub's cache keeps a snapshot's files in `blobs`."""
    homes = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        homes.append(folder.resolve().parents[1] / "blobs")
    return any(path.resolve().is_relative_to(home) for home in homes)


def model_files(folder: Path) -> list[str]:
    """Return the names of a folder's own files, sorted.

    Raises:
        ValueError: One is a link that leaves the folder.
    """
    names = [path.relative_to(folder).as_posix() for path in folder.glob("*")]
    names += [path.relative_to(folder).as_posix() for name in COMPONENTS for path in (folder / name).glob("*")]
    found = sorted(name for name in names if is_model_file(name) and (folder / name).is_file())
    for name in found:
        if not inside(folder / name, folder):
            raise ValueError(f"{folder / name} is a link to a file outside of the model; put the file itself there")
    return found


def first_foreign(folder: Path, is_ours: Callable[[str], bool]) -> str | None:
    """Return the first file or link below a folder that we do not write, None if there is none."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if (path.is_symlink() or not path.is_dir()) and not is_ours(name):
            return name
    return None


def move(path: Path, target: Path) -> None:
    """Rename a file, in place of an earlier one, or a folder.

    Windows refuses this while another program reads the file, for example a virus scanner that looks at new files: it
    is tried again for 1.5 s.

    Raises:
        OSError: It was refused each time, or the disk failed.
    """
    for wait in SCANNER_WAITS:
        try:
            path.replace(target)
            return
        except PermissionError:
            time.sleep(wait)
    path.replace(target)


def usual_rights(folder: Path) -> int:
    """Return the rights that a new file in a folder gets: those that the process's umask leaves."""
    path = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        with open(path, "xb") as made:
            return os.fstat(made.fileno()).st_mode & 0o777
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def new_folder(output: Path, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Give a hidden folder to write into, and rename it to `output` at the end; after an error nothing is left.

    The folder that it replaces is deleted last, and put back if the renaming fails. The files get the rights that any
    new file has: some libraries make theirs readable for one user alone.

    Args:
        output: The folder; its parent exists.
        check: Called before the renaming, because `output` may have changed in the meantime; raises what stops it.
    """
    unfinished, previous = (
        output.with_name(f".{output.name}-{uuid.uuid4().hex[:8]}.{end}") for end in ("part", "previous")
    )
    try:
        unfinished.mkdir()
        yield unfinished
        rights = usual_rights(unfinished)
        for path in unfinished.rglob("*"):
            if path.is_file() and not path.is_symlink():
                path.chmod(rights)
        check()
        replaced = output.exists()
        if replaced:
            move(output, previous)
        try:
            move(unfinished, output)
        except BaseException:
            if replaced:
                move(previous, output)
            raise
        shutil.rmtree(previous, ignore_errors=True)
    finally:  # also after Ctrl-C; after a success there is nothing left to remove
        shutil.rmtree(unfinished, ignore_errors=True)
