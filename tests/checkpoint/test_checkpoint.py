"""The files of a run, from and to nanoGPT's tools.

Faults while they are written are in test_faults.py.
"""

import errno
import itertools
import os
import pickle
import shlex
import struct
import sys
import zipfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import script_settings

import train as train_script
from engine.checkpoint import gathered, load_model, run_folder
from engine.checkpoint import sharded as sharded_checkpoint
from engine.checkpoint.contents import STATE_NEEDS, Checkpoint
from engine.distributed import Environment
from engine.errors import RunError, UserError
from engine.training import optim
from model import GPT, GPTConfig

SHAPE = dict(block_size=16, vocab_size=17, n_layer=2, n_head=2, n_embd=32)
FILES = ('state.pt', 'state.prev.pt', 'ckpt.pt')


def new_optimizer(model):
    return optim.adamw(model, 1e-2, 0.1, (0.9, 0.95))


def trained_gpt(steps=3, **changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SHAPE, **changes}))
    optimizer = new_optimizer(model)
    train(model, optimizer, steps)
    return model, optimizer


def train(model, optimizer, steps):
    idx = torch.arange(32).view(2, 16) % 17
    for _ in range(steps):
        model(idx, idx.roll(-1, 1))[1].backward()
        optimizer.step()
        optimizer.zero_grad()


