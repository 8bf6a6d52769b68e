"""The diffusers head: configuration, saving, settings, checkpointing, proxies, compilation."""

import pytest
import torch
from torch import Tensor

from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from tests.ptdit_diffusers import goldens

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "sample_size": 16,
    "caption_channels": 12,
    "window_size": (1, 2, 2),
    "proxy_ratio": (1, 2, 2),
    "num_windows": 16,
}


def tiny(**options) -> PTDiTTransformer3DModel:
    torch.manual_seed(0)
    transformer = PTDiTTransformer3DModel(**{**TINY, **options}).eval()
    for parameter in transformer.parameters():  # also those that begin at zero
        torch.nn.init.normal_(parameter, std=0.1)
    return transformer


def arguments(height: int = 16, width: int = 16, frames: int = 1, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 4, frames, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 5, 12, generator=generator),
        "timestep": torch.tensor([900.0, 123.5])[:batch],
    }


@torch.no_grad()
def test_saving_and_loading_keeps_numbers_and_configuration(tmp_path):
    transformer = tiny()
    transformer.save_pretrained(tmp_path)
    again = PTDiTTransformer3DModel.from_pretrained(tmp_path)
    assert dict(again.config)["window_size"] in ((1, 2, 2), [1, 2, 2])
    assert again.auto_windows(16, 16) == ((1, 2, 2), (1, 2, 2))
    assert torch.equal(transformer(**arguments()).sample, again(**arguments()).sample)


def test_the_released_size_has_the_official_keys_and_count():
    import json

    with torch.device("meta"):
        transformer = PTDiTTransformer3DModel()
    shapes = {name: list(value.shape) for name, value in transformer.state_dict().items()}
    official = json.loads((goldens.FOLDER / "official_transformer_shapes.json").read_text(encoding="utf-8"))
    assert shapes == official
    assert sum(parameter.numel() for parameter in transformer.parameters()) == 1_131_629_216


@torch.no_grad()
def test_windows_can_be_changed_on_a_loaded_model_and_per_forward():
    transformer = tiny()
    default = transformer(**arguments()).sample
    coarse = transformer(**arguments(), window_size=(1, 4, 4), proxy_ratio=(1, 4, 4)).sample
    assert (default - coarse).abs().max() > 1e-4
    assert torch.equal(transformer(**arguments()).sample, default)  # the model itself did not change
    transformer.set_windows((1, 4, 4), (1, 4, 4))
    assert torch.equal(transformer(**arguments()).sample, coarse)


def test_illegal_settings_are_refused_by_name():
    transformer = tiny()
    with pytest.raises(ValueError, match="proxy_mode='mode' is unknown; choose one of mean, random, first"):
        transformer.set_windows(proxy_mode="mode")
    inputs = [arguments()[name] for name in ("hidden_states", "timestep", "encoder_hidden_states")]
    with pytest.raises(ValueError, match="proxy_mode='mode' is unknown"):
        transformer.predict(*inputs, proxy_mode="mode")
    with pytest.raises(ValueError, match="window_size=.0, 2, 2. must be .* nearest: .1, 2, 2."):
        transformer(**arguments(), window_size=(0, 2, 2))
    with pytest.raises(ValueError, match="latent height=15 is not a multiple of the patch size 2; nearest: 14 or 16"):
        transformer(**arguments(height=15))
    with pytest.raises(ValueError, match="hidden_states has shape .*must be .batch, channels, frames, height, width"):
        transformer(**{**arguments(), "hidden_states": torch.zeros(2, 4, 16, 16)})
    with pytest.raises(ValueError, match="32 must be a multiple of 3 with additional conditions .*nearest: 48"):
        PTDiTTransformer3DModel(**{**TINY, "sample_size": 128})
    with pytest.raises(ValueError, match="30 must be a multiple of 16 .*nearest: 32"):
        PTDiTTransformer3DModel(**{**TINY, "attention_head_dim": 15})


