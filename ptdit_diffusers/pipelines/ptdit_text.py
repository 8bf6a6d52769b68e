"""The text path of the pipeline: caption cleaning, tokenising and mask rules.

It must not know the transformer, the sampler or pixels.
Letters: B prompts, L text tokens, D width of a text embedding.
"""

import warnings

import torch
from transformers import PreTrainedTokenizerBase

# --- caption cleaning ------------------------------------------------------------------------------------------------


# --- tokens and masks ------------------------------------------------------------------------------------------------


def tokenise(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_sequence_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn prompts into token ids, padded to the longest of them and not further.

    The official code pads to 200 and masks what it padded; a masked token has no effect, so it is not made here.

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
    """Warn once for each prompt that has more than `max_sequence_length` tokens, and name the part that is lost."""
    room = max_sequence_length - tokenizer.num_special_tokens_to_add()
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids
        if len(ids) > room:
            warnings.warn(
                f"the prompt has {len(ids)} tokens and max_sequence_length={max_sequence_length} leaves room for "
                f"{room}; this part is not used: {tokenizer.decode(ids[room:])!r}",
                stacklevel=2,
            )


def warn_about_unknown_words(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> None:
    """Warn once for each prompt with words of which the tokeniser makes its unknown token, and name them."""
    unknown = tokenizer.unk_token_id
    for prompt in prompts:
        if unknown is None or unknown not in tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids:
            continue
        words = [word for word in prompt.split() if unknown in tokenizer(word, add_special_tokens=False).input_ids]
        warnings.warn(f"the text encoder does not know {', '.join(map(repr, words or [prompt]))}", stacklevel=2)


def join_text(
    embeds: list[torch.Tensor], masks: list[torch.Tensor | None]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stack text embeddings of different lengths into one batch, without columns that nobody uses.

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


def _pad_tokens(tensor: torch.Tensor, length: int) -> torch.Tensor:
    missing = tensor.new_zeros(tensor.shape[0], length - tensor.shape[1], *tensor.shape[2:])
    return torch.cat([tensor, missing], dim=1)
