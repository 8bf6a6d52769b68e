"""Formulas around the network: time shift and the choice of windows."""

import math

import pytest

from ptdit_diffusers.core.sampling import choose_windows, time_shift
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel


@pytest.fixture
def transformer() -> PTDiTTransformer3DModel:
    sizes = {"window_size": (1, 4, 4), "proxy_ratio": (1, 4, 4), "num_windows": 4}
    return PTDiTTransformer3DModel(2, 8, num_layers=1, caption_channels=8, **sizes)


def test_windows_that_were_set_on_the_transformer_are_used(transformer):
    transformer.set_windows(window_size=(1, 2, 4))
    assert choose_windows(transformer, "auto", "auto", 8, 8) == {"window_size": (1, 2, 4), "proxy_ratio": (1, 4, 4)}


def test_windows_set_to_the_trained_values_are_kept_at_other_sizes_until_they_are_reset(transformer):
    transformer.set_windows((1, 4, 4), (1, 4, 4))
    assert choose_windows(transformer, "auto", "auto", 8, 8) == {"window_size": (1, 4, 4), "proxy_ratio": (1, 4, 4)}
    transformer.reset_windows()
    transformer.set_windows(proxy_mode="first")
    assert choose_windows(transformer, "auto", "auto", 8, 8) == {"window_size": (1, 2, 2), "proxy_ratio": (1, 2, 2)}


def test_an_explicit_window_keeps_the_trained_number_of_proxies_per_window(transformer):
    finer = PTDiTTransformer3DModel(2, 8, num_layers=1, window_size=(1, 4, 4), proxy_ratio=(1, 2, 2))
    assert choose_windows(finer, (1, 8, 2), "auto", 8, 8) == {"window_size": (1, 8, 2), "proxy_ratio": (1, 4, 1)}


def test_the_time_shift_is_the_official_one_for_pictures_and_from_17_frames_on():
    assert time_shift(4096, 1024) == 2 and time_shift(1024, 1024) == 1
    assert time_shift(1024, 1024, 17) == time_shift(1024, 1024, 29) == math.sqrt(5)
    assert time_shift(1024, 1024, 34) == math.sqrt(10)


def test_the_time_shift_grows_from_one_frame_to_seventeen():
    shifts = [time_shift(1024, 1024, frames) for frames in (1, 5, 9, 13, 17)]
    assert shifts == [math.sqrt(frames) for frames in (1, 2, 3, 4, 5)]
