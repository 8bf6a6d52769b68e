"""Embedded models: files that are equal are stored once, and found from every folder that needs them."""

import hashlib
import shutil
from collections import Counter

import pytest
import torch

from ptdit_diffusers.core.embedded import SAME, WEIGHTS, embedded_model_path, weights_folder
from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan


def test_no_weights_are_stored_twice():
    digests = Counter(hashlib.sha256(path.read_bytes()).digest() for path in WEIGHTS.rglob("*.safetensors"))
    assert len(digests) > 9 and set(digests.values()) == {1}


@pytest.mark.parametrize("component", SAME)
def test_a_component_of_another_model_is_found_by_its_own_name(component):
    model, _, part = component.partition("/")
    folder = embedded_model_path(model)
    assert (folder / part / "config.json").read_text() == (WEIGHTS / SAME[component] / "config.json").read_text()
    other = AutoencoderKLOpenSoraPlan.from_pretrained(WEIGHTS / SAME[component])
    for place in ({"subfolder": part}, {}):
        start = folder if place else folder / part
        loaded = AutoencoderKLOpenSoraPlan.from_pretrained(str(start), dtype=torch.float16, **place)
        assert loaded.dtype == torch.float16
        assert all(torch.equal(value, other.state_dict()[name].half()) for name, value in loaded.state_dict().items())


def test_a_copy_elsewhere_is_asked_for_weights_of_its_own(tmp_path):
    copy = shutil.copytree(embedded_model_path("dit-128"), tmp_path / "dit-128")
    assert weights_folder(copy / "vae") == copy / "vae"
    with pytest.raises(OSError, match=r"diffusion_pytorch_model"):
        AutoencoderKLOpenSoraPlan.from_pretrained(copy / "vae")
