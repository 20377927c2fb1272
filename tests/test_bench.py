import json
import re

import pytest

SMALL = ['--device=cpu', '--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32', '--batch_size=4', '--vocab_size=50',
         '--warmup_steps=2', '--steps=5']


def test_figures_agree_with_each_other(workspace):
    shown = workspace.run('bench.py', *SMALL, '--gradient_accumulation_steps=3').stdout
    ms, rate = re.search(r'ours +([\d.]+) ms.*, ([\d,.]+) tokens/s', shown).groups()
    assert float(rate.replace(',', '')) == pytest.approx(3 * 4 * 32 / float(ms) * 1000, rel=0.02)
    assert 0 < float(re.search(r'mfu +([\d.]+)%', shown)[1]) < 100
    assert 0.05 < float(re.search(r'memory +([\d.]+)', shown)[1]) < 5


def test_the_step_is_that_of_training(workspace):
    """On real data, the losses are those that train.py logs at the same constant learning rate."""
    shown = workspace.run('bench.py', *SMALL, '--real_data=True', '--dataset=toy', '--warmup_steps=4', '--steps=2').stdout
    found = [float(value) for value in re.search(r'loss +([\d.]+) first, ([\d.]+) last', shown).groups()]
    workspace.train('out-bench', '--dropout=0', '--gradient_accumulation_steps=1', '--max_iters=6', '--learning_rate=1e-4',
                    '--decay_lr=False')
    logged = [r['loss'] for r in workspace.records('out-bench') if 'loss' in r]
    assert found == pytest.approx([logged[0], logged[-1]], abs=1e-4)


@pytest.mark.parametrize('what, theirs', [('train', 'bfloat16'), ('sample', 'float32')])
def test_it_runs_beside_transformers(workspace, what, theirs):
    pytest.importorskip('transformers')
    shown = workspace.run('bench.py', *SMALL, f'--bench={what}', '--compare=transformers', f'--compare_dtype={theirs}',
                          '--dtype=float32', '--prompt_tokens=5', '--new_tokens=20').stdout
    assert f'transformers in {theirs}' in shown
    ours, theirs = (float(re.search(rf'{name} +([\d.]+) ms', shown)[1]) for name in ('ours', 'theirs'))
    assert ours > 0 and theirs > 0 and re.search(r'ratio +[\d.]+ times', shown)


def test_batches_and_encoding_are_timed(workspace):
    import tiktoken
    try:
        tiktoken.get_encoding('gpt2')
    except Exception as error:
        pytest.skip(f"GPT-2's encoding cannot be had: {error}")
    shown = workspace.run('bench.py', *SMALL, '--bench=data', '--real_data=True', '--dataset=toy').stdout
    assert re.search(r'batch +[\d.]+ ms.*GB/s', shown) and shown.count('MB/s of text') == 2


def test_the_trace_is_one_that_a_browser_opens(workspace):
    workspace.run('bench.py', *SMALL, '--profile=True')
    trace = json.loads((workspace.folder / 'bench-trace.json').read_text())
    names = {event.get('name', '') for event in trace['traceEvents']}
    assert any('scaled_dot_product' in name for name in names) and any('adamw' in name for name in names)
