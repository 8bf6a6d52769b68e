"""Text of strangers in messages."""

import logging

import pytest

from ptdit_diffusers.core.messages import LONGEST, PrintableFormatter, one_line, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07\x1b[2J\rptdit: saved", r"\x1b]0;title\x07\x1b[2J\rptdit: saved"),
        ("\x9b2J", r"\x9b2J"),
        ("a\u202eb\u2066c\u2028d", r"a\u202eb\u2066c\u2028d"),
        ("\ud800", r"\ud800"),
        ("größe 红\t😀", "größe 红\t😀"),
    ],
)
def test_what_could_steer_a_terminal_is_escaped(text, shown):
    assert printable(text) == one_line(text) == shown


def test_a_message_is_one_line_of_bounded_length():
    assert one_line("a\nb") == "a b"
    long = one_line("begin" + "[" * 100_000 + "end")
    assert LONGEST < len(long) < LONGEST + 50 and long.startswith("begin[") and long.endswith("[end")
    assert one_line("a" * LONGEST) == "a" * LONGEST


def test_log_messages_keep_their_lines_and_nothing_else():
    record = logging.LogRecord("lora", logging.INFO, "", 0, "%s", ("skipped a\x1b[2J.png\nnext\rline",), None)
    assert PrintableFormatter("%(message)s").format(record) == "skipped a\\x1b[2J.png\nnext\\rline"
