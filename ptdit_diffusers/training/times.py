"""At which times a denoiser is trained: a distribution as settings name it."""

from dataclasses import dataclass, fields
from typing import Any

from ptdit_diffusers.training.settings import one_of

KINDS = ("logit_normal", "uniform", "mode")


@dataclass(frozen=True, kw_only=True)
class Times:
    """The distribution of training times; 0 is a clean sample, 1000 is noise."""

    timestep_sampling: str = "logit_normal"  # or uniform, or mode (Eq. 20 of arXiv 2403.03206)
    mode_scale: float = 1.29  # of mode: above 0 more times in the middle; -1..1.75
    min_timestep: float = 0.0  # times, after the shift of the resolution, are scaled to this..max_timestep; 0..1000
    max_timestep: float = 1000.0
    time_mean: float = 0.0  # logit_normal times are sigmoids of a normal distribution: its mean
    time_std: float = 1.0  # its standard deviation

    def __post_init__(self) -> None:
        """Raise ValueError naming the first illegal value."""
        one_of("timestep_sampling", kind := self.timestep_sampling, KINDS)
        if self.time_std <= 0:
            raise ValueError(f"time_std={self.time_std} must be above 0, for example 1.")
        if not -1 <= self.mode_scale <= 1.75:
            near = -1 if self.mode_scale < -1 else 1.75
            raise ValueError(f"mode_scale={self.mode_scale:g} must be in -1..1.75; nearest: {near}.")
        if not 0 <= self.min_timestep < self.max_timestep <= 1000:
            raise ValueError(
                f"min_timestep={self.min_timestep:g} and max_timestep={self.max_timestep:g} are no range in 0..1000; "
                f"nearest: {min(max(self.min_timestep, 0), 999):g} and 1000."
            )
        if kind != "logit_normal" and (self.time_mean, self.time_std) != (0, 1):
            raise ValueError(
                f"time_mean and time_std are for timestep_sampling='logit_normal', not {kind!r}; nearest: 0 and 1."
            )
        if kind != "mode" and self.mode_scale != Times.mode_scale:
            raise ValueError(
                f"mode_scale={self.mode_scale:g} is for timestep_sampling='mode', not {kind!r}; nearest: "
                f"{Times.mode_scale}."
            )

    @classmethod
    def of(cls, settings: Any) -> "Times":
        """Return the distribution that settings of the same names ask for.

        Raises:
            ValueError: It is not possible.
        """
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    def distribution(self, shift: float) -> dict[str, Any]:
        """Return the arguments of `sample_times` and `shifted_times`; `shift` is that of the resolution."""
        return {
            "mean": self.time_mean,
            "std": self.time_std,
            "shift": shift,
            "kind": self.timestep_sampling,
            "mode_scale": self.mode_scale,
            "low": self.min_timestep / 1000,
            "high": self.max_timestep / 1000,
        }
