"""The LoRAs of few steps that come with the package: whole, in both forms, of its models, and what they draw."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from lora.export import COMFYUI_PREFIX
from lora.paths import noise_levels
from ptdit_diffusers.core.embedded import embedded_model_path
from ptdit_diffusers.core.few_steps import LORA_FILE, embedded_student, read_distillation, student_folders
from ptdit_diffusers.training.base_model import BaseModel
from scripts.evaluation.generate import generate, load_pipeline, to_bytes
from scripts.verifiers.registry import VERIFIERS

STUDENTS = student_folders()
LIMIT = 4_000_000  # bytes of a file


def test_the_models_have_their_students():
    assert [folder.name for folder in STUDENTS] == ["clips-128-4steps", "shapes-128-4steps"]
    assert embedded_student("shapes-128") == STUDENTS[1] / LORA_FILE


@pytest.mark.parametrize("folder", STUDENTS, ids=lambda folder: folder.name)
def test_both_forms_hold_the_same_weights_of_the_named_model_and_are_small(folder):
    base, steps = re.fullmatch(r"(.+)-(\d+)steps", folder.name).groups()
    path, other = folder / LORA_FILE, folder / "comfyui" / f"{folder.name}.safetensors"
    assert all(each.stat().st_size <= LIMIT for each in (path, other))
    facts = read_distillation(path)
    assert facts["base"] == base and facts["steps"] == int(steps) and facts["guidance_scale"] == 1
    assert read_distillation(other) == facts
    with safe_open(path, "pt") as file:
        rank = json.loads(file.metadata()["lora_adapter_metadata"])["transformer.r"]
    ours, theirs = load_file(path), load_file(other)
    assert {key.replace("transformer.", COMFYUI_PREFIX, 1) for key in ours} == set(theirs)
    network = load_file(embedded_model_path(base) / "transformer" / "diffusion_pytorch_model.safetensors")
    for key, value in ours.items():
        assert value.dtype == torch.float16
        assert torch.equal(value, theirs[key.replace("transformer.", COMFYUI_PREFIX, 1)])
        layer, kind = key.removeprefix("transformer.").split(".lora_")
        (out_width, in_width) = network[f"{layer}.weight"].flatten(1).shape
        assert tuple(value.shape) == ((rank, in_width) if kind.startswith("A") else (out_width, rank))


@pytest.mark.parametrize("folder", STUDENTS, ids=lambda folder: folder.name)
def test_the_scheduler_of_the_base_goes_through_the_levels_of_the_training(folder):
    facts = read_distillation(folder / LORA_FILE)
    levels = noise_levels(BaseModel(facts["base"]), facts["steps"], facts["resolution"], facts["num_frames"])
    assert levels == pytest.approx(facts["times"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("folder", STUDENTS, ids=lambda folder: folder.name)
def test_the_code_on_the_card_runs_without_a_warning_of_the_student(folder, tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    save = "last = clip[-1] if 'clip' in globals() else picture\nlast.save('last.png')\n"
    command = [sys.executable, "-W", "error:the LoRA", "-c", block + save]
    subprocess.run(command, check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    with Image.open(tmp_path / "last.png") as last:
        low, high = last.convert("L").getextrema()
    assert last.size == (128, 128) and high - low > 60


@pytest.mark.slow
def test_four_forwards_draw_what_prompts_of_known_combinations_ask_for():
    """24 prompts; 30 guided steps draw two in three without any error."""
    verifier = VERIFIERS["pictures"]
    pipe = load_pipeline("shapes-128")
    pipe.load_lora_weights("shapes-128-4steps")
    tasks = [verifier.task(number, 5, False) for number in range(24)]
    made = generate(pipe, [task.prompt for task in tasks], 0, 24, num_inference_steps=4, guidance_scale=1)
    pictures = [to_bytes(each)[None] for each in made]
    tally = verifier.tally(
        verifier.verify(verifier.request(task), each) for task, each in zip(tasks, pictures, strict=True)
    )
    right, asked = tally["right colours"]
    assert right > 0.85 * asked
    right, asked = tally["everything right"]
    assert right > 0.4 * asked
