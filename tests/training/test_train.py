"""The loop, through the command line. Interrupted runs are in test_faults.py."""

import json
import math
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from harness import CAN_FORK, SETTINGS, script_settings

import train
from engine.checkpoint import run_folder
from engine.dataloader.batches import TokenDataset
from engine.distributed import STOP_SIGNALS
from engine.errors import UserError
from engine.metrics.step_log import short_number
from engine.training.settings_checks import check_training
from model import GPT, GPTConfig

TOY = [f'--{name}={value}' for name, value in SETTINGS.items()]     # the flags of a toy run


# Settings

def test_the_schedule_rises_falls_and_stays():
    flags = ['--learning_rate=1', '--min_lr=0.1', '--warmup_iters=10', '--lr_decay_iters=110']
    with script_settings(train, *flags):
        rates = [train.get_lr(i) for i in range(200)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[110:] == pytest.approx([0.1] * 90)
    assert all(a > b for a, b in zip(rates[10:110], rates[11:111]))

    with script_settings(train, '--learning_rate=1', '--decay_lr=False'):
        assert {train.get_lr(i) for i in range(200)} == {1.0}


def test_the_other_schedules_fall_in_a_line():
    flags = ['--learning_rate=1', '--min_lr=0.1', '--warmup_iters=10', '--lr_decay_iters=110']
    with script_settings(train, *flags, '--lr_schedule=linear'):
        rates = [train.get_lr(i) for i in range(200)]
    assert rates[10:111] == pytest.approx([1 - 0.009 * i for i in range(101)])
    assert set(rates[111:]) == {rates[110]}

    with script_settings(train, *flags, '--lr_schedule=wsd', '--cooldown_iters=20'):
        rates = [train.get_lr(i) for i in range(200)]
    assert rates[10:91] == [1.0] * 81
    assert rates[90:111] == pytest.approx([1 - 0.045 * i for i in range(21)])


@pytest.mark.parametrize('flag, words', [
    ('--lr_schedule=wave', "lr_schedule='wave' is unknown; try 'cosine' or 'linear' or 'wsd'"),
    ('--cooldown_iters=0', 'cooldown_iters=0 should be at least 1'),
    ('--sample_tokens=-1', 'sample_tokens=-1 should be'),
    ('--max_iters=100000000000000000', 'should be .*at most 1,000,000,000'),
    ('--rank_timeout=99999999999999', 'at most 10,000,000'),
    ('--batch_size=4611686018427387904', 'at most 1,048,576'),
    ('--batch_size=-4', 'batch_size=-4 should be at least 1'),
    ('--gradient_accumulation_steps=0', 'gradient_accumulation_steps=0 should be at least 1'),
    ('--dropout=1.5', 'dropout=1.5 should be at least 0 and below 1'),
    ('--dropout=-0.1', 'dropout=-0.1 should be'),
    ('--warmup_iters=50',
     'warmup_iters=50 leaves nothing of lr_decay_iters=20; try .*--warmup_iters=2'),
    ('--min_lr=0.5', 'min_lr=0.5 is above learning_rate=0.01'),
    ('--learning_rate=0', 'learning_rate=0.0 should be .*above 0'),
    ('--learning_rate=1e999', 'learning_rate=inf should be'),
    ('--weight_decay=-1', 'weight_decay=-1.0 should be'),
    ('--beta1=1.0', 'beta1=1.0 should be at least 0 and below 1'),
    ('--beta2=-1', 'beta2=-1.0 should be'),
    ('--grad_clip=-1', 'grad_clip=-1.0 should be at least 0'),
    ('--eval_interval=0', 'eval_interval=0 should be at least 1'),
    ('--log_interval=0', 'log_interval=0 should be at least 1'),
    ('--eval_iters=0', 'eval_iters=0 should be at least 1'),
    ('--max_iters=-1', 'max_iters=-1 should be at least 0'),
    ('--seed=-1', 'seed=-1 should be at least 0'),
    ('--rank_timeout=0', 'rank_timeout=0 should be at least 1'),
    ('--out_dir=', "out_dir='' should be the name of a folder"),
    ('--out_dir=a\0b', 'should be the name of a folder'),
])
def test_an_impossible_value_is_refused(flag, words):
    with script_settings(train, *TOY):
        check_training(vars(train))
    with pytest.raises(UserError, match=words):
        with script_settings(train, *TOY, flag):
            check_training(vars(train))


@pytest.mark.parametrize('flag, words', [
    ('--device=gpu', "device='gpu' is unknown"),
    ('--dtype=float8', "dtype='float8' is unknown"),
    ('--compile=maybe', "compile='maybe' should be"),
    ('--n_layer=0', 'n_layer=0 should be'),
    ('--n_head=3', 'n_embd=32 does not divide over n_head=3'),
    ('--init_from=gpt3', "'gpt3' is neither a folder nor a hub model"),
    ('--dataset=nowhere', "dataset 'nowhere' has no train.bin"),
    ('--block_size=1000', 'val.bin has 1,000 tokens, and a block takes 1001'),
    ('--block_size=9000',
     'val.bin has 1,000 tokens, and a block takes 9001; try --block_size=999'),
    ('--init_from=resume', 'holds no run to resume'),
])
def test_a_mistake_is_refused_before_a_run_begins(toy, tmp_path, capsys, flag, words):
    out_dir = tmp_path / 'out'
    with pytest.raises(UserError, match=words):
        with script_settings(train, *TOY, f'--out_dir={out_dir}', flag) as overrides:
            train.main(overrides)
    assert not out_dir.exists()                         # nor does the lock stay


@pytest.mark.parametrize('flag, words', [
    ('--init_from=resume', 'is not what the run was trained on'),
    ('--n_head=3', 'already holds a run'),
    ('--n_layer=0', 'n_layer'),
])
def test_a_refused_run_leaves_out_dir_free_while_its_traceback_is_kept(
        trained, toy, tmp_path, flag, words):
    """As IPython keeps it. The lock of the run before stays as a file."""
    out_dir = tmp_path / 'out'
    out_dir.mkdir()
    if flag != '--n_layer=0':
        saved = torch.load(trained.folder / 'out-toy' / 'state.pt', weights_only=True)
        torch.save(dict(saved, fingerprint='another'), out_dir / 'state.pt')
        (out_dir / '.lock').touch()
    before = {path.name for path in out_dir.iterdir()}

    with pytest.raises(UserError, match=words) as kept:
        with script_settings(train, *TOY, f'--out_dir={out_dir}', flag) as overrides:
            train.main(overrides)
    assert {path.name for path in out_dir.iterdir()} == before
    run_folder.RunLock(out_dir).release()
    assert kept.traceback


def test_a_run_in_a_thread_handles_no_signals(toy, tmp_path):
    """Only the main thread may. The run trains and ends as elsewhere."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    flags = [*TOY, f'--out_dir={tmp_path / "out"}', '--max_iters=2']
    with script_settings(train, *flags) as overrides:
        with ThreadPoolExecutor() as pool:
            pool.submit(train.main, overrides).result()
    assert (tmp_path / 'out' / 'state.pt').exists()
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before


def test_a_program_has_its_signal_handlers_back_after_a_run(toy, tmp_path):
    """After one that ends, and after a mistake."""
    def own_handler(number, frame):
        raise AssertionError('no signal is sent here')

    flags = [*TOY, f'--out_dir={tmp_path / "out"}', '--overwrite=True']
    for flag, ending in (
            ('--max_iters=2', nullcontext()),
            ('--dataset=nowhere', pytest.raises(UserError))):
        with script_settings(train, *flags, flag) as overrides:
            signal.signal(signal.SIGTERM, own_handler)
            before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
            with ending:
                train.main(overrides)
            assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before


# A run

def test_a_run_is_the_textbook_loop(workspace, toy):
    """Losses of the first steps equal those of a loop written from the formulas.

    It has AdamW by hand, the whole global batch at once, clipping, and warm-up. It has no dropout,
    which draws from a stream of its own.
    """
    workspace.train('out-textbook', '--dropout=0', '--max_iters=6', '--lr_decay_iters=12',
                    '--warmup_iters=3', '--grad_clip=0.5', '--weight_decay=0.2',
                    '--learning_rate=1e-3', '--min_lr=6e-5')
    logged = [r for r in workspace.records('out-textbook') if 'loss' in r]
    assert len(logged) == 6

    data = TokenDataset('toy')
    data.set_block_size(32)
    torch.manual_seed(1337)
    model = GPT(GPTConfig(32, 17, 2, 2, 32, 0.0, False))
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()}

    for step, record in enumerate(logged):
        x, y = data.batch(1337, 'train', step * 4, 4)
        loss = F.cross_entropy(model(x, y)[0].flatten(0, 1), y.flatten())
        grads = dict(zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters()))))
        norm = math.sqrt(sum(g.square().sum().item() for g in grads.values()))
        assert record['loss'] == pytest.approx(loss.item(), rel=1e-5)
        assert record['grad_norm'] == pytest.approx(norm, rel=1e-4)

        if step < 3:
            rate = 1e-3 * (step + 1) / 4
        else:
            cosine = 0.5 * (1 + math.cos(math.pi * (step - 3) / 9))
            rate = 6e-5 + (1e-3 - 6e-5) * cosine
        assert record['lr'] == pytest.approx(rate)

        with torch.no_grad():
            for p, g in grads.items():
                g = g * min(1, 0.5 / (norm + 1e-6))
                m, v = moments[p]
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.95).add_(0.05 * g * g)
                if p.dim() > 1:
                    p.mul_(1 - rate * 0.2)
                mean = m / (1 - 0.9 ** (step + 1))
                variance = v / (1 - 0.95 ** (step + 1))
                p.sub_(rate * mean / (variance.sqrt() + 1e-8))


def test_it_evaluates_saves_and_logs_where_it_says(trained):
    records = trained.records('out-toy')
    assert [r['iter'] for r in records if 'val_loss' in r] == [0, 5, 10, 15, 20]
    assert [r['iter'] for r in records if 'loss' in r] == list(range(20))
    names = {path.name for path in (trained.folder / 'out-toy').iterdir()}
    assert names >= {'ckpt.pt', 'state.pt', 'state.prev.pt', 'metrics.jsonl'}
    saved = torch.load(trained.folder / 'out-toy' / 'ckpt.pt', weights_only=True)
    assert saved['iter_num'] == 20
    assert saved['tokenizer']['tokenizer'] == 'char'
    assert saved['best_val_loss'] == min(r['val_loss'] for r in records if 'val_loss' in r)


def test_evaluation_is_the_same_each_time_and_changes_no_step(trained):
    trained.train('out-often', '--eval_interval=1')
    often = trained.records('out-often')
    seldom = trained.records('out-toy')
    assert [r for r in often if 'loss' in r] == [r for r in seldom if 'loss' in r]

    evaluations = {r['iter']: r for r in often if 'val_loss' in r}
    assert len(evaluations) == 21
    for record in seldom:
        if 'val_loss' in record:
            assert evaluations[record['iter']] == record


def test_a_sample_at_each_evaluation_changes_no_step(trained):
    """It prints what the model writes. Dropout and batches stay as they are."""
    shown = trained.train('out-sampled', '--sample_tokens=20', '--sample_prompt=abc').stdout
    assert trained.records('out-sampled') == trained.records('out-toy')
    texts = [line for line in shown.split('\n') if line.startswith('abc')]
    assert len(texts) == 5                      # after iterations 0, 5, 10, 15 and 20

    refused = trained.train('out-unsampled', '--sample_tokens=20', '--sample_prompt=XYZ', code=2)
    assert "'X' is not in the vocabulary" in refused.stderr
    assert not (trained.folder / 'out-unsampled' / 'state.pt').exists()


def test_the_end_of_a_run_says_what_it_made(trained):
    shown = trained.train('out-told', '--lr_decay_iters=30').stdout
    values = {r['iter']: r['val_loss'] for r in trained.records('out-told') if 'val_loss' in r}
    best = min(values, key=values.get)
    assert 'toy: 5,000 tokens to train on; 20 iterations read 2.56k, 0.512 epochs' in shown
    assert '20 iterations, 2.56k tokens, 0 min' in shown
    assert f'best val loss {values[best]:.4f} at iteration {best}' in shown
    assert 'next: python sample.py --out_dir=out-told' in shown
    assert ('note: the learning rate does not reach min_lr: lr_decay_iters=30 is after '
            'max_iters=20') in shown

    described = json.loads((trained.folder / 'out-told' / 'run.json').read_text())
    assert described['settings']['lr_decay_iters'] == 30
    assert '--lr_decay_iters=30' in described['command']
    assert described['torch'] == torch.__version__
    assert described['device'].startswith('device cpu')


def test_an_evaluation_is_the_mean_loss_of_its_batches(trained, toy):
    """Of the plain model. The windows do not depend on the seed."""
    model = GPT.from_checkpoint(trained.folder / 'out-toy').eval()
    data = TokenDataset('toy')
    data.set_block_size(32)
    last = [r for r in trained.records('out-toy') if 'val_loss' in r][-1]
    for split in ('train', 'val'):
        losses = [model(*data.batch(7, f'eval {split}', i * 2, 2))[1].item() for i in range(2)]
        assert last[f'{split}_loss'] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_an_evaluation_tells_how_many_bytes_a_token_has(trained):
    """One, in a dataset of ASCII characters."""
    evaluations = [r for r in trained.records('out-toy') if 'val_loss' in r]
    assert {r['bytes_per_token'] for r in evaluations} == {1}


def test_eval_only_writes_nothing_and_agrees_with_the_run(trained):
    before = {p.name: p.read_bytes() for p in (trained.folder / 'out-toy').iterdir()}
    shown = trained.train('out-toy', '--init_from=resume', '--eval_only=True').stdout
    last = [r for r in trained.records('out-toy') if 'val_loss' in r][-1]
    losses = f'train loss {last["train_loss"]:.4f}, val loss {last["val_loss"]:.4f}'
    assert f'step 20: {losses}' in shown
    assert {p.name: p.read_bytes() for p in (trained.folder / 'out-toy').iterdir()} == before


def test_the_best_checkpoint_survives_a_stop_and_a_ruined_model(workspace):
    """A learning rate destroys the model: ckpt.pt stays that of the lowest validation loss."""
    workspace.train('out-best', '--always_save_checkpoint=False')
    best = (workspace.folder / 'out-best' / 'ckpt.pt').read_bytes()
    shown = workspace.train('out-best', '--init_from=resume', '--max_iters=30',
                            '--learning_rate=10', '--decay_lr=False', '--grad_clip=0').stdout

    values = {r['iter']: r['val_loss'] for r in workspace.records('out-best') if 'val_loss' in r}
    assert min(values, key=values.get) == 20
    assert min(values[25], values[30]) > values[20]
    assert (workspace.folder / 'out-best' / 'ckpt.pt').read_bytes() == best
    state = torch.load(workspace.folder / 'out-best' / 'state.pt', weights_only=True)
    assert (state['iter_num'], state['best_val_loss']) == (30, values[20])
    assert 'note: learning_rate 0.01 -> 10.0' in shown


def test_a_run_goes_on_past_its_first_end_and_a_finished_one_ends_at_once(trained):
    trained.train('out-long', '--max_iters=15')
    trained.train('out-long', '--init_from=auto', '--max_iters=20')
    assert trained.records('out-long') == trained.records('out-toy')
    shown = trained.train('out-long', '--init_from=resume').stdout
    assert 'to train longer, resume with more --max_iters and --lr_decay_iters' in shown
    assert 'iter 20' not in shown


def test_a_run_past_the_end_of_its_schedule_is_told_how_to_stretch_it(trained):
    """Its learning rate would stay at min_lr without a word."""
    trained.train('out-stretched', '--max_iters=8', '--lr_decay_iters=8')
    resume = ['train.py', '--out_dir=out-stretched', '--init_from=resume', '--device=cpu']
    shown = trained.run(*resume, '--max_iters=10').stdout
    assert ('note: the learning rate stays at min_lr=0.001 from iteration 8 on; '
            '--lr_decay_iters=10 lets it fall until max_iters') in shown
    shown = trained.run(*resume, '--max_iters=12', '--lr_decay_iters=12').stdout
    assert 'stays at min_lr' not in shown


def test_a_resumed_run_goes_on_with_its_own_settings(trained):
    """Nothing but the folder and the machine needs to be named again; `auto` begins and resumes."""
    trained.train('out-again', '--max_iters=10', '--init_from=auto', '--dataset=toy')
    shown = trained.run('train.py', '--out_dir=out-again', '--init_from=auto', '--device=cpu',
                        '--max_iters=20').stdout
    assert trained.records('out-again') == trained.records('out-toy')
    notes = [line for line in shown.splitlines() if line.startswith('note:')]
    assert notes == ['note: max_iters 10 -> 20']


def test_a_resume_in_another_precision_says_so(trained):
    """The restored settings leave dtype to the machine, so only the saved precision can tell."""
    trained.train('out-precision', '--dtype=bfloat16', '--max_iters=4')
    resume = ['train.py', '--out_dir=out-precision', '--init_from=resume', '--device=cpu']
    shown = trained.run(*resume, '--max_iters=5').stdout
    assert ('note: the run was trained in bfloat16, and goes on in float32; to go on exactly, add '
            '--dtype=bfloat16') in shown
    assert 'was trained in' not in trained.run(*resume, '--max_iters=6').stdout


@pytest.mark.skipif(not hasattr(signal, 'SIGUSR1'), reason='this system has no SIGUSR1')
def test_a_stopped_run_prints_the_flags_to_repeat(trained):
    fault = dict(kind='signal', number=signal.SIGUSR1, iteration=7, micro_steps=3)
    flags = [*trained.flags('out-flags-to-repeat'), '--wandb_log=True']
    result = trained.launcher.run('train.py', *flags, WANDB_MODE='offline', fault=fault)
    assert result.codes == [128 + signal.SIGUSR1]
    command = result.stdout.split('go on with:\n')[1].splitlines()[0]
    assert command == ('  python train.py --init_from=resume --out_dir=out-flags-to-repeat '
                       '--device=cpu --compile=False --wandb_log=True')


@pytest.mark.parametrize('block_size', [0, -5])
def test_no_context_is_refused(trained, block_size):
    refused = trained.train('out-toy', '--init_from=resume', f'--block_size={block_size}', code=2)
    assert f'block_size={block_size} should be at least 1' in refused.stderr
    assert refused.stderr.count('\n') == 1


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_lower_precision_trains_to_nearly_the_same_loss(trained, dtype):
    trained.train(f'out-{dtype}', f'--dtype={dtype}', '--max_iters=4')
    pairs = list(zip(trained.records(f'out-{dtype}'), trained.records('out-toy')))
    assert sum('loss' in low for low, _ in pairs) == 4
    for low, full in pairs:
        if 'loss' in low:
            assert low['loss'] == pytest.approx(full['loss'], rel=0.02)


def test_recomputed_activations_train_the_same(trained):
    trained.train('out-recompute', '--recompute=True', '--max_iters=5')
    losses = [r['loss'] for r in trained.records('out-recompute') if 'loss' in r]
    assert losses == [r['loss'] for r in trained.records('out-toy') if 'loss' in r][:5]


@pytest.mark.skipif(sys.platform == 'win32',
                    reason='torchrun on Windows needs a PyTorch built with libuv')
def test_two_ranks_train_as_one(trained):
    """The same batches, dropout and evaluations: losses agree to rounding.

    One rank resumes what two began.
    """
    trained.train('out-ranks', '--max_iters=15', ranks=2)
    trained.train('out-ranks', '--init_from=resume')
    records = zip(trained.records('out-ranks'), trained.records('out-toy'), strict=True)
    for two, one in records:
        assert two == {name: pytest.approx(value, rel=1e-4) for name, value in one.items()}


def test_a_smaller_context_takes_effect_and_a_larger_one_stretches_the_positions(trained):
    trained.train('out-context', '--max_iters=10')
    shown = trained.train('out-context', '--init_from=resume', '--block_size=16', '--max_iters=11',
                          '--n_layer=5').stdout
    assert '2 micro-batches of 2 x 16 tokens' in shown
    assert 'note: n_layer=5 has no effect, the weights have n_layer=2' in shown

    shown = trained.train('out-context', '--init_from=resume', '--block_size=64',
                          '--max_iters=11').stdout
    assert 'the weights have read contexts of 16 tokens, and now read 64' in shown
    assert 'the 16 learned positions are stretched to 64 by linear interpolation' in shown
    assert 'the optimizer starts afresh' in shown
    assert '2 micro-batches of 2 x 64 tokens' in shown


def test_it_finetunes_and_evaluates_a_folder_of_weights(workspace):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    for name, vocab_size in (('weights', 17), ('weights-of-other-tokens', 300)):
        config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=64,
                                         vocab_size=vocab_size)
        transformers.GPT2LMHeadModel(config).save_pretrained(workspace.folder / name)
    shape = ('n_layer', 'n_head', 'n_embd', 'block_size')
    toy = [f'--{name}={value}' for name, value in SETTINGS.items() if name not in shape]
    flags = ['--init_from=weights', '--out_dir=out-hf', *toy]

    # an evaluation, with the whole context and with a part of it
    evaluate = ['train.py', *flags, '--eval_only=True', '--dropout=0']
    shown = workspace.run(*evaluate).stdout
    cut = workspace.run(*evaluate, '--block_size=16').stdout
    assert 'x 16 tokens' in cut
    assert 'note: the weights have read contexts of 64 tokens, and now read 16' in cut
    assert 'x 64 tokens' in shown
    assert not (workspace.folder / 'out-hf').exists()

    # a finetuning, with the shape of the weights
    workspace.run('train.py', *flags)
    losses = [r['val_loss'] for r in workspace.records('out-hf') if 'val_loss' in r]
    assert losses[-1] < losses[0]
    assert f'val loss {losses[0]:.4f}' in shown
    saved = torch.load(workspace.folder / 'out-hf' / 'ckpt.pt', weights_only=True)
    assert saved['activation'] == 'gelu_tanh'
    assert saved['config']['n_layer'] == 1

    # weights of other tokens
    other = ['--init_from=weights-of-other-tokens', '--out_dir=out-other', *toy]
    refused = workspace.run('train.py', *other, code=2).stderr
    assert 'the tokens of toy are not those of weights-of-other-tokens' in refused


def test_a_new_run_replaces_another_only_when_told_to(trained):
    trained.train('out-new', '--max_iters=5')
    before = (trained.folder / 'out-new' / 'state.pt').read_bytes()
    refused = trained.train('out-new', code=2).stderr
    assert 'out-new already holds a run; go on with --init_from=resume' in refused
    assert '--overwrite=True' in refused
    assert (trained.folder / 'out-new' / 'state.pt').read_bytes() == before

    trained.train('out-new', '--overwrite=True')
    assert trained.records('out-new') == trained.records('out-toy')


def kept_weights(folder):
    """{name of a kept model: its weights}"""
    return {path.name: torch.load(path, weights_only=True)['model']
            for path in sorted(folder.glob('ckpt_*.pt'))}


def test_kept_models_are_those_of_their_iterations_also_after_a_resume(trained):
    """They change no step, and each is evaluated. A resumed run writes equal ones."""
    trained.train('out-kept', '--keep_interval=4')
    records = trained.records('out-kept')
    assert [r for r in records if 'loss' in r] == [
        r for r in trained.records('out-toy') if 'loss' in r]
    assert [r['iter'] for r in records if 'val_loss' in r] == [0, 4, 5, 8, 10, 12, 15, 16, 20]
    whole = kept_weights(trained.folder / 'out-kept')
    assert list(whole) == [f'ckpt_0000{n:02}.pt' for n in (4, 8, 12, 16, 20)]

    # a model that another run trains for as long
    trained.train('out-as-long', '--max_iters=8')
    alone = torch.load(trained.folder / 'out-as-long' / 'ckpt.pt', weights_only=True)['model']
    assert all(torch.equal(alone[name], whole['ckpt_000008.pt'][name]) for name in alone)

    # a run that goes on from iteration 10, beside a file that was damaged
    trained.train('out-kept-parts', '--keep_interval=4', '--max_iters=10')
    (trained.folder / 'out-kept-parts' / 'ckpt_000012.pt').write_bytes(b'damaged')
    trained.train('out-kept-parts', '--keep_interval=4', '--init_from=resume')
    parts = kept_weights(trained.folder / 'out-kept-parts')
    assert list(parts) == list(whole)
    for file, weights in whole.items():
        assert all(torch.equal(weights[name], parts[file][name]) for name in weights)

    # a run in its place removes them
    trained.train('out-kept-parts', '--overwrite=True', '--max_iters=4', '--keep_interval=4')
    assert list(kept_weights(trained.folder / 'out-kept-parts')) == ['ckpt_000004.pt']


def test_a_log_line_has_its_numbers(trained):
    shown = trained.train('out-log', '--max_iters=2').stdout
    lines = [line for line in shown.splitlines() if line.startswith('iter ')]
    metrics = (trained.folder / 'out-log' / 'metrics.jsonl').read_text()
    records = map(json.loads, metrics.splitlines())
    record = [record for record in records if 'loss' in record][1]
    assert record['tokens'] == 256
    rate = short_number(round(record['tokens_per_second']))
    assert lines[1] == (f'iter 1: loss {record["loss"]:.4f}, grad {record["grad_norm"]:.2f}, '
                        f'lr {record["lr"]:.1e}, '.replace('e-0', 'e-') +
                        f'{rate} tok/s, mfu {record["mfu"]:.0%}, eta 0s')


@pytest.mark.parametrize('ranks', [1, 2])
def test_tasks_are_scored_at_evaluations_and_move_nothing(trained, ranks):
    if ranks > 1 and not CAN_FORK:
        pytest.skip('two ranks are started by fork')
    tasks = trained.folder / 'tasks-of-train'
    tasks.mkdir(exist_ok=True)
    (tasks / 'exact.jsonl').write_text('{"prompt": "abc", "answer": "d"}\n'
                                       '{"prompt": "a", "answer": "p"}\n', encoding='utf-8')
    flags = ['--eval_tasks=exact', f'--eval_tasks_data={tasks}']
    run = trained.train('out-tasks', '--overwrite=True', *flags, '--eval_tasks_interval=10',
                        ranks=ranks)

    records = trained.records('out-tasks')
    scored = [r['iter'] for r in records if r.pop('exact_acc', None) is not None]
    assert scored == [0, 10, 20]
    assert 'step 20: exact_acc ' in run.stdout

    if ranks == 1:
        assert 'no multiple' not in run.stdout
        assert records == trained.records('out-toy')
        trained.train('out-tasks-later', '--max_iters=7')       # no multiple of the interval
        shown = trained.train('out-tasks-later', '--init_from=resume', '--eval_only=True',
                              *flags).stdout
        assert 'step 7: exact_acc ' in shown


def test_an_interval_of_scores_that_evaluations_miss_is_told(trained):
    """Evaluations come every 5 iterations, at 4 more for kept models, and at the end."""
    tasks = trained.folder / 'tasks-between'
    tasks.mkdir()
    (tasks / 'exact.jsonl').write_text('{"prompt": "abc", "answer": "d"}\n', encoding='utf-8')
    flags = ['--eval_tasks=exact', f'--eval_tasks_data={tasks}', '--keep_interval=4']
    shown = trained.train('out-between', *flags, '--eval_tasks_interval=3').stdout
    assert ('note: eval_tasks_interval=3 is no multiple of eval_interval=5, so tasks are scored '
            'only where an evaluation falls on a multiple of 3') in shown

    def scored(out_dir):
        return [r['iter'] for r in trained.records(out_dir) if 'exact_acc' in r]
    assert scored('out-between') == [0, 12, 15, 20]
    trained.train('out-always', *flags, '--max_iters=8')
    assert scored('out-always') == [0, 4, 5, 8]


def test_tasks_of_a_sharded_run_are_refused(trained):
    if not CAN_FORK:
        pytest.skip('two ranks are started by fork')
    flags = [*trained.flags('out-refused'), '--eval_tasks=exact', '--strategy=fsdp']
    result = trained.launcher.run('train.py', *flags, ranks=2)
    assert result.codes[0] == 2
    assert 'sample_tokens and eval_tasks read the whole model' in result.stderr
