"""Calls that ask for more than the machine has: refused in one line with the estimate, in every pipeline."""

import pytest
import torch
from PIL import Image

from ptdit_diffusers import PTDiTImg2ImgPipeline, PTDiTInpaintPipeline, PTDiTModularPipeline, PTDiTPipeline
from ptdit_diffusers.core.cost import Cost
from ptdit_diffusers.pipelines import machine
from ptdit_diffusers.pipelines.machine import Machine, duration, macs_per_second, memory_of
from tests.ptdit_diffusers.class_models import tiny_pipeline

ABSURD = (
    ({"height": 65536, "width": 65536}, r"height=65536, width=65536.*nearest: height=\d+, width=\d+\."),
    ({"num_frames": 1000001}, r"num_frames=1000001, .*nearest: num_frames=\d+\."),
    ({"num_views": 1000001}, r"num_views=1000001, .*nearest: num_views=\d+\."),
    ({"num_images_per_prompt": 10**9}, r"nearest: num_images_per_prompt=\d+"),
    ({"num_inference_steps": 10**12}, r"years; nearest: num_inference_steps=\d+\."),
)
WHITE = Image.new("RGB", (64, 64), "white")


def refused(pipe, match: str, *inputs, **arguments) -> None:
    with pytest.raises(ValueError, match=match) as found:
        pipe(*inputs, **arguments)
    assert "set refuse_large_calls = False" in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize(("arguments", "match"), ABSURD)
def test_absurd_sizes_are_refused_in_one_line(tiny_model_folder, arguments, match):
    pipe = PTDiTPipeline.from_pretrained(tiny_model_folder)
    refused(pipe, match, ["a red star"] * 2, **arguments)
    modular = PTDiTModularPipeline.from_pretrained(tiny_model_folder)
    modular.load_components()
    refused(modular, match, prompt="a red star", **arguments)
    if not {"num_frames", "num_views"} & set(arguments):
        refused(PTDiTImg2ImgPipeline.from_pipe(pipe), match, "a red star", WHITE, **arguments)
        refused(PTDiTInpaintPipeline.from_pipe(pipe), match, "a red star", WHITE, WHITE.convert("L"), **arguments)
        if "num_inference_steps" not in arguments:  # at most 1000 here
            refused(tiny_pipeline(), match, 1, **arguments)


def test_sizes_that_no_float_counts_are_refused(tiny_model_folder):
    pipe = PTDiTPipeline.from_pretrained(tiny_model_folder)
    for name, offset in (("height", 0), ("num_frames", 1)):
        with pytest.raises(ValueError, match=f"{name}=160+{offset} must be at most 10737418.*nearest"):
            pipe("a red star", **{name: 16 * 10**400 + offset})


def test_a_call_is_made_where_the_user_says_so(monkeypatch):
    monkeypatch.setattr(machine, "memory_of", lambda device: 1)
    pipe = tiny_pipeline()
    refused(pipe, "height=64, width=64", 1, num_inference_steps=2)
    pipe.refuse_large_calls = False
    assert pipe(1, num_inference_steps=2).images


def test_weights_on_the_device_leave_less_for_a_call(tiny_model_folder, monkeypatch):
    pipe = PTDiTPipeline.from_pretrained(tiny_model_folder)
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder)
    weights = sum(weight.nbytes for part in parts for weight in part.parameters())
    for more, fits in ((10**8, True), (10**3, False)):
        monkeypatch.setattr(machine, "memory_of", lambda device, more=more: weights + more)
        if fits:
            pipe("a red star", num_inference_steps=1, output_type="latent")
        else:
            refused(pipe, "height=64, width=64", "a red star", num_inference_steps=1)


def test_time_counts_as_well_as_memory(monkeypatch):
    monkeypatch.setattr(machine, "macs_per_second", lambda device, dtype: 10**9)
    here = Machine(torch.device("cpu"), torch.float32, 2**30)
    assert here.can(Cost(10, 10**13)) and not here.can(Cost(10, 10**14)) and not here.can(Cost(2**30, 1))
    assert here.seconds_for(Cost(0, 10**12)) == 0


def test_the_speed_of_this_machine_is_measured():
    assert 10**7 < macs_per_second("cpu", torch.float32, 64) < 10**15


def test_a_container_has_the_memory_of_its_limit(tmp_path, monkeypatch):
    for text, expected in (("max\n", None), ("4096\n", 4096)):
        (tmp_path / "memory.max").write_text(text)
        monkeypatch.setattr(machine, "LIMITS", (str(tmp_path / "none"), str(tmp_path / "memory.max")))
        found = memory_of(torch.device("cpu"))
        assert found == expected if expected else found > 2**28


def test_times_are_said_in_words():
    assert [duration(one) for one in (0, 90, 150, 7200, 4e5, 1e9)] == [
        "some minutes at most", "90 seconds", "2.5 minutes", "2 hours", "4.6 days", "32 years",
    ]  # fmt: skip
