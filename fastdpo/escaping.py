"""Text from data and file names, made harmless where it is shown: in Markdown, on a terminal, in a figure."""

import re
import unicodedata

# what begins an element of Markdown or HTML inside a line; `_` does not, within a word
_MARKDOWN = re.compile(r"([\\`*\[\]|~])")
# they reorder or hide what is shown after them
_HIDDEN = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A)), "\u200e", "\u200f", "\ufeff"}


def markdown_text(text: str, line_break: str = " ") -> str:
    """Plain text inside a line or a table's cell: no link, no image, no HTML, no code, no new line of its own.

    line_break: what stands for a new line.
    """
    text = _MARKDOWN.sub(r"\\\1", one_line_each(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")))
    # a scheme is linked without brackets too, and what begins a line could be a heading or a list
    text = re.sub(r"(?i)\b(javascript|data|vbscript):", r"\1&#58;", text)
    return line_break.join(re.sub(r"^(\s*)([#+-]+\s)", r"\1\\\2", line) for line in text.split("\n"))


def markdown_code(text: str) -> str:
    """Code inside a line, in more backticks than it has itself."""
    text = visible(text.replace("\n", " ").replace("\r", " "))
    ticks = _fence(text, 1)
    edge = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{edge}{text}{edge}{ticks}"


def markdown_fence(text: str, language: str = "") -> str:
    """A block of code that its content cannot close."""
    ticks = _fence(text, 3)
    return f"{ticks}{language}\n{visible(text)}\n{ticks}"


def visible(text: str) -> str:
    """The text without what a terminal would act on: control characters become escapes; new lines and tabs stay."""
    return "".join(_shown(character) for character in text)


def figure_text(text: str) -> str:
    """A label that matplotlib takes as it is: `$` begins no formula."""
    return visible(text).replace("$", r"\$")


def one_line_each(text: str) -> str:
    """`visible`, with every kind of line end as a new line."""
    return visible(text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n").replace("\u2029", "\n"))


def _shown(character: str) -> str:
    if character in "\n\t":
        return character
    if unicodedata.category(character) == "Cc" or character in _HIDDEN:
        return character.encode("unicode_escape").decode("ascii")
    return character


def _fence(text: str, least: int) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(least, longest + 1)
