"""The files of a sharded state: whether their pieces join, and links in the place of folders.

Saves of several ranks are in tests/training/test_strategies.py.
"""

import errno
import json
import os
import shutil
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint import gathered, run_folder, sharded
from engine.checkpoint.contents import Checkpoint
from engine.checkpoint.sharded import ShardedSaver, joined_size
from engine.distributed import Environment
from engine.errors import RunError, UserError
from engine.training import optim
from model import GPT, GPTConfig

ENV = Environment(torch.device('cpu'), 'float32', False, 0, 0, 1, 'one rank')
WEIGHT = 'model.transformer.wte.weight'             # 17 rows of 32 numbers


def trained_gpt(seed=0):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=16, vocab_size=17, n_layer=1, n_head=2, n_embd=32))
    optimizer = optim.adamw(model, 1e-2, 0.1, (0.9, 0.95))
    idx = torch.arange(32).view(2, 16) % 17
    model(idx, idx)[1].backward()
    optimizer.step()
    return model, optimizer


def save(saver, model, optimizer, iter_num):
    state = Checkpoint(**model.to_checkpoint(), optimizer=optimizer.state_dict(), scaler={},
                       iter_num=iter_num, best_val_loss=2.5)
    saver.save(model, state)
    saver.wait()


@pytest.fixture(scope='module')
def run():
    return trained_gpt()


# Pieces

class Pieces(list):
    """The pieces of a state: [{name: (offsets, tensor)}], one dict for each file."""

    def __init__(self, folder, n_files=3):
        """Divide each tensor of a state by its rows, as n_files ranks would."""
        whole = load_file(next(folder.glob('*.safetensors')))
        super().__init__({} for _ in range(n_files))
        for name, tensor in whole.items():
            first = 0
            for file, part in zip(self, tensor.chunk(n_files)):
                offsets = [first] + [0] * (tensor.dim() - 1)
                file[name] = (offsets, part.contiguous())
                first += len(part)

    def write(self, folder):
        """Put them in the place of the state's files, with checksums that agree."""
        for path in folder.glob('*.safetensors'):
            path.unlink()

        checksums = {}
        for i, file in enumerate(self, 1):
            path = folder / f'shard-{i:05d}-model-00001-of-00001.safetensors'
            where = {name: {'saved_offsets': offsets} for name, (offsets, _) in file.items()
                     if offsets is not None}
            tensors = {name: tensor for name, (_, tensor) in file.items()}
            save_file(tensors, path, {'format': 'pt', 'DCP_SHARDING_INFO': json.dumps(where)})
            checksums[path.name] = zlib.crc32(path.read_bytes())
        (folder / 'checksums.json').write_text(json.dumps(checksums))


@pytest.fixture(scope='module')
def saved(run, tmp_path_factory):
    """A state/ of one file, which no test changes."""
    folder = tmp_path_factory.mktemp('saved')
    save(ShardedSaver(folder, ENV), *run, iter_num=5)
    return folder / 'state'


@pytest.fixture
def out_dir(saved, tmp_path):
    shutil.copytree(saved, tmp_path / 'state')
    return tmp_path


