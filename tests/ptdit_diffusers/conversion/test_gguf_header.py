"""Headers of GGUF files whose counts and lengths cannot be."""

import struct
import time
from pathlib import Path

import pytest

from ptdit_diffusers.conversion.gguf_header import check_gguf
from ptdit_diffusers.core.checkpoint_names import ConversionError


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def head(tensors: int, fields: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields)


ARCHITECTURE = text("general.architecture") + struct.pack("<I", 8) + text("ptdit")


def tensor(sizes: list[int], place: int) -> bytes:
    return text("a") + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, 0, place)


def check(folder: Path, content: bytes) -> None:
    (folder / "a.gguf").write_bytes(content)
    check_gguf(folder / "a.gguf")


def test_a_header_that_fits_its_file_is_taken(tmp_path):
    numbers = text("x") + struct.pack("<IIQ3I", 9, 4, 3, 1, 2, 3)
    check(tmp_path, head(1, 2) + ARCHITECTURE + numbers + tensor([8, 8], 0) + bytes(512))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (head(0, 1) + text("x") + struct.pack("<IIQ", 9, 4, 2**40) + bytes(64), "an array with 1099511627776 members"),
        (head(0, 1) + text("x") + struct.pack("<IIQ", 9, 12, 10**6) + bytes(64), "a field beyond its end"),
        (head(2**60, 2**60), "weights and"),
        (head(1, 1) + ARCHITECTURE + tensor([8, 8], 2**62) + bytes(512), "a weight beyond its end"),
        (head(1, 0) + text("a") + struct.pack("<I", 2**31) + bytes(64), "a weight with 2147483648 axes"),
        (head(0, 1) + struct.pack("<Q", 2**50), "a text of 1125899906842624 bytes"),
        (head(0, 1) + text("x") + struct.pack("<I", 99) + bytes(64), "a field of kind 99"),
        ((head(1, 1) + ARCHITECTURE)[:40], "fetch it again"),
        (head(0, 0, version=9), "version 9"),
        (b"GGML", "does not begin with GGUF"),
    ],
)
def test_what_cannot_be_is_refused_at_once(tmp_path, content, message):
    begin = time.process_time()
    with pytest.raises(ConversionError, match=message):
        check(tmp_path, content)
    assert time.process_time() - begin < 1
