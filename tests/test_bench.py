import json
import re

import pytest

SMALL = ['--device=cpu', '--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32', '--batch_size=4', '--vocab_size=50',
         '--warmup_steps=2', '--steps=5']


def test_figures_agree_with_each_other(workspace):
    shown = workspace.run('bench.py', *SMALL, '--gradient_accumulation_steps=3').stdout
    figures = {key: float(value.replace(',', '')) for key, value in
               re.findall(r'^(time|speed|mfu|memory) +([\d.,]+)', shown, re.MULTILINE)}
    assert figures['speed'] == pytest.approx(3 * 4 * 32 / figures['time'] * 1000, rel=0.02)
    assert 0 < figures['mfu'] < 100 and 0.05 < figures['memory'] < 5


def test_the_step_is_that_of_training(workspace):
    """On real data, the losses are those that train.py logs at the same constant learning rate."""
    shown = workspace.run('bench.py', *SMALL, '--real_data=True', '--dataset=toy', '--warmup_steps=4').stdout
    found = [float(value) for value in re.findall(r'loss ([\d.]+)', shown)]
    workspace.train('out-bench', '--dropout=0', '--gradient_accumulation_steps=1', '--max_iters=4', '--learning_rate=1e-4',
                    '--decay_lr=False')
    assert found == pytest.approx([r['loss'] for r in workspace.records('out-bench') if 'loss' in r], abs=1e-4)


def test_the_trace_is_one_that_a_browser_opens(workspace):
    workspace.run('bench.py', *SMALL, '--profile=True')
    trace = json.loads((workspace.folder / 'bench-trace.json').read_text())
    names = {event.get('name', '') for event in trace['traceEvents']}
    assert any('scaled_dot_product' in name for name in names) and any('adamw' in name for name in names)
