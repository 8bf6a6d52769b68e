"""Settings of a training run: those of the loop, and the checked conversion from YAML and flags to a dataclass."""

import dataclasses
import difflib
import keyword
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

S = TypeVar("S")
WORDS = {"yes": True, "on": True, "no": False, "off": False}  # booleans of YAML 1.1 that are words elsewhere


class SettingsLoader(yaml.SafeLoader):
    """YAML with booleans and numbers as in YAML 1.2: `mixed_precision: no` is a word, and 1e-8 is a number."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:bool"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


SettingsLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(?:true|false)$", re.I), list("tTfF"))
SettingsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


@dataclass(kw_only=True)
class LoopSettings:
    """Settings of the loop. A stage derives its own dataclass and adds `model:` and `data:` dataclass fields.

    Times are minutes, intervals are optimizer steps; 0 turns an interval off.
    """

    output_dir: str  # checkpoints, log, curve, sheets, run.json
    export_dir: str = ""  # folder that gets the result at the end; "" = output_dir/export
    seed: int = 0
    steps: int  # optimizer steps of the whole schedule
    batch_size: int  # samples per process and per micro-batch
    accumulation: int = 1  # micro-batches per optimizer step
    shard: int = 1  # processes that share the weights (FSDP2); 1 = each has all of them
    context_parallel: int = 1  # processes that share each sample, which is too large for one
    workers: int = 0  # processes that make batches; 0 = in the training process
    mixed_precision: str = "no"  # "no" or "bf16" (autocast; weights stay fp32)
    lr: float = 1e-3  # peak learning rate
    warmup: int = 100  # steps from 0 to lr
    decay: str = "cosine"  # "cosine" or "linear", to zero at `steps`
    hold: float = 0.0  # fraction of the steps at full lr before the decay begins
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01  # on matrices only
    muon: str = ""  # regular expression: matrices of these names are trained by Muon instead of AdamW; "" = none
    clip: float = 1.0  # largest gradient norm
    ema_decay: float = 0.9995  # upper limit; the decay at step s is at most (1 + s) / (10 + s)
    log_every: int = 50
    sheet_every: int = 1000
    checkpoint_every: int = 1000
    checkpoint_minutes: float = 10.0  # also save when this long has passed; 0 = off
    export_every: int = 0  # steps between results in output_dir/exports, beside the one at the end; 0 = none
    keep: int = 2  # checkpoints kept
    save_in_background: bool = False  # training goes on while a checkpoint is written
    stop_after: int = 0  # save and stop after this many steps of one call; 0 = no limit
    max_minutes: float = 0.0  # save and stop after this long in one call; 0 = no limit

    def __post_init__(self) -> None:
        """Raise ValueError naming the first illegal value."""
        for name in ("steps", "batch_size", "accumulation", "shard", "context_parallel", "log_every", "keep"):
            at_least(name, getattr(self, name), 1)
        for name in ("seed", "workers", "warmup", "weight_decay", "sheet_every", "checkpoint_every"):
            at_least(name, getattr(self, name), 0)
        for name in ("checkpoint_minutes", "stop_after", "max_minutes", "export_every"):
            at_least(name, getattr(self, name), 0)
        one_of("mixed_precision", self.mixed_precision, ("no", "bf16"))
        one_of("decay", self.decay, ("cosine", "linear"))
        for name in ("lr", "clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0, for example 1.")
        if not 0 <= self.hold <= 1:
            raise ValueError(f"hold={self.hold} must be between 0 and 1; nearest: {min(max(self.hold, 0), 1)}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must be at least 0 and below 1, for example 0.9995.")
        if self.warmup > self.steps:
            raise ValueError(f"warmup={self.warmup} is longer than steps={self.steps}; nearest: {self.steps}.")

    @property
    def export_folder(self) -> Path:
        """Folder that gets the result."""
        return Path(self.export_dir) if self.export_dir else Path(self.output_dir) / "export"


def load_settings(path: str | Path, section: str, kind: type[S], overrides: dict[str, Any]) -> S:
    """Read one section of a YAML file into its dataclass.

    Args:
        path: YAML file with one mapping per stage.
        section: Name of the mapping, for example "text".
        kind: Dataclass of the stage.
        overrides: Values of flags; keys may be dotted ("model.num_layers"), None values are skipped.

    Raises:
        ValueError: A missing section, or as `build`.
    """
    sections = read_yaml(path)
    if section not in sections:
        raise ValueError(f"{path} has no section {section!r}; it has: {', '.join(map(str, sections)) or 'none'}.")
    values = sections[section] or {}
    for dotted, value in overrides.items():
        if value is None:
            continue
        *parents, name = dotted.split(".")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
        target[name] = value
    return build(kind, values, section)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the settings in a YAML file; none where it is empty.

    Raises:
        ValueError: It is no such file, or holds no mapping.
        OSError: It cannot be read.
    """
    try:
        values = parse_yaml(Path(path).read_text(encoding="utf-8")) or {}
    except ValueError as error:
        raise ValueError(f"{path} is not a YAML file: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a mapping of settings, not {values!r}.")
    return values


def parse_yaml(text: str) -> Any:
    """Return what YAML text says.

    Raises:
        ValueError: It is no YAML.
    """
    try:
        return yaml.load(text, SettingsLoader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def build(kind: type[S], values: dict[str, Any], where: str) -> S:
    """Make dataclass `kind` of a mapping, nested dataclasses included.

    Args:
        kind: The dataclass.
        values: By name of the field; a word of Python's own, such as "async", is the field "async_".
        where: What the values are called in messages.

    Raises:
        ValueError: An unknown or a missing key, or a value of another type; the message names it.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a mapping, not {values!r}.")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    arguments = {}
    for given, value in values.items():
        name = f"{given}_" if keyword.iskeyword(str(given)) else given
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1, cutoff=0)
            raise ValueError(f"{where}.{given} is not a setting; nearest: {near[0].rstrip('_')}.")
        arguments[name] = _convert(hints[name], value, f"{where}.{name}")
    missing = [
        name
        for name, field in fields.items()
        if name not in arguments
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}.")
    return kind(**arguments)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Return a YAML value in the annotated type; YAML has lists for tuples."""
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if isinstance(hint, types.UnionType):
        if value is None and type(None) in hint.__args__:
            return None
        hint = next(part for part in hint.__args__ if part is not type(None))
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and isinstance(value, (list, tuple)):
        inner = [parts[0]] * len(value) if parts[-1] is Ellipsis else list(parts)
        if len(inner) == len(value):
            return tuple(_convert(part, item, where) for part, item in zip(inner, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {
            _convert(parts[0], key, where): _convert(parts[1], item, f"{where}.{key}") for key, item in value.items()
        }
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is bool and isinstance(value, str) and value in WORDS:
        return WORDS[value]
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint in (str, bool) and isinstance(value, hint):
        return value
    raise ValueError(f"{where}={value!r} must be of type {getattr(hint, '__name__', hint)}.")


def at_least(name: str, value: float, least: float) -> None:
    """Raise ValueError unless a setting has at least this value."""
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}; nearest: {least}.")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless a setting is one of the names allowed."""
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, n=1, cutoff=0)[0]
        raise ValueError(f"{name}={value!r} must be one of {', '.join(allowed)}; nearest: {near!r}.")
