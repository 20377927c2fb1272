import io
import json
import os
import re
import sys

import pytest
import torch
from harness import is_walk, script_settings

import sample
from engine.checkpoint import gathered
from engine.dataloader import batches as dataloader
from engine.errors import RunError, UserError
from engine.tokenizer import Tokenizer
from model import GPT, GPTConfig

END = '\n---------------\n'


def run(workspace, *arguments, **options):
    """The samples that sample.py prints."""
    result = workspace.run('sample.py', '--device=cpu', '--max_new_tokens=40', '--out_dir=out-toy',
                           *arguments, **options)
    return result.stdout.split(END)[:-1]


def test_samples_continue_the_prompt_and_repeat(trained):
    first = run(trained, '--start=abc', '--num_samples=3')
    assert len(first) == len(set(first)) == 3
    assert all(text.startswith('abc') and len(text) == 43 for text in first)
    # a sample does not depend on its batch
    assert run(trained, '--start=abc', '--num_samples=3', '--max_batch=2') == first
    assert run(trained, '--start=abc', '--num_samples=1') == first[:1]
    assert run(trained, '--start=abc', '--num_samples=1', '--seed=2') != first[:1]


def test_stdout_holds_only_text_and_stderr_the_rest(trained):
    result = trained.run('sample.py', '--device=cpu', '--out_dir=out-toy', '--num_samples=1',
                         '--max_new_tokens=5', '--start=abc')
    assert result.stdout.startswith('abc') and len(result.stdout) == 3 + 5 + len(END)
    assert result.stderr.startswith("settings: device='cpu', ")
    model = result.stderr.splitlines()[-1]
    assert re.fullmatch(r'out-toy/ckpt.pt: the last model, iteration 20, val loss 1\.\d{4}', model)
    assert '\ndevice cpu, dtype float32' in result.stderr


def test_a_prompt_comes_from_a_file_and_greedy_is_one_text(trained):
    (trained.folder / 'prompt.txt').write_text('abcd\n')
    texts = run(trained, '--start=FILE:prompt.txt', '--temperature=0', '--num_samples=2',
                '--top_k=0')
    assert texts[0] == texts[1] and texts[0].startswith('abcd\n') and is_walk(texts[0][4:])


def test_a_prompt_beyond_the_context_is_read_from_its_end(trained):
    prompt = 'aaab' * 20 + 'cdefg'
    result = trained.run('sample.py', '--device=cpu', '--out_dir=out-toy', '--num_samples=1',
                         '--max_new_tokens=5', '--temperature=0', f'--start={prompt}')
    assert 'note: the prompt has 85 tokens, the model reads its last 32\n' in result.stderr
    short, = run(trained, '--num_samples=1', '--max_new_tokens=5', '--temperature=0',
                 f'--start={prompt[-32:]}')
    assert result.stdout.split(END)[0] == prompt + short[-5:]


def test_a_checkpoint_of_nanogpt_takes_the_tokenizer_of_its_dataset(trained):
    saved = torch.load(trained.folder / 'out-toy' / 'ckpt.pt', weights_only=True)
    (trained.folder / 'out-nanogpt').mkdir(exist_ok=True)
    names = ('model', 'model_args', 'iter_num', 'best_val_loss', 'config')
    of_nanogpt = {name: saved[name] for name in names}
    path = trained.folder / 'out-nanogpt' / 'ckpt.pt'
    torch.save(of_nanogpt, path)
    expected = run(trained, '--num_samples=2')
    assert run(trained, '--num_samples=2', '--out_dir=out-nanogpt') == expected
    torch.save(dict(of_nanogpt, config=dict(dataset='elsewhere')), path)
    refused = trained.run('sample.py', '--out_dir=out-nanogpt', '--device=cpu', code=2).stderr
    assert 'out-nanogpt has 17 tokens, and its tokenizer 50257' in refused
    assert refused.count('\n') == 1


def test_a_run_that_was_stopped_before_its_first_checkpoint_is_sampled(trained, tmp_path):
    for name in ('state.pt', 'metrics.jsonl'):
        (tmp_path / name).write_bytes((trained.folder / 'out-toy' / name).read_bytes())
    expected = run(trained, '--num_samples=1')
    result = trained.run('sample.py', '--device=cpu', '--max_new_tokens=40', '--num_samples=1',
                         str(tmp_path))
    assert result.stdout.split(END)[:-1] == expected
    assert f'{tmp_path / "state.pt"}: the last model, iteration 20, val loss ' in result.stderr


