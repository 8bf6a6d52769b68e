"""DiffiT's image-space network: sizes, windows, what belongs to which cell, bad settings."""

import math

import pytest
import torch
from torch import nn

from ptdit_diffusers.core.backbones.diffit import cut_grid
from ptdit_diffusers.core.backbones.diffit_unet import DiffiTUNetBackbone, noise_sinusoid
from ptdit_diffusers.core.backbones.diffit_unet_parameters import DiffiTUNetParameters

COUNTS = {  # preset, changes -> parameters
    ("ffhq64", ()): 23_797_979,
    ("ffhq64-large", ()): 44_810_051,
    ("cifar10", ()): 15_871_427,
    ("cifar10-large", ()): 28_684_803,
    ("cifar10", (("block_out_channels", (256, 256, 256)),)): 21_883_987,
    ("cifar10-large", (("block_out_channels", (256, 256, 256)),)): 39_621_027,
    ("cifar10", (("augment_dim", 9),)): 15_871_427 + 1_152,
}
TINY = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": (1, 2),
    "window_size": 2,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "time_embed_dim": 16,
}


class Plain(DiffiTUNetBackbone):
    """The backbone without a host."""

    def __init__(self, parameters: DiffiTUNetParameters):
        super().__init__()
        self.build(parameters)
        self.initialize_weights()


def tiny(**options) -> Plain:
    torch.manual_seed(0)
    backbone = Plain(DiffiTUNetParameters(**{**TINY, **options}))
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.2)
    return backbone.eval()


@pytest.mark.parametrize(("preset", "changes"), COUNTS)
def test_presets_have_the_known_number_of_parameters(preset, changes):
    with torch.device("meta"):
        backbone = Plain(DiffiTUNetParameters.preset(preset, **dict(changes)))
    assert sum(value.numel() for value in backbone.parameters()) == COUNTS[preset, changes]


@torch.no_grad()
def test_the_untrained_network_predicts_zero_and_has_the_shape_of_its_input():
    pictures = torch.randn(2, 3, 8, 8)
    assert Plain(DiffiTUNetParameters(**TINY)).predict(pictures, torch.zeros(1)).abs().max() == 0
    output = tiny().predict(pictures, torch.tensor([0.1, -0.5]))
    assert output.shape == pictures.shape and output.std() > 0.01
    assert tiny().predict(torch.randn(1, 3, 12, 8), torch.zeros(1)).shape == (1, 3, 12, 8)


@torch.no_grad()
def test_every_stage_runs_at_its_resolution_and_meets_its_skip():
    backbone, seen = tiny(block_out_channels=(8, 16, 16), layers_per_block=(1, 2, 1), sample_size=16), []
    for name, module in backbone.named_modules():
        if type(module).__name__ == "DiffiTCell":
            module.register_forward_hook(
                lambda _, given, output, name=name: seen.append((name, given[0].shape[1:], output.shape[1:]))
            )
    backbone.predict(torch.randn(1, 3, 16, 16), torch.zeros(1))
    assert [(name, tuple(before), tuple(after)) for name, before, after in seen] == [
        ("encoder.0.cells.0", (8, 16, 16), (8, 16, 16)),
        ("encoder.1.cells.0", (8, 8, 8), (16, 8, 8)),
        ("encoder.1.cells.1", (16, 8, 8), (16, 8, 8)),
        ("encoder.2.cells.0", (16, 4, 4), (16, 4, 4)),
        ("decoder.0.cells.0", (32, 8, 8), (16, 8, 8)),
        ("decoder.0.cells.1", (16, 8, 8), (16, 8, 8)),
        ("decoder.1.cells.0", (24, 16, 16), (8, 16, 16)),
    ]


@torch.no_grad()
def test_attention_stays_inside_its_window():
    cell = tiny(block_out_channels=(8,), layers_per_block=(1,)).encoder[0].cells[0]
    tokens, condition = torch.randn(1, 64, 8), torch.randn(1, 16)
    cut = cut_grid(8, 8, 2)
    plain = cell.block(tokens, condition, cut).view(8, 8, 8)
    tokens.view(8, 8, 8)[2, 5, 0] += 1  # row 2, column 5: the window of rows 2, 3 and columns 4, 5
    changed = (cell.block(tokens, condition, cut).view(8, 8, 8) - plain).abs().amax(-1) > 1e-6
    assert changed[2:4, 4:6].all() and changed.sum() == 4


def test_the_sinusoid_is_sines_first_and_ends_at_a_ten_thousandth():
    values = noise_sinusoid(torch.tensor([0.7]))[0]
    assert values.shape == (128,)
    expected = [math.sin(0.7 / 10000 ** (k / 63)) for k in (0, 1, 63)]
    assert values[[0, 1, 63]].tolist() == pytest.approx(expected, abs=1e-6)
    assert values[64].item() == pytest.approx(math.cos(0.7), abs=1e-6)


@torch.no_grad()
def test_time_class_and_augmentation_change_the_output():
    backbone, pictures = tiny(num_classes=3, augment_dim=2), torch.randn(1, 3, 8, 8)
    labels, time = torch.tensor([1]), torch.tensor([0.3])
    plain = backbone.predict(pictures, time, labels, torch.zeros(1, 2))
    assert torch.equal(backbone.predict(pictures, time, labels), plain)  # a picture as it is
    for changed in (
        (torch.tensor([0.5]), labels, None),
        (time, torch.tensor([3]), None),
        (time, labels, torch.ones(1, 2)),
    ):
        assert (backbone.predict(pictures, *changed) - plain).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_size": 10}, "sample_size=10 gives 5 cells per side at stage 2, .* the window 2; nearest: 8 or 12"),
        ({"sample_size": 2}, "sample_size=2 gives 1 cells per side at stage 2, .*; nearest: 4 or 8"),
        ({"window_size": 3}, "sample_size=8 gives 8 cells per side at stage 1, .* the window 3; nearest: 6 or 12"),
        ({"layers_per_block": (1,)}, r"layers_per_block=\(1,\) has 1 stages; it must have 2"),
        ({"layers_per_block": (1, 0)}, r"layers_per_block=\(1, 0\) must be integers >= 1, one for each stage"),
        ({"layers_per_block": (1, 600)}, r"layers_per_block=\(1, 600\) must be at most 512 in all"),
        ({"block_out_channels": (6, 16)}, "stage width 6 is not a multiple of attention_head_dim=4; nearest: 8"),
        ({"norm_num_groups": 16}, "stage width 8 is not a multiple of norm_num_groups=16; nearest: 16"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1; nearest: 0.9"),
        ({"num_classes": -1}, "num_classes=-1 must be an integer >= 1"),
    ],
)
def test_illegal_settings_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        DiffiTUNetParameters(**{**TINY, **options})


def test_unknown_presets_are_refused():
    with pytest.raises(ValueError, match="'ffhq' is no preset; choose one of cifar10, cifar10-large, ffhq64"):
        DiffiTUNetParameters.preset("ffhq")
