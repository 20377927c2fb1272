"""The folder of a run: locking it, and finding the newest state in it."""

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import filelock
import torch

from engine.atomic_files import atomic_write, remove
from engine.checkpoint import gathered
from engine.checkpoint import sharded as sharded_checkpoint
from engine.checkpoint.contents import RESUME_NEEDS, STATE_NEEDS, Checkpoint
from engine.checkpoint.gathered import MODEL, PREVIOUS, STATE
from engine.checkpoint.kept import NAME, kept_models, scores_path
from engine.distributed import Environment
from engine.errors import UserError

# What a run can continue from. The second of a pair is read if the first is damaged or missing.
STATES = (
    (STATE, PREVIOUS),
    (sharded_checkpoint.STATE, sharded_checkpoint.PREVIOUS),
)
STATE_NAMES = (*STATES[0], *STATES[1])


# Finding and reading

def holds_run(out_dir: str | Path) -> bool:
    """True where out_dir has something to resume from."""
    try:
        return any((Path(out_dir) / name).exists() for name in (MODEL, *STATE_NAMES))
    except OSError as error:
        raise UserError(f'{out_dir!r} cannot be used ({error.strerror}); '
                        f'choose another --out_dir') from None


def find_run(source: str) -> Path | None:
    """The run that `source` names: its folder, also where `source` is its ckpt.pt; or a kept model,
    such as out/ckpt_001000.pt.

    None where `source` names no run. A folder with a config.json holds weights of Hugging Face.
    """
    if not source:
        return None
    path = Path(source)
    if path.name == MODEL and path.is_file():
        return path.parent
    if NAME.fullmatch(path.name) and path.is_file():
        return path
    if path.is_dir() and not (path / 'config.json').exists() and holds_run(path):
        return path
    return None


def load_state(out_dir: str | Path) -> tuple[Checkpoint, list[str]]:
    """The newest state in out_dir that can be read, and notes on what was wrong with others.

    A sharded state comes without tensors: sharded.load reads them. A ckpt.pt alone is enough:
    nanoGPT's has its optimizer inside, and without one the optimizer starts afresh.
    Raises UserError that names each file and its fault.
    """
    out_dir = Path(out_dir)
    found = []
    notes = []

    for newest, previous in STATES:
        state, faults = load_newer_of_two(out_dir, newest, previous)
        notes.extend(faults)
        if state:
            found.append(state)
    if found:
        return max(found, key=lambda state: state.iter_num), notes

    if notes:
        raise UserError(f'no state to resume: {"; ".join(notes)}; restore one, '
                        f'move them away to go on from a {MODEL}, '
                        f'or start over with --init_from=scratch --overwrite=True')
    return ckpt_as_state(out_dir)


def load_newer_of_two(out_dir, newest, previous):
    """(the state `newest`, else the state `previous`, else None; notes on what was wrong).

    If the state stands in for a newer one, which is damaged or missing, stands_in_for names that.
    """
    notes = []
    for name in (newest, previous):
        path = out_dir / name
        try:
            if path.exists():
                state = read_state(path)
                if name == previous:
                    state.stands_in_for = newest
                return state, notes
        except UserError as error:
            notes.append(str(error))
            continue

        if name == newest and (out_dir / previous).exists():
            notes.append(f'{path} is missing')
    return None, notes


def read_state(path):
    """The state at `path`: a file, or a folder of shards, whose tensors are not read."""
    if path.is_dir():
        sharded_checkpoint.verify(path)
        return sharded_checkpoint.load_rest(path)
    return Checkpoint.from_payload(gathered.read(path), path, STATE_NEEDS)


def ckpt_as_state(out_dir):
    """(ckpt.pt as a state, notes that say what is missing)."""
    if not (out_dir / MODEL).exists():
        raise UserError(f'{out_dir} holds no run to resume (no {STATE}, no {MODEL}); '
                        f'check --out_dir, or start one with --init_from=scratch')

    state = gathered.read_ckpt(out_dir, RESUME_NEEDS)

    if state.optimizer is None:
        note = 'without optimizer state, which starts afresh'
    else:
        note = 'with the optimizer inside it'
    return state, [f'{out_dir / MODEL} alone, {note}']


