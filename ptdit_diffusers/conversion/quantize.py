"""Smaller copies of transformer and T5: int8 (torchao), fp8 storage, GGUF; and the same while a pipeline loads.

Only weights of linear layers are quantized; time embedding, patches, output, tables and norms keep their format.
Needs torchao for int8 and gguf for GGUF, which are not installed with the package.
"""

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import TorchAoConfig
from diffusers.hooks.layerwise_casting import apply_layerwise_casting, apply_layerwise_casting_hook
from diffusers.quantizers import PipelineQuantizationConfig
from transformers import T5EncoderModel
from transformers import TorchAoConfig as TextTorchAoConfig

from ptdit_diffusers.core.checkpoint_names import (
    PACKED_CONFIG,
    ConversionError,
    Shapes,
    check_weights,
    clean_names,
    is_transformer,
    shapes_of,
)
from ptdit_diffusers.core.configuration import GGUF_CONFIG, carried_config, folder_config, pack_config
from ptdit_diffusers.core.documents import read_json
from ptdit_diffusers.core.folder_files import inside, model_files, new_folder
from ptdit_diffusers.core.model_folder import check_layers
from ptdit_diffusers.core.small_formats import FORMATS, GGUF_FORMATS, QUANTIZED_PARTS

from ..models.class_transformer import ClassTransformer2DModel
from ..models.transformer_diffit import DiffiT2DModel
from ..models.transformer_dit import DiT2DModel
from ..models.transformer_ptdit import PTDiTTransformer3DModel
from .containers import Facts, Weights, one_line
from .folder import check_output, check_space
from .gguf_header import check_gguf
from .networks import build_for
from .q4_k import BLOCK, quantize_q4_k
from .text import TABLE, TIED_TABLE, WEIGHT_FILES, encoder_names, read_config
from .writing import bytes_of, write_weights

CARD = ("README.md",)  # copied along
KEPT = {  # weights with these parts in their names are not quantized
    "transformer": (  # as diffusers' fp8 does
        *PTDiTTransformer3DModel._skip_layerwise_casting_patterns,
        "proj_out",
        *ClassTransformer2DModel._skip_layerwise_casting_patterns,
    ),
    "text_encoder": ("shared", "embed_tokens", "relative_attention_bias", "layer_norm"),
}
FEED_FORWARD = "DenseReluDense"  # T5's; it reads the format of its last weight, so it is cast as a whole
ARCHITECTURES = {"transformer": "ptdit", "text_encoder": "t5encoder"}
GGUF_BLOCK = 32  # numbers that share a scale; of q4_k it is `BLOCK`
Q4_K_FALLBACK = "Q5_0"  # for rows that are no multiple of `BLOCK`, as llama.cpp does it


# --- while a pipeline loads ------------------------------------------------------------------------------------------


def require(package: str, what: str) -> None:
    """Raise `ConversionError` if an optional package is missing."""
    if find_spec(package) is None:
        raise ConversionError(f"{what} needs the package {package}: python -m pip install {package}")


def int8_on_load() -> PipelineQuantizationConfig:
    """Return `quantization_config=` of `from_pretrained`: linear weights of transformer and T5 as int8 (torchao).

    Raises:
        ConversionError: torchao is missing.
    """
    require("torchao", "int8")
    return PipelineQuantizationConfig(quant_mapping={name: int8_config(name) for name in QUANTIZED_PARTS})


def int8_config(component: str) -> TorchAoConfig | TextTorchAoConfig:
    """Return how torchao turns one component into int8."""
    from torchao.quantization import Int8WeightOnlyConfig

    kind = TorchAoConfig if component == "transformer" else TextTorchAoConfig
    return kind(Int8WeightOnlyConfig(version=2), modules_to_not_convert=list(KEPT[component]))


def store_in_fp8(model: torch.nn.Module, compute_dtype: torch.dtype) -> None:
    """Keep the linear weights of a loaded transformer or T5 as fp8 (e4m3) and compute in another format.

    Each layer is cast up when it runs and down again afterwards. It takes half the memory of bf16 and is somewhat
    slower.
    """
    fp8 = torch.float8_e4m3fn
    if isinstance(model, PTDiTTransformer3DModel | ClassTransformer2DModel):
        model.enable_layerwise_casting(storage_dtype=fp8, compute_dtype=compute_dtype)
        return
    for name, module in model.named_modules():
        if name.endswith(FEED_FORWARD):
            apply_layerwise_casting_hook(module, fp8, compute_dtype, non_blocking=False)
    apply_layerwise_casting(model, fp8, compute_dtype, skip_modules_pattern=(*KEPT["text_encoder"], FEED_FORWARD))


