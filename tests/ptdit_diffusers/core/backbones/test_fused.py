"""Fused linear layers: the same numbers as without, in every mode, and nothing of it in files or in what is undone."""

import pytest
import torch
from peft import LoraConfig

from ptdit_diffusers.core.backbones import fused, ptdit
from ptdit_diffusers.core.backbones.fused import folded_cross_attention, folding_pays, gated_product
from tests.ptdit_diffusers import goldens
from tests.ptdit_diffusers.goldens import CASES, LIMIT
from tests.ptdit_diffusers.models.test_transformer_ptdit import arguments, tiny

LORA = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)


@pytest.fixture
def paths(monkeypatch):
    """Which products were taken."""
    taken = []
    for module, name in ((fused, "folded_cross_attention"), (ptdit, "apply_product")):
        function = getattr(module, name)

        def watch(*args, function=function, name=name, **kwargs):
            taken.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, watch)
    return taken


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_fused_output_equals_the_golden(case):
    name, options = CASES[case]
    tensors, _ = goldens.load(case)
    transformer = goldens.model(case, **options)
    transformer.fuse_linear_layers()
    assert (transformer(**goldens.inputs(tensors)).sample - tensors[name]).abs().max() < LIMIT


MODES = {
    "per-sample timesteps": {},
    "one timestep": {"timestep": torch.tensor(321.0)},
    "one timestep, expanded": {"timestep": torch.tensor([321.0]).expand(2)},
    "masked text": {"encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])},
    "ragged grid": {"height": 10, "width": 22, "frames": 3},
    "windows of one call": {"window_size": (1, 8, 8), "proxy_ratio": (1, 8, 8)},
    "random proxies": {"generator": 3},
    "no shift": {},
    "one token": {"height": 2, "width": 2},
}


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_fused_equals_unfused_in_every_mode_in_float64(mode, paths):
    options = dict(MODES[mode])
    shape = {key: options.pop(key) for key in ("height", "width", "frames") if key in options}
    inputs = arguments(**shape) | options
    transformer = tiny(
        proxy_mode="random" if mode == "random proxies" else "mean", shift_window=mode != "no shift"
    ).double()
    inputs["hidden_states"] = inputs["hidden_states"].double()

    def run():
        generator = {"generator": torch.Generator().manual_seed(3)} if "generator" in inputs else {}
        return transformer(**{**inputs, **generator}).sample

    plain = run()
    transformer.fuse_linear_layers()
    fused = run()
    assert (fused - plain).abs().max() < 1e-12 * plain.abs().max()
    assert "folded_cross_attention" in paths or mode == "one token"
    assert ("apply_product" in paths) == (mode not in ("no shift", "one token"))


@torch.no_grad()
def test_fusing_and_unfusing_leaves_weights_files_and_numbers_bit_identical(tmp_path):
    transformer = tiny()
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    plain = transformer(**arguments()).sample
    transformer.fuse_linear_layers()
    assert list(transformer.state_dict()) == list(before)
    assert not torch.equal(transformer(**arguments()).sample, plain)  # another order of sums
    transformer.save_pretrained(tmp_path)
    transformer.unfuse_linear_layers()
    for model in (transformer, type(transformer).from_pretrained(tmp_path)):
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(model(**arguments()).sample, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_bfloat16_and_autocast_stay_as_near_to_float32_as_without(dtype):
    transformer, inputs = tiny(), arguments()
    exact = transformer(**inputs).sample
    transformer.to(dtype)
    inputs["hidden_states"] = inputs["hidden_states"].to(dtype)
    errors = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            errors.append((transformer(**inputs).sample.float() - exact).square().mean())
        transformer.fuse_linear_layers()
    assert errors[0] > 0 and errors[1] < 2 * errors[0]


@pytest.mark.slow
@torch.no_grad()
def test_fused_layers_trace_as_one_graph():
    transformer = tiny()
    transformer.fuse_linear_layers()
    compiled = torch.compile(transformer, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(**arguments()).sample, transformer(**arguments()).sample, atol=1e-5)


def test_fused_layers_are_refused_where_gradients_are_wanted():
    transformer = tiny()
    transformer.fuse_linear_layers()
    with pytest.raises(ValueError, match="for inference: .*no_grad.*unfuse_linear_layers"):
        transformer(**arguments())


@torch.no_grad()
def test_a_lora_loads_before_fusing_or_is_refused():
    transformer = tiny()
    transformer.add_adapter(LORA)
    adapted = transformer(**arguments()).sample
    with pytest.raises(ValueError, match="pvisual_attn2.to_q carries a LoRA that is not merged .* fuse_lora"):
        transformer.fuse_linear_layers()
    transformer.fuse_lora()
    transformer.fuse_linear_layers()
    assert torch.allclose(transformer(**arguments()).sample, adapted, atol=1e-5)
    calls = {"unfuse_lora": (), "add_adapter": (LORA, "other"), "set_adapters": ("default", 0.5), "disable_lora": ()}
    calls |= {"delete_adapters": ("default",), "unload_lora": (), "load_state_dict": ({},), "disable_adapters": ()}
    for name, values in calls.items():
        with pytest.raises(ValueError, match=f"^{name} changes layers that are fused: call unfuse_linear_layers"):
            getattr(transformer, name)(*values)


def test_weights_of_eight_bits_are_refused_by_name():
    transformer = tiny()
    transformer.transformer_blocks[1].attn2.to_q.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="attn2.to_q has a weight of type Parameter, torch.float8_e4m3fn"):
        transformer.fuse_linear_layers()
    assert not any(block.fused for block in transformer.transformer_blocks)


@torch.no_grad()
def test_folding_is_chosen_where_it_is_less_work():
    assert folding_pays(4096, 24, 16, 1152) and folding_pays(4096, 64, 16, 1152)
    assert not folding_pays(4096, 120, 16, 1152) and not folding_pays(64, 64, 16, 1152)
    layer = tiny().transformer_blocks[0].linear_2
    gates = torch.randn(2, 1, 32)
    assert gated_product(layer, gates[:1], layer, 33) is not None and gated_product(layer, gates, layer, 64) is None


@torch.no_grad()
def test_folded_attention_takes_any_mask():
    torch.manual_seed(0)
    attention = tiny().transformer_blocks[0].attn2
    hidden_states, source = torch.randn(3, 7, 32), torch.randn(3, 6, 32)
    mask = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1]]).bool()
    out = attention.to_out[0]
    folded = folded_cross_attention(attention, hidden_states, source, mask, out.weight, out.bias)
    assert torch.allclose(folded, attention(hidden_states, source, mask), atol=1e-5)
