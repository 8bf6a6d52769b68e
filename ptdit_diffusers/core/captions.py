"""Caption cleaning: the rules by which the training captions, and so the prompts, are normalized. Plain Python."""

import html
import re
import urllib.parse
import warnings
from functools import cache
from html.parser import HTMLParser

LONGEST = 3000  # characters that are read: the text encoder takes 200 tokens, and rules need time
Rule = tuple[str, re.Pattern[str], str]


def _rules(*rows: tuple[str, str, str]) -> tuple[Rule, ...]:
    """Compile rows of (what the rule is about, pattern, replacement)."""
    return tuple((name, re.compile(pattern), replacement) for name, pattern, replacement in rows)


DOMAIN = r"[a-zA-Z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
FILE_ENDING = r"(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
CHINESE = r"[\u31c0-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff]"
DASH = (
    r"[\-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    r"\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d]"
)
SYMBOL = r"[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~()\[\]{}|\\/*]"

# The model was trained on captions that went through these steps, so their order, and even their oddities, are part
# of the result: "3.5x4" becomes "3.", Chinese text disappears, and the last matching dash or quote is dropped.
LINK_RULES = _rules(
    ("placeholder for a face", r"<person>", "person"),
    ("web address", rf"\b(?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{DOMAIN})", ""),
    ("web address written www:", rf"\b(?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{DOMAIN})", ""),
)

CHARACTER_RULES = _rules(
    ("@name", r"@\w+\b", ""),
    ("Chinese characters and neighbors", rf"{CHINESE}+", ""),
    ("dashes of any script", rf"{DASH}+", "-"),
    ("double quotes", r"[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("single quotes", r"[\u2018\u2019]", "'"),
    ("left-over &quot;", r"&quot;?", ""),
    ("left-over &amp", r"&amp", ""),
    ("IP address", r"\d{1,3}(?:\.\d{1,3}){3}", " "),
    ("closing time of day", r"\d:\d\d\s+$", ""),
    ("written-out line break", r"\\n", " "),
    ("# and up to 3 digits", r"#\d{1,3}\b", ""),
    ("# and at least 5 digits", r"#\d{5,}\b", ""),
    ("at least 6 digits", r"\b\d{6,}\b", ""),
    ("file name", rf"(?<!\S)\S+\.{FILE_ENDING}", ""),  # begins where a word does: the same, in less time
    ("run of quotes", r"[\"']{2,}", '"'),
    ("run of dots", r"\.{2,}", " "),
    ("symbols and brackets", rf"{SYMBOL}+", " "),
    ("lonely dot", r"\s+\.\s+", " "),
)

WORD_JOINER = re.compile(r"[-_]")

CATALOG_RULES = _rules(
    ("letters then digits", r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    ("letters, digits, letters", r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    ("digits, letters, digits", r"\b\d+[a-zA-Z]+\d+\b", ""),
    ("shipping offer", r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    ("download offer", r"(?:free\s)?download(?:\sfree)?", ""),
    ("click for", r"\bclick\b\s(?:for|on)\s\w+", ""),
    ("file ending as a word", rf"\b{FILE_ENDING}(?:\simages?)?", ""),
    ("page number", r"\bpage\s+\d+\b", ""),
    ("serial number", r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    ("width x height", r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", ""),
    ("space before a colon", r"\b\s+:\s+", ": "),
    ("no space after , . /", r"(\D[,./])\b", r"\1 "),
    ("white space", r"\s+", " "),
    ("quotes around everything", r"^[\"']([\w\W]+)[\"']$", r"\1"),
    ("opening punctuation", r"^['_,\-:;]", ""),
    ("closing punctuation", r"['_,\-:+]$", ""),
    ("one word that begins with a dot", r"^\.\S+$", ""),
)


def clean_caption(caption: str) -> str:
    """Clean a caption the way the training captions were cleaned (as in DeepFloyd-IF, once).

    Chinese text, web addresses, markup, @names, brackets and long numbers are deleted; the rest is lower-cased.
    ftfy repairs broken encodings where it is installed; without it, captions that are not plain ASCII may differ
    from the official result, and one warning says so.

    Args:
        caption: Any text; what follows its first 3000 characters is not read.

    Returns:
        The cleaned text, without white space at its ends. It may be empty.
    """
    if len(caption) > LONGEST:
        caption = (caption.strip()[:LONGEST].rsplit(None, 1) or [""])[0]  # the last word may be cut
    caption = urllib.parse.unquote_plus(caption).strip().lower()
    caption = _apply(LINK_RULES, caption)
    caption = _without_markup(caption)
    caption = _apply(CHARACTER_RULES, caption)
    if len(WORD_JOINER.findall(caption)) > 3:  # this-is-my-cute-cat is a sentence, close-up is a word
        caption = WORD_JOINER.sub(" ", caption)
    caption = _repair_encoding(caption)
    caption = html.unescape(html.unescape(caption))
    return _apply(CATALOG_RULES, caption).strip()


def _apply(rules: tuple[Rule, ...], caption: str) -> str:
    for _, pattern, replacement in rules:
        caption = pattern.sub(replacement, caption)
    return caption


class _TextBetweenTags(HTMLParser):
    """Collects the text of a piece of HTML; what a browser would not show as text is left out."""

    HIDDEN = frozenset(("script", "style", "template", "rt", "rp"))

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.pieces: list[str] = []
        self.hidden_in: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.HIDDEN:
            self.hidden_in.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass  # opened and closed at once: nothing can be hidden in it

    def handle_endtag(self, tag: str) -> None:
        if tag in self.hidden_in:
            del self.hidden_in[self.hidden_in.index(tag) :]

    def handle_data(self, data: str) -> None:
        if not self.hidden_in:
            self.pieces.append(data)

    def handle_entityref(self, name: str) -> None:
        character = html.unescape(f"&{name};")
        self.handle_data(f"&{name}" if character.endswith(";") else character)

    def handle_charref(self, name: str) -> None:
        self.handle_data(html.unescape(f"&#{name};"))

    def unknown_decl(self, data: str) -> None:
        if data.upper().startswith("CDATA["):
            self.handle_data(data[len("CDATA[") :])


def _without_markup(caption: str) -> str:
    parser = _TextBetweenTags()
    try:
        parser.feed(caption)
        parser.close()
    except AssertionError:  # how some Python releases give up on a "<![" that opens nothing they know
        return caption
    return "".join(parser.pieces)


def _repair_encoding(caption: str) -> str:
    try:
        import ftfy
    except ImportError:
        if not caption.isascii():
            _warn_without_ftfy()
        return caption
    return ftfy.fix_text(caption)


@cache
def _warn_without_ftfy() -> None:
    warnings.warn(
        "ftfy is not installed: captions with characters outside ASCII are cleaned without its repairs and may differ "
        "from the official text. `pip install ftfy` makes them equal.",
        stacklevel=2,
    )


def prepare_prompts(prompts: list[str], clean: bool) -> list[str]:
    """Return prompts as the tokenizer gets them: cleaned, or only lower-cased and stripped.

    The official code never cleans negative prompts; pass `clean=False` for them.
    """
    return [clean_caption(prompt) if clean else prompt.lower().strip() for prompt in prompts]
