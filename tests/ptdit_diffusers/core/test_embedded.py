"""Short names of the models that come with the package."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ptdit_diffusers.core import embedded as ptdit_embedded
from ptdit_diffusers.core import few_steps
from ptdit_diffusers.core.embedded import embedded_model_path, resolve_model
from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline
from ptdit_diffusers.pipelines.ptdit_lora import PTDiTLoraLoaderMixin


@pytest.fixture
def tiny_is_embedded(tiny_model_folder, monkeypatch) -> Path:
    monkeypatch.setattr(ptdit_embedded, "WEIGHTS", tiny_model_folder.parent)
    return tiny_model_folder


def test_a_short_name_loads_the_model_of_the_package(tiny_is_embedded):
    assert embedded_model_path("tiny") == tiny_is_embedded
    assert PTDiTPipeline.from_pretrained("tiny").default_size() == (64, 64)


def test_a_local_folder_of_that_name_goes_first(tiny_is_embedded, tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("tiny") == "tiny"


@pytest.mark.parametrize("name", ["owner/model", "some/folder", "C:\\models\\mine"])
def test_paths_and_hub_ids_are_left_alone(tiny_is_embedded, name):
    assert resolve_model(name) == name
    assert resolve_model(Path("tiny")) == "tiny"


def test_an_unknown_name_is_an_error_that_lists_the_known_ones(tiny_is_embedded):
    with pytest.raises(ValueError, match="'shapes' is neither a folder nor a model.*: tiny"):
        PTDiTPipeline.from_pretrained("shapes")


def test_a_package_without_weights_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(ptdit_embedded, "WEIGHTS", tmp_path)
    with pytest.raises(ValueError, match="none is installed"):
        embedded_model_path("shapes-128")


def test_a_lora_of_few_steps_loads_by_its_short_name(tmp_path, monkeypatch):
    folder = tmp_path / "weights" / "tiny-4steps"
    folder.mkdir(parents=True)
    weights = {
        "transformer.proj_out.lora_A.weight": torch.ones(2, 4),
        "transformer.proj_out.lora_B.weight": torch.ones(4, 2),
    }
    save_file(weights, folder / few_steps.LORA_FILE)
    monkeypatch.setattr(few_steps, "WEIGHTS", folder.parent)
    assert few_steps.student_folders() == [folder] and few_steps.embedded_students() == ["tiny"]
    assert PTDiTLoraLoaderMixin.lora_state_dict("tiny-4steps").keys() == weights.keys()
    assert few_steps.resolve_student("owner/model") == "owner/model"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-4steps").mkdir()  # a local folder goes first
    assert few_steps.resolve_student("tiny-4steps") == "tiny-4steps"
