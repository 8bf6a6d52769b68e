"""DiffiT's latent model against tensors of the official code; its sizes; windows smaller than the grid."""

import json
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ptdit_diffusers.core.backbones.diffit import DiffiTBackbone, cut_grid, relative_index
from ptdit_diffusers.core.backbones.diffit_parameters import PRESETS, DiffiTParameters
from ptdit_diffusers.core.backbones.layers import layer_norm, scaled_dot_product
from tests.ptdit_diffusers import diffit_goldens
from tests.ptdit_diffusers.diffit_goldens import LIMIT

CASE = "diffit_p2"
GOLDEN = diffit_goldens.load(CASE)
INPUTS = GOLDEN["in.x"], GOLDEN["in.t"], GOLDEN["in.y"]


class Plain(DiffiTBackbone):
    """The backbone without a host."""

    def __init__(self, parameters: DiffiTParameters, **options):
        super().__init__()
        self.build(parameters, **options)
        self.initialize_weights()


def tiny(attention=scaled_dot_product, **options) -> Plain:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "num_classes": 3}
    torch.manual_seed(0)
    backbone = Plain(DiffiTParameters(**{**sizes, **options}), attention=attention)
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.2)
    return backbone.eval()


def on_meta(name: str, **changes) -> Plain:
    with torch.device("meta"):
        return Plain(DiffiTParameters.preset(name, **changes))


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    assert left.shape == right.shape
    return (left - right).abs().max().item()


# --- the official code's numbers -------------------------------------------------------------------------------------


@torch.no_grad()
def test_outputs_equal_the_goldens():
    assert difference(diffit_goldens.model(CASE).predict(*INPUTS), GOLDEN["out"]) < LIMIT
    for case in (CASE, "diffit_constant_cfg"):
        tensors, backbone = diffit_goldens.load(case), diffit_goldens.model(case)
        latents = torch.cat([tensors["cfg.x"][:2]] * 2)  # guidance takes the first half twice
        output = backbone.predict(latents, tensors["cfg.t"], tensors["cfg.y"])
        assert difference(output, tensors["cfg.model_out_unguided"]) < LIMIT


@torch.no_grad()
def test_every_sub_step_equals_the_golden():
    backbone, seen = diffit_goldens.model(CASE), {}

    def keep(name):
        return lambda module, arguments, output: seen.update({name: output, f"{name} in": arguments})

    first, last = backbone.blocks[0], backbone.blocks[-1]
    hooked = {
        "t_emb": backbone.t_embedder,
        "y_emb": backbone.y_embedder,
        "block0.qkv_time": first.attn.qkv_temb,
        "block0.attn_out": first.attn,
        "block0.out": first,
        "last_block_out": last,
        "final": backbone.final_layer.linear,
    }
    for name, module in hooked.items():
        module.register_forward_hook(keep(name))
    backbone.predict(*INPUTS)
    tokens, condition, cut = seen["block0.out in"]
    bias = first.attn.bias(cut.indexes[0], tokens)[0]
    query, key, _ = (part.unflatten(-1, (4, -1)) for part in first.attn.project(layer_norm(tokens), condition))
    logits = torch.einsum("qhd,khd->hqk", query[1], key[1]) * query.shape[-1] ** -0.5
    seen |= {
        "condition": condition,
        "patch_plus_pos": tokens,
        "block0.attn_in": seen["block0.attn_out in"][0],
        "block0.position_bias": bias,
        "block0.logits_with_bias_sample1": logits + bias,
        "final.after_norm_and_silu": seen["final in"][0],
    }
    compared = [name.removeprefix("act.") for name in GOLDEN if name.startswith("act.")]
    assert len(compared) == 12
    for name in compared:
        assert difference(seen[name], GOLDEN[f"act.{name}"]) < LIMIT, name


def test_indexes_equal_those_of_official_files():
    for case, side in ((CASE, 8), ("diffit_constant_cfg", 6), ("diffit_sampler", 4)):
        stored = diffit_goldens.weights(case)["blocks.0.attn.relative_position_index"]
        assert torch.equal(relative_index(side, side, side), stored)


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_official_names_shapes_and_number_of_parameters(name):
    known = json.loads((diffit_goldens.FOLDER / "official_state_dicts.json").read_text(encoding="utf-8"))
    official, backbone = name.replace("-", " "), on_meta(name)
    expected = known["parameters"][official]
    assert sum(value.numel() for value in backbone.parameters()) == expected["without_pos_embed"]
    assert sum(value.numel() for value in backbone.state_dict().values()) == expected["with_pos_embed"]
    shapes = {key: list(value.shape) for key, value in backbone.state_dict().items()}
    listed = known["models"]["DiffiT 256"] | known["models"][official].get("except", {})
    assert shapes == {key: shape for key, shape in listed.items() if "position_index" not in key}


def test_deeper_and_unknown_presets():
    assert sum(value.numel() for value in on_meta("diffit-256", num_layers=30).parameters()) == 600_906_752
    with pytest.raises(ValueError, match="'XL' is no preset of DiffiT; choose one of DiffiT-256, DiffiT-512"):
        DiffiTParameters.preset("XL")


