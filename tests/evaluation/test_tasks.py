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
from engine.errors import RunError, UserError
from engine.evaluation import (
    results as evaluation_results,
)
from engine.evaluation import (
    scoring,
    task_files,
)
from engine.evaluation import (
    tasks as evaluation_tasks,
)
from engine.tokenizer import Tokenizer
from model import GPT, GPTConfig

CHARACTERS = ''.join(sorted(set('abcdefghijklmnopqrstuvwxyz .,:=\nABCQ')))
SPEC = dict(tokenizer='char', vocab_size=len(CHARACTERS), chars=CHARACTERS)
OPTIONS = [{}]
if 'position' in {f.name for f in dataclasses.fields(GPTConfig)}:       # GPTs beyond GPT-2
    OPTIONS += [dict(position='rotary', n_kv_head=1), dict(position='alibi', softcap=5.0)]


def words(random, count):
    return ' '.join(''.join(random.choices('abcdefghij', k=random.randint(1, 6))) for _ in range(count))


def write_tasks(folder, count=10):
    """A file of each kind, of texts that are random but for what a choice begins with."""
    r = random.Random(0)
    records = dict(
        choices=[dict(query=words(r, r.randint(1, 8)), choices=[words(r, r.randint(1, 4)) for _ in range(r.randint(2, 5))],
                      gold=r.randrange(2)) for _ in range(count)],
        contexts=[dict(context_options=['so ' + words(r, 3), 'so ' + words(r, 2)], continuation=words(r, 3), gold=r.randrange(2))
                  for _ in range(count)],
        words=[dict(context=words(r, r.randint(2, 9)), continuation=words(r, 1)) for _ in range(count)],
        exact=[dict(prompt=words(r, 2) + '=', answer=words(r, 1)) for _ in range(count)])
    folder.mkdir(exist_ok=True)
    for name, lines in records.items():
        (folder / f'{name}.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines), encoding='utf-8')
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
    """(log-likelihood, all greedy) by the logits of `model` for one whole text, without batches or shared contexts."""
    ids = [CHARACTERS.index(c) for c in context + continuation][-block_size - 1:]
    logits = model(torch.tensor([ids[:-1]]))
    logprobs = F.log_softmax(logits[0].double(), dim=-1)[-len(continuation):]
    targets = torch.tensor(ids[-len(continuation):])
    return logprobs.gather(1, targets[:, None]).sum().item(), bool((logprobs.argmax(-1) == targets).all())


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
    return [json.loads(line) for line in (folder / f'{name}.jsonl').read_text(encoding='utf-8').splitlines()]


def reference_results(logits, folder):
    """{(task, metric): value} of a loop over the examples, one text at a time."""
    found = {}
    rows = []
    for record in read(folder, 'choices'):
        lls = [reference_scores(logits, record['query'], f' {c}')[0] for c in record['choices']]
        rows.append([np.argmax(values) == record['gold'] for values in (
            lls, [x / len(c) for x, c in zip(lls, record['choices'])], [x / (len(c) + 1) for x, c in zip(lls, record['choices'])])])
    found.update(zip([('choices', m) for m in ('acc', 'acc_norm', 'acc_tok')], np.mean(rows, axis=0)))
    found['contexts', 'acc'] = np.mean([record['gold'] == np.argmax(
        [reference_scores(logits, c, ' ' + record['continuation'])[0] for c in record['context_options']])
        for record in read(folder, 'contexts')])
    scores = [reference_scores(logits, r['context'], ' ' + r['continuation']) for r in read(folder, 'words')]
    found['words', 'acc'] = np.mean([greedy for _, greedy in scores])
    found['words', 'perplexity'] = math.exp(-np.mean([ll for ll, _ in scores]))
    found['words', 'acc_last_token'] = np.mean([reference_scores(logits, f'{r["context"]} {r["continuation"][:-1]}',
                                                                 r['continuation'][-1])[1] for r in read(folder, 'words')])
    found['exact', 'acc'] = np.mean([reference_scores(logits, r['prompt'], r['answer'])[1] for r in read(folder, 'exact')])
    text = (folder / 'story.txt').read_text(encoding='utf-8')
    nll = 0
    for begin in range(1, len(text), 64):               # the last window has all the context that fits
        scored = text[begin:begin + 64]
        first = begin - 1 if len(scored) == 64 else max(0, len(text) - 65)
        nll -= reference_scores(logits, text[first:begin], scored)[0]
    found['story', 'token_perplexity'] = math.exp(nll / (len(text) - 1))
    found['story', 'bits_per_byte'] = nll / math.log(2) / len(text)
    return found


def evaluate(model, folder, names='choices,contexts,words,exact,story', **options):
    tasks, _ = evaluation_tasks.load_tasks(names, folder, Tokenizer(SPEC), model.config.block_size)
    results = evaluation_results.evaluate_tasks(model, tasks, distributed.start(device='cpu'), **options)
    return {(r['task'], r['metric']): r['value'] for r in results}


@pytest.mark.parametrize('batch_size', [1, 32])
def test_every_kind_agrees_with_transformers(folder, transformers_logits, batch_size):
    assert evaluate(make_model(), folder, batch_size=batch_size) == pytest.approx(
        reference_results(transformers_logits, folder), rel=1e-5)


@pytest.mark.parametrize('options', OPTIONS)
@pytest.mark.parametrize('batch_size', [1, 5, 32])
def test_the_loglikelihood_of_every_option_is_that_of_the_text_alone(folder, options, batch_size):
    model = make_model(**options)
    tasks, _ = evaluation_tasks.load_tasks('choices,contexts,words', folder, Tokenizer(SPEC), 64)
    for task in tasks:
        found = scoring.score(model, task.examples, distributed.start(device='cpu'), batch_size)
        for record, scores in zip(read(folder, task.name), found, strict=True):
            for pair, score in zip(evaluation_tasks.text_pairs(task.kind, record), scores, strict=True):
                expected = reference_scores(all_logits(model), pair[0].rstrip(), ' ' + pair[1])
                assert score.loglikelihood == pytest.approx(expected[0], abs=1e-4) and score.greedy == expected[1]
                assert score.tokens == 1 + len(pair[1])


def test_what_the_options_share_is_read_once():
    """Two choices after 40 tokens are 40 tokens and their own."""
    options = [scoring.Option(np.array([*range(40), 50, 51]), 40), scoring.Option(np.array([*range(40), 60, 61, 62]), 40)]
    tree = scoring.Tree(options)
    assert tree.tokens.tolist() == [*range(40), 50, 60, 61] and tree.positions.tolist() == [*range(41), 40, 41]
    assert [nodes.tolist() for nodes in tree.option_nodes] == [[39, 40], [39, 41, 42]]


def test_a_context_that_is_too_long_loses_its_beginning(folder, tmp_path):
    record = dict(context='abcde ' * 30, continuation='fgh')
    (tmp_path / 'long.jsonl').write_text(json.dumps(record), encoding='utf-8')
    model = make_model(block_size=16)
    expected = reference_scores(all_logits(model), record['context'].rstrip(), '  fgh', block_size=16)[0]
    assert evaluate(model, tmp_path, 'long')['long', 'perplexity'] == pytest.approx(math.exp(-expected), rel=1e-5)


def test_evaluation_moves_neither_the_mode_nor_the_random_numbers(folder):
    model = make_model(dropout=0.5).train()
    state, python_state = torch.get_rng_state(), random.getstate()
    first = evaluate(model, folder)
    assert model.training and torch.equal(state, torch.get_rng_state()) and random.getstate() == python_state
    assert evaluate(model, folder) == first == pytest.approx(evaluate(model.eval(), folder))


def test_a_signal_ends_the_evaluation(folder):
    model = make_model().train()
    tasks, _ = evaluation_tasks.load_tasks('choices', folder, Tokenizer(SPEC), 64)
    assert evaluation_results.evaluate_tasks(model, tasks, distributed.start(device='cpu'), should_stop=lambda: True) is None
    assert model.training


def test_weights_that_are_not_finite_end_in_one_line(folder):
    model = make_model()
    model.transformer.ln_f.weight.data[0] = math.nan
    with pytest.raises(RunError, match='not finite numbers in float32'):
        evaluate(model, folder, 'words')


@pytest.mark.parametrize('size, stride', [(8, 8), (8, 4), (9, 8), (100, 100)])
@pytest.mark.parametrize('length', [2, 8, 9, 16, 17, 41])
def test_windows_score_each_token_once_after_at_most_size_tokens(length, size, stride):
    tokens, scored = np.arange(length), []
    for option in evaluation_tasks.windows(tokens, size, stride):
        assert len(option.tokens) <= size and (np.diff(option.tokens) == 1).all()
        scored += option.tokens[option.start:].tolist()
    if size > stride:                       # else the first token of each window has nothing before it
        assert scored == list(range(1, length))
    else:
        assert scored == [i for i in range(length) if i % size]


@pytest.mark.parametrize('length', [2, 8, 9, 16, 17, 18, 41])
def test_the_last_window_is_filled_with_context(length):
    plain = list(evaluation_tasks.windows(np.arange(length), 9, 8))
    *before, last = evaluation_tasks.windows(np.arange(length), 9, 8, fill_last=True)
    assert [option.tokens.tolist() for option in before] == [option.tokens.tolist() for option in plain[:-1]]
    assert last.tokens.tolist() == list(range(max(0, length - 9), length))
    assert last.tokens[last.start:].tolist() == plain[-1].tokens[plain[-1].start:].tolist()


def test_the_standard_error_is_that_of_the_mean(folder):
    tasks, _ = evaluation_tasks.load_tasks('words', folder, Tokenizer(SPEC), 64)
    model = make_model()
    results = {r['metric']: r for r in evaluation_results.evaluate_tasks(model, tasks, distributed.start(device='cpu'))}
    nll = [-reference_scores(all_logits(model), r['context'], ' ' + r['continuation'])[0] for r in read(folder, 'words')]
    assert results['perplexity']['stderr'] == pytest.approx(
        math.exp(np.mean(nll)) * np.std(nll, ddof=1) / math.sqrt(len(nll)), rel=1e-4)
    p, n = results['acc_last_token']['value'], len(nll)
    assert results['acc_last_token']['stderr'] == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))


