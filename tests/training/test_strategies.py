"""Whole runs of train.py over several ranks: each strategy and checkpoint against one process."""

import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from harness import Workspace, torchrun_options, write_masked_dataset
from launcher import script_environment
from torch.distributed.checkpoint import state_dict_saver

from engine.checkpoint import run_folder
from engine.checkpoint import sharded as sharded_checkpoint

# 12 micro-batches of one sequence divide over 1, 2, 3 and 4 ranks, and dropout is the same in each.
SHARED = ('--gradient_accumulation_steps=12', '--batch_size=1', '--lr_decay_iters=30',
          '--eval_interval=10', '--eval_iters=3')
STRAIGHT = ('--max_iters=15', '--eval_interval=5')
# Two machines with two ranks each.
HSDP = dict(strategy='hsdp', ranks=4, LOCAL_WORLD_SIZE='2')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    workspace = Workspace(tmp_path_factory.mktemp('strategies'))
    if not workspace.launcher:
        pytest.skip('starting several ranks in forks takes Linux')
    workspace.train('straight', *SHARED, *STRAIGHT)
    write_masked_dataset(workspace.folder / 'data' / 'masked')
    yield workspace
    workspace.close()


def train(place, out_dir, *flags, strategy='ddp', ranks=2, **environment):
    return place.train(out_dir, *SHARED, f'--strategy={strategy}', *flags, ranks=ranks,
                       **environment)


def curve(place, out_dir):
    """All losses of a run, of training and of evaluations, as they were logged."""
    return [record[name] for record in place.records(out_dir) for name in ('loss', 'val_loss')
            if name in record]


def tensors(place, out_dir):
    """Weights and moments of state.pt, by name."""
    state = torch.load(place.folder / out_dir / 'state.pt', weights_only=True)
    found = dict(state['model'])
    for index, moment in state['optimizer']['state'].items():
        for name, value in moment.items():
            found[f'{index} {name}'] = value
    return found


def assert_same(found, expected, tolerance=0.0):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=tolerance, msg=name)


def assert_refused(result, words):
    """Rank 0 exits 2 with one line that has these words."""
    assert result.codes[0] == 2
    assert words in result.stderr
    assert result.stderr.count('\n') == 1