@torch.no_grad()
def test_random_proxies_follow_their_generator():
    transformer = tiny(proxy_mode="random")

    def run(seed):
        return transformer(**arguments(), generator=torch.Generator().manual_seed(seed)).sample

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))


@torch.no_grad()
def test_random_proxies_differ_from_block_to_block_and_all_else_is_shared():
    transformer, contexts = tiny(proxy_mode="random"), []
    for block in transformer.transformer_blocks:
        block.register_forward_pre_hook(lambda _, inputs: contexts.append(inputs[3]))
    transformer(**arguments())
    first, second = contexts
    assert not torch.equal(first.proxy_index, second.proxy_index)
    assert first.windows is second.windows and first.shifted_windows is second.shifted_windows


@torch.no_grad()
def test_random_proxies_of_a_sample_do_not_depend_on_its_batch():
    transformer = tiny(proxy_mode="random")
    inputs = arguments()
    seeds = (3, 4)
    together = transformer(**inputs, generator=[torch.Generator().manual_seed(seed) for seed in seeds]).sample
    for index, seed in enumerate(seeds):
        one = {name: value[index : index + 1] for name, value in inputs.items()}
        alone = transformer(**one, generator=[torch.Generator().manual_seed(seed)]).sample
        assert torch.allclose(together[index : index + 1], alone, atol=1e-5)


@torch.no_grad()
def test_a_short_list_of_generators_gives_both_guidance_halves_the_same_proxies():
    transformer = tiny(proxy_mode="random")
    twice = {name: torch.cat([value[:1], value[:1]]) for name, value in arguments().items()}
    one, other = transformer(**twice, generator=[torch.Generator().manual_seed(3)]).sample
    assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.usefixtures("native_again")
@torch.no_grad()
def test_masked_attention_stays_with_the_native_kernel_whatever_was_chosen(monkeypatch):
    from ptdit_diffusers.models import attention_ptdit

    transformer = tiny()
    transformer.set_attention_backend("_native_math")
    chosen = []
    dispatch = attention_ptdit.dispatch_attention_fn

    def watch(query, key, value, mask, **options):
        chosen.append((mask is not None, str(options["backend"])))
        return dispatch(query, key, value, mask, **options)

    monkeypatch.setattr(attention_ptdit, "dispatch_attention_fn", watch)
    transformer(**arguments(), encoder_attention_mask=torch.tensor([[1, 1, 1, 0, 0]] * 2))
    transformer.reset_attention_backend()
    assert {name for masked, name in chosen if masked} == {"native"}
    assert all("native_math" in name.lower() for masked, name in chosen if not masked)


@torch.no_grad()
def test_first_and_mean_proxies_agree_only_where_windows_hold_one_token():
    for window, equal in (((1, 1, 1), True), ((1, 2, 2), False)):
        outputs = []
        for mode in ("mean", "first"):
            transformer = tiny(proxy_mode=mode, window_size=window, proxy_ratio=window)
            outputs.append(transformer(**arguments()).sample)
        assert torch.allclose(*outputs, atol=1e-6) == equal


def test_auto_windows_keep_64_windows_at_every_size_of_the_paper():
    with torch.device("meta"):
        transformer = PTDiTTransformer3DModel(num_layers=1)
    for pixels, side in ((256, 2), (512, 4), (1024, 8), (2048, 16)):
        assert transformer.auto_windows(pixels // 8, pixels // 8) == ((1, side, side), (1, side, side))


@torch.no_grad()
def test_masked_text_changes_nothing_and_an_all_true_mask_equals_none():
    transformer = tiny()
    inputs = arguments()
    keep = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 0, 0]])
    masked = transformer(**inputs, encoder_attention_mask=keep).sample
    short = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"][:, :3]}
    assert torch.allclose(masked, transformer(**short).sample, atol=1e-5)
    full = transformer(**inputs, encoder_attention_mask=torch.ones(2, 5)).sample
    assert torch.allclose(full, transformer(**inputs).sample, atol=1e-6)


