"""Text that comes from a guest, an image or a repository, on its way to somebody's terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text`, a line at most, with what could command a terminal replaced by question marks."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else "?" for character in text)
