"""Text that was not written by us: names of files, of keys, of classes, of whatever a stranger's file tells.

It may hold sequences that recolour a terminal, overwrite a line or turn the reading direction round. All of it passes
through `harmless` before it reaches a terminal, a record or a page.
"""

import os

LONGEST = 200
"""Characters of a name in a message; names of files go up to 255 bytes, and paths further."""


def harmless(text: object) -> str:
    r"""The text with everything escaped that does not print: control characters, direction marks, lone surrogates.

    >>> harmless("a\x1b[2Jb\nc\u202ed")
    'a\\x1b[2Jb\\nc\\u202ed'
    """
    whole = str(text)
    return whole if whole.isprintable() else "".join(map(_escaped, whole))


def name(text: object, longest: int = LONGEST) -> str:
    """A name that prints, with its middle left out where it is long.

    Args:
        text: A name or a path.
        longest: Characters that it may take.
    """
    shown = harmless(os.fspath(text) if isinstance(text, os.PathLike) else text)
    if len(shown) <= longest:
        return shown
    half = (longest - 3) // 2
    return f"{shown[:half]}...{shown[-half:]}"


def line(text: object) -> str:
    """One line for a terminal: what does not print is escaped, white space is single, endless words are shortened."""
    return " ".join(name(word) for word in str(text).split())


def values(content: object) -> object:
    """The same of every text, keys too, in nested lists and dicts."""
    if isinstance(content, str):
        return harmless(content)
    if isinstance(content, list | tuple):
        return [values(each) for each in content]
    if isinstance(content, dict):
        return {values(key): values(each) for key, each in content.items()}
    return content


def _escaped(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()
