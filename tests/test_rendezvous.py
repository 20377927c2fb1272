import subprocess
import sys
import threading
from datetime import timedelta

import pytest
from harness import ROOT
from launcher import script_environment
from torch.distributed import HashStore, TCPStore

from engine.rendezvous import agree_on_name


def start_ranks(store, world_size, delays=()):
    """The name that each rank of one start gets, in order of rank. delays: seconds, by rank."""
    names = [None] * world_size

    def run(rank):
        names[rank] = agree_on_name(store, rank, world_size, timeout=10)
    threads = [threading.Timer(delays[rank] if delays else 0, run, [rank]) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


@pytest.mark.parametrize('delays', [(0, 0, 0), (0.3, 0, 0), (0, 0, 0.3)])
def test_every_start_over_a_kept_store_gets_one_new_name(delays):
    store = HashStore()
    store.set_timeout(timedelta(seconds=10))
    starts = [start_ranks(store, 3, delays) for _ in range(3)]
    assert all(len(set(names)) == 1 and names[0] for names in starts)
    assert len({names[0] for names in starts}) == 3


def test_a_rank_that_died_while_the_ranks_met_does_not_hold_up_the_next_start():
    store = HashStore()
    store.set_timeout(timedelta(seconds=10))
    store.set('rank 1', 'id of a dead rank')
    store.add('answers to a dead rank 0', 1)
    assert len(set(start_ranks(store, 2, (0, 0.2)))) == 1


@pytest.mark.parametrize('missing', [0, 1])
def test_a_rank_that_never_comes_is_an_error(missing):
    """Also where the store has an id of it from an earlier start."""
    store = HashStore()
    store.set_timeout(timedelta(seconds=0.3))
    store.set('rank 1', 'id of a dead rank')
    with pytest.raises(RuntimeError, match='(?i)some ranks were missing|timeout'):
        agree_on_name(store, 1 - missing, 2, timeout=0.3)


PROBE = '''
import os, sys, time
sys.path.insert(0, sys.argv[1])
import torch
from engine.distributed import start
time.sleep(float(sys.argv[2]))
print(start(device='cpu', timeout=20).all_gather(os.getpid()), flush=True)
os._exit(0)
'''


def test_ranks_meet_again_where_only_one_machine_counted_the_restart():
    """torchrun's kept store has the addresses of the ranks that died, and one rank may look for the other
    while only its old address is there."""
    store = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    for restart_counts, late in (((0, 0), 0), ((0, 1), 0), ((1, 1), 1)):
        ranks = [subprocess.Popen(
            [sys.executable, '-c', PROBE, str(ROOT), str(2 * (rank == late))], text=True, stdout=subprocess.PIPE,
            env=script_environment(RANK=str(rank), LOCAL_RANK='0', WORLD_SIZE='2', GROUP_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1',
                                   MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE='True',
                                   TORCHELASTIC_RESTART_COUNT=str(restart_counts[rank]))) for rank in (0, 1)]
        gathered = [rank.communicate(timeout=60)[0].strip() for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0]
        assert gathered == [str([rank.pid for rank in ranks])] * 2
