"""Validation prompts with options in their text, as pictures and clips."""

import pytest
import torch
from PIL import Image

from lora.cache import Cache
from lora.config import LoRASettings
from lora.prompts import Prompt, parse_prompt
from lora.validate import Sampling, check_prompts, generate_validation, save_validation
from ptdit_diffusers.training.base_model import BaseModel
from ptdit_diffusers.training.sheets import write_sheet

CPU = torch.device("cpu")


def test_options_in_the_text_of_a_prompt_are_read():
    assert parse_prompt("a well-lit cat -- red") == Prompt(text="a well-lit cat -- red")
    found = parse_prompt("a cat --n blurry, dark --w 256 --h 128 --d 5 --s 20 --l 1.5 --f 17")
    size = {"width": 256, "height": 128, "num_frames": 17}
    assert found == Prompt(text="a cat", negative="blurry, dark", seed=5, steps=20, guidance=1.5, **size)
    settings = LoRASettings(output_dir="x", validation_prompts=("a --d 7", "b --n c"), validation_seed=3)
    assert [prompt.seed for prompt in settings.shown] == [7, 4] and settings.shown_texts == ["", "a", "", "b", "c"]


@pytest.mark.parametrize(
    "line, message",
    [
        ("a --width 5", "--width in 'a --width 5' is no option; nearest: --[hwd] .of --n negative, --w width"),
        ("a --w wide", "--w wide in 'a --w wide' must be a number; nearest: --w 1"),
        ("a --d -1", "--d -1 in 'a --d -1' must be at least 0; nearest: 0"),
        (f"a --d {2**63}", f"--d {2**63} in 'a --d {2**63}' must be at most 2..63 - 1; nearest: {2**63 - 1}"),
        ("a --f 16", "--f 16 in 'a --f 16' is not of the form 4n . 1; nearest: 13 or 17"),
    ],
)
def test_a_wrong_option_of_a_prompt_is_named(line, message):
    with pytest.raises(ValueError, match=message):
        LoRASettings(output_dir="x", validation_prompts=(line,))


def test_pictures_and_clips_are_drawn_as_their_prompts_say(tiny_model_folder, tmp_path):
    base = BaseModel(str(tiny_model_folder))
    lines = ("a star --w 96 --h 32 --d 5", "a star --d 5 --f 1", "a star --n a ring --d 5 --f 1 --s 1", "a star")
    settings = LoRASettings(output_dir="x", validation_prompts=lines, num_frames=5, rank=1)
    check_prompts(settings, base)
    cache = Cache(tmp_path / "cache", base)
    cache.add_captions(dict.fromkeys(settings.shown_texts, ""), CPU)
    model = base.load_transformer(torch.float32, "none", CPU).eval()
    sampling = Sampling(2, 2.0, settings.num_frames)
    found = generate_validation(model, base, cache.text, settings, CPU, sampling)
    assert [len(frames) for frames in found] == [5, 1, 1, 5] and found[0][0].size == (96, 32)
    assert found[1][0].tobytes() != found[2][0].tobytes()
    pictures = save_validation(found, tmp_path / "step", 3, settings, sampling)
    with Image.open(tmp_path / "step-2.png") as picture:
        assert (
            picture.text | {"prompt": "a star", "negative_prompt": "a ring", "seed": "5", "steps": "1"} == picture.text
        )
    assert Image.open(tmp_path / "step-0.webp").n_frames == 5 and not (tmp_path / "step-1.webp").exists()
    assert pictures[0].size == (5 * 96, 32)  # a strip
    write_sheet(tmp_path, tmp_path / "sheet.png", {"step 3": "step"}, lines)
    assert Image.open(tmp_path / "sheet.png").size == (5 * 96 + 4, 16 + 32 + 64 + 64 + 64 + 4 * 18)
    (tmp_path / "sheet.png").unlink()
    for others in ([*lines, "a fifth"], ["something else", *lines[1:]]):
        write_sheet(tmp_path, tmp_path / "sheet.png", {"step 3": "step"}, others)
        assert not (tmp_path / "sheet.png").exists()  # no column is of these prompts
    with pytest.raises(ValueError, match="--w 100 is not a multiple of 16 .VAE 8 x patch 2.; nearest: 96 or 112"):
        check_prompts(LoRASettings(output_dir="x", validation_prompts=("a --w 100",)), base)
