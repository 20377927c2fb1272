"""Runs a script of the project as a real process, with a fault wired in where one is asked for.

    python launcher.py SCRIPT ARGUMENTS...     the fault comes as JSON in the variable FAULT
    python launcher.py                         a server: imports PyTorch once and forks a process per request

The project's files know nothing of this: the wrappers below stand between them and what they
call. A fork starts in milliseconds where a fresh Python takes seconds to import PyTorch; it
reads the project's files anew, has a pid of its own, and can be killed like any other.
"""

import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

RANK = 'RANK'
SAVE_STEPS = ('writing', 'fsync file', 'replace previous', 'replace', 'fsync folder', 'done')


# Faults, in the process that they hit

def install(fault):
    """Wire in `fault`, a dict:

    kind: 'signal' (number, times), 'full', 'nan' (what: 'loss' or 'gradient'), or 'order'.
    rank: which rank has it, 0 where absent. attempt: only in torchrun's so-and-so-many'th restart.
    save: the how-many'th file that checkpoint.write writes, from 0; with step, one of
    SAVE_STEPS, and offset, bytes of the file. Or iteration, counted from this process's start,
    with delay in seconds and micros, the micro-batches of a rank per iteration. report: a file
    for the time at which a signal struck, or for the order of the steps of all saves; each rank's
    pid goes beside it.
    """
    if fault.get('rank', 0) != int(os.environ.get(RANK, 0)):
        return
    if fault.get('attempt', 0) != int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)):
        return
    if 'iteration' in fault:
        install_in_training(fault)
    else:
        install_in_save(fault)


def hit(fault):
    if 'report' in fault:
        Path(fault['report']).write_text(str(time.time()), encoding='utf-8')
    for _ in range(fault.get('times', 1)):
        os.kill(os.getpid(), fault['number'])


def install_in_training(fault):
    import model
    forward, calls = model.GPT.forward, 0

    def faulty(self, *arguments, **options):
        nonlocal calls
        logits, loss = forward(self, *arguments, **options)
        if self.training:
            if calls == fault['iteration'] * fault['micros']:
                if fault['kind'] == 'signal':
                    threading.Timer(fault.get('delay', 0), hit, [fault]).start()
                elif fault['what'] == 'loss':
                    loss = loss * float('nan')
                else:
                    loss.register_hook(lambda gradient: gradient * float('inf'))
            calls += 1
        return logits, loss
    model.GPT.forward = faulty


class Around:
    """A module or an object as it is, but for the attributes given."""

    def __init__(self, inner, **ours):
        self.__dict__.update(ours, inner=inner)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __enter__(self):
        self.inner.__enter__()
        return self

    def __exit__(self, *reason):
        return self.inner.__exit__(*reason)


def install_in_save(fault):
    """Around what checkpoint.write calls: open, the file's write, os.fsync and os.replace."""
    import resource

    import checkpoint
    original, saves, order = checkpoint.write, -1, []

    def reached(step):
        if fault['kind'] == 'order':
            order.append(step)
        if fault['kind'] == 'signal' and saves == fault['save'] and step == fault['step']:
            hit(fault)

    def opened(path, mode='r', **options):
        file, written = open(path, mode, **options), 0

        def write(data):
            nonlocal written
            share = memoryview(data).cast('B')
            until = fault.get('offset', 0) - written
            if 0 <= until < len(share) and saves == fault['save'] and fault.get('step') == 'writing':
                file.write(share[:until])
                file.flush()
                reached('writing')
            written += len(share)
            return file.write(data)
        return Around(file, write=write)

    def fsync(descriptor):
        reached('fsync folder' if os.path.isdir(f'/proc/self/fd/{descriptor}') else 'fsync file')
        os.fsync(descriptor)

    def replace(old, new):
        reached('replace previous' if str(new).endswith(checkpoint.PREVIOUS) else 'replace')
        os.replace(old, new)

    def write(*arguments, **options):
        nonlocal saves
        saves += 1
        full = fault['kind'] == 'full' and saves == fault['save']
        if full:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)       # the write then fails as on a full disk
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault['offset'], most))
        try:
            original(*arguments, **options)
        finally:
            if full:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        reached('done')
        if fault['kind'] == 'order':
            Path(fault['report']).write_text(json.dumps(order), encoding='utf-8')
    checkpoint.open, checkpoint.os = opened, Around(os, fsync=fsync, replace=replace)
    checkpoint.write = write


