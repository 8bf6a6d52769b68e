"""Formulas of what PT-DiT costs, in multiply-accumulates of one forward; the algebra is in `docs/cost.md`."""

from dataclasses import dataclass

from ptdit_diffusers.core.backbones.proxies import ProxyPlan
from ptdit_diffusers.core.backbones.windows import Triple


@dataclass(frozen=True)
class Size:
    """One forward: token grid, windows, width and depth, text, batch."""

    grid: Triple
    window: Triple
    ratio: Triple
    dim: int = 1152
    layers: int = 28
    text: int = 24
    batch: int = 1
    caption: int = 4096
    patch_in: int = 16  # in channels * patch area
    patch_out: int = 32

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def proxies(self) -> int:
        return ProxyPlan(self.grid, self.window, self.ratio).number()

    @property
    def window_pairs(self) -> int:
        """Pairs of tokens that meet in windows and in shifted windows: sums of squares, a product over the axes."""
        pairs = 0
        for shifted in (False, True):
            product = 1
            for size, length in zip(self.grid, self.window, strict=True):
                head = min(length // 2, size) if shifted else 0
                product *= head**2 + (size - head) // length * length**2 + ((size - head) % length) ** 2
            pairs += product
        return pairs


def linear_macs(size: Size) -> int:
    """Return those of linear layers: 22 D^2 a token, 6 D^2 a proxy, 2 D^2 a text token in each block; both ends."""
    square = size.dim**2
    block = 22 * square * size.tokens + 6 * square * size.proxies + 2 * square * size.text
    conditions = 256 * size.dim + square + 6 * square
    ends = size.tokens * size.dim * (size.patch_in + size.patch_out)
    text = size.text * (size.caption * size.dim + square)
    return size.batch * (size.layers * block + conditions + ends + text)


def attention_macs(size: Size) -> int:
    """Return those of scores and weighted sums: 2 D for each pair of tokens that meet."""
    tokens, proxies = size.tokens, size.proxies
    pairs = proxies**2 + tokens * proxies + size.window_pairs + tokens * size.text
    return size.batch * size.layers * 2 * size.dim * pairs


def total_macs(size: Size) -> int:
    """Return those of one forward."""
    return linear_macs(size) + attention_macs(size)


def attention_ratio(tokens: int, per_window: int) -> float:
    """Return equation 4 over equation 3 of the paper: attention among image tokens against global attention."""
    return 1 / per_window**2 + 1 / per_window + 2 * per_window / tokens


def savings(size: Size, heads: int) -> dict[str, float]:
    """Return what each product of `fuse_linear_layers` saves, in D^2 MACs per token of a block, at one timestep."""
    tokens, dim = size.tokens, size.dim

    def fold(keys: int) -> float:
        plain = tokens * (2 * dim**2 + 2 * keys * dim)
        return max(0, plain - 2 * tokens * keys * heads * dim - 2 * keys * dim**2) / tokens / dim**2

    return {
        "linear_1_visual * to_out": 1.0,
        "text folded": fold(size.text),
        "proxies folded": fold(size.proxies),
        "linear_2 * gate * to_out": max(0.0, 1 - dim / (tokens * size.batch)),
        "joint q, k, v": 0.0,
    }
