"""Caption cleaning against the reference's strings."""

import json
import sys
import time
import warnings
from pathlib import Path

import pytest

from ptdit_diffusers.core import captions
from ptdit_diffusers.core.captions import clean_caption, prepare_prompts

GOLDEN = Path(__file__).parents[2] / "golden"
ROWS = json.loads((GOLDEN / "text_cleaning.json").read_text(encoding="utf-8"))["rows"]


@pytest.mark.parametrize("row", ROWS, ids=[row["input"][:30] for row in ROWS])
def test_captions_are_cleaned_as_the_reference_cleans_them(row):
    if not row["input"].isascii():
        pytest.importorskip("ftfy")
    assert prepare_prompts([row["input"]], clean=True) == [row["then_stripped"]]


@pytest.mark.parametrize("row", ROWS, ids=[row["input"][:30] for row in ROWS])
def test_negative_prompts_are_only_lower_cased_and_stripped(row):
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
def test_markup_goes_and_its_text_stays(caption, cleaned):
    assert clean_caption(caption) == cleaned


@pytest.mark.parametrize("caption", ["<![unknown[ a cat", "<", "<!", "</", "&", "&#", "a < b > c", "\x00", "%"])
def test_broken_markup_never_stops_it(caption):
    assert isinstance(clean_caption(caption), str)


@pytest.mark.parametrize("unit", ["a.", "1.", "a-", "<b", ". ", "&#1", "\u00e9", "x.png", "a.com@", "  ", "free "])
def test_the_time_does_not_grow_with_the_square_of_the_length(unit):
    begun = time.process_time()
    clean_caption(unit * 500_000)
    assert time.process_time() - begun < 10  # without the limit it would be hours


def test_what_the_text_encoder_reads_of_a_long_caption_is_kept():
    words = "a small red star above a ring " * 1000
    assert words.startswith(clean_caption(words)) and 2900 < len(clean_caption(words)) <= 3000


@pytest.mark.parametrize("caption, cleaned", [("see a.png now", "see now"), ("a.pngb.png.jpg x", "x"), (".png", ".")])
def test_names_of_files_go(caption, cleaned):
    assert clean_caption(caption) == cleaned


def test_a_missing_ftfy_is_reported_once_and_only_for_text_that_needs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    captions._warn_without_ftfy.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert clean_caption("A plain caption") == "a plain caption"
    with pytest.warns(UserWarning, match="ftfy is not installed"):
        assert clean_caption("Caf\u00e9 at night") == "caf\u00e9 at night"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clean_caption("Caf\u00e9 in the morning")
    captions._warn_without_ftfy.cache_clear()
