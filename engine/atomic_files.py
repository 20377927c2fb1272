"""Files that are either whole or not there, and what to do where one cannot be written."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

ADVICE = {
    errno.ENOSPC: 'make room',
    errno.EDQUOT: 'make room, as your quota is used up',
    errno.EFBIG: 'allow larger files, with ulimit -f unlimited',
    errno.EACCES: 'give yourself the right to write there',
    errno.EPERM: 'give yourself the right to write there',
    errno.EROFS: 'mount that disk for writing',
}


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


def remove(path: Path | str) -> None:
    """Remove a file, a folder with all that is in it, or a link, if it is there.

    What a link points to stays. Raises OSError where that fails.
    """
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def advice_on(error: BaseException | None) -> str:
    """What a person has to do before a write can succeed that failed with `error`.

    error: usually an OSError, whose number decides.
    """
    return ADVICE.get(getattr(error, 'errno', None), 'mend that')


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
