"""Settings: file, flags over it, and what is refused."""

import dataclasses

import pytest

from lora.command_line import check_packages, make_parser, read_settings, refuse_other_settings
from lora.config import SYNONYMS, LoRASettings


def read(*flags: str):
    return read_settings(make_parser("test").parse_args([*flags, "--output-dir", "out", "--data", "in"]))


def test_a_flag_goes_before_the_file_and_the_file_before_the_default(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("rank: 3\nlr: 1e-3\nvalidation_prompts: [one, two]\n", encoding="utf-8")
    settings = read("--config", str(file), "--rank", "5", "--flip")
    assert (settings.rank, settings.lr, settings.flip, settings.batch_size) == (5, 1e-3, True, 1)
    assert settings.validation_prompts == ("one", "two")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--rank", "0"], "rank=0 must be at least 1; nearest: 1"),
        (["--caption-dropout", "2"], "caption_dropout=2.0 must be at most 1; nearest: 1"),
        (["--optimizer", "adamx"], "optimizer='adamx' must be one of .*; nearest: 'adamw'"),
        (["--num-frames", "4"], "num_frames=4 is not of the form 4n \\+ 1; nearest: 1 or 5"),
        (["--init", "pissa", "--base-weights", "fp8"], "init='pissa' changes the base weights"),
        (["--lr", "0"], "lr=0.0 must be above 0"),
        (["--validation-split", "2.5"], "validation_split=2.5 is neither a share below 1 .* number; nearest: 2"),
        (["--mode-scale", "1"], "mode_scale=1 is for timestep_sampling='mode', not 'logit_normal'; nearest: 1.29"),
        (["--is-reg"], "is_reg is for an entry of `datasets`, not for all data; nearest: is_reg=False"),
        (["--fps", "8"], "fps=8.0 is for clips, but num_frames=1; nearest: num_frames=17"),
    ],
)
def test_an_illegal_value_is_refused_with_the_nearest_legal_one(flags, message):
    with pytest.raises(ValueError, match=message):
        read(*flags)


def test_an_unknown_key_in_the_file_is_refused(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("rnak: 3\n", encoding="utf-8")
    with pytest.raises(ValueError, match="rnak is not a setting; nearest: rank"):
        read("--config", str(file))


def test_names_of_other_trainers_are_answered_with_ours(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("learning_rate: 1e-4\n", encoding="utf-8")
    with pytest.raises(ValueError, match="a.yaml.learning_rate is not a setting; nearest: lr"):
        read("--config", str(file))
    with pytest.raises(ValueError, match="unrecognized arguments: --network_dim 8; nearest: --rank"):
        read("--network_dim", "8")
    ours = {field.name for field in dataclasses.fields(LoRASettings)}
    assert set(SYNONYMS.values()) <= ours and not set(SYNONYMS) & ours


@pytest.mark.parametrize("name", ["12gb", "24gb", "multi-gpu", "overfit-one", "embedded-cpu", "video-24gb"])
def test_every_preset_can_be_read_by_path_and_by_name(name, tmp_path, monkeypatch):
    by_path = read("--config", f"lora/configs/{name}.yaml")
    monkeypatch.chdir(tmp_path)
    assert by_path == read("--config", name) and by_path.max_steps > 0


def test_a_config_that_is_neither_a_file_nor_a_preset_is_refused():
    with pytest.raises(ValueError, match="config '48gb' is neither a file nor a preset; presets: 12gb, 24gb"):
        read("--config", "48gb")


def test_on_resume_data_may_move_and_what_a_checkpoint_does_not_name_had_its_default():
    saved = dataclasses.asdict(LoRASettings(output_dir="a", datasets=({"data": "a", "repeats": 2},), start="b"))
    del saved["alpha_mask"]
    moved = LoRASettings(output_dir="b", datasets=({"data": "c", "repeats": 2, "outside_files": True},))
    refuse_other_settings(saved, moved)
    for change, message in (
        ({"datasets": ({"data": "a", "repeats": 3},)}, "datasets was .*'repeats': 2.*'repeats': 3"),
        ({"alpha_mask": True}, "alpha_mask was False, is True"),
    ):
        with pytest.raises(ValueError, match=message):
            refuse_other_settings(saved, dataclasses.replace(moved, **change))


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else name)
    with pytest.raises(ValueError, match=r"training needs matplotlib: pip install '\.\[train\]' in a clone"):
        check_packages(read())
