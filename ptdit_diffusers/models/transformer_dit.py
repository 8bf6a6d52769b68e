"""diffusers model of DiT: configuration, mixins, checks of inputs; the network is `core.backbones.dit`."""

from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionModuleMixin
from torch import Tensor

from ptdit_diffusers.core.backbones.dit import DiTAttention
from ptdit_diffusers.core.backbones.dit_parameters import DiTParameters
from ptdit_diffusers.core.checkpoint_names import LISTED, ConversionError, check_weights
from ptdit_diffusers.core.dit_checkpoints import dit_config, official_state_dict

from .attention_ptdit import PTDiTAttnProcessor
from .class_transformer import CONFIG_PLACES, ClassTransformer2DModel

# Options of `from_pretrained` that tell where files are, not how the model is built.
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


class DiT2DModel(ClassTransformer2DModel):
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

    _no_split_modules = ["DiTBlock", "DiTTokenBlock"]
    _repeated_blocks = ["DiTBlock", "DiTTokenBlock"]

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
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

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
