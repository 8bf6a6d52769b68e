"""DiT against tensors of the official code; its sizes and costs; the three kinds of blocks without official code."""

import json
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ptdit_diffusers.core.backbones.dit import DiTBackbone, grid_positions
from ptdit_diffusers.core.backbones.dit_parameters import BLOCK_TYPES, PRESETS, DiTParameters
from ptdit_diffusers.core.backbones.embeddings import timestep_sinusoid
from tests.ptdit_diffusers import dit_goldens
from tests.ptdit_diffusers.dit_goldens import LIMIT

CASES = ("dit_p2", "dit_p4", "dit_p8")
XL = {  # block type -> parameters without positions, billions of multiply-accumulates of the paper
    "adaln_zero": (674_834_720, 118.64),
    "adaln": (600_452_384, 118.56),
    "cross_attention": (597_991_712, 137.62),
    "in_context": (449_162_528, 119.37),
}
SMALLER = {  # S, B, L with patch 2
    "in_context": (21_944_096, 86_650_400, 304_699_424),
    "cross_attention": (29_049_632, 115_017_248, 405_510_176),
    "adaln": (29_316_896, 116_141_600, 407_459_872),
}


class Plain(DiTBackbone):
    """The backbone without a host."""

    def __init__(self, parameters: DiTParameters):
        super().__init__()
        self.build(parameters)
        self.initialize_weights()


def tiny(**options) -> Plain:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "num_classes": 3}
    torch.manual_seed(0)
    backbone = Plain(DiTParameters(**{**sizes, **options}))
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.2)
    return backbone.eval()


def on_meta(name: str, **changes) -> Plain:
    with torch.device("meta"):
        return Plain(DiTParameters.preset(name, **changes))


def count(backbone: nn.Module) -> int:
    return sum(parameter.numel() for parameter in backbone.parameters())


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    assert left.shape == right.shape
    return (left - right).abs().max().item()


# --- the official code's numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_outputs_equal_the_goldens(case):
    tensors, backbone = dit_goldens.load(case), dit_goldens.model(case)
    for times, output in (("in.t", "out"), ("in.t_fractional", "out_fractional_t")):
        assert difference(backbone.predict(tensors["in.x"], tensors[times], tensors["in.y"]), tensors[output]) < LIMIT


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_every_sub_step_equals_the_golden(case):
    tensors, backbone, seen = dit_goldens.load(case), dit_goldens.model(case), {}

    def keep(name):
        return lambda module, arguments, output: seen.update({name: output, f"{name} in": arguments[0]})

    first, last = backbone.blocks[0], backbone.blocks[-1]
    hooked = {
        "t_emb": backbone.t_embedder,
        "y_emb": backbone.y_embedder,
        "patch_only": backbone.x_embedder,
        "block0.modulation_6d": first.adaLN_modulation,
        "block0.attn_out": first.attn,
        "block0.mlp_out": first.mlp,
        "block0.out": first,
        "last_block_out": last,
        "final.modulation_2d": backbone.final_layer.adaLN_modulation,
        "final.tokens": backbone.final_layer,
    }
    for name, module in hooked.items():
        module.register_forward_hook(keep(name))
    backbone.predict(tensors["in.x"], tensors["in.t"], tensors["in.y"])
    seen |= {
        "t_freq": timestep_sinusoid(tensors["in.t"]),
        "patch_plus_pos": seen["block0.out in"],
        "block0.attn_in": seen["block0.attn_out in"],
        "block0.mlp_in": seen["block0.mlp_out in"],
    }
    compared = [name for name in seen if f"act.{name}" in tensors]
    assert len(compared) > 3 and (case != "dit_p2" or len(compared) == 14)
    for name in compared:
        assert difference(seen[name], tensors[f"act.{name}"]) < 2 * LIMIT, name


@pytest.mark.parametrize("case", CASES)
def test_positions_equal_those_of_the_official_code(case):
    side = dit_goldens.config(case)["sample_size"] // dit_goldens.config(case)["patch_size"]
    stored = dit_goldens.weights(case)["pos_embed"]
    assert difference(grid_positions(side, side, stored.shape[-1])[None], stored) < 1e-6


