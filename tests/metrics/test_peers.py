"""Two checkouts in turns, by stand-ins of a few lines that sleep in place of work."""

import os
import re
from pathlib import Path

import pytest
from harness import ROOT, script_settings

import bench
import sample
import train
from engine.checkpoint.load_model import load_model
from engine.errors import RunError
from engine.metrics import peers
from engine.metrics.peers import Checkout, Comparison, SamplingCase, Setup, Shape, StepCase
from engine.metrics.step_log import format_line
from engine.tokenizer import Tokenizer
from engine.training.settings_checks import check_training
from model import GPT

SHAPE = Shape(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=5)
STEP = StepCase('a step', SHAPE, batch_size=2, dtype='float32', warmup=2, steps=1)
SAMPLING = SamplingCase('a token', SHAPE, short_tokens=2, long_tokens=12)

# What a stand-in imports, as a checkout's scripts import its model.
HELPER = '''
import sys, time
flags = dict(argument[2:].split('=', 1) for argument in sys.argv[1:])
with open({log!r}, 'a') as file:
    file.write({name!r} + ' ' + ' '.join(sorted(sys.argv[1:])) + chr(10))
'''
TRAIN = '''
from helper import flags, time
print('evaluating')
for i in range(int(flags['max_iters']) + 1):
    time.sleep(0.1 if i in (1, 2) else {seconds})   # warm-up is slow
    print(f'iter {{i}}: loss 1.0, time 1.00ms, mfu -100.00%')
time.sleep(60)                                      # it is not waited for
'''
SAMPLE = '''
from helper import flags, time
print('x' * int(flags['max_new_tokens']))
'''


@pytest.fixture
def checkout(tmp_path):
    """A function that makes the Checkout of a stand-in."""
    def make(name, seconds, train=TRAIN, sample=SAMPLE):
        folder = tmp_path / name
        folder.mkdir()
        log = str(tmp_path / 'turns.txt')
        (folder / 'helper.py').write_text(HELPER.format(log=log, name=name))
        (folder / 'train.py').write_text(train.format(seconds=seconds))
        (folder / 'sample.py').write_text(sample.format(seconds=seconds))
        return Checkout(name, folder)
    return make


def write_model(folder, shape, dataset):
    folder.mkdir()


def compare(checkouts, *cases):
    return peers.compare(checkouts, cases, 'cpu', False, write_model)


@pytest.fixture
def half_a_second_a_token(monkeypatch):
    """sample.py takes three seconds to start, and half a second a token."""
    monkeypatch.setattr(SamplingCase, 'sample', lambda self, checkout, setup, n_tokens:
                        (3 + 0.5 * n_tokens, n_tokens + 16))


def test_both_take_turns_with_the_same_settings(checkout, tmp_path):
    checkouts = [checkout('peer', 0.04), checkout('here', 0.005)]
    before = sorted(tmp_path.rglob('*'))
    (comparison,) = compare(checkouts, STEP)

    # the times leave out the warm-up
    assert 0.004 < min(comparison.seconds['here']) < 0.03
    assert 0.03 < min(comparison.seconds['peer']) < 0.09

    # what was started
    lines = [line.split() for line in (tmp_path / 'turns.txt').read_text().splitlines()]
    assert [line[0] for line in lines] == ['peer', 'here', 'here', 'peer', 'peer', 'here']
    settings = [[flag for flag in line[1:] if 'out_dir' not in flag] for line in lines]
    assert settings == settings[:1] * 6

    # nothing is written into a checkout, and nothing is left behind
    assert sorted(tmp_path.rglob('*')) == sorted([*before, tmp_path / 'turns.txt'])
    (out_dir,) = {flag.split('=')[1] for flag in lines[0] if 'out_dir' in flag}
    assert not os.path.exists(out_dir)


def test_the_time_of_a_token_leaves_out_the_start_up(half_a_second_a_token):
    assert SAMPLING.measure(Checkout('peer', Path()), setup=None) == 0.5


def test_a_sample_is_printed_text(checkout, tmp_path):
    peer = checkout('peer', 0)
    setup = Setup(tmp_path / 'data', tmp_path / 'model', 'cpu', False)
    _, characters = SAMPLING.sample(peer, setup, 12)
    assert characters == 12 + len('\n')


