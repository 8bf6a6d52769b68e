"""Attention of PT-DiT with diffusers' attention processors and backends."""

from collections.abc import Callable
from functools import partial
from typing import Any

from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from ptdit_diffusers.core.backbones.layers import Attention
from ptdit_diffusers.core.backbones.windows import Windows


class PTDiTAttnProcessor:
    """Attend through diffusers' dispatcher, which `set_attention_backend` configures.

    Flash kernels take no mask, so attention to masked text uses torch's own kernel whatever was chosen. Where devices
    share the tokens, each has all the keys of its queries, so attention itself knows nothing of it.
    """

    _attention_backend = None

    def __call__(
        self,
        attn: "PTDiTAttention",
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        windows: Windows | None = None,
        out: Callable | None = None,
    ) -> Tensor:
        backend = self._attention_backend if attention_mask is None else "native"
        attend = partial(dispatch_attention_fn, backend=backend)
        return attn.attend(attend, hidden_states, encoder_hidden_states, attention_mask, windows, out)


class PTDiTAttention(Attention, AttentionModuleMixin):
    """The backbone's attention with a diffusers processor and optional fused projections."""

    _default_processor_cls = PTDiTAttnProcessor
    _available_processors = [PTDiTAttnProcessor]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.use_bias = True
        self.is_cross_attention = False
        self.fused_projections = False
        self.set_processor(PTDiTAttnProcessor())

    def project(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if not self.fused_projections:
            return super().project(hidden_states, encoder_hidden_states)
        if encoder_hidden_states is None:
            return self.to_qkv(hidden_states).chunk(3, dim=-1)
        if not self.is_cross_attention:  # tokens of windows that other devices own
            return self.to_qkv(hidden_states).chunk(3, dim=-1)[0], *self.to_qkv(encoder_hidden_states).chunk(
                3, dim=-1
            )[1:]
        return self.to_q(hidden_states), *self.to_kv(encoder_hidden_states).chunk(2, dim=-1)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        windows: Windows | None = None,
        out: Callable | None = None,
    ) -> Tensor:
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask, windows, out)
