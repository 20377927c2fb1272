"""The loop, through the command line. Interrupted runs are in test_faults.py."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, torchrun

import train


@pytest.fixture
def settings(monkeypatch):
    def change(**values):
        for name, value in values.items():
            monkeypatch.setattr(train, name, value)
    return change


def test_the_schedule_rises_falls_and_stays(settings):
    settings(learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=110)
    rates = [train.learning_rate_at(i) for i in range(200)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates[10] == 1.0 and rates[60] == pytest.approx(0.55) and rates[110:] == pytest.approx([0.1] * 90)
    assert all(a > b for a, b in zip(rates[10:110], rates[11:111]))
    settings(decay_lr=False)
    assert {train.learning_rate_at(i) for i in range(200)} == {1.0}


def test_a_run_is_the_textbook_loop(workspace):
    """Losses of the first steps equal those of a loop written from the formulas: AdamW by hand,
    the whole global batch at once, clipping, warm-up. Without dropout, which has its own stream."""
    workspace.train('out-textbook', '--dropout=0', '--max_iters=6', '--warmup_iters=3', '--grad_clip=0.5', '--weight_decay=0.2')
    logged = [r for r in workspace.records('out-textbook') if 'loss' in r]
    import dataloader
    from model import GPT, GPTConfig
    before, dataloader.DATA = dataloader.DATA, workspace.folder / 'data'
    data = dataloader.Dataset('toy')
    dataloader.DATA = before
    data.cut(32)
    torch.manual_seed(1337)
    model = GPT(GPTConfig(32, data.vocab_size, 2, 2, 32, 0.0, False))
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()}
    for step, record in enumerate(logged):
        x, y = data.batch(1337, 'train', step * 8, 8)
        loss = F.cross_entropy(model(x, y)[0].flatten(0, 1), y.flatten())
        grads = dict(zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters()))))
        norm = math.sqrt(sum(g.square().sum().item() for g in grads.values()))
        assert record['loss'] == pytest.approx(loss.item(), rel=1e-5)
        assert record['grad_norm'] == pytest.approx(norm, rel=1e-4)
        rate = 1e-3 * (step + 1) / 4 if step < 3 else 6e-5 + (1e-3 - 6e-5) * 0.5 * (1 + math.cos(math.pi * (step - 3) / 9))
        assert record['lr'] == pytest.approx(rate)
        with torch.no_grad():
            for p, g in grads.items():
                g = g * min(1, 0.5 / (norm + 1e-6))
                m, v = moments[p]
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.95).add_(0.05 * g * g)
                p.mul_(1 - rate * (0.2 if p.dim() > 1 else 0))
                p.sub_(rate * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8))
    assert len(logged) == 6


def test_it_evaluates_saves_and_logs_where_it_says(trained):
    records = trained.records('out-toy')
    assert [r['iter'] for r in records if 'val_loss' in r] == [0, 5, 10, 12]
    assert [r['iter'] for r in records if 'loss' in r] == list(range(12))
    assert {p.name for p in (trained.folder / 'out-toy').iterdir()} >= {'ckpt.pt', 'state.pt', 'state.prev.pt', 'metrics.jsonl'}
    saved = torch.load(trained.folder / 'out-toy' / 'ckpt.pt', weights_only=True)
    assert saved['iter_num'] == 12 and saved['tokenizer']['tokenizer'] == 'char'
    assert saved['best_val_loss'] == min(r['val_loss'] for r in records if 'val_loss' in r)


def test_evaluation_is_the_same_each_time_and_moves_nothing(trained):
    trained.train('out-often', '--eval_interval=1')
    often = trained.records('out-often')
    seldom = trained.records('out-toy')
    assert [r for r in often if 'loss' in r] == [r for r in seldom if 'loss' in r]
    at = {r['iter']: r for r in often if 'val_loss' in r}
    assert all(at[r['iter']] == r for r in seldom if 'val_loss' in r)


def test_eval_only_writes_nothing_and_agrees_with_the_run(trained):
    before = {p.name: p.read_bytes() for p in (trained.folder / 'out-toy').iterdir()}
    shown = trained.train('out-toy', '--init_from=resume', '--eval_only=True').stdout
    last = [r for r in trained.records('out-toy') if 'val_loss' in r][-1]
    assert f'step 12: train loss {last["train_loss"]:.4f}, val loss {last["val_loss"]:.4f}' in shown
    assert {p.name: p.read_bytes() for p in (trained.folder / 'out-toy').iterdir()} == before


def test_a_worse_model_never_replaces_the_best(workspace):
    """The best of a run survives a stop, and a learning rate that destroys the model after it."""
    workspace.train('out-worse', '--always_save_checkpoint=False')
    best = (workspace.folder / 'out-worse' / 'ckpt.pt').read_bytes()
    workspace.train('out-worse', '--always_save_checkpoint=False', '--init_from=resume', '--max_iters=20',
                    '--learning_rate=2', '--min_lr=2')
    values = {r['iter']: r['val_loss'] for r in workspace.records('out-worse') if 'val_loss' in r}
    assert min(values, key=values.get) == 12 and values[20] > values[12]
    assert (workspace.folder / 'out-worse' / 'ckpt.pt').read_bytes() == best
    state = torch.load(workspace.folder / 'out-worse' / 'state.pt', weights_only=True)
    assert (state['iter_num'], state['best_val_loss']) == (20, values[12])


def test_the_run_goes_on_past_its_first_end_and_a_finished_one_ends_at_once(workspace):
    workspace.train('out-long', '--max_iters=10')
    workspace.train('out-long', '--init_from=auto', '--max_iters=12')
    workspace.train('out-straight', '--init_from=auto')
    assert workspace.records('out-long') == workspace.records('out-straight')
    assert 'iter 12' not in workspace.train('out-long', '--init_from=resume').stdout


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_lower_precision_trains_to_nearly_the_same_loss(trained, dtype):
    trained.train(f'out-{dtype}', f'--dtype={dtype}', '--max_iters=4')
    both = zip(trained.records(f'out-{dtype}'), trained.records('out-toy'))
    for low, full in both:
        if 'loss' in low:
            assert low['loss'] == pytest.approx(full['loss'], rel=0.02)


@pytest.mark.parametrize('ranks', [2])
def test_two_ranks_train_as_one(trained, ranks):
    """The same batches, the same dropout, the same evaluation; losses agree to rounding."""
    trained.train('out-ranks', launcher=torchrun(ranks))
    for two, one in zip(trained.records('out-ranks'), trained.records('out-toy'), strict=True):
        assert two == {key: pytest.approx(value, rel=1e-4) for key, value in one.items()}
    # and one rank goes on where two stopped
    trained.train('out-ranks', '--init_from=resume', '--max_iters=14')
    assert trained.records('out-ranks')[-1]['iter'] == 14


def test_a_smaller_context_takes_effect_and_a_larger_one_is_refused(trained):
    trained.train('out-context')
    shown = trained.train('out-context', '--init_from=resume', '--block_size=16', '--max_iters=13', '--n_layer=5').stdout
    assert '2 micro-batches of 4 x 16 tokens' in shown and 'n_layer=5 does not count, the weights have n_layer=2' in shown
    refused = trained.train('out-context', '--init_from=resume', '--block_size=64', '--max_iters=14', code=2)
    assert '--block_size=16' in refused.stderr


def test_it_finetunes_and_evaluates_a_folder_of_weights(workspace):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=64, vocab_size=300))
    theirs.save_pretrained(workspace.folder / 'weights')
    arguments = [a for a in TINY if not a.startswith(('--n_', '--block_size'))]
    shown = workspace.run('train.py', *arguments, '--init_from=weights', '--eval_only=True', '--out_dir=out-hf', '--dropout=0').stdout
    assert 'x 64 tokens' in shown and not (workspace.folder / 'out-hf').exists()
    workspace.run('train.py', *arguments, '--init_from=weights', '--out_dir=out-hf')
    losses = [r['val_loss'] for r in workspace.records('out-hf') if 'val_loss' in r]
    assert losses[-1] < losses[0]
    assert torch.load(workspace.folder / 'out-hf' / 'ckpt.pt', weights_only=True)['activation'] == 'gelu_tanh'


def test_a_log_line_has_its_numbers(trained):
    shown = trained.train('out-log', '--max_iters=2').stdout
    lines = [line for line in shown.splitlines() if line.startswith('iter ')]
    record = [r for r in map(json.loads, (trained.folder / 'out-log' / 'metrics.jsonl').read_text().splitlines()) if 'loss' in r][1]
    assert lines[1] == (f'iter 1: loss {record["loss"]:.4f}, {record["ms"]:.1f} ms, {record["tokens_per_second"]:,.0f} tok/s, '
                        f'mfu {record["mfu"]:.1%}, grad {record["grad_norm"]:.2f}, lr {record["lr"]:.1e}, eta 0:00:00')