# WikiText

WIKI = ''' \n = Robert Boulter = \n \n He had a guest @-@ starring role in 1 @,@ 000 films ( see " Craig " ) . \n \n = = Career = = \n
 Teddy 's Story . \n \n = Du Fu = \n \n A poet ; he said : ' no ' . \n = not a heading \n \n'''


def test_wikitext_is_cut_at_first_level_headings_and_detokenized():
    pages = task_files.wikitext_pages(WIKI)
    assert [page[:12] for page in pages] == [' = Robert Bo', ' = Du Fu = \n']
    # what wikitext_detokenizer of lm-evaluation-harness 0.4.13 makes of these pages
    assert [task_files.detokenize_wikitext(page) for page in pages] == [
        ' = Robert Boulter =\n\nHe had a guest-starring role in 1,000 films (see "Craig").\n\n== Career ==\n\nTeddy\'s Story.\n',
        " = Du Fu =\n\nA poet; he said: 'no'.\n= not a heading\n\n"]


def test_wikitext_perplexity_divides_by_the_words_of_the_raw_pages(tmp_path):
    """A model without preference gives each token -log V, so the result follows from counts alone."""
    characters = ''.join(sorted(set(WIKI + "'")))
    model = GPT(GPTConfig(32, len(characters), 1, 1, 8))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    (tmp_path / 'wikitext2.txt').write_text(WIKI, encoding='utf-8')
    tokenizer = Tokenizer(dict(tokenizer='char', vocab_size=len(characters), chars=characters))
    tasks, _ = evaluation_tasks.load_tasks('wikitext2,wikitext2_blocks', tmp_path, tokenizer, 32)
    found = {r['metric']: r['value'] for r in evaluation_results.evaluate_tasks(model, tasks, distributed.start(device='cpu'))}
    pages = task_files.wikitext_pages(WIKI)
    scored = sum(len(task_files.detokenize_wikitext(page)) - 1 for page in pages)        # each but a page's first
    n_words = sum(len(page.split()) + 2 for page in pages)      # lm-evaluation-harness counts the two empty ends
    assert found['word_perplexity'] == pytest.approx(len(characters) ** (scored / n_words), rel=1e-5)
    assert found['bits_per_byte'] == pytest.approx(math.log2(len(characters)) * scored / sum(map(len, pages)), rel=1e-5)
    assert found['token_perplexity'] == pytest.approx(len(characters), rel=1e-5)