@pytest.mark.parametrize("mode", ["mean", "random"])
def test_gradient_checkpointing_gives_equal_gradients(mode):
    gradients = []
    for checkpointing in (False, True):
        transformer = tiny(proxy_mode=mode).train()
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        output = transformer(**arguments(), generator=torch.Generator().manual_seed(2)).sample
        output.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in transformer.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert torch.allclose(plain, again, atol=1e-7)


def test_every_parameter_gets_a_gradient():
    transformer = tiny().train()
    transformer(**arguments()).sample.square().mean().backward()
    silent = [name for name, parameter in transformer.named_parameters() if parameter.grad.abs().max() == 0]
    # the bias of a key shifts all logits of a query alike, which the softmax cancels
    assert all(name.endswith("to_k.bias") for name in silent)


def test_new_models_start_as_the_official_one():
    transformer = PTDiTTransformer3DModel(**TINY)
    for block in transformer.transformer_blocks:
        for layer in (block.linear_1_visual, block.linear_2):
            assert layer.weight.abs().max() == 0 and layer.bias.abs().max() == 0
    assert 0.1 < transformer.scale_shift_table.std() * 32**0.5 < 3


@torch.no_grad()
def test_flow_is_the_negative_of_the_first_half_in_float32():
    transformer = tiny().to(torch.bfloat16)
    inputs = {name: value.to(torch.bfloat16) for name, value in arguments().items()}
    sample = transformer(**inputs).sample
    assert sample.dtype == torch.bfloat16 and sample.shape[1] == 8
    flow = transformer.flow(sample)
    assert flow.dtype == torch.float32
    assert torch.equal(flow, -sample[:, :4].float())


@torch.no_grad()
def test_fused_projections_give_the_same_numbers():
    transformer = tiny()
    plain = transformer(**arguments()).sample
    transformer.fuse_qkv_projections()
    assert torch.allclose(transformer(**arguments()).sample, plain, atol=1e-5)
    transformer.unfuse_qkv_projections()
    assert torch.allclose(transformer(**arguments()).sample, plain, atol=1e-6)


@pytest.mark.slow
@torch.no_grad()
def test_it_traces_as_one_graph():
    transformer = tiny()
    compiled = torch.compile(transformer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(**arguments()).sample, transformer(**arguments()).sample, atol=1e-5)


def test_a_model_with_added_conditions_says_what_it_needs():
    with pytest.raises(ValueError, match="needs `resolution` .*aspect_ratio"):
        tiny(sample_size=128, num_attention_heads=3)(**arguments())


@pytest.mark.parametrize("case", goldens.CASES)
def test_half_precision_does_not_overflow_and_stays_near_the_recorded_output(case):
    tensors, _ = goldens.load(case)
    inputs = {name: value.half() if value.is_floating_point() and name != "timestep" else value
              for name, value in goldens.inputs(tensors).items()}  # fmt: skip
    expected = tensors[goldens.CASES[case][0]]
    with torch.no_grad():
        out = goldens.model(case, **goldens.CASES[case][1]).half()(**inputs).sample
    assert torch.isfinite(out).all()
    assert (out.float() - expected).abs().max() < 0.02 * expected.abs().max()


def test_the_timestep_is_rounded_to_bf16_only_when_the_configuration_says_so():
    tensors, _ = goldens.load("i_image_square")
    plain = goldens.model("i_image_square").bfloat16()
    rounding = goldens.model("i_image_square", round_timestep=True).bfloat16()
    inputs = {name: value.bfloat16() if value.is_floating_point() else value
              for name, value in goldens.inputs(tensors).items()}  # fmt: skip
    outputs = []
    for model in (plain, rounding):
        for time in (907.1, 908.0):  # 908 is the bf16 number nearest to 907.1
            with torch.no_grad():
                outputs.append(model(**inputs | {"timestep": torch.tensor([time])}).sample)
    assert not torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[2], outputs[3]) and torch.equal(outputs[1], outputs[3])