@torch.no_grad()
def test_the_untrained_model_predicts_zero():
    torch.manual_seed(0)
    backbone = Plain(DiffiTParameters(num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8))
    assert backbone.predict(torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.tensor([1])).abs().max() == 0
    table = backbone.blocks[0].attn.relative_position_bias_table
    assert 0.01 < table.std() < 0.03 and backbone.blocks[0].attn.qkv.weight.abs().max() > 0


@torch.no_grad()
def test_one_block_has_its_bias_at_a_time():
    alive = []

    def attention(query, key, value, mask):
        assert all(earlier() is None for earlier in alive)
        alive.append(weakref.ref(mask))
        return scaled_dot_product(query, key, value, mask)

    tiny(attention, num_layers=3).predict(torch.randn(2, 4, 8, 8), torch.tensor([5]), torch.tensor([1, 2]))
    assert len(alive) == 3


# --- windows ---------------------------------------------------------------------------------------------------------


def by_hand(attention, tokens, condition, rows, columns, window, shift):
    """Attention by its definition: pairs of tokens of one window, each with its row of the table."""
    query, key, value = (part.unflatten(-1, (attention.heads, -1)) for part in attention.project(tokens, condition))
    place = [(row, column) for row in range(rows) for column in range(columns)]
    number = [((row + window - shift) // window, (column + window - shift) // window) for row, column in place]
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    for q, (row, column) in enumerate(place):
        for k, (other_row, other_column) in enumerate(place):
            index = (row - other_row + window - 1) * (2 * window - 1) + column - other_column + window - 1
            same = number[q] == number[k]
            logits[:, :, q, k] += attention.relative_position_bias_table[index] if same else float("-inf")
    return attention.proj(torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), value).flatten(2))


@pytest.mark.parametrize(
    ("rows", "columns", "window", "shifted"),
    [(4, 4, 4, False), (4, 4, 2, False), (4, 4, 2, True), (3, 5, 2, False), (5, 4, 3, True)],
)
@torch.no_grad()
def test_windows_see_their_own_tokens_with_the_bias_of_their_offsets(rows, columns, window, shifted):
    block = tiny(window_size=window).blocks[0]
    tokens, condition = torch.randn(2, rows * columns, 16), torch.randn(2, 16)
    expected = tokens + by_hand(
        block.attn, layer_norm(tokens), condition, rows, columns, window, window // 2 if shifted else 0
    )
    expected = expected + block.mlp(layer_norm(expected))
    found = block(tokens, condition, cut_grid(rows, columns, window, shifted))
    assert difference(found, expected) < 1e-5


@torch.no_grad()
def test_every_second_block_shifts_its_windows():
    backbone, cuts = tiny(window_size=2, shift_window=True, num_layers=3), []
    for block in backbone.blocks:
        block.register_forward_pre_hook(lambda _, given: cuts.append(given[2]))
    backbone.predict(torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.tensor([1]))
    assert cuts[0] is cuts[2] and len(cuts[0].indexes) == 1 and len(cuts[1].indexes) == 9
    plain = tiny(window_size=2, num_layers=3)
    assert backbone.state_dict().keys() == plain.state_dict().keys()


@torch.no_grad()
def test_window_models_take_other_sizes_and_global_ones_do_not():
    inputs = torch.tensor([5]), torch.tensor([1])
    assert tiny(window_size=2).predict(torch.randn(1, 4, 6, 10), *inputs).shape == (1, 8, 6, 10)
    with pytest.raises(ValueError, match="latents of 8 x 12 must be 8 x 8: .*; nearest: 8 x 8"):
        tiny().check_size(8, 12)
    with pytest.raises(ValueError, match="latent width=7 is not a multiple of the patch size 2"):
        tiny(window_size=2).check_size(8, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": 5}, "window_size=5 must be an integer from 1 to 4, the tokens per side; nearest: 4"),
        ({"window_size": 0}, "window_size=0 must be .* nearest: 1"),
        ({"window_size": 2.4}, "window_size=2.4 must be .* nearest: 2"),
        ({"shift_window": True}, "shift_window=True needs windows smaller than the grid"),
        ({"sample_size": 7}, "sample_size=7 is not a multiple of the patch size 2"),
    ],
)
def test_illegal_settings_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


# --- index buffers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["mirrored", "of another window"])
def test_a_wrong_index_buffer_is_refused(change):
    weights = diffit_goldens.weights(CASE)
    name = "blocks.1.attn.relative_position_index"
    weights[name] = weights[name].T if change == "mirrored" else relative_index(4, 4, 4)
    with pytest.raises(ValueError, match=f"{name} is not the index of a window of 8 x 8 tokens"):
        diffit_goldens.model(CASE).load_state_dict(weights)


def test_index_buffers_are_not_kept():
    assert diffit_goldens.model(CASE).state_dict().keys() == diffit_goldens.parameters(CASE).keys()


@torch.no_grad()
def test_the_final_layer_has_an_activation_after_its_norm():
    layer = tiny().final_layer
    tokens = torch.randn(1, 3, 16)
    assert difference(layer(tokens), layer.linear(F.silu(F.layer_norm(tokens, (16,), eps=1e-6)))) < 1e-6
