"""Context parallelism of PT-DiT: where tokens are split among devices and gathered, and windows across devices."""

from collections.abc import Callable

from diffusers.models._modeling_parallel import ContextParallelConfig, ContextParallelInput, ContextParallelOutput
from diffusers.models.attention_dispatch import SeqAllToAllDim
from torch import Tensor

from ptdit_diffusers.core.backbones.windows import Windows

SPLIT_TOKENS = {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)}
GATHER_TOKENS = ContextParallelOutput(gather_dim=1, expected_dims=3)
# Windows, shifted windows and proxies need the tokens in three orders, so no one split of the sequence serves a whole
# block. The residual stream stays whole on every device; the tokens of each layer are split before it and gathered
# after it.
CONTEXT_PARALLEL_PLAN = {
    "transformer_blocks.*.pvisual_attn2": SPLIT_TOKENS,
    "transformer_blocks.*.linear_1_visual": GATHER_TOKENS,
    "transformer_blocks.*.attn1": SPLIT_TOKENS,
    "transformer_blocks.*.attn1.to_out.0": GATHER_TOKENS,
    "transformer_blocks.*.attn3": SPLIT_TOKENS,
    "transformer_blocks.*.linear_2": GATHER_TOKENS,
    "transformer_blocks.*.attn2": SPLIT_TOKENS,
    "transformer_blocks.*.attn2.to_out.0": GATHER_TOKENS,
    "transformer_blocks.*.ff": SPLIT_TOKENS,
    "transformer_blocks.*.ff.net.2": GATHER_TOKENS,
}


class SharedWindows:
    """Windows over tokens that are split among the devices of a context-parallel group.

    A device's tokens may begin and end inside a window. So devices exchange tokens for heads before the attention
    (Ulysses), each attends with its share of the heads in all windows, and they exchange back.

    Args:
        windows: windows over all tokens.
        heads: heads of the attention.
        parallel: the context-parallel group.

    Raises:
        ValueError: the number of devices does not divide the heads, or the parts are not equal.
    """

    def __init__(self, windows: Windows, heads: int, parallel: ContextParallelConfig):
        devices = parallel.ring_degree * parallel.ulysses_degree
        if heads % devices:
            legal = max(part for part in range(1, devices) if heads % part == 0)
            raise ValueError(f"{heads} heads cannot be shared by {devices} devices; nearest smaller number: {legal}.")
        if parallel.ulysses_anything or parallel.ring_anything:
            raise ValueError(
                "ulysses_anything and ring_anything make unequal parts, which windows cannot use; drop it."
            )
        self.windows = windows
        self.group = parallel._flattened_mesh.get_group()

    def attend(self, attention: Callable, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend inside each window, with this device's part of the tokens: (B, N / devices, heads, head_dim)."""
        query, key, value = (SeqAllToAllDim.apply(self.group, tokens) for tokens in (query, key, value))
        return SeqAllToAllDim.apply(self.group, self.windows.attend(attention, query, key, value), 1, 2)
