"""The torchrun commands of docs/scaling.md at toy size.

Two processes on this machine stand for two machines.
"""

import os
import re
import signal
import subprocess
import sys

import pytest
from harness import ROOT, read_records
from launcher import free_port, script_environment

if sys.platform != 'linux':
    pytest.skip('the commands are typed into a POSIX shell, and the rehearsal needs Linux',
                allow_module_level=True)

import rehearse_network
from chaos import differences

TEXT = (ROOT / 'docs' / 'scaling.md').read_text(encoding='utf-8')
BLOCKS = [block.splitlines() for block in re.findall(r'```sh\n(.*?)```', TEXT, re.DOTALL)]
LAUNCHES = [block for block in BLOCKS if ' train.py ' in block[0] and 'torchrun' in block[0]]
RUN = dict(init_from='scratch', max_iters=10, lr_decay_iters=10)


def on_this_machine(line, ranks, port):
    """A torchrun command with other addresses, `ranks` processes, and this Python."""
    line = line.replace('torchrun', f'{sys.executable} -m torch.distributed.run')
    line = line.replace('10.0.0.1', '127.0.0.1')
    line = re.sub(r'29[45]00', port, line)
    return line.replace('--nproc_per_node=8', f'--nproc_per_node={ranks}')


def run_together(commands, folder):
    """Run shell commands at the same time. Returns (their exit codes, their outputs)."""
    environment = script_environment(PYTHONPATH='')
    started = []
    for command in commands:
        started.append(subprocess.Popen(
            command, shell=True, cwd=folder, env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    try:
        outputs = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return [process.returncode for process in started], outputs


@pytest.mark.parametrize('block', LAUNCHES, ids=['one machine', 'two machines', 'elastic'])
def test_a_launch_trains_as_one_process_with_two_ranks_would(workspace, block):
    lines = block
    if '--nnodes=2' in block[0] and len(block) == 1:
        lines = block * 2                       # the same line on each machine

    # the launch
    port = str(free_port())
    out_dir = workspace.folder / f'out-launch-{LAUNCHES.index(block)}'
    flags = ' '.join(['--wandb_log=False', *workspace.flags(out_dir, **RUN)])
    commands = [f'{on_this_machine(line, 2 // len(lines), port)} {flags}' for line in lines]
    codes, outputs = run_together(commands, workspace.folder)
    assert codes == [0] * len(lines), outputs

    # against two ranks in one process each
    reference = workspace.folder / 'out-launch-reference'
    if not reference.exists():
        workspace.run('train.py', 'config/train_gpt2.py', '--wandb_log=False',
                      *workspace.flags(reference, **RUN), ranks=2)
    assert not differences(out_dir, reference)
    assert read_records(out_dir)[-1]['iter'] == 10


def test_the_page_has_each_kind_of_launch():
    assert [len(block) for block in LAUNCHES] == [1, 2, 1]
    for script in ('config/slurm.sh', 'tests/rehearse_network.py'):
        assert script in TEXT


@pytest.mark.slow
@pytest.mark.skipif(not rehearse_network.namespaces_are_allowed(),
                    reason='this user may not make network namespaces')
def test_a_cut_cable_ends_both_machines_in_time_and_the_restart_continues_exactly():
    command = [sys.executable, rehearse_network.__file__, '--case=cut']
    result = subprocess.run(command, text=True, capture_output=True, timeout=300,
                            env=script_environment())
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.match(r'cut +ok .* both ended [\d.]+ s after the cut', result.stdout)
