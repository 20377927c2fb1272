"""Scores against transformers' own logits, in a loop that scores one text at a time."""

import dataclasses
import json
import math
import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engine import distributed
from engine.chat_layout import ChatLayout
from engine.errors import RunError, UserError
from engine.evaluation import scoring, task_files
from engine.evaluation.results import evaluate_tasks, summarize, summarize_core
from engine.evaluation.tasks import Example, Task, load_tasks, text_pairs, windows
from engine.log import log
from engine.tokenizer import Tokenizer, char_spec
from model import GPT, GPTConfig

CHARACTERS = ''.join(sorted(set('abcdefghijklmnopqrstuvwxyz .,:=\nABCQ')))
SPEC = char_spec(CHARACTERS)
OPTIONS = [{}]
if 'position' in {field.name for field in dataclasses.fields(GPTConfig)}:   # GPTs beyond GPT-2
    OPTIONS += [dict(position='rotary', n_kv_head=1), dict(position='alibi', softcap=5.0)]


def words(random, count):
    made = []
    for _ in range(count):
        letters = random.choices('abcdefghij', k=random.randint(1, 6))
        made.append(''.join(letters))
    return ' '.join(made)


def write_records(path, records):
    text = ''.join(json.dumps(record) + '\n' for record in records)
    path.write_text(text, encoding='utf-8')


def write_tasks(folder, count=10):
    """A file of each kind, of texts that are random but for what a choice begins with."""
    r = random.Random(0)
    folder.mkdir(exist_ok=True)

    records = []
    for _ in range(count):
        query = words(r, r.randint(1, 8))
        choices = [words(r, r.randint(1, 4)) for _ in range(r.randint(2, 5))]
        records.append(dict(query=query, choices=choices, gold=r.randrange(2)))
    write_records(folder / 'choices.jsonl', records)

    records = []
    for _ in range(count):
        contexts = ['so ' + words(r, 3), 'so ' + words(r, 2)]
        records.append(dict(context_options=contexts, continuation=words(r, 3),
                            gold=r.randrange(2)))
    write_records(folder / 'contexts.jsonl', records)

    records = []
    for _ in range(count):
        context = words(r, r.randint(2, 9))
        records.append(dict(context=context, continuation=words(r, 1)))
    write_records(folder / 'words.jsonl', records)

    records = []
    for _ in range(count):
        prompt = words(r, 2) + '='
        records.append(dict(prompt=prompt, answer=words(r, 1)))
    write_records(folder / 'exact.jsonl', records)

    (folder / 'story.txt').write_text(words(r, 60), encoding='utf-8')
    return folder


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp('tasks'))


