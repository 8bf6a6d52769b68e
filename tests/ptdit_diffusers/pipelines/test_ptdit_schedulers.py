"""Which schedulers of diffusers fit, and what the page on schedulers says of them."""

import threading
import warnings
from functools import cache
from pathlib import Path

import diffusers
import pytest
import torch

from ptdit_diffusers import PTDiTPipeline
from ptdit_diffusers.pipelines.ptdit_schedulers import exclusive
from scripts.benchmarks.scheduler_classes import describe, scheduler_classes

PAGE = Path(__file__).resolve().parents[3] / "docs" / "schedulers.md"
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.fixture(scope="module")
def pipe() -> PTDiTPipeline:
    pipe = PTDiTPipeline.from_pretrained("shapes-128")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def classes() -> tuple[type, ...]:
    return tuple(scheduler_classes())


@pytest.mark.slow
def test_the_page_lists_every_class_with_its_result(pipe):
    text = PAGE.read_text(encoding="utf-8")
    for cls in classes():
        assert f"| `{cls.__name__}` | {describe(pipe, cls)} |" in text, (
            "run python -m scripts.benchmarks.scheduler_classes"
        )


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "DEISMultistepScheduler", "EulerDiscreteScheduler"])
def test_a_scheduler_for_another_prediction_is_refused_by_name(pipe, name):
    base, pipe.scheduler = pipe.scheduler, getattr(diffusers, name).from_config(pipe.scheduler.config)
    try:
        with pytest.raises(ValueError, match=name):
            pipe("a red circle", num_inference_steps=2, output_type="latent")
    finally:
        pipe.scheduler = base


def test_options_of_another_class_in_a_configuration_do_not_count(pipe):
    base = pipe.scheduler
    sa_solver = diffusers.SASolverScheduler.from_config(base.config, flow_shift=1.5, **FLOW)
    assert sa_solver.config.shift == 1.0  # of the class it was made from
    pipe.scheduler = sa_solver
    try:
        pipe("a red circle", num_inference_steps=2, output_type="latent")
    finally:
        pipe.scheduler = base


def test_the_noise_of_a_step_comes_from_the_generator(pipe):
    base = pipe.scheduler
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        base.config, algorithm_type="sde-dpmsolver++", **FLOW
    )
    options = {"num_inference_steps": 3, "output_type": "latent"}
    try:
        one, two = (
            pipe("a red circle", generator=torch.Generator().manual_seed(3), **options).images for _ in range(2)
        )
    finally:
        pipe.scheduler = base
    assert torch.equal(one, two)


def test_a_second_call_at_the_same_time_is_refused(pipe):
    failures = []

    def call_again(pipeline, step, timestep, tensors):
        def run() -> None:
            try:
                pipeline("a red circle", num_inference_steps=1)
            except RuntimeError as error:
                failures.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return tensors

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe("a red circle", num_inference_steps=1, output_type="latent", callback_on_step_end=call_again)
    assert len(failures) == 1 and "from_pipe" in failures[0]
    with exclusive(pipe.scheduler, "a copy"):
        pass  # it is free again
