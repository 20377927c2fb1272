"""A person's mistakes: exit 2, one line that says what was found, no traceback, nothing on disk changed."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch

if sys.platform == 'win32':
    pytest.skip('the scripts are started by fork', allow_module_level=True)

import chaos
import checkpoint

RUN, DATA = 'out-run', 'data/letters'       # a stopped run, and the dataset that it was trained on


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    lab = chaos.Lab(tmp_path_factory.mktemp('mistakes') / 'lab')
    yield lab
    lab.close()


@pytest.fixture
def run(lab):
    """Run a script after `spoil(folder)`, and check that it refuses: `run(words, script, *flags)`."""
    data = lab.folder / DATA
    saved = {path: path.read_bytes() for path in data.iterdir()}
    shutil.copytree(lab.stopped, lab.folder / RUN)

    def refused(words, script, *flags, spoil=None, ranks=1, seconds=20):
        if spoil:
            spoil(lab.folder)
        before = tree(lab.folder)
        if script == 'train.py':
            flags = [*lab.flags(RUN), *flags]
        ended = lab.launchers[0].run(script, *flags, ranks=ranks, limit=seconds)
        told = f'codes {ended.codes}, hung {ended.hung}\n{ended.err}\n{ended.out}'
        # a rank that has not begun yet is ended by the end of the others, as torchrun does it
        assert ended.code == 2 and set(ended.codes) <= {2, -signal.SIGTERM}, told
        lines = ended.err.splitlines()
        assert 1 <= len(lines) <= 3 and lines[-1].startswith(f'{script}: ') and 'Traceback' not in ended.err, told
        assert all(word in ended.err for word in words.split('|')), told
        assert tree(lab.folder) == before
        assert not (lab.folder / 'ran').exists(), 'a hostile file ran code'
    yield refused
    for path in lab.folder.iterdir():
        if path.name.startswith('out-') or path.name == 'odd.py' or path.name == 'prompt.txt':
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(data)
    data.mkdir()
    for path, content in saved.items():
        path.write_bytes(content)


def tree(folder):
    """Every file that a run could touch, with its content; the scans that dataloader remembers aside."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*')
            if path.is_file() and '__pycache__' not in path.parts
            and not path.name.endswith(('.checked.json', '.lock')) and not path.name.startswith(('stdout-', 'stderr-'))}


# Settings

@pytest.mark.parametrize('flag, words', [
    ('--learning_rte=1', "no setting 'learning_rte'; did you mean learning_rate?"),
    ('--learning_rate', 'lacks its value'),
    ('--learning_rate=fast', "learning_rate='fast' should be a number"),
    ('--batch_size=2.5', 'batch_size=2.5 should be a whole number'),
    ('--decay_lr=yes', "decay_lr='yes' should be True or False"),
    ('--n_layer=None', 'n_layer=None should be a whole number'),
    ('nowhere.py', "no config file 'nowhere.py'"),
    ('train_shakespeare', "did you mean train_shakespeare_char?"),
    ('--n_layer=0', 'n_layer=0 should be'),
    ('--batch_size=-4', 'batch_size=-4 should be at least 1'),
    ('--dropout=1.5', 'dropout=1.5 should be at least 0 and below 1'),
    ('--dropout=-0.1', 'dropout=-0.1 should be'),
    ('--n_head=3', 'n_embd=32 does not divide over n_head=3; try --n_embd=33'),
    ('--n_head=-2', 'n_head=-2 should be'),
    ('--warmup_iters=50', 'warmup_iters=50|lr_decay_iters=20|try --warmup_iters=2'),
    ('--min_lr=0.5', 'min_lr=0.5 is above learning_rate=0.01'),
    ('--learning_rate=0', 'learning_rate=0.0 should be above zero'),
    ('--learning_rate=1e999', 'learning_rate=inf should be'),
    ('--beta1=1.0', 'beta1=1.0 should be at least 0 and below 1'),
    ('--grad_clip=-1', 'grad_clip=-1.0 should be zero or more'),
    ('--eval_interval=0', 'eval_interval=0 should be at least 1'),
    ('--log_interval=0', 'log_interval=0 should be at least 1'),
    ('--max_iters=-1', 'max_iters=-1 should be zero or more'),
    ('--seed=-1', 'seed=-1 should be'),
    ('--out_dir=', "out_dir='' should be the name of a folder"),
    ('--dtype=float8', "dtype='float8' is unknown; try 'auto', 'float32'"),
    ('--device=gpu', "device='gpu' is unknown; try 'auto'"),
    ('--device=mps', 'device=mps: this machine has no Metal GPU'),
    ('--compile=maybe', "compile='maybe' should be True, False or 'auto'"),
    ('--init_from=gpt3', "init_from='gpt3' is neither scratch, resume"),
])
def test_setting_refused(run, flag, words):
    run(words, 'train.py', '--out_dir=out-none', flag)


