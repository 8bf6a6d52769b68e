"""A small share of the fuzz runs, the same inputs each time; `python -m tests.fuzz --inputs N` tries others."""

import pytest

from tests.fuzz.targets import TARGETS, Place, try_inputs

INPUTS = 300  # of all kinds


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_files_of_strangers_end_in_the_named_errors(name, tiny_model_folder, tmp_path):
    try_inputs(name, Place.build(tmp_path, tiny_model_folder), INPUTS * TARGETS[name].share // 100, None)
