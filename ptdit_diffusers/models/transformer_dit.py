"""diffusers model of DiT: configuration, mixins, checks of inputs; the network is `core.backbones.dit`."""

from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import FromOriginalModelMixin, PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from ptdit_diffusers.core.backbones.dit import DiTAttention, DiTBackbone
from ptdit_diffusers.core.backbones.dit_parameters import DiTParameters, check_multiple
from ptdit_diffusers.core.checkpoint_names import LISTED, ConversionError, check_weights
from ptdit_diffusers.core.dit_checkpoints import dit_config, official_state_dict

from .attention_ptdit import PTDiTAttnProcessor

# Options of `from_pretrained` that tell where files are, not how the model is built.
CONFIG_PLACES = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
PLACES = (*CONFIG_PLACES, "variant", "use_safetensors")
DIFFUSERS_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")


class DiTModelAttention(DiTAttention, AttentionModuleMixin):
    """The backbone's attention with a diffusers processor."""

    _default_processor_cls = PTDiTAttnProcessor
    _available_processors = [PTDiTAttnProcessor]
    _supports_qkv_fusion = False  # queries, keys and values are one layer already

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.set_processor(PTDiTAttnProcessor())

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        return self.processor(self, hidden_states, encoder_hidden_states)


# ModelMixin, backbone, ConfigMixin in this order: with ConfigMixin first its __getattr__ would hide nn.Module's.
class DiT2DModel(
    ModelMixin, DiTBackbone, ConfigMixin, PeftAdapterMixin, FromOriginalModelMixin, CacheMixin, AttentionMixin
):
    """DiT, the class-conditional diffusion transformer (arXiv 2212.09748), with the official weights' exact results.

    diffusers' own `DiTTransformer2DModel` is another function of the same weights: its time sinusoid has other
    frequencies. Defaults are the released DiT-XL/2 for 256 px.

    Args:
        num_attention_heads (`int`, defaults to 16): heads of every attention.
        attention_head_dim (`int`, defaults to 72): width of a head; heads * width must be a multiple of 4.
        num_layers (`int`, defaults to 28): number of blocks.
        patch_size (`int`, defaults to 2): latent pixels per token side.
        in_channels (`int`, defaults to 4): latent channels.
        out_channels (`int`, defaults to 8): channels of the output: noise, then with learned variance as many more.
        sample_size (`int`, defaults to 32): side of the latents that the weights were trained for; others work, too.
        num_classes (`int`, defaults to 1000): number of classes; the label of this number is the null class.
        block_type (`str`, defaults to "adaln_zero"): "adaln_zero", "adaln", "cross_attention" or "in_context".
        class_dropout_prob (`float`, defaults to 0.1): probability that training replaces a label by the null class;
            at 0 there is no null class, and no guidance.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DiTBlock", "DiTTokenBlock"]
    _repeated_blocks = ["DiTBlock", "DiTTokenBlock"]
    _skip_layerwise_casting_patterns = ["x_embedder", "t_embedder", "y_embedder", "pos_embed", "norm", "final_layer"]
    _keep_in_fp32_modules = ["pos_embed"]

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
        block_type: str = "adaln_zero",
        class_dropout_prob: float = 0.1,
    ):
        super().__init__()
        self.build(DiTParameters.from_config(self.config), attention_class=DiTModelAttention)
        self.initialize_weights()
        self.gradient_checkpointing = False

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "DiT2DModel":
        """Make one of the paper's models with initial weights.

        Args:
            name (`str`): "DiT-S/8" to "DiT-XL/2"; "DiT-XL-2" means the same.
            changes: arguments of the class that differ from it.

        Raises:
            ValueError: there is no such model; names those that there are.
        """
        return cls(**vars(DiTParameters.preset(name, **changes)))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "DiT2DModel":
        """Load a folder of this class, or of diffusers' own DiT classes, whose weights get the official names.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id, e.g. "facebook/DiT-XL-2-256" with
                `subfolder="transformer"`.
            kwargs: options of `ModelMixin.from_pretrained`.

        Raises:
            ValueError: it is another model, its position table is another one, or blocks of diffusers' class do not
                share one embedding.
        """
        places = {name: kwargs[name] for name in CONFIG_PLACES if name in kwargs}
        config = cls.load_config(pretrained_model_name_or_path, **places)
        of_diffusers = config.get("_class_name") in DIFFUSERS_CLASSES
        if of_diffusers and config.get("norm_type", "ada_norm_zero") == "ada_norm_zero":  # others are PixArt's
            return cls._from_diffusers(pretrained_model_name_or_path, **kwargs)
        if config.get("_class_name", cls.__name__) not in [base.__name__ for base in cls.__mro__]:
            raise ConversionError(f"{pretrained_model_name_or_path} holds a {config['_class_name']}, not a DiT.")
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).restore_positions()
        return loaded

    @classmethod
    def _from_diffusers(cls, source: Any, **kwargs: Any) -> "DiT2DModel":
        places = {name: kwargs.pop(name) for name in PLACES if name in kwargs}
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        kwargs.pop("low_cpu_mem_usage", None)
        if kwargs:
            raise ValueError(
                f"{', '.join(kwargs)} cannot be used with weights of diffusers' class: load them without and "
                "save_pretrained() them, or run `ptdit convert`."
            )
        other, report = DiTTransformer2DModel.from_pretrained(source, output_loading_info=True, **places)
        if report["missing_keys"]:
            missing = ", ".join(report["missing_keys"][:LISTED])
            raise ConversionError(f"{source} lacks {len(report['missing_keys'])} weights of a DiT: {missing}")
        weights = official_state_dict(other.state_dict(), source)
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        given = {name: other.config[name] for name in ("num_attention_heads", "sample_size")}
        with torch.device("meta"):
            model = cls(**dit_config(shapes, source, given))
        expected = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        check_weights(source, "a DiT", expected, shapes)
        model.load_state_dict(weights, assign=True)
        model = model if dtype is None else model.to(dtype)
        model.restore_positions()
        return model.eval()

    def restore_positions(self) -> None:
        """Compare the position table that was loaded with the formula, then use the formula, in float32.

        Raises:
            ValueError: it is another table.
        """
        self.pos_embed = self.checked_positions(self.pos_embed).to(self.pos_embed.device)

    def run_block(self, block: nn.Module, hidden_states: Tensor, condition: Tensor | None) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, hidden_states, condition)
        return block(hidden_states, condition)

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
        for name, size in zip(("height", "width"), hidden_states.shape[-2:], strict=True):
            check_multiple(f"latent {name}", size, self.patch_size)
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