def make_model(block_size=64, **options):
    """A GPT whose probabilities are far from equal."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size, len(CHARACTERS), 2, 2, 32, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def reference_scores(model, context, continuation, block_size=64):
    """(log-likelihood, all greedy) by the logits of `model` for one whole text, without batches or
    shared contexts."""
    ids = [CHARACTERS.index(c) for c in context + continuation][-block_size - 1:]
    logits = model(torch.tensor([ids[:-1]]))
    logprobs = F.log_softmax(logits[0].double(), dim=-1)[-len(continuation):]
    targets = torch.tensor(ids[-len(continuation):])
    loglikelihood = logprobs.gather(1, targets[:, None]).sum().item()
    return loglikelihood, bool((logprobs.argmax(-1) == targets).all())


def all_logits(model):
    return lambda idx: model.logits(model.hidden(idx))


@pytest.fixture(scope='module')
def transformers_logits():
    pytest.importorskip('transformers')
    from engine.hf import weights as hf_weights
    model = make_model()
    reference = hf_weights.to_transformers(model.config, model.state_dict())
    return lambda idx: reference(idx).logits


def read(folder, name):
    text = (folder / f'{name}.jsonl').read_text(encoding='utf-8')
    return [json.loads(line) for line in text.splitlines()]


def reference_results(logits, folder):
    """{(task, metric): value} of a loop over the examples, one text at a time."""
    found = {}

    rows = []
    for record in read(folder, 'choices'):
        choices = record['choices']
        summed = [reference_scores(logits, record['query'], f' {c}')[0] for c in choices]
        per_character = [x / len(c) for x, c in zip(summed, choices)]
        per_token = [x / (len(c) + 1) for x, c in zip(summed, choices)]
        rows.append([np.argmax(values) == record['gold']
                     for values in (summed, per_character, per_token)])
    acc, acc_norm, acc_tok = np.mean(rows, axis=0)
    found['choices', 'acc'] = acc
    found['choices', 'acc_norm'] = acc_norm
    found['choices', 'acc_tok'] = acc_tok

    right = []
    for record in read(folder, 'contexts'):
        continuation = ' ' + record['continuation']
        values = [reference_scores(logits, context, continuation)[0]
                  for context in record['context_options']]
        right.append(np.argmax(values) == record['gold'])
    found['contexts', 'acc'] = np.mean(right)

    records = read(folder, 'words')
    scores = [reference_scores(logits, r['context'], ' ' + r['continuation']) for r in records]
    found['words', 'acc'] = np.mean([greedy for _, greedy in scores])
    found['words', 'perplexity'] = math.exp(-np.mean([value for value, _ in scores]))
    last = []
    for record in records:
        text = f'{record["context"]} {record["continuation"]}'
        last.append(reference_scores(logits, text[:-1], text[-1])[1])
    found['words', 'acc_last_token'] = np.mean(last)

    records = read(folder, 'exact')
    right = [reference_scores(logits, r['prompt'], r['answer'])[1] for r in records]
    found['exact', 'acc'] = np.mean(right)

    text = (folder / 'story.txt').read_text(encoding='utf-8')
    nll = 0
    for begin in range(1, len(text), 64):       # the last window has all the context that fits
        scored = text[begin:begin + 64]
        first = begin - 1 if len(scored) == 64 else max(0, len(text) - 65)
        nll -= reference_scores(logits, text[first:begin], scored)[0]
    found['story', 'token_perplexity'] = math.exp(nll / (len(text) - 1))
    found['story', 'bits_per_byte'] = nll / math.log(2) / len(text)
    return found


def load(names, folder, tokenizer=None, block_size=64):
    """The tasks alone."""
    tasks, _ = load_tasks(names, folder, tokenizer or Tokenizer(SPEC), block_size)
    return tasks


def run_tasks(model, tasks, **options):
    return evaluate_tasks(model, tasks, distributed.start_environment(device='cpu'), **options)


def evaluate(model, folder, names='choices,contexts,words,exact,story', **options):
    tasks = load(names, folder, block_size=model.config.block_size)
    results = run_tasks(model, tasks, **options)
    return {(r['task'], r['metric']): r['value'] for r in results}


LAYOUT = ChatLayout(system='s', user='a', assistant='b', end='c')


def test_with_a_chat_layout_a_user_asks_and_the_answer_has_to_end(folder):
    tasks, _ = load_tasks('exact', folder, Tokenizer(SPEC), 64, limit=3, chat=LAYOUT)
    for example, record in zip(tasks[0].examples, read(folder, 'exact')):
        option, = example.options
        prompt = f'a{record["prompt"]}cb'
        whole = f'{prompt}{record["answer"]}c'
        assert Tokenizer(SPEC).decode(option.tokens.tolist()) == whole
        assert option.n_scored == len(whole) - len(prompt)


def test_only_prompts_with_answers_are_asked_in_a_chat_layout(folder):
    with pytest.raises(UserError, match='choices is no task of prompts and answers'):
        load_tasks('exact,choices', folder, Tokenizer(SPEC), 64, chat=LAYOUT)


@pytest.mark.parametrize('batch_size', [1, 32])
def test_every_kind_agrees_with_transformers(folder, transformers_logits, batch_size):
    expected = pytest.approx(reference_results(transformers_logits, folder), rel=1e-5)
    assert evaluate(make_model(), folder, batch_size=batch_size) == expected


@pytest.mark.parametrize('options', OPTIONS)
@pytest.mark.parametrize('batch_size', [1, 5, 32])
def test_the_loglikelihood_of_every_option_is_that_of_the_text_alone(folder, options, batch_size):
    model = make_model(**options)
    env = distributed.start_environment(device='cpu')
    for task in load('choices,contexts,words', folder):
        examples = [example.options for example in task.examples]
        found = scoring.score(model, examples, env, batch_size)
        for record, scores in zip(read(folder, task.name), found, strict=True):
            pairs = text_pairs(task.kind, record)
            for (context, continuation), score in zip(pairs, scores, strict=True):
                value, greedy = reference_scores(all_logits(model), context.rstrip(),
                                                 ' ' + continuation)
                assert score.loglikelihood == pytest.approx(value, abs=1e-4)
                assert score.greedy == greedy
                assert score.tokens == 1 + len(continuation)


def test_what_the_options_share_is_read_once():
    """Two choices after 40 tokens are 40 tokens and their own."""
    options = [scoring.Option(np.array([*range(40), 50, 51]), 40),
               scoring.Option(np.array([*range(40), 60, 61, 62]), 40)]
    tree = scoring.Tree(options)
    assert tree.tokens.tolist() == [*range(40), 50, 60, 61]
    assert tree.positions.tolist() == [*range(41), 40, 41]
    assert tree.branches.tolist() == [0] * 40 + [1, 2, 2]
    assert [nodes.tolist() for nodes in tree.option_nodes] == [[39, 40], [39, 41, 42]]


def test_a_context_that_is_too_long_loses_its_beginning(folder, tmp_path):
    record = dict(context='abcde ' * 30, continuation='fgh')
    write_records(tmp_path / 'long.jsonl', [record])
    model = make_model(block_size=16)
    value, _ = reference_scores(all_logits(model), record['context'].rstrip(), '  fgh',
                                block_size=16)
    found = evaluate(model, tmp_path, 'long')
    assert found['long', 'perplexity'] == pytest.approx(math.exp(-value), rel=1e-5)


def test_evaluation_moves_neither_the_mode_nor_the_random_numbers(folder):
    model = make_model(dropout=0.5).train()
    state = torch.get_rng_state()
    python_state = random.getstate()
    first = evaluate(model, folder)
    assert model.training
    assert torch.equal(state, torch.get_rng_state()) and random.getstate() == python_state
    assert evaluate(model, folder) == first == pytest.approx(evaluate(model.eval(), folder))


def test_a_signal_ends_the_evaluation(folder):
    model = make_model().train()
    assert run_tasks(model, load('choices', folder), should_stop=lambda: True) is None
    assert model.training


def test_weights_that_are_not_finite_end_in_one_line(folder):
    model = make_model()
    model.transformer.ln_f.weight.data[0] = math.nan
    with pytest.raises(RunError, match='not finite numbers in float32'):
        evaluate(model, folder, 'words')


@pytest.mark.parametrize('size, stride', [(8, 8), (8, 4), (9, 8), (100, 100)])
@pytest.mark.parametrize('length', [2, 8, 9, 16, 17, 41])
def test_windows_score_each_token_once_after_at_most_size_tokens(length, size, stride):
    scored = []
    for option in windows(np.arange(length), size, stride):
        assert len(option.tokens) <= size and (np.diff(option.tokens) == 1).all()
        scored += option.tokens[option.start:].tolist()
    if size > stride:           # else the first token of each window has nothing before it
        assert scored == list(range(1, length))
    else:
        assert scored == [i for i in range(length) if i % size]


@pytest.mark.parametrize('length', [2, 8, 9, 16, 17, 18, 41])
def test_the_last_window_is_filled_with_context(length):
    *plain, plain_last = windows(np.arange(length), 9, 8)
    *before, last = windows(np.arange(length), 9, 8, fill_last=True)
    assert [o.tokens.tolist() for o in before] == [o.tokens.tolist() for o in plain]
    assert last.tokens.tolist() == list(range(max(0, length - 9), length))
    assert last.tokens[last.start:].tolist() == plain_last.tokens[plain_last.start:].tolist()


def test_the_standard_error_is_that_of_the_mean(folder):
    model = make_model()
    results = {r['metric']: r for r in run_tasks(model, load('words', folder))}
    nll = []
    for record in read(folder, 'words'):
        value, _ = reference_scores(all_logits(model), record['context'],
                                    ' ' + record['continuation'])
        nll.append(-value)

    n = len(nll)
    expected = math.exp(np.mean(nll)) * np.std(nll, ddof=1) / math.sqrt(n)
    assert results['perplexity']['stderr'] == pytest.approx(expected, rel=1e-4)
    p = results['acc_last_token']['value']
    expected = math.sqrt(p * (1 - p) / (n - 1))
    assert results['acc_last_token']['stderr'] == pytest.approx(expected)


# WikiText

WIKI = (
    ' \n = Robert Boulter = \n \n'
    ' He had a guest @-@ starring role in 1 @,@ 000 films ( see " Craig " ) . \n \n'
    ' = = Career = = \n\n'
    " Teddy 's Story . \n \n"
    ' = Du Fu = \n \n'
    " A poet ; he said : ' no ' . \n = not a heading \n \n")


def test_wikitext_is_cut_at_first_level_headings_and_detokenized():
    pages = task_files.wikitext_pages(WIKI)
    assert [page[:12] for page in pages] == [' = Robert Bo', ' = Du Fu = \n']
    # what wikitext_detokenizer of lm-evaluation-harness 0.4.13 makes of these pages
    assert [task_files.detokenize_wikitext(page) for page in pages] == [
        ' = Robert Boulter =\n\nHe had a guest-starring role in 1,000 films (see "Craig").\n\n'
        "== Career ==\n\nTeddy's Story.\n",
        " = Du Fu =\n\nA poet; he said: 'no'.\n= not a heading\n\n"]


def test_wikitext_perplexity_divides_by_the_words_of_the_raw_pages(tmp_path):
    """A model without preference gives each token -log V, so the result follows from counts."""
    characters = ''.join(sorted(set(WIKI + "'")))
    size = len(characters)
    model = GPT(GPTConfig(32, size, 1, 1, 8))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    (tmp_path / 'wikitext2.txt').write_text(WIKI, encoding='utf-8')
    tokenizer = Tokenizer(char_spec(characters))
    tasks = load('wikitext2,wikitext2_blocks', tmp_path, tokenizer, 32)
    found = {r['metric']: r['value'] for r in run_tasks(model, tasks)}

    pages = task_files.wikitext_pages(WIKI)
    scored = 0
    n_words = 0
    for page in pages:
        scored += len(task_files.detokenize_wikitext(page)) - 1     # each but the first
        n_words += len(page.split()) + 2        # lm-evaluation-harness counts the two empty ends
    assert found['word_perplexity'] == pytest.approx(size ** (scored / n_words), rel=1e-5)
    bits_per_byte = math.log2(size) * scored / sum(map(len, pages))
    assert found['bits_per_byte'] == pytest.approx(bits_per_byte, rel=1e-5)
    assert found['token_perplexity'] == pytest.approx(size, rel=1e-5)


class Words:
    """A tokenizer like GPT-2's, of which only the ids matter."""
    chars = None
    end_of_text = 50256

    def encode_to_numpy(self, text):
        return np.arange(len(text.split()), dtype=np.uint16)


