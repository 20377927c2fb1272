"""Rehearse training on two machines: two network namespaces of Linux, joined by a virtual cable.

The cable can be cut.

    python tests/rehearse_network.py                    # all cases, about four minutes
    python tests/rehearse_network.py --case=cut

Each host runs torchrun with one rank, over gloo. Both see the same out_dir. Each case compares
every tensor of state.pt and ckpt.pt and every logged number with a run that was left alone. The
exit code is 1 if any case failed. It needs Linux, `ip` and `unshare`, and the right to make
namespaces: root has it, and on many systems every user has it.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import console

from chaos import Failure, differences, expect
from harness import Workspace, read_records
from launcher import script_environment

import configurator
from engine.checkpoint import gathered, run_folder
from engine.errors import UserError

case = 'all'            # one of the functions under "Cases", or all

RANK_TIMEOUT = 5        # seconds
ADDRESSES = {'a': '10.77.0.1', 'b': '10.77.0.2'}
# Long enough that a fault finds it running, and saved a few times.
RUN = dict(max_iters=160, lr_decay_iters=160, eval_interval=40, rank_timeout=RANK_TIMEOUT,
           init_from='auto')
# torchrun keeps one store over its restarts, and PyTorch 2.13 does not tell its address to a
# machine that joins later. With this variable there is a new store at every start.
NEW_STORE = dict(TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1')
# A frozen process gets this many seconds between SIGTERM and SIGKILL.
AGENT = ['--shutdown-timeout=3']

UNSHARE = ['unshare', '--net', '--mount']
if not (os.name == 'posix' and os.geteuid() == 0):
    UNSHARE += ['--user', '--map-root-user']
# The names of namespaces live in /run/netns. A private /run lets them vanish with this program.
PREPARE = 'mount -t tmpfs tmpfs /run && mkdir /run/netns && ip link set lo up'
MAKE_CABLE = 'ip netns add host && ip link add name one type veth peer name two'


def namespaces_are_allowed():
    """True where this user can make network namespaces and a cable between them."""
    if sys.platform != 'linux':
        return False
    if not all(map(shutil.which, ('ip', 'unshare', 'nsenter', 'mount'))):
        return False
    command = [*UNSHARE, 'sh', '-c', f'{PREPARE} && {MAKE_CABLE}']
    return subprocess.run(command, capture_output=True).returncode == 0


def ip(*words):
    subprocess.run(['ip', *words], check=True)


class Network:
    """Two hosts, a and b, and the cable between them."""

    def __init__(self):
        for host in ADDRESSES:
            ip('netns', 'add', host)
        ip('link', 'add', 'name', 'cable', 'netns', 'a', 'type', 'veth',
           'peer', 'name', 'cable', 'netns', 'b')
        for host, address in ADDRESSES.items():
            ip('-netns', host, 'address', 'add', f'{address}/24', 'dev', 'cable')
            ip('-netns', host, 'link', 'set', 'lo', 'up')
        self.plug_in()

    def cut(self):
        ip('-netns', 'a', 'link', 'set', 'cable', 'down')

    def plug_in(self):
        for host in ADDRESSES:
            ip('-netns', host, 'link', 'set', 'cable', 'up')


class Host:
    """One torchrun on one host."""

    def __init__(self, workspace, name, arguments, script, **environment):
        self.errors = workspace.folder / f'{time.monotonic_ns()}.err'
        # Not by `ip netns exec`, which mounts /sys anew: a user without root may not.
        command = ['nsenter', f'--net=/run/netns/{name}', sys.executable, '-m',
                   'torch.distributed.run', '--nproc_per_node=1', *arguments, *AGENT, *script]
        environment = script_environment(GLOO_SOCKET_IFNAME='cable', **environment)
        with open(self.errors, 'w', encoding='utf-8') as file:
            self.agent = subprocess.Popen(
                command, cwd=workspace.folder, stdout=subprocess.DEVNULL, stderr=file,
                env=environment, start_new_session=True)

    def last_errors(self):
        """The end of what torchrun and train.py wrote on stderr."""
        return self.errors.read_text()[-1500:]

    def rank(self):
        """The pid of this host's rank, once torchrun has started it."""
        while self.agent.poll() is None:
            for pid in self.children():
                with suppress(OSError):
                    if b'train.py' in Path(f'/proc/{pid}/cmdline').read_bytes():
                        return pid
            time.sleep(0.05)
        raise Failure(f'torchrun ended: {self.last_errors()}')

    def restart_count(self):
        """torchrun's count of restarts, as this host's rank sees it."""
        for variable in Path(f'/proc/{self.rank()}/environ').read_bytes().split(b'\0'):
            name, _, value = variable.partition(b'=')
            if name == b'TORCHELASTIC_RESTART_COUNT':
                return int(value)
        raise Failure('torchrun counts no restarts')

    def children(self):
        """The pids of torchrun's processes."""
        path = Path(f'/proc/{self.agent.pid}/task/{self.agent.pid}/children')
        with suppress(OSError):
            return [int(pid) for pid in path.read_text().split()]
        return []

    def wait(self, timeout=90):
        """torchrun's exit code, or None where it ran on after `timeout` seconds and was killed."""
        try:
            return self.agent.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self):
        for pid in [*self.children(), self.agent.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.agent.wait()

    def lines(self):
        """What train.py, and not torchrun, wrote on stderr."""
        lines = self.errors.read_text(encoding='utf-8').splitlines()
        return [line for line in lines if line.startswith('train.py:')]


class Rehearsal(Workspace):
    """A project with a toy dataset, and a finished run on one machine to compare with."""

    def __init__(self, folder, network):
        super().__init__(folder)
        self.network = network
        self.hosts = []
        self.reference = self.folder / 'reference'
        self.run('train.py', *self.flags(self.reference, **RUN), ranks=2)

    def start(self, out_dir, **options):
        """Start one torchrun on each host. Returns the hosts."""
        self.hosts = [self.start_host(name, out_dir, **options) for name in ADDRESSES]
        return self.hosts

    def start_host(self, name, out_dir, elastic=False, **environment):
        """Start torchrun on a host. If elastic, it starts lost ranks again, without fixed ranks."""
        address = ADDRESSES['a']
        if elastic:
            arguments = [
                '--nnodes=2',
                '--rdzv_backend=c10d',
                f'--rdzv_endpoint={address}:29400',
                '--rdzv_id=rehearsal',
                '--max-restarts=3',
                f'--local_addr={ADDRESSES[name]}',
                f'--rdzv_conf=is_host={name == "a"}',
            ]
        else:
            arguments = [
                '--nnodes=2',
                f'--node_rank={list(ADDRESSES).index(name)}',
                f'--master_addr={address}',
                '--master_port=29500',
            ]
        script = ['train.py', *self.flags(out_dir, **RUN)]
        return Host(self, name, arguments, script, **environment)

    def last_errors(self):
        return [host.last_errors() for host in self.hosts]

    def new_out_dir(self):
        out_dir = Path(tempfile.mkdtemp(prefix='out-', dir=self.folder))
        out_dir.rmdir()
        return out_dir

    def wait_for_iteration(self, out_dir, iteration):
        """Wait until the run has logged this iteration."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with suppress(OSError, ValueError, IndexError):
                if read_records(out_dir)[-1]['iter'] >= iteration:
                    return
            time.sleep(0.02)
        raise Failure(f'iteration {iteration} never came: {self.last_errors()}')

    def expect_end(self, code=0):
        for host in self.hosts:
            found = host.wait()
            words = f'torchrun ended with {found}, not {code}: {self.last_errors()}'
            expect(found == code, words)

    def expect_same(self, out_dir):
        found = differences(out_dir, self.reference)
        expect(not found, f'not as on one machine: {"; ".join(found[:4])}')

    def close(self):
        for host in self.hosts:
            host.kill()
        super().close()


# Cases. Each takes a Rehearsal, and returns what it saw.

def plain(lab):
    """Two machines end with the weights of one machine with two ranks."""
    out_dir = lab.new_out_dir()
    lab.start(out_dir)
    lab.expect_end()
    lab.expect_same(out_dir)
    return 'the same weights as two ranks on one machine'


def glitch(lab):
    """A cable that comes back before rank_timeout delays the run, and changes nothing."""
    out_dir = lab.new_out_dir()
    lab.start(out_dir)
    lab.wait_for_iteration(out_dir, 60)
    lab.network.cut()
    time.sleep(RANK_TIMEOUT / 3)
    lab.network.plug_in()
    lab.expect_end()
    lab.expect_same(out_dir)
    return f'{RANK_TIMEOUT / 3:.1f} s without a cable'


def cut(lab):
    """A cut cable ends both sides in time with one line each. The restart continues exactly."""
    out_dir = lab.new_out_dir()
    hosts = lab.start(out_dir)
    lab.wait_for_iteration(out_dir, 60)
    lab.network.cut()

    # how it ends
    began = time.monotonic()
    while any(host.agent.poll() is None for host in hosts) and time.monotonic() < began + 60:
        time.sleep(0.05)
    seconds = time.monotonic() - began
    lab.expect_end(code=1)
    words = 'another rank did not answer within --rank_timeout'
    for host in hosts:
        lines = host.lines()
        is_fine = len(lines) == 1 and words in lines[0]
        expect(is_fine, f'one line: {lines}')

    # and goes on
    state, _ = run_folder.load_state(out_dir)
    iterations = [state.iter_num, gathered.read_ckpt(out_dir).iter_num]
    lab.network.plug_in()
    lab.start(out_dir)
    lab.expect_end()
    lab.expect_same(out_dir)
    return (f'both ended {seconds:.1f} s after the cut (rank_timeout {RANK_TIMEOUT} s), '
            f'saved at {iterations}')


def lost(lab):
    """Elastic: a killed rank makes both machines start again, by themselves."""
    out_dir = lab.new_out_dir()
    hosts = lab.start(out_dir, elastic=True)
    lab.wait_for_iteration(out_dir, 60)
    os.kill(hosts[1].rank(), signal.SIGKILL)
    lab.expect_end()
    lab.expect_same(out_dir)
    return 'restarted'


def counts(lab):
    """Elastic: only one machine counts a restart. The ranks meet all the same."""
    out_dir = lab.new_out_dir()
    hosts = lab.start(out_dir, elastic=True)
    lab.wait_for_iteration(out_dir, 60)
    frozen = hosts[0].rank()
    os.kill(frozen, signal.SIGSTOP)             # it cannot notice that the other one is lost
    os.kill(hosts[1].rank(), signal.SIGKILL)
    while hosts[0].rank() == frozen:
        time.sleep(0.1)
    found = [host.restart_count() for host in hosts]
    expect(found == [0, 1], f'restart counts {found}')
    lab.expect_end()
    lab.expect_same(out_dir)
    return f'restart counts {found}'


def machine(lab):
    """Elastic: a machine is lost with its torchrun. Another torchrun takes its place."""
    out_dir = lab.new_out_dir()
    hosts = lab.start(out_dir, elastic=True, **NEW_STORE)
    lab.wait_for_iteration(out_dir, 60)
    hosts[1].kill()
    hosts[1] = lab.start_host('b', out_dir, elastic=True, **NEW_STORE)
    lab.expect_end()
    lab.expect_same(out_dir)
    return 'joined again'


def reconnect(lab):
    """Elastic: after a cut cable both machines wait for each other, and go on with a cable."""
    out_dir = lab.new_out_dir()
    lab.start(out_dir, elastic=True)
    lab.wait_for_iteration(out_dir, 60)
    lab.network.cut()
    time.sleep(RANK_TIMEOUT + 5)
    lab.network.plug_in()
    lab.expect_end()
    lab.expect_same(out_dir)
    return f'{RANK_TIMEOUT + 5} s without a cable'


CASES = dict(plain=plain, glitch=glitch, cut=cut, lost=lost, counts=counts, machine=machine,
             reconnect=reconnect)


def rehearse(names):
    """Run the cases inside new namespaces. Returns the number that failed."""
    failures = 0
    with tempfile.TemporaryDirectory(prefix='rehearsal-') as folder:
        network = Network()
        lab = Rehearsal(Path(folder), network)
        try:
            for name in names:
                began = time.monotonic()
                try:
                    seen = CASES[name](lab)
                    verdict = 'ok'
                except Failure as failure:
                    seen = str(failure)
                    verdict = 'FAILED'
                    failures += 1
                    for host in lab.hosts:
                        host.kill()
                    network.plug_in()
                seconds = time.monotonic() - began
                print(f'{name:<10} {verdict:<6} {seconds:5.1f} s  {seen}', flush=True)
        finally:
            lab.close()
    return failures


def main():
    if case not in (*CASES, 'all'):
        raise UserError(f'case={case!r} is unknown; try {", ".join(CASES)} or all')

    # inside the namespaces, which the second half makes
    if os.environ.get('REHEARSAL') == 'inside':
        names = [case]
        if case == 'all':
            names = list(CASES)
        raise SystemExit(int(rehearse(names) > 0))

    # outside: start this program again, inside
    if not namespaces_are_allowed():
        raise UserError('this system does not let you make network namespaces; the rehearsal needs '
                        'Linux and `ip`; try it as root')
    command = [*UNSHARE, 'sh', '-c', f'{PREPARE} && exec "$@"', 'sh', sys.executable, *sys.argv]
    inside = subprocess.run(command, env={**os.environ, 'REHEARSAL': 'inside'})
    raise SystemExit(inside.returncode)


if __name__ == '__main__':
    with console.report_errors():
        configurator.configure(globals(), sys.argv[1:])
        main()
