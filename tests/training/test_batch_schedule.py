from itertools import chain, islice
from types import SimpleNamespace

import pytest
import torch

from engine.dataloader.batches import train_batches
from engine.errors import UserError
from engine.training.run import BatchSchedule, share_of_batch


@pytest.mark.parametrize('n_sequences, batch_size, ranks, expected', [
    (480, 12, 1, (40, 12)),
    (480, 12, 8, (5, 12)),
    (64, 64, 2, (1, 32)),
    (60, 12, 2, (3, 10)),
    (64, 64, 64, (1, 1)),
    (40, 8, 2, (4, 5)),
])
def test_each_rank_takes_an_equal_share(n_sequences, batch_size, ranks, expected):
    micro_steps, size = share_of_batch(n_sequences, batch_size, ranks)
    assert (micro_steps, size) == expected
    assert micro_steps * size * ranks == n_sequences
    assert size <= batch_size


@pytest.mark.parametrize('accumulation, batch, ranks', [(1, 12, 5), (3, 1, 2), (7, 3, 4)])
def test_what_does_not_divide_is_refused_with_settings_that_do(accumulation, batch, ranks):
    with pytest.raises(UserError, match=f'over {ranks} ranks') as error:
        BatchSchedule(accumulation, batch, 32, ranks)
    assert '--gradient_accumulation_steps=' in str(error.value)
    BatchSchedule(int(str(error.value).split('=')[-1]), batch, 32, ranks)


def test_a_ramp_grows_linearly_and_takes_the_same_sequences_on_any_number_of_ranks():
    plans = []
    for ranks in (1, 2, 4):
        schedule = BatchSchedule(16, 8, 64, ranks, ramp_start=4 * 64, ramp_tokens=20_000)
        tokens = 0
        sequences = 0
        sizes = []
        for number, iteration in zip(range(60), schedule.iterations(0, 0)):
            first, micro_steps, micro_batch_size = iteration
            assert first == sequences
            assert schedule.tokens_after(number) == tokens
            assert micro_batch_size <= 8
            n_sequences = micro_steps * micro_batch_size * ranks

            # The published rule is linear from the first batch to the full one. Here it goes in
            # steps of the first batch.
            linear = 4 + (128 - 4) * min(1, tokens / 20_000)
            assert n_sequences % 4 == 0
            assert linear - 4 < n_sequences <= linear
            sequences += n_sequences
            tokens += n_sequences * 64
            sizes.append(n_sequences)

        assert sizes[0] == 4
        assert sizes[-1] == 128
        assert sizes == sorted(sizes)
        plans.append(sizes)
    assert plans[0] == plans[1] == plans[2]


def first_iterations(schedule, count, sequences=0, tokens=0):
    return list(islice(schedule.iterations(sequences, tokens), count))


@pytest.mark.parametrize('done', [0, 1, 6, 11, 12, 13, 30])
def test_a_ramp_goes_on_where_it_was(done):
    """On the ramp, over its end, and after it."""
    schedule = BatchSchedule(16, 8, 64, 2, ramp_start=4 * 64, ramp_tokens=20_000)
    plan = first_iterations(schedule, 40)
    assert schedule.tokens_after(11) < 20_000 <= schedule.tokens_after(12)

    sequences = plan[done][0]
    rest = first_iterations(schedule, 40 - done, sequences, schedule.tokens_after(done))
    assert rest == plan[done:]


@pytest.mark.parametrize('ranks, on_the_ramp, after_it', [
    (1, (2, 8), (32, 8)),
    (8, (1, 2), (4, 8)),
    (16, (1, 1), (2, 8)),
])
def test_micro_batches_are_full_after_a_ramp(ranks, on_the_ramp, after_it):
    ramp_tokens = 4 * 10 ** 9
    schedule = BatchSchedule(32, 8, 2048, ranks, ramp_start=16 * 2048, ramp_tokens=ramp_tokens)
    without_ramp = BatchSchedule(32, 8, 2048, ranks)
    assert schedule.rank_share(0) == on_the_ramp
    assert schedule.rank_share(ramp_tokens - 1)[1] == on_the_ramp[1]
    assert schedule.rank_share(ramp_tokens) == after_it == without_ramp.rank_share(0)


def test_the_ranks_together_take_each_sequence_once_on_a_ramp_and_after_it():
    """By the requests of train_batches, which are the numbers of sequences."""
    def numbers(seed, stream, first, count):
        return torch.arange(first, first + count), torch.zeros(count)
    data = SimpleNamespace(batch=numbers, has_masks=False, count_targets=lambda *request: 1)

    def taken_by(rank, ranks, iterations):
        """The sequences of each iteration that a rank takes."""
        env = SimpleNamespace(rank=rank, world_size=ranks, device=torch.device('cpu'))
        batches = train_batches(data, 1, iterations, env)
        taken = [torch.cat([next(batches)[0] for _ in range(micro_steps)]).tolist()
                 for _, micro_steps, _ in iterations]
        assert next(batches, None) is None
        return taken

    plans = []
    for ranks in (1, 2, 4):
        schedule = BatchSchedule(16, 8, 64, ranks, ramp_start=4 * 64, ramp_tokens=20_000)
        iterations = first_iterations(schedule, 35)
        taken = [taken_by(rank, ranks, iterations) for rank in range(ranks)]
        plans.append([sorted(chain(*parts)) for parts in zip(*taken)])

    assert plans[0] == plans[1] == plans[2]
    sizes = [len(sequences) for sequences in plans[0]]
    assert list(chain(*plans[0])) == list(range(sum(sizes)))
    assert sizes[0] == 4
    assert sizes[-1] == 128


def test_a_ramp_that_the_ranks_cannot_share_is_refused_with_one_that_they_can():
    with pytest.raises(UserError, match='over 8 ranks') as error:
        BatchSchedule(40, 12, 1024, 8, ramp_start=60 * 1024, ramp_tokens=10 ** 7)
    fitting = int(str(error.value).split('=')[-1])
    BatchSchedule(40, 12, 1024, 8, ramp_start=fitting, ramp_tokens=10 ** 7)


@pytest.mark.parametrize('start', [100, 64 * 200, 64 * 5])
def test_a_ramp_that_does_not_fit_the_batch_is_refused_with_one_that_does(start):
    with pytest.raises(UserError, match='batch_ramp_start') as error:
        BatchSchedule(4, 8, 64, 1, ramp_start=start, ramp_tokens=1000)
    fitting = int(str(error.value).split('=')[-1])
    BatchSchedule(4, 8, 64, 1, ramp_start=fitting, ramp_tokens=1000)