def test_a_gpt2_text_begins_after_end_of_text_and_the_raw_one_does_not(tmp_path):
    (tmp_path / 'ptb.txt').write_text(' a b c \n d e \n', encoding='utf-8')
    text, blocks = load('ptb,ptb_blocks', tmp_path, Words(), 3)

    def options(task):
        return [(option.tokens.tolist(), option.start)
                for example in task.examples for option in example.options]
    assert options(text) == [([50256, 0, 1, 2], 1), ([1, 2, 3, 4], 2)]
    assert options(blocks) == [([0, 1, 2], 1), ([3, 4], 1)]
    assert text.units == dict(word_perplexity=5 + 2)
    assert blocks.units == dict(token_perplexity=3)


# CORE

# GPT-2 124M as nanochat publishes it: accuracies in the order of the table, and what they make.
PUBLISHED = [0.308504, 0.001889, 0.282663, 0.412458, 0.221843, 0.600000, 0.224406, 0.622960,
             0.278000, 0.322919, 0.307907, 0.578755, 0.486188, 0.155000, 0.226087, 0.419697,
             0.085714, 0.031250, 0.058278, 0.133659, 0.552294, 0.256600]


def test_core_is_the_mean_of_centered_accuracies():
    right, wrong = ([scoring.Score(value, 1, True, True) for value in values]
                    for values in ((-1, -2), (-2, -1)))
    results = []
    for core, accuracy in zip(task_files.core_tasks(), PUBLISHED, strict=True):
        examples = [Example([], i, gold=0) for i in range(1000)]
        task = Task(core.name, 'schema', examples, baseline=core.baseline)
        count = round(accuracy * 1000)
        results += summarize(task, [right] * count + [wrong] * (1000 - count))

    mean, = summarize_core(results, ['squad'])
    assert mean['value'] == pytest.approx(0.113891, abs=1e-3)
    assert mean['protocol'].endswith('; without squad')


