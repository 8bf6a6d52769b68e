"""Stock schedulers as DiT's samplers against trajectories of the official code, with its recorded noise."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler

from ptdit_diffusers.core.diffusion import guide_classes, respaced_timesteps
from ptdit_diffusers.pipelines import class_sampling
from ptdit_diffusers.pipelines.class_sampling import Sampler, draw_noise, official_scheduler
from tests.ptdit_diffusers import dit_goldens

LIMIT = 5e-5
GOLDEN = dit_goldens.load("dit_sampler")


@pytest.fixture
def recorded(monkeypatch):
    """Hand out recorded noise, in order, where random numbers would be sampled."""
    queue: list[torch.Tensor] = []

    def next_noise(shape, generator=None, device=None, dtype=None, **_):
        noise = queue.pop(0)
        assert noise.shape == tuple(shape)
        return noise

    monkeypatch.setattr(class_sampling, "randn_tensor", next_noise)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", next_noise)
    return queue


@torch.no_grad()
def run(queue, sampler, steps, noise, scale=1.0, samples=2, eta=0.0, timesteps=None, **changes):
    """Latents of all steps, and the timesteps; every recorded noise is used."""
    transformer, scheduler = dit_goldens.model("dit_sampler"), official_scheduler(sampler)
    scheduler = type(scheduler).from_config(scheduler.config, **changes)
    latents, labels = GOLDEN["z"][:samples], GOLDEN["y"][:samples]
    queue[:] = [*noise]
    sampler, trajectory = Sampler(scheduler, steps, timesteps, eta=eta), [latents]
    for number, timestep in enumerate(sampler.timesteps):
        if scale == 1.0:
            predicted = transformer(latents, timestep, labels).sample
        else:
            both = torch.cat([labels, torch.full_like(labels, 10)])
            predicted = guide_classes(transformer(torch.cat([latents, latents]), timestep, both).sample, scale, 3)
        latents = sampler.step(predicted, number, latents, copies=1 if scale == 1.0 else 2)
        assert latents.dtype == torch.float32
        trajectory.append(latents)
    assert not queue
    return torch.stack(trajectory), sampler.timesteps


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    assert left.shape == right.shape
    return (left - right).abs().max().item()


def unused(steps: int) -> torch.Tensor:
    return torch.zeros(steps, 2, 4, 8, 8)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_guided_runs_follow_the_official_ones_step_by_step(recorded, name):
    latents, timesteps = run(recorded, name, 10, GOLDEN["noise_10"], scale=1.5)
    assert torch.equal(timesteps, GOLDEN[f"{name}10_cfg.t"])
    assert difference(latents, GOLDEN[f"{name}10_cfg.latents"][:, :2]) < LIMIT


def test_ancestral_runs_equal_the_official_ones(recorded):
    noise = GOLDEN["noise_10"][:, :2]
    assert difference(run(recorded, "ddpm", 10, noise)[0], GOLDEN["ddpm10_noguidance.latents"]) < LIMIT
    clipped, _ = run(recorded, "ddpm", 10, noise, clip_sample=True)
    assert difference(clipped[-1], GOLDEN["ddpm10_noguidance_clipped.final"]) < LIMIT
    for steps, name in ((50, "ddpm50_noguidance.noise"), (250, "ddpm250_noguidance.noise_f16")):
        latents, _ = run(recorded, "ddpm", steps, GOLDEN[name].float(), samples=1)
        assert difference(latents[-1], GOLDEN[f"ddpm{steps}_noguidance.final"]) < LIMIT


@pytest.mark.parametrize("steps", [50, 250])
@pytest.mark.parametrize(("name", "changes"), [("ddim", {}), ("ddim_strided", {"timestep_spacing": "linspace"})])
def test_ddim_runs_equal_the_official_ones(recorded, steps, name, changes):
    latents, timesteps = run(recorded, name, steps, unused(steps), **changes)
    assert torch.equal(timesteps, GOLDEN[f"ddim{steps}_noguidance.t"])
    assert difference(latents[-1], GOLDEN[f"ddim{steps}_noguidance.final"]) < LIMIT


@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_with_a_stride_equals_the_official_one(recorded, steps):
    latents, timesteps = run(recorded, "ddim_strided", steps, unused(steps))
    assert timesteps.tolist() == respaced_timesteps(f"ddim{steps}")
    assert difference(latents[-1], GOLDEN[f"ddim{steps}_stride_noguidance.final"]) < LIMIT
    listed, _ = run(recorded, "ddim_strided", 1, unused(steps), timesteps=respaced_timesteps(f"ddim{steps}"))
    assert difference(listed, latents) < LIMIT


def test_ddim_with_noise_equals_the_official_one(recorded):
    noise = GOLDEN["noise_10"][:, :2]
    latents, _ = run(recorded, "ddim_strided", 10, noise, eta=0.7, timestep_spacing="linspace")
    assert difference(latents[-1], GOLDEN["ddim10_eta0.7_noguidance.final"]) < LIMIT


def test_float64_levels_are_what_keeps_the_last_digits(recorded, monkeypatch):
    noise = GOLDEN["ddpm50_noguidance.noise"]
    exact, _ = run(recorded, "ddpm", 50, noise, samples=1)
    monkeypatch.setattr(class_sampling, "use_exact_levels", lambda scheduler: None)
    rounded, _ = run(recorded, "ddpm", 50, noise, samples=1)
    final = GOLDEN["ddpm50_noguidance.final"]
    assert difference(exact[-1], final) < 2e-6 < difference(rounded[-1], final)


def test_other_schedulers_keep_their_own_timesteps():
    for scheduler in (
        EulerDiscreteScheduler(beta_schedule="linear"),
        DDPMScheduler(timestep_spacing="trailing"),
        DDIMScheduler(),
    ):
        own = type(scheduler).from_config(scheduler.config)
        own.set_timesteps(7)
        assert torch.equal(Sampler(scheduler, 7).timesteps, own.timesteps)


def test_noise_of_one_generator_each_is_that_of_single_runs():
    shape, device = (2, 4, 8, 8), torch.device("cpu")
    for copies in (1, 2):
        together = draw_noise(shape, [torch.Generator().manual_seed(seed) for seed in (3, 4)], device, copies)
        for index, seed in enumerate((3, 4)):
            alone = torch.randn(copies, 4, 8, 8, generator=torch.Generator().manual_seed(seed))[:1]
            assert torch.equal(together[index : index + 1], alone)
    doubled = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    assert torch.equal(draw_noise(shape, torch.Generator().manual_seed(5), device, 2), doubled[:2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 1001}, "num_inference_steps=1001 must be at most 1000; nearest: 1000"),
        ({"steps": 1, "timesteps": [1000, 0]}, r"timesteps=\[1000, 0\] must fall strictly within 999 to 0"),
        ({"steps": 1, "timesteps": [5, 5]}, "must fall strictly"),
        ({"steps": 1, "timesteps": []}, "must fall strictly"),
    ],
)
def test_illegal_timesteps_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampler(official_scheduler(), **arguments)


def test_one_step_is_warned_about_and_unknown_samplers_are_named():
    with pytest.warns(UserWarning, match="1 step runs at timestep 0, where the network expects a finished picture"):
        assert Sampler(official_scheduler(), 1).timesteps.tolist() == [0]
    with pytest.raises(ValueError, match="sampler='plms' is unknown; choose one of ddpm, ddim, ddim_strided"):
        official_scheduler("plms")
