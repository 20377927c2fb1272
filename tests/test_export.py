import pytest
import torch

import export
from engine.errors import RunError, UserError

transformers = pytest.importorskip('transformers')


def test_an_exported_run_computes_what_its_checkpoint_does(trained, tmp_path, capsys):
    from model import GPT
    run, target = trained.folder / 'out-toy', tmp_path / 'new' / 'exported'
    export.main([str(run), str(target)])
    assert capsys.readouterr().out == f'wrote {target}\n'
    reference = transformers.GPT2LMHeadModel.from_pretrained(target)
    model, idx = GPT.from_checkpoint(run), torch.randint(17, (2, 32))
    torch.testing.assert_close(reference(idx).logits, model(idx, idx)[0], rtol=1e-4, atol=1e-5)
    saved = torch.load(run / 'ckpt.pt', weights_only=True)['model']
    assert torch.equal(reference.transformer.wte.weight, saved['transformer.wte.weight'])


def test_the_command_writes_the_folder(trained):
    result = trained.run('export.py', 'out-toy', 'exported')
    assert result.stdout == 'wrote exported\n' and {p.name for p in (trained.folder / 'exported').iterdir()} >= {
        'config.json', 'model.safetensors'}


def test_a_failure_leaves_no_folder(trained, tmp_path, monkeypatch):
    def fail(self, folder):
        folder.mkdir()
        (folder / 'model.safetensors').write_bytes(b'half')
        raise Exception('SafetensorError: No space left')       # of a class of its own
    monkeypatch.setattr(transformers.GPT2LMHeadModel, 'save_pretrained', fail)
    with pytest.raises(RunError, match='exported was not written .*No space left'):
        export.main([str(trained.folder / 'out-toy'), str(tmp_path / 'exported')])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('folders, words', [
    ([], 'name a run and the folder to write'), (['out'], 'name a run and the folder to write'),
    (['out', 'taken'], 'taken exists already; name a new folder'), (['out', 'file'], 'file exists already'),
    (['out', 'new'], 'ckpt.pt does not exist; train first')])
def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch, folders, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'taken').mkdir()
    (tmp_path / 'taken' / 'weights').write_text('precious')
    (tmp_path / 'file').write_text('precious')
    with pytest.raises(UserError, match=words):
        export.main(folders)
    assert sorted(p.name for p in tmp_path.rglob('*')) == ['file', 'taken', 'weights']