@pytest.mark.parametrize('limit', [0, 4, 3])
def test_core_shows_solved_examples_and_scores_from_the_first_difference(tmp_path, limit):
    """Those are drawn from the others of the first `limit` examples, as nanochat cuts the list."""
    (tmp_path / 'commonsense_reasoning').mkdir()
    (tmp_path / 'world_knowledge').mkdir()
    r = random.Random(1)
    piqa = [dict(query=f'Q: {words(r, 2)}', choices=['the ' + words(r, 1), 'the ' + words(r, 1)],
                 gold=i % 2) for i in range(4)]
    jeopardy = [dict(context=f' {words(r, 2)} ', continuation=words(r, 1)) for _ in range(4)]
    write_records(tmp_path / 'commonsense_reasoning' / 'piqa.jsonl', piqa)
    write_records(tmp_path / 'world_knowledge' / 'jeopardy_all.jsonl', jeopardy)

    tokenizer = Tokenizer(SPEC)
    (question, choice), missing = load_tasks('core', tmp_path, tokenizer, 10 ** 4, limit)
    assert (question.name, choice.name) == ('jeopardy', 'piqa')
    assert len(missing) == 20 and 'squad' in missing

    order = list(range(4))
    random.Random(1337).shuffle(order)
    if limit:
        order = order[:limit]
    assert [example.number for example in choice.examples] == order
    assert [example.number for example in question.examples] == order
    for i, number in enumerate(order):
        others = [other for other in order if other != number]
        drawn = random.Random(1234 + i).sample(others, len(others))

        shots = ''
        for j in drawn:
            right = piqa[j]['choices'][piqa[j]['gold']]
            shots += f'{piqa[j]["query"]}\nAnswer: {right}\n\n'
        choices = piqa[number]['choices']
        same = next(k for k, (a, b) in enumerate(zip(*choices)) if a != b)
        for option, answer in zip(choice.examples[i].options, choices):
            text = f'{shots}{piqa[number]["query"]}\nAnswer: {answer}'
            assert tokenizer.decode(option.tokens.tolist()) == text
            assert option.start == len(text) - len(answer) + same

        shots = ''
        for j in drawn:
            shots += f'{jeopardy[j]["context"].strip()}\nAnswer: {jeopardy[j]["continuation"]}\n\n'
        option, = question.examples[i].options
        text = tokenizer.decode(option.tokens.tolist())
        context = jeopardy[number]['context'].strip()
        continuation = jeopardy[number]['continuation']
        assert text == f'{shots}{context}\nAnswer: {continuation}'
        assert text[option.start:] == ' ' + continuation


