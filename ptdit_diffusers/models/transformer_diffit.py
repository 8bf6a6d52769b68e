"""diffusers model of DiffiT's latent model: configuration, mixins; the network is `core.backbones.diffit`."""

from collections.abc import MutableMapping
from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, dispatch_attention_fn
from torch import Tensor

from ptdit_diffusers.core.backbones.diffit import INDEX_BUFFER, Cut, DiffiTAttention, DiffiTBackbone, check_index
from ptdit_diffusers.core.backbones.diffit_parameters import DiffiTParameters

from .class_transformer import ClassTransformer2DModel

TAKE_BIAS = ("native", "_native_math", "_native_efficient", "_native_cudnn")  # backends that add floats to logits


class DiffiTAttnProcessor:
    """Attend through diffusers' dispatcher, which `set_attention_backend` configures.

    The bias of positions is a mask of floats, which flash kernels do not take: where such a backend was chosen,
    torch's own kernel is used.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "DiffiTModelAttention", hidden_states: Tensor, condition: Tensor, cut: Cut) -> Tensor:
        chosen = self._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
        attend = partial(dispatch_attention_fn, backend=chosen if chosen in TAKE_BIAS else "native")
        return attn.attend(attend, hidden_states, condition, cut)


class DiffiTModelAttention(DiffiTAttention, AttentionModuleMixin):
    """The backbone's attention with a diffusers processor."""

    _default_processor_cls = DiffiTAttnProcessor
    _available_processors = [DiffiTAttnProcessor]
    _supports_qkv_fusion = False  # queries, keys and values are one layer already

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.set_processor(DiffiTAttnProcessor())

    def forward(self, hidden_states: Tensor, condition: Tensor, cut: Cut) -> Tensor:
        return self.processor(self, hidden_states, condition, cut)


class DiffiT2DModel(ClassTransformer2DModel, DiffiTBackbone):
    """DiffiT's latent model (arXiv 2312.02139), with the official weights' exact results.

    A class-conditional transformer like DiT. Time and class enter through the queries, keys and values of every
    attention, which also has a bias of relative positions; nothing else is conditional. Defaults are the released
    model for 256 px; the one for 512 px has `sample_size=64`.

    Args:
        num_attention_heads (`int`, defaults to 16): heads of every attention.
        attention_head_dim (`int`, defaults to 72): width of a head; heads * width must be a multiple of 4.
        num_layers (`int`, defaults to 28): number of blocks.
        patch_size (`int`, defaults to 2): latent pixels per token side.
        in_channels (`int`, defaults to 4): latent channels.
        out_channels (`int`, defaults to 8): channels of the output: noise, then with learned variance as many more.
        sample_size (`int`, defaults to 32): side of the latents that the weights were trained for. Others only work
            with a `window_size` smaller than the grid.
        num_classes (`int`, defaults to 1000): number of classes; the label of this number is the null class.
        class_dropout_prob (`float`, defaults to 0.1): probability that training replaces a label by the null class;
            at 0 there is no null class, and no guidance.
        window_size (`int`, *optional*): tokens per side of the windows of attention, as in the paper's local form;
            `None`: the whole grid is one window, as in the released models.
        shift_window (`bool`, defaults to `False`): whether every second block shifts the windows by half their size
            (ours, as in PT-DiT).
    """

    _no_split_modules = ["DiffiTBlock"]
    _repeated_blocks = ["DiffiTBlock"]
    _keys_to_ignore_on_load_unexpected = [INDEX_BUFFER]
    system = "DiffiT"

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        num_layers: int = 28,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int = 8,
        sample_size: int = 32,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        window_size: int | None = None,
        shift_window: bool = False,
    ):
        super().__init__()
        self.build(DiffiTParameters.from_config(self.config), attention_class=DiffiTModelAttention)
        self.initialize_weights()
        self.gradient_checkpointing = False

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "DiffiT2DModel":
        """Make one of the released models with initial weights.

        Args:
            name (`str`): "DiffiT-256" or "DiffiT-512".
            changes: arguments of the class that differ from it.

        Raises:
            ValueError: there is no such model; names those that there are.
        """
        return cls(**vars(DiffiTParameters.preset(name, **changes)))

    def _fix_state_dict_keys_on_load(self, state_dict: MutableMapping[str, torch.Tensor]) -> None:
        """Check and drop the index buffers of a folder's weights; called by `from_pretrained`."""
        super()._fix_state_dict_keys_on_load(state_dict)
        for name, layer in self.named_modules():
            buffer = f"{name}.{INDEX_BUFFER}"
            if isinstance(layer, DiffiTAttention) and buffer in state_dict:
                check_index(buffer, state_dict.pop(buffer), layer.window)
