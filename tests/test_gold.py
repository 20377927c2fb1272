"""The same run gives the same curve: twice here, and as it was stored in gold.json.

`python tests/test_gold.py` stores the curve of this machine, after a change that is meant to move
it.
"""

import json
import platform
import tempfile
from pathlib import Path

import pytest
import torch
from harness import Workspace, read_records

GOLD = Path(__file__).with_name('gold.json')


def describe_build():
    """What the last bits of a sum depend on: PyTorch's version, the processor and its vector
    width."""
    try:
        names = [line for line in Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
                 if line.startswith(('model name', 'cpu family', 'model\t'))]
        processor = ', '.join(' '.join(line.split()) for line in sorted(set(names)))
    except OSError:
        processor = platform.processor()
    capability = torch.backends.cpu.get_cpu_capability()
    return [torch.__version__, platform.machine(), capability, processor]


def read_curve(out_dir):
    """[iteration, training loss], then [iteration, loss on train, on val] of each evaluation."""
    records = read_records(out_dir)
    steps = [[record['iter'], record['loss']] for record in records if 'loss' in record]
    evaluations = [[record['iter'], record['train_loss'], record['val_loss']]
                   for record in records if 'val_loss' in record]
    return steps + evaluations


def test_two_runs_are_identical(lab):
    out_dir = lab.new_out_dir()
    lab.train(out_dir)
    lab.compare(out_dir)


def test_the_curve_is_the_stored_one(trained):
    gold = json.loads(GOLD.read_text(encoding='utf-8'))
    found = read_curve(trained.folder / 'out-toy')
    if gold['build'] == describe_build():
        assert found == gold['curve']
    assert [numbers[0] for numbers in found] == [numbers[0] for numbers in gold['curve']]
    for numbers, stored in zip(found, gold['curve']):
        assert numbers == pytest.approx(stored, rel=1e-4)      # on another processor


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder) / 'workspace')
        workspace.train('out-toy')
        curve = read_curve(workspace.folder / 'out-toy')
        rows = ',\n'.join(f'  {json.dumps(row)}' for row in curve)
        build = json.dumps(describe_build())
        GOLD.write_text(f'{{"build": {build},\n "curve": [\n{rows}]}}\n', encoding='utf-8')
        workspace.close()