def files_in(folder):
    """{path: content} of a folder."""
    return {path: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize('options', [
    dict(),
    dict(strategy='fsdp'),
    dict(strategy='fsdp', ranks=4),
    HSDP,
])
def test_every_strategy_gives_the_losses_of_one_process(place, options):
    """With dropout, accumulation, and three evaluation batches that ranks cannot share."""
    train(place, 'out', *STRAIGHT, '--overwrite=True', **options)
    assert len(curve(place, 'straight')) == 15 + 4
    assert curve(place, 'out') == pytest.approx(curve(place, 'straight'), rel=1e-5)


def test_a_run_may_change_strategy_and_ranks_at_every_resume(place):
    stages = [
        dict(ranks=1),
        dict(),
        dict(strategy='fsdp'),
        HSDP,
        dict(strategy='fsdp', ranks=1),
    ]
    for i, options in enumerate(stages, 1):
        train(place, 'chain', '--init_from=auto', f'--max_iters={3 * i}', **options)
    assert_same(tensors(place, 'chain'), tensors(place, 'straight'), 1e-4)


def test_frozen_layers_stay_frozen_on_several_ranks(place):
    for strategy, ranks in (('ddp', 1), ('ddp', 2), ('fsdp', 2)):
        train(place, f'frozen-{strategy}-{ranks}', '--freeze=wte,h.0', '--max_iters=3',
              strategy=strategy, ranks=ranks)
    alone = tensors(place, 'frozen-ddp-1')
    assert_same(tensors(place, 'frozen-ddp-2'), alone, 1e-5)
    assert_same(tensors(place, 'frozen-fsdp-2'), alone, 1e-5)


@pytest.mark.parametrize('flag, strategy, ranks', [
    ('--checkpoint=gathered', 'ddp', 3),        # three ranks sum in an order that may change
    pytest.param('--checkpoint=gathered', 'fsdp', 3, marks=pytest.mark.slow),
    ('--checkpoint=sharded', 'fsdp', 2),
    pytest.param('--recompute=True', 'fsdp', 2, marks=pytest.mark.slow),
    ('--dtype=bfloat16', 'fsdp', 2),
    pytest.param('--reduce_dtype=bfloat16', 'fsdp', 2, marks=pytest.mark.slow),
])
def test_a_run_of_several_ranks_resumes_bit_for_bit(place, flag, strategy, ranks):
    # a resume restores the flags, but for the precision
    flags = [flag, f'--strategy={strategy}']
    place.train('whole', *SHARED, *flags, '--max_iters=14', '--overwrite=True', ranks=ranks)
    place.train('parts', *SHARED, *flags, '--max_iters=8', '--overwrite=True', ranks=ranks)

    resume = ['train.py', '--init_from=resume', '--device=cpu', '--compile=False']
    if flag.startswith('--dtype='):
        resume.append(flag)
    place.run(*resume, '--out_dir=parts', '--max_iters=14', ranks=ranks)
    for out_dir in ('parts', 'whole'):          # one iteration more leaves a state.pt in both
        place.run(*resume, f'--out_dir={out_dir}', '--max_iters=15', '--checkpoint=gathered',
                  ranks=ranks)

    found, expected = ([record['loss'] for record in place.records(name) if 'loss' in record]
                       for name in ('parts', 'whole'))
    assert found == expected
    assert len(found) == 15
    assert_same(tensors(place, 'parts'), tensors(place, 'whole'))


@pytest.mark.parametrize('options', [dict(strategy='fsdp'), dict(ranks=4)])
def test_a_masked_mixture_gives_the_losses_of_one_process(place, options):
    """Micro-batches of one sequence have different numbers of targets, and some have none."""
    flags = ['--dataset=toy:0.7,masked:0.3', '--max_iters=12', '--overwrite=True']
    train(place, 'one', *flags, ranks=1)
    train(place, 'several', *flags, **options)
    assert len(curve(place, 'one')) == 15
    assert curve(place, 'several') == pytest.approx(curve(place, 'one'), rel=1e-6)

    evaluation = place.records('one')[0]
    parts = 0.7 * evaluation['val/toy_loss'] + 0.3 * evaluation['val/masked_loss']
    assert evaluation['val_loss'] == pytest.approx(parts, rel=1e-9)


def test_a_masked_mixture_resumes_bit_for_bit(place):
    flags = ['--dataset=toy:0.7,masked:0.3', '--overwrite=True']
    options = dict(strategy='fsdp', ranks=2)
    train(place, 'whole', *flags, '--max_iters=12', **options)
    train(place, 'parts', *flags, '--max_iters=5', **options)
    place.run('train.py', '--init_from=resume', '--device=cpu', '--compile=False',
              '--out_dir=parts', '--max_iters=12', ranks=2)
    assert_same(tensors(place, 'parts'), tensors(place, 'whole'))


@pytest.fixture(scope='module')
def sharded(place):
    """A run on two ranks with a sharded state of iteration 10 and one of iteration 5 before it."""
    train(place, 'sharded', '--max_iters=10', '--eval_interval=5', '--checkpoint=sharded',
          strategy='fsdp')
    return place.folder / 'sharded'


def test_one_process_saves_without_a_warning(monkeypatch, tmp_path):
    """PyTorch warns of it in the thread that writes, even after start_writing has returned."""
    save = state_dict_saver.save

    def late_save(*arguments, **options):
        time.sleep(0.1)
        return save(*arguments, **options)

    monkeypatch.setattr(state_dict_saver, 'save', late_save)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        sharded_checkpoint.start_writing({'weight': torch.ones(3)}, tmp_path, None).result()
    assert caught == []
    assert list(tmp_path.glob('*.safetensors'))


@pytest.mark.parametrize('options', [
    dict(ranks=1),
    dict(),
    dict(ranks=4),
    dict(strategy='fsdp', ranks=3),
    HSDP,
])
def test_a_sharded_checkpoint_loads_into_any_number_of_ranks(place, sharded, options):
    shutil.rmtree(place.folder / 'resharded', ignore_errors=True)
    shutil.copytree(sharded, place.folder / 'resharded')
    train(place, 'resharded', '--init_from=resume', '--max_iters=11', '--checkpoint=gathered',
          **options)
    train(place, 'expected', '--max_iters=11', '--overwrite=True', ranks=1)
    assert_same(tensors(place, 'resharded'), tensors(place, 'expected'), 1e-5)


@pytest.mark.parametrize('flags, words', [
    (('--optimizer=muon', '--strategy=ddp'),
     'trained with optimizer=adamw, whose state optimizer=muon cannot take'),
    (('--freeze=h.0',), 'are trained now; go on with the --freeze of the run'),
    (('--block_size=64',), 'cannot be changed to block_size=64; begin a new run with its model'),
    (('--block_size=16',), 'cannot be changed to block_size=16; begin a new run with its model'),
])
def test_a_sharded_state_of_another_optimizer_or_context_says_so(place, sharded, flags, words):
    result = place.launcher.run('train.py', *place.flags(sharded), *SHARED, '--strategy=fsdp',
                                '--init_from=resume', *flags, ranks=2)
    assert_refused(result, words)


def test_a_longer_context_drops_the_optimizer_on_every_rank(place):
    """Rank 0 alone builds the model of fsdp."""
    for out_dir, options in (('longer', dict(strategy='fsdp')), ('longer-ddp', {})):
        train(place, out_dir, '--max_iters=5', '--overwrite=True', **options)
        result = train(place, out_dir, '--max_iters=8', '--init_from=resume', '--block_size=48',
                       **options)
        assert 'the optimizer starts afresh' in result.stdout
    assert curve(place, 'longer') == pytest.approx(curve(place, 'longer-ddp'), rel=1e-3)


def test_sample_and_export_read_a_sharded_run(place, sharded):
    flags = ('--max_new_tokens=40', '--num_samples=1', '--start=a')
    text = place.run('sample.py', f'--out_dir={sharded}', *flags).stdout
    train(place, 'gathered', '--max_iters=10', ranks=1)
    assert text == place.run('sample.py', '--out_dir=gathered', *flags).stdout
    assert len(text) > 40

    place.run('export.py', str(sharded), 'exported')
    assert (place.folder / 'exported' / 'model.safetensors').stat().st_size > 50_000


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_a_bit_of_a_shard(folder):
    flip_a_bit(sorted(folder.glob('*.safetensors'))[1])


def lose_a_shard(folder):
    sorted(folder.glob('*.safetensors'))[0].unlink()


def cut_run_short(folder):
    path = folder / 'run.pt'
    path.write_bytes(path.read_bytes()[:-9])


def nest_checksums(folder):
    (folder / 'checksums.json').write_text('[' * 10 ** 5)


def lose_checksums(folder):
    (folder / 'checksums.json').unlink()


@pytest.mark.parametrize('harm, words', [
    (flip_a_bit_of_a_shard, 'fails its checksum'),
    (lose_a_shard, 'are not those that checksums.json names'),
    (cut_run_short, 'run.pt cannot be read'),
    (nest_checksums, 'cannot be read'),
    (lose_checksums, 'has no checksums.json'),
])
def test_a_damaged_sharded_state_falls_back_to_the_one_before(
        place, sharded, tmp_path, harm, words):
    out_dir = tmp_path / 'out'
    shutil.copytree(sharded, out_dir)
    harm(out_dir / 'state')
    state, notes = run_folder.load_state(out_dir)
    assert state.iter_num == 5
    assert len(notes) == 1
    assert words in notes[0]
    assert notes[0].count('cannot be read') == 1

    result = train(place, str(out_dir), '--init_from=resume', '--max_iters=10',
                   '--checkpoint=sharded', strategy='fsdp')
    assert 'from iteration 5' in result.stdout
    assert (out_dir / 'state.damaged').is_dir()

    # the new state is whole, and so is the one before: the damaged one was not kept as that
    assert run_folder.load_state(out_dir)[1] == []
    shutil.rmtree(out_dir / 'state')
    (out_dir / 'state.prev').rename(out_dir / 'state')
    assert run_folder.load_state(out_dir)[1] == []


def test_weights_that_are_not_finite_are_not_saved_by_any_rank(place, sharded, tmp_path):
    out_dir = tmp_path / 'out'
    shutil.copytree(sharded, out_dir)
    before = files_in(out_dir / 'state')
    result = place.launcher.run('train.py', *place.flags(out_dir), *SHARED, '--strategy=fsdp',
                                '--checkpoint=sharded', '--init_from=resume', '--max_iters=20',
                                ranks=2,
                                fault=dict(kind='not finite', what='weights', iteration=2))
    assert result.codes == [1, 1]
    assert 'is not finite' in result.stderr
    assert result.stderr.count('\n') == 1
    assert files_in(out_dir / 'state') == before


@pytest.mark.parametrize('flags, words', [
    (('--strategy=zero',), "strategy='zero' is unknown; try 'ddp' or 'fsdp' or 'hsdp'"),
    (('--strategy=fsdp', '--dtype=float16'),
     'strategy=fsdp does not scale the loss, which float16 needs'),
    (('--strategy=fsdp', '--sample_tokens=20'),
     'sample_tokens and eval_tasks read the whole model'),
    (('--strategy=fsdp', '--eval_tasks=exact'),
     'sample_tokens and eval_tasks read the whole model'),
    (('--checkpoint=sharded', '--always_save_checkpoint=False'),
     'checkpoint=sharded keeps the last model'),
    (('--strategy=fsdp', '--optimizer=muon'),
     'Muon multiplies whole matrices, and strategy=fsdp gives a rank a part of each'),
    (('--reduce_dtype=bfloat16',), 'reduce_dtype=bfloat16 takes NCCL under ddp'),
    (('--checkpoint=none',), "checkpoint='none' is unknown; try 'gathered' or 'sharded'"),
    (('--batch_ramp_start=64',),
     'a batch ramp takes both batch_ramp_start and batch_ramp_tokens'),
])
def test_what_cannot_be_had_is_refused_in_one_line(place, flags, words):
    result = place.launcher.run('train.py', *place.flags('refused'), *flags, ranks=2)
    assert_refused(result, words)


def test_machines_with_unequal_ranks_are_refused_for_hsdp(place):
    result = place.launcher.run('train.py', *place.flags('refused'), '--strategy=hsdp',
                                '--gradient_accumulation_steps=3', ranks=3, LOCAL_WORLD_SIZE='2')
    assert_refused(result, 'strategy=hsdp needs machines with equally many ranks')


@pytest.mark.parametrize('options', [dict(ranks=1), dict(), dict(strategy='fsdp')])
def test_a_batch_ramp_resumes_exactly(place, options):
    """From its middle to after its end, where micro-batches of two ranks grow to two sequences."""
    ramp = ('--gradient_accumulation_steps=8', '--batch_size=2', '--batch_ramp_start=64',
            '--batch_ramp_tokens=1500', '--lr_decay_iters=20')
    train(place, 'ramp', *ramp, '--max_iters=16', '--overwrite=True', **options)
    train(place, 'ramped', *ramp, '--max_iters=7', '--overwrite=True', **options)
    train(place, 'ramped', *ramp, '--max_iters=16', '--init_from=resume', **options)
    assert_same(tensors(place, 'ramped'), tensors(place, 'ramp'))

    # the steps grow
    records = [record for record in place.records('ramp') if 'loss' in record]
    steps = [b['tokens'] - a['tokens'] for a, b in zip(records, records[1:])]
    assert records[0]['tokens'] == 64
    assert steps[-1] == 16 * 32
    assert set(steps) == {64, 128, 192, 256, 320, 384, 512}

    # the learning rate counts full batches: it warms up over two of them
    warm = [record['lr'] for record in records if record['tokens'] <= 2 * 512]
    assert warm == sorted(warm)
    assert len(warm) > 4


def test_a_stopped_run_prints_the_command_that_goes_on_as_it_was(place):
    """With torchrun and as many ranks, and with the settings that a resume does not restore."""
    fault = dict(kind='signal', number=signal.SIGTERM, iteration=3, micro_steps=6)
    result = place.launcher.run('train.py', *place.flags('stopped'), *SHARED, '--strategy=fsdp',
                                ranks=2, fault=fault)
    assert result.codes == [143, 143]
    command = result.stdout.split('go on with:\n')[1].splitlines()[0].strip()
    assert command == ('torchrun --nproc_per_node=2 --standalone train.py --init_from=resume '
                       '--out_dir=stopped --device=cpu --compile=False')
    state, _ = run_folder.load_state(place.folder / 'stopped')
    assert state.config['strategy'] == 'fsdp'


def test_weights_of_others_are_shared_out_by_rank_0(place):
    """A folder of Hugging Face weights, finetuned on shards and on one process."""
    place.run('export.py', 'straight', 'weights')
    for out_dir, options in (('tuned', dict(ranks=1)), ('tuned-fsdp', dict(strategy='fsdp'))):
        train(place, out_dir, '--init_from=weights', '--max_iters=4', **options)
    expected = curve(place, 'tuned')
    assert curve(place, 'tuned-fsdp') == pytest.approx(expected, rel=1e-5)
    assert len(expected) == 6


def limited(place, out_dir, *flags, kilobytes, ranks):
    """train.py in Pythons of their own that may write no file above so many kB.

    That is how a full disk looks to them.
    """
    words = ['train.py', *place.flags(out_dir), *SHARED, *flags]
    if ranks > 1:
        words = [*torchrun_options(ranks), *words]
    command = f'ulimit -f {kilobytes}; exec {shlex.join([sys.executable, *words])}'
    return subprocess.run(['bash', '-c', command], cwd=place.folder, text=True,
                          capture_output=True, timeout=120, env=script_environment())


@pytest.mark.parametrize('ranks', [1, 2])
def test_a_sharded_save_on_a_full_disk_ends_in_one_line_and_keeps_the_state_before(
        place, sharded, tmp_path, ranks):
    out_dir = tmp_path / 'out'
    shutil.copytree(sharded, out_dir)
    before = files_in(out_dir / 'state')
    result = limited(place, str(out_dir), '--init_from=resume', '--checkpoint=sharded',
                     '--max_iters=12', kilobytes=60, ranks=ranks)
    assert result.returncode == 1

    lines = [line for line in result.stderr.splitlines() if line.startswith('train.py:')]
    assert lines
    for line in lines:
        assert 'could not be written' in line
        assert 'allow larger files, with ulimit -f unlimited, and go on' in line
    assert 'CheckpointException' not in result.stderr       # torchrun's own traceback may be there
    assert files_in(out_dir / 'state') == before


def test_a_refused_command_leaves_the_run_that_it_would_replace(place):
    train(place, 'kept', '--max_iters=2', ranks=1)
    before = (place.folder / 'kept' / 'state.pt').read_bytes()
    result = place.launcher.run('train.py', *place.flags('kept'), '--overwrite=True',
                                '--eval_tasks=no-such-task')
    assert result.codes == [2]
    assert (place.folder / 'kept' / 'state.pt').read_bytes() == before


def test_a_run_that_becomes_not_finite_finishes_the_save_in_flight(place):
    fault = dict(kind='not finite', what='loss', iteration=0, micro_steps=6)
    result = place.launcher.run('train.py', *place.flags('flight'), *SHARED, '--strategy=fsdp',
                                '--checkpoint=sharded', ranks=2, fault=fault)
    assert result.codes == [1, 1]
    assert 'iteration 0: loss nan' in result.stderr
    assert run_folder.load_state(place.folder / 'flight')[0].iter_num == 0


def test_nanogpt_gets_a_sharded_run_with_its_moments(place, sharded):
    place.run('export.py', str(sharded), 'for-nanogpt', '--to=nanogpt')
    saved = torch.load(place.folder / 'for-nanogpt' / 'ckpt.pt', weights_only=True)
    train(place, 'for-comparison', '--max_iters=10', ranks=1)
    expected = torch.load(place.folder / 'for-comparison' / 'state.pt', weights_only=True)
    for name, value in expected['model'].items():
        torch.testing.assert_close(saved['model'][name], value, rtol=0, atol=1e-5)
    for index, moment in expected['optimizer']['state'].items():
        for name, value in moment.items():
            found = saved['optimizer']['state'][index][name]
            torch.testing.assert_close(found, value, rtol=0, atol=1e-5)


def test_a_sharded_run_keeps_whole_models(place):
    """In the format of ckpt.pt, beside the folder of shards."""
    train(place, 'kept-models', '--checkpoint=sharded', '--keep_interval=5', '--max_iters=10',
          strategy='fsdp')
    folder = place.folder / 'kept-models'
    assert {path.name for path in folder.glob('ckpt*')} == {'ckpt_000005.pt', 'ckpt_000010.pt'}
    kept = run_folder.newest_checkpoint(folder / 'ckpt_000010.pt')
    assert_same(kept.model, run_folder.newest_checkpoint(folder).model)
