"""evaluate.py --text: each token of a text, against plain forward passes."""

import dataclasses
import json
import math
import random

import pytest
import torch
from harness import CAN_FORK, script_settings
from test_tasks import CHARACTERS, SPEC, make_model, words

import evaluate
from engine.checkpoint import gathered
from engine.distributed import Environment
from engine.errors import RunError, UserError
from engine.evaluation.own_text import TextScorer, load_own_text
from engine.evaluation.results import evaluate_tasks
from engine.evaluation.tasks import load_tasks
from engine.log import log
from engine.tokenizer import Tokenizer
from model import GPT, GPTConfig

BLOCK = 64
ENV = Environment(torch.device('cpu'), 'float32', False, 0, 0, 1, '')


@pytest.fixture
def path(tmp_path):
    path = tmp_path / 'story.txt'
    path.write_text(words(random.Random(1), 80)[:300], encoding='utf-8')
    return path


@pytest.fixture
def out_dir(tmp_path):
    gathered.write(tmp_path / 'ckpt_000007.pt', dict(
        make_model().to_checkpoint(), iter_num=7, best_val_loss=1.0, config={},
        tokenizer=SPEC.to_dict()))
    return tmp_path / 'ckpt_000007.pt'


def expected_lines(model, text, stride, before=()):
    """The lines of the file, one forward pass for each token.

    Token t is in the first window that has it. Windows of BLOCK + 1 tokens begin at multiples of
    stride, and the last one ends with the text.
    """
    ids = [*before, *(CHARACTERS.index(character) for character in text)]
    found = []
    if not before:
        found.append((ids[0], text[0], None, None))
    for t in range(1, len(ids)):
        number = max(0, math.ceil((t - BLOCK) / stride))
        begin = min(number * stride, max(0, len(ids) - BLOCK - 1))
        logits = model(torch.tensor([ids[begin:t]]))[0][0, -1]
        logprobs = logits.double().log_softmax(-1)
        rank = sorted(logprobs.tolist(), reverse=True).index(logprobs[ids[t]].item()) + 1
        found.append((ids[t], CHARACTERS[ids[t]], logprobs[ids[t]].item(), rank))
    return found


def check_lines(lines, expected):
    assert [line[:2] for line in lines] == [line[:2] for line in expected]
    assert [line[3] for line in lines] == [line[3] for line in expected]
    for line, other in zip(lines, expected, strict=True):
        assert line[2] == (other[2] and pytest.approx(other[2], abs=1e-4))


def run(out_dir, path, *flags):
    handlers = log.handlers                     # main changes them for the process
    try:
        with script_settings(evaluate, f'--out_dir={out_dir}', '--device=cpu', f'--text={path}',
                             *flags) as overrides:
            evaluate.main(overrides)
    finally:
        log.handlers = handlers


@pytest.mark.parametrize('stride', [1, 20, 32, 64])
@torch.no_grad()
def test_each_token_has_the_numbers_of_a_forward_pass(out_dir, path, tmp_path, capsys, stride):
    flags = [f'--per_token={tmp_path / "new" / "tokens.jsonl"}', '--batch_size=3']
    if stride != 32:                            # 32, half of the block, is the default
        flags.append(f'--stride={stride}')
    run(out_dir, path, *flags)

    file = (tmp_path / 'new' / 'tokens.jsonl').read_text(encoding='utf-8')
    lines = [tuple(json.loads(line).values()) for line in file.splitlines()]
    expected = expected_lines(make_model(), path.read_text(), stride)
    check_lines(lines, expected)

    # the table
    nats = -sum(line[2] for line in expected[1:])
    shown = capsys.readouterr()
    values = {line.split()[1]: float(line.split()[2]) for line in shown.out.splitlines()[1:]}
    assert values == pytest.approx(dict(
        token_perplexity=math.exp(nats / 299), bits_per_byte=nats / 300 / math.log(2)), abs=1e-3)
    assert f'300 tokens in windows of 64, {stride} apart' in shown.out
    assert f'{out_dir}: a kept model, iteration 7' in shown.err
    assert not list(tmp_path.glob('*eval.json'))


@torch.no_grad()
def test_a_stride_of_a_block_gives_the_results_of_a_text_task(path):
    model = make_model()
    tokenizer = Tokenizer(SPEC)
    tasks, _ = load_tasks('story', path.parent, tokenizer, BLOCK)
    expected = {r['metric']: (r['value'], r['stderr']) for r in evaluate_tasks(model, tasks, ENV)}

    scorer = TextScorer(load_own_text(str(path), tokenizer, BLOCK, BLOCK), model, ENV, 2)
    assert len(list(scorer.lines())) == 300
    for result in scorer.results():
        found = (result['value'], result['stderr'])
        assert found == pytest.approx(expected[result['metric']], rel=1e-5)


