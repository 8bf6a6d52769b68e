"""The warning that a model learns by heart, and the choice of samples whose loss is measured."""

import json

from ptdit_diffusers.training.held_out import spread, warn_of_learning_by_heart


def test_a_run_says_when_it_learns_by_heart(tmp_path, caplog):
    """Lines of a log as a long run on few pictures writes them."""
    log = tmp_path / "log.jsonl"
    lines = [{"step": 0, "held_out_loss": 0.9, "seen_loss": 0.9}, {"step": 30, "held_out_loss": 0.7, "seen_loss": 0.6}]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def warn(held_out: float, seen: float, first: int = -1) -> None:
        warn_of_learning_by_heart(log, {"held_out_loss": held_out, "seen_loss": seen}, 60, first, "stop there")

    warn(0.71, 0.5)  # noise
    warn(0.8, 0.65)  # both are worse
    warn(0.75, 0.4, first=30)  # what came before does not count
    warn_of_learning_by_heart(log, {}, 60, -1, "stop there")
    assert not caplog.text
    warn(0.75, 0.4)
    assert "learns by heart since step 30: the loss on new pictures was 0.7000 there and is 0.7500" in caplog.text
    assert caplog.text.strip().endswith("stop there")


def test_few_samples_are_measured_several_times_and_many_are_spread():
    assert spread([5, 7], 5) == [5, 7, 5, 7, 5]
    assert spread(range(100), 4) == [0, 25, 50, 75]
