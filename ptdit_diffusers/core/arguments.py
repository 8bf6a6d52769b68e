"""Command lines: a mistake is one line that names the nearest option. Needs no torch."""

import argparse
import difflib
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn


class LineParser(argparse.ArgumentParser):
    """An argument parser that reports a mistake in one line, without the usage text, and names the nearest option.

    Attributes:
        refusal: What is raised, with the line.
        synonyms: Options that people know from other programs -> ours.
    """

    refusal: ClassVar[type[Exception]] = ValueError
    synonyms: Mapping[str, str] = {}

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        """Parse, and refuse here what is left over, since only this parser knows the options of its subcommand."""
        namespace, extras = super().parse_known_args(args, namespace)
        if extras:
            near = self.nearest(extras[0].partition("=")[0])
            self.error(f"unrecognized arguments: {' '.join(extras)}" + (f"; nearest: {near}" if near else ""))
        return namespace, extras

    def nearest(self, option: str) -> str | None:
        """Return the option that was probably meant."""
        known = self.synonyms.get(option.replace("_", "-"))
        return known or next(iter(difflib.get_close_matches(option, self._option_string_actions, n=1)), None)

    def error(self, message: str) -> NoReturn:
        raise self.refusal(f"{message} (see {self.prog} --help)")
