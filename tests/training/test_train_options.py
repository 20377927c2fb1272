"""Training with options beyond GPT-2 and with Muon, as commands."""

import pytest

FLAGS = ('--zero_init=True', '--n_kv_head=1', '--optimizer=muon')
MACHINE = ('--device=cpu', '--compile=False')


def flags(workspace, out_dir, *more):
    return ['config/model_nanochat.py', *workspace.flags(out_dir), *FLAGS, *more]


def test_a_modern_run_with_muon_resumes_exactly(workspace):
    workspace.run('train.py', *flags(workspace, 'out-modern'))
    workspace.run('train.py', *flags(workspace, 'out-modern-stopped', '--max_iters=10'))
    workspace.run('train.py', '--init_from=resume', '--out_dir=out-modern-stopped',
                  '--max_iters=20', *MACHINE)

    straight = workspace.records('out-modern')
    stopped = workspace.records('out-modern-stopped')
    assert stopped[-1] == straight[-1]
    assert straight[-1]['val_loss'] < 2


def test_a_resumed_run_keeps_its_optimizer_and_may_read_further(workspace):
    workspace.run('train.py', *flags(workspace, 'out-modern-kept', '--max_iters=5'))
    resume = ['train.py', '--init_from=resume', '--out_dir=out-modern-kept', '--max_iters=6',
              *MACHINE]

    result = workspace.run(*resume, '--optimizer=adamw', code=2)
    assert result.stderr.count('\n') == 1
    assert 'trained with optimizer=muon' in result.stderr

    result = workspace.run(*resume, '--block_size=40', '--tied=True')
    assert ('note: the weights have read contexts of 32 tokens, and now read 40'
            in result.stdout)
    assert 'note: tied=True has no effect, the weights have tied=False' in result.stdout


def test_two_ranks_train_a_modern_shape_with_muon_as_one(workspace):
    workspace.run('train.py', *flags(workspace, 'out-modern-one', '--dropout=0'))
    workspace.run('train.py', *flags(workspace, 'out-modern-two', '--dropout=0'), ranks=2)

    records = zip(workspace.records('out-modern-one'), workspace.records('out-modern-two'),
                  strict=True)
    for one, two in records:
        assert two == {key: pytest.approx(value, rel=1e-4) for key, value in one.items()}