@pytest.mark.parametrize('length', [1, 30, 65, 200])
@torch.no_grad()
def test_a_text_follows_the_end_of_another_where_the_tokenizer_has_one(path, length):
    """Then its first token has numbers too. A text may be shorter than a window."""
    text = path.read_text()[:length]
    path.write_text(text)
    tokenizer = Tokenizer(dataclasses.replace(SPEC, end_of_text=5))
    scorer = TextScorer(load_own_text(str(path), tokenizer, BLOCK, 16), make_model(), ENV, 4)
    check_lines(list(scorer.lines()), expected_lines(make_model(), text, 16, before=[5]))


def test_characters_of_several_tokens_come_with_the_last_of_them(path):
    try:
        tokenizer = Tokenizer()
    except RunError as error:
        pytest.skip(str(error))
    text = 'one 🙂 é <|endoftext|> 漢字\n'
    path.write_text(text, encoding='utf-8')
    model = GPT(GPTConfig(16, 50304, 1, 1, 8))
    lines = list(TextScorer(load_own_text(str(path), tokenizer, 16, 8), model, ENV, 4).lines())
    assert ''.join(line.text for line in lines) == text
    assert '' in [line.text for line in lines]
    assert [line.token for line in lines] == tokenizer.encode_to_numpy(text).tolist()


@pytest.mark.skipif(not CAN_FORK, reason='two ranks are started by fork')
def test_the_file_does_not_depend_on_the_number_of_ranks(workspace, out_dir, path, tmp_path):
    files = []
    for ranks in (1, 2):
        file = tmp_path / f'{ranks}.jsonl'
        result = workspace.run('evaluate.py', f'--out_dir={out_dir}', '--device=cpu',
                               f'--text={path}', f'--per_token={file}', '--batch_size=3',
                               ranks=ranks)
        assert result.stdout.count('token_perplexity') == 1
        files.append(file.read_bytes())
    assert files[0] == files[1]


def test_results_of_a_kept_model_lie_beside_it(out_dir, path):
    handlers = log.handlers
    with script_settings(evaluate, f'--out_dir={out_dir}', '--device=cpu', '--tasks=story',
                         f'--data={path.parent}') as overrides:
        evaluate.main(overrides)
    log.handlers = handlers
    content = json.loads((out_dir.parent / 'ckpt_000007.eval.json').read_text())
    assert content['iter_num'] == 7
    assert not (out_dir.parent / 'eval.json').exists()


@pytest.mark.parametrize('flags, words', [
    (['--tasks=story'], 'tasks is for tasks, and --text=.* scores a text; name one'),
    (['--limit=3'], 'limit is for tasks'),
    (['--stride=65'], 'stride=65 should be at least 0 and at most 64'),
    (['--text=', '--per_token=x'], 'per_token is for a text; name it with --text=FILE'),
    (['--text=nowhere.txt'], 'nowhere.txt is not a regular file'),
    (['--per_token=.'], 'is a folder; name a file, as in --per_token=tokens.jsonl'),
    (['--text=', '--examples=.'], 'is a folder; name a file, as in --examples=examples.jsonl')])
def test_a_mistake_is_refused(out_dir, path, flags, words):
    with pytest.raises(UserError, match=words):
        run(out_dir, path, *flags)


@pytest.mark.parametrize('content, words', [
    (b'\xff\xfe', 'is not UTF-8 at byte 0; save it as UTF-8'),
    (b'', 'too few tokens'),
    (b'a', 'too few tokens'),
    (b'abc\xc3\xa9', "the character 'é' is not in the vocabulary .* no likelihood")])
def test_a_text_that_cannot_be_scored_is_refused(out_dir, path, content, words):
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        run(out_dir, path)


def test_a_failure_leaves_the_earlier_file(out_dir, path, tmp_path, monkeypatch):
    """As where the model gives no finite number."""
    file = tmp_path / 'tokens.jsonl'
    file.write_text('earlier')
    monkeypatch.setattr(GPT, 'logits', lambda self, x: x.new_full((*x.shape[:-1], 40), math.nan))
    with pytest.raises(RunError, match='not finite'):
        run(out_dir, path, f'--per_token={file}')
    assert file.read_text() == 'earlier' and not list(tmp_path.glob('*.tmp'))
