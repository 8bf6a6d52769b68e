"""Open checkpoints of DiT, DiffiT and the image VAEs that go with them: names, configuration, check of all weights."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor

from ptdit_diffusers.core.backbones.diffit import INDEX_BUFFER, check_index
from ptdit_diffusers.core.backbones.diffit_parameters import PRESETS as DIFFIT_PRESETS
from ptdit_diffusers.core.backbones.diffit_parameters import DiffiTParameters
from ptdit_diffusers.core.backbones.dit_parameters import SIZES
from ptdit_diffusers.core.checkpoint_names import ConversionError, Shapes, check_weights, shapes_of
from ptdit_diffusers.core.configuration import count, length
from ptdit_diffusers.core.diffit_checkpoints import diffit_config, index_buffers, is_diffit
from ptdit_diffusers.core.dit_checkpoints import (
    DIFFUSERS_SIGNATURE,
    KNOWN_HEADS,
    POSITION_TABLE,
    check_copies,
    diffusers_sources,
    dit_config,
    is_dit,
    official_shapes,
)
from ptdit_diffusers.core.documents import read_json

from ..models.class_transformer import ClassTransformer2DModel
from ..models.transformer_diffit import DiffiT2DModel
from ..models.transformer_dit import DIFFUSERS_CLASSES, DiT2DModel
from .containers import Facts, Weights
from .networks import Config, Part, build, weights_in_words

IMAGE_VAES = ("encoder.mid_block.resnets.0.conv1.weight", "encoder.mid.attn_1.q.weight")  # diffusers' names, original


@dataclass(frozen=True)
class System:
    """A kind of class-conditional transformer.

    Attributes:
        name: In messages.
        model: Its class.
        recognizes: Whether weights of these names are its.
        config: Shapes under official names, the file and what is given -> the whole configuration.
    """

    name: str
    model: type[ClassTransformer2DModel]
    recognizes: Callable[[Iterable[str]], bool]
    config: Callable[[Shapes, Path, Config], Config]


DIT = System("DiT", DiT2DModel, is_dit, dit_config)
DIFFIT = System("DiffiT", DiffiT2DModel, is_diffit, diffit_config)


def system_of(names: Iterable[str]) -> System | None:
    """Return the kind of class-conditional transformer that weights of these names are, None if they are another."""
    names = set(names)
    return next((system for system in (DIT, DIFFIT) if system.recognizes(names)), None)


class DiTWeights(Weights):
    """The weights of a DiT or DiffiT under official names, from files with those or the names of diffusers' class.

    The position table is the formula's, whether the file has one or not, and index buffers are left out; `check`
    compares them.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self.indexes = {name: self.facts.pop(name) for name in index_buffers(self.facts)}
        self.raw_shapes = self.shapes
        self.sources, self.copies = {name: [name] for name in self.facts}, {}
        self.positions: Tensor | None = None
        if DIFFUSERS_SIGNATURE in self.facts:
            self.sources, self.copies = diffusers_sources(self.facts)
        raw = self.facts
        self.facts = {
            name: Facts(shape, raw[self.sources[name][0]].dtype)
            for name, shape in official_shapes(self.raw_shapes).items()
        }

    def check(self, model: ClassTransformer2DModel) -> None:
        """Check names, shapes, position table, indexes and copies against a model, and take over its position table.

        Raises:
            ConversionError: The file does not hold exactly the weights of this model.
        """
        config, shapes = model.config, self.shapes
        expected = shapes_of(model.state_dict())
        shapes.setdefault(POSITION_TABLE, expected[POSITION_TABLE])
        dim = config.num_attention_heads * config.attention_head_dim
        what = f"a {model.system} of width {dim} with {config.num_layers} layers for latents of {config.sample_size}"
        check_weights(self.path, what, expected, shapes)
        if self.copies:
            tensors = self._open()[1]
            check_copies(self.path, self.copies, lambda name: tensors[self.given[name]])
        stored = dict(super().stream([POSITION_TABLE])) if POSITION_TABLE in self.given else {}
        try:
            self.positions = model.checked_positions(stored.get(POSITION_TABLE))
            for name, index in super().stream(self.indexes):
                check_index(name, index, model.get_submodule(name.removesuffix(f".{INDEX_BUFFER}")).window)
        except ValueError as error:
            raise ConversionError(f"{self.path}: {error}") from error
        self.facts[POSITION_TABLE] = Facts(tuple(self.positions.shape), self.positions.dtype)

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield weights in the given order. Use each weight before you ask for the next one."""
        names = list(names)
        parts = super().stream([part for name in names if name != POSITION_TABLE for part in self.sources[name]])
        for name in names:
            if name == POSITION_TABLE:
                yield name, self.positions
                continue
            tensors = [next(parts)[1] for _ in self.sources[name]]
            yield name, tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def open_class_transformer(
    system: System, path: Path, config: Config | None = None, asked: Config | None = None
) -> tuple[DiTWeights, Config]:
    """Open a checkpoint of DiT or DiffiT and check all its weights.

    Args:
        system: Which of them.
        path: The file.
        config: The whole configuration; None finds it.
        asked: What the user says; fields of the configuration win over what is found.

    Returns:
        The weights under official names, and the whole configuration.

    Raises:
        ConversionError: The file cannot be read, or does not hold exactly such a model.
    """
    weights = DiTWeights(path)
    if not system.recognizes(weights.raw_shapes):
        with_defaults = shapes_of(build(system.model, {}).state_dict())
        check_weights(path, f"a {system.name}", with_defaults, weights.shapes)
    given = folder_facts(weights, system) | asked_of(system, asked or {})
    config = config or system.config(weights.shapes, path, given)
    try:
        model = build(system.model.from_config, {"config": config})
    except ValueError as error:
        raise ConversionError(f"{path}: {error}") from error
    weights.check(model)
    return weights, config


def asked_of(system: System, options: Config) -> Config:
    """Return what the options of a call say about the configuration."""
    names = build(system.model, {"num_layers": 1}).config
    return {name: options[name] for name in names if options.get(name) is not None}


def folder_facts(weights: DiTWeights, system: System = DIT) -> Config:
    """Return what the configuration beside a file says that its weights do not show, empty if there is none."""
    beside = weights.path.parent / "config.json"
    config = read_json(beside) if beside.is_file() else {}
    if config.get("_class_name") == DiffiT2DModel.__name__ and system is DIFFIT:
        return {name: config[name] for name in ("window_size", "shift_window") if name in config}
    if config.get("_class_name") not in (*DIFFUSERS_CLASSES, DiT2DModel.__name__) or system is DIFFIT:
        return {}
    names = ("num_attention_heads", "sample_size") if weights.copies else ("num_attention_heads",)
    return {name: config[name] for name in names if name in config}


def plan_class_transformer(system: System, path: Path, num_heads: int | None) -> Part:
    """Open a checkpoint of DiT or DiffiT, find its configuration, check all its weights.

    Args:
        system: Which of them.
        path: The file.
        num_heads: None takes those of the configuration beside the file, else those of the known size of that width;
            files of DiffiT show them.

    Raises:
        ConversionError: The file cannot be read, or does not hold exactly such a model.
    """
    weights, config = open_class_transformer(system, path, asked={"num_attention_heads": num_heads})
    part = Part("transformer", "diffusion_pytorch_model", weights, build(system.model, config))
    part.facts = (describe_diffit if system is DIFFIT else describe_dit)(part, num_heads)
    return part


def describe_dit(part: Part, num_heads: int | None) -> list[str]:
    """Return lines that say what was found."""
    config = part.model.config
    width, depth = config.num_attention_heads * config.attention_head_dim, config.num_layers
    size = next((size for size, known in SIZES.items() if known[:2] == (depth, width)), None)
    name = f"DiT-{size}/{config.patch_size}" if size else f"DiT of width {width} with {depth} layers"
    heads = "as asked" if num_heads else "of this size" if width in KNOWN_HEADS else "as beside the file"
    form = ", in the form of diffusers" if part.weights.copies else ""
    return [
        f"{weights_in_words(part)}{form}",
        f"transformer: {name}, {config.block_type} blocks, {config.num_attention_heads} heads ({heads}), "
        f"{classes_in_words(config)}",
    ]


def describe_diffit(part: Part, num_heads: int | None) -> list[str]:
    """Return lines that say what was found."""
    config = part.model.config
    sizes = DiffiTParameters.from_config(config)
    presets = {DiffiTParameters.preset(name): name for name in DIFFIT_PRESETS}
    name = presets.get(sizes, f"DiffiT of width {sizes.dim} with {sizes.num_layers} layers")
    windows = f"windows of {sizes.window} x {sizes.window} tokens{', shifted' if sizes.shift_window else ''}"
    return [
        f"{weights_in_words(part)}; {len(part.weights.indexes)} index buffers, checked and left out",
        f"transformer: {name}, {sizes.num_attention_heads} heads, {windows}, {classes_in_words(config)}",
    ]


def classes_in_words(config: Config) -> str:
    """Return what a configuration says about classes, size and variance."""
    variance = "with" if config.out_channels == 2 * config.in_channels else "without"
    return f"{config.num_classes} classes, latents of {config.sample_size}, {variance} learned variance"


def label_names(path: Path) -> dict[str, str] | None:
    """Return class names from the `model_index.json` of the folder that a transformer's file lies in, or None."""
    index = path.parent.parent / "model_index.json"
    names = read_json(index).get("id2label") if index.is_file() else None
    return names if isinstance(names, dict) else None


