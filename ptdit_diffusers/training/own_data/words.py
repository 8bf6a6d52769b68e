"""New words for a text encoder of whole words: their embeddings learn to be guessed from the words around them.

All that the encoder had stays as it is, so captions of known words keep their encoding exactly.
Letters: B captions, L tokens, D width, V words.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from ptdit_diffusers.core.captions import prepare_prompts
from ptdit_diffusers.core.documents import read_mapping
from ptdit_diffusers.core.files import replace_json
from ptdit_diffusers.core.folder_files import new_folder
from ptdit_diffusers.core.vocabulary import OWN_CAPTIONS, data_set_of
from ptdit_diffusers.training.randomness import Stream, numpy_generator
from ptdit_diffusers.training.settings import LoopSettings
from ptdit_diffusers.training.task import Task

logger = logging.getLogger(__name__)

EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")  # one tensor under two names
MASKED = 0.25  # share of the words that are guessed


def has_word_list(tokenizer_folder: Path) -> bool:
    """Return whether a tokenizer has one token per word, as those of the embedded models."""
    path = tokenizer_folder / "tokenizer.json"
    return path.is_file() and read_mapping(path)["model"].get("type") == "WordLevel"


def needs_mark(tokenizer_folder: Path) -> bool:
    """Return whether the list of words is that of an embedded model, which would be asked about the prompts."""
    path = tokenizer_folder / "tokenizer.json"
    return has_word_list(tokenizer_folder) and data_set_of(read_mapping(path)["model"]["vocab"]) is not None


def unknown_words(tokenizer: Any, captions: Iterable[str]) -> Counter[str]:
    """Return the words of captions that a tokenizer of whole words does not know, and how often each occurs."""
    parts, known = tokenizer.backend_tokenizer, tokenizer.get_vocab()
    found: Counter[str] = Counter()
    for caption in captions:
        (text,) = prepare_prompts([caption], clean=True)
        text = parts.normalizer.normalize_str(text) if parts.normalizer else text
        found.update(word for word, _ in parts.pre_tokenizer.pre_tokenize_str(text) if word not in known)
    return found


def extend(tokenizer_folder: Path, encoder_folder: Path, words: Sequence[str], folder: Path) -> None:
    """Write a tokenizer and an encoder that know more words; embeddings of new ones are random.

    Args:
        tokenizer_folder, encoder_folder: What there is.
        words: To add, beside the mark of own captions.
        folder: Gets tokenizer/ and text_encoder/.
    """
    encoder = T5EncoderModel.from_pretrained(encoder_folder, dtype=torch.float32)
    old = encoder.shared.weight.detach()
    content = read_mapping(tokenizer_folder / "tokenizer.json")
    vocabulary = content["model"]["vocab"]
    first = max(len(old), max(vocabulary.values()) + 1)
    new = [word for word in dict.fromkeys([OWN_CAPTIONS, *words]) if word not in vocabulary]
    vocabulary.update({word: first + number for number, word in enumerate(new)})
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(first + len(new) - len(old), old.shape[1], generator=generator) * old.std()
    larger = T5EncoderModel(T5Config(**{**encoder.config.to_dict(), "vocab_size": first + len(new)}))
    layers = {name: value for name, value in encoder.state_dict().items() if name not in EMBEDDINGS}
    larger.load_state_dict(layers, strict=False)
    with torch.no_grad():
        larger.shared.weight.copy_(torch.cat([old, rows]))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as made:
        larger.save_pretrained(made / "text_encoder")
        (made / "tokenizer").mkdir()
        for path in tokenizer_folder.iterdir():
            if path.is_file() and path.name != "tokenizer.json":
                (made / "tokenizer" / path.name).write_bytes(path.read_bytes())
        replace_json(made / "tokenizer" / "tokenizer.json", content)


@dataclass(kw_only=True)
class WordSettings(LoopSettings):
    """Settings of the stage."""

    folder: str  # with tokenizer/ and text_encoder/, from `extend`
    known: int  # embeddings that stay as they are


class GuessedWords(nn.Module):
    """The encoder with fixed weights, embeddings of new words, and what turns its output into a guess."""

    def __init__(self, encoder: T5EncoderModel, known: int) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        weight = encoder.shared.weight.detach()
        self.register_buffer("known", weight[:known].clone())
        self.new = nn.Parameter(weight[known:].clone())
        self.guess = nn.Linear(weight.shape[1], weight.shape[1])

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return how likely each word (B, L, V) is at each place."""
        table = torch.cat([self.known, self.new])
        hidden = self.encoder(inputs_embeds=F.embedding(ids, table), attention_mask=mask).last_hidden_state
        scale = table.std() * table.shape[1] ** 0.5
        return self.guess(hidden) @ table.T / scale


class WordTask(Task):
    """Some words of each caption are hidden, and guessed."""

    def __init__(self, settings: WordSettings, captions: Sequence[str], device: torch.device) -> None:
        self.settings, self.captions, self.device = settings, captions, device
        folder = Path(settings.folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        encoder = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        self.model = GuessedWords(encoder, settings.known).to(device)

    def batch(self, step: int, rank: int, batch_size: int) -> dict[str, Tensor]:
        """Return ids with hidden words, mask, and labels (B, L); -100 = not guessed."""
        choice = numpy_generator(self.settings.seed, Stream.OWN_TEXT, rank, step)
        captions = [self.captions[i] for i in choice.integers(len(self.captions), size=batch_size)]
        found = self.tokenizer(
            prepare_prompts(captions, clean=True), padding="longest", truncation=True, return_tensors="pt"
        )
        ids, mask = found.input_ids, found.attention_mask
        words = mask.bool() & (ids != self.tokenizer.eos_token_id)
        hidden = torch.from_numpy(choice.random(tuple(ids.shape)) < MASKED) & words
        labels = ids.masked_fill(~hidden, -100)
        return {"ids": ids.masked_fill(hidden, self.tokenizer.unk_token_id), "mask": mask, "labels": labels}

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.model(batch["ids"], batch["mask"]).float()
        labels, guessed = batch["labels"], batch["labels"] != -100
        right = ((logits.argmax(-1) == labels) & guessed).sum() / guessed.sum().clamp(min=1)
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        return total / guessed.sum().clamp(min=1), {"words_guessed": right.detach()}

    def state(self) -> dict[str, Tensor]:
        return {"new": self.model.new.detach(), **self.model.guess.state_dict(prefix="guess.")}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        self.model.new.copy_(state["new"])
        self.model.guess.load_state_dict({"weight": state["guess.weight"], "bias": state["guess.bias"]})

    def export(self, folder: Path) -> None:
        """Write tokenizer/ and text_encoder/ with the embeddings that were learned."""
        encoder = T5EncoderModel.from_pretrained(Path(self.settings.folder) / "text_encoder", dtype=torch.float32)
        encoder.shared.weight.data.copy_(torch.cat([self.model.known, self.model.new]).cpu())
        with new_folder(folder) as made:
            encoder.save_pretrained(made / "text_encoder")
            self.tokenizer.save_pretrained(made / "tokenizer")


def report(words: Counter[str], most: int = 10) -> str:
    """Return the most frequent words of a count as text."""
    shown = ", ".join(f"{word!r} ({number})" for word, number in words.most_common(most))
    return shown + (f" and {len(words) - most} more" if len(words) > most else "")
