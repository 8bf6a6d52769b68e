"""Tokens, masks, and warnings about prompts that lose something."""

import warnings

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ptdit_diffusers.pipelines.ptdit_text import join_text, tokenize


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", "red", "blue", "circle", "ring"])}
    words_to_ids = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    words_to_ids.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words_to_ids.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words_to_ids, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )


class TestTokens:
    def test_prompts_are_padded_to_the_longest_of_them_and_end_with_the_end_token(self, tokenizer):
        ids, mask = tokenize(tokenizer, ["red circle", "ring"], max_sequence_length=200)
        assert ids.tolist() == [[3, 5, 1], [6, 1, 0]]
        assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]

    def test_an_empty_prompt_is_one_end_token(self, tokenizer):
        ids, mask = tokenize(tokenizer, [""], max_sequence_length=200)
        assert ids.tolist() == [[1]] and mask.tolist() == [[1]]

    def test_a_cut_prompt_keeps_its_end_token_and_the_warning_names_what_is_lost(self, tokenizer):
        with pytest.warns(UserWarning, match="4 tokens and max_sequence_length=3 leaves room for 2.*'blue ring'"):
            ids, _ = tokenize(tokenizer, ["red circle blue ring"], max_sequence_length=3)
        assert ids.tolist() == [[3, 5, 1]]

    def test_a_prompt_that_just_fits_gives_no_warning(self, tokenizer):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tokenize(tokenizer, ["red circle"], max_sequence_length=3)


class TestJoining:
    def test_different_lengths_are_stacked_and_the_rest_is_masked(self):
        short, long = torch.ones(1, 2, 4), 2 * torch.ones(2, 3, 4)
        embeds, mask = join_text([short, long], [None, None])
        assert embeds.shape == (3, 3, 4) and mask.dtype == torch.bool
        assert mask.tolist() == [[True, True, False], [True] * 3, [True] * 3]
        assert torch.equal(embeds[0, :2], short[0]) and torch.equal(embeds[1:], long)

    def test_columns_that_all_samples_mask_are_cut_off(self):
        embeds = torch.arange(12.0).reshape(1, 6, 2)
        joined, mask = join_text([embeds, embeds], [torch.tensor([[1, 0, 1, 0, 0, 0]]), torch.tensor([[1] + [0] * 5])])
        assert joined.shape == (2, 3, 2)
        assert mask.tolist() == [[True, False, True], [True, False, False]]

    def test_the_mask_is_none_when_nothing_is_masked(self):
        embeds, mask = join_text([torch.zeros(2, 5, 3)], [torch.tensor([[1, 1, 0, 0, 0]] * 2)])
        assert embeds.shape == (2, 2, 3) and mask is None


def test_words_that_the_text_encoder_does_not_know_are_named(tokenizer):
    with pytest.warns(UserWarning, match="does not know 'dragon'"):
        tokenize(tokenizer, ["red circle", "red dragon, ring"], 200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize(tokenizer, ["red circle"], 200)
