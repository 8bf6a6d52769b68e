"""A judge as a file, and what it says of pictures.

Letters: N pictures, S pixels a side, K concepts.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from scripts.verifiers.emoji.networks import CONCEPT_SIZE, STYLE_SIZE, ConceptNetwork, StyleNetwork

TOGETHER = 128  # pictures at once


@dataclass(frozen=True)
class Reading:
    """What a judge says of N pictures.

    Attributes:
        concepts: (N, 5) numbers of the likeliest concepts.
        styles, tones: (N,) numbers.
        embeddings: (N, 256) unit vectors.
        features: (N, 512), for distances between sets of pictures.
    """

    concepts: np.ndarray
    styles: np.ndarray
    tones: np.ndarray
    embeddings: np.ndarray
    features: np.ndarray


class Judge:
    """Names concept, style and tone.

    Args:
        concepts: Codes of the concepts.
        concept_network, style_network: Trained.
    """

    def __init__(self, concepts: Sequence[str], concept_network: ConceptNetwork, style_network: StyleNetwork) -> None:
        self.concepts = list(concepts)
        self.concept_network, self.style_network = concept_network.eval(), style_network.eval()

    @torch.no_grad()
    def read(self, pictures: np.ndarray) -> Reading:
        """Return what the pictures, bytes (N, S, S, 3), show."""
        found = [self._read_some(part) for part in torch.from_numpy(pictures).split(TOGETHER)]
        return Reading(*(torch.cat(values).numpy() for values in zip(*found, strict=True)))

    def _read_some(self, pictures: Tensor) -> tuple[Tensor, ...]:
        pixels = pictures.permute(0, 3, 1, 2).float() / 255
        network = self.concept_network
        features = network.features(F.adaptive_avg_pool2d(pixels, CONCEPT_SIZE))
        embeddings = network.embedding(features)
        best = (embeddings @ F.normalize(network.concepts, dim=1).T).topk(5, 1).indices
        style, tone = self.style_network(F.adaptive_avg_pool2d(pixels, STYLE_SIZE))
        return best, style.argmax(1), tone.argmax(1), embeddings, features

    def save(self, path: Path) -> None:
        """Write the judge in half precision, with the concepts in the file's head."""
        networks = {"concept": self.concept_network, "style": self.style_network}
        values = {
            f"{name}.{key}": value.half().contiguous() if value.is_floating_point() else value
            for name, network in networks.items()
            for key, value in network.state_dict().items()
        }
        head = {"concepts": json.dumps(self.concepts), "shape": self.concept_network.shape}
        part = path.with_name(f"{path.name}.part")
        save_file(values, part, metadata=head)
        part.replace(path)


def load_judge(path: Path) -> Judge:
    """Return the judge of a file.

    Raises:
        ValueError: There is none.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; train it with: python -m scripts.emoji judge {path.parent}")
    with safe_open(path, framework="pt") as file:
        head, values = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    concepts = json.loads(head["concepts"])
    networks = {"concept": ConceptNetwork(len(concepts), head["shape"]), "style": StyleNetwork()}
    for name, network in networks.items():
        own = {key.removeprefix(f"{name}."): value for key, value in values.items() if key.startswith(f"{name}.")}
        network.load_state_dict({key: v.float() if v.is_floating_point() else v for key, v in own.items()})
    return Judge(concepts, networks["concept"], networks["style"])