@pytest.mark.skipif(torch.cuda.is_available(), reason='this machine has a GPU')
@pytest.mark.parametrize('script', ['train.py', 'sample.py', 'bench.py'])
def test_device_that_is_not_there(run, script):
    run('device=cuda: this PyTorch finds no CUDA GPU; try --device=auto', script, '--device=cuda')


@pytest.mark.parametrize('text, words', [
    ('batch_size = 4\nlearning_rte = 1', "odd.py: there is no setting 'learning_rte'; did you mean learning_rate?"),
    ('batch_size = 4\nlearning_rate = = 1', 'odd.py, line 2: SyntaxError'),
    ('batch_size = 4\nblock_size = 1 / 0', 'odd.py, line 2: ZeroDivisionError'),
    ('\n\nbatch_size = "four"', "odd.py: batch_size='four' should be a whole number"),
    ('x\0y', 'odd.py'),
])
def test_config_file_refused(run, text, words):
    run(words, 'train.py', 'odd.py', spoil=lambda folder: (folder / 'odd.py').write_text(text))


def test_config_file_that_is_not_text(run):
    run('odd.py|UnicodeDecodeError', 'train.py', 'odd.py',
        spoil=lambda folder: (folder / 'odd.py').write_bytes(b'batch_size = 4 # \xff\xfe'))


@pytest.mark.parametrize('flags, words', [
    (['--gradient_accumulation_steps=1', '--batch_size=3'], 'over 2 ranks|try --gradient_accumulation_steps=2'),
    (['--backend=nccl'], 'backend=nccl moves data between NVIDIA GPUs'),
    ([], 'already holds a run'),
    (['--learning_rte=1'], 'did you mean learning_rate?')])
def test_two_ranks_refuse_in_one_line(run, flags, words):
    run(words, 'train.py', *flags, ranks=2)


def test_torchrun_shows_our_line_once(lab, run):
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                           'train.py', *lab.flags(RUN)], cwd=lab.folder, capture_output=True, text=True, timeout=100,
                          env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert done.returncode != 0 and 'exitcode  : 2' in done.stderr
    assert done.stderr.count('already holds a run') == 1 == done.stderr.count('train.py: ')


@pytest.mark.parametrize('script, flag, words', [
    ('train.py', '--no_such_thing=1', "no setting 'no_such_thing'"),
    ('sample.py', '--temprature=1', 'did you mean temperature?'),
    ('bench.py', '--steps=none', "steps='none' should be a whole number")])
