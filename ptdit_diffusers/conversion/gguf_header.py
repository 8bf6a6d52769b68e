"""The header of a GGUF file, walked before the package gguf reads it: that trusts every length, and runs on for hours.

Layout (ggml's documentation, version 2 and 3, little endian): magic, version, number of tensors, number of fields; a
field is name, kind, value; a tensor is name, number of axes, lengths, kind, place.
"""

import struct
from pathlib import Path
from typing import BinaryIO

from ptdit_diffusers.core.checkpoint_names import ConversionError

MOST_ENTRIES = 1_000_000  # of tensors, fields and members of an array; a vocabulary has some 100,000
LARGEST_TEXT = 50_000_000  # bytes
TEXT, ARRAY = 8, 9
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # kind of a number -> bytes
MOST_AXES = 4


def check_gguf(path: Path) -> None:
    """Check that a file is GGUF and that all counts and lengths in its header fit into it.

    Raises:
        ConversionError: It is not, or they do not.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError("it does not begin with GGUF")
            version, tensors, fields = _numbers(file, "<IQQ")
            if version not in (2, 3) or max(tensors, fields) > MOST_ENTRIES:
                raise ValueError(f"version {version} with {tensors} weights and {fields} fields")
            for _ in range(fields):
                _text(file)
                _skip_value(file, *_numbers(file, "<I"), size)
            for _ in range(tensors):
                _text(file)
                (axes,) = _numbers(file, "<I")
                if axes > MOST_AXES:
                    raise ValueError(f"a weight with {axes} axes")
                *_, place = _numbers(file, f"<{axes}QIQ")
                if place > size:
                    raise ValueError("a weight beyond its end")
    except (ValueError, struct.error) as error:
        raise ConversionError(f"{path} is cut off, damaged, or no GGUF file; fetch it again ({error})") from error


def _numbers(file: BinaryIO, form: str) -> tuple[int, ...]:
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _text(file: BinaryIO) -> None:
    (length,) = _numbers(file, "<Q")
    if length > LARGEST_TEXT or len(file.read(length)) < length:
        raise ValueError(f"a text of {length} bytes")


def _skip_value(file: BinaryIO, kind: int, size: int) -> None:
    count, members = 1, kind
    if kind == ARRAY:
        members, count = _numbers(file, "<IQ")
        if count > MOST_ENTRIES:
            raise ValueError(f"an array with {count} members")
    if members == TEXT:
        for _ in range(count):
            _text(file)
    elif members in WIDTHS:
        file.seek(count * WIDTHS[members], 1)
        if file.tell() > size:
            raise ValueError("a field beyond its end")
    else:
        raise ValueError(f"a field of kind {members}")
