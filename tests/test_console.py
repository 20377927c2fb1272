import errno
import os
import shlex
import subprocess
import sys

import console

import pytest
import torch
from harness import ROOT

from engine.errors import RunError, UserError


@pytest.mark.parametrize('error, code, line', [
    (UserError('a bad\nsetting'), 2, 'a bad setting'),
    (RunError('a full disk'), 1, 'a full disk'),
    (OSError(errno.ENOSPC, 'No space left', 'a.bin'), 1, "No space left: 'a.bin'"),
    (MemoryError(), 1, 'out of memory; a smaller batch, or a smaller model, may fit'),
    (RuntimeError('DefaultCPUAllocator: can not allocate'), 1, 'out of memory; a smaller batch'),
    (torch.OutOfMemoryError('Tried to allocate 2 GiB'), 1, 'out of memory; a smaller batch'),
    (torch.AcceleratorError('CUDA error: out of memory'), 1, 'out of memory; a smaller batch'),
    (RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`'), 1,
     'out of memory; a smaller batch'),
    (RuntimeError('NCCL error: Failed to CUDA calloc; CUDA failure 2 out of memory'), 1,
     'out of memory; a smaller batch'),
    (RunError('the disk says out of memory'), 1, ': the disk says out of memory'),
    (KeyboardInterrupt(), 130, ''),
    (BrokenPipeError(), 141, ''),
])
def test_an_error_is_one_line_and_an_exit_code(capsys, error, code, line):
    with pytest.raises(SystemExit) as end:
        with console.report_errors():
            raise error

    shown = capsys.readouterr().err
    assert end.value.code == code
    assert line in shown
    assert shown.count('\n') == bool(line)


def test_a_bug_keeps_its_traceback():
    for error in (RuntimeError('shapes differ'), ValueError('too many values'), KeyError('x')):
        with pytest.raises(type(error)):
            with console.report_errors():
                raise error


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='this system has no /dev/full')
@pytest.mark.parametrize('arguments, code', [
    ('--help | true', 0),
    ('--help > /dev/full', 0),
    ('--help >&-', 0),
    ('--no_such=1 2>&-', 2),
    ('--no_such=1 2> /dev/full', 2),
])
def test_what_cannot_be_printed_is_lost_and_nothing_else(arguments, code):
    """The reader has gone, the disk is full, or the caller closed the stream."""
    command = f'{shlex.quote(sys.executable)} export.py {arguments}'
    ended = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == code
    assert ended.stderr == ''
