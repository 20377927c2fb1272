"""Files that are either whole or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def atomic_write(path: Path | str, mode: str = 'w', keep_as: str | None = None) -> Iterator[IO]:
    """Yield an open file that replaces `path` when the block ends without an exception.

    mode: 'w' for UTF-8 text or 'wb' for bytes. keep_as: the name under which the present file stays
    in the folder. The content is on disk before the file gets its name. The temporary file is
    always created anew, so a link planted under its name is never followed.

    Raises OSError; `path` is then as it was, or, between the two renames of keep_as, whole under
    that name.
    """
    path = Path(path)
    temporary = path.with_name(path.name + '.tmp')
    encoding = None
    if 'b' not in mode:
        encoding = 'utf-8'

    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, mode.replace('w', 'x'), encoding=encoding) as file:
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


def sync(file: IO) -> None:
    """Put an open file's content on disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path | str) -> None:
    """Put a folder's names on disk. Windows does this by itself."""
    if os.name != 'posix':
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
