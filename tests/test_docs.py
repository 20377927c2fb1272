"""The blocks of Python in docs/."""

import ast
import importlib
import re

import pytest
import torch
import torch.nn.functional as F
from harness import CHARACTERS, ROOT

from model import GPT


def python_blocks(path):
    """The blocks of Python in a page."""
    text = path.read_text(encoding='utf-8')
    return re.findall(r'^```python\n(.*?)^```', text, re.DOTALL | re.MULTILINE)


PAGES = sorted([*(ROOT / 'docs').glob('*.md'), *(ROOT / 'studies').glob('*.md')])
BLOCKS = [(path.name, block) for path in PAGES for block in python_blocks(path)]


def run(name, words, **smaller):
    """Run the block of a page that has these words, with other numbers. Returns its variables."""
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


@pytest.mark.skipif(not hasattr(F, 'linear_cross_entropy'),
                    reason='this PyTorch has no linear_cross_entropy')
def test_the_losses_that_are_timed_are_equal(capsys):
    smaller = {'1024': '40', '768': '16', '50304': '97'}
    losses = run('benchmarks.md', 'LinearCrossEntropy', **smaller)['losses']
    values = {name: loss().item() for name, loss in losses.items()}
    assert values == pytest.approx(dict.fromkeys(values, values['whole logits']), rel=1e-5)
    assert set(eval(capsys.readouterr().out)) == set(losses)


def test_the_page_on_python_gives_what_it_says(trained):
    out_dir = trained.folder / 'out-toy'
    names = run('python.md', 'load_model', **{'out-shakespeare-char': str(out_dir),
                                              'To be, or not': 'abcdefg'})
    idx = torch.arange(7)[None]
    model = GPT.from_checkpoint(out_dir)
    logits, _ = model(idx[:, :-1], targets=idx[:, 1:])
    losses = F.cross_entropy(logits[0], idx[0, 1:], reduction='none')
    assert torch.equal(names['idx'], idx) and names['loaded'].iter_num == 20
    torch.testing.assert_close(names['of_each_token'][:, 0], -losses.detach())
    assert names['embeddings'].shape == (1, 7, 32)
    assert names['text'].startswith('abcdefg') and len(names['text']) == 107
    assert set(names['text']) <= set(CHARACTERS)


ARCHITECTURE = (ROOT / 'docs' / 'architecture.md').read_text(encoding='utf-8')
FILE = re.compile(r'`([\w/]+\.py)`')


def test_the_map_names_files_that_exist():
    named = set(FILE.findall(ARCHITECTURE)) | set(FILE.findall(
        (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')))
    named -= {'shard_writer.py', '__init__.py', 'data/NAME/prepare.py'}     # not from the top
    assert len(named) > 30
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_the_map_names_functions_that_the_files_have():
    """In `file.py`: `name`, the name is in the file."""
    items = re.findall(r'^\d+\. `([\w/]+\.py)`: (.*)', ARCHITECTURE, re.MULTILINE)
    assert len(items) > 25
    for path, text in items:
        source = (ROOT / path).read_text(encoding='utf-8') if (ROOT / path).is_file() else ''
        first = re.match(r'`([\w.]+)`', text)
        if first and source:
            name = first[1].split('.')[-1]
            assert re.search(rf'(def|class) {name}\b', source), f'{path} has no {name}'


def test_every_name_that_a_page_imports_exists():
    """A page is not run by the other tests, so a renamed function would stay in it."""
    missing = []
    for page, block in BLOCKS:
        for node in ast.walk(ast.parse(block)):
            if not isinstance(node, ast.ImportFrom):
                continue
            if node.module.partition('.')[0] not in ('engine', 'model', 'train', 'studies'):
                continue
            for alias in node.names:
                if not exists(node.module, alias.name):
                    missing.append(f'{page}: {node.module}.{alias.name}')
    assert not missing


def exists(module, name):
    """True where `from module import name` works."""
    try:
        if hasattr(importlib.import_module(module), name):
            return True
        importlib.import_module(f'{module}.{name}')
    except ImportError:
        return False
    return True
