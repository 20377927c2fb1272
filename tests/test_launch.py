"""The torchrun commands of docs/scaling.md at toy size: two processes on this machine stand for two machines."""

import os
import re
import signal
import subprocess
import sys

import pytest
from harness import ROOT, read_records
from launcher import free_port, script_environment

if sys.platform != 'linux':
    pytest.skip('the commands are typed into a POSIX shell, and the rehearsal needs Linux', allow_module_level=True)

import rehearse_network
from chaos import differences

TEXT = (ROOT / 'docs' / 'scaling.md').read_text(encoding='utf-8')
BLOCKS = [block.splitlines() for block in re.findall(r'```sh\n(.*?)```', TEXT, re.DOTALL)]
LAUNCHES = [block for block in BLOCKS if ' train.py ' in block[0] and 'torchrun' in block[0]]
RUN = dict(init_from='scratch', max_iters=10, lr_decay_iters=10)


@pytest.mark.parametrize('block', LAUNCHES, ids=['one machine', 'two machines', 'elastic'])
def test_a_launch_trains_as_one_process_with_two_ranks_would(workspace, block):
    lines = block * 2 if '--nnodes=2' in block[0] and len(block) == 1 else block      # the same line on each machine
    ranks, port = 2 // len(lines), str(free_port())
    out_dir, flags = workspace.folder / f'out-launch-{LAUNCHES.index(block)}', workspace.flags
    environment = script_environment(PYTHONPATH='')
    started = []
    for line in lines:
        line = line.replace('torchrun', f'{sys.executable} -m torch.distributed.run').replace('10.0.0.1', '127.0.0.1')
        line = re.sub(r'29[45]00', port, line).replace('--nproc_per_node=8', f'--nproc_per_node={ranks}')
        command = ' '.join([line, '--wandb_log=False', *flags(out_dir, **RUN)])
        started.append(subprocess.Popen(command, shell=True, cwd=workspace.folder, env=environment, text=True, start_new_session=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    try:
        outputs = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert [process.returncode for process in started] == [0] * len(lines), outputs
    reference = workspace.folder / 'out-launch-reference'
    if not reference.exists():
        workspace.run('train.py', 'config/train_gpt2.py', '--wandb_log=False', *flags(reference, **RUN), ranks=2)
    assert not differences(out_dir, reference) and read_records(out_dir)[-1]['iter'] == 10


def test_the_page_has_each_kind_of_launch():
    assert [len(block) for block in LAUNCHES] == [1, 2, 1]
    assert all(script in TEXT for script in ('config/slurm.sh', 'tests/rehearse_network.py'))


@pytest.mark.skipif(not rehearse_network.namespaces_are_allowed(), reason='this user may not make network namespaces')
def test_a_cut_cable_ends_both_machines_in_time_and_the_restart_continues_exactly():
    result = subprocess.run([sys.executable, rehearse_network.__file__, '--case=cut'], text=True, capture_output=True, timeout=300,
                            env=script_environment())
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.match(r'cut +ok .* both ended [\d.]+ s after the cut', result.stdout)
