"""What the embedded models were taught: captions of their data sets are taken, what no caption holds is refused."""

import json
from functools import cache

import numpy as np
import pytest

from ptdit_diffusers.core.embedded import embedded_model_path
from ptdit_diffusers.core.vocabulary import data_set_of, refusal
from scripts.datasets.registry import DATA_SETS

MODELS = {"shapes-128": ("pictures",), "clips-128": ("pictures", "clips"), "views-96": ("views",)}


@cache
def vocabulary(model: str) -> frozenset[str]:
    path = embedded_model_path(model) / "tokenizer" / "tokenizer.json"
    return frozenset(json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"])


@pytest.mark.parametrize("model", MODELS)
def test_every_caption_of_the_training_is_taken(model):
    generator = np.random.default_rng(0)
    for name in MODELS[model]:
        data = DATA_SETS[name]
        captions = [data.describe(data.sample(generator, held_out=False), generator)[0] for _ in range(2000)]
        assert [caption for caption in captions if refusal(vocabulary(model), caption)] == []


@pytest.mark.parametrize(
    ("model", "prompt", "named"),
    [
        ("shapes-128", "six red circles", "'six'"),
        ("shapes-128", "zero circles", "'zero'"),
        ("shapes-128", "a gray circle, white background", "'gray'"),
        ("shapes-128", "lines", "'lines'"),
        ("shapes-128", "the", "'the'"),
        ("shapes-128", "white background", "names nothing"),
        ("shapes-128", "a red circle behind a star", "'behind'"),
        ("shapes-128", "two 3 red circles", "'two 3'"),
        ("shapes-128", "a red circle \N{BLACK HEART SUIT}", "'\N{BLACK HEART SUIT}'"),
        ("clips-128", "five circles move left", "'five'"),
        ("clips-128", "a circle turns grey", "'grey'"),
        ("views-96", "a red star", "'star'"),
        ("views-96", "two red cubes", "'two'"),
        ("views-96", "a gray cube", "'gray'"),
        ("views-96", "\N{LARGE RED CIRCLE} cube", "'\N{LARGE RED CIRCLE}'"),
    ],
)
def test_what_was_never_taught_is_refused_and_the_message_says_what_can_be_made(model, prompt, named):
    message = refusal(vocabulary(model), prompt)
    assert named in message and "it makes" in message


@pytest.mark.parametrize(
    ("model", "prompt"),
    [
        ("shapes-128", "Please draw a red circle, on a gray striped background!"),
        ("shapes-128", "a red circle, background is grey"),
        ("clips-128", "a red circle does not move"),
        ("views-96", "a blue cube with a white stripe, gray background"),
    ],
)
def test_what_was_taught_is_taken(model, prompt):
    assert refusal(vocabulary(model), prompt) is None


def test_a_negative_prompt_need_not_name_a_figure():
    assert refusal(vocabulary("shapes-128"), "red", negative=True) is None
    assert refusal(vocabulary("shapes-128"), "gray", negative=True)


def test_a_word_that_was_added_may_be_a_figure():
    assert refusal(vocabulary("shapes-128") | {"hexagon"}, "a red hexagon") is None


def test_other_vocabularies_are_left_alone():
    assert data_set_of({"six", "circle"}) is None
    assert refusal({"six", "circle"}, "six") is None