def test_ids_beyond_the_tokenizer_are_never_sampled(workspace, tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(32, 10, 1, 2, 32))
    with torch.no_grad():
        model.lm_head.weight[3:] *= 50
    gathered.write(tmp_path / gathered.MODEL, dict(
        model.to_checkpoint(), iter_num=1, best_val_loss=1.0, config={},
        tokenizer=dict(tokenizer='char', vocab_size=3, chars='abc')))
    text, = run(workspace, f'--out_dir={tmp_path}', '--start=a', '--num_samples=1',
                '--temperature=3')
    assert set(text) <= set('abc') and len(text) == 41


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_every_precision_writes_text_like_the_datasets(trained, dtype):
    text, = run(trained, '--num_samples=1', '--temperature=0', f'--dtype={dtype}', '--start=abc')
    assert len(text) == 43 and is_walk(text)


@pytest.mark.parametrize('stop, pieces, shown, text', [
    ('', ['ab', 'c'], ['ab', 'c'], 'abc'),
    ('END', ['a', 'E', 'N', 'x', 'E', 'N', 'D', 'y'], None, 'aENx'),
    ('END', ['xE', 'N'], None, 'xEN'),                          # never completed
    ('END', ['xENDyENDz'], None, 'x')])
def test_a_sample_ends_before_its_stop_and_never_shows_it(stop, pieces, shown, text):
    class Pieces:
        def decode_bytes(self, ids):
            return pieces[ids[0]].encode()

    growing, parts = sample.Text(Pieces(), stop), []
    for i in range(len(pieces)):
        growing.add(i, last=i == len(pieces) - 1)
        parts.append(growing.new_part())
        assert ''.join(parts) == growing.text[:len(''.join(parts))]
    assert growing.text == ''.join(parts) == text and (shown is None or parts == shown)


def test_half_a_character_waits_for_the_other_half():
    class Bytes:
        def decode_bytes(self, ids):
            return bytes(ids)

    growing, parts, data = sample.Text(Bytes(), ''), [], 'a🙂é'.encode()
    for i, byte in enumerate(data):
        growing.add(byte, last=i == len(data) - 1)
        parts.append(growing.new_part())
    assert parts == ['a', '', '', '', '🙂', '', 'é']
    cut = sample.Text(Bytes(), '')
    cut.add(data[1], last=True)                         # a text that ends within a character
    assert cut.new_part() == '\N{REPLACEMENT CHARACTER}'


def test_on_a_terminal_one_sample_appears_as_it_grows(trained, monkeypatch):
    class Terminal(io.StringIO):                # without reconfigure, as in a notebook
        shown = []

        def isatty(self):
            return True

        def flush(self):
            self.shown.append(self.getvalue())

    monkeypatch.setattr(sys, 'stdout', Terminal())
    flags = ['--num_samples=1', '--max_new_tokens=30', '--start=abc']
    out_dir = trained.folder / 'out-toy'
    with script_settings(sample, '--device=cpu', f'--out_dir={out_dir}', *flags) as overrides:
        sample.main(overrides)
    piped = run(trained, *flags)[0]
    assert Terminal.shown[:31] == [piped[:3 + i] for i in range(31)]
    assert Terminal.shown[-1] == piped + END


def test_gpt2_weights_of_a_folder_write_gpt2s_tokens(workspace):
    try:
        Tokenizer()
    except RunError as error:
        pytest.skip(str(error))
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(workspace.folder / 'weights-gpt2')
    texts = run(workspace, '--init_from=weights-gpt2', '--num_samples=2', '--start=Hello there',
                '--max_new_tokens=80')
    assert len(set(texts)) == 2 and all(text.startswith('Hello there') for text in texts)
    # an empty prompt begins a document
    assert len(run(workspace, '--init_from=weights-gpt2', '--start=', '--num_samples=1')) == 1


# A file of prompts

PROMPTS = ['abc', 'defgh', 'p', 'aab' * 15, 'ab\ncc', 'mnop', 'g', 'gh' * 9]


@pytest.fixture
def prompt_file(tmp_path):
    lines = [json.dumps(dict(prompt=prompt)) + '\n' for prompt in PROMPTS]
    lines[1] = json.dumps(dict(id='two', prompt=PROMPTS[1], other=[1])) + '\n\n'
    lines[2] = json.dumps(dict(id=77, prompt=PROMPTS[2])) + '\r\n'
    path = tmp_path / 'prompts.jsonl'
    path.write_text(''.join(lines), encoding='utf-8')
    return path


def answer(trained, path, *flags):
    """The lines that sample.py writes for a file of prompts."""
    out = path.parent / 'answers.jsonl'
    flags = ['--device=cpu', f'--out_dir={trained.folder / "out-toy"}', '--max_new_tokens=30',
             f'--prompts={path}', f'--out={out}', *flags]
    with script_settings(sample, *flags) as overrides:
        sample.main(overrides)
    return [json.loads(line) for line in out.read_text(encoding='utf-8').splitlines()]