def test_a_state_of_pieces_reads_as_the_model_that_was_saved(run, out_dir):
    pieces = Pieces(out_dir / 'state')
    pieces.append(pieces.pop(0))                        # the files may come in any order
    pieces.write(out_dir / 'state')
    model, optimizer = run

    found = GPT.from_checkpoint(out_dir)
    for (name, value), other in zip(found.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(value, other), name

    state, notes = run_folder.load_state(out_dir)
    assert notes == []
    other, new_optimizer = trained_gpt(seed=1)
    moments = sharded.load(state, other, new_optimizer, ENV).optimizer['state']
    assert torch.equal(other.transformer.wte.weight, model.transformer.wte.weight)
    for index, values in optimizer.state_dict()['state'].items():
        for name, value in values.items():
            assert torch.equal(moments[index][name], value)


def with_offsets(file, offsets):
    """The piece of a weight in one file, said to lie elsewhere."""
    def spoil(pieces):
        pieces[file][WEIGHT] = (offsets, pieces[file][WEIGHT][1])
    return spoil


def overlap(pieces):
    offsets, tensor = pieces[1][WEIGHT]
    pieces[1][WEIGHT] = ([offsets[0] - 1, 0], torch.cat([tensor[:1], tensor]))


def make_narrow(pieces):
    offsets, tensor = pieces[1][WEIGHT]
    pieces[1][WEIGHT] = (offsets, tensor[:, :31].contiguous())


def make_flat(pieces):
    offsets, tensor = pieces[1][WEIGHT]
    pieces[1][WEIGHT] = (offsets[:1], tensor[:, 0].contiguous())


def forget_all_offsets(pieces):
    for file in pieces:
        for name, (_, tensor) in file.items():
            file[name] = (None, tensor)


JOIN = 'do not join to a whole; a file is missing, or was changed'
SAY = 'do not say which part of which tensor they hold'
EITHER = f'{JOIN}|{SAY}'


@pytest.mark.parametrize('spoil, words', [
    (lambda pieces: pieces.pop(0), JOIN),
    (lambda pieces: pieces.pop(1), JOIN),
    (lambda pieces: pieces[1].pop(WEIGHT), JOIN),
    (lambda pieces: pieces.append({WEIGHT: pieces[0][WEIGHT]}), JOIN),      # twice
    (overlap, JOIN),
    (make_narrow, JOIN),
    (make_flat, EITHER),
    (with_offsets(1, [-6, 0]), JOIN),
    (with_offsets(0, [-1, 0]), JOIN),
    (with_offsets(1, [0, 0]), JOIN),
    (with_offsets(1, [7, 0]), JOIN),                                        # a hole of one row
    (with_offsets(2, [10 ** 9, 0]), JOIN),
    (with_offsets(1, [6, 1]), JOIN),
    (with_offsets(1, [6]), EITHER),
    (with_offsets(0, []), EITHER),
    (with_offsets(1, []), EITHER),
    (with_offsets(1, [6, 0, 0]), EITHER),
    (with_offsets(1, [2 ** 70, 0]), EITHER),
    (with_offsets(1, ['6', 0]), SAY),
    (with_offsets(1, 6), SAY),
    (with_offsets(1, None), SAY),
    (forget_all_offsets, SAY),
])
def test_pieces_that_do_not_join_are_refused_in_one_line(saved, out_dir, spoil, words):
    """Though every checksum is right. The state before it is read, where there is one."""
    pieces = Pieces(out_dir / 'state')
    spoil(pieces)
    pieces.write(out_dir / 'state')
    for read in (run_folder.load_state, run_folder.newest_checkpoint):
        with pytest.raises(UserError, match=words) as refused:
            read(out_dir)
        assert str(out_dir / 'state') in str(refused.value)
        assert '\n' not in str(refused.value)

    shutil.copytree(saved, out_dir / 'state.prev')
    state, notes = run_folder.load_state(out_dir)
    assert state.stands_in_for == 'state' and len(notes) == 1


def test_a_state_that_lost_its_last_rows_fits_no_model(run, out_dir):
    """The pieces that are left join, to a smaller tensor."""
    pieces = Pieces(out_dir / 'state')
    pieces.pop()
    pieces.write(out_dir / 'state')
    with pytest.raises(UserError, match=r'\(12, 32\) in the file, \(17, 32\) in the model'):
        GPT.from_checkpoint(out_dir)

    state, _ = run_folder.load_state(out_dir)
    words = r'is \(\d+.*\) in its files and \(\d+.*\) in the model; move it away'
    with pytest.raises(UserError, match=words):
        sharded.load(state, *run, ENV)


@pytest.mark.parametrize('pieces, size', [
    ([((0, 0), (3, 4))], (3, 4)),
    ([((3, 0), (1, 4)), ((0, 0), (3, 4))], (4, 4)),
    ([((0,), (3,)), ((3,), (0,)), ((3,), (2,))], (5,)),     # a rank may hold no rows
    ([((0, 0), (0, 4)), ((0, 0), (3, 4)), ((9, 0), (0, 4))], (3, 4)),
    ([((0, 0), (0, 4))], None),
    ([((), ())], ()),                                       # a single number
    ([((), ()), ((), ())], None),
    ([((0,), (3,)), ((), ())], None),
    ([((0,), ())], None),
    ([((1, 0), (3, 4))], None),
])
def test_the_size_that_pieces_join_to(pieces, size):
    assert joined_size(pieces) == size


# Links, files and folders under the names of a state

def make_link(path, elsewhere):
    elsewhere.mkdir(exist_ok=True)
    (elsewhere / 'precious').write_text('stays')
    path.symlink_to(elsewhere)


def make_dangling_link(path, elsewhere):
    path.symlink_to(elsewhere / 'nowhere')


def make_file(path, elsewhere):
    path.write_text('a file')


def make_folder(path, elsewhere):
    path.mkdir()
    (path / 'file').write_text('')


@pytest.mark.skipif(os.name != 'posix', reason='Windows asks for a privilege to make links')
@pytest.mark.parametrize('name', ['state', 'state.prev', 'state.tmp'])
@pytest.mark.parametrize('make', [make_link, make_dangling_link, make_file, make_folder])
def test_saves_go_on_over_whatever_has_the_name_of_a_state(run, tmp_path, name, make):
    out_dir = tmp_path / 'out'
    out_dir.mkdir()
    elsewhere = tmp_path / 'elsewhere'
    make(out_dir / name, elsewhere)
    saver = ShardedSaver(out_dir, ENV)
    for iter_num in (5, 10, 15):
        save(saver, *run, iter_num)
        assert run_folder.load_state(out_dir)[0].iter_num == iter_num
    assert sharded.load_rest(out_dir / 'state.prev').iter_num == 10
    assert sorted(path.name for path in out_dir.iterdir()) == ['state', 'state.prev']
    if make == make_link:
        assert (elsewhere / 'precious').read_text() == 'stays'


@pytest.mark.skipif(os.name != 'posix', reason='Windows asks for a privilege to make links')
def test_a_linked_state_is_read_and_a_new_run_removes_the_link_alone(saved, tmp_path):
    """People link it to a larger disk."""
    for name in ('state', 'state.prev'):
        (tmp_path / name).symlink_to(saved)
    state, notes = run_folder.load_state(tmp_path)
    assert state.iter_num == 5 and notes == []

    run_folder.clean_out_dir(tmp_path, None)
    assert list(tmp_path.iterdir()) == []
    assert run_folder.load_state(saved.parent)[0].iter_num == 5


@pytest.mark.parametrize('number, advice', [
    (errno.ENOSPC, 'make room, and go on from the state before it with --init_from=auto'),
    (errno.EACCES, 'give yourself the right to write there, and go on'),
    (errno.EIO, 'mend that, and go on'),
])
@pytest.mark.parametrize('step', ['make the folder', 'write run.pt', 'rename'])
def test_a_save_that_fails_says_what_to_do(run, out_dir, monkeypatch, number, advice, step):
    saver = ShardedSaver(out_dir, ENV)

    def fail(*arguments):
        raise OSError(number, os.strerror(number))
    if step == 'make the folder':
        monkeypatch.setattr(Path, 'mkdir', fail)
    elif step == 'write run.pt':
        monkeypatch.setattr(gathered, 'atomic_write', fail)
    else:
        monkeypatch.setattr(sharded, 'os', SimpleNamespace(path=os.path, replace=fail))
    with pytest.raises(RunError, match=advice) as failed:
        save(saver, *run, iter_num=10)
    assert f'{out_dir / "state"} could not be written' in str(failed.value)
    assert os.strerror(number) in str(failed.value)
    monkeypatch.undo()
    assert run_folder.load_state(out_dir)[0].iter_num == 5
