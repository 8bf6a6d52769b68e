"""The judges of emoji: what they learn, their files, and the numbers made of what they say."""

import numpy as np
import pytest
import torch

from scripts.verifiers.emoji import training
from scripts.verifiers.emoji.judge import Judge, Reading, load_judge
from scripts.verifiers.emoji.networks import CONCEPT_SIZE, PLAIN, ConceptNetwork, StyleNetwork
from scripts.verifiers.emoji.plain_style import PlainStyle
from scripts.verifiers.emoji.scores import (
    Asked,
    concept_credit,
    frechet_distance,
    ground_color,
    kernel_distance,
    nearest,
    shares,
    small,
)
from scripts.verifiers.emoji.training import (
    MILD,
    NO_COLORS,
    Truth,
    concept_loss,
    concept_scores,
    disturbed,
    on_white,
    train,
)


def halves() -> Truth:
    """Six pictures: the upper half, or all of it, in one of three colors; transparent elsewhere."""
    pictures = torch.zeros(6, 4, CONCEPT_SIZE, CONCEPT_SIZE, dtype=torch.uint8)
    for number in range(6):
        part = pictures[number, :, : CONCEPT_SIZE // (1 + number // 3)]
        part[3], part[number % 3] = 255, 220
    numbers = torch.arange(6)
    return Truth(pictures, numbers, numbers % 4, numbers)


def test_a_judge_learns_and_reads_the_same_from_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "BATCH", 6)
    monkeypatch.setattr(training, "WARMUP", 2)
    torch.manual_seed(0)
    network, truth = ConceptNetwork(6, PLAIN), halves()
    train(network, truth, concept_loss(network), MILD, 6 * 20, 2e-3, 0, lambda text: None)
    assert concept_scores(network, truth) == (1, 1)
    judge = Judge([f"c{number}" for number in range(6)], network, StyleNetwork())
    pictures = (on_white(truth.pictures) * 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    judge.save(tmp_path / "judge.safetensors")
    again = load_judge(tmp_path / "judge.safetensors")
    assert again.concepts == judge.concepts
    first, second = judge.read(pictures), again.read(pictures)
    assert (first.concepts[:, 0] == np.arange(6)).all() and (first.concepts[:, 0] == second.concepts[:, 0]).all()
    assert np.allclose(first.embeddings, second.embeddings, atol=1e-2)  # half precision


def test_disturbances_keep_white_and_colors_where_they_are_told_to():
    generator = torch.Generator().manual_seed(0)
    found = disturbed(halves().pictures[3:].repeat(20, 1, 1, 1), NO_COLORS, generator)
    assert found.shape == (60, 3, CONCEPT_SIZE, CONCEPT_SIZE) and 0 <= found.min() and found.max() <= 1
    white = (found[:, :, -1, CONCEPT_SIZE // 2] > 0.8).all(1).float().mean()
    assert 0.3 < white < 0.8


def test_a_missing_judge_is_named(tmp_path):
    with pytest.raises(ValueError, match="python -m scripts.emoji judge"):
        load_judge(tmp_path / "judge.safetensors")


def reading(concepts: list[list[int]], styles: list[int], tones: list[int]) -> Reading:
    empty = np.zeros((len(concepts), 1))
    return Reading(np.array(concepts), np.array(styles), np.array(tones), empty, empty)


def test_a_twin_counts_half_and_right_means_first():
    found = reading([[0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [5, 2, 1, 3, 4], [6, 7, 8, 9, 5]], [0, 1, 2, 0], [0, 0, 0, 0])
    asked = Asked(np.array([0, 0, 2, 0]), np.array([0, 1, 2, 3]), np.zeros(4, int))
    twins = np.array([0, 0, 2, 3, 4, 5, 6, 7, 8, 9])  # 0 and 1 are near-duplicates
    first, five = concept_credit(found, asked, twins)
    assert first.tolist() == [1, 0.5, 0, 0] and five.tolist() == [1, 1, 1, 0]
    rows = shares(found, asked, twins)
    assert rows == {"concept": 0.375, "concept_5": 0.75, "style": 0.75, "both": 0.375}


def test_tones_and_grounds_are_counted_where_they_are_asked():
    found = reading([[0, 1, 2, 3, 4]] * 2, [0, 0], [2, 4])
    asked = Asked(np.array([0, 0]), np.array([0, 0]), np.array([2, 2]))
    rows = shares(found, asked, np.arange(5), np.array([True, False]))
    assert rows["tone"] == rows["concept_tone"] == rows["ground"] == rows["all"] == 0.5


def test_distances_are_those_of_the_nearest_and_vanish_between_equal_sets():
    rows = np.array([[0.0, 0.0], [1.0, 1.0]], np.float32)
    best, distance = nearest(rows, np.array([[1.0, 0.0], [0.0, 0.2]], np.float32))
    assert best.tolist() == [1, 0] and np.allclose(distance, [0.2, 1])
    choice = np.random.default_rng(0)
    one, other = choice.normal(size=(300, 16)), choice.normal(size=(300, 16)) + 0.5
    near, far = kernel_distance(one[::2], one[1::2])[0], kernel_distance(one, other)[0]
    assert abs(near) < 0.05 * far
    assert abs(frechet_distance(one, one)) < 1e-6 and np.isclose(frechet_distance(one, one + 0.5), 16 * 0.25)
    wider = frechet_distance(one, 2 * one - one.mean(0))  # the square root of the covariance grows by itself
    assert np.isclose(wider, np.trace(np.cov(one, rowvar=False)))


def test_the_ground_is_the_color_of_the_border_and_pixels_are_compared_by_root_mean_squares():
    pictures = np.full((1, 64, 64, 3), (66, 122, 214), np.uint8)
    pictures[:, 10:50, 10:50] = 0
    assert ground_color(pictures)[0].tolist() == [66, 122, 214]
    gray = small(np.stack([np.full((64, 64, 3), value, np.uint8) for value in (0, 51)]))
    assert np.isclose(np.linalg.norm(gray[0] - gray[1]), 0.2)


def test_colors_and_edges_alone_tell_flat_drawings_from_shaded_ones_and_do_not_see_the_ground():
    choice = np.random.default_rng(0)

    def disc(shaded: bool, ground: int = 255) -> np.ndarray:
        picture = np.full((64, 64, 3), ground, np.uint8)
        y, x = np.mgrid[:64, :64] - choice.integers(24, 40, (2, 1, 1))
        light = (y + 32)[..., None] / 64 if shaded else 1
        inside = x**2 + y**2 < choice.integers(8, 16) ** 2
        return np.where(inside[..., None], choice.integers(60, 200, 3) * light, picture).astype(np.uint8)

    styles = np.arange(80) % 2
    pictures = np.stack([disc(bool(style)) for style in styles])
    judge = PlainStyle.learn(pictures[:60], styles[:60])
    assert (judge.read(pictures[60:]) == styles[60:]).mean() >= 0.9
    off_white = np.where(pictures[60:] == 255, 245, pictures[60:]).astype(np.uint8)  # as a VAE makes it
    assert (judge.read(off_white) == judge.read(pictures[60:])).all()
