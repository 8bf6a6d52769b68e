"""Training of the judges on true pictures, disturbed so that they also read pictures that are not perfect."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.verifiers.emoji.networks import ConceptNetwork, StyleNetwork

BATCH = 64
WARMUP = 100  # steps


@dataclass(frozen=True)
class Truth:
    """True pictures and what they show.

    Attributes:
        pictures: (N, 4, S, S) uint8, color times alpha, and alpha.
        concepts, styles, tones: (N,) numbers.
    """

    pictures: Tensor
    concepts: Tensor
    styles: Tensor
    tones: Tensor

    def part(self, chosen: Tensor) -> "Truth":
        """Return those that a mask or numbers choose."""
        return Truth(self.pictures[chosen], self.concepts[chosen], self.styles[chosen], self.tones[chosen])

    def smaller(self, size: int) -> "Truth":
        """Return them with `size` pixels a side."""
        parts = [F.adaptive_avg_pool2d(part.float(), size).round().byte() for part in self.pictures.split(256)]
        return Truth(torch.cat(parts), self.concepts, self.styles, self.tones)


@dataclass(frozen=True)
class Disturbance:
    """How much pictures are changed: strengths from 0."""

    color: float  # of mixing the color channels
    turn: float = 0.2  # radians at most
    scale: float = 0.2
    shift: float = 0.12  # of the side
    noise: float = 0.06  # standard deviation at most, colors are 0 to 1


STRONG, MILD, NO_COLORS = Disturbance(0.25), Disturbance(0.08), Disturbance(0.0, noise=0.04)


def disturbed(pictures: Tensor, how: Disturbance, generator: torch.Generator) -> Tensor:
    """Return pictures (B, 4, S, S) uint8 on random grounds, half of them white, disturbed: (B, 3, S, S) in 0..1."""
    count, _, size, _ = pictures.shape

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * 2 - 1

    turn, scale = uniform(count) * how.turn, 1 + uniform(count) * how.scale
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = turn.cos() / scale
    matrix[:, 0, 1], matrix[:, 1, 0] = -turn.sin() / scale, turn.sin() / scale
    matrix[:, :, 2] = uniform(count, 2) * how.shift * 2
    grid = F.affine_grid(matrix, [count, 4, size, size], align_corners=False)
    moved = F.grid_sample(pictures.float() / 255, grid, align_corners=False)
    ground = torch.where(uniform(count, 1, 1, 1) > 0, torch.ones(()), (uniform(count, 3, 1, 1) + 1) / 2)
    pixels = moved[:, :3] + (1 - moved[:, 3:]) * ground
    if how.color:
        mix = torch.eye(3) + how.color * torch.randn(count, 3, 3, generator=generator) / 2
        center = pixels.mean((2, 3), keepdim=True)
        pixels = torch.einsum("bij,bjhw->bihw", mix, pixels - center) + center * (
            1 + how.color * uniform(count, 1, 1, 1)
        )
    soft = F.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False)
    pixels = pixels.lerp(soft, (uniform(count, 1, 1, 1) * 2).clamp(0, 1))  # half of them, more or less
    noise = torch.randn(pixels.shape, generator=generator) * how.noise * (uniform(count, 1, 1, 1)).clamp(min=0)
    return (pixels + noise).clamp(0, 1)


def on_white(pictures: Tensor) -> Tensor:
    """Return pictures (B, 4, S, S) uint8 on white: (B, 3, S, S) in 0..1."""
    values = pictures.float() / 255
    return values[:, :3] + 1 - values[:, 3:]


def train(
    network: torch.nn.Module,
    truth: Truth,
    loss: Callable[[Tensor, Truth], tuple[Tensor, float]],
    how: Disturbance,
    samples: int,
    rate: float,
    seed: int,
    say: Callable[[str], None],
) -> None:
    """Train a network in place, by AdamW with a rate that falls to 0.

    Args:
        network: A judge.
        truth: What it learns, of its own size.
        loss: (pixels, truth of the batch) -> loss and a share of right answers.
        how: Disturbance of the pictures.
        samples: How many it sees.
        rate: Highest learning rate.
        seed: Of the order and the disturbances.
        say: Gets a line now and then.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.05)
    steps, order, right = max(1, samples // BATCH), torch.zeros(0, dtype=torch.long), 0.0
    network.train().to(memory_format=torch.channels_last)  # a fifth faster on a CPU
    for step in range(steps):
        if len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(truth.concepts), generator=generator)])
        part, order = truth.part(order[:BATCH]), order[BATCH:]
        pixels = disturbed(part.pictures, how, generator).contiguous(memory_format=torch.channels_last)
        value, share = loss(pixels, part)
        optimizer.zero_grad()
        value.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.step()
        right += (share - right) * max(0.02, 1 / (step + 1))
        if step % 500 == 499 or step == steps - 1:
            say(f"step {step + 1} of {steps}: {100 * right:.1f} % right on disturbed pictures")
    network.eval()


def concept_loss(network: ConceptNetwork) -> Callable[[Tensor, Truth], tuple[Tensor, float]]:
    """Return the loss of the concept, and the share of right concepts."""

    def loss(pixels: Tensor, truth: Truth) -> tuple[Tensor, float]:
        logits = network(pixels)
        right = (logits.argmax(1) == truth.concepts).float().mean().item()
        return F.cross_entropy(logits, truth.concepts, label_smoothing=0.05), right

    return loss


def style_loss(network: StyleNetwork) -> Callable[[Tensor, Truth], tuple[Tensor, float]]:
    """Return the loss of style and tone, and the share of pictures with both right."""

    def loss(pixels: Tensor, truth: Truth) -> tuple[Tensor, float]:
        style, tone = network(pixels)
        right = (style.argmax(1) == truth.styles) & (tone.argmax(1) == truth.tones)
        value = F.cross_entropy(style, truth.styles) + F.cross_entropy(tone, truth.tones)
        return value, right.float().mean().item()

    return loss


@torch.no_grad()
def concept_scores(network: ConceptNetwork, truth: Truth) -> tuple[float, float]:
    """Return how often the concept of true pictures on white is right, first and among the first five."""
    first = five = 0
    for numbers in torch.arange(len(truth.concepts)).split(256):
        part = truth.part(numbers)
        best = network(on_white(part.pictures)).topk(5, 1).indices == part.concepts[:, None]
        first, five = first + int(best[:, 0].sum()), five + int(best.any(1).sum())
    return first / len(truth.concepts), five / len(truth.concepts)


@torch.no_grad()
def style_scores(network: StyleNetwork, truth: Truth) -> tuple[float, float]:
    """Return how often style and tone of true pictures on white are right."""
    style = tone = 0
    for numbers in torch.arange(len(truth.styles)).split(128):
        part = truth.part(numbers)
        found = network(on_white(part.pictures))
        style += int((found[0].argmax(1) == part.styles).sum())
        tone += int((found[1].argmax(1) == part.tones).sum())
    return style / len(truth.styles), tone / len(truth.styles)
