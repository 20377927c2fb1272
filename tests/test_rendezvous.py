import threading
from datetime import timedelta

import pytest
import torch
from torch.distributed import HashStore

from engine import distributed
from engine.distributed import agree_on_name


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


def test_the_ranks_see_no_address_of_an_earlier_start(monkeypatch):
    """torchrun's kept store still has the addresses of ranks that died."""
    store, stores = HashStore(), []
    monkeypatch.setattr(distributed.dist.distributed_c10d, 'rendezvous', lambda url, timeout: iter([(store, 0, 1)]))
    monkeypatch.setattr(distributed.dist, 'init_process_group', lambda backend, store, **options: stores.append(store))
    for _ in range(2):
        assert distributed.init_process_group('gloo', torch.device('cpu'), timeout=5) == 'gloo'
        assert not stores[-1].check(['address of rank 0'])
        stores[-1].set('address of rank 0', '10.0.0.1:1234')