def load_in_fp8(model: Path, component: str, compute_dtype: torch.dtype) -> torch.nn.Module:
    """Load transformer or T5 of a model folder with fp8 linear weights, each cast as it is read.

    The numbers are those of `store_in_fp8` on a loaded model, but the larger copy is never in memory.

    Raises:
        ConversionError: The folder holds no weights of it, or others than its configuration names.
    """
    weights = open_component(model, component)
    if component == "transformer":
        config = read_json(model / component / "config.json")
        empty = build_for(model / component, transformer_class(config), config)
    else:
        empty = build_for(model / component, T5EncoderModel, read_config(model / component))
    expected = shapes_of(empty.state_dict())
    expected.pop(TIED_TABLE, None)
    check_weights(weights.path, f"the {component.replace('_', ' ')} in {model}", expected, weights.shapes)
    exact = tuple(empty._keep_in_fp32_modules) if component == "transformer" else ()
    state = {}
    for name, tensor in weights.stream(weights.facts):
        is_exact = name.rpartition(".")[2] in exact
        kept = torch.float32 if is_exact else compute_dtype
        coarse = is_quantized(component, name, weights.facts[name])
        state[name] = tensor.to(
            torch.float8_e4m3fn if coarse else kept, copy=True
        )  # so that no page of the file stays mapped
    if component == "text_encoder":
        state[TIED_TABLE] = state[TABLE]
    empty.load_state_dict(state, assign=True)
    store_in_fp8(empty, compute_dtype)
    return empty.eval()


# --- files -----------------------------------------------------------------------------------------------------------