def test_positions_of_other_sizes_count_rows_and_columns():
    square, wide = grid_positions(6, 6, 16).view(6, 6, 16), grid_positions(3, 6, 16).view(3, 6, 16)
    assert torch.equal(wide, square[:3])
    assert torch.equal(square[2, 5, :8], square[4, 5, :8])  # the first half tells the column
    assert torch.equal(square[2, 5, 8:], square[2, 1, 8:])  # the second half the row
    assert torch.equal(square[2, 5, :4], torch.tensor([math.sin(5 / 10000 ** (k / 4)) for k in range(4)]))


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_official_number_of_parameters(name):
    known = json.loads((dit_goldens.FOLDER / "official_state_dicts.json").read_text(encoding="utf-8"))
    for side, pixels in ((32, 256), (64, 512)):
        backbone, expected = on_meta(name, sample_size=side), known["parameters"][f"{name} {pixels}"]
        stored = sum(value.numel() for value in backbone.state_dict().values())
        assert (count(backbone), stored) == (expected["without_pos_embed"], expected["with_pos_embed"])
    if name == "DiT-XL/2":
        shapes = {key: list(value.shape) for key, value in on_meta(name).state_dict().items()}
        assert shapes == known["models"]["DiT-XL/2 256"]


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
@torch.no_grad()
def test_the_four_kinds_have_the_papers_parameters_and_multiply_accumulates(block_type):
    parameters, paper = XL[block_type]
    backbone = on_meta("DiT-XL/2", block_type=block_type).eval()
    assert count(backbone) == parameters
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        backbone.predict(torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, dtype=torch.long))
    assert abs(counter.get_total_flops() / 2e9 - paper) < 0.02
    for size, expected in zip("SBL", SMALLER.get(block_type, ()), strict=False):
        assert count(on_meta(f"DiT-{size}/2", block_type=block_type)) == expected


def test_presets_have_one_name_in_several_spellings():
    expected = DiTParameters(num_attention_heads=6, attention_head_dim=64, num_layers=12, patch_size=4)
    for name in ("DiT-S/4", "dit-s-4", "S/4"):
        assert DiTParameters.preset(name) == expected
    with pytest.raises(ValueError, match="'DiT-H/2' is no preset of DiT; choose one of DiT-S/8, .*DiT-XL/2"):
        DiTParameters.preset("DiT-H/2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_head_dim": 9}, "= 18 must be a multiple of 4 .*nearest: 16"),
        ({"sample_size": 9}, "sample_size=9 is not a multiple of the patch size 2; nearest: 8 or 10"),
        ({"block_type": "adaln-zero"}, "block_type='adaln-zero' is unknown; choose one of adaln_zero, adaln, cross"),
        ({"class_dropout_prob": 1.0}, "class_dropout_prob=1.0 must be at least 0 and below 1"),
        ({"num_layers": 0}, "num_layers=0 must be an integer >= 1; nearest: 1"),
    ],
)
def test_illegal_sizes_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        DiTParameters(**{"num_attention_heads": 2, **options})


# --- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
@torch.no_grad()
def test_new_models_predict_zero_and_have_the_initial_values_of_the_paper(block_type):
    sizes = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 1, "sample_size": 8}
    backbone = Plain(DiTParameters(**sizes, block_type=block_type))
    assert backbone.predict(torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([3, 1000])).abs().max() == 0
    block = backbone.blocks[0]
    assert block.attn.qkv.weight.abs().max() <= math.sqrt(6 / (64 + 3 * 64))  # Xavier uniform
    assert block.attn.qkv.weight.std() == pytest.approx(math.sqrt(2 / (64 + 3 * 64)), rel=0.05)
    assert backbone.x_embedder.proj.weight.std() == pytest.approx(math.sqrt(2 / (16 + 64)), rel=0.1)
    assert backbone.y_embedder.embedding_table.weight.std() == pytest.approx(0.02, rel=0.05)
    assert backbone.t_embedder.mlp[0].weight.std() == pytest.approx(0.02, rel=0.05)
    assert all(value.abs().max() == 0 for name, value in backbone.named_parameters() if name.endswith("bias"))
    if block_type in ("adaln_zero", "adaln"):
        assert (block.adaLN_modulation[1].weight.abs().max() == 0) == (block_type == "adaln_zero")
        assert backbone.final_layer.adaLN_modulation[1].weight.abs().max() == 0
    else:
        assert torch.equal(block.norm1.weight, torch.ones(64)) and block.norm1.eps == 1e-6


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
@torch.no_grad()
def test_every_kind_reads_timestep_and_class_and_takes_any_size(block_type):
    backbone = tiny(block_type=block_type)
    latents, times, labels = torch.randn(2, 4, 6, 12), torch.tensor([900.0, 12.5]), torch.tensor([0, 3])
    sample = backbone.predict(latents, times, labels)
    assert sample.shape == (2, 8, 6, 12)
    assert difference(sample, backbone.predict(latents, times + 50, labels)) > 1e-3
    assert difference(sample, backbone.predict(latents, times, labels - labels + 1)) > 1e-3
    for index in range(2):
        one = slice(index, index + 1)
        assert difference(sample[one], backbone.predict(latents[one], times[one], labels[one])) < 1e-5


