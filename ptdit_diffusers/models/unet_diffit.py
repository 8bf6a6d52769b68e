"""diffusers model of DiffiT in image space: configuration, mixins; the network is `core.backbones.diffit_unet`."""

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from ptdit_diffusers.core.backbones.diffit_unet import DiffiTCell, DiffiTUNetBackbone
from ptdit_diffusers.core.backbones.diffit_unet_parameters import PRESETS, DiffiTUNetParameters

from .transformer_diffit import DiffiTModelAttention


# ModelMixin, backbone, ConfigMixin in this order: with ConfigMixin first its __getattr__ would hide nn.Module's.
class DiffiTUNet2DModel(ModelMixin, DiffiTUNetBackbone, ConfigMixin, PeftAdapterMixin, AttentionMixin):
    """DiffiT's image-space model (arXiv 2312.02139): a U-shaped network on pixels, trained as EDM.

    No code or weights of it were released; what the paper leaves open is our choice and listed in
    `core.backbones.diffit_unet`. So results of it are no reproduction of the paper's. Defaults are those of "ffhq64".

    Args:
        sample_size (`int`, defaults to 64): side of the pictures that the weights were trained for. Others work if
            they divide by the window at every stage.
        in_channels (`int`, defaults to 3): color channels.
        block_out_channels (`tuple[int]`, defaults to (128, 256, 256, 256)): width of each stage, from full resolution
            down; every stage halves the sides.
        layers_per_block (`tuple[int]`, defaults to (1, 2, 2, 2)): residual cells of each stage.
        window_size (`int`, defaults to 8): cells per side of the windows of attention.
        attention_head_dim (`int`, defaults to 32): width of a head.
        norm_num_groups (`int`, defaults to 32): groups of every GroupNorm.
        time_embed_dim (`int`, defaults to 512): width of the time token.
        num_classes (`int`, defaults to 0): number of classes, 0 for none; the label of this number is the null class.
        class_dropout_prob (`float`, defaults to 0.1): probability that training replaces a label by the null class.
        dropout (`float`, defaults to 0.0): probability of the dropout in a cell.
        augment_dim (`int`, defaults to 0): numbers that describe how a training picture was augmented; 9 for EDM's.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DiffiTCell"]
    _repeated_blocks = ["DiffiTCell"]
    _skip_layerwise_casting_patterns = ["conv_in", "time_token", "y_embedder", "norm", "conv_out"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        block_out_channels: tuple[int, ...] = (128, 256, 256, 256),
        layers_per_block: tuple[int, ...] = (1, 2, 2, 2),
        window_size: int = 8,
        attention_head_dim: int = 32,
        norm_num_groups: int = 32,
        time_embed_dim: int = 512,
        num_classes: int = 0,
        class_dropout_prob: float = 0.1,
        dropout: float = 0.0,
        augment_dim: int = 0,
    ):
        super().__init__()
        self.build(DiffiTUNetParameters.from_config(self.config), attention_class=DiffiTModelAttention)
        self.initialize_weights()
        self.gradient_checkpointing = False

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "DiffiTUNet2DModel":
        """Make one of our presets for the paper's data sets, with initial weights.

        Args:
            name (`str`): "cifar10", "ffhq64", or either with "-large", which has 4 cells at every stage.
            changes: arguments of the class that differ from it.

        Raises:
            ValueError: there is no such preset; names those that there are.
        """
        DiffiTUNetParameters.preset(name, **changes)  # checks both
        return cls(**(PRESETS[name] | changes))

    def run_cell(self, cell: DiffiTCell, *inputs: Any) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(cell, *inputs)
        return cell(*inputs)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Return the raw output F of the network; EDM's schedulers and `core.edm` scale its input and output.

        Args:
            sample (`torch.Tensor` of shape (B, C, H, W)): c_in * noisy pictures.
            timestep (`torch.Tensor` of shape (B,), (1,) or ()): c_noise = ln(sigma) / 4, the timestep of EDM's
                schedulers.
            class_labels (`torch.Tensor` of shape (B,), (1,) or (), *optional*): class numbers; `num_classes`, and
                `None`, is the null class.
            augment_labels (`torch.Tensor` of shape (B, A), *optional*): how the pictures were augmented.
            return_dict (`bool`, defaults to `True`): return a `UNet2DOutput`, else a tuple.

        Returns:
            `UNet2DOutput` with `sample` of shape (B, C, H, W).

        Raises:
            ValueError: a shape or a label is not legal; names the nearest legal value.
        """
        if sample.ndim != 4:
            raise ValueError(f"sample has shape {tuple(sample.shape)}; it must be (batch, channels, height, width).")
        for name, size in zip(("height", "width"), sample.shape[2:], strict=True):
            self.parameters_of.check_side(name, size)
        batch = len(sample)
        timestep = torch.as_tensor(timestep, device=sample.device).reshape(-1)
        if len(timestep) not in (1, batch):
            raise ValueError(f"timestep has {len(timestep)} members for a batch of {batch}; pass {batch} or one.")
        predicted = self.predict(sample, timestep, self._labels(class_labels, batch, sample.device), augment_labels)
        return UNet2DOutput(sample=predicted) if return_dict else (predicted,)

    def _labels(self, class_labels: Tensor | None, batch: int, device: torch.device) -> Tensor | None:
        """Return class numbers (B,), None for an unconditional model."""
        classes = self.config.num_classes
        if not classes:
            if class_labels is not None:
                raise ValueError("this model is unconditional (num_classes=0); leave class_labels out.")
            return None
        highest = self.y_embedder.embedding_table.num_embeddings - 1
        if class_labels is None and highest < classes:
            raise ValueError("this model was trained without a null class, so it needs class_labels.")
        labels = torch.as_tensor(classes if class_labels is None else class_labels, device=device).reshape(-1)
        if len(labels) not in (1, batch):
            raise ValueError(f"class_labels has {len(labels)} members for a batch of {batch}; pass {batch} or one.")
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():  # on a GPU a look would wait for it
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high > highest:
                wrong, nearest = (low, 0) if low < 0 else (high, highest)
                raise ValueError(f"class label {wrong} must be 0 to {highest}; nearest: {nearest}.")
        return labels.expand(batch)
