"""The diffusers head of the VAE: goldens through its public calls, configuration, saving, switches, training."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from safetensors.torch import load_file
from torch import Tensor

from ptdit_diffusers.core.checkpoint_names import official_vae_state_dict
from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan

GOLDEN = Path(__file__).parents[2] / "golden"
GOLDEN_LIMIT = 2e-4  # fp32 rounding of the reference itself is 1e-5
SLOW = pytest.mark.slow
TINY = {"hidden_size": 8, "num_res_blocks": 1, "norm_num_groups": 4}


@pytest.fixture
def vae() -> AutoencoderKLOpenSoraPlan:
    torch.manual_seed(0)
    return AutoencoderKLOpenSoraPlan(**TINY).eval()


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "causalvae.safetensors")


@pytest.fixture(scope="module")
def golden_vae(golden) -> AutoencoderKLOpenSoraPlan:
    vae = AutoencoderKLOpenSoraPlan(hidden_size=32, hidden_size_mult=(1, 2, 1, 1), num_res_blocks=1).eval()
    weights = {key.removeprefix("weights."): value.float() for key, value in golden.items() if "weights." in key}
    vae.load_state_dict(weights)
    return vae.requires_grad_(False)


def max_difference(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return (actual - expected).abs().max().item()


class TestGoldens:
    @pytest.mark.parametrize("case", ["image", "video9", "video17"])
    def test_encode_and_decode_equal_the_reference(self, golden_vae, golden, case):
        scaling_factor = golden_vae.config.scaling_factor
        latents = golden_vae.encode(golden[f"{case}.pixels"]).latent_dist.mode() * scaling_factor
        assert max_difference(latents, golden[f"{case}.latent_mode_scaled"]) <= GOLDEN_LIMIT
        pixels = golden_vae.decode(golden[f"{case}.latent_mode_scaled"] / scaling_factor).sample
        assert max_difference(pixels, golden[f"{case}.decoded"]) <= GOLDEN_LIMIT

    def test_a_posterior_sample_equals_the_reference(self, golden_vae, golden):
        latent_dist = golden_vae.encode(golden["image.pixels"]).latent_dist
        latents = latent_dist.mean + latent_dist.std * golden["image.sample_eps"]
        latents = latents * golden_vae.config.scaling_factor
        assert max_difference(latents, golden["image.latent_sample_scaled"]) <= GOLDEN_LIMIT

    @pytest.mark.parametrize("case", ["image", *(pytest.param(each, marks=SLOW) for each in ("video9", "video17"))])
    def test_half_precision_does_not_overflow_and_stays_near_the_recorded_output(self, golden_vae, golden, case):
        half, scaling_factor = deepcopy(golden_vae).half(), golden_vae.config.scaling_factor
        latents = half.encode(golden[f"{case}.pixels"].half()).latent_dist.mode().float() * scaling_factor
        pixels = half.decode((golden[f"{case}.latent_mode_scaled"] / scaling_factor).half()).sample.float()
        for found, name in ((latents, "latent_mode_scaled"), (pixels, "decoded")):
            expected = golden[f"{case}.{name}"]
            assert torch.isfinite(found).all()
            assert max_difference(found, expected) < 0.02 * expected.abs().max()

    def test_tiling_switched_on_equals_the_tiled_reference(self, golden_vae, golden):
        golden_vae.enable_tiling(tile_sample_min_size=64, tile_sample_min_num_frames=9, carry_frames=False)
        moments = golden_vae.encode(golden["tiled.image.pixels"]).latent_dist.parameters
        assert max_difference(moments, golden["tiled.image.moments"]) <= GOLDEN_LIMIT
        for case in ("tiled.image", "tiled.video"):
            latents = golden[f"{case}.latent_scaled"] / golden_vae.config.scaling_factor
            assert max_difference(golden_vae.decode(latents).sample, golden[f"{case}.decoded"]) <= GOLDEN_LIMIT
        golden_vae.disable_tiling()


class TestManners:
    def test_outputs_are_those_of_diffusers(self, vae):
        video = torch.randn(2, 3, 5, 16, 24)
        encoded = vae.encode(video)
        assert isinstance(encoded, AutoencoderKLOutput)
        assert isinstance(encoded.latent_dist, DiagonalGaussianDistribution)
        latents = encoded.latent_dist.mode()
        assert latents.shape == (2, 4, 2, 2, 3)
        assert isinstance(vae.decode(latents), DecoderOutput)
        assert torch.equal(vae.decode(latents, return_dict=False)[0], vae(video).sample)
        assert torch.equal(vae.encode(video, return_dict=False)[0].mode(), latents)

    def test_compression_ratios_can_be_asked(self, vae):
        assert (vae.spatial_compression_ratio, vae.temporal_compression_ratio) == (8, 4)

    def test_sampling_repeats_with_a_generator_of_the_same_seed(self, vae):
        latent_dist = vae.encode(torch.randn(1, 3, 1, 16, 16)).latent_dist
        samples = [latent_dist.sample(torch.Generator().manual_seed(seed)) for seed in (7, 7, 8)]
        assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])

    def test_forward_samples_the_posterior_only_when_asked(self, vae):
        image = torch.randn(1, 3, 1, 16, 16)
        generator = torch.Generator().manual_seed(3)
        sampled = vae(image, sample_posterior=True, generator=generator).sample
        assert not torch.equal(sampled, vae(image).sample)
        again = vae(image, sample_posterior=True, generator=generator.manual_seed(3)).sample
        assert torch.equal(sampled, again)

    def test_saving_and_loading_gives_the_same_configuration_and_numbers(self, vae, tmp_path):
        vae.save_pretrained(tmp_path)
        loaded = AutoencoderKLOpenSoraPlan.from_pretrained(tmp_path)
        assert {key: loaded.config[key] for key in TINY} == TINY
        image = torch.randn(1, 3, 1, 16, 16)
        assert torch.equal(loaded(image).sample, vae(image).sample)

    def test_loading_in_bfloat16_computes_in_bfloat16(self, vae, tmp_path):
        vae.save_pretrained(tmp_path)
        loaded = AutoencoderKLOpenSoraPlan.from_pretrained(tmp_path, dtype=torch.bfloat16)
        video = torch.randn(1, 3, 5, 16, 16)
        output = loaded(video.bfloat16()).sample
        assert output.dtype == torch.bfloat16
        assert max_difference(output.float(), vae(video).sample) < 0.05

    def test_unknown_configuration_fields_are_refused(self):
        with pytest.raises(TypeError, match="latent_channels"):
            AutoencoderKLOpenSoraPlan(latent_channels=4)


class TestSwitches:
    def test_tiles_larger_than_the_input_change_nothing(self, vae):
        video = torch.randn(1, 3, 5, 32, 32)
        expected = vae(video).sample
        vae.enable_tiling()
        assert torch.equal(vae(video).sample, expected)

    def test_tiling_can_be_switched_on_and_off(self, vae):
        image = torch.randn(1, 3, 1, 96, 96)
        untiled = vae(image).sample
        vae.enable_tiling(tile_sample_min_size=64)
        assert not torch.equal(vae(image).sample, untiled)
        vae.disable_tiling()
        assert torch.equal(vae(image).sample, untiled)

    def test_an_illegal_tile_size_is_refused_and_leaves_tiling_off(self, vae):
        with pytest.raises(ValueError, match="nearest: 192 or 256"):
            vae.enable_tiling(tile_sample_min_size=200)
        assert not vae.use_tiling

    @pytest.mark.parametrize(
        "frames, height, width", [(5, 64, 64), (9, 64, 64), (13, 72, 64), pytest.param(17, 120, 176, marks=SLOW)]
    )
    @pytest.mark.parametrize("slicing", [False, True])
    def test_the_runs_of_the_decoder_can_be_counted_before_they_happen(self, vae, frames, height, width, slicing):
        vae.enable_tiling(tile_sample_min_size=64, tile_sample_min_num_frames=9)
        vae.use_slicing = slicing
        latents, runs = torch.randn(2, 4, (frames - 1) // 4 + 1, height // 8, width // 8), []
        vae.decoder.register_forward_hook(lambda *_: runs.append(1))
        with torch.no_grad():
            vae.decode(latents)
        assert len(runs) == vae.decoder_runs(latents.shape)

    def test_slicing_changes_nothing(self, vae):
        videos = torch.randn(3, 3, 5, 16, 16)
        expected = vae(videos).sample
        vae.enable_slicing()
        assert max_difference(vae(videos).sample, expected) < 1e-5
        vae.disable_slicing()
        assert not vae.use_slicing


class TestTraining:
    def reconstruct(self, vae: AutoencoderKLOpenSoraPlan, video: Tensor) -> dict[str, Tensor]:
        vae.zero_grad()
        (vae(video).sample - video).square().mean().backward()
        return {name: parameter.grad for name, parameter in vae.named_parameters() if parameter.grad is not None}

    @pytest.mark.parametrize("frames", [1, 5])
    def test_gradient_checkpointing_gives_equal_gradients(self, vae, frames):
        video = torch.randn(1, 3, frames, 16, 16)
        expected = self.reconstruct(vae, video)
        vae.enable_gradient_checkpointing()
        assert vae.encoder.gradient_checkpointing and vae.decoder.gradient_checkpointing
        gradients = self.reconstruct(vae, video)
        assert gradients.keys() == expected.keys()
        assert all(torch.equal(gradients[name], expected[name]) for name in expected)

    def test_every_parameter_gets_a_gradient(self, vae):
        video = torch.randn(1, 3, 5, 16, 16)
        vae.train()
        output = vae(video, sample_posterior=True).sample
        output.square().mean().backward()
        assert [name for name, parameter in vae.named_parameters() if parameter.grad is None] == []

    def test_bfloat16_autocast_is_close_to_float32(self, vae):
        image = torch.randn(2, 3, 1, 32, 32)
        expected = vae(image).sample
        with torch.autocast("cpu", torch.bfloat16):
            output = vae(image).sample
        output.float().square().mean().backward()
        assert max_difference(output.float(), expected) < 0.05

    def test_a_few_steps_on_one_picture_lower_the_error(self, vae):
        image = torch.tanh(torch.randn(1, 3, 1, 16, 16))
        optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
        losses = []
        for _ in range(30):
            loss = (vae(image).sample - image).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]


class TestOfficialCheckpoint:
    @pytest.mark.parametrize(
        "wrap",
        [
            lambda weights, other: weights,
            lambda weights, other: {"state_dict": weights},
            lambda weights, other: {"state_dict": {"gen_model": weights, "dics_model": other}, "ema_state_dict": {}},
            lambda weights, other: {
                "state_dict": {"gen_model": other},
                "ema_state_dict": {f"module.{name}": value for name, value in weights.items()},
            },
        ],
        ids=["flat", "state_dict", "gen_model", "ema"],
    )
    def test_the_weights_are_found_in_every_known_nesting(self, vae, wrap):
        weights = vae.state_dict()
        extra = {**weights, "loss.logvar": torch.zeros(())}
        found = official_vae_state_dict(wrap(extra, {"other.weight": torch.zeros(1)}))
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in weights)

    def test_a_file_of_another_model_is_refused(self):
        with pytest.raises(ValueError, match="not this VAE; it starts with: blocks.0.weight"):
            official_vae_state_dict({"state_dict": {"blocks.0.weight": torch.zeros(1)}})


def test_encode_and_decode_run_the_hooks_of_model_offloading():
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    vae = AutoencoderKLOpenSoraPlan(hidden_size=8, hidden_size_mult=(1, 1, 1, 1), num_res_blocks=1, norm_num_groups=4)
    hook = Count()
    add_hook_to_module(vae, hook)
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 1, 16, 16)).latent_dist.mode()
        vae.decode(latents)
    assert hook.calls == 2
