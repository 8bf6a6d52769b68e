"""Text for people that may hold what a stranger wrote: names, keys and contents of files. Needs no torch."""

import logging
import re

LONGEST = 3000  # characters of one line
_CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return a text with its control characters (C0, C1, and those that turn the direction of text) escaped."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """Return a message as one line that cannot steer a terminal; the middle of a giant one is left out."""
    line = printable(" ".join(text.split("\n")))
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} ... ({len(line) - LONGEST} characters) ... {line[-LONGEST // 2 :]}"
    return line


class PrintableFormatter(logging.Formatter):
    """Formats log messages, of one or more lines, that cannot steer a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the formatted message with its control characters escaped."""
        return "\n".join(map(printable, super().format(record).split("\n")))


def log_to_terminal(level: int) -> None:
    """Send log messages of this level and above to stderr, with the time of day."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler])
