"""The two errors that a person may see, and the checks of a setting that raise one.

`console.report_errors` shows each error as one line.
"""

import math
from collections.abc import Collection
from typing import Any


class UserError(ValueError):
    """A person's mistake: a bad setting, a missing or damaged file. The script exits 2."""


class RunError(RuntimeError):
    """A failure while running: a full disk, a lost rank, a loss that is not finite. Exit 1."""


def check_range(
    settings: dict[str, Any], names: str, low: float = -math.inf, high: float = math.inf,
    above: float = -math.inf, below: float = math.inf,
) -> None:
    """UserError unless low <= value <= high and above < value < below, for each setting in `names`.

    settings: {name: value}. names: words separated by spaces.
    """
    limits = {'at least': low, 'at most': high, 'above': above, 'below': below}
    words = ' and '.join(f'{word} {limit:,}' for word, limit in limits.items()
                         if math.isfinite(limit))

    for name in names.split():
        value = settings[name]
        if not (low <= value <= high and above < value < below):
            raise UserError(f'{name}={shorten(value)} should be {words}')


def check_choice(settings: dict[str, Any], name: str, values: Collection[Any]) -> None:
    """UserError unless the setting `name` has one of `values`."""
    if settings[name] not in values:
        known = ' or '.join(map(repr, values))
        raise UserError(f'{name}={shorten(settings[name])} is unknown; try {known}')


def shorten(value: Any) -> str:
    """The value as Python writes it, cut to 100 characters."""
    text = repr(value)
    if len(text) < 100:
        return text
    return text[:97] + '...'
