"""Captions that change from sample to sample: what moves, what stays, and what is refused."""

import numpy as np
import pytest

from ptdit_diffusers.training.data.captions import CaptionChoices, check_ending
from ptdit_diffusers.training.data.listing import list_data
from ptdit_diffusers.training.data.media import READ


def drawn(caption: str, count: int = 50, **options) -> set[str]:
    choices = CaptionChoices(**options)
    return {choices.draw(caption, np.random.default_rng(number)) for number in range(count)}


def test_tags_move_and_those_to_be_kept_and_the_trigger_stay():
    found = drawn("new, a, b, c, d", shuffle_caption=True, keep_tokens=1, trigger="new")
    assert {text[:6] for text in found} == {"new, a"} and len(found) == 6
    assert all(sorted(text.split(", ")) == ["a", "b", "c", "d", "new"] for text in found)
    found = drawn("a, b ||| c, d ||| e", shuffle_caption=True, keep_tokens_separator="|||")
    assert found == {"a, b, c, d, e", "a, b, d, c, e"}
    assert drawn("a; b", shuffle_caption=True, caption_separator=";") == {"a; b", "b; a"}


def test_a_trigger_that_is_the_whole_caption_stays():
    assert drawn("new", caption_tag_dropout_rate=0.9, trigger="new") == {"new"}


def test_tags_are_left_out_in_their_share():
    found = drawn("a, b, c", 1000, caption_tag_dropout_rate=0.5, keep_tokens=1)
    assert found == {"a", "a, b", "a, c", "a, b, c"}  # in their order
    choices, rng = CaptionChoices(caption_tag_dropout_rate=0.2), np.random.default_rng(0)
    left = sum(choices.draw("a, b", rng).count("a") for _ in range(2000))
    assert left == pytest.approx(1600, abs=80)


def test_a_wildcard_is_one_of_its_words_and_of_several_lines_one_is_taken():
    found = drawn("new, a {red|{dark|light} blue} star\n\na {|big }ring", enable_wildcard=True, trigger="new")
    stars = {f"new, a {color} star" for color in ("red", "dark blue", "light blue")}
    assert found == stars | {"new, a ring", "new, a big ring"}
    assert drawn("a } star {", enable_wildcard=True) == {"a } star {"}


def test_variations_depend_on_caption_and_seed_alone_and_have_the_shares_of_draws():
    choices = CaptionChoices(shuffle_caption=True)
    first = choices.variations("a, b, c, d", 8, 0)
    assert first == choices.variations("a, b, c, d", 8, 0) and len(first) == 8 and len(set(first)) > 3
    assert first != choices.variations("a, b, c, d", 8, 1)
    assert choices.variations("a b", 3, 0) == ["a b"] * 3
    blue = CaptionChoices(enable_wildcard=True).variations("{red|red|red|blue}", 1000, 0).count("blue")
    left = CaptionChoices(caption_tag_dropout_rate=0.1).variations("a, b", 1000, 0)
    assert blue == pytest.approx(250, abs=50) and sum("a" in form for form in left) == pytest.approx(900, abs=35)
    assert CaptionChoices().variations("a, {b|c}", 8, 0) == ["a, {b|c}"] and not CaptionChoices()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"keep_tokens": -1}, "keep_tokens=-1 must be at least 0; nearest: 0"),
        ({"keep_tokens": 2}, "keep_tokens=2 keeps tags that nothing moves; nearest: shuffle_caption: true"),
        ({"caption_separator": " "}, "caption_separator=' ' holds no character; nearest: ','"),
        ({"caption_tag_dropout_rate": 1.0}, "caption_tag_dropout_rate=1.0 must be at least 0 and below 1"),
    ],
)
def test_what_can_not_be_chosen_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CaptionChoices(**options)


def test_captions_may_have_another_ending(tmp_path):
    for name in ("a.png", "b.png", "a.caption", "a.txt", "c.caption"):
        (tmp_path / name).write_text(f"of {name}")
    listing = list_data(str(tmp_path), caption_extension=".caption")
    assert [(entry.path.name, entry.caption) for entry in listing.entries] == [
        ("a.png", "of a.caption"),
        ("b.png", ""),
    ]
    assert [path.name for path in listing.lonely] == ["c.caption"] and listing.others == {".txt": 1}
    for ending, near in (("txt", ".txt"), ("*.cap", ".cap"), ("", ".txt"), (".png", ".txt"), (".a.PNG", ".txt")):
        with pytest.raises(
            ValueError, match=f"caption_extension='{ending}' is .+; nearest: '{near}'".replace("*", "[*]")
        ):
            check_ending("caption_extension", ending, READ)


def test_the_ending_of_captions_may_have_two_dots(tmp_path):
    for name in ("a.png", "a.WD14.txt", "a.txt", "b.c.png", "b.c.wd14.txt", "c.wd14.txt"):
        (tmp_path / name).write_text(f"of {name}")
    listing = list_data(str(tmp_path), caption_extension=".wd14.TXT")
    assert [entry.caption for entry in listing.entries] == ["of a.WD14.txt", "of b.c.wd14.txt"]
    assert [path.name for path in listing.lonely] == ["c.wd14.txt"] and listing.others == {".txt": 1}
