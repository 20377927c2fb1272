"""Files that are either whole or not there."""

import os
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path, mode='w', keep_as=None):
    """Yield an open file that replaces `path` when the block ends without an exception.

    mode: 'w' for UTF-8 text or 'wb' for bytes. keep_as: the name under which the present file
    stays in the folder. The content is on disk before the file gets its name. The temporary
    file is always created anew, so a link planted under its name is never followed.
    Raises OSError; `path` is then as it was, or, between the two renames of keep_as, whole under that name.
    """
    path = Path(path)
    temporary = path.with_name(path.name + '.tmp')
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, mode.replace('w', 'x'), encoding=None if 'b' in mode else 'utf-8') as file:
            yield file
            sync(file)
        if keep_as and path.exists():
            # Between these two renames `path` is missing, and keep_as is whole.
            os.replace(path, path.with_name(keep_as))
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(file):
    """Put an open file's content on disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder):
    """Put a folder's names on disk. Windows does this by itself."""
    if os.name == 'posix':
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
