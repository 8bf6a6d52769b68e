"""Text for PT-DiT: a T5 of any size from a model folder, literal prompts, the 200-token limit.

Encoding is ComfyUI's own T5; only tokenizing and cutting are here.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.text_encoders.pixart_t5
import torch

from ptdit_diffusers.core.captions import clean_caption
from ptdit_diffusers.core.checkpoint_names import check_weights, shapes_of
from ptdit_diffusers.core.configuration import pack_config
from ptdit_diffusers.core.vocabulary import refusal

SAVED_TOKENIZER = "ptdit_tokenizer"  # a uint8 tensor among the weights of a saved text encoder: JSON
MAX_TOKENS = 200  # that the official model was trained with, end token included
NOT_USED = "this part is not used"
T5_SIZES = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size")
ACTIVATIONS = {"gelu_new": "gelu_pytorch_tanh", "gelu_pytorch_tanh": "gelu_pytorch_tanh", "relu": "relu"}


class FileTokenizer:
    """The text of a `tokenizer.json` with the few methods that ComfyUI asks of a tokenizer."""

    def __init__(self, text: str):
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_str(text)
        self.tokenizer.no_truncation()  # `cut_tokens` cuts, and says what
        self.tokenizer.no_padding()
        self.unknown = self.tokenizer.token_to_id("<unk>")

    @classmethod
    def from_pretrained(cls, text: str, **_: Any) -> FileTokenizer:
        """Build it from the text of the file, as ComfyUI builds its own from a path."""
        return cls(text)

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.tokenizer.encode(text).ids}

    def get_vocab(self) -> dict[str, int]:
        """Token -> id."""
        return self.tokenizer.get_vocab()

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of tokens."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)


def tokenizer_class(text: str, config: dict[str, Any]) -> type:
    """Return ComfyUI's wrapper around the text of a `tokenizer.json`, unpadded like the one for PixArt.

    It is saved with the encoder, together with the encoder's `config`.
    """

    class FolderTokenizer(comfy.sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: dict | None = None):
            super().__init__(
                text,
                embedding_directory=embedding_directory,
                pad_with_end=False,
                embedding_size=config["d_model"],
                embedding_key="t5xxl",
                tokenizer_class=FileTokenizer,
                has_start_token=False,
                pad_to_max_length=False,
                max_length=99999999,
                min_length=1,
                tokenizer_data=tokenizer_data or {},
            )

        def tokenize_with_weights(self, text: str, *args: Any, **kwargs: Any) -> list:
            plain = text if kwargs.get("disable_weights") else without_weights(text)
            for line in cannot_make(self.tokenizer, plain):
                logging.warning("PT-DiT: %s", line)
            return super().tokenize_with_weights(text, *args, **kwargs)

        def state_dict(self) -> dict[str, torch.Tensor]:
            return {SAVED_TOKENIZER: pack_config({"tokenizer": text, "config": config})}

    class FolderTokenizers(comfy.sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: dict | None = None):
            super().__init__(
                embedding_directory=embedding_directory,
                tokenizer_data=tokenizer_data or {},
                clip_name="t5xxl",
                tokenizer=FolderTokenizer,
            )

    return FolderTokenizers


def t5_config(path: Path) -> dict[str, Any]:
    """What ComfyUI's T5 needs of a `config.json` of transformers.

    Raises:
        ValueError: The encoder is of a kind that ComfyUI's T5 cannot be.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    activation = config.get("dense_act_fn", "gelu_new")
    fixed = {"model_type": "t5", "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}
    wrong = [f"{key}={config[key]!r}" for key, value in fixed.items() if config.get(key, value) != value]
    if activation not in ACTIVATIONS:
        wrong.append(f"dense_act_fn={activation!r}")
    if wrong:
        raise ValueError(f"{path}: ComfyUI's T5 cannot run an encoder with {', '.join(wrong)}.")
    gated = config.get("is_gated_act", "gated" in config.get("feed_forward_proj", ""))
    sizes = {name: config[name] for name in T5_SIZES}
    return {**sizes, "dense_act_fn": ACTIVATIONS[activation], "is_gated_act": gated}


def clip_target(config: dict[str, Any], dtype: torch.dtype, tokenizer: str | None) -> Any:
    """Return what ComfyUI builds a CLIP from: a T5 of these sizes; `tokenizer` is its file's text, None for T5's."""
    pixart = comfy.text_encoders.pixart_t5
    given_dtype = dtype

    def build(device: Any = "cpu", dtype: Any = None, model_options: dict | None = None) -> Any:
        options = {**(model_options or {}), "t5xxl_model_config": config}
        return pixart.PixArtT5XXL(device=device, dtype=given_dtype, model_options=options)

    tokens = pixart.PixArtTokenizer if tokenizer is None else tokenizer_class(tokenizer, config)
    return comfy.supported_models_base.ClipTarget(tokens, build)


def saved_clip_target(state_dict: dict[str, torch.Tensor], prefix: str) -> Any:
    """Return the target of a small T5 that ComfyUI saved in a whole checkpoint, None if its tokenizer is missing."""
    if prefix + SAVED_TOKENIZER not in state_dict:
        logging.warning("PT-DiT: the checkpoint's text encoder has no tokenizer, so it is not loaded.")
        return None
    saved = json.loads(bytes(state_dict[prefix + SAVED_TOKENIZER].to("cpu", torch.uint8).tolist()))
    weight = next(value for name, value in state_dict.items() if name.startswith(f"{prefix}t5xxl.transformer."))
    return clip_target(saved["config"], weight.dtype, saved["tokenizer"])


def folder_clip(config: dict[str, Any], weights: dict[str, torch.Tensor], tokenizer: Path | None) -> comfy.sd.CLIP:
    """A ComfyUI CLIP of a T5 folder; without `tokenizer` the stock T5 tokenizer is used.

    Raises:
        ConversionError: The weights are not exactly those of its `config`; names the first ones.
    """
    text = None if tokenizer is None else tokenizer.read_text(encoding="utf-8")
    dtype = next(iter(weights.values())).dtype
    size = sum(weight.numel() for weight in weights.values())
    clip = comfy.sd.CLIP(clip_target(config, dtype, text), parameters=size, model_options={"dtype": dtype})
    if "shared.weight" not in weights and "encoder.embed_tokens.weight" in weights:
        weights = {**weights, "shared.weight": weights["encoder.embed_tokens.weight"]}
    prefix = "t5xxl.transformer."  # ComfyUI's, also of a small T5
    own = {name: value for name, value in clip.cond_stage_model.state_dict().items() if name.startswith(prefix)}
    expected = {name.removeprefix(prefix): shape for name, shape in shapes_of(own).items()}
    found = {name: shape for name, shape in shapes_of(weights).items() if name != "encoder.embed_tokens.weight"}
    check_weights("text_encoder", "the T5 of its config.json", expected, found)
    clip.load_sd(weights)
    return clip


def prepare_text(text: str, cleaning: bool, literal: bool = True) -> str:
    """Return a prompt as the official pipeline gives it to the tokenizer: cleaned, or only lower-cased and stripped.

    Where brackets weigh words, they stay, and what is between them is cleaned.
    """
    if not cleaning:
        return text.lower().strip()
    if literal:
        return clean_caption(text)
    parts = ((clean_caption(part), weight) for part, weight in weighted_parts(text))
    return " ".join(part if weight == 1 else f"({part}:{weight:.4g})" for part, weight in parts if part)


def weighted_parts(text: str) -> list[tuple[str, float]]:
    """Return the parts of a prompt with the weights that ComfyUI's brackets give them."""
    parts = comfy.sd1_clip.token_weights(comfy.sd1_clip.escape_important(text), 1.0)
    return [(comfy.sd1_clip.unescape_important(part), weight) for part, weight in parts]


def cut_tokens(tokens: list[list[tuple]], limit: int) -> tuple[list[list[tuple]], list]:
    """Cut each row to `limit` tokens, the end token kept.

    Returns:
        The rows, and the ids that were cut off.
    """
    kept, lost = [], []
    for row in tokens:
        if len(row) > limit:
            lost += [entry[0] for entry in row[limit - 1 : -1]]
            row = [*row[: limit - 1], row[-1]]
        kept.append(row)
    return kept, lost


def unknown_words(tokenizer: Any, text: str) -> list[str]:
    """Words of which a folder's tokenizer makes its unknown token."""
    if not isinstance(tokenizer, FileTokenizer) or tokenizer.unknown is None:
        return []
    return [word for word in text.split() if tokenizer.unknown in tokenizer(word)["input_ids"]]


def cannot_make(tokenizer: Any, text: str) -> list[str]:
    """Return in words what a folder's small model does not know of a prompt, and what it was never taught."""
    unknown = unknown_words(tokenizer, text)
    lines = [f"the text encoder does not know {', '.join(map(repr, unknown))}"] if unknown else []
    untaught = refusal(tokenizer.get_vocab(), text, negative=True) if isinstance(tokenizer, FileTokenizer) else None
    return [*lines, untaught] if untaught else lines


def without_weights(text: str) -> str:
    """Return a prompt without the brackets and numbers that weigh its words."""
    return " ".join(part for part, _ in weighted_parts(text))


def encode_prompt(clip: comfy.sd.CLIP, text: str, literal: bool, cleaning: bool) -> tuple[list, str]:
    """CONDITIONING of a prompt, and what was done to it in words.

    Args:
        clip: a T5 of type pixart, or a folder's.
        literal: brackets are text; else `(word:1.2)` weighs words.
        cleaning: clean like the training captions.
    """
    prepared = prepare_text(text, cleaning, literal)
    rows = clip.tokenize(prepared, **({"disable_weights": True} if literal else {}))
    notes = []
    for name, tokens in rows.items():
        rows[name], lost = cut_tokens(tokens, MAX_TOKENS)
        tokenizer = getattr(getattr(clip.tokenizer, clip.tokenizer.clip, None), "tokenizer", None)
        if lost:
            words = tokenizer.decode(lost) if tokenizer is not None else f"{len(lost)} tokens"
            notes.append(f"the model reads {MAX_TOKENS} tokens; {NOT_USED}: {words!r}")
        notes += cannot_make(tokenizer, prepared if literal else without_weights(prepared))
    count = sum(len(row) for row in next(iter(rows.values())))
    notes.insert(0, f"{count} of {MAX_TOKENS} tokens: {prepared!r}")
    return clip.encode_from_tokens_scheduled(rows), "; ".join(notes)
