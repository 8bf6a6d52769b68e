"""Text for PT-DiT: a T5 of any size from a model folder, literal prompts, the 200-token limit.

Encoding is ComfyUI's own T5; only tokenising and cutting are here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.text_encoders.pixart_t5
import torch

from ptdit_diffusers.core.captions import clean_caption

MAX_TOKENS = 200  # that the official model was trained with, end token included
T5_SIZES = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size")
ACTIVATIONS = {"gelu_new": "gelu_pytorch_tanh", "gelu_pytorch_tanh": "gelu_pytorch_tanh", "relu": "relu"}


class FileTokenizer:
    """A `tokenizer.json` with the few methods that ComfyUI asks of a tokeniser."""

    def __init__(self, path: str):
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(path)
        self.tokenizer.no_truncation()  # `cut_tokens` cuts, and says what
        self.tokenizer.no_padding()
        self.unknown = self.tokenizer.token_to_id("<unk>")

    @classmethod
    def from_pretrained(cls, path: str, **_: Any) -> FileTokenizer:
        """What ComfyUI calls to build it."""
        return cls(path)

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.tokenizer.encode(text).ids}

    def get_vocab(self) -> dict[str, int]:
        """Token -> id."""
        return self.tokenizer.get_vocab()

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of tokens."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)


def tokenizer_class(path: Path, width: int) -> type:
    """ComfyUI's tokeniser wrapper around a `tokenizer.json`, unpadded like the one for PixArt."""

    class FolderTokenizer(comfy.sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: dict | None = None):
            super().__init__(
                str(path),
                embedding_directory=embedding_directory,
                pad_with_end=False,
                embedding_size=width,
                embedding_key="t5xxl",
                tokenizer_class=FileTokenizer,
                has_start_token=False,
                pad_to_max_length=False,
                max_length=99999999,
                min_length=1,
                tokenizer_data=tokenizer_data or {},
            )

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


def folder_clip(config: dict[str, Any], weights: dict[str, torch.Tensor], tokenizer: Path | None) -> comfy.sd.CLIP:
    """A ComfyUI CLIP of a T5 folder; without `tokenizer` the stock T5 tokeniser is used.

    Raises:
        ValueError: Weights are missing.
    """
    pixart = comfy.text_encoders.pixart_t5
    tokens = pixart.PixArtTokenizer if tokenizer is None else tokenizer_class(tokenizer, config["d_model"])
    options = {"t5xxl_model_config": config, "dtype": next(iter(weights.values())).dtype}
    size = sum(weight.numel() for weight in weights.values())
    target = comfy.supported_models_base.ClipTarget(tokens, pixart.PixArtT5XXL)
    clip = comfy.sd.CLIP(target, parameters=size, model_options=options)
    if "shared.weight" not in weights and "encoder.embed_tokens.weight" in weights:
        weights = {**weights, "shared.weight": weights["encoder.embed_tokens.weight"]}
    missing, _ = clip.load_sd(weights)
    if missing:
        raise ValueError(f"the text encoder lacks {len(missing)} weights: {', '.join(missing[:5])}")
    return clip


def prepare_text(text: str, cleaning: bool) -> str:
    """A prompt as the official pipeline gives it to the tokeniser: cleaned, or only lower-cased and stripped."""
    return clean_caption(text) if cleaning else text.lower().strip()


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
    """Words of which a folder's tokeniser makes its unknown token."""
    if not isinstance(tokenizer, FileTokenizer) or tokenizer.unknown is None:
        return []
    return [word for word in text.split() if tokenizer.unknown in tokenizer(word)["input_ids"]]


def encode_prompt(clip: comfy.sd.CLIP, text: str, literal: bool, cleaning: bool) -> tuple[list, str]:
    """CONDITIONING of a prompt, and what was done to it in words.

    Args:
        clip: a T5 of type pixart, or a folder's.
        literal: brackets are text; else `(word:1.2)` weighs words.
        cleaning: clean like the training captions.
    """
    prepared = prepare_text(text, cleaning)
    rows = clip.tokenize(prepared, **({"disable_weights": True} if literal else {}))
    notes = []
    for name, tokens in rows.items():
        rows[name], lost = cut_tokens(tokens, MAX_TOKENS)
        tokenizer = getattr(getattr(clip.tokenizer, clip.tokenizer.clip, None), "tokenizer", None)
        if lost:
            words = tokenizer.decode(lost) if tokenizer is not None else f"{len(lost)} tokens"
            notes.append(f"the model reads {MAX_TOKENS} tokens; this part is not used: {words!r}")
        unknown = unknown_words(tokenizer, prepared)
        if unknown:
            notes.append(f"the text encoder does not know {', '.join(map(repr, unknown))}")
    count = sum(len(row) for row in next(iter(rows.values())))
    notes.insert(0, f"{count} of {MAX_TOKENS} tokens: {prepared!r}")
    return clip.encode_from_tokens_scheduled(rows), "; ".join(notes)
