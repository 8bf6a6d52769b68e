"""Stop signals, and whether a launcher is needed."""

import signal

import pytest

from ptdit_diffusers.training import processes
from ptdit_diffusers.training.processes import needs_launcher, stop_signals


def test_signals_are_given_back_even_when_training_fails() -> None:
    earlier = signal.getsignal(signal.SIGTERM)
    with pytest.raises(OSError, match="disk"), stop_signals():
        raise OSError("disk full")
    assert signal.getsignal(signal.SIGTERM) is earlier


def test_several_gpus_or_a_file_of_accelerate_config_are_left_to_accelerate(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "default_config_file", str(tmp_path / "none.yaml"))
    for count in (0, 1, 2):
        monkeypatch.setattr("torch.cuda.device_count", lambda count=count: count)
        assert needs_launcher() == (count == 2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    (tmp_path / "none.yaml").touch()
    assert needs_launcher()