def newest_checkpoint(out_dir: str | Path) -> Checkpoint:
    """The contents of ckpt.pt, or of the state if there is no ckpt.pt or a sharded state is newer.

    out_dir: the folder of a run, or one file of it, such as ckpt_001000.pt.
    Raises UserError where out_dir holds no model that can be read.
    """
    out_dir = Path(out_dir)
    if is_one_model(out_dir):
        return Checkpoint.from_payload(gathered.read(out_dir), out_dir)
    if holds_run(out_dir) and not (out_dir / MODEL).exists():
        state, _ = load_state(out_dir)
        return with_weights(state)

    saved = read_ckpt_or_advise(out_dir)

    if (out_dir / sharded_checkpoint.STATE).exists():
        try:
            state, _ = load_state(out_dir)
        except UserError:                           # ckpt.pt is whole, and the states are not
            return saved
        if state.shards_folder and state.iter_num > (saved.iter_num or 0):
            return with_weights(state)
    return saved


def is_one_model(path: str | Path) -> bool:
    """True where `path` is a file, as out/ckpt_001000.pt is, and no folder of a run.

    Raises UserError for the name of a kept model that is not there.
    """
    path = Path(path)
    if NAME.fullmatch(path.name) and not os.path.exists(path):
        names = [kept.name for kept in kept_models(path.parent).values()]
        raise UserError(f'{path.parent} has no {path.name}; it keeps '
                        f'{", ".join(names) or "no models, which takes --keep_interval=1000"}')
    return os.path.isfile(path)


def with_weights(state):
    """A state of load_state with its weights, which a sharded one lacks so far.

    UserError for a state that has adapters in their place.
    """
    if state.shards_folder:
        return sharded_checkpoint.load_whole(state)
    if state.adapters is not None and not state.model:
        raise UserError(f'{state.path} has adapters without the model; go on with '
                        f'--init_from=resume until an evaluation writes {MODEL}, the merged model')
    return state


def read_ckpt_or_advise(out_dir):
    """The contents of ckpt.pt, or a UserError that names the state that can be read instead."""
    try:
        return gathered.read_ckpt(out_dir)
    except UserError as error:
        for name in STATE_NAMES:
            if (out_dir / name).exists():
                raise UserError(f'{error}; move it away, and {name} is read') from None
        raise


# Opening

class OpenedRun(NamedTuple):
    """What train.py begins with.

    state: the state to resume from, or None for a new run.
    notes: lines on what was wrong with other states.
    """
    state: Checkpoint | None
    notes: list[str]


def open_run(out_dir: str | Path, init_from: str, overwrite: bool, read_only: bool,
             env: Environment) -> OpenedRun:
    """Read the state to resume from. Every rank calls it, after it has locked out_dir.

    Rank 0 chooses the state, and verifies its checksums; the other ranks read the same one.
    read_only: accept any out_dir.
    Raises UserError where out_dir holds a run that the command does not mean to continue or to
    replace, or where no state can be loaded.
    """
    state = None
    path = None
    notes = []

    # rank 0: choose
    with env.raise_on_all_ranks():
        if env.is_main:
            if goes_on(out_dir, init_from):
                state, notes = load_state(out_dir)
                path = state.path
            elif not overwrite and not read_only:
                refuse_to_replace(out_dir)

    # the other ranks: the state that rank 0 chose
    path, notes = env.all_gather((path, notes))[0]
    with env.raise_on_all_ranks():
        if path and not env.is_main:
            state = read_chosen_state(Path(path))
    return OpenedRun(state, notes)


def read_chosen_state(path):
    """The state that rank 0 chose, on another rank. Rank 0 has verified the files of the shards."""
    if path.name == MODEL:
        return gathered.read_ckpt(path.parent, RESUME_NEEDS)
    if path.is_dir():
        return sharded_checkpoint.load_rest(path)
    return read_state(path)


def goes_on(out_dir, init_from):
    """True where the command continues the run in out_dir."""
    if init_from == 'auto':
        return holds_run(out_dir)
    return init_from == 'resume'


def refuse_to_replace(out_dir):
    """UserError where out_dir holds a run, or what is kept of one."""
    if holds_run(out_dir):
        raise UserError(f'{out_dir} already holds a run; go on with --init_from=resume, choose '
                        f'another --out_dir, or replace it with --overwrite=True')
    kept = list(kept_models(out_dir).values())
    if kept:
        raise UserError(f'{out_dir} holds kept models, such as {kept[0].name}; move them away, '
                        f'choose another --out_dir, or remove them with --overwrite=True')