def test_a_gpt2_text_begins_after_end_of_text_and_the_raw_one_does_not(tmp_path):
    class Words:
        """A tokenizer like GPT-2's, of which only the ids matter."""
        chars, end_of_text = None, 50256

        def encode_to_numpy(self, text):
            return np.arange(len(text.split()), dtype=np.uint16)

    (tmp_path / 'ptb.txt').write_text(' a b c \n d e \n', encoding='utf-8')
    (task, blocks), _ = evaluation_tasks.load_tasks('ptb,ptb_blocks', tmp_path, Words(), 3)
    assert [(o.tokens.tolist(), o.start) for o, in task.examples] == [([50256, 0, 1, 2], 1), ([1, 2, 3, 4], 2)]
    assert [(o.tokens.tolist(), o.start) for o, in blocks.examples] == [([0, 1, 2], 1), ([3, 4], 1)]
    assert task.units == dict(word_perplexity=5 + 2) and blocks.units == dict(token_perplexity=3)


# CORE

# GPT-2 124M as nanochat publishes it: accuracies in the order of the table, and what they make.
PUBLISHED = [0.308504, 0.001889, 0.282663, 0.412458, 0.221843, 0.600000, 0.224406, 0.622960, 0.278000, 0.322919, 0.307907,
             0.578755, 0.486188, 0.155000, 0.226087, 0.419697, 0.085714, 0.031250, 0.058278, 0.133659, 0.552294, 0.256600]


