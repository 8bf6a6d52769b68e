"""Captions for distillations: new ones of a data set, and those that must not be trained on."""

import pytest

from lora.distill_config import DistillSettings
from ptdit_diffusers.training.randomness import numpy_generator
from scripts.datasets.registry import DATA_SETS
from scripts.distill import is_held_out, main, new_captions, prompts_of


@pytest.mark.parametrize(("name", "base"), [("pictures", "shapes-128"), ("clips", "clips-128"), ("views", "views-96")])
def test_new_captions_hold_nothing_that_is_held_out(name, base):
    captions = new_captions(name, 40, 0)
    assert not any(is_held_out(base, caption) for caption in captions)
    assert captions[:20] == new_captions(name, 20, 0) and captions != new_captions(name, 40, 1)
    data_set, choice = DATA_SETS[name], numpy_generator(1, 2)
    held_out = [data_set.describe(data_set.sample(choice, True), choice)[0] for _ in range(40)]
    found = sum(is_held_out(base, caption) for caption in held_out)
    assert found >= 30 if name == "clips" else found == 40  # two that cross: the caption gives no direction


def test_held_out_captions_of_a_file_are_refused_and_counted(tmp_path):
    choice, pictures = numpy_generator(0), DATA_SETS["pictures"]
    held_out = [pictures.describe(pictures.sample(choice, True), choice)[0] for _ in range(2)]
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(["a red star", *held_out]), encoding="utf-8")
    settings = {"output_dir": str(tmp_path), "prompts": str(path)}
    with pytest.raises(ValueError, match="2 of 3 captions hold combinations that are held out from the training of"):
        prompts_of(DistillSettings(base="shapes-128", **settings))
    assert len(prompts_of(DistillSettings(base="another", **settings))) == 3


def test_the_command_refuses_a_name_that_is_neither_file_nor_data_set(tmp_path, capsys):
    assert main(["--prompts", "picture", "--output-dir", str(tmp_path / "out")]) == 2
    assert "prompts 'picture' is no file" in capsys.readouterr().err
