"""Images and masks of every type are read right, or refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from ptdit_diffusers.pipelines.ptdit_checks import (
    check_count,
    check_generator,
    check_guidance,
    check_levels,
    check_strength,
)
from ptdit_diffusers.pipelines.ptdit_images import check_crop, readable

BYTES = np.array([[0, 128, 255]], dtype=np.uint8)


@pytest.mark.parametrize(
    "image", [BYTES, torch.from_numpy(BYTES), BYTES.astype(np.int64)], ids=["numpy", "torch", "int64"]
)
def test_bytes_are_divided(image):
    assert np.allclose(np.asarray(readable("image", image, mask=False)), [[0, 128 / 255, 1]])


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
def test_a_mask_of_zeros_and_ones_keeps_its_ones(dtype):
    mask = np.array([[0, 1]], dtype=dtype)
    for kind in (mask, torch.from_numpy(mask)):
        assert np.asarray(readable("mask_image", kind, mask=True)).max() == 1


@pytest.mark.parametrize(
    "image",
    [
        BYTES.astype(np.float32),
        BYTES.astype(np.uint16) * 256,
        np.array([[np.nan]], dtype=np.float32),
        torch.tensor([[-3.0, 1.0]]),
        Image.new("I;16", (2, 2)),
        Image.new("F", (2, 2)),
        Image.new("RGBA", (2, 2), (255, 0, 0, 0)),
    ],
    ids=["float to 255", "16 bits", "nan", "below -1", "I;16", "F", "transparent"],
)
def test_what_has_no_one_meaning_is_refused(image):
    with pytest.raises(ValueError, match="`image`"):
        readable("image", image, mask=False)


def test_a_crop_needs_a_white_pixel_and_one_size():
    black = Image.new("L", (4, 4))
    with pytest.raises(ValueError, match="no white pixels"):
        check_crop(black, black, 0)
    with pytest.raises(ValueError, match="one size"):
        check_crop(black, Image.new("L", (5, 4), 255), 0)


@pytest.mark.parametrize("values", [(float("nan"), 0.0), (-1.0, 0.0), (float("inf"), 0.0), (4.0, 1.5), (4.0, -0.1)])
def test_guidance_outside_its_range_is_refused(values):
    with pytest.raises(ValueError, match="nearest"):
        check_guidance(*values)


def test_integers_of_numpy_count_and_a_seed_is_no_generator():
    check_count("steps", np.int64(2))
    for value in (True, float("inf"), float("nan"), 0):
        with pytest.raises(ValueError, match="nearest: 1"):
            check_count("steps", value)
    with pytest.raises(ValueError, match=r"torch.Generator\(\).manual_seed\(42\)"):
        check_generator(42)
    for strength in (np.float32(0.5), np.int64(1)):
        check_strength(strength)
    with pytest.raises(ValueError, match="sigmas=0.5 must be a list of numbers"):
        check_levels(0.5, None)
