"""Runs a script of the project as a real process, and injects a fault if one is asked for.

    python launcher.py SCRIPT ARGUMENTS...  the fault is JSON in the environment variable FAULT
    python launcher.py                      a server: imports PyTorch once, forks for each request

The project has no code for this: the functions below wrap what its files call. A fork starts in
milliseconds, where a new Python takes seconds to import PyTorch. It reads the project's files anew,
has a pid of its own, and can be killed like any other process.
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
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

# Packages whose settings in the environment are read when they are imported.
HUB_PACKAGES = ('transformers', 'huggingface_hub')
SAVE_STEPS = ('write', 'sync file', 'rename previous', 'rename', 'sync folder', 'done')


# Faults, in the process that they strike

def inject(fault):
    """Make this process suffer `fault`, a dict:

    kind: 'signal' (with number, and times it is sent), 'full disk', 'not finite' (what: 'loss',
    'gradient', or 'weights', with a SIGTERM right after), or 'no reader' (stdout becomes a pipe
    that nobody reads; with number, a signal follows).
    rank: the rank that has it, 0 by default. A process that torchrun has restarted has none.

    When it strikes: either save, the number of the checkpoint file, counted from 0, with step, one
    of SAVE_STEPS, and offset, bytes into that file. Or iteration, counted from the start of this
    process, with micro_steps, the micro-batches of a rank per iteration, and delay, seconds.
    report: a file for the time at which a signal struck. Each rank's pid goes into a file beside
    it.
    """
    rank = int(os.environ.get('RANK', 0))
    restarts = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))
    if fault.get('rank', 0) != rank or restarts:
        return

    if fault.get('what') == 'weights':
        inject_into_weights(fault)
    elif 'iteration' in fault:
        inject_into_training(fault)
    else:
        inject_into_saves(fault)


def send_signal(fault):
    if 'report' in fault:
        Path(fault['report']).write_text(str(time.time()), encoding='utf-8')
    for _ in range(fault.get('times', 1)):
        os.kill(os.getpid(), fault['number'])


def close_reader(fault):
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    if fault.get('number'):
        send_signal(fault)


def inject_into_weights(fault):
    """Ruin a weight after the optimizer's step of the iteration, and stop the run right away."""
    from torch.optim.optimizer import register_optimizer_step_post_hook
    calls = 0

    def ruin(optimizer, *_):
        nonlocal calls
        if calls == fault['iteration']:
            weight = optimizer.param_groups[0]['params'][0].data
            weight = getattr(weight, '_local_tensor', weight)   # this rank's shard, if it is one
            weight[0] = float('nan')
            os.kill(os.getpid(), signal.SIGTERM)
        calls += 1
    register_optimizer_step_post_hook(ruin)


def inject_into_training(fault):
    """Wrap GPT.forward, which training calls once per micro-batch."""
    from model import GPT

    forward = GPT.forward
    calls = 0

    def strike(loss):
        if fault['kind'] == 'signal':
            threading.Timer(fault.get('delay', 0), send_signal, [fault]).start()
        elif fault['kind'] == 'no reader':
            close_reader(fault)
        elif fault['what'] == 'loss':
            loss = loss * float('nan')
        else:
            loss.register_hook(lambda gradient: gradient * float('inf'))
        return loss

    def faulty_forward(self, *arguments, **options):
        nonlocal calls
        logits, loss = forward(self, *arguments, **options)
        if self.training:
            if calls == fault['iteration'] * fault['micro_steps']:
                loss = strike(loss)
            calls += 1
        return logits, loss

    GPT.forward = faulty_forward


class Proxy:
    """A module or an object with some of its attributes replaced."""

    def __init__(self, target, **attributes):
        self.__dict__.update(attributes, target=target)

    def __getattr__(self, name):
        return getattr(self.target, name)

    def __enter__(self):
        self.target.__enter__()
        return self

    def __exit__(self, *reason):
        return self.target.__exit__(*reason)


