"""From prompts to text embeddings: tokens, encoding, masks.

Shapes: B samples (prompts * images per prompt), L text tokens, D width of a text embedding.
"""

import string
import warnings

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ptdit_diffusers.core.captions import prepare_prompts
from ptdit_diffusers.core.vocabulary import refusal

from .ptdit_checks import require_finite
from .ptdit_lora_text import scaled_lora
from .ptdit_request import GenerationRequest

TEXT_TENSORS = (
    "prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
)


class TextMixin:
    """Encodes prompts with the `tokenizer` and `text_encoder` of the pipeline; either may be None."""

    def encode_texts(self, call: GenerationRequest, guided: bool) -> dict[str, Tensor | None]:
        """Return what `encode_prompt` makes of the prompts of a call, by the names in `TEXT_TENSORS`."""
        with scaled_lora(self.text_encoder, call.attention_kwargs):
            texts = self.encode_prompt(
                call.prompt, call.negative_prompt, guided, call.num_images_per_prompt, self._execution_device,
                call.prompt_embeds, call.prompt_attention_mask, call.negative_prompt_embeds,
                call.negative_prompt_attention_mask, call.clean_caption, call.max_sequence_length,
            )  # fmt: skip
        return dict(zip(TEXT_TENSORS, texts, strict=True))

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        clean_caption: bool = True,
        max_sequence_length: int = 200,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Encode prompts; each is padded only to the longest of its own batch.

        Args:
            prompt, negative_prompt: Texts; a missing negative prompt is "". Not needed where embeddings are given.
            do_classifier_free_guidance: Whether the negative prompt is needed.
            num_images_per_prompt: How often each row is repeated.
            device: Where the embeddings go; default the pipeline's device.
            prompt_embeds, negative_prompt_embeds: Embeddings (prompts, L, D) made before, which are only repeated.
            prompt_attention_mask, negative_prompt_attention_mask: Their masks (prompts, L), true where a token counts;
                None if all do.
            clean_caption: Clean the prompt like the training captions. A negative prompt is never cleaned.
            max_sequence_length: Most tokens of a prompt; a longer one is cut, with a warning that names what is lost.

        Returns:
            Embeddings (B, L, D) and bool mask (B, L) of the prompt, then of the negative prompt (None, None without
            guidance).

        Raises:
            ValueError: A text has to be encoded, but there is no text encoder or tokenizer.
            RuntimeError: The embeddings hold NaN or infinite values.
        """
        device = device or self._execution_device
        if prompt_embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            prompts = prepare_prompts(prompts, clean_caption)
            prompt_embeds, prompt_attention_mask = self._encode("prompt", prompts, max_sequence_length, device)
        if not do_classifier_free_guidance:
            if negative_prompt or negative_prompt_embeds is not None:
                warnings.warn("guidance is off (scale <= 1): the negative prompt has no effect.", stacklevel=2)
            negative_prompt_embeds = negative_prompt_attention_mask = None
        elif negative_prompt_embeds is None:
            prompts = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""]
            prompts = prepare_prompts(prompts * (len(prompt_embeds) if len(prompts) == 1 else 1), clean=False)
            negative_prompt_embeds, negative_prompt_attention_mask = self._encode(
                "negative_prompt", prompts, max_sequence_length, device
            )
        texts = prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask
        return tuple(
            None if text is None else text.to(device).repeat_interleave(num_images_per_prompt, dim=0) for text in texts
        )

    def _encode(
        self, name: str, prompts: list[str], max_sequence_length: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                f"`{name}` cannot be encoded: this pipeline was loaded without text encoder or tokenizer; "
                f"pass `{name}_embeds`" + (" or guidance_scale=1." if name == "negative_prompt" else ".")
            )
        warn_about_untaught_words(self.tokenizer, prompts, negative=name == "negative_prompt")
        ids, mask = tokenize(self.tokenizer, prompts, max_sequence_length)
        ids, mask = ids.to(device), mask.to(device)
        embeds = self.text_encoder(ids, attention_mask=mask)[0]
        require_finite(embeds, f"{name} embeddings", self.text_encoder)
        return embeds, mask.bool()


def tokenize(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_sequence_length: int
) -> tuple[Tensor, Tensor]:
    """Turn prompts into token ids, padded to the longest of them and not further.

    The official code pads to 200 and masks what it padded; a masked token has no effect, so it is left out here.

    Args:
        tokenizer: Adds its end token itself.
        prompts: B texts.
        max_sequence_length: Most tokens of a prompt, end token included. What is cut off is named in a warning.

    Returns:
        Ids and mask, both (B, L) int64 with L <= `max_sequence_length`; the mask is 1 where a token counts.
    """
    warn_about_cut_prompts(tokenizer, prompts, max_sequence_length)
    warn_about_unknown_words(tokenizer, prompts)
    tokens = tokenizer(
        prompts,
        padding="longest",
        max_length=max_sequence_length,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    return tokens.input_ids, tokens.attention_mask


def warn_about_cut_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_sequence_length: int) -> None:
    """Warn once for each prompt with more than `max_sequence_length` tokens, and name the part that is lost."""
    for prompt in prompts:
        count, lost = lost_part(tokenizer, prompt, max_sequence_length)
        if lost:
            warnings.warn(
                f"the prompt has {count} tokens and max_sequence_length={max_sequence_length} leaves room for "
                f"{max_sequence_length - tokenizer.num_special_tokens_to_add()}; this part is not used: {lost!r}",
                stacklevel=2,
            )


def lost_part(tokenizer: PreTrainedTokenizerBase, prompt: str, max_sequence_length: int) -> tuple[int, str]:
    """Return how many tokens a prompt has, and what of it is behind the last token that is read."""
    room = max_sequence_length - tokenizer.num_special_tokens_to_add()
    ids = tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids
    return len(ids), tokenizer.decode(ids[room:]) if len(ids) > room else ""


def warn_about_unknown_words(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> None:
    """Warn once for each prompt with words that the tokenizer turns into its unknown token, and name them."""
    for prompt in prompts:
        if words := unknown_words(tokenizer, prompt):
            warnings.warn(f"the text encoder does not know {', '.join(map(repr, words))}", stacklevel=2)


def unknown_words(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[str]:
    """Return the words of a prompt that the tokenizer turns into its unknown token."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown not in tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids:
        return []
    words = [word.strip(string.punctuation) or word for word in prompt.split()]
    words = [word for word in words if unknown in tokenizer(word, add_special_tokens=False).input_ids]
    return words or [prompt]


