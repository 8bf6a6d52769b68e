"""A judge of style without a network: colors and edges of a picture on white, and a linear classifier over them.

It shares nothing with the other judges, so that what only a network takes for a style shows.
Letters: N pictures, S pixels a side, D features, K styles.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

LEVELS = 4  # of each color channel in the histogram
STEPS = (0, 2, 6, 12, 24, 48, 96, 255 * 2)  # limits of the strength of edges, grey levels
PENALTY = 1e-3  # of the squared weights
ROUNDS = 200  # of L-BFGS at most
WHITE = 240  # from which a channel counts as ground


def style_features(pictures: np.ndarray) -> np.ndarray:
    """Return what shows the style of pictures, bytes (N, S, S, 3): histograms of colors and of edges (N, D)."""
    return np.stack([_features(picture) for picture in pictures])


def _features(picture: np.ndarray) -> np.ndarray:
    thing = (picture < WHITE).any(-1)  # what is not ground
    colors = (picture[thing] // (256 // LEVELS)).astype(int) @ (LEVELS**2, LEVELS, 1)
    grey = picture.astype(np.float32).mean(-1)
    found = [np.bincount(colors, minlength=LEVELS**3) / max(1, len(colors)), [thing.mean()]]
    for width in (1, 2, 4):  # edges, wide ones too: shading changes slowly
        across = np.abs(grey[:, width:] - grey[:, :-width])[thing[:, width:] & thing[:, :-width]]
        down = np.abs(grey[width:] - grey[:-width])[thing[width:] & thing[:-width]]
        strengths = np.concatenate([across, down])
        found.append(np.histogram(strengths, STEPS)[0] / max(1, len(strengths)))
    rows, columns = np.flatnonzero(thing.any(1)), np.flatnonzero(thing.any(0))
    box = [rows[0], rows[-1], columns[0], columns[-1]] if len(rows) else [0, 0, 0, 0]
    found.append(np.array(box) / len(picture))  # sets leave margins of their own
    return np.sqrt(np.concatenate(found)).astype(np.float32)


@dataclass(frozen=True)
class PlainStyle:
    """The classifier.

    Attributes:
        mean, deviation: (D,) of the features of the pictures that it learned from.
        weight, bias: (K, D) and (K,).
    """

    mean: torch.Tensor
    deviation: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def learn(cls, pictures: np.ndarray, styles: np.ndarray) -> "PlainStyle":
        """Return the classifier of pictures, bytes (N, S, S, 3), and the numbers of their styles (N,)."""
        rows, truth = torch.from_numpy(style_features(pictures)), torch.from_numpy(styles)
        mean, deviation = rows.mean(0), rows.std(0) + 1e-3
        rows = (rows - mean) / deviation
        weight = torch.zeros(int(truth.max()) + 1, rows.shape[1], requires_grad=True)
        bias = torch.zeros(len(weight), requires_grad=True)
        search = torch.optim.LBFGS([weight, bias], max_iter=ROUNDS, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            search.zero_grad()
            loss = F.cross_entropy(rows @ weight.T + bias, truth) + PENALTY * weight.square().sum()
            loss.backward()
            return loss

        search.step(closure)
        return cls(mean, deviation, weight.detach(), bias.detach())

    def read(self, pictures: np.ndarray) -> np.ndarray:
        """Return the number of the style of each picture (N,)."""
        rows = (torch.from_numpy(style_features(pictures)) - self.mean) / self.deviation
        return (rows @ self.weight.T + self.bias).argmax(1).numpy()
