"""Windows and proxies of any grid, against a dense oracle that only knows which tokens share a window."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ptdit_diffusers.core.backbones.embeddings import position_table
from ptdit_diffusers.core.backbones.layers import Attention, scaled_dot_product
from ptdit_diffusers.core.backbones.proxies import ProxyPlan, mean_proxies, proxy_index, random_numbers
from ptdit_diffusers.core.backbones.windows import Windows, keep_windows, legal_triple

grids = st.tuples(st.integers(1, 5), st.integers(1, 11), st.integers(1, 11))
triples = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))


def labels(size: int, window: int, shifted: bool) -> list[int]:
    """Window number of each position of an axis, from the borders 0, s, s+c, ... that define it."""
    shift = window // 2 if shifted else 0
    return [math.ceil((position + 1 - shift) / window) if position >= shift else 0 for position in range(size)]


def window_of_token(grid, window, shifted) -> Tensor:
    axes = [torch.tensor(labels(size, length, shifted)) for size, length in zip(grid, window, strict=True)]
    f, h, w = (axis.view([-1 if i == j else 1 for j in range(3)]) for i, axis in enumerate(axes))
    return (f * 10000 + h * 100 + w).expand(grid).flatten()


@settings(max_examples=300, deadline=None)
@given(grid=grids, window=triples, shifted=st.booleans(), batch=st.integers(1, 3), seed=st.integers(0, 9999))
def test_window_attention_equals_dense_attention_with_a_same_window_mask(grid, window, shifted, batch, seed):
    torch.manual_seed(seed)
    layer = Attention(16, 2, scaled_dot_product, torch.nn, None, torch.float64)
    hidden_states = torch.randn(batch, math.prod(grid), 16, dtype=torch.float64)
    windows = Windows(grid, window, shifted)
    result = windows.restore(layer(windows.partition(hidden_states), windows=windows))

    number = window_of_token(grid, window, shifted)
    same = number[:, None] == number[None, :]
    query, key, value = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in layer.project(hidden_states, None))
    logits = (query @ key.transpose(-1, -2) / math.sqrt(8)).masked_fill(~same, -math.inf)
    dense = layer.to_out[0]((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))
    assert (result - dense).abs().max() < 1e-12


@settings(max_examples=200, deadline=None)
@given(grid=grids, window=triples, shifted=st.booleans())
def test_restore_undoes_partition(grid, window, shifted):
    tokens = torch.arange(math.prod(grid)).float().view(1, -1, 1)
    windows = Windows(grid, window, shifted)
    assert torch.equal(windows.restore(windows.partition(tokens)), tokens)
    assert sum(count * size for count, size in windows.sizes) == math.prod(grid)


def proxy_sets(grid, window, ratio) -> list[list[int]]:
    """Tokens of each proxy in raster order of the proxies, from the definition."""
    axes = []
    for axis, (size, length, part) in enumerate(zip(grid, window, ratio, strict=True)):
        box = max(length, part)
        stride = 1 if axis == 0 else box // part
        axes.append(
            [
                list(range(start + offset, min(start + box, size), stride))
                for start in range(0, size, box)
                for offset in range(stride)
                if start + offset < min(start + box, size)
            ]
        )
    _, rows, columns = grid
    return [
        [(f * rows + h) * columns + w for f in frames for h in lines for w in places]
        for frames in axes[0]
        for lines in axes[1]
        for places in axes[2]
    ]


def test_no_64_bit_integers_are_sorted_which_apples_gpus_do_wrongly():
    sorts = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "sort" in str(function):
                sorts.append(args[0].dtype)
            return function(*args, **(kwargs or {}))

    with Watch():
        Windows((3, 20, 20), (1, 8, 8), shifted=True)
    assert sorts and torch.int64 not in sorts


@settings(max_examples=300, deadline=None)
@given(grid=grids, window=triples, ratio=triples, seed=st.integers(0, 9999))
def test_proxies_are_the_means_of_the_tokens_they_have(grid, window, ratio, seed):
    tokens = torch.randn(2, math.prod(grid), 4, generator=torch.manual_seed(seed), dtype=torch.float64)
    expected = torch.stack([tokens[:, members].mean(1) for members in proxy_sets(grid, window, ratio)], dim=1)
    assert (mean_proxies(tokens, grid, window, ratio) - expected).abs().max() < 1e-12


@settings(max_examples=200, deadline=None)
@given(grid=grids, window=triples, ratio=triples, seed=st.integers(0, 9999))
def test_single_token_proxies_belong_to_their_set(grid, window, ratio, seed):
    sets = proxy_sets(grid, window, ratio)
    first = proxy_index(grid, window, ratio, None, torch.device("cpu"))
    assert first.tolist() == [[members[0] for members in sets]]
    assert ProxyPlan(grid, window, ratio).number() == len(sets)
    uniform = random_numbers(2, len(sets), torch.Generator().manual_seed(seed), torch.device("cpu"))
    drawn = proxy_index(grid, window, ratio, uniform, torch.device("cpu"))
    for row in drawn.tolist():
        assert all(token in members for token, members in zip(row, sets, strict=True))


def test_random_proxies_reach_every_token_of_their_set():
    plan = ProxyPlan((1, 5, 7), (1, 4, 4), (1, 2, 4))
    uniform = random_numbers(500, plan.number(), torch.Generator().manual_seed(0), torch.device("cpu"))
    drawn = proxy_index(*plan, uniform, torch.device("cpu"))
    for position, members in enumerate(proxy_sets(*plan)):
        assert set(drawn[:, position].tolist()) == set(members)


def test_positions_count_rows_and_columns_whatever_the_shape():
    table = position_table((2, 3, 5), 16, 1, False, torch.device("cpu")).view(2, 3, 5, 16)
    assert torch.equal(table[0, :, :, 4:], table[1, :, :, 4:])  # space does not depend on the frame
    assert torch.allclose(table[0, 2, 4, 4:7], torch.sin(4 * 10000 ** (-torch.arange(3) / 3)))  # column first
    assert torch.allclose(table[0, 2, 4, 10:13], torch.sin(2 * 10000 ** (-torch.arange(3) / 3)))  # then row


@pytest.mark.parametrize("value", [(1, 8), (1, 0, 8), (1, 8.0, 8), 8, (1, -2, 8), None, (True, 8, 8)])
def test_an_illegal_triple_is_named_with_its_nearest_legal_value(value):
    with pytest.raises(ValueError, match="window_size=.* three integers >= 1 .*nearest: "):
        legal_triple("window_size", value)


def test_the_nearest_legal_triple_keeps_what_is_legal():
    with pytest.raises(ValueError, match=r"nearest: \(1, 8, 8\)"):
        legal_triple("window_size", (1, 8.0, 8))


def test_every_square_size_keeps_the_number_of_windows_where_it_can_be_kept():
    for tokens in range(16, 200):
        (_, rows, columns), _ = keep_windows(tokens, tokens, (1, 8, 8), (1, 8, 8), 64)
        reachable = {-((-tokens // length) ** 2) for length in range(1, tokens + 1)}
        count = -(-tokens // rows) * -(-tokens // columns)
        if 64 in reachable:
            assert count == 64, tokens
        else:
            assert abs(count - 64) <= 17, tokens  # 8 x 9 or 7 x 7 windows


@pytest.mark.parametrize(("rows", "columns"), [(48, 84), (52, 76), (84, 48), (32, 128), (30, 40)])
def test_other_proportions_come_near_the_number_of_windows(rows, columns):
    (_, high, wide), ratio = keep_windows(rows, columns, (1, 8, 8), (1, 4, 8), 64)
    assert abs(-(-rows // high) * -(-columns // wide) - 64) <= 8
    assert abs(high - wide) <= 1
    assert ratio == (1, max(1, round(high / 2)), wide)