def same_weights(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def scaler():
    return torch.amp.GradScaler('cpu', enabled=False)


def save_model(folder, model, iter_num=7, **rest):
    contents = dict(model.to_checkpoint(), iter_num=iter_num, best_val_loss=1.5, **rest)
    gathered.write(folder / gathered.MODEL, contents)


def save_state(folder, model, optimizer, iter_num=3):
    contents = dict(
        model.to_checkpoint(),
        optimizer=optimizer.state_dict(), scaler=scaler().state_dict(),
        iter_num=iter_num,
        best_val_loss=2.5,
        fingerprint='f',
        config={'dataset': 'toy'},
    )
    gathered.write(folder / gathered.STATE, contents, keep_as=gathered.PREVIOUS)


# What comes back

def test_a_restored_run_goes_on_as_an_uninterrupted_one(tmp_path):
    model, optimizer = trained_gpt()
    save_state(tmp_path, model, optimizer)
    train(model, optimizer, 4)

    saved, notes = run_folder.load_state(tmp_path)
    assert saved.iter_num == 3
    assert saved.best_val_loss == 2.5
    assert saved.fingerprint == 'f'
    assert notes == []

    restored = GPT.from_checkpoint(saved)
    optimizer = new_optimizer(restored)
    optim.load_state_dict(optimizer, scaler(), saved)
    train(restored, optimizer, 4)

    assert same_weights(model, restored)


def test_a_loaded_model_does_not_depend_on_its_file(tmp_path):
    model, optimizer = trained_gpt()
    save_state(tmp_path, model, optimizer)
    restored = GPT.from_checkpoint(run_folder.load_state(tmp_path)[0])
    with open(tmp_path / 'state.pt', 'r+b') as file:            # in place, which a save never does
        file.write(bytes(file.seek(0, 2) and 100000))
    assert same_weights(model, restored)


def test_ckpt_has_nanogpts_keys_and_nothing_else_in_model_args(tmp_path):
    model, _ = trained_gpt(steps=0)
    save_model(tmp_path, model, config={}, tokenizer={})
    saved = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    assert {'model', 'model_args', 'iter_num', 'best_val_loss', 'config'} <= saved.keys()
    assert saved['model_args'] == dict(SHAPE, dropout=0.0, bias=True)
    assert 'transformer.h.1.mlp.c_proj.weight' in saved['model']


# The keys of the files that are already on people's disks, in their order
OF_CKPT = ('activation', 'model_args', 'model', 'iter_num', 'sequences', 'tokens', 'best_val_loss',
           'best_iter', 'last_eval', 'wandb_id', 'config', 'tokenizer', 'fingerprint', 'dtype')


@pytest.mark.parametrize('keys', [OF_CKPT, (*OF_CKPT, 'optimizer', 'scaler')])
def test_a_checkpoint_is_written_with_the_keys_that_files_have(keys):
    """In their order. What a file says comes back unchanged, None too."""
    model, optimizer = trained_gpt()
    values = dict(
        model.to_checkpoint(),
        iter_num=3, sequences=12, tokens=192, best_val_loss=2.5, best_iter=2,
        last_eval=None, wandb_id=None,
        config={'dataset': 'toy'}, tokenizer={'tokenizer': 'char'}, fingerprint='f',
        dtype='float32',
        optimizer=optimizer.state_dict(), scaler={},
    )
    payload = {key: values[key] for key in keys}
    also_needed = [key for key in STATE_NEEDS if key in keys]
    checkpoint = Checkpoint.from_payload(payload, 'a file', also_needed)
    assert checkpoint.path == 'a file'

    again = checkpoint.to_payload()
    assert tuple(again) == keys
    weights = again.pop('model')
    for name, value in payload.pop('model').items():
        assert torch.equal(weights[name], value)
    assert again == payload


def test_a_field_that_a_file_lacks_is_none():
    model, _ = trained_gpt(0)
    weights = model.state_dict()
    checkpoint = Checkpoint.from_payload(
        dict(model=weights, model_args=SHAPE, iter_num=3, best_val_loss=2.5, unknown=1), 'a file')
    for name in ('activation', 'sequences', 'tokens', 'best_iter', 'config', 'tokenizer',
                 'fingerprint', 'dtype', 'optimizer', 'scaler', 'shards_folder', 'stands_in_for'):
        assert getattr(checkpoint, name) is None


def test_a_checkpoint_of_nanogpt_resumes_with_its_optimizer(tmp_path):
    """As its tools write it: compiled names, attention masks, the loss as a tensor, plain AdamW."""
    model, _ = trained_gpt(0, bias=False)
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{'params': decay, 'weight_decay': 0.1}, {'params': rest, 'weight_decay': 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    train(model, optimizer, 3)
    weights = {f'_orig_mod.{name}': value for name, value in model.state_dict().items()}
    weights['_orig_mod.transformer.h.0.attn.bias'] = torch.ones(1, 1, 16, 16).tril()
    contents = dict(
        model=weights,
        optimizer=optimizer.state_dict(),
        iter_num=3,
        best_val_loss=torch.tensor(2.5),
        model_args=dict(SHAPE, dropout=0.0, bias=False),
        config=dict(dataset='shakespeare_char', batch_size=12),
    )
    torch.save(contents, tmp_path / 'ckpt.pt')

    saved, notes = run_folder.load_state(tmp_path)
    assert 'with the optimizer inside' in notes[0] and saved.best_val_loss == 2.5
    restored = GPT.from_checkpoint(saved)
    assert restored.config.activation == 'gelu'

    fused = new_optimizer(restored)
    optim.load_state_dict(fused, scaler(), saved)
    train(model, optimizer, 5)
    train(restored, fused, 5)
    for a, b in zip(model.parameters(), restored.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_model_alone_resumes_without_an_optimizer(tmp_path):
    model, _ = trained_gpt()
    save_model(tmp_path, model)
    saved, notes = run_folder.load_state(tmp_path)
    assert saved.iter_num == 7 and 'without optimizer state, which starts afresh' in notes[0]


def test_the_activation_of_gpt2_survives(tmp_path):
    model, _ = trained_gpt(activation='gelu_tanh')
    save_model(tmp_path, model)
    restored = GPT.from_checkpoint(tmp_path)
    assert restored.config == model.config and same_weights(model, restored)


def test_the_newest_model_of_a_run_that_was_stopped_early_is_its_state(tmp_path):
    model, optimizer = trained_gpt()
    save_state(tmp_path, model, optimizer)
    assert same_weights(model, GPT.from_checkpoint(run_folder.newest_checkpoint(tmp_path)))
    newer, _ = trained_gpt(5)
    save_model(tmp_path, newer, iter_num=5)
    assert run_folder.newest_checkpoint(tmp_path).iter_num == 5


def test_a_damaged_state_falls_back_to_the_one_before_which_the_next_save_keeps(tmp_path):
    model, optimizer = trained_gpt()
    for iter_num in (5, 10):
        save_state(tmp_path, model, optimizer, iter_num)
    cut = (tmp_path / 'state.pt').read_bytes()[:5000]
    (tmp_path / 'state.pt').write_bytes(cut)

    saved, notes = run_folder.load_state(tmp_path)
    assert saved.iter_num == 5 and len(notes) == 1 and str(tmp_path / 'state.pt') in notes[0]

    run_folder.clean_out_dir(tmp_path, saved)
    save_state(tmp_path, model, optimizer, 15)
    assert run_folder.load_state(tmp_path)[0].iter_num == 15
    assert gathered.read(tmp_path / 'state.prev.pt')['iter_num'] == 5
    assert (tmp_path / 'state.damaged.pt').read_bytes() == cut


def test_a_new_run_removes_the_files_of_the_one_that_it_replaces(tmp_path):
    kept = ('ckpt_001000.pt', 'ckpt_001000.pt.tmp', 'ckpt_1000000.pt')
    scores = ('eval.json', 'ckpt_001000.eval.json')
    for name in (*FILES, *kept, *scores, 'state.pt.tmp', 'ckpt.pt.tmp', 'notes.txt',
                 'ckpt_mine.pt'):
        (tmp_path / name).write_text('')
    run_folder.clean_out_dir(tmp_path, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['ckpt_mine.pt', 'notes.txt']


def test_a_new_run_removes_no_kept_model_unless_it_is_told_to(tmp_path):
    (tmp_path / 'ckpt_001000.pt').write_text('')
    env = Environment(torch.device('cpu'), 'float32', False, 0, 0, 1, '')
    for init_from in ('scratch', 'auto'):
        with pytest.raises(UserError, match='holds kept models, such as ckpt_001000.pt; move'):
            run_folder.open_run(tmp_path, init_from, False, False, env)
    assert run_folder.open_run(tmp_path, 'scratch', True, False, env).state is None


def test_a_resumed_run_leaves_kept_models_and_removes_half_written_ones(tmp_path):
    for name in ('ckpt_001000.pt', 'ckpt_002000.pt.tmp', 'ckpt_mine.pt.tmp'):
        (tmp_path / name).write_text('')
    run_folder.clean_out_dir(tmp_path, Checkpoint(model_args={}))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ['ckpt_001000.pt', 'ckpt_mine.pt.tmp']


def test_a_kept_model_is_read_by_its_name(tmp_path):
    model, _ = trained_gpt()
    gathered.write(tmp_path / 'ckpt_001000.pt', dict(
        model.to_checkpoint(), iter_num=1000, best_val_loss=2.5))
    later, _ = trained_gpt(5)
    save_model(tmp_path, later, iter_num=2000)
    assert same_weights(model, GPT.from_checkpoint(tmp_path / 'ckpt_001000.pt'))
    assert same_weights(later, GPT.from_checkpoint(tmp_path))
    with pytest.raises(UserError, match='has no ckpt_003000.pt; it keeps ckpt_001000.pt$'):
        GPT.from_checkpoint(tmp_path / 'ckpt_003000.pt')

    # other scripts and other runs begin with it
    assert run_folder.find_run(str(tmp_path / 'ckpt_001000.pt')) == tmp_path / 'ckpt_001000.pt'
    assert run_folder.find_run(str(tmp_path / 'ckpt_003000.pt')) is None
    assert run_folder.find_run(str(tmp_path / 'ckpt.pt')) == tmp_path


@pytest.mark.parametrize('name, values, line', [
    ('ckpt.pt', dict(iter_num=2000, last_eval=2000, last_val_loss=1.5, best_iter=2000),
     'the last model, iteration 2,000, val loss 1.5000'),
    ('ckpt.pt', dict(iter_num=2000, last_eval=2000, last_val_loss=1.75, best_iter=1000),
     'the last model, iteration 2,000, val loss 1.7500; best val loss 1.5000 at iteration 1,000'),
    ('ckpt.pt', dict(iter_num=2000, last_eval=2000, last_val_loss=1.5, best_iter=2000,
                     config=dict(always_save_checkpoint=False)),
     'the best model, iteration 2,000, val loss 1.5000'),
    ('state.pt', dict(iter_num=2007, last_eval=2000, last_val_loss=1.5, best_iter=2000,
                      config=dict(always_save_checkpoint=False)),
     'the last model, iteration 2,007, val loss 1.5000 at iteration 2,000'),
    ('ckpt_001000.pt', dict(iter_num=1000, last_eval=1000, last_val_loss=1.5, best_iter=1000),
     'a kept model, iteration 1,000, val loss 1.5000'),
    ('ckpt.pt', dict(iter_num=2000), 'the last model, iteration 2,000; best val loss 1.5000'),
    ('ckpt.pt', dict(best_val_loss=None), 'the last model')])
def test_a_line_says_which_model_is_read(name, values, line):
    saved = Checkpoint(**dict(dict(model_args={}, best_val_loss=1.5, path=f'out/{name}'), **values))
    assert load_model.describe_model(saved) == f'out/{name}: {line}'


def test_power_loss_at_any_point_of_a_save(tmp_path, monkeypatch):
    """After a loss of power, only what was synced is sure to be on disk. Of the renames since then,
    any number may have reached it, in their order. Each such folder loads as the state before or
    the new one."""
    model, optimizer = trained_gpt()
    for iter_num in (5, 10):
        save_state(tmp_path, model, optimizer, iter_num)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    renames = []
    replace = os.replace

    def noted_replace(old, new):
        renames.append((Path(old).name, Path(new).name))
        replace(old, new)
    monkeypatch.setattr(os, 'replace', noted_replace)
    save_state(tmp_path, model, optimizer, 15)
    new = (tmp_path / 'state.pt').read_bytes()
    assert renames == [('state.pt', 'state.prev.pt'), ('state.pt.tmp', 'state.pt')]

    lengths = (0, len(new) // 2, len(new))
    for done, length in itertools.product(range(len(renames) + 1), lengths):
        if done and length < len(new):
            continue                            # the file was synced before the first rename

        disk = dict(before, **{'state.pt.tmp': new[:length]})
        for old, name in renames[:done]:
            disk[name] = disk.pop(old)

        for path in tmp_path.iterdir():
            path.unlink()
        for name, data in disk.items():
            (tmp_path / name).write_bytes(data)

        state, _ = run_folder.load_state(tmp_path)
        assert state.iter_num == (15 if done == 2 else 10)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_what_is_not_finite_is_neither_saved_nor_loaded(tmp_path, value):
    model, optimizer = trained_gpt()
    save_state(tmp_path, model, optimizer)
    before = (tmp_path / 'state.pt').read_bytes()

    moment = optimizer.state[model.transformer.wpe.weight]['exp_avg_sq']
    moment[0, 0] = value
    with pytest.raises(RunError, match='optimizer state 1 exp_avg_sq is not finite'):
        save_state(tmp_path, model, optimizer)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [('state.pt', before)]

    moment[0, 0] = 0
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = value
    torch.save(dict(model.to_checkpoint(), iter_num=3, best_val_loss=2.5), tmp_path / 'ckpt.pt')
    words = 'ckpt.pt cannot be used: model transformer.ln_f.weight is not finite'
    with pytest.raises(UserError, match=words):
        gathered.read_ckpt(tmp_path)


@pytest.mark.parametrize('number, advice', [
    (errno.ENOSPC, 'make room, and go on with'),
    (errno.EROFS, 'mount that disk for writing, and go on with'),
    (errno.EIO, 'mend that, and go on with'),
])
def test_a_failed_save_says_what_to_do(tmp_path, monkeypatch, number, advice):
    def fail(descriptor):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(RunError, match=f'{os.strerror(number)}.*; {advice} --init_from=auto'):
        save_state(tmp_path, *trained_gpt(0))


def test_a_folder_that_is_gone_is_one_plain_failure(tmp_path):
    with pytest.raises(RunError, match='nowhere was deleted during the run'):
        save_state(tmp_path / 'nowhere', *trained_gpt(0))


# Damaged and hostile files

class Evil:
    """Unpickling it would create a file."""

    def __reduce__(self):
        return os.system, ('touch ran',)


@pytest.fixture(scope='module')
def stopped_run(tmp_path_factory):
    """The three files of a run, each with an optimizer, as PyTorch itself loads them."""
    folder = tmp_path_factory.mktemp('stopped')
    model, optimizer = trained_gpt()
    save_state(folder, model, optimizer)
    return {name: (folder / 'state.pt').read_bytes() for name in FILES}


@pytest.fixture
def out_dir(stopped_run, tmp_path, monkeypatch):
    for name, content in stopped_run.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)                         # where Evil would create its file
    return tmp_path


def replaced_by(content):
    """Every file replaced by `content`, or by what that makes of a file's bytes."""
    def spoil(folder):
        for name in FILES:
            path = folder / name
            if callable(content):
                path.write_bytes(content(path.read_bytes()))
            else:
                path.write_bytes(content)
    return spoil


def changed(change):
    """Every file as PyTorch writes it after `change(payload)`."""
    def spoil(folder):
        payload = torch.load(folder / 'state.pt', weights_only=True)
        result = change(payload)
        if result is None:                              # changed in place
            result = payload
        torch.save(result, folder / 'state.pt')
        replaced_by((folder / 'state.pt').read_bytes())(folder)
    return spoil


def without(key):
    return changed(lambda payload: payload.pop(key) and None)


def with_value(key, value):
    return changed(lambda payload: payload.update({key: value}))


def with_argument(**values):
    return changed(lambda payload: payload['model_args'].update(values))


def with_weight(value):
    return changed(lambda payload: payload['model'].update({'transformer.wte.weight': value}))


def flipped_bit(folder):
    """In the middle of the largest tensor."""
    with zipfile.ZipFile(folder / 'state.pt') as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    data = bytearray((folder / 'state.pt').read_bytes())
    data[largest.header_offset + largest.file_size // 2] ^= 4
    replaced_by(bytes(data))(folder)


def compressed(folder):
    """One entry is compressed, which PyTorch never does: a few kB can unpack to GiB."""
    with zipfile.ZipFile(folder / 'new', 'w') as archive:
        with zipfile.ZipFile(folder / 'state.pt') as old:
            for entry in old.infolist():
                kind = zipfile.ZIP_STORED
                if entry.filename.endswith('data.pkl'):
                    kind = zipfile.ZIP_DEFLATED
                archive.writestr(entry.filename, old.read(entry), kind)
    replaced_by((folder / 'new').read_bytes())(folder)


def forged_size(folder):
    """The archive's directory claims that an entry has 3 GiB."""
    data = bytearray((folder / 'state.pt').read_bytes())
    entry = data.rindex(b'PK\x01\x02')                  # the last record of the central directory
    data[entry + 24:entry + 28] = (3 << 30).to_bytes(4, 'little')
    replaced_by(bytes(data))(folder)


def contains_itself(payload):
    payload['config'] = loop = {}
    loop['config'] = [loop]


DAMAGED = {
    'cut': (replaced_by(lambda content: content[:5000]), 'not a PyTorch checkpoint, or truncated'),
    'one bit': (flipped_bit, 'fails its checksum'),
    'empty': (replaced_by(b''), 'truncated'),
    'text': (replaced_by(b'a plain text\n' * 99), 'not a PyTorch checkpoint'),
    'pickle': (replaced_by(pickle.dumps(Evil())), 'cannot be read'),
    'code': (changed(lambda payload: {'model': Evil()}), r'it asks to run \w+.system'),
    'pointer': (replaced_by(b'version https://git-lfs.github.com/spec/v1\noid'),
                'it is a pointer of Git LFS; run `git lfs pull`'),
    'weights alone': (changed(lambda payload: payload['model']), 'it holds weights alone; .*'
                      'name it pytorch_model.bin, put its config.json beside it'),
    'list': (changed(lambda payload: [1, 2]), 'it holds a list, not a checkpoint'),
    'tensor': (changed(lambda payload: torch.zeros(3)), 'it holds a Tensor, not a checkpoint'),
    'no model_args': (without('model_args'), 'lacks model_args'),
    'model_args is None': (with_value('model_args', None), 'lacks model_args'),
    'dtype is a number': (with_value('dtype', 16), 'its dtype is a int, not a str'),
    'model is a list': (with_value('model', [1]), 'its model is not a dict of named weights'),
    'model_args is text': (with_value('model_args', 'gpt2'), 'its model_args is a str, not a dict'),
    'iter_num': (with_value('iter_num', -5), 'iter_num=-5'),
    'best_val_loss': (with_value('best_val_loss', float('nan')), 'best_val_loss=nan'),
    'config is text': (with_value('config', 'hello'), 'its config is a str, not a dict'),
    'layers': (with_argument(n_layer=10 ** 9), 'n_layer=1000000000 should be'),
    'too many layers': (with_argument(n_layer=90), 'the weights have 2 layers, the settings 90'),
    'channels': (with_argument(n_embd=2 ** 40), 'n_embd=1099511627776 should be'),
    'positions': (with_argument(block_size=2 ** 62), 'block_size=4611686018427387904 should be'),
    'wider': (with_argument(n_embd=2 ** 17), 'weight lm_head.weight'),
    'heads': (with_argument(n_head='4'), "n_head='4' should be a whole number"),
    'unknown argument': (with_argument(wings=2), 'wings'),
    'a number a trillion times': (with_weight(torch.zeros(1).expand(10 ** 6, 10 ** 6)),
                                  'its tensors are larger than the file'),
    'shape': (with_weight(torch.zeros(5, 5)),
              r'weight transformer.wte.weight: \(5, 5\) in the file, \(17, 32\) in the model'),
    'meta tensor': (with_weight(torch.empty(17, 32, device='meta')),
                    'a type that no checkpoint needs'),
    'sparse tensor': (with_weight(torch.eye(3).to_sparse()), 'a type that no checkpoint needs'),
    'compressed': (compressed, 'its contents are larger than the file'),
    'forged size': (forged_size, 'its contents are larger than the file'),
}


@pytest.mark.parametrize('load', ['train', 'sample'])
@pytest.mark.parametrize('damage', DAMAGED)
def test_a_damaged_file_is_refused_and_never_executed(out_dir, load, damage):
    """By what train.py and sample.py load with; each refusal names the file."""
    spoil, words = DAMAGED[damage]
    spoil(out_dir)
    with pytest.raises(UserError, match=words) as refused:
        if load == 'train':
            saved, _ = run_folder.load_state(out_dir)
        else:
            saved = run_folder.newest_checkpoint(out_dir)
        GPT.from_checkpoint(saved)

    file = {'train': 'state.pt', 'sample': 'ckpt.pt'}[load]
    assert str(out_dir / file) in str(refused.value)
    assert not (out_dir / 'ran').exists()


@pytest.mark.parametrize('key', ['iter_num', 'best_val_loss'])
def test_a_model_needs_no_progress_and_a_run_does(out_dir, key):
    """Some tools write neither. sample.py and export.py read the model."""
    without(key)(out_dir)
    saved = run_folder.newest_checkpoint(out_dir)
    assert getattr(saved, key) is None
    assert GPT.from_checkpoint(saved).config.n_layer == 2

    words = f'lacks {key}; no run can go on from it; sample.py and export.py do without'
    with pytest.raises(UserError, match=words):
        run_folder.load_state(out_dir)
    for name in ('state.pt', 'state.prev.pt'):
        (out_dir / name).unlink()
    with pytest.raises(UserError, match=words):         # of ckpt.pt alone
        run_folder.load_state(out_dir)


def test_a_payload_that_contains_itself_is_read(out_dir):
    """And ends nowhere in a loop."""
    changed(contains_itself)(out_dir)
    assert GPT.from_checkpoint(run_folder.load_state(out_dir)[0]).config.n_layer == 2


def test_tokenizer_of_another_type_is_refused(out_dir):
    with_value('tokenizer', ['a'])(out_dir)
    with pytest.raises(UserError, match='ckpt.pt: its tokenizer is a list, not a dict'):
        gathered.read_ckpt(out_dir)


def test_no_file_says_where_its_tensors_are_or_what_to_move_away(out_dir, tmp_path):
    """Only a state folder is read as one, and only a damaged state is moved away."""
    for name in ('ckpt.pt', 'state.pt'):
        content = torch.load(out_dir / name, weights_only=True)
        elsewhere = str(tmp_path / 'elsewhere')
        content.update(shards_folder=elsewhere, stands_in_for='ckpt.pt')
        torch.save(content, out_dir / name)

    state, notes = run_folder.load_state(out_dir)
    assert state.shards_folder is None and state.stands_in_for is None and not notes
    model = run_folder.newest_checkpoint(out_dir)
    assert model.shards_folder is None and model.stands_in_for is None

    for name in ('state.pt', 'state.prev.pt'):
        (out_dir / name).unlink(missing_ok=True)
    state, _ = run_folder.load_state(out_dir)           # of ckpt.pt alone
    assert state.shards_folder is None and state.stands_in_for is None
    run_folder.clean_out_dir(out_dir, state)
    assert (out_dir / 'ckpt.pt').exists()


@pytest.mark.parametrize('kept', ['state.pt', 'state.prev.pt', None])
def test_a_damaged_model_names_the_state_that_is_read_without_it(tmp_path, kept):
    model, optimizer = trained_gpt()
    save_state(tmp_path, model, optimizer)
    os.replace(tmp_path / 'state.pt', tmp_path / (kept or 'elsewhere.pt'))
    (tmp_path / 'ckpt.pt').write_bytes(b'damaged')

    with pytest.raises(UserError, match='ckpt.pt cannot be read') as refused:
        run_folder.newest_checkpoint(tmp_path)
    assert ('move it away' in str(refused.value)) == bool(kept)

    if kept:
        assert str(refused.value).endswith(f'; move it away, and {kept} is read')
        (tmp_path / 'ckpt.pt').unlink()
        saved = run_folder.newest_checkpoint(tmp_path)
        assert same_weights(model, GPT.from_checkpoint(saved))


def test_no_run_is_told_from_a_damaged_one(tmp_path):
    with pytest.raises(UserError, match='holds no run to resume'):
        run_folder.load_state(tmp_path)
    with pytest.raises(UserError, match='ckpt.pt does not exist; train first'):
        run_folder.newest_checkpoint(tmp_path)

    (tmp_path / 'state.prev.pt').write_bytes(b'')
    words = r'no state to resume: .*state.pt is missing; .*state.prev.pt cannot be read'
    with pytest.raises(UserError, match=words):
        run_folder.load_state(tmp_path)


# Numbers of numpy, objects of a class

class BigEndian:
    """Unpickling it makes a number of numpy from the bytes of a machine with the other order."""

    def __reduce__(self):
        return np._core.multiarray.scalar, (np.dtype('>f8'), struct.pack('>d', 2.5))


@pytest.mark.parametrize('number', [
    np.float64(2.5), np.float32(2.5), np.float16(2.5), np.int64(-3), np.uint8(200), np.int32(7),
    np.bool_(True), BigEndian(),
], ids=lambda number: type(number).__name__)
def test_a_number_of_numpy_is_read_as_pythons_own(out_dir, number):
    with_value('config', {'here': number})(out_dir)
    found = run_folder.newest_checkpoint(out_dir).config['here']
    expected = number.item() if isinstance(number, np.generic) else 2.5
    assert type(found) is type(expected)
    assert found == expected


def test_a_loss_of_numpy_resumes(out_dir):
    with_value('best_val_loss', np.float64(2.25))(out_dir)
    assert run_folder.load_state(out_dir)[0].best_val_loss == 2.25


class OfNumpy:
    """Unpickling it calls numpy's function that makes a scalar, with any arguments."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return np._core.multiarray.scalar, self.arguments


@pytest.mark.parametrize('value', [
    np.str_('text'),
    np.complex128(1j),
    OfNumpy(np.dtype('O'), [1, 2]),
    OfNumpy(np.dtype('f8'), b'1234'),                   # too short
    OfNumpy(np.dtype('f8'), 'text'),
    OfNumpy('f8', bytes(8)),
    OfNumpy(np.dtype([('a', 'f8')]), bytes(8)),
], ids=range(7))
def test_no_other_value_of_numpy_is_read(out_dir, value):
    with_value('config', {'here': value})(out_dir)
    with pytest.raises(UserError, match='ckpt.pt cannot be read: it ') as refused:
        run_folder.newest_checkpoint(out_dir)
    assert '\n' not in str(refused.value)


@pytest.mark.parametrize('path', ['/data/out', 'out', '.', '/'])
def test_a_path_is_read_as_its_text(out_dir, path):
    """Some trainers keep out_dir as an object of pathlib."""
    with_value('config', {'here': Path(path)})(out_dir)
    found = run_folder.newest_checkpoint(out_dir).config['here']
    assert type(found) is str
    assert Path(found) == Path(path)


class OfPathlib:
    """Unpickling it makes a path of any parts."""

    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        return type(Path()), self.parts


@pytest.mark.parametrize('path', [Path('a' * 201), OfPathlib(*'a' * 101), OfPathlib(['a'])])
def test_a_path_that_is_no_short_text_is_refused(out_dir, path):
    with_value('config', {'here': path})(out_dir)
    with pytest.raises(UserError, match='it holds a path that is no text of at most 200'):
        run_folder.newest_checkpoint(out_dir)


@dataclass
class GPTConfig2:
    """The configuration of a model as other trainers pickle it into their checkpoints."""
    block_size: int = 16
    vocab_size: int = 17
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 32


@pytest.mark.parametrize('config, has_args', [
    (GPTConfig2(), False),                              # the shape of the model
    (SimpleNamespace(dataset='toy', eval_iters=9), True),       # the settings of the run
])
def test_the_command_that_saves_a_pickled_config_again(tmp_path, monkeypatch, config, has_args):
    """It is in the refusal, and it runs no code of the file, which may have numbers of numpy."""
    model, _ = trained_gpt()
    payload = dict(model=model.state_dict(), config=config, val_loss=np.float32(3.07),
                   best_val_loss=np.float64(2.5), iter_num=np.int64(7))
    if has_args:
        payload['model_args'] = SHAPE
    path = tmp_path / 'a run' / 'ckpt.pt'
    path.parent.mkdir()
    torch.save(payload, path)
    with pytest.raises(UserError, match='to save it again as plain values, type: ') as refused:
        gathered.read_ckpt(path.parent)

    python, option, program, argument = shlex.split(str(refused.value).split('type: ')[1])
    assert (python, option, argument) == ('python', '-c', str(path))
    monkeypatch.setattr(sys, 'argv', ['-c', argument])
    try:
        exec(program, {})
    finally:
        torch.serialization.clear_safe_globals()

    saved = gathered.read_ckpt(path.parent)
    assert same_weights(model, GPT.from_checkpoint(saved))
    assert saved.config == vars(config)
    assert (saved.best_val_loss, saved.iter_num) == (2.5, 7)
    assert [file.name for file in path.parent.iterdir()] == ['ckpt.pt']


# Several ranks

class OtherRank:
    """A rank that learns what rank 0 chose: (path of the state or None, notes)."""
    is_main = False

    def __init__(self, path, notes):
        self.choice = (path and str(path), notes)

    def all_gather(self, value):
        return [self.choice, value]

    def raise_on_all_ranks(self):
        return nullcontext()


def test_every_rank_reads_the_state_that_rank_0_chose(tmp_path):
    """Even where it would have chosen another one itself."""
    model, optimizer = trained_gpt()
    for iter_num in (5, 10):
        save_state(tmp_path, model, optimizer, iter_num)
    save_model(tmp_path, model, iter_num=7)

    for name, iter_num in (('state.pt', 10), ('state.prev.pt', 5), ('ckpt.pt', 7)):
        rank = OtherRank(tmp_path / name, ['a note'])
        opened = run_folder.open_run(tmp_path, 'resume', False, False, rank)
        assert opened.state.iter_num == iter_num
        assert opened.notes == ['a note']

    rank = OtherRank(None, [])
    assert run_folder.open_run(tmp_path, 'scratch', True, False, rank).state is None
    (tmp_path / 'state.pt').unlink()
    with pytest.raises(UserError, match='state.pt cannot be read: it does not exist'):
        run_folder.open_run(tmp_path, 'auto', False, False, OtherRank(tmp_path / 'state.pt', []))


def test_a_resume_that_is_refused_is_refused_on_all_ranks(monkeypatch):
    """So rank 0 alone prints the line."""
    env = Environment(torch.device('cpu'), 'float32', False, 0, 0, 2, 'one of two ranks')
    env.all_gather = lambda value: [value, value]
    saved = Checkpoint(model_args=SHAPE, config={'strategy': 'fsdp'})
    opened = run_folder.OpenedRun(saved, [])
    monkeypatch.setattr(run_folder, 'open_run', lambda *arguments: opened)
    with script_settings(train_script, '--init_from=resume', '--health_interval=5') as overrides:
        with pytest.raises(UserError, match='health_interval measures whole layers') as refused:
            train_script.resume_or_begin(overrides, env)
    assert refused.value.on_all_ranks


def test_one_rank_verifies_the_shards_for_all(tmp_path, monkeypatch):
    model, optimizer = trained_gpt()
    env = Environment(torch.device('cpu'), 'float32', False, 0, 0, 1, 'one rank')
    saver = sharded_checkpoint.ShardedSaver(tmp_path, env)
    state = Checkpoint(
        **model.to_checkpoint(),
        optimizer=optimizer.state_dict(), scaler=scaler().state_dict(),
        iter_num=3,
        best_val_loss=2.5,
    )
    saver.save(model, state)
    saver.wait()

    verified = []
    checksum = sharded_checkpoint.checksum

    def noted_checksum(path):
        verified.append(path.name)
        return checksum(path)
    monkeypatch.setattr(sharded_checkpoint, 'checksum', noted_checksum)
    opened = run_folder.open_run(tmp_path, 'resume', False, True, env)
    assert len(verified) == 1
    other = run_folder.open_run(tmp_path, 'resume', False, True, OtherRank(tmp_path / 'state', []))
    assert len(verified) == 1
    assert other.state.shards_folder == opened.state.shards_folder == str(tmp_path / 'state')
    assert other.state.iter_num == 3


# The lock

@pytest.mark.parametrize('out', ['file', 'file/below', 'a\0b', '\udcff/' + 'x' * 300])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    Path('file').write_text('a file')
    with pytest.raises(UserError, match='cannot be written'):
        run_folder.RunLock(out)


def test_a_folder_has_one_run_at_a_time(tmp_path):
    run_lock = run_folder.RunLock(tmp_path / 'new' / 'out')
    with pytest.raises(UserError, match='is in use by another training process'):
        run_folder.RunLock(tmp_path / 'new' / 'out')
    run_lock.release()
    run_folder.RunLock(tmp_path / 'new' / 'out').release()


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='this system has no FIFOs')
def test_a_fifo_in_the_place_of_a_state_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / 'state.pt')
    with pytest.raises(UserError, match='state.pt cannot be read: it is not a regular file'):
        run_folder.load_state(tmp_path)
