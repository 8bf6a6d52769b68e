"""Read T5's `spiece.model` (SentencePiece, unigram) without the sentencepiece and protobuf packages.

The file is a protocol buffer. Of its fields only the pieces, their scores and the table of replaced characters are
needed; transformers makes the tokenizer from them. Field numbers: sentencepiece_model.proto of google/sentencepiece.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

from transformers import T5Tokenizer

from ptdit_diffusers.core.checkpoint_names import ConversionError

PIECES, TRAINER, NORMALIZER = 1, 2, 3  # fields of the model
PIECE_TEXT, PIECE_SCORE = 1, 2  # fields of a piece
MODEL_TYPE, UNIGRAM = 3, 1  # a field of the trainer and its value
CHARACTER_MAP = 2  # a field of the normalizer
EXTRA_IDS = 100  # T5's sentinels, which are not in the file
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def read_spiece(path: Path) -> T5Tokenizer:
    """Return the tokenizer of a `spiece.model`.

    Raises:
        ConversionError: The file is damaged, or not that of a T5.
    """
    try:
        fields = list(read_fields(path.read_bytes()))
        pieces = [dict(read_fields(value)) for number, value in fields if number == PIECES]
        vocab = [(str(piece[PIECE_TEXT], "utf-8"), score_of(piece)) for piece in pieces]
        trainer = dict(read_fields(dict(fields).get(TRAINER, b"")))
        normalizer = dict(read_fields(dict(fields).get(NORMALIZER, b"")))
    except (ValueError, KeyError, IndexError, TypeError, struct.error) as error:
        raise ConversionError(f"{path} is cut off, damaged, or no SentencePiece model; fetch it again") from error
    if trainer.get(MODEL_TYPE, UNIGRAM) != UNIGRAM or [text for text, _ in vocab[:3]] != ["<pad>", "</s>", "<unk>"]:
        raise ConversionError(f"{path} is not T5's SentencePiece model (unigram, beginning with <pad>, </s>, <unk>)")
    sentinels = [(f"<extra_id_{number}>", 0.0) for number in reversed(range(EXTRA_IDS))]
    return T5Tokenizer(vocab=vocab + sentinels, _spm_precompiled_charsmap=normalizer.get(CHARACTER_MAP) or None)


def score_of(piece: dict[int, int | bytes]) -> float:
    """Return the log probability of a piece."""
    return struct.unpack("<f", piece.get(PIECE_SCORE, bytes(4)))[0]


def read_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value of each field of a protocol buffer: an integer for varints, else bytes.

    Raises:
        ValueError: The data is cut off, or no protocol buffer.
    """
    place = 0
    while place < len(data):
        key, place = read_varint(data, place)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, place = read_varint(data, place)
            yield number, value
            continue
        if kind == BYTES:
            length, place = read_varint(data, place)
        elif kind in (FIXED64, FIXED32):
            length = 8 if kind == FIXED64 else 4
        else:
            raise ValueError(f"unknown kind of field {kind}")
        if place + length > len(data):
            raise ValueError("cut off")
        yield number, data[place : place + length]
        place += length


def read_varint(data: bytes, place: int) -> tuple[int, int]:
    """Return an integer stored as seven bits per byte, and the place after it."""
    value = shift = 0
    while True:
        value |= (data[place] & 0x7F) << shift
        shift += 7
        place += 1
        if not data[place - 1] & 0x80:
            return value, place