def sample_alone(trained, prompt, capsys, *flags):
    flags = ['--device=cpu', f'--out_dir={trained.folder / "out-toy"}', '--max_new_tokens=30',
             f'--start={prompt}', '--num_samples=1', *flags]
    with script_settings(sample, *flags) as overrides:
        sample.main(overrides)
    return capsys.readouterr().out.removesuffix(END)


@pytest.mark.parametrize('max_batch', [1, 3, 64])
def test_each_prompt_of_a_file_gets_the_answer_that_it_gets_alone(
        trained, prompt_file, capsys, max_batch):
    answers = answer(trained, prompt_file, '--temperature=0', f'--max_batch={max_batch}')
    assert [record['prompt'] for record in answers] == PROMPTS
    assert [record['id'] for record in answers] == [1, 'two', 77, 5, 6, 7, 8, 9]
    assert 'note: 1 of 8 prompts have more than 32 tokens' in capsys.readouterr().err
    if max_batch == 3:
        for record in answers:
            assert len(record['answer']) == 30
            alone = sample_alone(trained, record['prompt'], capsys, '--temperature=0')
            assert record['prompt'] + record['answer'] == alone


def test_answers_depend_on_their_place_and_not_on_the_batch(trained, prompt_file, monkeypatch):
    """Drawn ones too, and several to a prompt. Groups of three are held at once."""
    answers = answer(trained, prompt_file, '--num_samples=2')
    assert [record['sample'] for record in answers] == [0, 1] * len(PROMPTS)
    assert [record['prompt'] for record in answers] == [p for p in PROMPTS for _ in range(2)]
    assert len({record['answer'] for record in answers}) == len(answers)
    monkeypatch.setattr(sample, 'BATCHES_AT_ONCE', 1)
    assert answer(trained, prompt_file, '--num_samples=2', '--max_batch=3') == answers
    assert answer(trained, prompt_file, '--num_samples=2', '--seed=3') != answers


def test_an_answer_ends_before_its_stop(trained, prompt_file):
    whole = answer(trained, prompt_file, '--temperature=0')
    stopped = answer(trained, prompt_file, '--temperature=0', '--stop=e')
    assert [r['answer'] for r in stopped] == [r['answer'].split('e')[0] for r in whole]


@pytest.mark.parametrize('line, words', [
    ('{"prompt": "aXb"}', "line 12: the character 'X' is not in the vocabulary"),
    ('{"prompt": ""}', 'line 12 is empty, and this model needs something to begin with'),
    ('{"prompt": 7}', 'line 12 has no "prompt" that is a text'),
    ('["a"]', 'line 12 has no "prompt" that is a text'),
    ('{"prompt": "a", "id": 1.5}', 'line 12 has an "id" that is neither a text nor'),
    ('{"prompt": "a"', 'line 12 is not JSON'),
    ('[' * 100000, 'line 12 is not JSON'),
    ('{"prompt": "a", "id": "\\ud800"}', 'line 12 is not JSON in UTF-8 .*surrogates')])
def test_a_bad_line_is_refused_before_anything_is_answered(
        trained, prompt_file, monkeypatch, line, words):
    monkeypatch.setattr(sample, 'write_answers', lambda *arguments: pytest.fail('it began'))
    with open(prompt_file, 'a', encoding='utf-8') as file:
        file.write('\n\n' + line)
    with pytest.raises(UserError, match=words):
        answer(trained, prompt_file)


@pytest.mark.parametrize('flags, words', [
    (['--out='], 'prompts needs a file for the answers, as in --out=answers.jsonl'),
    (['--prompts='], 'out is for the answers to a file of prompts'),
    (['--start=a'], 'start and prompts are both named'),
    (['--prompts=nowhere'], "prompts='nowhere' is no regular file"),
    (['--out=nowhere/a.jsonl'], 'should be a file in a folder that exists'),
    (['--out=.'], 'should be a file in a folder that exists'),
    (['--out={path}'], 'prompts and out are the same file')])
def test_a_mistake_with_prompts_is_refused(trained, prompt_file, flags, words):
    flags = [flag.format(path=prompt_file) for flag in flags]
    with pytest.raises(UserError, match=words):
        answer(trained, prompt_file, *flags)
    prompt_file.write_text('\n')
    with pytest.raises(UserError, match='has no prompts; write lines such as'):
        answer(trained, prompt_file)


