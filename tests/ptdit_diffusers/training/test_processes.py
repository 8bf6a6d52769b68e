"""Stop signals, the lock of a folder, and what the first process does for all."""

import logging
import signal

import pytest
from accelerate import Accelerator

from ptdit_diffusers.training.processes import (
    check_processes,
    lock_folder,
    main_process_checks,
    stop_signals,
    terminate_as_interrupt,
)
from tests.processes import run_ranks


def test_signals_are_given_back_even_when_training_fails() -> None:
    earlier = signal.getsignal(signal.SIGTERM)
    with pytest.raises(OSError, match="disk"), stop_signals():
        raise OSError("disk full")
    assert signal.getsignal(signal.SIGTERM) is earlier


def test_a_second_signal_ends_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), stop_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop["now"]
        signal.raise_signal(signal.SIGTERM)


def test_sigterm_outside_of_the_steps_is_as_ctrl_c() -> None:
    earlier = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), terminate_as_interrupt():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is earlier


def test_a_folder_has_one_run_at_a_time(tmp_path) -> None:
    lock = lock_folder(tmp_path / "run", "output_dir")
    with pytest.raises(ValueError, match="output_dir .*run is in use by another run; wait for its end, or"):
        lock_folder(tmp_path / "run", "output_dir")
    lock.release()
    lock_folder(tmp_path / "run", "output_dir").release()


def test_what_the_main_process_refuses_is_refused_by_all() -> None:
    def refuse():
        raise OSError("the disk is full")

    with pytest.raises(ValueError, match="the disk is full"):
        main_process_checks(Accelerator(cpu=True), refuse)
    main_process_checks(Accelerator(cpu=True), lambda: None)


def test_a_launcher_that_starts_one_process_in_place_of_several_is_reported(monkeypatch, caplog) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")  # as `accelerate launch --cpu --num_processes 2` sets them
    monkeypatch.setenv("MASTER_PORT", "29500")
    with caplog.at_level(logging.WARNING):
        check_processes(Accelerator(cpu=True))
    assert "one process trains: `accelerate launch` starts no more than one on a CPU" in caplog.text


@pytest.mark.slow
def test_the_others_wait_for_the_main_process_longer_than_they_would_for_a_message(tmp_path) -> None:
    words = ["-m", "tests.ptdit_diffusers.training.slow_main_process", tmp_path / "shared"]
    for done in run_ranks(words, 2, ACCELERATE_USE_CPU="true"):
        assert done.returncode == 0 and done.stdout.splitlines() == ["[7, 'x']", "no pictures"], done.stderr
    assert not list((tmp_path / "shared").iterdir())
