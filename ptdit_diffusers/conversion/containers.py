"""Read checkpoint files: torch (.pt, .pth, .ckpt), safetensors, sharded safetensors. Local files only.

Weights are memory-mapped and handed out one by one, and no code in a file is ever run. Independent of what a network
looks like.
"""

import io
import pickle
import pickletools
import re
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ptdit_diffusers.core.archives import check_archive
from ptdit_diffusers.core.checkpoint_names import (
    PACKED_CONFIG,
    ConversionError,
    Shapes,
    check_tensors,
    clean_names,
    find_weights,
)
from ptdit_diffusers.core.configuration import carried_config
from ptdit_diffusers.core.documents import LARGEST_HEADER
from ptdit_diffusers.core.files import shard_files

RELEASE_BYTES = 256 * 1024**2  # pages of a mapped file count as memory until it is mapped anew
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# What a torch file with nothing but weights imports.
HARMLESS = re.compile(
    r"torch\.((_utils|_tensor)\._rebuild_\w+|\w+Storage|Size|device|bool|(b?float|u?int|complex)\w*)"
    r"|collections\.OrderedDict|argparse\.Namespace"
)
FP8 = tuple(getattr(torch, name) for name in dir(torch) if name.startswith("float8_e") and "e8m0" not in name)


class Facts(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Weights:
    """The weights of a checkpoint under clean names. Opening reads no values.

    Args:
        path: A torch or safetensors file, or the index of a sharded one.

    Raises:
        ConversionError: The file is not a readable checkpoint; the text says what is wrong with it.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.files = checkpoint_files(self.path)
        self.nesting, tensors = self._open()
        self.given = clean_names(tensors)  # clean name -> name in the file
        packed = self.given.pop(PACKED_CONFIG, None)
        if not self.given:
            raise ConversionError(f"{self.path} holds no weights")
        self.packed_config = {} if packed is None else {PACKED_CONFIG: tensors[packed].clone()}
        self.facts = {
            clean: Facts(tuple(tensors[name].shape), tensors[name].dtype) for clean, name in self.given.items()
        }
        self.mapped = all(file_kind(file) != "pickle" for file in self.files)

    def _open(self) -> tuple[tuple[str, ...], dict[str, Tensor]]:
        content: dict[str, Any] = {}
        for file in self.files:
            content |= read_file(file)
        nesting, tensors = find_weights(content)
        check_tensors(self.path, tensors)
        return nesting, tensors

    @property
    def shapes(self) -> Shapes:
        """Name -> shape of every weight."""
        return {name: facts.shape for name, facts in self.facts.items()}

    def carried_config(self, component: str) -> dict[str, Any]:
        """Return the configuration that the file carries for "transformer" or "vae", empty if it carries none."""
        metadata: dict[str, str] = {}
        for file in self.files:
            if file_kind(file) == "safetensors":
                with safe_open(file, framework="pt") as opened:
                    metadata |= opened.metadata() or {}
        return carried_config(self.packed_config, metadata, component)

    def rename(self, names: dict[str, str]) -> None:
        """Keep only some weights, under new names (new -> present)."""
        self.given = {new: self.given[old] for new, old in names.items()}
        self.facts = {new: self.facts[old] for new, old in names.items()}

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield weights in the given order. Use each weight before you ask for the next one."""
        tensors: dict[str, Tensor] = {}
        read = 0
        for name in names:
            if not tensors or (self.mapped and read > RELEASE_BYTES):
                tensors.clear()  # closes the mapping, so that its pages are given back
                _, tensors = self._open()
                read = 0
            tensor = tensors[self.given[name]]
            read += tensor.nbytes
            yield name, tensor


def checkpoint_files(path: Path) -> list[Path]:
    """Return the files that hold the weights: the file itself, or the shards that an index names.

    Raises:
        ConversionError: There is no such file, it is a folder, or shards are missing.
    """
    if path.is_dir():
        inside = sorted(each.name for pattern in ("*.index.json", "*.safetensors", "*.p*t*", "*.ckpt")
                        for each in path.glob(pattern) if each.is_file())  # fmt: skip
        hint = f", for example {path / inside[0]}" if inside else "; it holds no checkpoint"
        raise ConversionError(f"{path} is a folder; name a checkpoint file{hint}")
    if not path.exists():
        raise ConversionError(f"there is no file {path}")
    return shard_files(path) if path.name.endswith(".json") else [path]


def file_kind(path: Path) -> str:
    """Return what a file is by its first bytes: "zip" (torch), "pickle" (older torch) or "safetensors".

    Raises:
        ConversionError: The file is something else, empty or cut off.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(64)
    if size == 0:
        raise ConversionError(f"{path} is empty; fetch it again")
    if head.startswith(b"PK\x03\x04"):
        with suppress(zipfile.BadZipFile):  # an end that names other disks
            if zipfile.is_zipfile(path):
                return "zip"
        raise ConversionError(f"{path} is cut off or damaged: its end is missing; fetch it again")
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    header = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header <= LARGEST_HEADER:
        if 8 + header > size:
            raise ConversionError(f"{path} is cut off: its header alone has {header} bytes; fetch it again")
        return "safetensors"
    known = {
        b"GGUF": "is a GGUF file, whose numbers are quantized; convert the original file",
        b"version https://git-lfs": "is only a pointer to the weights (Git LFS); fetch the file itself",
        b"<": "is a web page, not a checkpoint; fetch the file itself",
    }
    for start, what in known.items():
        if head.startswith(start):
            raise ConversionError(f"{path} {what}")
    raise ConversionError(f"{path} is neither a torch file (.pt, .pth, .ckpt) nor safetensors")


def read_file(path: Path) -> dict[str, Any]:
    """Return the content of one file, tensors mapped and not read.

    Raises:
        ConversionError: The file is cut off or damaged, or it wants to run code.
    """
    kind = file_kind(path)
    if kind == "safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ConversionError(f"{path} is cut off or damaged; fetch it again ({one_line(error)})") from error
    if kind == "zip":
        check_archive(path)
    try:
        # DiT's training script stores its arguments, a Namespace, beside the weights: plain attributes, no code
        with warnings.catch_warnings(), torch.serialization.safe_globals([Namespace]):
            warnings.simplefilter("ignore")  # torch warns of unusual pickles, which it then refuses
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "zip")
    except pickle.UnpicklingError as error:
        raise ConversionError(refusal(path, kind)) from error
    except Exception as error:  # a crafted pickle fails in many ways, MemoryError among them
        raise ConversionError(f"{path} is cut off or damaged; fetch it again ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not named weights")
    return content


def refusal(path: Path, kind: str) -> str:
    """Return why torch did not unpickle a file: it asks for code, or it is damaged."""
    wanted = [name for name in names_in_pickle(path, kind) if not HARMLESS.fullmatch(name)]
    if not wanted:
        return f"{path} is cut off or damaged, or no checkpoint of torch; fetch it again"
    return (
        f"{path} was refused: besides weights it wants to run code ({wanted[0]}) when it is read; "
        "nothing of it was run. Take a file from a source that you trust, best as .safetensors"
    )


def names_in_pickle(path: Path, kind: str) -> list[str]:
    """Return full names of the classes and functions that a torch file imports. Nothing of the file is run.

    `torch.serialization.get_unsafe_globals_in_checkpoint` does so for zip files in pickle's protocol 2 only.
    """
    names, strings = [], ["", ""]
    with ExitStack() as stack:
        file = stack.enter_context(open(path, "rb"))
        if kind == "zip":
            archive = stack.enter_context(zipfile.ZipFile(file))
            member = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
            file = stack.enter_context(archive.open(member)) if member else io.BytesIO()
        try:
            for _ in range(4 if kind == "pickle" else 1):  # the old format is a sequence of pickles
                for operation, value, _ in pickletools.genops(file):
                    if operation.name == "GLOBAL":
                        names.append(value.replace(" ", "."))
                    elif operation.name == "STACK_GLOBAL":  # takes the two last strings
                        names.append(".".join(strings[-2:]))
                    elif isinstance(value, str):
                        strings.append(value)
        except Exception:  # of many kinds: damaged from here on; the names found so far count
            pass
    return names


def one_line(error: BaseException) -> str:
    """Return the first line of an error's text."""
    return str(error).strip().split("\n")[0] or type(error).__name__
