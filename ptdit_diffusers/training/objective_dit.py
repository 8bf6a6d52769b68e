"""Loss of DiT: error of the predicted noise, and the variational bound that trains the learned variance.

All coefficients are formed in float64 on the CPU and used in float32.
"""

import math

import torch
from torch import Tensor

from ptdit_diffusers.core.diffusion import linear_betas, respaced_betas

BIN = 1 / 255  # half the width of a bin of the last step's likelihood, which was made for pixels in [-1, 1]


class NoiseProcess:
    """The forward process with its posterior; timesteps are indices of its own steps.

    Args:
        timesteps: those of 1000 that the process has; None has all. The network is told these, not their indices.
    """

    def __init__(self, timesteps: list[int] | None = None):
        self.timesteps = torch.arange(1000) if timesteps is None else torch.tensor(sorted(timesteps))
        betas = linear_betas() if timesteps is None else respaced_betas(timesteps)
        kept = torch.cumprod(1 - betas, dim=0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
        variance = betas * (1 - before) / (1 - kept)  # of the posterior; 0 at the first step
        exact = {
            "signal": kept.sqrt(),
            "noise": (1 - kept).sqrt(),
            "to_x0": (1 / kept).sqrt(),
            "noise_to_x0": (1 / kept - 1).sqrt(),
            "mean_of_x0": betas * before.sqrt() / (1 - kept),
            "mean_of_xt": (1 - before) * (1 - betas).sqrt() / (1 - kept),
            "log_beta": betas.log(),
            # the first step has no posterior variance and borrows the next one's
            "log_variance": torch.cat([variance[1:2], variance[1:]]).log(),
        }
        self.coefficients = {name: values.float() for name, values in exact.items()}

    def __len__(self) -> int:
        return len(self.timesteps)

    def at(self, name: str, index: Tensor, like: Tensor) -> Tensor:
        """Return a coefficient at steps (B,) in float32, shaped to multiply `like` (B, ...)."""
        values = self.coefficients[name].to(like.device)[index.to(like.device)]
        return values.view(-1, *(1 for _ in range(like.ndim - 1)))

    def add_noise(self, clean: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """Return noisy samples x_t (B, ...) at steps `index` (B,)."""
        return self.at("signal", index, clean) * clean + self.at("noise", index, clean) * noise

    def posterior(self, clean: Tensor, noisy: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of q(x_t-1 | x_t, x_0)."""
        mean = self.at("mean_of_x0", index, noisy) * clean + self.at("mean_of_xt", index, noisy) * noisy
        return mean, self.at("log_variance", index, noisy).expand_as(noisy)

    def predicted(self, noise: Tensor, value: Tensor, noisy: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of the network's p(x_t-1 | x_t).

        Args:
            noise: predicted noise.
            value: predicted v, -1 for the smallest variance and 1 for the largest; it may leave that range.
            noisy: x_t.
            index: steps (B,).
        """
        clean = self.at("to_x0", index, noisy) * noisy - self.at("noise_to_x0", index, noisy) * noise
        mean, smallest = self.posterior(clean, noisy, index)
        share = (value + 1) / 2
        return mean, share * self.at("log_beta", index, noisy) + (1 - share) * smallest


def normal_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """Return KL(first || second) of two normal distributions, elementwise, in nats."""
    return 0.5 * (
        -1
        + other_log_variance
        - log_variance
        + torch.exp(log_variance - other_log_variance)
        + (mean - other_mean) ** 2 * torch.exp(-other_log_variance)
    )


def binned_log_likelihood(clean: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return the log likelihood of `clean` under a normal distribution in bins of +-1/255, elementwise, in nats.

    The outermost bins reach to infinity. It is formed in float32, in which its tails were trained.
    """
    centered, inverse = (clean - mean).float(), torch.exp(-log_scale.float())

    def cdf(value: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    below, above = cdf(inverse * (centered + BIN)), cdf(inverse * (centered - BIN))
    inside = torch.where(clean > 0.999, 1 - above, below - above)
    return torch.where(clean < -0.999, below, inside).clamp(min=1e-12).log()


def variational_bound(process: NoiseProcess, predicted: Tensor, clean: Tensor, noisy: Tensor, index: Tensor) -> Tensor:
    """Return the bound's term of each sample (B,), in bits per element.

    It is a KL divergence, and at the first step a likelihood. The predicted noise gets no gradient from it.

    Args:
        process: the forward process.
        predicted: output of the network (B, 2C, ...): noise, then v.
        clean, noisy: x_0 and x_t (B, C, ...).
        index: steps (B,).
    """
    noise, value = predicted.chunk(2, dim=1)
    mean, log_variance = process.predicted(noise.detach(), value, noisy, index)
    divergence = normal_kl(*process.posterior(clean, noisy, index), mean, log_variance)
    likelihood = -binned_log_likelihood(clean, mean, 0.5 * log_variance)
    first = (index == 0).view(-1, *(1 for _ in range(clean.ndim - 1))).to(clean.device)
    return torch.where(first, likelihood, divergence).flatten(1).mean(dim=1) / math.log(2)


def diffusion_loss(
    process: NoiseProcess,
    predicted: Tensor,
    noise: Tensor,
    clean: Tensor,
    noisy: Tensor,
    index: Tensor,
    max_weight: float = 1.0,
) -> dict[str, Tensor]:
    """Return the terms of the loss of each sample (B,): "mse", with learned variance "vb", and their sum "loss".

    DiT weighs the error of the noise alike at all times, so the times at which a picture gets its shape, where the
    noise is easy to see, count for little. 1 + 1/SNR weighs as the error of the velocity would (arXiv 2202.00512).

    Args:
        process: the forward process.
        predicted: output of the network, (B, C, ...), or (B, 2C, ...) with learned variance.
        noise: the noise that was added.
        clean, noisy: x_0 and x_t (B, C, ...).
        index: steps (B,).
        max_weight: weight of "mse" is 1 + 1/SNR, at most this; 1 weighs all times alike, as DiT does.

    Raises:
        ValueError: the network predicts neither as many channels as there are, nor twice as many.
    """
    channels = clean.shape[1]
    if predicted.shape[1] not in (channels, 2 * channels):
        raise ValueError(
            f"the network predicts {predicted.shape[1]} channels of {channels}; it must be {channels}, "
            f"or with learned variance {2 * channels}."
        )
    weight = (1 / process.at("signal", index, index.to(clean.device)).square()).clamp(max=max_weight)
    terms = {"mse": weight * (noise - predicted[:, :channels]).square().flatten(1).mean(dim=1)}
    if predicted.shape[1] == channels:
        return terms | {"loss": terms["mse"]}
    terms["vb"] = variational_bound(process, predicted, clean, noisy, index)
    return terms | {"loss": terms["mse"] + terms["vb"]}