def warn_about_untaught_words(tokenizer: PreTrainedTokenizerBase, prompts: list[str], negative: bool) -> None:
    """Warn once for each prompt with words that an embedded model reads but was never taught."""
    vocabulary = tokenizer.get_vocab()
    for prompt in dict.fromkeys(prompts):
        message = refusal(vocabulary, prompt, negative)
        if message:
            warnings.warn(message, stacklevel=2)


def join_text(embeds: list[Tensor], masks: list[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Stack text embeddings of different lengths into one batch, without columns that all samples mask.

    Args:
        embeds: Tensors (B_i, L_i, D).
        masks: For each of them (B_i, L_i), true where a token counts, or None where all do.

    Returns:
        Embeddings (sum of B_i, L, D) and a bool mask (sum of B_i, L), or None in its place when nothing is masked.
        L is one more than the last column in which any token counts.
    """
    masks = [
        torch.ones(part.shape[:2], dtype=torch.bool, device=part.device)
        if mask is None
        else mask.to(part.device).bool()
        for part, mask in zip(embeds, masks, strict=True)
    ]
    longest = max(part.shape[1] for part in embeds)
    joined = torch.cat([_pad_tokens(part, longest) for part in embeds])
    mask = torch.cat([_pad_tokens(part, longest) for part in masks])
    used = mask.any(dim=0).nonzero()
    length = int(used.max()) + 1 if len(used) else longest
    joined, mask = joined[:, :length], mask[:, :length]
    return joined, None if bool(mask.all()) else mask


def _pad_tokens(tensor: Tensor, length: int) -> Tensor:
    missing = tensor.new_zeros(tensor.shape[0], length - tensor.shape[1], *tensor.shape[2:])
    return torch.cat([tensor, missing], dim=1)