def run_script(script, arguments):
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    fault = json.loads(os.environ.get('FAULT') or '{}')
    if 'report' in fault:
        Path(f'{fault["report"]}.pid{os.environ.get(RANK, 0)}').write_text(str(os.getpid()), encoding='utf-8')
    if fault:
        install(fault)
    runpy.run_path(script, run_name='__main__')


# The server

def serve():
    import filelock, numpy, torch, tqdm                         # noqa: what every script takes long to import
    import torch._dynamo, torch.nn.parallel, torch.distributed  # noqa: the first optimizer imports these
    for line in sys.stdin:
        request = json.loads(line)
        store = hold_store(request['port']) if request['ranks'] > 1 else None
        pids = [fork(request, rank) for rank in range(request['ranks'])]
        print(json.dumps(pids), flush=True)
        codes = {}
        while len(codes) < len(pids):
            pid, status = os.wait()
            codes[pid] = os.waitstatus_to_exitcode(status)
            # as torchrun does: where one fails, the others are told to end
            if codes[pid] and request['ranks'] > 1:
                for other in set(pids) - codes.keys():
                    os.kill(other, signal.SIGTERM)
        if store:
            os.kill(store, signal.SIGKILL)
            os.waitpid(store, 0)
        print(json.dumps([codes[pid] for pid in pids]), flush=True)


def hold_store(port):
    """A process that holds the ranks' store, as torchrun does: it outlives each of them."""
    pid = os.fork()
    if not pid:
        from torch.distributed import TCPStore
        store = TCPStore('127.0.0.1', port, is_master=True, wait_for_workers=False)     # noqa: kept alive
        while True:
            signal.pause()
    return pid


def fork(request, rank):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for number, name in ((1, request['out']), (2, request['err'])):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdin = open(os.devnull)
        os.chdir(request['folder'])
        os.environ.update(request['environment'])
        if request['ranks'] > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(request['ranks']),
                              MASTER_ADDR='127.0.0.1', MASTER_PORT=str(request['port']),
                              TORCHELASTIC_USE_AGENT_STORE='True', TORCHELASTIC_RESTART_COUNT='0')
        run_script(request['script'], request['arguments'])
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                pass
        os._exit(code & 255)


# The client

@dataclass
class Ended:
    codes: list         # exit code of each rank; minus the number of the signal that killed it
    out: str
    err: str
    seconds: float
    hung: bool          # killed by us when it outlasted its limit

    @property
    def code(self):
        return self.codes[0]


class Launcher:
    """Runs scripts of `folder`, one after another, in forks of one server."""

    def __init__(self, folder):
        self.folder = Path(folder)
        environment = {name: value for name, value in os.environ.items()
                       if name not in ('PYTHONDONTWRITEBYTECODE', RANK, 'WORLD_SIZE', 'LOCAL_RANK')}
        environment.update(OMP_NUM_THREADS='1', PYTHONUTF8='1')
        self.server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       text=True, env=environment)

    def start(self, script, *arguments, ranks=1, fault=None, **environment):
        """Start it; the pids of its ranks. `wait` must follow."""
        self.streams = [self.folder / f'stdout-{self.server.pid}.txt', self.folder / f'stderr-{self.server.pid}.txt']
        for path in self.streams:
            path.unlink(missing_ok=True)
        request = dict(folder=str(self.folder), script=script, arguments=[str(a) for a in arguments], ranks=ranks,
                       out=str(self.streams[0]), err=str(self.streams[1]), port=free_port() if ranks > 1 else 0,
                       environment=dict(environment, FAULT=json.dumps(fault or {})))
        self.began = time.monotonic()
        print(json.dumps(request), file=self.server.stdin, flush=True)
        self.pids = json.loads(self.server.stdout.readline())
        return self.pids

    def wait(self, limit=60):
        hung = not select.select([self.server.stdout], [], [], limit)[0]
        for pid in self.pids if hung else ():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        codes = json.loads(self.server.stdout.readline())
        out, err = (path.read_text(encoding='utf-8', errors='replace') for path in self.streams)
        return Ended(codes, out, err, time.monotonic() - self.began, hung)

    def run(self, script, *arguments, limit=60, **options):
        self.start(script, *arguments, **options)
        return self.wait(limit)

    def close(self):
        self.server.stdin.close()
        self.server.stdout.close()
        self.server.wait()


def free_port():
    import socket
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


if __name__ == '__main__':
    run_script(sys.argv[1], sys.argv[2:]) if sys.argv[1:] else serve()