def test_a_failure_leaves_the_earlier_answers(trained, prompt_file, monkeypatch):
    earlier = answer(trained, prompt_file)

    def fail(*arguments):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(sample, 'generate_texts', fail)
    with pytest.raises(RunError, match='was not written .*make room'):
        answer(trained, prompt_file)
    text = (prompt_file.parent / 'answers.jsonl').read_text(encoding='utf-8')
    assert [json.loads(line) for line in text.splitlines()] == earlier
    assert not list(prompt_file.parent.glob('*.tmp'))


# Mistakes

@pytest.mark.parametrize('flags, words', [
    (['--start=aXb'], "the character 'X' is not in the vocabulary of this model"),
    (['--start='], 'start is empty'),
    (['--start=FILE:nowhere.txt'],
     "the prompt 'nowhere.txt' cannot be read: there is no such file"),
    (['--start=FILE:.'], "the prompt '.' cannot be read: it is not a regular file"),
    (['--start=FILE:prompt.txt'], "the prompt 'prompt.txt' is not UTF-8 at byte "),
    (['--temperature=-1'], 'temperature=-1.0 should be at least 0'),
    (['--temperature=inf'], 'temperature='), (['--top_k=-5'], 'top_k=-5 should be at least 0'),
    (['--top_p=0'], 'top_p=0.0 should be .*above 0'),
    (['--top_p=1.5'], 'top_p=1.5 should be at most 1'),
    (['--num_samples=0'], 'num_samples=0 should be at least 1'),
    (['--seed=-1'], 'seed=-1 should be at least 0'),
    (['--out_dir=out-none'], 'ckpt.pt does not exist'),
    (['--init_from=gpt3'], "'gpt3' is neither a folder nor a hub model"),
    (['--device=gpu'], "device='gpu' is unknown"),
    (['--dtype=float8'], "dtype='float8' is unknown"),
    (['--temprature=1'], 'did you mean temperature?')])
def test_a_mistake_is_refused_before_anything_is_written(
        trained, tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'prompt.txt').write_bytes(b'\xff\xfe\0')
    flags = ['--device=cpu', f'--out_dir={trained.folder / "out-toy"}', '--start=a', *flags]
    with pytest.raises(UserError, match=words):
        with script_settings(sample, *flags) as overrides:
            sample.main(overrides)
    assert capsys.readouterr().out == '' and [p.name for p in tmp_path.iterdir()] == ['prompt.txt']


def test_a_chat_without_a_message_is_refused():
    with pytest.raises(UserError, match='chat=True needs a message; try --start="Hello"'):
        with script_settings(sample, '--chat=True') as overrides:
            sample.check_settings(overrides)


@pytest.mark.parametrize('changes, words', [
    (dict(tokenizer={'tokenizer': 'char'}), 'ckpt.pt: vocab_size is None'),
    (dict(tokenizer={'tokenizer': 'char', 'vocab_size': 17, 'chars': 7}),
     'ckpt.pt: chars should be 17 different characters'),
    (dict(tokenizer=['a']), 'ckpt.pt: its tokenizer is a list'),
    (dict(tokenizer={'tokenizer': 'char', 'vocab_size': 18, 'chars': 'abcdefghijklmnopqr'}),
     'has 17 tokens, and its tokenizer 18'),
    (dict(tokenizer=None, config={'dataset': '../../etc'}),
     r"has 17 tokens, and its tokenizer 50257; .*dataset='../../etc'"),
    (dict(tokenizer=None, config={'dataset': 7}), 'dataset=7 should be')])
def test_a_damaged_tokenizer_of_a_checkpoint_is_refused(
        trained, tmp_path, monkeypatch, changes, words):
    monkeypatch.setattr(dataloader, 'DATA', tmp_path)
    saved = torch.load(trained.folder / 'out-toy' / 'ckpt.pt', weights_only=True)
    torch.save({**saved, **changes}, tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match=words):
        flags = ['--device=cpu', f'--out_dir={tmp_path}', '--start=a']
        with script_settings(sample, *flags) as overrides:
            sample.main(overrides)


def test_a_prompt_comes_from_a_regular_file_without_its_byte_order_mark(tmp_path):
    (tmp_path / 'prompt.txt').write_bytes(b'\xef\xbb\xbfabc')
    assert sample.read_prompt(f'FILE:{tmp_path / "prompt.txt"}') == 'abc'
    others = ['/dev/zero', tmp_path, tmp_path / 'nowhere', 'x' * 5000]
    if hasattr(os, 'mkfifo'):
        os.mkfifo(tmp_path / 'fifo')
        others.append(tmp_path / 'fifo')
    for path in others:
        with pytest.raises(UserError, match='cannot be read'):
            sample.read_prompt(f'FILE:{path}')
