"""DiT's samplers with stock schedulers of diffusers: settings, exact noise levels, timesteps, random numbers.

Everything that belongs to the schedule stays on the CPU. Noise levels are float64 scalars there, so that schedulers
lose no digits; what they multiply, and the products, are float32.
"""

import inspect
import warnings
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from ptdit_diffusers.core.diffusion import OFFICIAL_SCHEDULER, respaced_timesteps

Generators = Generator | list[Generator] | None


def official_scheduler(sampler: str = "ddpm") -> Any:
    """Return a stock scheduler with the settings that give the official sampler's results in `ClassToImagePipeline`.

    Args:
        sampler: "ddpm": ancestral with the learned variance, the official default; "ddim": DDIM on the same timesteps
            (first-order DPM-Solver++ is the same); "ddim_strided": DDIM on timesteps 0, i, 2i, ..., the official
            "ddimN" where N divides 1000.

    Raises:
        ValueError: There is no such sampler; names those that there are.
    """
    if sampler == "ddpm":
        return DDPMScheduler(**OFFICIAL_SCHEDULER)
    if sampler == "ddim":
        return DPMSolverMultistepScheduler(
            beta_schedule="linear", solver_order=1, algorithm_type="dpmsolver++", final_sigmas_type="zero"
        )
    if sampler == "ddim_strided":
        return DDIMScheduler(beta_schedule="linear", clip_sample=False)
    raise ValueError(f"sampler={sampler!r} is unknown; choose one of ddpm, ddim, ddim_strided.")


def draw_noise(shape: tuple[int, ...], generator: Generators, device: torch.device, copies: int = 1) -> Tensor:
    """Return standard normal noise (B, ...) in float32.

    The official code samples `copies` * B members and uses the first B; so does this. With a list of generators it
    happens for each sample by itself, so that the sample equals that of a single run.
    """
    if isinstance(generator, list):
        return torch.cat([draw_noise((1, *shape[1:]), one, device, copies) for one in generator])
    return randn_tensor((copies * shape[0], *shape[1:]), generator, device, torch.float32)[: shape[0]]


class Sampler:
    """A run of a stock scheduler from noise to picture.

    The official timesteps, `respaced_timesteps(steps)`, are taken where the scheduler can follow them: `DDPMScheduler`
    and `DDIMScheduler` with `timestep_spacing="linspace"`, and first-order DPM-Solver. Others make their own.

    Args:
        scheduler: The scheduler. A `DDIMScheduler` is copied for a list of timesteps, which its class cannot follow.
        steps: Number of steps; not used with `timesteps`.
        timesteps: The timesteps themselves, falling.
        generator: One for all samples, one each, or None.
        eta: Share of the noise in DDIM, 0 to 1.

    Attributes:
        timesteps: What the network is told at each step, (N,) on the CPU.

    Raises:
        ValueError: The scheduler takes no timesteps, or they do not fall within those of the training.
    """

    def __init__(
        self,
        scheduler: Any,
        steps: int,
        timesteps: list[int] | None = None,
        generator: Generators = None,
        eta: float = 0.0,
    ):
        self.scheduler, self.generator, self.eta = scheduler, generator, eta
        trained = scheduler.config.num_train_timesteps
        if timesteps is None and steps > trained:
            raise ValueError(f"num_inference_steps={steps} must be at most {trained}; nearest: {trained}.")
        if timesteps is None and follows_official_timesteps(scheduler):
            timesteps = respaced_timesteps(steps, trained)
        use_exact_levels(scheduler)
        if timesteps is None:
            scheduler.set_timesteps(steps, device="cpu")
            self.timesteps = self.of_scheduler = scheduler.timesteps
            return
        self.timesteps = torch.tensor(legal_timesteps(timesteps, trained))
        if len(self.timesteps) == 1 and self.timesteps[0] == 0:
            warnings.warn(
                "1 step runs at timestep 0, where the network expects a finished picture: the result is noise; "
                "take 10 steps or more.",
                stacklevel=3,
            )
        if isinstance(scheduler, DDIMScheduler):
            self.scheduler = respaced(scheduler, self.timesteps.tolist())
            self.of_scheduler = self.scheduler.timesteps
        elif "timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
            scheduler.set_timesteps(timesteps=self.timesteps.tolist(), device="cpu")
            self.of_scheduler = scheduler.timesteps
        else:
            raise ValueError(
                f"{type(scheduler).__name__} makes its own timesteps; use num_inference_steps, or another scheduler "
                'such as official_scheduler("ddim").'
            )

    @property
    def uses_variance(self) -> bool:
        """Whether the scheduler needs the network's learned variance."""
        return isinstance(self.scheduler, DDPMScheduler) and self.scheduler.config.variance_type in (
            "learned",
            "learned_range",
        )

    def scaled(self, latents: Tensor, number: int) -> Tensor:
        """Return what the network gets at step `number`: the latents, which some schedulers scale."""
        scale = getattr(self.scheduler, "scale_model_input", None)
        return latents if scale is None else scale(latents, self.of_scheduler[number])

    def step(self, predicted: Tensor, number: int, latents: Tensor, copies: int) -> Tensor:
        """Return the latents (B, C, ...) after step `number`, in float32.

        Random numbers come in the official order: one draw of `copies` * B members at every step, also where none is
        used.

        Args:
            predicted: Output of the network (B, C, ...), or with learned variance (B, 2C, ...).
            number: Step, 0 first.
            latents: Present latents (B, C, ...).
            copies: 2 with guidance, else 1.
        """
        predicted = predicted if self.uses_variance else predicted[:, : latents.shape[1]]
        timestep = self.of_scheduler[number]
        arguments = predicted, timestep, latents
        if isinstance(self.scheduler, DDPMScheduler):
            return self._ancestral(*arguments, self.generator, copies)
        if isinstance(self.scheduler, DDIMScheduler):
            noise = draw_noise(tuple(latents.shape), self.generator, latents.device, copies)
            return self.scheduler.step(*arguments, self.eta, variance_noise=noise, return_dict=False)[0]
        if follows_official_timesteps(self.scheduler):
            draw_noise(tuple(latents.shape), self.generator, latents.device, copies)
        accepts_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        options = {"generator": self.generator} if accepts_generator else {}
        return self.scheduler.step(*arguments, return_dict=False, **options)[0]

    def _ancestral(
        self, predicted: Tensor, timestep: Tensor, latents: Tensor, generator: Generators, copies: int
    ) -> Tensor:
        """Step with `DDPMScheduler`, which samples the noise itself, of the shape that it is given."""
        if isinstance(generator, list):
            samples = zip(predicted.split(1), latents.split(1), generator, strict=True)
            return torch.cat([self._ancestral(one, timestep, x, own, copies) for one, x, own in samples])
        if timestep == 0:  # the official code samples here, too
            draw_noise(tuple(latents.shape), generator, latents.device, copies)
        predicted, repeated = torch.cat([predicted] * copies), torch.cat([latents] * copies)
        return self.scheduler.step(predicted, timestep, repeated, generator, return_dict=False)[0][: len(latents)]