@torch.no_grad()
def test_plain_adaln_is_adaln_zero_with_gates_of_one():
    gated, plain = tiny(block_type="adaln_zero"), tiny(block_type="adaln")
    for mine, other in zip(gated.blocks, plain.blocks, strict=True):
        other.attn, other.mlp = mine.attn, mine.mlp
        weight, bias = (
            value.unflatten(0, (6, -1)) for value in (mine.adaLN_modulation[1].weight, mine.adaLN_modulation[1].bias)
        )
        other.adaLN_modulation[1].weight.copy_(weight[[0, 1, 3, 4]].flatten(0, 1))
        other.adaLN_modulation[1].bias.copy_(bias[[0, 1, 3, 4]].flatten())
        weight[[2, 5]], bias[[2, 5]] = 0.0, 1.0
    tokens, condition = torch.randn(2, 16, 16), torch.randn(2, 16)
    for mine, other in zip(gated.blocks, plain.blocks, strict=True):
        assert difference(mine(tokens, condition), other(tokens, condition)) < 1e-5


@torch.no_grad()
def test_conditions_in_context_are_two_more_tokens_without_positions():
    backbone, lengths = tiny(block_type="in_context"), []
    backbone.blocks[0].register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0]))
    time, label = torch.tensor([500]), torch.tensor([1])
    backbone.predict(torch.randn(1, 4, 8, 8), time, label)
    assert lengths[0].shape == (1, 18, 16)
    assert torch.equal(lengths[0][0, 16], backbone.t_embedder(time, torch.float32)[0])
    assert torch.equal(lengths[0][0, 17], backbone.y_embedder.embedding_table.weight[1])


def test_labels_are_dropped_once_per_forward_in_training_only():
    backbone = tiny(class_dropout_prob=0.5, num_layers=3)
    latents, times, labels = (
        torch.randn(1, 4, 8, 8).expand(64, -1, -1, -1),
        torch.full((64,), 400),
        torch.ones(64).long(),
    )
    null, kept = (backbone.predict(latents[:1], times[:1], torch.tensor([label])) for label in (3, 1))
    assert difference(backbone.predict(latents, times, labels), kept.expand(64, -1, -1, -1)) < 1e-5
    sample = backbone.train().predict(latents, times, labels)
    dropped = [difference(one[None], null) < 1e-5 for one in sample]
    assert all(drop or difference(one[None], kept) < 1e-5 for drop, one in zip(dropped, sample, strict=True))
    assert 16 < sum(dropped) < 48
    state = torch.get_rng_state()
    backbone.predict(latents, times, labels)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    torch.rand(64)
    assert torch.equal(torch.get_rng_state(), after)  # one number per sample


def test_without_dropout_there_is_no_null_class():
    assert len(tiny(class_dropout_prob=0.0).y_embedder.embedding_table.weight) == 3
    assert len(tiny().y_embedder.embedding_table.weight) == 4


# --- position tables of files ----------------------------------------------------------------------------------------


def test_a_stored_position_table_is_compared_and_not_used():
    backbone, weights = tiny(), tiny().state_dict()
    table = weights["pos_embed"].clone()
    for stored in (table + 9e-4, table.half(), table.bfloat16()):
        backbone.load_state_dict(weights | {"pos_embed": stored})
        assert torch.equal(backbone.pos_embed, table)
    backbone.load_state_dict({name: value for name, value in weights.items() if name != "pos_embed"})
    with pytest.raises(ValueError, match="pos_embed is not DiT's position table: it differs by up to 0.0011"):
        backbone.load_state_dict(weights | {"pos_embed": table + 1.1e-3})
    with pytest.raises(ValueError, match="must be .1, 16, 16.: the weights are for another size than sample_size=8"):
        backbone.load_state_dict(weights | {"pos_embed": grid_positions(8, 8, 16)[None]})
