import json
import re

import pytest
from harness import script_settings

import bench
from engine.errors import RunError, UserError
from engine.tokenizer import Tokenizer

SMALL = [
    '--device=cpu',
    '--n_layer=2',
    '--n_head=2',
    '--n_embd=32',
    '--block_size=32',
    '--batch_size=4',
    '--vocab_size=50',
    '--warmup_steps=2',
    '--steps=5',
]


def test_figures_agree_with_each_other(workspace):
    shown = workspace.run('bench.py', *SMALL, '--gradient_accumulation_steps=3').stdout
    ms, rate = re.search(r'this project +([\d.]+) ms.*, ([\d,.]+) tokens/s', shown).groups()
    tokens = 3 * 4 * 32
    assert float(rate.replace(',', '')) == pytest.approx(tokens / float(ms) * 1000, rel=0.02)
    assert 0 < float(re.search(r'mfu +([\d.]+)%', shown)[1]) < 100
    assert 0.05 < float(re.search(r'memory +([\d.]+)', shown)[1]) < 5


def test_the_step_is_that_of_training(workspace):
    """On real data, the losses are those that train.py logs at the same constant learning rate."""
    flags = ['--real_data=True', '--dataset=toy', '--warmup_steps=4', '--steps=2']
    shown = workspace.run('bench.py', *SMALL, *flags).stdout
    losses = re.search(r'loss +([\d.]+) first, ([\d.]+) last', shown).groups()
    found = [float(value) for value in losses]

    workspace.train('out-bench', '--dropout=0', '--gradient_accumulation_steps=1', '--batch_size=4',
                    '--max_iters=6', '--learning_rate=1e-4', '--min_lr=1e-4', '--decay_lr=False')
    logged = [r['loss'] for r in workspace.records('out-bench') if 'loss' in r]
    assert found == pytest.approx([logged[0], logged[-1]], abs=1e-4)


@pytest.mark.parametrize('work, dtype', [('train', 'bfloat16'), ('sample', 'float32')])
def test_it_runs_beside_transformers(workspace, work, dtype):
    pytest.importorskip('transformers')
    shown = workspace.run('bench.py', *SMALL, f'--bench={work}', '--compare=transformers',
                          f'--compare_dtype={dtype}', '--dtype=float32', '--prompt_tokens=5',
                          '--new_tokens=20').stdout

    assert f'transformers in {dtype}' in shown
    for name in ('this project', 'transformers'):
        assert float(re.search(rf'^{name} +([\d.]+) ms', shown, re.M)[1]) > 0
    assert re.search(r'ratio +[\d.]+ times', shown)


def test_generation_is_timed_against_the_memory_of_this_machine(workspace):
    shown = workspace.run('bench.py', *SMALL, '--bench=sample', '--prompt_tokens=5',
                          '--new_tokens=20', '--dtype=bfloat16').stdout
    assert re.search(r'this project +[\d.]+ ms.* tokens/s', shown)
    assert re.search(r'weights +[\d.]+ GB/s read, \d+% of', shown)


def test_batches_and_encoding_are_timed(toy, monkeypatch, capsys):
    """Once each: the command encodes 10 MB several times."""
    try:
        Tokenizer()
    except RunError as error:
        pytest.skip(str(error))

    time_interleaved = bench.time_interleaved

    def time_once(functions, warmup, repeats):
        return time_interleaved(functions, 0, 1)
    monkeypatch.setattr(bench, 'time_interleaved', time_once)

    flags = ['--bench=data', '--real_data=True', '--dataset=toy']
    with script_settings(bench, *SMALL, *flags) as overrides:
        bench.main(overrides)
    shown = capsys.readouterr().out
    assert re.search(r'batch +[\d.]+ ms.*GB/s', shown)
    assert shown.count('MB/s of text') == 2


def test_the_trace_is_one_that_a_browser_opens(workspace):
    # a Python of its own, whose PyTorch prints at its start
    result = workspace.run_python('bench.py', *SMALL, '--profile=True')
    assert result.codes == [0]
    assert 'USDT' not in result.stdout + result.stderr

    trace = json.loads((workspace.folder / 'bench-trace.json').read_text())
    names = {event.get('name', '') for event in trace['traceEvents']}
    assert any('scaled_dot_product' in name for name in names)
    assert any('adamw' in name for name in names)


@pytest.mark.parametrize('flags, words', [
    ('--steps=0', 'steps=0 should be at least 1'),
    ('--steps=none', "steps='none' should be a whole number"),
    ('--n_head=7', 'does not divide over n_head=7'),
    ('--dtype=float8', "dtype='float8' is unknown"),
    ('--bench=everything', "bench='everything' should be one of"),
    ('--batchsize=1', 'did you mean batch_size?'),
    ('--real_data=True --dataset=nowhere', "dataset 'nowhere' has no train.bin"),
    ('--compare=gpt4', "compare='gpt4' should be one of"),
    ('--compare_dtype=float32', 'compare_dtype needs --compare=transformers'),
    ('--compare=transformers --bench=sample --new_tokens=1000',
     'cannot go past block_size=1024; try --new_tokens=992'),
])
def test_a_mistake_is_refused(flags, words):
    with pytest.raises(UserError, match=words):
        with script_settings(bench, '--device=cpu', *flags.split()) as overrides:
            bench.main(overrides)
