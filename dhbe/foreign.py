"""Untrusted text: names of files, keys, classes and anything else that comes from a file of unknown origin.

It may contain sequences that recolour a terminal, overwrite a line or reverse the reading direction. All of it passes
through `harmless` before it reaches a terminal, a record or a page.
"""

import os

LONGEST = 200
"""Maximum length of a name in a message, in characters; file names have up to 255 bytes, and paths more."""


def harmless(text: object) -> str:
    r"""The text with unprintable characters escaped: control characters, direction marks, lone surrogates.

    >>> harmless("a\x1b[2Jb\nc\u202ed")
    'a\\x1b[2Jb\\nc\\u202ed'
    """
    whole = str(text)
    return whole if whole.isprintable() else "".join(map(_escaped, whole))


def name(text: object, longest: int = LONGEST) -> str:
    """A printable name, shortened in the middle if it is too long.

    Args:
        text: A name or a path.
        longest: Maximum length in characters.
    """
    shown = harmless(os.fspath(text) if isinstance(text, os.PathLike) else text)
    if len(shown) <= longest:
        return shown
    half = (longest - 3) // 2
    return f"{shown[:half]}...{shown[-half:]}"


def line(text: object) -> str:
    """One line for a terminal: unprintable characters escaped, white space collapsed, long words shortened."""
    return " ".join(name(word) for word in str(text).split())


def values(content: object) -> object:
    """Applies `harmless` to every text, including keys, in nested lists and dicts."""
    if isinstance(content, str):
        return harmless(content)
    if isinstance(content, list | tuple):
        return [values(each) for each in content]
    if isinstance(content, dict):
        return {values(key): values(each) for key, each in content.items()}
    return content


def _escaped(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()
