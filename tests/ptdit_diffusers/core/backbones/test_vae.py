"""The VAE backbone against the goldens of the official VAE, its key list, and its own rules."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ptdit_diffusers.core.backbones.parameters import VAEParameters
from ptdit_diffusers.core.backbones.vae import CausalConv3d, FrameConv3d, PTDiTVAEBackbone
from ptdit_diffusers.core.backbones.vae_tiling import VAETiling
from scripts.benchmarks.memory import PeakMemory

GOLDEN = Path(__file__).parents[3] / "golden"
SCALING_FACTOR = 0.18215
GOLDEN_LIMIT = 2e-4  # fp32 rounding of the reference itself is 1e-5
SAME_MATHS_LIMIT = 1e-5  # two orders of the same fp32 sums


class Backbone(PTDiTVAEBackbone):
    """The VAE without a host."""

    def __init__(self, operations=nn, dtype=None, device=None, **sizes) -> None:
        super().__init__()
        self.build(VAEParameters(**sizes), operations, dtype, device)


class CastingConv3d(nn.Conv3d):
    """A convolution class that owns its weights, like those of other programs: it may never be bypassed."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states)


CASTING = SimpleNamespace(Linear=nn.Linear, Conv2d=nn.Conv2d, Conv3d=CastingConv3d, GroupNorm=nn.GroupNorm)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "causalvae.safetensors")


def load_golden_vae(golden, **factory) -> Backbone:
    vae = Backbone(hidden_size=32, hidden_size_mult=(1, 2, 1, 1), num_res_blocks=1, **factory).eval()
    weights = {key.removeprefix("weights."): value.float() for key, value in golden.items() if "weights." in key}
    vae.load_state_dict(weights)
    return vae.requires_grad_(False)


@pytest.fixture(scope="module")
def vae(golden) -> Backbone:
    return load_golden_vae(golden)


@pytest.fixture(scope="module")
def small_vae() -> Backbone:
    torch.manual_seed(0)
    return Backbone(hidden_size=8, num_res_blocks=1, norm_num_groups=4).requires_grad_(False)


