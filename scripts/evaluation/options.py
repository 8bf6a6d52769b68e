"""Command-line options that several commands share."""

import argparse

OPTIONS = {  # name -> type, help
    "model": (str, "folder or short name of a model"),
    "prompts": (int, "number of prompts"),
    "steps": (int, "denoising steps"),
    "guidance": (float, "guidance scale"),
    "seed": (int, "first seed"),
}


def make_parser(module: str, description: str) -> argparse.ArgumentParser:
    """Return a parser of `python -m module` with the description as it is written."""
    kept = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"python -m {module}", description=description, formatter_class=kept)


def add_sampling_options(parser: argparse.ArgumentParser, **defaults: object) -> None:
    """Add options of `OPTIONS` with these defaults."""
    for name, default in defaults.items():
        kind, text = OPTIONS[name]
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default: %(default)s)")
