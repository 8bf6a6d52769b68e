"""Short names of the models that come with the package."""

from pathlib import Path

import pytest

from ptdit_diffusers.core import embedded as ptdit_embedded
from ptdit_diffusers.core.embedded import embedded_model_path, resolve_model
from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline


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
