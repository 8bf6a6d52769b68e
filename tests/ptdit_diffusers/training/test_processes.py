"""Stop signals."""

import signal

import pytest

from ptdit_diffusers.training.processes import stop_signals


def test_signals_are_given_back_even_when_training_fails() -> None:
    earlier = signal.getsignal(signal.SIGTERM)
    with pytest.raises(OSError, match="disk"), stop_signals():
        raise OSError("disk full")
    assert signal.getsignal(signal.SIGTERM) is earlier
