"""The same run gives the same curve: twice here, and as it was stored in gold.json.

`python tests/test_gold.py` stores the curve of this machine, after a change that is meant to move it.
"""

import json
import platform
import sys
import tempfile
from pathlib import Path

import pytest
import torch

if sys.platform == 'win32':
    pytest.skip('the scripts are started by fork', allow_module_level=True)
sys.path.insert(0, str(Path(__file__).resolve().parent))

import chaos            # noqa: E402

GOLD = Path(__file__).with_name('gold.json')


def build():
    """What the last bits of a sum depend on: PyTorch's version, the processor and its vector width."""
    try:
        names = [line for line in Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
                 if line.startswith(('model name', 'cpu family', 'model\t'))]
        processor = ', '.join(' '.join(line.split()) for line in sorted(set(names)))
    except OSError:
        processor = platform.processor()
    return [torch.__version__, platform.machine(), torch.backends.cpu.get_cpu_capability(), processor]


def curve(out):
    """[iteration, training loss], then [iteration, loss on train, on val] of each evaluation."""
    lines = chaos.read_losses(out)
    return ([[line['iter'], line['loss']] for line in lines if 'loss' in line]
            + [[line['iter'], line['train_loss'], line['val_loss']] for line in lines if 'val_loss' in line])


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    lab = chaos.Lab(tmp_path_factory.mktemp('gold') / 'lab')
    yield lab
    lab.close()


def test_two_runs_are_identical(lab):
    out = lab.new_out()
    assert lab.launchers[0].run('train.py', *lab.flags(out)).code == 0
    lab.compare(out)


def test_curve_is_the_stored_one(lab):
    gold = json.loads(GOLD.read_text(encoding='utf-8'))
    found = curve(lab.reference)
    if gold['build'] == build():
        assert found == gold['curve']
    assert [numbers[0] for numbers in found] == [numbers[0] for numbers in gold['curve']]
    for numbers, stored in zip(found, gold['curve']):
        assert numbers == pytest.approx(stored, rel=1e-4)


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as folder:
        lab = chaos.Lab(Path(folder) / 'lab')
        rows = ',\n'.join(f'  {json.dumps(row)}' for row in curve(lab.reference))
        GOLD.write_text(f'{{"build": {json.dumps(build())},\n "curve": [\n{rows}]}}\n', encoding='utf-8')
        lab.close()