def test_the_table_has_medians_and_the_ratios_of_the_turns():
    seconds = dict(peer=[9.0, 11.0, 10.0], here=[4.0, 1.0, 2.5])
    steps = Comparison(peers.CASES['step_124m'], seconds)
    seconds = dict(peer=[0.5, 0.5, 0.5], here=[0.04, 0.02, 0.002])
    tokens = Comparison(peers.CASES['sample_6x384'], seconds)
    failed = Comparison(STEP, None)
    lines = peers.table([steps, tokens, failed])

    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines[2:]]
    assert cells[0][1:] == ['10,000.0 ms', '2,500.0 ms', '4.00 (2.25 to 11.0)']
    assert cells[1][1:] == ['2.0 tok/s', '50.0 tok/s', '25.0 (12.5 to 250)']
    assert cells[2] == ['a step', '', '', 'failed']
    assert {len(line) for line in lines} == {78}


@pytest.mark.parametrize('script, reason', [
    ('raise OSError("no such file")', 'OSError: no such file'),
    ('import sys; sys.exit("train.py: \x1b[1mbad flag")', 'bad flag'),
    ('print("iter 0: loss 1.0")', 'exit code 0 and no more lines'),
    (None, 'has no train.py'),
])
def test_a_case_that_fails_is_one_line_and_the_next_one_is_timed(
        checkout, logged, half_a_second_a_token, script, reason):
    peer = checkout('peer', 0.01)
    (peer.folder / 'train.py').write_text(script or '')
    if script is None:
        (peer.folder / 'train.py').unlink()
    comparisons = compare([peer, checkout('here', 0.01)], STEP, SAMPLING)

    assert comparisons[0].seconds is None
    assert comparisons[1].seconds == dict(peer=[0.5] * 3, here=[0.5] * 3)
    assert logged[0] == 'a step ...'
    assert logged[1].startswith('failed: peer: ')
    assert reason in logged[1]
    assert '\x1b' not in logged[1]
    assert logged[2:] == ['a token ...']


@pytest.mark.parametrize('times, lengths, words', [
    ([3, 4], [10, 10], 'printed 0 characters more for 10 tokens more'),
    ([4, 3], [10, 20], 'took no longer for 10 tokens more; try again'),
])
def test_samples_that_say_nothing_of_the_speed_are_refused(monkeypatch, times, lengths, words):
    found = iter(zip(times, lengths))
    monkeypatch.setattr(SamplingCase, 'sample', lambda *arguments: next(found))
    with pytest.raises(RunError, match=f'peer: sample.py {words}'):
        SAMPLING.measure(Checkout('peer', Path()), setup=None)


def test_what_never_ends_is_ended(checkout, logged, monkeypatch):
    monkeypatch.setattr(peers, 'LIMIT', 0.2)
    slow = checkout('peer', 0, train='import time; time.sleep(60)')
    (comparison,) = compare([slow, checkout('here', 0)], STEP)
    assert comparison.seconds is None
    assert logged[1] == 'failed: peer: train.py: ended after 0 minutes'


# What this checkout makes of it

def flags(settings):
    return [f'--{name}={value}' for name, value in settings.items()]


def test_the_settings_are_those_of_the_scripts_here(tmp_path):
    setup = Setup(tmp_path / 'data', tmp_path / 'model', 'cpu', False)
    for case in peers.CASES.values():
        if isinstance(case, SamplingCase):
            assert case.long_tokens < case.shape.block_size
            settings = case.settings(setup, case.long_tokens)
            with script_settings(sample, *flags(settings)):
                sample.check_settings(settings)
            continue
        settings = case.settings(setup, tmp_path / 'run', 5)
        with script_settings(train, *flags(settings)):
            check_training(vars(train))


def test_the_lines_are_those_of_train_py():
    numbers = dict(loss=1.0, grad_norm=1.0, lr=1e-3, tokens_per_second=1000.0, mfu=None)
    assert peers.ITERATION.match(format_line(12, numbers, 60))


def test_the_model_is_one_that_sample_py_loads(tmp_path):
    """Its tokens are single characters, so that neither side downloads a tokenizer."""
    shape = SHAPE._replace(vocab_size=50304)
    peers.write_dataset(tmp_path / 'data', shape.vocab_size)
    bench.write_model(tmp_path / 'model', shape, tmp_path / 'data')

    loaded = load_model(GPT, 'resume', str(tmp_path / 'model'))
    assert loaded.model.config.vocab_size == 50304
    tokenizer = Tokenizer(loaded.spec)
    ids = list(range(50304))
    assert len(tokenizer.decode(ids)) == 50304
    assert tokenizer.encode('\n') == [0]


def test_the_cases_of_the_help_exist():
    source = (ROOT / 'bench.py').read_text(encoding='utf-8')
    comment = re.search(r'peers_cases = .*?\n#', source, re.DOTALL)[0]
    assert set(re.findall(r'\b(?:shakespeare|s\w+_\w+)\b', comment)) == set(peers.CASES)
