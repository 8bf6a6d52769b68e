"""Samples of a model: each depends on its prompt and its seed, whatever the batch."""

import numpy as np
import torch

from ptdit_diffusers import DiffiTImagePipeline
from scripts.evaluation.generate import generate, load_pipeline, to_bytes
from tests.ptdit_diffusers.class_models import tiny_folder
from tests.ptdit_diffusers.pipelines.test_pipeline_diffit_image import tiny_pipeline as tiny_image_pipeline

PROMPTS = ["a red star", "a blue ring", "a green heart"]


def test_a_sample_depends_on_its_seed_and_not_on_the_batch(tiny_model_folder, capsys):
    pipe = load_pipeline(tiny_model_folder)
    one = {"num_inference_steps": 1, "output_type": "latent"}
    at_once = list(generate(pipe, PROMPTS, seed=5, **one))
    in_batches = list(generate(pipe, PROMPTS, seed=5, batch=2, **one))
    direct = pipe(PROMPTS[2], generator=torch.Generator().manual_seed(7), **one).images[0]
    for first, second in zip(at_once, in_batches, strict=True):
        assert torch.allclose(first, second, atol=1e-5)
    assert torch.allclose(at_once[2], direct, atol=1e-5) and not torch.allclose(at_once[0], at_once[1])
    assert capsys.readouterr().err.splitlines()[-2:] == ["2 of 3 samples", "3 of 3 samples"]


def test_pictures_clips_and_views_come_as_arrays(tiny_model_folder):
    pipe = load_pipeline(tiny_model_folder)
    size = {"num_inference_steps": 1, "height": 32, "width": 32}
    for extra, shape in (({}, ()), ({"num_frames": 5}, (5,)), ({"num_views": 2}, (2,))):
        (sample,) = generate(pipe, PROMPTS[:1], **size, **extra)
        assert sample.shape == (*shape, 32, 32, 3) and to_bytes(sample).dtype == np.uint8
    assert to_bytes(np.array([0.0, 0.5, 1.0])).tolist() == [0, 128, 255]


def test_models_of_classes_load_with_their_own_pipeline(tmp_path):
    folder = tiny_folder(tmp_path / "pixels", tiny_image_pipeline)
    pipe = load_pipeline(folder)
    samples = list(generate(pipe, ["red star", "blue disk"], batch=1, num_inference_steps=2, guidance_scale=1.5))
    assert type(pipe) is DiffiTImagePipeline and [sample.shape for sample in samples] == [(8, 8, 3)] * 2
