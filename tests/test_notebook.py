"""notebooks/quickstart.ipynb, from top to bottom in a kernel of its own."""

import shutil

import pytest
from harness import ROOT, copy_project

pytestmark = pytest.mark.slow           # a kernel imports PyTorch and draws


def texts(cell):
    """What a cell printed; a cell of text has no outputs."""
    return ''.join(output.get('text', '') for output in cell.get('outputs', ()))


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """With a mistake before the training, after which the corrected cell works at once."""
    nbformat = pytest.importorskip('nbformat', reason='nbclient is not installed')
    nbclient = pytest.importorskip('nbclient', reason='nbclient is not installed')
    pytest.importorskip('ipykernel', reason='ipykernel is not installed')
    copy_project(tmp_path)
    shutil.copytree(ROOT / 'notebooks', tmp_path / 'notebooks')
    for name, value in (('ITERATIONS', '20'), ('CONVERSATIONS', '200')):
        monkeypatch.setenv(f'QUICKSTART_{name}', value)

    notebook = nbformat.read(tmp_path / 'notebooks' / 'quickstart.ipynb', as_version=4)
    place = next(i for i, cell in enumerate(notebook.cells) if 'plot.live(' in cell.source)
    mistake = nbformat.v4.new_code_cell(
        'import configurator, train\n'
        "train.main(configurator.configure(vars(train), ['config/train_chat.py', '--n_head=3']))",
        metadata=dict(tags=['raises-exception']))
    notebook.cells.insert(place, mistake)
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources=dict(metadata=dict(path=tmp_path / 'notebooks')))
    client.execute()

    # the mistake is named, and the next cell trains and shows a picture
    error = mistake.outputs[-1]
    assert error.ename == 'UserError' and 'n_head=3' in error.evalue
    training = notebook.cells[place + 1]
    pictures = [output for output in training.outputs if 'image/png' in output.get('data', {})]
    assert len(pictures) == 1
    assert '20 iterations, ' in texts(training)
    assert (tmp_path / 'out-chat' / 'ckpt.pt').exists()

    # the right answers are counted, and questions are answered
    printed = ''.join(texts(cell) for cell in notebook.cells)
    assert 'the greedy continuation equals the answer' in printed
    for cell in notebook.cells[-2:]:
        assert texts(cell).count('---------------') == 1
