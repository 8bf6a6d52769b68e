"""Which settings may change between the calls of one run: what is trained already decides what comes out of it."""

import dataclasses
import re
from typing import Any

from ptdit_diffusers.training.own_data.settings import DataSettings, OwnDataSettings
from ptdit_diffusers.training.times import Times

# May change at any time; a stage may change as a whole before it begins, see `_begun`.
FREE = {
    "": ["stages"],
    "run": "output peak_tflops max_minutes stop_after workers log_every checkpoint_every checkpoint_minutes keep "
    "async_ export_every sheet sheet_kind sheet_every report_to steps guidance accumulation".split(),
    "data": ["source", "encoded", "max_skips", "outside_files"],
    "stages": ["data"],  # may move; which stages share a source stays
    "vae": ["source"],
    "parallel": ["recompute", "compile", "shard", "context"],
}


def changed(saved: dict[str, Any], settings: OwnDataSettings, step: int) -> list[str]:
    """Return in words which settings that decide the outcome differ from those of a checkpoint.

    Args:
        saved: Settings of the checkpoint, as `dataclasses.asdict` gives them.
        settings: Of now.
        step: Steps that the checkpoint has made: how long stages are may change later than that.
    """
    now, saved = dataclasses.asdict(settings), {"times": dataclasses.asdict(Times())} | saved
    defaults = {each.name: each.default for each in dataclasses.fields(DataSettings)}  # of what is newer than `saved`
    saved["data"] = {name: saved["data"].get(name, default) for name, default in defaults.items()}
    begun = [_begun(values["stages"], step) for values in (saved, now)]
    if len(begun[0]) != len(begun[1]):
        steps = ["+".join(str(stage["steps"]) for stage in values["stages"]) for values in (saved, now)]
        return [
            f"the {step} steps until now were of {len(begun[0])} stages ({steps[0]}), not {len(begun[1])} ({steps[1]})"
        ]
    return (
        _differences(saved, now, "") + _differences(*begun, "stages") + _regrouped(saved, now) + _new_data(saved, now)
    )


def _begun(stages: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """Return the stages that the first `step` steps are of; the last one, where its rate is constant, is cut there."""
    found = []
    for stage in stages:
        if step <= 0:
            break
        if stage["decay"] == "constant":
            stage = stage | {"steps": min(step, stage["steps"])}
        found.append(stage)
        step -= stage["steps"]
    return found


def _regrouped(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return which sources differ, where stages that shared one have different ones now, or the other way round."""
    count = min(len(saved["stages"]), len(now["stages"]))
    if _groups(saved)[:count] == _groups(now)[:count]:
        return []
    names = [("data.source", saved["data"]["source"], now["data"]["source"])]
    pairs = enumerate(zip(saved["stages"], now["stages"], strict=False))
    names += [(f"stages[{i}].data", old.get("data", ""), new["data"]) for i, (old, new) in pairs]
    return [f"{name} was {old!r}, is {new!r}" for name, old, new in names if old != new]


def _new_data(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return which stages train on what the run did not encode when it began."""
    names = ("resolution", "buckets")
    known, asked = (
        [(group, *(stage[name] for name in names)) for group, stage in zip(_groups(each), each["stages"], strict=True)]
        for each in (saved, now)
    )
    return [
        f"stages[{i}] needs data that the run did not encode at first (resolution={resolution}, buckets={buckets})"
        for i, (group, resolution, buckets) in enumerate(asked)
        if (group, resolution, buckets) not in known
    ]


def _groups(values: dict[str, Any]) -> list[int]:
    """Return the number of the source of each stage, in the order of first use."""
    sources = [stage.get("data") or values["data"]["source"] for stage in values["stages"]]
    return [list(dict.fromkeys(sources)).index(source) for source in sources]


def _differences(saved: Any, now: Any, where: str) -> list[str]:
    if isinstance(now, dict) and isinstance(saved, dict):
        free = FREE.get(re.sub(r"\[\d+\]$", "", where), ())
        names = [name for name in now if name in saved and name not in free]
        return [line for name in names for line in _differences(saved[name], now[name], f"{where}.{name}".strip("."))]
    if isinstance(now, (list, tuple)) and isinstance(saved, (list, tuple)) and len(now) == len(saved):
        pairs = enumerate(zip(saved, now, strict=True))
        return [line for i, (old, new) in pairs for line in _differences(old, new, f"{where}[{i}]")]
    return [] if saved == now else [f"{where} was {saved!r}, is {now!r}"]