# Files

def test_examples_that_a_model_cannot_read_are_counted(folder, tmp_path):
    known = dict(prompt='ab=', answer='c')
    unknown = dict(prompt='é=', answer='c')
    path = tmp_path / 'exact.jsonl'
    write_records(path, [unknown, known, dict(known, answer='c' * 99)])
    task, = load('exact', tmp_path)
    assert task.skipped == 2 and "'é'" in task.reason
    assert [example.number for example in task.examples] == [1]
    result, = run_tasks(make_model(), [task])
    assert (result['examples'], result['skipped']) == (1, 2)

    write_records(path, [unknown])
    words = "can read none of the 1 examples; the character 'é' is not in the vocabulary"
    with pytest.raises(UserError, match=words):
        load('exact', tmp_path)


def test_a_task_that_a_model_cannot_read_is_left_out(folder, tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(log, 'info', logged.append)
    write_records(tmp_path / 'exact.jsonl', [dict(prompt='ab=', answer='c')])
    write_records(tmp_path / 'foreign.jsonl', [dict(prompt='é=', answer='c')])
    (tmp_path / 'story.txt').write_text('é', encoding='utf-8')
    tasks = load('foreign,exact,story', tmp_path)
    assert [task.name for task in tasks] == ['exact']
    assert len(logged) == 2
    assert 'a task is left out: ' in logged[0] and 'foreign.jsonl' in logged[0]
    assert 'a task is left out: ' in logged[1] and 'story.txt' in logged[1]


CHOICE = dict(query='a', choices=['b', 'c'], gold=1)


def changed_choice(**changes):
    return json.dumps(dict(CHOICE, **changes)).encode()


@pytest.mark.parametrize('content, fault', [
    (b'', 'is empty'),
    (b'\n \n', 'is empty'),
    (b'{"query": ', 'line 1 is not JSON'),
    (b'[' * 10 ** 5, 'line 1 is not JSON'),
    (b'\xff\xfe', 'line 1 is not JSON'),
    (b'17', 'is not an example of a task'),
    (b'{"text": "a"}', 'is not an example of a task'),
    (changed_choice() + b'\n{"context": "a", "continuation": "b"}',
     'line 2 is not a valid multiple choice example: query'),
    (changed_choice() + b'\n[]', 'line 2 is not a valid multiple choice example: it is a list'),
    (changed_choice(gold=2), 'gold=2'),
    (changed_choice(gold=True), 'gold'),
    (changed_choice(choices=['b', 1]), 'options'),
    (changed_choice(choices=['b', '']), 'options'),
    (changed_choice(choices=['b']), 'options'),
    (b'{"context": "a", "continuation": ""}', 'continuation is empty')])
def test_a_damaged_or_foreign_file_is_one_line(tmp_path, content, fault):
    (tmp_path / 'task.jsonl').write_bytes(content)
    with pytest.raises(UserError) as error:
        load('task', tmp_path)
    message = str(error.value)
    assert fault in message and '\n' not in message and len(message) < 600


@pytest.mark.parametrize('name', ['hellaswg', '../choices', '', '.', 'a/b', '.hidden'])
def test_an_unknown_task_is_one_line(folder, name):
    words = 'there is no task .* has choices, contexts, exact, story, words; python data'
    with pytest.raises(UserError, match=words):
        load(name, folder)


@pytest.mark.parametrize('content, words', [
    (b'abc\xff', 'not UTF-8 at byte 3'),
    (b'aXb', "'X' is not in the vocabulary"),
    (b'', 'too short')])
def test_a_text_that_is_none_is_one_line(tmp_path, content, words):
    (tmp_path / 'text.txt').write_bytes(content)
    with pytest.raises(UserError, match=words):
        load('text', tmp_path)


def test_a_folder_in_the_place_of_a_file_is_one_line(tmp_path):
    (tmp_path / 'folder.jsonl').mkdir()
    with pytest.raises(UserError, match='is not a regular file'):
        load('folder', tmp_path)
    with pytest.raises(UserError, match='holds no file of CORE'):
        load('core', tmp_path)
