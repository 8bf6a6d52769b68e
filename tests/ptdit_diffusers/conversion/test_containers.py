"""Torch files of strangers: shared and cyclic dictionaries, tensors that no saved model has, broken indexes."""

import pickle
import time

import pytest
import torch

from ptdit_diffusers.conversion.containers import ConversionError, Weights
from ptdit_diffusers.core.checkpoint_names import NESTINGS


@pytest.mark.parametrize("kind", ["shared", "cyclic"])
def test_dictionaries_that_hold_each_other_end_soon(tmp_path, kind):
    content: dict = {"a": torch.zeros(2)} if kind == "cyclic" else {"x": 1}
    if kind == "cyclic":
        content["ema"] = content["model"] = content
    for _ in range(12 if kind == "shared" else 0):  # 8 ** 12 ways through them
        content = dict.fromkeys(NESTINGS, content)
    torch.save(content, tmp_path / "a.pt")
    begin = time.process_time()
    if kind == "cyclic":
        assert list(Weights(tmp_path / "a.pt").facts) == ["a"]
    else:
        with pytest.raises(ConversionError, match="holds no weights"):
            Weights(tmp_path / "a.pt")
    assert time.process_time() - begin < 1


@pytest.mark.parametrize("kind", ["sparse", "compressed", "meta", "expanded", "nested"])
def test_a_tensor_that_no_saved_model_has_is_refused(tmp_path, kind):
    plain = torch.ones(2, 3)
    tensor = {
        "sparse": plain.to_sparse,
        "compressed": plain.to_sparse_csr,
        "meta": lambda: plain.to("meta"),
        "expanded": lambda: torch.zeros(1).expand(10**9, 4),
        "nested": lambda: torch.nested.nested_tensor([plain[0], plain[1]]),
    }[kind]()
    torch.save({"proj_out.weight": tensor}, tmp_path / "a.pt")
    message = "of which the file holds fewer" if kind == "expanded" else "proj_out.weight is no plain tensor"
    with pytest.raises(ConversionError, match=message):
        Weights(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "body",
    [
        b"}X\x01\x00\x00\x00aK\x01Qs.",  # a persistent id that is no storage
        b"ctorch\nFloatStorage\n(K\x01t\x81.",  # an object of arguments that do not fit
        b"}\x8d" + (2**40).to_bytes(8, "little") + b"a.",  # a text of 2**40 bytes
        b"0.",  # an empty stack
    ],
)
def test_a_crafted_pickle_is_one_error(tmp_path, body):
    (tmp_path / "a.pt").write_bytes(b"\x80\x02" + body)
    with pytest.raises(ConversionError):
        Weights(tmp_path / "a.pt")


def test_what_is_no_dictionary_is_named(tmp_path):
    (tmp_path / "a.pt").write_bytes(pickle.dumps([1, 2], 2))
    with pytest.raises(ConversionError):
        Weights(tmp_path / "a.pt")
    torch.save([1, 2], tmp_path / "b.pt")
    with pytest.raises(ConversionError, match="holds a list, not named weights"):
        Weights(tmp_path / "b.pt")


@pytest.mark.parametrize(
    "text", ['{"weight_map": {"a": 1}}', "[" * 200_000, "[]", '{"weight_map": {"a": "../b.safetensors"}}']
)
def test_an_index_that_is_none_or_leaves_its_folder_is_refused(tmp_path, text):
    (tmp_path / "x.index.json").write_text(text)
    with pytest.raises(ConversionError, match="not an index of sharded weights|which is not beside it"):
        Weights(tmp_path / "x.index.json")


def test_an_archive_whose_end_names_another_disk_is_damaged(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[content.rindex(b"PK\x06\x07") + 16] = 2  # number of disks
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ConversionError, match="cut off or damaged"):
        Weights(tmp_path / "a.pt")