def inject_into_saves(fault):
    """Wrap each step of the atomic_write of one checkpoint.

    Other files that are written whole, such as the cache beside a dataset, do not count and are
    left alone.
    """
    from engine import atomic_files
    from engine.checkpoint import gathered

    atomic_write = gathered.atomic_write
    saves = 0

    def reached(step):
        if fault['kind'] == 'signal' and step == fault['step']:
            send_signal(fault)

    def faulty_open(path, mode, **options):
        file = open(path, mode, **options)
        written = 0

        def write(data):
            nonlocal written
            content = memoryview(data).cast('B')
            first = fault.get('offset', 0) - written
            if 0 <= first < len(content):
                file.write(content[:first])
                file.flush()
                reached('write')
                file.write(content[first:])
            else:
                file.write(content)
            written += len(content)
            return len(content)

        return Proxy(file, write=write)

    def faulty_fsync(descriptor):
        if os.path.isdir(f'/proc/self/fd/{descriptor}'):
            reached('sync folder')
        else:
            reached('sync file')
        os.fsync(descriptor)

    def faulty_replace(old, new):
        if Path(new).name == gathered.PREVIOUS:
            reached('rename previous')
        else:
            reached('rename')
        os.replace(old, new)

    @contextmanager
    def faulty_atomic_write(path, *arguments):
        nonlocal saves
        is_struck = saves == fault['save']
        saves += 1
        if not is_struck:
            with atomic_write(path, *arguments) as file:
                yield file
            return

        disk = nullcontext()
        if fault['kind'] == 'full disk':
            disk = full_disk(fault['offset'])
        atomic_files.open = faulty_open
        atomic_files.os = Proxy(os, fsync=faulty_fsync, replace=faulty_replace)
        try:
            with disk, atomic_write(path, *arguments) as file:
                yield file
        finally:
            del atomic_files.open
            atomic_files.os = os
        reached('done')

    gathered.atomic_write = faulty_atomic_write


@contextmanager
def full_disk(offset):
    """Writing beyond `offset` bytes of any file fails, as on a full disk."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)       # else the process would die of it
    _, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (offset, hard_limit))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard_limit, hard_limit))


def run_script(script, arguments):
    """Run a script in this process as its command line would, with the fault in FAULT."""
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    fault = json.loads(os.environ.get('FAULT') or '{}')
    if 'report' in fault:
        pid_file = Path(f'{fault["report"]}.pid{os.environ.get("RANK", 0)}')
        pid_file.write_text(str(os.getpid()), encoding='utf-8')
    if fault:
        inject(fault)

    runpy.run_path(script, run_name='__main__')


# The server

def serve():
    """Run each request, a line of JSON on stdin. Prints its pids, and at its end the exit codes."""
    import_what_all_need()
    for line in sys.stdin:
        request = json.loads(line)
        import_what_it_needs(request)
        store = None
        if request['ranks'] > 1:
            store = fork_store(request['port'])
        pids = [fork(request, rank) for rank in range(request['ranks'])]
        print(json.dumps(pids), flush=True)

        codes = wait_for_all(pids)
        if store:
            os.kill(store, signal.SIGKILL)
            os.waitpid(store, 0)
        print(json.dumps([codes[pid] for pid in pids]), flush=True)
    os._exit(0)                                 # the clean-up of a usual exit takes seconds


def import_what_all_need():
    """Import what every script imports, and a first optimizer step: all of it takes long."""
    import filelock  # noqa: F401
    import numpy  # noqa: F401
    import torch._dynamo
    import torch.distributed
    import torch.nn.parallel  # noqa: F401
    import tqdm  # noqa: F401


def import_what_it_needs(request):
    """Import further packages that take seconds, if the script will, for it and those after it."""
    words = ' '.join([request['script'], *request['arguments']])
    if request['ranks'] > 1:
        import torch.distributed.algorithms.ddp_comm_hooks.default_hooks  # noqa: F401
    if 'fsdp' in words or 'hsdp' in words or 'sharded' in words:
        import torch.distributed.checkpoint.hf_storage
        import torch.distributed.fsdp
        import torch.distributed.tensor  # noqa: F401
    if 'plot.py' in words:
        import matplotlib.pyplot  # noqa: F401
    if 'export.py' in words and '--to=nanogpt' not in words:
        import transformers.models.gpt2.modeling_gpt2  # noqa: F401


def wait_for_all(pids):
    """{pid: exit code} once all have ended. As with torchrun, one that fails ends the others."""
    codes = {}
    while len(codes) < len(pids):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid]:
            for other in set(pids) - codes.keys():
                os.kill(other, signal.SIGTERM)
    return codes


def fork_store(port):
    """Start a process with the ranks' store. Like torchrun's, it outlives each rank."""
    pid = os.fork()
    if not pid:
        from torch.distributed import TCPStore

        store = TCPStore('127.0.0.1', port, is_master=True, wait_for_workers=False)
        while store:                    # always: it is kept alive
            signal.pause()
    return pid


def fork(request, rank):
    """Start a process that runs the script of a request as this rank. Returns its pid."""
    pid = os.fork()
    if pid:
        return pid

    code = 1
    try:
        become(request, rank)
        run_script(request['script'], request['arguments'])
        code = 0
    except SystemExit as exit:
        code = exit.code
        if not isinstance(code, int):
            code = int(code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code & 255)


def become(request, rank):
    """Give this process the streams, the folder and the environment of a rank."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)                # the tests may run under nohup
    for number, name in ((1, request['stdout']), (2, request['stderr'])):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdin = open(os.devnull)
    os.chdir(request['folder'])

    os.environ.update(request['environment'])
    if any(name.startswith(('HF_', 'TRANSFORMERS_')) for name in request['environment']):
        forget_modules(HUB_PACKAGES)
    if request['ranks'] > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(request['ranks']),
            MASTER_ADDR='127.0.0.1',
            MASTER_PORT=str(request['port']),
            TORCHELASTIC_USE_AGENT_STORE='True',
            TORCHELASTIC_RESTART_COUNT='0',
        )