def test_core_is_the_mean_of_centered_accuracies():
    results = []
    for core, accuracy in zip(task_files.core_tasks(), PUBLISHED, strict=True):
        task = evaluation_tasks.Task(core.name, 'schema', [None] * 10 ** 6, [0] * 10 ** 6, baseline=core.baseline)
        right, wrong = ([scoring.Score(ll, 1, True, True) for ll in lls] for lls in ((-1, -2), (-2, -1)))
        count = round(accuracy * 10 ** 6)
        task.examples = [None] * 1000
        results += evaluation_results.summarize(task, [right] * round(count / 1000) + [wrong] * (1000 - round(count / 1000)))
    mean, = evaluation_results.summarize_core(results, ['squad'])
    assert mean['value'] == pytest.approx(0.113891, abs=1e-3) and mean['protocol'].endswith('; without squad')


def test_core_shows_solved_examples_and_scores_from_the_first_difference(tmp_path):
    (tmp_path / 'commonsense_reasoning').mkdir()
    (tmp_path / 'world_knowledge').mkdir()
    r = random.Random(1)
    piqa = [dict(query=f'Q: {words(r, 2)}', choices=['the ' + words(r, 1), 'the ' + words(r, 1)], gold=i % 2) for i in range(4)]
    jeopardy = [dict(context=f' {words(r, 2)} ', continuation=words(r, 1)) for _ in range(4)]
    for name, records in (('commonsense_reasoning/piqa', piqa), ('world_knowledge/jeopardy_all', jeopardy)):
        (tmp_path / f'{name}.jsonl').write_text(''.join(json.dumps(x) + '\n' for x in records), encoding='utf-8')
    tokenizer = Tokenizer(dict(tokenizer='char', vocab_size=len(CHARACTERS), chars=CHARACTERS))
    (question, choice), missing = evaluation_tasks.load_tasks('core', tmp_path, tokenizer, 10 ** 4)
    assert (question.name, choice.name) == ('jeopardy', 'piqa') and len(missing) == 20 and 'squad' in missing
    order = list(range(4))
    random.Random(1337).shuffle(order)
    assert choice.numbers == question.numbers == order
    for i, number in enumerate(order):
        others = [order[j] for j in range(4) if j != i]
        drawn = random.Random(1234 + i).sample(others, 3)
        shots = ''.join(f'{piqa[j]["query"]}\nAnswer: {piqa[j]["choices"][piqa[j]["gold"]]}\n\n' for j in drawn)
        for option, answer in zip(choice.examples[i], piqa[number]['choices']):
            text = f'{shots}{piqa[number]["query"]}\nAnswer: {answer}'
            assert tokenizer.decode(option.tokens.tolist()) == text
            same = next(k for k, (a, b) in enumerate(zip(*piqa[number]['choices'])) if a != b)
            assert option.start == len(text) - len(answer) + same
        shots = ''.join(f'{jeopardy[j]["context"].strip()}\nAnswer: {jeopardy[j]["continuation"]}\n\n' for j in drawn)
        option, = question.examples[i]
        text = tokenizer.decode(option.tokens.tolist())
        assert text == f'{shots}{jeopardy[number]["context"].strip()}\nAnswer: {jeopardy[number]["continuation"]}'
        assert text[option.start:] == ' ' + jeopardy[number]['continuation']


