"""The command line of a training: a YAML file or preset, and flags of the same names that go before it."""

import argparse
import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from ptdit_diffusers.core.arguments import LineParser
from ptdit_diffusers.training.record import require_matplotlib
from ptdit_diffusers.training.settings import build, parse_yaml, read_yaml

from .config import LoRASettings, TrainingSettings

PACKAGES = {  # (setting, value) -> what must be installed for it
    ("base_weights", "int8"): "torchao",
    ("base_weights", "nf4"): "bitsandbytes",
    ("optimizer", "adamw8bit"): "bitsandbytes",
    ("optimizer", "lion"): "bitsandbytes",
    ("optimizer", "lion8bit"): "bitsandbytes",
    ("optimizer", "prodigy"): "prodigyopt",
    ("optimizer", "schedule_free_adamw"): "schedulefree",
    ("report_to", "tensorboard"): "tensorboard",
    ("report_to", "wandb"): "wandb",
    ("report_to", "trackio"): "trackio",
}
S = TypeVar("S", bound=TrainingSettings)


def make_parser(description: str, kind: type[TrainingSettings] = LoRASettings) -> LineParser:
    """Make a parser with `--config` and a flag for every setting; without a flag the file's value stays.

    What it refuses is a ValueError.
    """
    parser = LineParser(
        prog=kind.program,
        description=description,
        allow_abbrev=False,
        epilog=f"`ptdit {kind.program}` also takes --num-processes N and --cpu.",
    )
    parser.synonyms = {
        f"--{name.replace('_', '-')}": f"--{ours.replace('_', '-')}" for name, ours in kind.synonyms.items()
    }
    parser.add_argument(
        "--config", metavar="FILE", help=f"YAML file with settings, or a preset: {', '.join(presets(kind))}"
    )
    for field in dataclasses.fields(kind):
        flag = "--" + field.name.replace("_", "-")
        default = "" if field.default is dataclasses.MISSING else field.default
        shown = f"{field.metadata['help']} (default: {default or 'none'})".replace("none)", "-)")
        if field.type is bool:
            parser.add_argument(flag, default=None, action=argparse.BooleanOptionalAction, help=field.metadata["help"])
        elif field.type in (int, float):
            parser.add_argument(flag, type=field.type, metavar=field.type.__name__.upper(), help=shown)
        else:
            many = {} if field.type is str else {"nargs": "*"}
            many |= {"type": mapping} if field.name == "datasets" else {}
            many |= {"type": pair, "action": Pairs} if field.default_factory is not dataclasses.MISSING else {}
            parser.add_argument(flag, metavar="TEXT", help=shown, **many)
    return parser


def mapping(text: str) -> dict[str, Any]:
    """Return a mapping in YAML, for example "{data: a, repeats: 2}"."""
    try:
        value = parse_yaml(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no mapping such as '{{data: a, repeats: 2}}'")
    return value


def pair(text: str) -> tuple[str, Any]:
    """Return name and value of NAME=VALUE, the value as in YAML."""
    name, equals, value = text.rpartition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, parse_yaml(value)


class Pairs(argparse.Action):
    """Makes a mapping of the pairs that an option has."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, dict(values))


def presets(kind: type[TrainingSettings] = LoRASettings) -> list[str]:
    """Return the names of the presets that are part of the package."""
    names = {path.stem for path in kind.presets_folder.glob("*.yaml")}
    return sorted(names - {"fsdp2"})  # that one is accelerate's


def read_config(name: str, kind: type[TrainingSettings] = LoRASettings) -> dict[str, Any]:
    """Return the settings of a YAML file or preset.

    Raises:
        ValueError: There is no such file or preset, or it does not hold a mapping.
    """
    path = Path(name)
    if not path.is_file() and name in presets(kind):
        path = kind.presets_folder / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"config {name!r} is neither a file nor a preset; presets: {', '.join(presets(kind))}.")
    return read_yaml(path)


def read_settings(flags: argparse.Namespace, kind: type[S] = LoRASettings) -> S:
    """Return the settings of the file with the flags over them.

    Raises:
        ValueError: An unknown key, a wrong type or an illegal value; the message names it.
        OSError: The file cannot be read.
    """
    given = {name: value for name, value in vars(flags).items() if name != "config" and value is not None}
    values = read_config(flags.config, kind) if flags.config else {}
    for name in values:
        if name in kind.synonyms:
            raise ValueError(f"{flags.config}.{name} is not a setting; nearest: {kind.synonyms[name]}.")
    settings = build(kind, values | given, flags.config or "the command line")
    for name in settings.needed:
        if not getattr(settings, name) and not (name == "data" and (settings.cache_dir or settings.datasets)):
            raise ValueError(f"{name} is missing: set it in the config file or with --{name.replace('_', '-')}.")
    return settings


def check_packages(settings: TrainingSettings) -> None:
    """Raise ValueError where a setting, or every training, needs a package that is not installed."""
    for (name, value), package in PACKAGES.items():
        if getattr(settings, name) == value and importlib.util.find_spec(package) is None:
            other = type(settings).__dataclass_fields__[name].default
            raise ValueError(f"{name}={value!r} needs {package}: pip install {package}; or use {other!r}.")
    require_matplotlib()


def refuse_other_settings(saved: dict[str, Any], settings: TrainingSettings) -> None:
    """Raise ValueError where a checkpoint was made with settings that decide the outcome and differ now."""
    now, before = dataclasses.asdict(settings), dataclasses.asdict(type(settings)()) | saved
    changed = [
        f"{name} was {before[name]!r}, is {now[name]!r}"
        for name in now
        if name not in settings.free and _fixed(before[name], settings.free) != _fixed(now[name], settings.free)
    ]
    if changed:
        raise ValueError(
            f"the checkpoint was made with other settings: {'; '.join(changed)}. Give the old values, or start anew "
            "in another output_dir."
        )


def _fixed(value: Any, free: Sequence[str]) -> Any:
    """Return a value as it is compared: tuples as lists, entries of `datasets` without what is free."""
    if not isinstance(value, (list, tuple)):
        return value
    return [
        {name: each[name] for name in each if name not in free} if isinstance(each, dict) else each for each in value
    ]
