"""The lines of Python in docs/."""

import re

import pytest
import torch.nn.functional as F
from harness import ROOT

PAGES = sorted([*(ROOT / 'docs').glob('*.md'), *(ROOT / 'studies').glob('*.md')])
PYTHON = re.compile(r'^```python\n(.*?)^```', re.DOTALL | re.MULTILINE)
BLOCKS = [(path.name, block) for path in PAGES
          for block in PYTHON.findall(path.read_text(encoding='utf-8'))]


def run(name, words, **smaller):
    """Run the block of a page that has these words, with other numbers in it. Returns its
    variables."""
    (block,) = (block for page, block in BLOCKS if page == name and words in block)
    for old, new in smaller.items():
        assert old in block
        block = block.replace(old, new)
    variables = {}
    exec(compile(block, name, 'exec'), variables)
    return variables


def test_every_block_compiles():
    assert len(BLOCKS) > 4
    for name, block in BLOCKS:
        compile(block, name, 'exec')


@pytest.mark.skipif(not hasattr(F, 'linear_cross_entropy'), reason='not in this PyTorch')
def test_the_losses_that_are_timed_are_equal(capsys):
    smaller = {'1024': '40', '768': '16', '50304': '97'}
    losses = run('benchmarks.md', 'LinearCrossEntropy', **smaller)['losses']
    values = {name: loss().item() for name, loss in losses.items()}
    assert values == pytest.approx(dict.fromkeys(values, values['whole logits']), rel=1e-5)
    assert set(eval(capsys.readouterr().out)) == set(losses)