def quantize(
    model: Path,
    output: Path,
    form: str,
    components: tuple[str, ...] = QUANTIZED_PARTS,
    overwrite: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Write a smaller copy of a model folder; of int8 and fp8 a whole one, of GGUF one `.gguf` file per component.

    Args:
        model: Folder that `convert` or `save_pretrained` wrote.
        output: Folder to create.
        form: One of `FORMATS`.
        components: Which of "transformer" and "text_encoder" to quantise.
        overwrite: Replace a model folder that exists.
        report: Receives a line with sizes for each component.

    Raises:
        ConversionError: The folder or the format cannot be used, or a package is missing. Nothing was written.
        OSError: Writing failed. Nothing is left behind.
    """
    if form not in FORMATS:
        raise ConversionError(f"there is no format {form!r}; choose one of {', '.join(FORMATS)}")
    if form == "int8":
        require("torchao", "int8")
    elif form in GGUF_FORMATS:
        require("gguf", form)
    output = Path(os.path.abspath(output))
    check_output(output, overwrite, [model], CARD)
    if not (model / "model_index.json").is_file():
        raise ConversionError(f"{model} is no model folder: it has no model_index.json")
    try:
        check_layers(model)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    opened = {name: open_component(model, name) for name in components}
    plans = {name: plan(name, weights) for name, weights in opened.items()}
    check_space(output, plans)
    with new_folder(output, lambda: check_output(output, overwrite, [model], CARD)) as unfinished:
        if form not in GGUF_FORMATS:
            copy_rest(model, unfinished, components)
        for name, weights in opened.items():
            write_component(model, unfinished, name, weights, plans[name], form)
            before = sum(bytes_of(facts) for facts in weights.facts.values())
            after = size_of(unfinished, name, form)
            report(f"{name.replace('_', ' ')}: {before / 10**9:.3f} GB, as {form} {after / 10**9:.3f} GB")


def transformer_class(config: dict[str, Any]) -> Any:
    """Return the class of a transformer with this configuration."""
    classes = {kind.__name__: kind for kind in (DiT2DModel, DiffiT2DModel)}
    return classes.get(config.get("_class_name"), PTDiTTransformer3DModel)


def open_component(model: Path, component: str) -> Weights:
    """Open the weights of one component of a model folder. Values are not read yet."""
    folder = model / component
    stems = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json", *WEIGHT_FILES)
    path = next((folder / stem for stem in stems if (folder / stem).is_file()), None)
    if path is None:
        raise ConversionError(f"{model} has no weights of the {component.replace('_', ' ')}; name other --components")
    if "quantization_config" in read_json(folder / "config.json"):
        raise ConversionError(f"{folder} is quantized already; take the folder that it was made from")
    weights = Weights(path)
    if component == "text_encoder":
        weights.rename(encoder_names(list(weights.facts)))
    return weights


def plan(component: str, weights: Weights) -> dict[str, Facts]:
    """Return shape and format of each weight: fp8 where it is quantized, else as it is."""
    return {
        name: Facts(facts.shape, torch.float8_e4m3fn if is_quantized(component, name, facts) else facts.dtype)
        for name, facts in weights.facts.items()
    }


def is_quantized(component: str, name: str, facts: Facts) -> bool:
    """Return whether this is the weight of a linear layer that may be quantized."""
    return len(facts.shape) == 2 and name.endswith(".weight") and not any(part in name for part in KEPT[component])


def copy_rest(model: Path, output: Path, components: tuple[str, ...]) -> None:
    """Copy the model's own files but those of the components that will be written again."""
    try:
        names = model_files(model)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    card = [name for name in CARD if (model / name).is_file() and inside(model / name, model)]
    for name in names + card:
        if name.split("/")[0] not in components:
            (output / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(model / name, output / name)


def write_component(
    model: Path, output: Path, name: str, weights: Weights, planned: dict[str, Facts], form: str
) -> None:
    """Write one component in its new format."""
    if form in GGUF_FORMATS:
        write_gguf(output / gguf_name(name, form), model, name, weights, planned, form)
        return
    (output / name).mkdir()
    if form == "int8":
        write_int8(model, output, name, weights)
        return
    shutil.copy(model / name / "config.json", output / name)
    stem = "diffusion_pytorch_model" if name == "transformer" else "model"
    write_weights(output / name, stem, weights, planned)


def write_int8(model: Path, output: Path, name: str, weights: Weights) -> None:
    """Load one component as int8 and let its library save it."""
    formats = [facts.dtype for facts in weights.facts.values()]
    dtype = max(set(formats), key=formats.count)
    of_diffusers = name == "transformer"
    kind = transformer_class(read_json(model / name / "config.json")) if of_diffusers else T5EncoderModel
    loaded = kind.from_pretrained(model / name, dtype=dtype, quantization_config=int8_config(name))
    loaded.save_pretrained(output / name)


def gguf_name(component: str, form: str) -> str:
    """Return the name of a GGUF file in the output folder."""
    return f"{component}-{form}.gguf"


def size_of(output: Path, component: str, form: str) -> int:
    """Return how many bytes were written for a component."""
    if form in GGUF_FORMATS:
        return (output / gguf_name(component, form)).stat().st_size
    return sum(path.stat().st_size for path in (output / component).iterdir())


# --- GGUF ------------------------------------------------------------------------------------------------------------


def write_gguf(
    path: Path, model: Path, component: str, weights: Weights, planned: dict[str, Facts], form: str
) -> None:
    """Write one GGUF file. The transformer keeps its names; T5 gets llama.cpp's, which all readers know.

    A weight whose rows are no multiple of 32 numbers is kept in fp32.
    """
    import gguf

    writer = gguf.GGUFWriter(path, ARCHITECTURES[component], use_temp_file=True)
    rename = t5_names(len(weights.facts)) if component == "text_encoder" else lambda name: name
    if component == "text_encoder":
        describe_t5(writer, read_config(model / component))
    else:
        writer.add_string(GGUF_CONFIG, (model / component / "config.json").read_text(encoding="utf-8"))
        if is_transformer(weights.facts):  # once more as a tensor, since ComfyUI-GGUF passes on nothing else
            packed = pack_config(folder_config(model)).float().numpy()
            writer.add_tensor(PACKED_CONFIG, packed, raw_dtype=gguf.GGMLQuantizationType.F32)
    for name, tensor in weights.stream(planned):
        kind = gguf.GGMLQuantizationType[gguf_kind(form, planned[name])]
        if kind is gguf.GGMLQuantizationType.Q4_K:
            numbers = quantize_q4_k(tensor).numpy()
        else:
            numbers = gguf.quants.quantize(tensor.float().numpy(), kind)
        writer.add_tensor(rename(name), numbers, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path) -> tuple[Shapes, dict[str, Any]]:
    """Return shapes of the weights in a GGUF file of a transformer, and the configuration that it carries."""
    check_gguf(path)
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        shapes = {
            tensor.name: tuple(int(size) for size in reversed(tensor.shape))
            for tensor in reader.tensors
            if tensor.name != PACKED_CONFIG
        }
        fields = {GGUF_CONFIG: reader.fields[GGUF_CONFIG].contents()} if GGUF_CONFIG in reader.fields else {}
    except Exception as error:  # a crafted file fails in many ways
        raise ConversionError(f"{path} is cut off or damaged; fetch it again ({one_line(error)})") from error
    return {clean: shapes[name] for clean, name in clean_names(shapes).items()}, carried_config({}, fields)


def gguf_kind(form: str, facts: Facts) -> str:
    """Return GGUF's name of the format of one weight."""
    columns = facts.shape[-1]
    if facts.dtype != torch.float8_e4m3fn or columns % GGUF_BLOCK:
        return "F32"
    return Q4_K_FALLBACK if form == "q4_k" and columns % BLOCK else form.upper()


def t5_names(blocks: int) -> Callable[[str], str]:
    """Return a function from names of transformers to those of llama.cpp for a T5 encoder."""
    import gguf

    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, blocks)

    def rename(name: str) -> str:
        found = "token_embd.weight" if name == TABLE else table.get_name(name, try_suffixes=(".weight",))
        if found is None:
            raise ConversionError(f"{name} has no name in GGUF files of a T5")
        return found

    return rename


def describe_t5(writer: Any, config: Any) -> None:
    """Write the sizes of a T5 encoder into a GGUF file.

    Raises:
        ConversionError: It is a T5 v1.0, which readers of GGUF do not know.
    """
    if config.feed_forward_proj != "gated-gelu":
        raise ConversionError("GGUF knows T5 v1.1 only (gated-gelu)")
    writer.add_context_length(512)  # T5's positions are relative, so this is no limit
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_key_length(config.d_kv)
    writer.add_value_length(config.d_kv)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_relative_attn_buckets_count(config.relative_attention_num_buckets)
    writer.add_vocab_size(config.vocab_size)
