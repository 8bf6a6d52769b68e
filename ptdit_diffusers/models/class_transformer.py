"""What the class-conditional transformers have in common as models of diffusers: mixins, loading, checks of inputs."""

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders import FromOriginalModelMixin, PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from ptdit_diffusers.core.backbones.dit import DiTBackbone
from ptdit_diffusers.core.checkpoint_names import ConversionError

# Options of `from_pretrained` that tell where files are, not how the model is built.
CONFIG_PLACES = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")


# ModelMixin, backbone, ConfigMixin in this order: with ConfigMixin first its __getattr__ would hide nn.Module's.
class ClassTransformer2DModel(
    ModelMixin, DiTBackbone, ConfigMixin, PeftAdapterMixin, FromOriginalModelMixin, CacheMixin, AttentionMixin
):
    """Base of `DiT2DModel` and `DiffiT2DModel`; subclasses have the configuration."""

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["x_embedder", "t_embedder", "y_embedder", "pos_embed", "norm", "final_layer"]
    _keep_in_fp32_modules = ["pos_embed"]
    system = "DiT"  # in messages

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "ClassTransformer2DModel":
        """Load a folder of this class.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id.
            kwargs: options of `ModelMixin.from_pretrained`.

        Raises:
            ValueError: it is another model, or its position table is another one.
        """
        places = {name: kwargs[name] for name in CONFIG_PLACES if name in kwargs}
        config = cls.load_config(pretrained_model_name_or_path, **places)
        if config.get("_class_name", cls.__name__) not in [base.__name__ for base in cls.__mro__]:
            raise ConversionError(
                f"{pretrained_model_name_or_path} holds a {config['_class_name']}, not a {cls.system}."
            )
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).restore_positions()
        return loaded

    def restore_positions(self) -> None:
        """Compare the position table that was loaded with the formula, then use the formula, in float32.

        Raises:
            ValueError: it is another table.
        """
        self.pos_embed = self.checked_positions(self.pos_embed).to(self.pos_embed.device)

    def run_block(self, block: nn.Module, *inputs: Any) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the noise in the first `in_channels` channels and, with learned variance, its value v after them.

        Args:
            hidden_states (`torch.Tensor` of shape (B, C, H, W)): noisy latents, sides multiples of the patch size.
            timestep (`torch.Tensor` of shape (B,), (1,) or ()): time in 0..999; it may be fractional.
            class_labels (`torch.Tensor` of shape (B,), (1,) or ()): class numbers; `num_classes` is the null class.
            return_dict (`bool`, defaults to `True`): return a `Transformer2DModelOutput`, else a tuple.
            attention_kwargs (`dict`, *optional*): `{"scale": s}` scales the LoRA.

        Returns:
            `Transformer2DModelOutput` with `sample` of shape (B, out_channels, H, W).

        Raises:
            ValueError: a shape or a label is not legal; names the nearest legal value.
        """
        if hidden_states.ndim != 4:
            raise ValueError(
                f"hidden_states has shape {tuple(hidden_states.shape)}; it must be (batch, channels, height, width)."
            )
        self.check_size(*hidden_states.shape[-2:])
        batch = len(hidden_states)
        timestep = torch.as_tensor(timestep, device=hidden_states.device).reshape(-1)
        class_labels = torch.as_tensor(class_labels, device=hidden_states.device).reshape(-1)
        for name, values in (("timestep", timestep), ("class_labels", class_labels)):
            if len(values) not in (1, batch):
                raise ValueError(f"{name} has {len(values)} members for a batch of {batch}; pass {batch} or one.")
        if (
            class_labels.device.type == "cpu" and not torch.compiler.is_compiling()
        ):  # on a GPU a look would wait for it
            self._check_labels(class_labels)
        sample = self.predict(hidden_states, timestep, class_labels.expand(batch))
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _check_labels(self, class_labels: Tensor) -> None:
        highest = self.y_embedder.embedding_table.num_embeddings - 1
        low, high = int(class_labels.min()), int(class_labels.max())
        if low < 0 or high > highest:
            wrong = low if low < 0 else high
            null = f", {highest} being the null class" if highest == self.num_classes else ""
            raise ValueError(
                f"class label {wrong} must be 0 to {highest}{null}; nearest: {0 if low < 0 else highest}."
            )
