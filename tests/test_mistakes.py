"""A person's mistakes in real processes: exit 2, one line that says what was found, no traceback,
and nothing on disk changed.

Each source file's own tests have all the mistakes that it refuses; here are those of each kind.
"""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from harness import CAN_FORK, torchrun_options
from launcher import script_environment

from engine.checkpoint import gathered, run_folder


@pytest.fixture
def place(trained, tmp_path):
    """The workspace with a fresh copy of the run in out-run. The dataset is restored afterwards."""
    folder = trained.folder
    data = folder / 'data' / 'toy'
    shutil.copytree(folder / 'out-toy', folder / 'out-run')
    shutil.copytree(data, tmp_path / 'data')

    yield trained

    shutil.rmtree(data)
    shutil.copytree(tmp_path / 'data', data)
    for name in ('out-run', 'odd.py', 'out-file', 'out-none'):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).unlink(missing_ok=True)


def read_tree(folder):
    """{path: content} of all files that a run could touch, but for caches and the lock."""
    found = {}
    for path in folder.rglob('*'):
        if not path.is_file() or '__pycache__' in path.parts:
            continue
        if path.name.endswith(('.checked.json', '.lock')):
            continue
        if path.name.startswith(('stdout-', 'stderr-')):
            continue
        found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def expect_refusal(place, words, script, *flags, ranks=1):
    before = read_tree(place.folder)
    if place.launcher:
        result = place.launcher.run(script, *flags, ranks=ranks, timeout=60)
    else:
        result = place.run_python(script, *flags, ranks=ranks)

    # A rank that has not failed yet when another one ends is ended by it, as under torchrun.
    assert result.code == 2 and not result.timed_out, result
    assert set(result.codes) <= {2, -signal.SIGTERM}, result
    assert result.stderr.count('\n') == 1, result
    assert result.stderr.startswith(f'{script}: ') and words in result.stderr, result
    assert read_tree(place.folder) == before
    assert not (place.folder / 'ran').exists(), 'a hostile file ran code'


def toy(folder, name):
    return folder / 'data' / 'toy' / name


class Evil:
    """Unpickling it would create a file."""

    def __reduce__(self):
        return os.system, ('touch ran',)


# What each function does before the command: settings

def odd_config(folder):
    (folder / 'odd.py').write_text('batch_size = 4\nlearning_rte = 1')


# data

def id_beyond_the_vocabulary(folder):
    ids = np.fromfile(toy(folder, 'val.bin'), '<u2')
    ids[345] = 17
    ids.tofile(toy(folder, 'val.bin'))


def hostile_meta(folder):
    toy(folder, 'meta.json').unlink()
    toy(folder, 'meta.pkl').write_bytes(pickle.dumps(Evil()))


def other_text(folder):
    np.fromfile(toy(folder, 'train.bin'), '<u2')[::-1].tofile(toy(folder, 'train.bin'))


# checkpoints

def replace_checkpoints(folder, content):
    for name in (gathered.STATE, gathered.PREVIOUS, gathered.MODEL):
        (folder / 'out-run' / name).write_bytes(content)


def cut_checkpoints(folder):
    replace_checkpoints(folder, (folder / 'out-run' / 'state.pt').read_bytes()[:5000])


def hostile_checkpoints(folder):
    with zipfile.ZipFile(folder / 'out-run' / 'new', 'w') as archive:
        archive.writestr('archive/data.pkl', pickle.dumps(Evil(), 2))
        archive.writestr('archive/version', '3\n')
    replace_checkpoints(folder, (folder / 'out-run' / 'new').read_bytes())


def file_as_folder(folder):
    (folder / 'out-file').write_text('a file')


def nothing(folder):
    pass


TRAIN = ['--device=cpu', '--dataset=toy', '--n_layer=2', '--n_head=2', '--n_embd=32',
         '--block_size=32']
NEW = '--out_dir=out-none'
RESUME = ['--out_dir=out-run', '--init_from=resume']
SAMPLE = ['--out_dir=out-run', '--start=a']


