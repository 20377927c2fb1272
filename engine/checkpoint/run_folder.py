"""The folder of a run: locking it, and finding the newest state in it."""

import datetime
import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import filelock
import torch

from engine.atomic_files import atomic_write
from engine.checkpoint import gathered
from engine.checkpoint import sharded as sharded_checkpoint
from engine.checkpoint.gathered import MODEL, PREVIOUS, STATE
from engine.errors import UserError

# What a run can continue from. The second of a pair is read if the first is damaged or missing.
STATES = ((STATE, PREVIOUS), (sharded_checkpoint.STATE, sharded_checkpoint.PREVIOUS))


def holds_run(out_dir):
    """True where out_dir has something to resume from."""
    try:
        return any((Path(out_dir) / name).exists() for name in (MODEL, *STATES[0], *STATES[1]))
    except OSError as error:
        raise UserError(f'{out_dir!r} cannot be used ({error.strerror}); choose another --out_dir') from None


def load_state(out_dir):
    """The newest state in out_dir that can be read, and a list of notes on what was wrong before it.

    The state of sharded_checkpoint has no tensors: sharded_checkpoint.load reads them. A ckpt.pt alone is
    enough: nanoGPT's has its optimizer inside, and without one the optimizer starts afresh.
    Raises UserError that names each file and its fault.
    """
    out_dir, found, notes = Path(out_dir), [], []
    for newest, previous in STATES:
        for name in (newest, previous):
            path = out_dir / name
            try:
                if path.exists():
                    state = (sharded_checkpoint.load_rest(path) if path.is_dir() else
                             gathered.validate(gathered.read(path), path, ('optimizer', 'scaler')))
                    found.append(dict(state, damaged=newest if name == previous else None))
                    break
                if name == newest and (out_dir / previous).exists():
                    notes.append(f'{path} is missing')
            except UserError as error:
                notes.append(str(error))
    if found:
        return max(found, key=lambda state: state['iter_num']), notes
    if notes:
        raise UserError(f'no state to resume: {"; ".join(notes)}; restore one, move them away to go on '
                        f'from a {MODEL}, or start over with --init_from=scratch --overwrite=True')
    if not (out_dir / MODEL).exists():
        raise UserError(f'{out_dir} holds no run to resume (no {STATE}, no {MODEL}); '
                        f'check --out_dir, or start one with --init_from=scratch')
    state = gathered.load_model(out_dir)
    notes.append(f'{out_dir / MODEL} alone, ' + ('with the optimizer inside it' if 'optimizer' in state
                 else 'without optimizer state, which starts afresh'))
    return state, notes


def load_newest_model(out_dir):
    """The contents of ckpt.pt, or of the state where there is no ckpt.pt or a sharded state is newer."""
    has_model, is_sharded = (Path(out_dir) / MODEL).exists(), (Path(out_dir) / sharded_checkpoint.STATE).exists()
    try:
        saved = gathered.load_model(out_dir) if has_model or not holds_run(out_dir) else None
    except UserError as error:
        state = next((name for name in STATES[0] + STATES[1] if (Path(out_dir) / name).exists()), None)
        raise UserError(f'{error}; move it away, and {state} is read' if state else error) from None
    if saved is None or is_sharded:
        try:
            state, _ = load_state(out_dir)
        except UserError:
            if saved is None:
                raise
            return saved
        if saved is None or 'sharded' in state and state['iter_num'] > saved['iter_num']:
            return sharded_checkpoint.load_whole(state) if 'sharded' in state else state
    return saved


def open_run(out_dir, init_from, overwrite, read_only, env):
    """(state to resume from or None, notes on it, lock). Every rank calls it; rank 0 locks out_dir
    before any rank looks at what it holds. read_only: take no lock, and accept any out_dir.

    Raises UserError where out_dir is in use, where it holds a run that the command does not
    mean to continue or to replace, or where no state can be loaded.
    """
    run_lock = None
    with env.raise_on_all_ranks():
        # Resuming what does not exist should not create a folder.
        if env.is_main and not read_only and (init_from != 'resume' or holds_run(out_dir)):
            run_lock = lock(out_dir)
    with env.raise_on_all_ranks():
        if init_from == 'resume' or init_from == 'auto' and holds_run(out_dir):
            return *load_state(out_dir), run_lock
        if holds_run(out_dir) and not (overwrite or read_only):
            raise UserError(f'{out_dir} already holds a run; go on with --init_from=resume, choose '
                            f'another --out_dir, or replace it with --overwrite=True')
    return None, [], run_lock


def lock(out_dir):
    """Create out_dir and lock it until this process ends. UserError if another process has it."""
    try:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        run_lock = filelock.FileLock(Path(out_dir) / '.lock')
        run_lock.acquire(blocking=False)
        return run_lock
    except filelock.Timeout:
        raise UserError(f'{out_dir} is in use by another training process; '
                        f'wait for it, or choose another --out_dir') from None
    except (OSError, ValueError) as error:                  # ValueError: NUL or half a surrogate pair in the name
        reason = getattr(error, 'strerror', None) or error
        raise UserError(f'{out_dir!r} cannot be written ({reason}); choose another --out_dir') from None


def clean_out_dir(out_dir, state):
    """Make out_dir ready for saves, once the run is sure to start.

    state: what the run goes on from. None removes the files of an earlier run, which a new one
    replaces. If it is the previous state, because the newest was damaged, the damaged one moves
    aside, so that the next save keeps the good one.
    """
    out_dir = Path(out_dir)
    leftovers = [f'{name}.tmp' for name in (MODEL, STATE, sharded_checkpoint.STATE)]     # of a save that was killed
    for name in leftovers if state else [*leftovers, MODEL, *reversed(STATES[0]), *reversed(STATES[1])]:
        if (out_dir / name).is_dir():
            shutil.rmtree(out_dir / name)
        else:
            (out_dir / name).unlink(missing_ok=True)
    damaged = state and state.get('damaged')
    if damaged and (out_dir / damaged).exists():
        aside = out_dir / damaged.replace('state', 'state.damaged')
        shutil.rmtree(aside, ignore_errors=True)            # a folder is not replaced by a rename
        os.replace(out_dir / damaged, aside)


def write_run_json(out_dir, command, settings, env):
    """Write run.json: what was started, when, with which settings, versions and device. For people;
    nothing reads it."""
    content = dict(command=command, started=datetime.datetime.now().astimezone().isoformat(timespec='seconds'),
                   device=env.summary, ranks=env.world_size, python=sys.version.split()[0], torch=torch.__version__,
                   commit=git_commit(Path(__file__).resolve().parents[2]), settings=settings)
    with suppress(OSError), atomic_write(Path(out_dir) / 'run.json') as file:
        json.dump(content, file, indent=2)


def git_commit(folder):
    """The commit that is checked out in the repository `folder`, or None where git finds none."""
    environment = dict(os.environ, GIT_CEILING_DIRECTORIES=str(folder.parent))      # no repository around the folder counts
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(['git', 'rev-parse', '--verify', 'HEAD'], cwd=folder, env=environment,
                                       stderr=subprocess.DEVNULL, text=True, timeout=5).strip()
