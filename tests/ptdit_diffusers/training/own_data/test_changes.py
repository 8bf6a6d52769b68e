"""What may change between the calls of one run, and what is refused."""

import json
from dataclasses import asdict

import pytest

from ptdit_diffusers.training.own_data import train
from ptdit_diffusers.training.own_data.changes import changed
from ptdit_diffusers.training.own_data.settings import OwnDataSettings, read_settings

STAGE = {"resolution": 64, "steps": 12, "batch": 6, "lr": 1e-3}
FALLING = STAGE | {"decay": "linear"}


def run(config, *overrides: str) -> int:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    return train.main(["--config", str(config), *(word for item in overrides for word in ("--set", item))])


@pytest.fixture
def of_stages(config):
    """Settings with stages."""

    def settings(*stages: dict) -> OwnDataSettings:
        return read_settings(config(stages=list(stages)))

    return settings


def test_a_resume_with_other_settings_is_refused_and_free_ones_may_change(config, capsys):
    path = config()
    assert run(path, "run.sheet=[]", "run.stop_after=4") == 0
    assert run(path, "optimizer={betas: [0.9, 0.95]}", "run.stop_after=1") == 2
    assert "optimizer.betas[1] was 0.99, is 0.95" in capsys.readouterr().err
    assert run(path, "run.sheet=[a star]", "run.stop_after=1", "run.accumulation=2") == 0


def test_sources_may_move_while_the_stages_that_share_one_stay_the_same(config):
    def settings(source: str, second: str, vae: str = "x") -> OwnDataSettings:
        stages = [STAGE, STAGE | {"data": second}]
        return read_settings(config(data={"source": source}, stages=stages, vae={"train": "decoder", "source": vae}))

    saved = asdict(settings("a", "b"))
    assert changed(saved, settings("moved/a", "moved/b", "moved/x"), 1) == []
    assert changed(saved, settings("a", ""), 1) == ["stages[1].data was 'b', is ''"]
    assert changed(saved, settings("b", "b"), 1) == ["data.source was 'a', is 'b'"]


def test_what_is_not_trained_yet_may_change(of_stages):
    saved = asdict(of_stages(STAGE, FALLING))
    assert changed(saved, of_stages(STAGE | {"steps": 5}, STAGE | {"batch": 12, "steps": 7}, FALLING), 5) == []
    assert changed(saved, of_stages(STAGE | {"steps": 50}), 5) == []
    assert changed(saved, of_stages(STAGE, FALLING | {"lr": 1e-4}), 12) == []
    assert changed(saved, of_stages(STAGE | {"batch": 12}, FALLING), 5) == ["stages[0].batch was 6, is 12"]
    assert changed(saved, of_stages(STAGE, FALLING | {"lr": 1e-4}), 13) == ["stages[1].lr was 0.001, is 0.0001"]
    assert changed(saved, of_stages(STAGE, FALLING | {"steps": 20}), 13) == ["stages[1].steps was 12, is 20"]
    lost = "the 5 steps until now were of 1 stages (12+12), not 2 (4+12)"
    assert changed(saved, of_stages(STAGE | {"steps": 4}, FALLING), 5) == [lost]
    larger = "stages[1] needs data that the run did not encode at first (resolution=96, buckets=2.0)"
    assert changed(saved, of_stages(STAGE, FALLING | {"resolution": 96}), 5) == [larger]


def test_a_run_goes_on_with_larger_batches_and_ends_with_a_falling_rate(config, tmp_path):
    path = config()
    assert run(path, "run.sheet=[]", "run.stop_after=4") == 0
    first, second = STAGE | {"steps": 5}, FALLING | {"steps": 3, "batch": 8, "lr": 2e-3}
    assert run(path, "run.sheet=[]", f"stages={json.dumps([first, second])}") == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = {line["step"]: line["lr"] for line in lines if "lr" in line}
    assert [rates[step] for step in sorted(rates)] == pytest.approx([1e-3] * 5 + [2e-3, 4e-3 / 3, 2e-3 / 3], rel=1e-3)
    assert (tmp_path / "out" / "model").is_dir()
