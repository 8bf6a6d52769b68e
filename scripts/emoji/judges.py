"""Where data and judges meet: true pictures as the judges are trained on them, and the training in two parts."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from scripts.datasets.emoji.pictures import Picture, load, read_index, style_numbers
from scripts.datasets.emoji.split import read_split
from scripts.verifiers.emoji.judge import Judge
from scripts.verifiers.emoji.networks import CONCEPT_SIZE, ConceptNetwork, StyleNetwork
from scripts.verifiers.emoji.training import (
    MILD,
    NO_COLORS,
    STRONG,
    Truth,
    concept_loss,
    concept_scores,
    style_loss,
    style_scores,
    train,
)

SECOND_PART = 0.6  # samples of it, as a share of those of the first
STYLE_SAMPLES = 0.75  # of the network of styles, likewise


def concept_codes(pictures: Sequence[Picture]) -> list[str]:
    """Return the concepts that all sets have; their order numbers them."""
    return sorted({each.emoji.base for each in pictures if each.everywhere})


def true_pictures(folder: Path, pictures: Sequence[Picture], codes: Sequence[str]) -> Truth:
    """Return pictures as judges are trained on them."""
    number = {code: index for index, code in enumerate(codes)}
    values = np.stack([premultiplied(load(folder, each)) for each in pictures])
    return Truth(
        torch.from_numpy(values).permute(0, 3, 1, 2).contiguous(),
        torch.tensor([number[each.emoji.base] for each in pictures]),
        torch.from_numpy(style_numbers(pictures)),
        torch.tensor([each.emoji.tone for each in pictures]),
    )


def premultiplied(pixels: np.ndarray) -> np.ndarray:
    """Return RGBA bytes with colors times alpha."""
    alpha = pixels[..., 3:].astype(np.uint16)
    return np.concatenate([(pixels[..., :3] * alpha + 127) // 255, alpha], -1).astype(np.uint8)


def make_judge(folder: Path, shape: str, samples: int, seed: int, say: Callable[[str], None]) -> Path:
    """Train a judge and return its file.

    First without the held-out pairs and without tones of skin, to see how well it reads drawings that it never saw;
    then with all pictures.

    Raises:
        ValueError: The pictures are not drawn.
    """
    everything = [each for each in read_index(folder) if each.everywhere]
    codes, split = concept_codes(everything), read_split()
    plain = [each for each in everything if not each.emoji.tone]
    truth = true_pictures(folder, plain, codes).smaller(CONCEPT_SIZE)
    hidden = torch.tensor([split.kind(each) == "pairs" for each in plain])
    torch.manual_seed(seed)
    network = ConceptNetwork(len(codes), shape)
    say(f"{len(codes)} concepts, {sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters ({shape})")
    train(network, truth.part(~hidden), concept_loss(network), STRONG, samples, 2e-3, seed, say)
    say("held-out pairs, never seen: concept {:.1%}, among the first five {:.1%}".format(
        *concept_scores(network, truth.part(hidden))
    ))  # fmt: skip
    truth = true_pictures(folder, everything, codes)
    small = truth.smaller(CONCEPT_SIZE)
    train(network, small, concept_loss(network), MILD, int(samples * SECOND_PART), 1e-3, seed + 1, say)
    say("all true pictures: concept {:.1%}, among the first five {:.1%}".format(*concept_scores(network, small)))
    style = StyleNetwork()
    train(style, truth, style_loss(style), NO_COLORS, int(samples * STYLE_SAMPLES), 2e-3, seed + 2, say)
    say("all true pictures: style {:.1%}, tone of the skin {:.1%}".format(*style_scores(style, truth)))
    path = judge_path(folder, shape)
    Judge(codes, network, style).save(path)
    say(f"{path}, {path.stat().st_size / 1e6:.1f} MB")
    return path


def judge_path(folder: Path, shape: str) -> Path:
    """Return where the judge of a shape lies."""
    return folder / f"judge-{shape}.safetensors"
