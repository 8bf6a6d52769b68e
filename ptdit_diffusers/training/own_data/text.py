"""Captions as the transformer reads them: encoded in each step (online), or read from the disk (cached).

Letters: B samples, L tokens, D width.
"""

import hashlib
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import free_memory
from safetensors import safe_open
from torch import Tensor
from transformers import T5EncoderModel

from ptdit_diffusers.core.captions import prepare_prompts
from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline
from ptdit_diffusers.pipelines.ptdit_text import join_text
from ptdit_diffusers.training.base_model import BaseModel, gpu_dtype
from ptdit_diffusers.training.data.encode import TEXT_TOKENS
from ptdit_diffusers.training.data.shards import Encoded
from ptdit_diffusers.training.latents import write_tensors

logger = logging.getLogger(__name__)

CHUNK = 4096  # captions in a file
SMALL = 100_000_000  # weights up to which an encoder runs in each step
TOGETHER = 16  # captions encoded at once


class OnlineText:
    """Encodes captions in each step; the encoder is frozen unless a task trains it."""

    def __init__(self, base: BaseModel, tokens: int, device: torch.device) -> None:
        self.tokenizer = base.load_tokenizer()
        self.encoder = T5EncoderModel.from_pretrained(base.part("text_encoder"), dtype=torch.float32)
        self.encoder.eval().requires_grad_(False).to(device)
        self.tokens = tokens

    def rows(self, captions: Sequence[str], numbers: Sequence[int]) -> dict[str, Tensor]:
        """Return ids and mask (B, L) of captions, padded to the longest of them, on the CPU."""
        found = self.tokenizer(
            prepare_prompts(list(captions), clean=True),
            padding="longest",
            max_length=self.tokens,
            truncation=True,
            return_tensors="pt",
        )
        return {"input_ids": found.input_ids, "text_mask": found.attention_mask.bool()}

    def embed(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Return embeddings (B, L, D) and mask of the rows, on the device."""
        mask = batch["text_mask"]
        return self.encoder(batch["input_ids"], attention_mask=mask)[0], mask

    def prompt(self, text: str) -> Tensor:
        """Return the embedding (1, L, D) of a prompt."""
        rows = {name: value.to(self.encoder.device) for name, value in self.rows([text], [0]).items()}
        return self.embed(rows)[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "encoder": None}  # worker processes only make ids


class CachedText:
    """Reads embeddings from the disk; the text encoder is not in memory.

    Args:
        folder: Of the embeddings, beside the index of the encoded data.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": {}}

    def rows(self, captions: Sequence[str], numbers: Sequence[int]) -> dict[str, Tensor | None]:
        """Return embeddings (B, L, D) and mask (B, L) of captions; number -1 is the empty caption."""
        found = [self.prompt("") if number < 0 else self.caption(number)[None] for number in numbers]
        text, mask = join_text(found, [None] * len(found))
        return {"text": text, "text_mask": mask}

    def embed(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Return embeddings and mask of the rows."""
        return batch["text"], batch["text_mask"]

    def caption(self, number: int) -> Tensor:
        """Return the embedding (L, D) of a caption by its number."""
        chunk, row = divmod(number, CHUNK)
        file = self._file(f"{chunk:05d}.safetensors")
        starts = file.get_tensor("starts")
        return file.get_slice("tokens")[int(starts[row]) : int(starts[row + 1])]

    def prompt(self, text: str) -> Tensor:
        """Return the embedding (1, L, D) of a prompt that was encoded with the captions."""
        return self._file(prompt_name(text)).get_tensor("tokens")[None]

    def _file(self, name: str) -> Any:
        if name not in self.files:
            self.files[name] = safe_open(self.folder / name, framework="pt")
        return self.files[name]


def prompt_name(text: str) -> str:
    """Return the name of the file of a prompt's embedding."""
    return f"prompt-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"


def is_small(base: BaseModel) -> bool:
    """Return whether the text encoder is so small that it may run in each step."""
    config = base.config("text_encoder")
    block = 4 * config["d_model"] * config["d_kv"] * config["num_heads"] + 3 * config["d_model"] * config["d_ff"]
    return config["vocab_size"] * config["d_model"] + config["num_layers"] * block <= SMALL


def text_folder(encoded: Encoded, base: BaseModel, tokens: int) -> Path:
    """Return where the embeddings of the captions of a version, cut to so many tokens, lie."""
    limit = "" if tokens == TEXT_TOKENS else f"-{tokens}"
    return encoded.version / f"text-{base.fingerprint('text_encoder', 'tokenizer')}{limit}"


@torch.no_grad()
def cache_text(base: BaseModel, encoded: Encoded, prompts: Sequence[str], tokens: int, device: torch.device) -> Path:
    """Encode the captions of a version and some prompts, what is there already excepted, and return the folder.

    Raises:
        OSError: The disk is full.
    """
    folder, count = text_folder(encoded, base, tokens), encoded.manifest["texts"]
    folder.mkdir(exist_ok=True)
    missing = [chunk for chunk in range(-(-count // CHUNK)) if not (folder / f"{chunk:05d}.safetensors").is_file()]
    texts = [text for text in dict.fromkeys(["", *prompts]) if not (folder / prompt_name(text)).is_file()]
    if not missing and not texts:
        return folder
    pipe = base.load_text_pipeline(gpu_dtype(device), device)

    if missing:
        logger.info("encoding %d captions", count)
        wanted, captions = set(missing), []
        for number, caption in enumerate(encoded.all_captions()):
            if number // CHUNK in wanted:
                captions.append(caption)
            if captions and (number % CHUNK == CHUNK - 1 or number == count - 1):
                rows = together(pipe, captions, tokens)
                starts = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
                write_tensors(
                    folder / f"{number // CHUNK:05d}.safetensors", {"tokens": torch.cat(rows), "starts": starts}
                )
                captions = []
    for text, row in zip(texts, together(pipe, texts, tokens), strict=True):
        write_tensors(folder / prompt_name(text), {"tokens": row})
    del pipe
    free_memory()
    return folder


def together(pipe: PTDiTPipeline, captions: list[str], tokens: int) -> list[Tensor]:
    """Return the embedding (L, D) of each caption, encoded some at a time, without padding, on the CPU."""
    found = []
    for begin in range(0, len(captions), TOGETHER):
        piece = captions[begin : begin + TOGETHER]
        with warnings.catch_warnings():  # a line about all captions was written
            warnings.simplefilter("ignore", UserWarning)
            embeds, mask, *_ = pipe.encode_prompt(piece, do_classifier_free_guidance=False, max_sequence_length=tokens)
        found += [row[keep].cpu() for row, keep in zip(embeds, mask, strict=True)]
    return found
