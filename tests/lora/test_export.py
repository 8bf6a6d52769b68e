"""What is uploaded: it names no folder of this machine, and no text of the user leaves its place on the card."""

import pytest
import torch
from safetensors import safe_open

from lora.config import LoRASettings
from lora.export import export, in_markdown, public_lora, public_name

WEIGHTS = {"x.lora_A.weight": torch.zeros(2, 4), "x.lora_B.weight": torch.zeros(4, 2)}


def test_no_folder_of_this_machine_is_in_any_file(tmp_path):
    run = tmp_path / "clients" / "run"
    places = {
        name: str(tmp_path / "clients" / name) for name in ("base", "data", "cache_dir", "prior_prompts", "start")
    }
    export(run / "lora", "run", WEIGHTS, LoRASettings(output_dir=str(run), **places), 1, {})
    files = [path for path in (run / "lora").rglob("*") if path.is_file()]
    assert {"README.md", "settings.json", "pytorch_lora_weights.safetensors"} <= {path.name for path in files}
    for path in files:
        for secret in (str(tmp_path), "clients"):
            assert secret.encode() not in path.read_bytes(), path


def test_the_rank_in_the_metadata_and_on_the_card_is_that_of_the_file(tmp_path):
    export(tmp_path / "lora", "run", WEIGHTS, LoRASettings(output_dir="x", rank=1, init="pissa"), 1, {})
    for path in (tmp_path / "lora").rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata()["ss_network_dim"] == file.metadata()["ss_network_alpha"] == "2"
    card = (tmp_path / "lora" / "README.md").read_text(encoding="utf-8")
    assert "1 steps, rank 2 on 1 layers, 16 values. Rank 1 was trained: init `pissa`." in card


@pytest.mark.parametrize(
    ("source", "shown"),
    [("shapes-128", "shapes-128"), ("hub:owner/data", "hub:owner/data"), ("/home/me/base", "base"), ("../x/y", "y")],
)
def test_short_names_and_hub_ids_stay(source, shown):
    assert public_name(source) == shown


@pytest.mark.parametrize(
    "source", ["runs/first/lora", "/home/me/first", "first/lora/pytorch_lora_weights.safetensors"]
)
def test_a_lora_is_named_by_its_run(source):
    assert public_lora(source) == "first" and public_lora("my.safetensors") == "my.safetensors"


def test_text_of_the_user_cannot_leave_its_place_on_the_card(tmp_path):
    trigger = "`a`\n---\n| x |<script>\x1b[2J"
    assert in_markdown(trigger) == "'a' --- \\| x \\|&lt;script> [2J"
    settings = LoRASettings(output_dir=str(tmp_path), trigger=trigger, validation_prompts=(trigger,))
    export(tmp_path / "lora", "run", WEIGHTS, settings, 1, {})
    card = (tmp_path / "lora" / "README.md").read_text(encoding="utf-8")
    assert "<script>" not in card.replace(repr(trigger), "") and "\x1b" not in card
    assert card.count("\n---\n") == 1  # the end of the front matter
