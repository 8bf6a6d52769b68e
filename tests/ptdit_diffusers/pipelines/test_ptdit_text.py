"""The text path: caption cleaning against the reference's strings, tokenising, masks."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ptdit_diffusers.core.captions import clean_caption, prepare_prompts
from ptdit_diffusers.pipelines import ptdit_text
from ptdit_diffusers.pipelines.ptdit_text import join_text, tokenise

GOLDEN = Path(__file__).parents[2] / "golden"
ROWS = json.loads((GOLDEN / "text_cleaning.json").read_text(encoding="utf-8"))["rows"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", "red", "blue", "circle", "ring"])}
    words_to_ids = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    words_to_ids.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words_to_ids.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words_to_ids, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )


class TestCleaning:
    @pytest.mark.parametrize("row", ROWS, ids=[row["input"][:30] for row in ROWS])
    def test_captions_are_cleaned_as_the_reference_cleans_them(self, row):
        if not row["input"].isascii():
            pytest.importorskip("ftfy")
        assert prepare_prompts([row["input"]], clean=True) == [row["then_stripped"]]

    @pytest.mark.parametrize("row", ROWS, ids=[row["input"][:30] for row in ROWS])
    def test_negative_prompts_are_only_lower_cased_and_stripped(self, row):
        assert prepare_prompts([row["input"]], clean=False) == [row["uncond_path"]]

    @pytest.mark.parametrize(
        "caption, cleaned",
        [
            ("<script>var a = 1</script>a cat", "a cat"),
            ("a <br/>cat<!-- sleeping -->", "a cat"),
            ("x &#65; y &copy; z", "x A y z"),
            ("1 &lt; 2", "1 < 2"),
            ("<![CDATA[inside]]> out", "inside out"),
            ("two small green stars above a purple ring, white background",) * 2,
        ],
    )
    def test_markup_goes_and_its_text_stays(self, caption, cleaned):
        assert clean_caption(caption) == cleaned

    @pytest.mark.parametrize("caption", ["<![unknown[ a cat", "<", "<!", "</", "&", "&#", "a < b > c", "\x00", "%"])
    def test_broken_markup_never_stops_it(self, caption):
        assert isinstance(clean_caption(caption), str)

    def test_a_missing_ftfy_is_told_once_and_only_for_text_that_needs_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "ftfy", None)
        ptdit_text._warn_without_ftfy.cache_clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert clean_caption("A plain caption") == "a plain caption"
        with pytest.warns(UserWarning, match="ftfy is not installed"):
            assert clean_caption("Caf\u00e9 at night") == "caf\u00e9 at night"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            clean_caption("Caf\u00e9 in the morning")
        ptdit_text._warn_without_ftfy.cache_clear()


class TestTokens:
    def test_prompts_are_padded_to_the_longest_of_them_and_end_with_the_end_token(self, tokenizer):
        ids, mask = tokenise(tokenizer, ["red circle", "ring"], max_sequence_length=200)
        assert ids.tolist() == [[3, 5, 1], [6, 1, 0]]
        assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]

    def test_an_empty_prompt_is_one_end_token(self, tokenizer):
        ids, mask = tokenise(tokenizer, [""], max_sequence_length=200)
        assert ids.tolist() == [[1]] and mask.tolist() == [[1]]

    def test_a_cut_prompt_keeps_its_end_token_and_the_warning_names_what_is_lost(self, tokenizer):
        with pytest.warns(UserWarning, match="4 tokens and max_sequence_length=3 leaves room for 2.*'blue ring'"):
            ids, _ = tokenise(tokenizer, ["red circle blue ring"], max_sequence_length=3)
        assert ids.tolist() == [[3, 5, 1]]

    def test_a_prompt_that_just_fits_gives_no_warning(self, tokenizer):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tokenise(tokenizer, ["red circle"], max_sequence_length=3)


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
        tokenise(tokenizer, ["red circle", "red dragon ring"], 200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenise(tokenizer, ["red circle"], 200)
