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


def test_a_run_for_nanogpt_has_its_optimizer_inside(trained):
    """Loaded as nanoGPT does it, into its two groups of AdamW, it takes the step that the run takes here."""
    from engine import checkpoint, optim, run_folder
    from model import GPT
    trained.run('export.py', 'out-toy', 'for-nanogpt', '--to=nanogpt')
    loaded = torch.load(trained.folder / 'for-nanogpt' / 'ckpt.pt', weights_only=True)
    assert set(loaded) == {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'}
    assert set(loaded['model_args']) == {'block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias'}
    saved, _ = run_folder.load_state(trained.folder / 'out-toy')
    idx, weights = torch.randint(17, (2, 32)), []
    for here in (True, False):
        model = GPT.from_checkpoint(saved)
        if here:
            optimizer = optim.adamw(model, 1e-3, 0.1, (0.9, 0.95))
            optim.load_state_dict(optimizer, torch.amp.GradScaler('cpu', enabled=False), saved)
        else:
            model.load_state_dict(loaded['model'])
            groups = [[p for p in model.parameters() if (p.dim() >= 2) == large] for large in (True, False)]
            optimizer = torch.optim.AdamW([dict(params=groups[0], weight_decay=0.1), dict(params=groups[1], weight_decay=0.0)])
            optimizer.load_state_dict(loaded['optimizer'])
        optim.set_lr(optimizer, 1e-3)
        model(idx, idx)[1].backward()
        optimizer.step()
        weights.append(model.state_dict())
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-6) for name in weights[0])


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