def without_norms(**factory) -> Backbone:
    """A small VAE whose GroupNorms, which look over all of time, do nothing."""
    torch.manual_seed(0)
    vae = Backbone(hidden_size=8, num_res_blocks=1, norm_num_groups=4, **factory).requires_grad_(False)
    for module in list(vae.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    return vae


def assert_close(actual: Tensor, expected: Tensor, limit: float) -> None:
    assert actual.shape == expected.shape
    difference = (actual - expected).abs().max().item()
    assert difference <= limit, f"max difference {difference:.2e} > {limit:.0e}"


class TestGoldens:
    @pytest.mark.parametrize("case", ["image", "video9", "video17"])
    def test_encoding_equals_the_reference(self, vae, golden, case):
        moments = vae.encode_moments(golden[f"{case}.pixels"])
        assert_close(moments, golden[f"{case}.moments"], GOLDEN_LIMIT)
        assert_close(moments[:, :4] * SCALING_FACTOR, golden[f"{case}.latent_mode_scaled"], GOLDEN_LIMIT)

    @pytest.mark.parametrize("case", ["image", "video9", "video17"])
    def test_decoding_equals_the_reference(self, vae, golden, case):
        pixels = vae.decode_pixels(golden[f"{case}.latent_mode_scaled"] / SCALING_FACTOR)
        assert_close(pixels, golden[f"{case}.decoded"], GOLDEN_LIMIT)

    def test_spatial_tiling_equals_the_reference(self, vae, golden):
        tiling = VAETiling(size=64, frames=9)
        moments = vae.encode_moments(golden["tiled.image.pixels"], tiling)
        assert_close(moments, golden["tiled.image.moments"], GOLDEN_LIMIT)
        pixels = vae.decode_pixels(golden["tiled.image.latent_scaled"] / SCALING_FACTOR, tiling)
        assert_close(pixels, golden["tiled.image.decoded"], GOLDEN_LIMIT)

    def test_temporal_tiling_equals_the_reference(self, vae, golden):
        tiling = VAETiling(size=64, frames=9, carry_frames=False)
        pixels = vae.decode_pixels(golden["tiled.video.latent_scaled"] / SCALING_FACTOR, tiling)
        assert_close(pixels, golden["tiled.video.decoded"], GOLDEN_LIMIT)

    def test_a_foreign_operations_namespace_gives_the_same_numbers_with_its_own_convolutions(self, golden):
        vae = load_golden_vae(golden, operations=CASTING)
        convolutions = [module for module in vae.modules() if isinstance(module, nn.Conv3d)]
        assert convolutions and all(type(module) is CastingConv3d for module in convolutions)
        assert_close(vae.encode_moments(golden["image.pixels"]), golden["image.moments"], GOLDEN_LIMIT)
        latents = golden["image.latent_mode_scaled"] / SCALING_FACTOR
        assert_close(vae.decode_pixels(latents), golden["image.decoded"], GOLDEN_LIMIT)


class TestOfficialSizes:
    def test_keys_and_shapes_are_those_of_the_official_checkpoint(self):
        with torch.device("meta"):
            vae = Backbone()
        expected = json.loads((GOLDEN / "official_vae_shapes.json").read_text())
        assert {key: list(value.shape) for key, value in vae.state_dict().items()} == expected
        assert sum(parameter.numel() for parameter in vae.parameters()) == 239_189_991

    def test_dtype_and_device_reach_every_parameter(self):
        vae = Backbone(hidden_size=8, num_res_blocks=1, norm_num_groups=4, dtype=torch.bfloat16, device="meta")
        assert {parameter.dtype for parameter in vae.parameters()} == {torch.bfloat16}
        assert {parameter.device.type for parameter in vae.parameters()} == {"meta"}

    def test_the_number_of_groups_is_used_by_every_norm(self):
        vae = Backbone(hidden_size=16, num_res_blocks=1, norm_num_groups=8, device="meta")
        norms = [module for module in vae.modules() if isinstance(module, nn.GroupNorm)]
        assert {norm.num_groups for norm in norms} == {8}

    def test_a_width_that_the_groups_do_not_divide_is_refused(self):
        with pytest.raises(ValueError, match="level width 40 is not a multiple of norm_num_groups=16; nearest: 32"):
            Backbone(hidden_size=40, norm_num_groups=16)

    def test_other_than_four_levels_are_refused(self):
        with pytest.raises(ValueError, match="it must have 4"):
            Backbone(hidden_size_mult=(1, 2, 4))


class TestSingleFrames:
    @pytest.mark.parametrize("kernel_size, stride, padding", [((3, 3, 3), 1, 1), ((3, 3, 3), 2, 0), ((1, 1, 1), 1, 0)])
    def test_the_single_frame_path_equals_the_3d_convolution_and_its_gradients(self, kernel_size, stride, padding):
        torch.manual_seed(0)
        fast = CausalConv3d(6, 5, kernel_size, stride, padding)
        slow = CausalConv3d(6, 5, kernel_size, stride, padding, operations=CASTING)
        slow.load_state_dict(fast.state_dict())
        assert isinstance(fast.conv, FrameConv3d) and not isinstance(slow.conv, FrameConv3d)
        frame = torch.randn(2, 6, 1, 9, 11)
        outputs = [conv(frame) for conv in (fast, slow)]
        assert_close(*outputs, SAME_MATHS_LIMIT)
        for output in outputs:
            output.square().sum().backward()
        assert_close(fast.conv.weight.grad, slow.conv.weight.grad, 1e-3)  # sums of hundreds of squares
        assert_close(fast.conv.bias.grad, slow.conv.bias.grad, 1e-3)

    def test_weight_hooks_run_before_the_single_frame_path_reads_the_weights(self):
        conv = CausalConv3d(4, 4, (3, 3, 3), padding=1)
        frame = torch.randn(1, 4, 1, 8, 8)
        expected = conv(frame) * 2 - conv.conv.bias.view(1, -1, 1, 1, 1)

        def double_the_weights(module, args):
            module.weight.data.mul_(2)

        conv.conv.register_forward_pre_hook(double_the_weights)
        assert_close(conv(frame), expected, SAME_MATHS_LIMIT)

    def test_one_latent_frame_decodes_to_one_picture(self, small_vae):
        latents = torch.randn(1, 4, 1, 4, 4)
        assert small_vae.decode_pixels(latents).shape == (1, 3, 1, 32, 32)


class TestTime:
    @pytest.mark.parametrize("latent_frames", [1, 2, 3, 6])
    def test_frames_are_compressed_four_to_one_behind_the_first(self, small_vae, latent_frames):
        frames = 4 * (latent_frames - 1) + 1
        moments = small_vae.encode_moments(torch.randn(1, 3, frames, 16, 24))
        assert moments.shape == (1, 8, latent_frames, 2, 3)
        assert small_vae.decode_pixels(moments[:, :4]).shape == (1, 3, frames, 16, 24)

    def test_convolutions_never_look_ahead(self):
        conv = CausalConv3d(4, 4, (3, 3, 3), padding=1)
        video = torch.randn(1, 4, 5, 8, 8)
        changed = video.clone()
        changed[:, :, 3:] += 1
        assert torch.equal(conv(video)[:, :, :3], conv(changed)[:, :, :3])

    def test_later_frames_reach_earlier_latents_only_through_the_norms(self, small_vae):
        """The official GroupNorm takes its statistics over time, so the VAE is causal only apart from its norms."""
        video = torch.randn(1, 3, 9, 16, 16)
        changed = video.clone()
        changed[:, :, 5:] += 1
        with_norms = [small_vae.encode_moments(sample)[:, :, :2] for sample in (video, changed)]
        assert not torch.equal(*with_norms)

        causal = without_norms()
        assert_close(*(causal.encode_moments(sample)[:, :, :2] for sample in (video, changed)), 1e-6)


class TestLegalSizes:
    @pytest.mark.parametrize("frames, nearest", [(2, "1 or 5"), (4, "1 or 5"), (8, "5 or 9"), (16, "13 or 17")])
    def test_frame_counts_other_than_4n_plus_1_are_refused(self, small_vae, frames, nearest):
        with pytest.raises(ValueError, match=rf"num_frames={frames} is not 4n \+ 1 .*nearest: {nearest}"):
            small_vae.encode_moments(torch.zeros(1, 3, frames, 16, 16))

    @pytest.mark.parametrize("height, width, message", [(20, 16, "height=20"), (16, 30, "width=30")])
    def test_sizes_that_8_does_not_divide_are_refused(self, small_vae, height, width, message):
        with pytest.raises(ValueError, match=f"{message} is not a multiple of 8; nearest: (16 or 24|24 or 32)"):
            small_vae.encode_moments(torch.zeros(1, 3, 1, height, width))

    def test_a_picture_without_a_frame_axis_is_refused_with_the_cure(self, small_vae):
        with pytest.raises(ValueError, match="has 4 axes.*unsqueeze"):
            small_vae.encode_moments(torch.zeros(1, 3, 16, 16))
        with pytest.raises(ValueError, match="has 4 axes"):
            small_vae.decode_pixels(torch.zeros(1, 4, 2, 2))

    @pytest.mark.parametrize(
        "sizes, message",
        [
            ({"size": 100}, "100 is not a multiple of 64 pixels; nearest: 64 or 128"),
            ({"frames": 8}, "nearest: 5 or 9"),
        ],
    )
    def test_tile_sizes_that_cannot_be_joined_are_refused(self, sizes, message):
        with pytest.raises(ValueError, match=message):
            VAETiling(**sizes)


class TestTiling:
    def test_one_tile_that_covers_the_video_changes_nothing(self, small_vae):
        video = torch.randn(1, 3, 9, 64, 32)
        tiling = VAETiling(size=64, frames=9)
        moments = small_vae.encode_moments(video)
        assert torch.equal(small_vae.encode_moments(video, tiling), moments)
        assert torch.equal(small_vae.decode_pixels(moments[:, :4], tiling), small_vae.decode_pixels(moments[:, :4]))

    @pytest.mark.parametrize("frames, height, width", [(5, 120, 64), (9, 64, 136), (13, 64, 32), (17, 72, 112)])
    def test_tiles_of_any_remainder_join_to_the_right_size(self, small_vae, frames, height, width):
        tiling = VAETiling(size=64, frames=9)
        moments = small_vae.encode_moments(torch.randn(1, 3, frames, height, width), tiling)
        assert moments.shape == (1, 8, (frames - 1) // 4 + 1, height // 8, width // 8)
        assert small_vae.decode_pixels(moments[:, :4], tiling).shape == (1, 3, frames, height, width)

    @pytest.mark.parametrize("operations", [nn, CASTING], ids=["own convolutions", "foreign convolutions"])
    @pytest.mark.parametrize("frames, tile", [(13, 5), (13, 9), (17, 9), (33, 9), (37, 13)])
    def test_carried_frames_make_temporal_tiles_exact_but_for_the_norms(self, frames, tile, operations):
        vae, tiling = without_norms(operations=operations), VAETiling(size=64, frames=tile)
        video = torch.randn(1, 3, frames, 16, 24)
        moments = vae.encode_moments(video)
        assert_close(vae.encode_moments(video, tiling), moments, 1e-6)
        assert_close(vae.decode_pixels(moments[:, :4], tiling), vae.decode_pixels(moments[:, :4]), 1e-6)

    def test_carried_frames_come_much_nearer_to_the_untiled_video_than_the_official_tiles(self, vae, golden):
        latents = golden["video17.latent_mode_scaled"] / SCALING_FACTOR
        untiled = vae.decode_pixels(latents)
        carried, official = (
            (vae.decode_pixels(latents, VAETiling(size=64, frames=9, carry_frames=carry)) - untiled).square().mean()
            for carry in (True, False)
        )
        assert carried < 0.2 * official  # random weights; of trained ones a hundredth and less

    def test_a_run_that_fails_leaves_nothing_behind(self, small_vae):
        latents, tiling = torch.randn(1, 4, 5, 2, 2), VAETiling(size=64, frames=9)
        expected = small_vae.decode_pixels(latents, tiling)
        with pytest.raises(RuntimeError):
            small_vae.decode_pixels(torch.randn(1, 3, 5, 2, 2), tiling)
        assert torch.equal(small_vae.decode_pixels(latents, tiling), expected)
        assert all(module.stream is None for module in small_vae.modules() if hasattr(module, "stream"))

    def test_carried_frames_and_gradient_checkpointing_refuse_each_other(self):
        vae = Backbone(hidden_size=8, num_res_blocks=1, norm_num_groups=4)
        vae.encoder.gradient_checkpointing = True
        video = torch.randn(1, 3, 13, 16, 16)
        with pytest.raises(ValueError, match="cannot go with gradient checkpointing"):
            vae.encode_moments(video, VAETiling(size=64, frames=9))
        with torch.no_grad():
            vae.encode_moments(video, VAETiling(size=64, frames=9))
        vae.encode_moments(video, VAETiling(size=64, frames=9, carry_frames=False)).sum().backward()

    def test_memory_of_a_picture_is_linear_in_its_pixels(self, small_vae):
        """Attention in the middle makes no matrix of all pairs of cells."""
        peaks = []
        for side in (16, 64):
            with PeakMemory() as memory:
                small_vae.decode_pixels(torch.randn(1, 4, 1, side, side))
            peaks.append(memory.peak)
        assert peaks[1] <= 16.5 * peaks[0]

    @pytest.mark.slow
    @pytest.mark.parametrize("frames", [33, 65])
    def test_memory_of_tiles_does_not_grow_with_length(self, small_vae, frames):
        tiling, peaks = VAETiling(size=64, frames=9), []
        for length in (17, frames):
            latents = torch.randn(1, 4, (length - 1) // 4 + 1, 8, 8)
            with PeakMemory() as memory:
                video = small_vae.decode_pixels(latents, tiling)
            peaks.append(memory.peak - 2 * video.nbytes)  # the result itself, in pieces and joined
            with PeakMemory() as memory:
                small_vae.encode_moments(video, tiling)
            peaks.append(memory.peak)
        decoding, encoding, decoding_long, encoding_long = peaks
        assert decoding_long <= 1.05 * decoding and encoding_long <= 1.05 * encoding

    def test_official_temporal_tiles_are_computed_on_their_own_with_one_shared_frame(self, small_vae):
        video = torch.randn(1, 3, 13, 32, 32)
        tiling = VAETiling(size=64, frames=9, carry_frames=False)
        parts = [small_vae.encode_moments(video[:, :, :9]), small_vae.encode_moments(video[:, :, 8:])[:, :, 1:]]
        moments = small_vae.encode_moments(video, tiling)
        assert torch.equal(moments, torch.cat(parts, dim=2))
        latents = moments[:, :4]
        parts = [small_vae.decode_pixels(latents[:, :, :3]), small_vae.decode_pixels(latents[:, :, 2:])[:, :, 1:]]
        assert torch.equal(small_vae.decode_pixels(latents, tiling), torch.cat(parts, dim=2))

    def test_gradients_flow_through_tiles(self, small_vae):
        video = torch.randn(1, 3, 13, 72, 64, requires_grad=True)
        small_vae.encode_moments(video, VAETiling(size=64, frames=9)).square().sum().backward()
        assert (video.grad.abs().sum(dim=(1, 2)) > 0).all()
