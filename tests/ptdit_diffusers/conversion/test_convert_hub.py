"""`ptdit convert` from the Hub, which is a server on this machine: what is fetched, how, and what is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from ptdit_diffusers.cli import main
from ptdit_diffusers.conversion import hub as conversion_hub
from ptdit_diffusers.conversion.hub import HubSource, hub_source
from tests.conftest import word_tokenizer
from tests.hub_server import COMMIT, hub_server
from tests.ptdit_diffusers.conversion.test_convert import SMALL, golden_weights, official_pt, small_t5, small_vae


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> Path:
    """Three repositories like the released ones: a transformer, a VAE among other files, a T5 in a pipeline."""
    place = tmp_path_factory.mktemp("hub")
    for name in ("qihoo/t2x", "vae/plan/vae", "easy/animate", "comfy/encoders"):
        (place / name).mkdir(parents=True)
    official_pt(place / "qihoo" / "t2x" / "model.pt")
    (place / "qihoo" / "t2x" / "README.md").write_text("words")
    weights = {f"module.{name}": value for name, value in small_vae().state_dict().items()}
    torch.save({"ema_state_dict": weights}, place / "vae" / "plan" / "vae" / "checkpoint.ckpt")
    (place / "vae" / "plan" / "other.safetensors").write_bytes(b"never fetched")
    t5 = small_t5()
    t5.save_pretrained(place / "easy" / "animate" / "text_encoder", max_shard_size="10kB")
    (place / "easy" / "animate" / "text_encoder" / "pytorch_model.bin").write_bytes(b"never fetched")
    word_tokenizer().save_pretrained(place / "easy" / "animate" / "tokenizer")
    (place / "easy" / "animate" / "transformer").mkdir()
    (place / "easy" / "animate" / "transformer" / "model.safetensors").write_bytes(b"never fetched")
    single = {name: value.clone() for name, value in t5.state_dict().items() if "embed_tokens" not in name}
    for name, dtype in (("t5xxl_fp16", torch.float16), ("t5xxl_fp8_e4m3fn", torch.float8_e4m3fn)):
        save_file({key: value.to(dtype) for key, value in single.items()},
                  place / "comfy" / "encoders" / f"{name}.safetensors")  # fmt: skip
    return place


@pytest.fixture
def hub(repositories, tmp_path, monkeypatch):
    with hub_server(repositories) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def convert(tmp_path: Path, *words: str) -> int:
    return main(["convert", "--output", str(tmp_path / "model"), *words])


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("qihoo360/Qihoo-T2X", HubSource("qihoo360/Qihoo-T2X", None, "")),
        ("a/b:vae/checkpoint.ckpt", HubSource("a/b", None, "vae/checkpoint.ckpt")),
        ("a/b@v1.0:folder/", HubSource("a/b", "v1.0", "folder")),
        ("a/b@refs/pr/3", HubSource("a/b", "refs/pr/3", "")),
        ("weights/model.pt", None),
        ("./a/b", None),
        ("/a/b", None),
        ("a/b/c", None),
        ("model.pt", None),
        ("C:\\models\\model.pt", None),
        ("C:/models/model.pt", None),
    ],
)
def test_a_name_means_the_hub_or_a_file_of_this_machine(text, source):
    assert hub_source(text) == source


def test_what_is_here_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_source("a/b", "v2") == HubSource("a/b", "v2", "")
    (tmp_path / "a").mkdir()
    assert hub_source("a/b") is None  # a missing file of a folder that is here
    (tmp_path / "a" / "b").mkdir()
    assert hub_source("a/b") is None


def test_a_model_is_converted_from_three_repositories_and_only_what_is_needed_is_fetched(hub, tmp_path, capsys):
    words = [
        "--transformer",
        "qihoo/t2x",
        "--vae",
        "vae/plan@other:vae/checkpoint.ckpt",
        "--text-encoder",
        "easy/animate",
    ]
    assert convert(tmp_path, *words, *SMALL) == 0
    fetched = hub.fetched()
    assert {"model.pt", "vae/checkpoint.ckpt", "text_encoder/config.json", "tokenizer/tokenizer.json"} <= set(fetched)
    assert sum(name.startswith("text_encoder/model-") for name in fetched) > 1  # shards
    unwanted = ("README.md", "other.safetensors", "text_encoder/pytorch_model.bin", "transformer/model.safetensors")
    assert not set(unwanted) & set(fetched)
    assert ("GET", "", "other") in hub.asked
    said = capsys.readouterr().out
    assert f"qihoo/t2x at {COMMIT[:10]}: fetching 1 files" in said and "easy/animate at" in said
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert all(index[name][1] for name in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"))
    written = load_file(tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    original = golden_weights()
    assert all(torch.equal(value, original[name]) for name, value in written.items())

    hub.asked.clear()  # the second time nothing is fetched
    assert convert(tmp_path, *words, *SMALL, "--overwrite") == 0
    assert hub.fetched() == []
    assert "all there in" in capsys.readouterr().out


def test_a_broken_line_goes_on_where_it_stopped(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.cut_after = 50_000
    assert convert(tmp_path, "--transformer", "qihoo/t2x", *SMALL) == 0
    ranges = [asked for method, name, asked in hub.asked if (method, name) == ("GET", "model.pt")]
    assert ranges == [None, "bytes=50000-"]


def test_an_interrupt_while_fetching_keeps_whole_files_and_writes_nothing(hub, tmp_path, capsys, monkeypatch):
    hub.cut_after = 1_000_000  # of the VAE's file only

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    words = ("--transformer", "qihoo/t2x", "--vae", "vae/plan:vae/checkpoint.ckpt", *SMALL)
    with monkeypatch.context() as patch:  # it sleeps before it tries again
        patch.setattr("huggingface_hub.file_download.time.sleep", interrupt)
        with pytest.raises(SystemExit) as end:
            convert(tmp_path, *words)
    assert end.value.code == 130 and "nothing was written" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["cache"]
    hub.asked.clear()
    assert convert(tmp_path, *words) == 0
    assert hub.fetched() == ["vae/checkpoint.ckpt"]


def test_without_a_network_what_was_fetched_earlier_is_used_and_else_it_is_said(hub, tmp_path, capsys, monkeypatch):
    assert convert(tmp_path, "--vae", "vae/plan:vae/checkpoint.ckpt") == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    shutil.rmtree(tmp_path / "model")
    assert convert(tmp_path, "--vae", "vae/plan:vae/checkpoint.ckpt") == 0
    assert "offline, so what was fetched earlier is used" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "model")
    assert convert(tmp_path, "--transformer", "qihoo/t2x") == 2
    assert "was not fetched yet" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["t5xxl_fp16", "t5xxl_fp8_e4m3fn"])
def test_single_files_of_comfyui_are_taken_with_a_tokenizer_from_elsewhere(hub, tmp_path, name):
    words = ["--text-encoder", f"comfy/encoders:{name}.safetensors", "--tokenizer", "easy/animate"]
    assert convert(tmp_path, *words) == 0
    assert hub.fetched()[0] == f"{name}.safetensors" and "tokenizer/tokenizer.json" in hub.fetched()
    assert not any("text_encoder" in fetched for fetched in hub.fetched())

    from transformers import AutoTokenizer, T5EncoderModel

    ids = AutoTokenizer.from_pretrained(tmp_path / "model" / "tokenizer")(
        "a red circle", return_tensors="pt"
    ).input_ids
    t5 = T5EncoderModel.from_pretrained(tmp_path / "model" / "text_encoder", dtype=torch.float32).eval()
    with torch.no_grad():
        error = (t5(ids)[0] - small_t5()(ids)[0]).abs().max()
    assert error < (0.01 if "fp16" in name else 0.5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--transformer", "nobody/nothing"], "no such repository on the Hub"),
        (["--transformer", "qihoo/t2x@v9"], "has no branch, tag or commit v9"),
        (["--transformer", "qihoo/t2x", "--revision", "v8"], "has no branch, tag or commit v8"),
        (["--transformer", "qihoo/t2x:modell.pt"], "has no file modell.pt; nearest: model.pt"),
        (["--vae", "vae/plan"], "several checkpoints; name one as vae/plan:other.safetensors"),
        (["--text-encoder", "qihoo/t2x"], "seems to be a PT-DiT transformer"),
        (["--text-encoder", "comfy/encoders"], "several checkpoints"),
        (["--text-encoder", "easy/animate", "--tokenizer", "qihoo/t2x"], "has no tokenizer"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line_and_nothing_is_written(hub, tmp_path, capsys, words, said):
    assert convert(tmp_path, *words) == 2
    errors = capsys.readouterr().err
    assert said in errors.splitlines()[-1] and errors.splitlines()[-1].startswith("ptdit: ")
    assert not [name for name in os.listdir(tmp_path) if name != "cache"]


def test_a_disk_with_too_little_room_is_refused_before_anything_is_fetched(hub, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(conversion_hub.shutil, "disk_usage", lambda path: usage)
    assert convert(tmp_path, "--transformer", "qihoo/t2x") == 2
    assert "have to be fetched" in capsys.readouterr().err
    assert hub.fetched() == []