def forget_modules(packages):
    """Let the next import of some packages read their files, and the environment, anew."""
    for name in list(sys.modules):
        if name.partition('.')[0] in packages:
            del sys.modules[name]


# The client

@dataclass
class Result:
    """How a run of one or several ranks ended."""
    codes: list         # exit code of each rank; minus the number of the signal that killed it
    stdout: str
    stderr: str
    seconds: float
    timed_out: bool     # True where it was killed after its timeout

    @property
    def code(self):
        return self.codes[0]


class Launcher:
    """Runs scripts of `folder`, one after another, in forks of one server."""

    def __init__(self, folder):
        self.folder = Path(folder)
        # Unbuffered: a line that had been read ahead would not wake `select` in wait().
        self.server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE, bufsize=0, env=script_environment())

    def start(self, script, *arguments, ranks=1, fault=None, **environment):
        """Start a script. Returns the pid of each rank. `wait` must follow."""
        self.streams = [self.folder / f'{name}-{self.server.pid}.txt'
                        for name in ('stdout', 'stderr')]
        for path in self.streams:
            path.unlink(missing_ok=True)

        port = 0
        if ranks > 1:
            port = free_port()
        request = dict(
            folder=str(self.folder),
            script=script,
            arguments=[str(argument) for argument in arguments],
            ranks=ranks,
            stdout=str(self.streams[0]),
            stderr=str(self.streams[1]),
            port=port,
            environment=dict(environment, FAULT=json.dumps(fault or {})),
        )
        self.began = time.monotonic()
        self.server.stdin.write(json.dumps(request).encode() + b'\n')
        self.pids = json.loads(self.server.stdout.readline())
        return self.pids

    def wait(self, timeout=60):
        """The Result of what was started. It is killed after `timeout` seconds."""
        timed_out = not select.select([self.server.stdout], [], [], timeout)[0]
        if timed_out:
            for pid in self.pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

        codes = json.loads(self.server.stdout.readline())
        stdout, stderr = (path.read_text(encoding='utf-8', errors='replace')
                          for path in self.streams)
        return Result(codes, stdout, stderr, time.monotonic() - self.began, timed_out)

    def run(self, script, *arguments, timeout=60, **options):
        """Run a script to its end. Returns the Result."""
        self.start(script, *arguments, **options)
        return self.wait(timeout)

    def close(self):
        self.server.stdin.close()
        self.server.stdout.close()
        self.server.wait()


def script_environment(**changes):
    """The environment variables of a script: one thread, and nothing that torchrun has set."""
    removed = ('PYTHONDONTWRITEBYTECODE', 'RANK', 'WORLD_SIZE', 'LOCAL_RANK')
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    return {**environment, 'OMP_NUM_THREADS': '1', 'PYTHONUTF8': '1', **changes}


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


if __name__ == '__main__':
    if sys.argv[1:]:
        run_script(sys.argv[1], sys.argv[2:])
    else:
        serve()