# Files

def test_examples_that_a_model_cannot_read_are_counted(folder, tmp_path):
    known, unknown = dict(prompt='ab=', answer='c'), dict(prompt='é=', answer='c')
    (tmp_path / 'exact.jsonl').write_text('\n'.join(map(json.dumps, [unknown, known, dict(known, answer='c' * 99)])), encoding='utf-8')
    (task,), _ = evaluation_tasks.load_tasks('exact', tmp_path, Tokenizer(SPEC), 64)
    assert task.skipped == 2 and "'é'" in task.reason and task.numbers == [1]
    result, = evaluation_results.evaluate_tasks(make_model(), [task], distributed.start(device='cpu'))
    assert (result['examples'], result['skipped']) == (1, 2)
    (tmp_path / 'exact.jsonl').write_text(json.dumps(unknown), encoding='utf-8')
    with pytest.raises(UserError, match="can read none of the 1 examples; the character 'é' is not in the vocabulary"):
        evaluation_tasks.load_tasks('exact', tmp_path, Tokenizer(SPEC), 64)


CHOICE = dict(query='a', choices=['b', 'c'], gold=1)


@pytest.mark.parametrize('content, fault', [
    (b'', 'is empty'), (b'\n \n', 'is empty'), (b'{"query": ', 'line 1 is not JSON'), (b'[' * 10 ** 5, 'line 1 is not JSON'),
    (b'\xff\xfe', 'line 1 is not JSON'), (b'17', 'is not an example of a task'), (b'{"text": "a"}', 'is not an example of a task'),
    (json.dumps(CHOICE).encode() + b'\n{"context": "a", "continuation": "b"}', 'line 2 is not a valid multiple choice example: query'),
    (json.dumps(CHOICE).encode() + b'\n[]', 'line 2 is not a valid multiple choice example: it is a list'),
    (json.dumps(dict(CHOICE, gold=2)).encode(), 'gold=2'), (json.dumps(dict(CHOICE, gold=True)).encode(), 'gold'),
    (json.dumps(dict(CHOICE, choices=['b', 1])).encode(), 'options'), (json.dumps(dict(CHOICE, choices=['b', ''])).encode(), 'options'),
    (json.dumps(dict(CHOICE, choices=['b'])).encode(), 'options'),
    (b'{"context": "a", "continuation": ""}', 'continuation is empty')])
def test_a_damaged_or_foreign_file_is_one_line(tmp_path, content, fault):
    (tmp_path / 'task.jsonl').write_bytes(content)
    with pytest.raises(UserError) as error:
        evaluation_tasks.load_tasks('task', tmp_path, Tokenizer(SPEC), 64)
    assert fault in str(error.value) and '\n' not in str(error.value) and len(str(error.value)) < 600


def test_an_unknown_task_or_a_text_that_is_none_is_one_line(folder, tmp_path):
    for name in ('hellaswg', '../choices', '', '.', 'a/b', '.hidden'):
        with pytest.raises(UserError, match='there is no task .* has choices, contexts, exact, story, words; python data'):
            evaluation_tasks.load_tasks(name, folder, Tokenizer(SPEC), 64)
    (tmp_path / 'text.txt').write_bytes(b'abc\xff')
    with pytest.raises(UserError, match='not UTF-8 at byte 3'):
        evaluation_tasks.load_tasks('text', tmp_path, Tokenizer(SPEC), 64)
    (tmp_path / 'text.txt').write_text('aXb', encoding='utf-8')
    with pytest.raises(UserError, match="'X' is not in the vocabulary"):
        evaluation_tasks.load_tasks('text', tmp_path, Tokenizer(SPEC), 64)
    (tmp_path / 'text.txt').write_text('', encoding='utf-8')
    with pytest.raises(UserError, match='too short'):
        evaluation_tasks.load_tasks('text', tmp_path, Tokenizer(SPEC), 64)
    (tmp_path / 'folder.jsonl').mkdir()
    with pytest.raises(UserError, match='is not a regular file'):
        evaluation_tasks.load_tasks('folder', tmp_path, Tokenizer(SPEC), 64)
    with pytest.raises(UserError, match='holds no file of CORE'):
        evaluation_tasks.load_tasks('core', tmp_path, Tokenizer(SPEC), 64)
