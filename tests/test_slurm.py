"""config/slurm.sh, with programs that stand in for SLURM's."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from harness import read_records
from launcher import free_port, script_environment

if sys.platform != 'linux' or not shutil.which('bash'):
    pytest.skip('SLURM runs on Linux, and its script in bash', allow_module_level=True)

from chaos import differences

RUN = dict(max_iters=100, lr_decay_iters=100, eval_interval=25, init_from='auto')

SRUN = '''#!/bin/bash
# Like SLURM's, it passes signals on to what it runs.
shift
"$@" &
trap "kill -USR1 $!" USR1
wait $! || wait $!
'''
SCONTROL = '''#!/bin/bash
echo "$@" >> scontrol.txt
[ $1 = show ] && echo 127.0.0.1
exit 0
'''
TORCHRUN = f'''#!/bin/bash
exec {sys.executable} -m torch.distributed.run --rdzv_conf=is_host=true "$@"
'''
STAND_INS = {'srun': SRUN, 'scontrol': SCONTROL, 'torchrun': TORCHRUN}


@pytest.fixture
def slurm(workspace):
    """A function that starts config/slurm.sh in the workspace."""
    programs = workspace.folder / 'slurm'
    programs.mkdir(exist_ok=True)
    for name, text in STAND_INS.items():
        (programs / name).write_text(text, encoding='utf-8')
        (programs / name).chmod(0o755)

    script = workspace.folder / 'config' / 'slurm.sh'
    text = script.read_text(encoding='utf-8').replace('29500', str(free_port()))
    script.write_text(text, encoding='utf-8')

    jobs = []

    def start(out_dir, **environment):
        variables = dict(
            SLURM_SUBMIT_DIR=str(workspace.folder), SLURM_JOB_NODELIST='node[1]',
            SLURM_NNODES='1', SLURM_JOB_ID='77', SLURM_GPUS_ON_NODE='2',
            PATH=f'{programs}{os.pathsep}{os.environ["PATH"]}', **environment)
        job = subprocess.Popen(
            ['bash', str(script), *workspace.flags(out_dir, **RUN)],
            env=script_environment(**variables), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True)
        jobs.append(job)
        return job

    yield start
    for job in jobs:
        if job.poll() is None:                          # the test failed
            os.killpg(job.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_job_saves_before_its_time_limit_queues_again_and_goes_on(workspace, slurm):
    out_dir = workspace.folder / 'out-slurm'
    requests = workspace.folder / 'scontrol.txt'
    job = slurm(out_dir)
    while job.poll() is None:                           # until it is well under way
        with suppress(OSError, IndexError):
            if read_records(out_dir)[-1]['iter'] >= 30:
                break
        time.sleep(0.05)

    # near its time limit
    job.send_signal(signal.SIGUSR1)
    output = job.communicate(timeout=60)[0]
    assert job.returncode, output
    assert 'SIGUSR1: saved at iteration' in output, output
    lines = requests.read_text(encoding='utf-8').splitlines()
    assert lines == ['show hostnames node[1]', 'requeue 77']
    stopped_at = read_records(out_dir)[-1]['iter']
    assert 30 <= stopped_at < RUN['max_iters']

    # queued again
    job = slurm(out_dir, SLURM_RESTART_COUNT='1')
    output = job.communicate(timeout=120)[0]
    assert job.returncode == 0, output
    assert requests.read_text(encoding='utf-8').count('requeue') == 1

    reference = workspace.folder / 'out-slurm-straight'
    workspace.run('train.py', *workspace.flags(reference, **RUN), ranks=2)
    assert not differences(out_dir, reference)
