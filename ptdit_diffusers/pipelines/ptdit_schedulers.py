"""Which schedulers of diffusers fit: those that step on a flow, at noise levels from 1 to 0."""

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

FLOW_FLAGS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
COPY = "{}.from_pipe(pipe, scheduler=copy.deepcopy(pipe.scheduler))"  # of a pipeline of this class
HINT = "use FlowMatchEulerDiscreteScheduler, or another one of docs/schedulers.md"
OTHER_STEP = {  # schedulers of flows whose step wants something else than a flow
    "HeliosScheduler": "it steps through stages of its own model",
    "HeliosDMDScheduler": "it steps through stages of its own model",
    "DPMSolverMultistepInverseScheduler": "it goes from a picture to noise",
    "LTXEulerAncestralRFScheduler": "its levels must end with 0, which is no step of this pipeline",
    "MiniMaxH3Scheduler": "its levels must end with 0, which is no step of this pipeline",
    "PiflowScheduler": "it steps on a policy, not on a flow",
}


def check_scheduler(scheduler: Any) -> None:
    """Raise unless a scheduler steps on a flow.

    Raises:
        ValueError: Names the scheduler, and what to set where its options decide.
    """
    name, options = type(scheduler).__name__, inspect.signature(type(scheduler).__init__).parameters
    if name in OTHER_STEP:
        raise ValueError(f"{name} does not fit this model: {OTHER_STEP[name]}; {HINT}.")
    config: Mapping[str, Any] = scheduler.config
    if "use_flow_sigmas" in options:
        wrong = [option for option, value in FLOW_FLAGS.items() if config.get(option) != value]
        if wrong:
            flags = ", ".join(f"{option}={value!r}" for option, value in FLOW_FLAGS.items())
            raise ValueError(
                f"{name} is not set up for a model of flows: {wrong[0]}={config.get(wrong[0])!r}; make it with "
                f"{name}.from_config(pipe.scheduler.config, {flags})."
            )
    elif "prediction_type" in options or "shift" not in options or not hasattr(scheduler, "set_begin_index"):
        raise ValueError(f"{name} does not step on a flow, which this model predicts; {HINT}.")


def check_own_shift(scheduler: Any, ratio: float) -> None:
    """Raise unless a scheduler that takes no time shift from the pipeline has one of its own, other than 1."""
    if abs(ratio - 1) < 1e-6 or own_shift(scheduler) != 1:
        return
    name, option = type(scheduler).__name__, shift_option(scheduler)
    raise ValueError(
        f"{name} takes no time shift from the pipeline, and this size needs {ratio:.4g}; make it with "
        f"{name}.from_config(pipe.scheduler.config, {option}={ratio:.4g})."
    )


def shift_option(scheduler: Any) -> str | None:
    """Return the name of the option by which a scheduler shifts its levels at any size, or None if it has none."""
    options = inspect.signature(type(scheduler).__init__).parameters
    return next((name for name in ("shift", "flow_shift") if name in options), None)


def own_shift(scheduler: Any) -> float:
    """Return the ratio by which a scheduler shifts its levels at any size; see `core.sampling.time_shift`.

    Its configuration may hold options of another class that it was made from, which mean nothing to it.
    """
    return scheduler.config.get(shift_option(scheduler), 1.0)


def check_noise_levels(scheduler: Any) -> None:
    """Raise unless the levels that were set are those of a flow: from at most 1 down, at times of 1000 * level."""
    levels = getattr(scheduler, "sigmas", None)
    if levels is not None and len(levels) and len(scheduler.timesteps):
        first, time = float(levels[0]), float(scheduler.timesteps[0])
        steps = scheduler.config.get("num_train_timesteps", 1000)
        if 0 < first <= 1.001 and abs(first * steps - time) <= steps / 100:
            return
    raise ValueError(f"{type(scheduler).__name__} has no noise levels from 1 to 0, which this model needs; {HINT}.")


def step_randomness(scheduler: Any, generator: Any) -> dict[str, Any]:
    """Return the arguments that make the noise of a scheduler's steps repeatable, for those that sample any."""
    return {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}


_running: set[int] = set()  # ids of the schedulers of calls that are going on
_lock = threading.Lock()


@contextmanager
def exclusive(scheduler: Any, copy: str) -> Iterator[None]:
    """Keep a scheduler, which counts its steps, to one call at a time.

    Args:
        scheduler: Of the pipeline.
        copy: How to make a pipeline with another scheduler and the same weights, for the message.

    Raises:
        RuntimeError: Another call uses it.
    """
    with _lock:
        if id(scheduler) in _running:
            raise RuntimeError(
                "another call with this scheduler is not finished, for example in another thread; give each thread a "
                f"pipeline of its own that shares the weights: {copy}."
            )
        _running.add(id(scheduler))
    try:
        yield
    finally:
        with _lock:
            _running.discard(id(scheduler))