@pytest.mark.parametrize('script, flags, words, prepare', [
    ('train.py', [NEW, '--learning_rte=1'],
     "no setting 'learning_rte'; did you mean learning_rate?", nothing),
    ('train.py', [NEW, '--batch_size=-4'], 'batch_size=-4 should be at least 1', nothing),
    ('train.py', [NEW, '--n_head=3'],
     'n_embd=32 does not divide over n_head=3; try --n_embd=33', nothing),
    ('train.py', [NEW, '--dtype=float8'], "dtype='float8' is unknown", nothing),
    ('train.py', [NEW, 'odd.py'],
     "odd.py: there is no setting 'learning_rte'; did you mean learning_rate?", odd_config),
    ('train.py', [NEW, '--dataset=data/toy'], 'a relative path begins at', nothing),
    ('train.py', [NEW],
     'val.bin: token 345 has id 17, beyond the vocabulary of 17', id_beyond_the_vocabulary),
    ('train.py', [NEW], 'meta.pkl cannot be read: it asks to run', hostile_meta),
    ('train.py', RESUME, 'is not what the run was trained on', other_text),
    ('train.py', RESUME, 'not a PyTorch checkpoint, or truncated', cut_checkpoints),
    ('train.py', RESUME, 'it asks to run', hostile_checkpoints),
    ('train.py', [NEW, '--init_from=resume'], 'out-none holds no run to resume', nothing),
    ('train.py', ['--out_dir=out-run'],
     'already holds a run; go on with --init_from=resume', nothing),
    ('train.py', ['--out_dir=out-file'], 'cannot be written', file_as_folder),
    ('train.py', ['--out_dir=out-file/below'], 'cannot be written', file_as_folder),
    ('sample.py', [*SAMPLE, '--temprature=1'], 'did you mean temperature?', nothing),
    ('sample.py', [*SAMPLE, '--start=aXb'], "the character 'X' is not in the vocabulary", nothing),
    ('sample.py', [NEW], 'ckpt.pt does not exist', nothing),
    ('sample.py', SAMPLE, 'not a PyTorch checkpoint, or truncated', cut_checkpoints),
    ('sample.py', SAMPLE, 'it asks to run', hostile_checkpoints),
    ('bench.py', ['--steps=none'], "steps='none' should be a whole number", nothing),
    ('export.py', ['out-run', 'out-toy'], 'out-toy exists already', nothing),
    ('plot.py', ['out-none'], 'out-none holds no metrics.jsonl', nothing),
])
def test_a_mistake_is_one_line(place, script, flags, words, prepare):
    prepare(place.folder)
    if script == 'train.py':
        flags = [*TRAIN, *flags]
    expect_refusal(place, words, script, *flags)


@pytest.mark.parametrize('script, flag, words', [
    ('train.py', '--no_such_thing=1', "no setting 'no_such_thing'"),
    ('sample.py', '--temprature=1', 'did you mean temperature?')])
def test_a_mistake_is_one_line_from_a_new_python(workspace, script, flag, words):
    done = workspace.run_python(script, flag)
    assert done.code == 2 and done.stderr.count('\n') == 1 and words in done.stderr, done.stderr


def test_a_run_in_use_is_left_alone(place):
    run_lock = run_folder.RunLock(place.folder / 'out-run')
    for flags in (RESUME, ['--out_dir=out-run', '--overwrite=True']):
        expect_refusal(place, 'out-run is in use by another training process', 'train.py',
                       *TRAIN, *flags)
    run_lock.release()


@pytest.mark.skipif(not CAN_FORK, reason='two ranks are started by fork')
@pytest.mark.parametrize('flags, words', [
    ([NEW, '--gradient_accumulation_steps=1', '--batch_size=3'],
     'over 2 ranks; try --gradient_accumulation_steps=2'),
    ([NEW, '--backend=nccl'], 'backend=nccl moves data between NVIDIA GPUs'),
    (['--out_dir=out-run'], 'already holds a run'),
    ([NEW, '--learning_rte=1'], 'did you mean learning_rate?')])
def test_two_ranks_refuse_in_one_line(place, flags, words):
    expect_refusal(place, words, 'train.py', *TRAIN, *flags, ranks=2)


@pytest.mark.skipif(sys.platform == 'win32',
                    reason='torchrun on Windows needs a PyTorch built with libuv')
def test_torchrun_shows_the_line_once(place):
    command = [sys.executable, *torchrun_options(2), 'train.py', *TRAIN, '--out_dir=out-run']
    done = subprocess.run(command, cwd=place.folder, capture_output=True, text=True,
                          env=script_environment())
    assert done.returncode != 0 and 'exitcode  : 2' in done.stderr
    assert done.stderr.count('already holds a run') == 1 == done.stderr.count('train.py: ')
