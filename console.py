"""What a script prints, and how it ends: one line for an error, and an exit code.

Import it before torch, so that Ctrl-C during torch's slow import shows no traceback. engine/ never
prints: it logs, and the handler below prints its lines.
"""

import logging
import os
import shutil
import sys
import textwrap
import time
from contextlib import contextmanager, suppress

from engine.errors import RunError, UserError
from engine.log import is_main_process, log, progress_bar  # noqa: F401, scripts import it from here

IS_MAIN = is_main_process()
WIDEST = 100                # columns that lines of text fill at most


# Lines

def print0(line='', end='\n', file=None):
    """Print on rank 0.

    A failed print is ignored: the reader may be gone (`| head`, Ctrl-C on `| tee`), the terminal
    closed, or the disk full.
    """
    if IS_MAIN:
        with suppress(OSError, ValueError):         # ValueError: the stream is closed
            print(line, end=end, file=file, flush=True)


def terminal_width():
    """The columns that lines of text may fill: those of the terminal, 80 where there is none."""
    return min(shutil.get_terminal_size().columns, WIDEST)


def wrap(text):
    """A paragraph in lines that fit the terminal; all but the first are indented."""
    return textwrap.fill(text, terminal_width(), subsequent_indent='  ',
                         break_long_words=False, break_on_hyphens=False)


def print_text(text, file=None):
    """Print lines of prose on rank 0: on a terminal so that they fit it, elsewhere as they are.

    A line that begins with a space, as a command does, is never broken.
    """
    is_terminal = False
    with suppress(ValueError):                      # the stream is closed
        is_terminal = (file or sys.stdout).isatty()

    for line in text.split('\n'):
        if is_terminal and not line.startswith(' '):
            line = wrap(line)
        print0(line, file=file)


class PlainHandler(logging.Handler):
    """Prints the lines that engine/ logs, on rank 0.

    stream: 'stdout' or 'stderr'. Each line looks it up in `sys`, as a program may replace it.
    """

    def __init__(self, stream):
        super().__init__()
        self.stream = stream

    def emit(self, record):
        print_text(record.getMessage(), file=getattr(sys, self.stream))


def log_to(stream):
    """Print what engine/ logs to 'stdout' or 'stderr'. A script whose result goes to stdout logs to
    stderr."""
    log.handlers = [PlainHandler(stream)]
    log.setLevel(logging.INFO)
    log.propagate = False


@contextmanager
def status(text):
    """Show `text` on a terminal while the block runs, then remove it. '' shows nothing."""
    show = text and IS_MAIN and sys.stderr.isatty()
    try:
        if show:
            print0(text, end='\r', file=sys.stderr)
        yield
    finally:
        if show:
            print0(' ' * len(text), end='\r', file=sys.stderr)


# Streams

def open_standard_streams():
    """Open stdin, stdout and stderr on os.devnull where the caller closed them.

    Otherwise the next file that is opened, a checkpoint perhaps, takes their number and receives
    what is printed.
    """
    in_order_of_numbers = (('stdin', 'r'), ('stdout', 'w'), ('stderr', 'w'))
    for name, mode in in_order_of_numbers:
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding='utf-8'))


def flush_or_drop():
    """Flush stdout and stderr; drop what cannot be written, which Python would report at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# Errors

@contextmanager
def report_errors():
    """Show an error as one line, and end with an exit code.

    UserError exits 2. RunError, the system's errors and a lack of memory exit 1. Ctrl-C exits 130.
    Anything else is a bug, and keeps its traceback.
    """
    open_standard_streams()
    try:
        yield
    except BrokenPipeError:                         # `python sample.py | head` has read enough
        raise SystemExit(141) from None             # as SIGPIPE ends other programs
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (UserError, RunError, OSError, MemoryError, RuntimeError) as error:
        line = ' '.join(str(error).split()) or type(error).__name__
        if is_out_of_memory(error):
            line = f'out of memory; a smaller batch, or a smaller model, may fit ({line[:150]})'
        elif not isinstance(error, (UserError, RunError, OSError)):
            raise
        print_error(line, error)
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None
    finally:
        flush_or_drop()


def is_out_of_memory(error):
    """True for Python's MemoryError, and for what PyTorch and NVIDIA's libraries raise."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, (UserError, RunError, OSError)):
        return False
    # PyTorch has a class of its own for its allocator alone. The driver, cuBLAS, cuDNN, NCCL and
    # the compiler say it in the text of other errors.
    words = ('out of memory', '_ALLOC_FAILED', 'ALLOCATION_FAILED', 'DefaultCPUAllocator')
    return type(error).__name__ == 'OutOfMemoryError' or any(word in str(error) for word in words)


def print_error(line, error):
    """Print an error's line on stderr, once for all ranks."""
    where = ''
    if not IS_MAIN:
        if isinstance(error, UserError):
            # A bad setting ends every rank, and rank 0 prints it. torchrun then ends this rank
            # while it sleeps. If this rank wakes up, the mistake is its own.
            time.sleep(3)
            if getattr(error, 'on_all_ranks', False):
                return
        where = f' rank {os.environ["RANK"]}:'
    with suppress(OSError, ValueError):
        script = os.path.basename(sys.argv[0])
        print(f'{script}:{where} {line}', file=sys.stderr, flush=True)


def describe(error):
    """'ValueError: its text' of any exception, also of one that cannot be printed."""
    try:
        return f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'
    except Exception:
        return type(error).__name__


def hide_interrupt(kind, error, trace):
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


# Importing torch takes seconds. Ctrl-C meanwhile should end a script without a traceback.
sys.excepthook = hide_interrupt
# A progress bar follows its terminal when that is made narrower.
os.environ.setdefault('TQDM_DYNAMIC_NCOLS', '1')
# When a rank is lost, PyTorch's C++ code prints 40 lines of stack frames.
os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')
# PyTorch's profiler prints lines that begin with USDT at any level below this one.
os.environ.setdefault('KINETO_LOG_LEVEL', '99')
log_to('stdout')
