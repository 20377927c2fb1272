"""The two errors that a person may see. `console.report_errors` shows each as one line."""


class UserError(ValueError):
    """A person's mistake: a bad setting, a missing or damaged file. The script exits 2."""


class RunError(RuntimeError):
    """A failure while running: a full disk, a lost rank, a loss that is not finite. The script exits 1."""