def test_in_a_process_of_its_own(lab, script, flag, words):
    done = subprocess.run([sys.executable, script, flag], cwd=lab.folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and words in done.stderr, done.stderr


# Data

def bin_of(split, content):
    return lambda folder: (folder / DATA / f'{split}.bin').write_bytes(content)


def meta(content):
    return lambda folder: (folder / DATA / 'meta.json').write_text(
        content if isinstance(content, str) else json.dumps(content))


def meta_pickle(content):
    def spoil(folder):
        (folder / DATA / 'meta.json').unlink()
        (folder / DATA / 'meta.pkl').write_bytes(content)
    return spoil


def id_out_of_range(folder):
    ids = np.fromfile(folder / DATA / 'val.bin', '<u2')
    ids[345] = 17
    ids.tofile(folder / DATA / 'val.bin')


class Evil:
    """Unpickling it would leave a file behind."""

    def __reduce__(self):
        return os.system, ('touch ran',)


@pytest.mark.parametrize('spoil, words', [
    (bin_of('train', b''), 'train.bin has 0 bytes'),
    (bin_of('val', b'abc'), 'val.bin has 3 bytes, it takes 2 a token'),
    (bin_of('val', b'\0\0' * 9), 'val.bin has 9 tokens, and a block takes 33; try --block_size=8'),
    (id_out_of_range, 'val.bin: token 345 has id 17, beyond the vocabulary of 17'),
    (lambda folder: (folder / DATA / 'val.bin').unlink(), "dataset 'letters' has no train.bin and val.bin"),
    (meta('{"tokenizer": '), 'meta.json cannot be used: JSONDecodeError'),
    (meta([]), 'meta.json cannot be used'),
    (meta(7), 'meta.json cannot be used'),
    (meta('[' * 100_000), 'meta.json cannot be used: RecursionError'),
    (meta({'tokenizer': 'char', 'vocab_size': 3, 'chars': 'aab'}), 'its characters are not 3 different ones'),
    (meta({'tokenizer': 'char', 'vocab_size': 70000, 'chars': 'a'}), 'vocab_size is 70000'),
    (meta({'tokenizer': '../gpt2', 'vocab_size': 17}), "unknown tokenizer '../gpt2'"),
    (meta_pickle(pickle.dumps(Evil())), 'meta.pkl cannot be used|it asks for posix.system'),
    (meta_pickle(b''), 'meta.pkl cannot be used'),
    (meta_pickle(pickle.dumps({'vocab_size': 2, 'itos': {0: 'a' * 10, 1: 'b'}})), 'something else than characters'),
    (meta_pickle(pickle.dumps({'vocab_size': 10 ** 12, 'itos': {0: 'a'}})), 'meta.pkl cannot be used'),
    (meta_pickle(b'\x80\x04r\xff\xff\xff\x7f.'), 'meta.pkl cannot be used'),
])
def test_data_refused(run, spoil, words):
    run(words, 'train.py', '--out_dir=out-none', spoil=spoil)


@pytest.mark.parametrize('name', ['../letters', '/etc', '..', '', '.hidden', 'a\\b', 'nowhere'])
def test_dataset_name_refused(run, name):
    run(f'dataset {name!r}' if name == 'nowhere' else f'dataset={name!r}', 'train.py', '--out_dir=out-none',
        f'--dataset={name}')


def test_missing_dataset_names_the_command(run):
    def unprepared(folder):
        (folder / 'data' / 'known').mkdir(exist_ok=True)
        (folder / 'data' / 'known' / 'prepare.py').write_text('')
    run('run: python data/known/prepare.py', 'train.py', '--out_dir=out-none', '--dataset=known', spoil=unprepared)


def other_letters(folder):
    shutil.rmtree(folder / DATA)
    chaos.make_dataset(folder / DATA, characters='ABCDEFGHIJKLMNOPQ')


def other_text(folder):
    ids = np.fromfile(folder / DATA / 'train.bin', '<u2')
    ids[::-1].tofile(folder / DATA / 'train.bin')


@pytest.mark.parametrize('spoil, words', [
    (other_letters, 'another vocabulary'),
    (other_text, 'is not what the run was trained on|--accept_dataset_change=True')])
def test_dataset_that_the_run_does_not_know(run, spoil, words):
    run(words, 'train.py', '--init_from=resume', spoil=spoil)


# Checkpoints

def files(content, *names):
    def spoil(folder):
        for name in names or ('state.pt', 'state.prev.pt', 'ckpt.pt'):
            path = folder / RUN / name
            path.write_bytes(content(path) if callable(content) else content)
    return spoil


def saved(change):
    """A checkpoint that PyTorch itself wrote, after `change(payload)`."""
    def spoil(folder):
        for name in ('state.pt', 'state.prev.pt', 'ckpt.pt'):
            payload = torch.load(folder / RUN / name, weights_only=True)
            changed = change(payload)
            torch.save(payload if changed is None else changed, folder / RUN / name)
    return spoil


def drop(key):
    return lambda payload: payload.pop(key) and None


def put(key, value):
    return lambda payload: payload.update({key: value})


def argument(**values):
    return lambda payload: payload['model_args'].update(values)


WTE = 'transformer.wte.weight'


def weight(value):
    return lambda payload: payload['model'].update({WTE: value})


def bomb(folder):
    """A small file that unpacks to 2 GB."""
    for name in ('state.pt', 'state.prev.pt', 'ckpt.pt'):
        with zipfile.ZipFile(folder / RUN / name, 'w', zipfile.ZIP_DEFLATED) as archive:
            with archive.open('archive/data.pkl', 'w', force_zip64=True) as entry:
                for _ in range(128):
                    entry.write(bytes(1 << 24))


def self_containing(payload):
    payload['config'] = loop = {}
    loop['config'] = [loop]
    loop['dataset'] = 7


DAMAGED = [
    (files(lambda path: path.read_bytes()[:5000]), 'cannot be read|not a checkpoint of PyTorch, or truncated'),
    (files(b''), 'cannot be read|truncated'),
    (files(b'a plain text\n' * 99), 'cannot be read|not a checkpoint of PyTorch'),
    (files(pickle.dumps(Evil())), 'cannot be read'),
    (saved(lambda payload: {'model': Evil()}), 'it asks to run posix.system'),
    (saved(lambda payload: [1, 2]), 'holds a list, not a checkpoint'),
    (saved(lambda payload: torch.zeros(3)), 'holds a Tensor, not a checkpoint'),
    (saved(drop('model_args')), 'lacks model_args'),
    (saved(drop('iter_num')), 'lacks iter_num'),
    (saved(put('model', [1])), 'its model is not a table'),
    (saved(put('model_args', 'gpt2')), 'must be a mapping'),
    (saved(put('iter_num', -5)), 'iter_num=-5'),
    (saved(put('best_val_loss', float('nan'))), 'best_val_loss=nan'),
    (saved(put('config', 'hello')), 'its config is a str, not a dict'),
    (saved(argument(n_layer=10 ** 9)), 'the weights have 2 layers, the settings 1000000000'),
    (saved(argument(n_embd=2 ** 40)), 'no model has such model_args'),
    (saved(argument(block_size=2 ** 62)), 'no model has such model_args'),
    (saved(argument(n_head='4')), "n_head='4' should be a whole number"),
    (saved(argument(wings=2)), 'wings'),
    (saved(weight(torch.zeros(1).expand(10 ** 6, 10 ** 6))), 'its tensors are larger than the file'),
    (saved(weight(torch.zeros(5, 5))), WTE),
    (saved(weight(torch.empty(17, 32, device='meta'))), 'a kind that no checkpoint needs'),
    (saved(weight(torch.eye(3).to_sparse())), 'a kind that no checkpoint needs'),
    (bomb, 'it is larger inside than outside'),
]


@pytest.mark.parametrize('spoil, words', DAMAGED)
@pytest.mark.parametrize('script', ['train.py', 'sample.py'])
def test_checkpoint_refused(run, script, spoil, words):
    flags = ['--init_from=resume'] if script == 'train.py' else [f'--out_dir={RUN}', '--start=a']
    began = time.monotonic()
    run(words, script, *flags, spoil=spoil)
    assert time.monotonic() - began < 30


def moment(name, value):
    return lambda payload: payload.get('optimizer') and payload['optimizer']['state'][0].update({name: value})


@pytest.mark.parametrize('spoil, words', [
    (saved(moment('exp_avg', torch.zeros(3, 3))), 'another shape'),
    (saved(moment('exp_avg', 'no tensor')), 'not one of AdamW'),
    (saved(moment('step', torch.zeros(4))), 'not one of AdamW'),
    (saved(put('optimizer', {})), 'not one of AdamW'),
    (saved(moment('exp_avg_sq', torch.zeros(1).expand(10 ** 6, 10 ** 6))), 'its tensors are larger than the file'),
    (saved(put('optimizer', {'state': {0: {}}, 'param_groups': []})), 'not one of AdamW'),
])
def test_optimizer_state_refused(run, spoil, words):
    run(words, 'train.py', '--init_from=resume', spoil=spoil)


def test_nothing_to_resume(run):
    run('out-none holds no run to resume', 'train.py', '--out_dir=out-none', '--init_from=resume')


def test_scratch_over_a_run(run):
    run('already holds a run; go on with --init_from=resume|--overwrite=True', 'train.py')


def test_block_size_over_the_checkpoints(run):
    run('block_size=64 is over the 32', 'train.py', '--init_from=resume', '--block_size=64')


@pytest.mark.parametrize('out', ['out-file', 'out-file/below'])
def test_out_dir_that_cannot_be_written(run, out):
    run('cannot be written', 'train.py', f'--out_dir={out}',
        spoil=lambda folder: (folder / 'out-file').write_text('a file'))


def test_out_dir_in_use(lab, run):
    with checkpoint.lock(lab.folder / RUN, {'fell_back': False}):
        run('is in use by another training process', 'train.py', '--init_from=resume')


# Sampling

@pytest.mark.parametrize('flags, words', [
    (['--start=aXb'], "the model never saw the character 'X'"),
    (['--start='], 'start is empty'),
    (['--start=FILE:nowhere.txt'], "the prompt 'nowhere.txt' cannot be read"),
    (['--start=FILE:prompt.txt'], "the prompt 'prompt.txt' cannot be read"),
    (['--temperature=-1'], 'temperature=-1.0 should be 0 or more'),
    (['--top_k=-5'], 'top_k=-5 should be 0 or more'),
    (['--top_p=0'], 'top_p=0.0 should be above 0'),
    (['--num_samples=0'], 'num_samples=0 should be 1 or more'),
    (['--out_dir=out-none'], 'ckpt.pt does not exist'),
    (['--init_from=gpt3'], "init_from='gpt3' is neither"),
    (['--temprature=1'], 'did you mean temperature?'),
])
def test_sampling_refused(run, flags, words):
    run(words, 'sample.py', f'--out_dir={RUN}', '--start=a', *flags,
        spoil=lambda folder: (folder / 'prompt.txt').write_bytes(b'\xff\xfe\0'))


@pytest.mark.parametrize('change, words', [
    (put('tokenizer', {'tokenizer': 'char'}), 'vocab_size is None'),
    (put('tokenizer', {'tokenizer': 'char', 'vocab_size': 17, 'chars': 7}), 'its characters are not 17'),
    (put('tokenizer', ['a']), 'its tokenizer is a list'),
    (lambda payload: payload.update(tokenizer=None, config={'dataset': '../../etc'}), "dataset='../../etc' should be"),
    (lambda payload: payload.update(tokenizer=None, config={'dataset': 7}), 'dataset=7 should be'),
])
def test_tokenizer_of_a_checkpoint_refused(run, change, words):
    run(words, 'sample.py', f'--out_dir={RUN}', '--start=a', spoil=saved(change))


def test_long_prompt_is_read_from_its_end_and_said(lab, run):
    ended = lab.launchers[0].run('sample.py', f'--out_dir={lab.stopped}', f'--start={"abc" * 20}', '--num_samples=1',
                                 '--max_new_tokens=5')
    assert ended.code == 0 and 'the prompt has 60 tokens, the model reads its last 32' in ended.err, ended.err


# The benchmark

@pytest.mark.parametrize('flags, words', [
    ('--steps=0', 'steps=0 should be at least 1'), ('--n_head=7', 'does not divide over n_head=7'),
    ('--dtype=float8', "dtype='float8' is unknown"), ('--batchsize=1', 'did you mean batch_size?'),
    ('--real_data=True', "dataset 'openwebtext' has no train.bin"), ('--compare=gpt4', "compare='gpt4' should be one of"),
    ('--compare_dtype=float32', 'compare_dtype is of --compare=transformers'),
    ('--compare=transformers --bench=sample --new_tokens=1000', 'cannot go past block_size=1024; try --new_tokens=992')])
def test_benchmark_refused(run, flags, words):
    run(words, 'bench.py', '--device=cpu', *flags.split())