# --- the image VAE ---------------------------------------------------------------------------------------------------


class LoadedWeights(Weights):
    """Weights of a checkpoint that were renamed in memory."""

    def __init__(self, opened: Weights, content: dict[str, Tensor]):
        self.path, self.nesting, self.content = opened.path, opened.nesting, content
        self.facts = {name: Facts(tuple(tensor.shape), tensor.dtype) for name, tensor in content.items()}

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield weights in the given order."""
        yield from ((name, self.content[name]) for name in names)


def is_image_vae(path: Path) -> bool:
    """Return whether a file holds a VAE of Stable Diffusion's kind, under original names or those of diffusers."""
    names = Weights(path).facts
    return any(name in names for name in IMAGE_VAES)


def plan_image_vae(path: Path) -> Part:
    """Open a checkpoint of a VAE of Stable Diffusion's kind, such as sd-vae-ft-ema and sd-vae-ft-mse.

    Raises:
        ConversionError: The file cannot be read, or does not hold exactly such a VAE.
    """
    opened = Weights(path)
    wanted = [name for name in opened.facts if not name.startswith(("loss.", "model_ema."))]
    content = dict(opened.stream(wanted))
    original = "encoder.mid.attn_1.q.weight" in content
    try:
        model = build(AutoencoderKL, image_vae_config(shapes_of(content), original))
    except ValueError as error:  # widths that Stable Diffusion's norms cannot have
        raise ConversionError(f"{path}: {error}") from error
    if original:
        content = convert_ldm_vae_checkpoint(content, model.config)
    else:
        model._fix_state_dict_keys_on_load(content)  # names of attention before diffusers 0.18
    check_weights(path, "a VAE of Stable Diffusion", shapes_of(model.state_dict()), shapes_of(content))
    part = Part("vae", "diffusion_pytorch_model", LoadedWeights(opened, content), model)
    part.facts = [f"{weights_in_words(part)}; scale {model.config.scaling_factor}"]
    return part


def image_vae_config(shapes: dict[str, tuple[int, ...]], original: bool) -> Config:
    """Return the configuration of a VAE of Stable Diffusion's kind with weights of these shapes."""
    first = "encoder.down.{}.block.0.conv1.weight" if original else "encoder.down_blocks.{}.resnets.0.conv1.weight"
    levels = count(shapes, "encoder.down." if original else "encoder.down_blocks.") or 4
    widths = [length(shapes, first.format(level), 0, 128) for level in range(levels)]
    blocks = count(shapes, "encoder.down.0.block." if original else "encoder.down_blocks.0.resnets.")
    return {
        "block_out_channels": tuple(widths),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": blocks or 2,
        "latent_channels": length(shapes, "decoder.conv_in.weight", 1, 4),
        "sample_size": 256,
    }
