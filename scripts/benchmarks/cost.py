"""Shares of what PT-DiT costs, by the formulas of `ptdit_diffusers/core/cost.py`; the algebra is in `docs/cost.md`."""

from ptdit_diffusers.core.cost import Size


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