def follows_official_timesteps(scheduler: Any) -> bool:
    """Return whether a scheduler samples as the official code does on evenly spread timesteps."""
    if isinstance(scheduler, DDPMScheduler | DDIMScheduler):
        return scheduler.config.timestep_spacing == "linspace"
    return isinstance(scheduler, DPMSolverMultistepScheduler) and scheduler.config.solver_order == 1


def use_exact_levels(scheduler: Any) -> None:
    """Give a scheduler float64 products in `alphas_cumprod`, where 1 - A loses digits in the float32 of diffusers.

    Schedulers other than the three of `official_scheduler`, and other schedules than the linear one, stay as they are.
    """
    if isinstance(scheduler, DDPMScheduler | DDIMScheduler | DPMSolverMultistepScheduler):
        config = scheduler.config
        plain = config.trained_betas is None and not config.get("rescale_betas_zero_snr")
        if config.beta_schedule == "linear" and plain:
            scheduler.alphas_cumprod = exact_levels(scheduler)


def exact_levels(scheduler: Any) -> Tensor:
    """Return `alphas_cumprod` of a scheduler's linear schedule in float64."""
    config = scheduler.config
    betas = torch.linspace(config.beta_start, config.beta_end, config.num_train_timesteps, dtype=torch.float64)
    return torch.cumprod(1 - betas, dim=0)


def respaced(scheduler: DDIMScheduler, timesteps: list[int]) -> DDIMScheduler:
    """Return a stock scheduler for the process that only has these timesteps; its own are their indices.

    `DDIMScheduler` takes t - 1000 // N for the timestep before t. Among the indices that is the next of the list.
    """
    kept = scheduler.alphas_cumprod[timesteps[::-1]].double()
    before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    count = len(timesteps)
    made = DDIMScheduler.from_config(
        scheduler.config,
        trained_betas=(1 - kept / before).tolist(),
        num_train_timesteps=count,
        timestep_spacing="leading",
        steps_offset=0,
    )
    made.alphas_cumprod = kept
    made.set_timesteps(count, device="cpu")
    return made


def legal_timesteps(timesteps: list[int], trained: int) -> list[int]:
    """Return timesteps as integers.

    Raises:
        ValueError: They do not fall strictly, or lie outside those of the training.
    """
    timesteps = [*map(int, timesteps)]
    falls = all(later < earlier for earlier, later in zip(timesteps, timesteps[1:], strict=False))
    if not timesteps or not falls or timesteps[0] >= trained or timesteps[-1] < 0:
        raise ValueError(f"timesteps={timesteps} must fall strictly within {trained - 1} to 0, e.g. [999, 500, 0].")
    return timesteps
