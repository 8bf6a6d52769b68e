"""T5's spiece.model: its pieces become the tokenizer that the SentencePiece library would be."""

import struct
from pathlib import Path

import pytest
import torch

from ptdit_diffusers.cli import main
from ptdit_diffusers.conversion.spiece import read_spiece
from ptdit_diffusers.core.checkpoint_names import ConversionError
from ptdit_diffusers.pipelines.ptdit_text import tokenize

NORMAL, UNKNOWN, CONTROL = 1, 2, 3
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PIECES = [("<pad>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("<unk>", 0.0, UNKNOWN), ("▁", -2.0, NORMAL)]
PIECES += [("▁a", -3.0, NORMAL), ("▁red", -4.0, NORMAL), ("▁circle", -5.0, NORMAL), ("s", -6.0, NORMAL)]
PIECES += [(letter, -8.0 - index, NORMAL) for index, letter in enumerate(LETTERS) if letter != "s"]


def varint(value: int) -> bytes:
    head, rest = value & 0x7F, value >> 7
    return bytes([head | 0x80]) + varint(rest) if rest else bytes([head])


def block(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def spiece_model(pieces=PIECES, model_type: int = 1) -> bytes:
    """A SentencePiece model in its wire format."""
    content = b""
    for text, score, kind in pieces:
        fields = (
            block(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + varint(3 << 3) + varint(kind)
        )
        content += block(1, fields)
    return content + block(2, varint(3 << 3) + varint(model_type)) + block(3, block(1, b"identity"))


@pytest.fixture
def path(tmp_path) -> Path:
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "spiece.model").write_bytes(spiece_model())
    return tmp_path / "t5" / "spiece.model"


def test_the_likeliest_pieces_are_taken_and_the_end_token_follows(path):
    tokenizer = read_spiece(path)
    number = {text: index for index, (text, _, _) in enumerate(PIECES)}
    ids = tokenizer("a red   circles x").input_ids
    assert ids == [number[text] for text in ("▁a", "▁red", "▁circle", "s", "▁", "x", "</s>")]
    assert tokenizer("").input_ids == [1]
    assert tokenizer("a 7").input_ids[-2:] == [2, 1]  # a sign without a piece
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a red circles x"
    assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == len(PIECES) + 99


def test_prompts_are_padded_on_the_right_with_the_pad_token(path):
    ids, mask = tokenize(read_spiece(path), ["a red circle", ""], 200)
    assert ids.tolist() == [[4, 5, 6, 1], [1, 0, 0, 0]]
    assert torch.equal(mask.bool(), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]).bool())


def test_a_converted_folder_holds_the_tokenizer_in_the_form_that_needs_nothing_else(path, tmp_path):
    from transformers import AutoTokenizer

    from tests.ptdit_diffusers.conversion.test_convert import small_t5

    small_t5().save_pretrained(path.parent)
    assert main(["convert", "--text-encoder", str(path.parent), "--output", str(tmp_path / "model")]) == 0
    assert (tmp_path / "model" / "tokenizer" / "tokenizer.json").is_file()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model" / "tokenizer")
    for text in ("a red circle", "circles of red, 7 of them", ""):
        assert loaded(text).input_ids == read_spiece(path)(text).input_ids


def test_a_damaged_or_another_model_is_refused(path):
    whole = path.read_bytes()
    for content in (whole[:-30], b"", b"words, no model", b"\xff" * 20):
        path.write_bytes(content)
        with pytest.raises(ConversionError, match="SentencePiece model"):
            read_spiece(path)
    for content in (spiece_model(model_type=2), spiece_model(PIECES[1:])):
        path.write_bytes(content)
        with pytest.raises(ConversionError, match="not T5's"):
            read_spiece(path)
