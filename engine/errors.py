"""The two errors that a person may see, and the checks of a setting that raise one. `console.report_errors` shows each as one line."""

import math


class UserError(ValueError):
    """A person's mistake: a bad setting, a missing or damaged file. The script exits 2."""


class RunError(RuntimeError):
    """A failure while running: a full disk, a lost rank, a loss that is not finite. The script exits 1."""


def check_range(settings, names, low=-math.inf, high=math.inf, above=-math.inf, below=math.inf):
    """UserError unless low <= value <= high and above < value < below, for each of the settings `names`."""
    for name in names.split():
        if not (low <= settings[name] <= high and above < settings[name] < below):
            limits = [(low, 'at least'), (high, 'at most'), (above, 'above'), (below, 'below')]
            words = ' and '.join(f'{word} {limit:,}' for limit, word in limits if math.isfinite(limit))
            raise UserError(f'{name}={shorten(settings[name])} should be {words}')


def shorten(value):
    text = repr(value)
    return text if len(text) < 100 else text[:97] + '...'


def check_choice(settings, name, values):
    """UserError unless the setting `name` has one of `values`."""
    if settings[name] not in values:
        raise UserError(f'{name}={shorten(settings[name])} is unknown; try {" or ".join(map(repr, values))}')
