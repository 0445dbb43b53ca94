"""Numbers as text."""

import json
from datetime import datetime


def percent(value: float | None) -> str:
    """A fraction as a percentage; values that would round to 0 or 100 % are marked as below or above.

    >>> percent(0.9972), percent(0.0001), percent(0.9999), percent(0.0), percent(None)
    ('99.7%', '<0.1%', '>99.9%', '0.0%', '—')
    """
    if value is None:
        return "—"
    if 0 < value < 0.0005:
        return "<0.1%"
    if 0.9995 <= value < 1:
        return ">99.9%"
    return f"{100 * value:.1f}%"


def duration(seconds: float) -> str:
    """A duration in seconds as text.

    >>> duration(7.25), duration(125), duration(7260)
    ('7.2 s', '2 min 5 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def moment(time: str) -> str:
    """A time in ISO 8601 as text.

    >>> moment("2025-01-31T12:00:59.1Z")
    '2025-01-31 12:00 UTC'
    """
    return f"{datetime.fromisoformat(time):%Y-%m-%d %H:%M} UTC"


def setting(value: object) -> str:
    """A hyperparameter as text.

    >>> setting(0.0005), setting([1, 2]), setting(False), setting("sample")
    ('0.0005', '[1, 2]', 'false', 'sample')
    """
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