@contextmanager
def locked(out_dir: str | Path, init_from: str, read_only: bool,
           env: Environment) -> Iterator[None]:
    """Rank 0 holds the lock of out_dir while the block runs. Every rank enters it.

    read_only: take no lock.
    Raises UserError, on all ranks, where another process has the lock.
    """
    run_lock = None
    try:
        with env.raise_on_all_ranks():
            if env.is_main and not read_only:
                # Resuming what does not exist should not create a folder.
                if init_from != 'resume' or holds_run(out_dir):
                    run_lock = RunLock(out_dir)
        yield
    finally:
        if run_lock:
            run_lock.release()


class RunLock:
    """The lock of out_dir, which is created if it does not exist.

    Raises UserError if another process has it.
    """

    def __init__(self, out_dir: str | Path):
        self.folder = Path(out_dir)
        try:
            self.is_new_folder = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            self.path = self.folder / '.lock'
            self.is_new_file = not self.path.exists()
            self.file_lock = filelock.FileLock(self.path)
            self.file_lock.acquire(blocking=False)
        except filelock.Timeout:
            raise UserError(f'{out_dir} is in use by another training process; '
                            f'wait for it, or choose another --out_dir') from None
        except (OSError, ValueError) as error:      # ValueError: NUL or half a surrogate pair
            reason = getattr(error, 'strerror', None) or error
            raise UserError(f'{out_dir!r} cannot be written ({reason}); '
                            f'choose another --out_dir') from None

    def release(self) -> None:
        """Release the lock. A run that was refused leaves nothing of it behind."""
        with suppress(OSError, UserError):          # the disk may be gone
            if self.is_new_file and not holds_run(self.folder):
                self.path.unlink(missing_ok=True)
            if self.is_new_folder:
                self.folder.rmdir()                 # fails unless it is empty
        self.file_lock.release()


# Cleaning and describing

def clean_out_dir(out_dir: str | Path, state: Checkpoint | None) -> None:
    """Make out_dir ready for saves, once the run is sure to start.

    state: what the run goes on from. None removes the models, states and scores of an earlier run,
    which a new one replaces. If it is the previous state, because the newest was damaged, the
    damaged one moves aside, so that the next save keeps the good one.
    """
    out_dir = Path(out_dir)

    # what saves that were killed have left
    for name in (MODEL, STATE, sharded_checkpoint.STATE):
        remove(out_dir / f'{name}.tmp')
    for path in out_dir.glob('ckpt_*.pt.tmp'):
        if NAME.fullmatch(path.stem):
            remove(path)

    # what must not be taken for this run's
    if state is None:
        remove(out_dir / MODEL)
        remove(scores_path(out_dir))
        for path in kept_models(out_dir).values():
            remove(scores_path(path))
            remove(path)
        for newest, previous in STATES:             # the newest one last, in case of a kill
            remove(out_dir / previous)
            remove(out_dir / newest)
    elif state.stands_in_for:
        move_aside(out_dir, state.stands_in_for)


def move_aside(out_dir, name):
    """Give a damaged state the name state.damaged, if it is there."""
    if os.path.lexists(out_dir / name):
        aside = out_dir / name.replace('state', 'state.damaged')
        remove(aside)                               # a folder is not replaced by a rename
        os.replace(out_dir / name, aside)


def write_run_json(out_dir: str | Path, command: list[str], settings: dict,
                   env: Environment) -> None:
    """Write run.json: what was started, when, with which settings, versions and device.

    It is for people; nothing reads it, so a failure to write it stops nothing.
    """
    now = datetime.datetime.now().astimezone()
    content = dict(
        command=command,
        started=now.isoformat(timespec='seconds'),
        device=env.summary,
        ranks=env.world_size,
        python=sys.version.split()[0],
        torch=torch.__version__,
        commit=git_commit(Path(__file__).resolve().parents[2]),
        settings=settings,
    )

    with suppress(OSError), atomic_write(Path(out_dir) / 'run.json') as file:
        json.dump(content, file, indent=2)


def git_commit(folder: Path) -> str | None:
    """The commit that is checked out in the repository `folder`, or None where git finds none."""
    # A repository around the folder does not count.
    environment = dict(os.environ, GIT_CEILING_DIRECTORIES=str(folder.parent))
    command = ['git', 'rev-parse', '--verify', 'HEAD']

    with suppress(OSError, subprocess.SubprocessError):
        found = subprocess.check_output(command, cwd=folder, env=environment, text=True,
                                        stderr=subprocess.DEVNULL, timeout=5)
        return found.strip()
    return None
