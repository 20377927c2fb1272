"""evaluate.py as a command, and data/evals/prepare.py, which makes its tasks."""

import hashlib
import json
import runpy
import threading
import time
from contextlib import contextmanager

import pytest
from harness import CAN_FORK, ROOT, script_settings
from hub_stand_in import Hub
from test_tasks import SPEC, make_model, write_tasks

import evaluate
from engine.atomic_files import atomic_write
from engine.checkpoint import gathered
from engine.errors import RunError, UserError
from engine.evaluation import task_files
from engine.log import log

NAMES = 'choices,contexts,words,exact,story'


@pytest.fixture(scope='module')
def scored(workspace):
    """The workspace with a checkpoint in out-scored and tasks in tasks/."""
    out_dir = workspace.folder / 'out-scored'
    out_dir.mkdir()
    gathered.write(out_dir / gathered.MODEL, dict(
        make_model().to_checkpoint(), iter_num=7, best_val_loss=1.0, config={},
        tokenizer=SPEC.to_dict()))
    write_tasks(workspace.folder / 'tasks')
    return workspace


def run(workspace, *arguments, **options):
    """(what evaluate.py prints, its eval.json)."""
    result = workspace.run('evaluate.py', '--out_dir=out-scored', '--data=tasks', '--device=cpu',
                           f'--tasks={NAMES}', *arguments, **options)
    path = workspace.folder / 'out-scored' / 'eval.json'
    content = json.loads(path.read_text(encoding='utf-8'))
    path.unlink()
    return result, content


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def check_nearly_same(results, expected):
    for found, other in zip(results, expected, strict=True):
        value = pytest.approx(other['value'], rel=1e-5)
        stderr = pytest.approx(other['stderr'], rel=1e-4)
        assert found == dict(other, value=value, stderr=stderr)


def test_the_table_and_the_file_hold_the_same_results(scored):
    result, content = run(scored, '--examples=examples.jsonl')
    results = content['results']
    head, *lines = [line.split(maxsplit=5) for line in result.stdout.splitlines()]
    assert head == ['task', 'metric', 'value', 'stderr', 'examples', 'protocol']
    assert [line[:2] for line in lines] == [[r['task'], r['metric']] for r in results]
    for line, r in zip(lines, results, strict=True):
        assert line[2:] == [f'{r["value"]:.4f}', f'{r["stderr"]:.4f}', f'{r["examples"]:,}',
                            r['protocol']]

    assert content['iter_num'] == 7 and content['seconds'] > 0
    assert result.stderr.startswith("settings: out_dir='out-scored', ")
    assert '\ndevice cpu' in result.stderr
    n_windows = len(range(0, len((scored.folder / 'tasks' / 'story.txt').read_text()) - 1, 64))
    counts = {r['task']: r['examples'] for r in results}
    assert counts == dict(choices=10, contexts=10, words=10, exact=10, story=n_windows)


def test_a_table_that_is_wider_than_the_terminal_has_protocols_below():
    result = dict(task='x', metric='acc', value=0.5, stderr=None, examples=7, protocol='p ' * 30)
    wide, narrow = (evaluate.format_table([result], width).splitlines() for width in (None, 80))
    assert len(wide) == 2 and wide[1].split()[:5] == ['x', 'acc', '0.5000', 'n/a', '7']
    head = wide[0].removesuffix('  protocol')
    assert narrow == [head, wide[1][:len(head)], f'  {result["protocol"]}']
    assert max(map(len, narrow)) <= 80


def test_the_file_of_examples_proves_the_results(scored):
    _, content = run(scored, '--examples=examples.jsonl')
    examples = read_lines(scored.folder / 'examples.jsonl')
    choices = [example for example in examples if example['task'] == 'choices']
    assert [example['example'] for example in choices] == list(range(10))

    right = 0
    for example in choices:
        values = example['loglikelihood']
        right += values.index(max(values)) == example['gold']
    value, = [r['value'] for r in content['results']
              if (r['task'], r['metric']) == ('choices', 'acc')]
    assert value == right / 10

    windows = [example for example in examples if example['task'] == 'story']
    assert [window['example'] for window in windows] == list(range(len(windows)))
    assert not any('gold' in window for window in windows)


@pytest.mark.parametrize('ranks', [1, 2])
def test_the_results_depend_on_neither_the_batch_nor_the_number_of_ranks(scored, ranks):
    if ranks > 1 and not CAN_FORK:
        pytest.skip('two ranks are started by fork')
    _, expected = run(scored)
    for batch_size in (1, 32):
        result, content = run(scored, f'--batch_size={batch_size}', ranks=ranks)
        assert result.stdout.count('choices ') == 3         # one rank prints
        check_nearly_same(content['results'], expected['results'])


def test_limit_takes_the_first_examples(scored, tmp_path):
    _, content = run(scored, '--tasks=choices', '--limit=4')
    text = (scored.folder / 'tasks' / 'choices.jsonl').read_text(encoding='utf-8')
    first = ''.join(text.splitlines(keepends=True)[:4])
    (tmp_path / 'choices.jsonl').write_text(first, encoding='utf-8')
    _, expected = run(scored, '--tasks=choices', f'--data={tmp_path}')
    assert content['results'] == expected['results'] and content['limit'] == 4


def test_half_precision_gives_nearly_the_same_loglikelihoods(scored):
    _, single = run(scored, '--tasks=story')
    _, half = run(scored, '--tasks=story', '--dtype=bfloat16')
    expected = pytest.approx(single['results'][1]['value'], rel=0.02)
    assert half['results'][1]['value'] == expected
    assert half['results'] != single['results']


def test_examples_that_are_left_out_are_told(scored, tmp_path):
    records = '{"prompt": "é", "answer": "b"}\n{"prompt": "a", "answer": "b"}\n'
    (tmp_path / 'exact.jsonl').write_text(records, encoding='utf-8')
    result, content = run(scored, '--tasks=exact', f'--data={tmp_path}')
    note = ("note: exact: 1 examples are left out, as this model cannot read them: "
            "the character 'é'")
    assert note in result.stderr and note not in result.stdout
    assert 'scoring exact (1 examples)\nexact is scored, after ' in result.stderr
    assert content['results'][0]['skipped'] == content['results'][0]['examples'] == 1


@pytest.mark.parametrize('flag, line', [
    ('--tasks=choicse', "there is no task 'choicse' in"),
    ('--data=nowhere', 'there is no task'),
    ('--batch_size=0', 'batch_size=0 should be at least 1'),
    ('--chat=True', 'this model was trained on no conversations'),
    ('--out_dir=nowhere', 'ckpt.pt does not exist')])
def test_a_mistake_is_one_line(scored, flag, line):
    result = scored.run('evaluate.py', '--out_dir=out-scored', '--data=tasks', '--device=cpu',
                        '--tasks=choices', flag, code=2)
    assert line in result.stderr.splitlines()[-1]
    assert 'Traceback' not in result.stderr and not result.stdout


def test_hugging_face_weights_are_scored_as_their_checkpoint(scored, monkeypatch, tmp_path):
    """By way of GPT-2's tokenizer, for which a few characters are enough here."""
    pytest.importorskip('transformers')
    from engine.checkpoint import load_model
    from engine.hf import weights as hf_weights
    model = make_model()
    reference = hf_weights.to_transformers(model.config, model.state_dict())
    reference.save_pretrained(tmp_path / 'weights')
    _, expected = run(scored)

    monkeypatch.setattr(load_model, 'GPT2', SPEC)
    monkeypatch.setattr(log, 'handlers', log.handlers)      # main changes them for the process
    flags = [f'--init_from={tmp_path / "weights"}', f'--data={scored.folder / "tasks"}',
             '--device=cpu', f'--tasks={NAMES}']
    for named in ([], [f'--out_dir={tmp_path / "new"}']):
        with script_settings(evaluate, *flags, *named) as overrides:
            evaluate.main(overrides)

    content = json.loads((tmp_path / 'new' / 'eval.json').read_text(encoding='utf-8'))
    assert content['iter_num'] is None and not (ROOT / 'out' / 'eval.json').exists()
    check_nearly_same(content['results'], expected['results'])


# data/evals/prepare.py

HELLASWAG = dict(
    activity_label='Roof removal',
    ctx_a='A man is on a roof. [header] He [title] works',
    ctx_b='he  Then',
    ctx='raw ctx',
    endings=['starts [substeps] now.', ' stops.', 'a', 'b'],
    label='1',
)
ARC = dict(question='Why?', choices=dict(text=['x', 'y'], label=['A', 'B']), answerKey='B')
ARC_EASY = dict(
    question=dict(stem='Why?', choices=[dict(text='x', label='A'), dict(text='y', label='B')]),
    answerKey='B',
)
ROWS = {
    'hellaswag_val.jsonl': [HELLASWAG],
    'lambada_test.jsonl': [dict(text='I said "no"\n\nto him again')],
    'piqa_valid.jsonl': [dict(goal='Boil', sol1='water', sol2='sand')],
    'ARC-Easy-Test.jsonl': [ARC_EASY],
    'ARC-Challenge-Test.jsonl': [ARC],
    'dev.jsonl': [dict(sentence='Ann saw Bob as _ was here .', option1='Ann', option2='Bob',
                       answer='2')],
}
WIKITEXT = ' \n = Title = \n \n Text of it . \n'
EXPECTED = dict(
    hellaswag=dict(query='Roof removal: A man is on a roof. He. works He then', gold=1,
                   choices=['starts now.', 'stops.', 'a', 'b']),
    hellaswag_raw=dict(query='raw ctx', gold=1, choices=HELLASWAG['endings']),
    lambada=dict(context='I said "no"\n\nto him', continuation='again'),
    piqa=dict(query='Question: Boil\nAnswer:', choices=['water', 'sand'], gold=1),
    arc_easy=dict(query='Question: Why?\nAnswer:', choices=['x', 'y'], gold=1),
    arc_challenge=dict(query='Question: Why?\nAnswer:', choices=['x', 'y'], gold=1),
    winogrande=dict(context_options=['Ann saw Bob as Ann', 'Ann saw Bob as Bob'],
                    continuation='was here .', gold=1),
)


@pytest.fixture
def raw(tmp_path):
    """A folder of files as the authors publish them."""
    for name, rows in ROWS.items():
        text = ''.join(json.dumps(row) + '\n' for row in rows)
        (tmp_path / name).write_text(text, encoding='utf-8')
    (tmp_path / 'piqa_valid-labels.lst').write_text('1\n')
    (tmp_path / 'ptb.test.txt').write_text(' a b \n c \n')
    for name in ('wikitext-2-raw', 'wikitext-103-raw'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'wiki.test.raw').write_text(WIKITEXT)
    return tmp_path


def check_tasks(folder):
    for name, expected in EXPECTED.items():
        _, records = task_files.read_records(folder / f'{name}.jsonl')
        assert records == [expected]
    assert (folder / 'wikitext2.txt').read_text() == WIKITEXT
    assert (folder / 'wikitext103.txt').read_text() == WIKITEXT
    assert (folder / 'ptb.txt').read_text() == ' a b \n c \n'


def test_the_authors_files_become_tasks(workspace, raw, tmp_path):
    made = tmp_path / 'made'
    result = workspace.run('data/evals/prepare.py', f'--input={raw}', f'--output={made}')
    check_tasks(made)
    *lines, last = result.stdout.splitlines()
    for line in lines:
        name, count, _, _, digest = line.split()
        assert hashlib.sha256((made / name).read_bytes()).hexdigest() == digest
        assert count in ('1', '2', '4')
    assert last.startswith('next: python evaluate.py ')


def test_the_hubs_rows_become_the_same_tasks(tmp_path, monkeypatch):
    datasets = pytest.importorskip('datasets')
    rows = {
        'Rowan/hellaswag': [HELLASWAG],
        'EleutherAI/lambada_openai': ROWS['lambada_test.jsonl'],
        'ybisk/piqa': [dict(ROWS['piqa_valid.jsonl'][0], label=1)],
        'allenai/ai2_arc': [ARC],
        'allenai/winogrande': ROWS['dev.jsonl'],
        'Salesforce/wikitext': dict(text=['', ' = Title = \n', '', ' Text of it . \n']),
        'ptb-text-only/ptb_text_only': dict(sentence=['a b', 'c']),
    }
    configs = set()

    def load_dataset(path, name=None, **options):
        configs.add(name)
        return rows[path]

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    run_evals(output=str(tmp_path))['main']()
    check_tasks(tmp_path)
    # the test set of WikiText-103 is that of WikiText-2, which comes without 500 MB of training set
    assert 'wikitext-2-raw-v1' in configs and 'wikitext-103-raw-v1' not in configs


def run_evals(**settings):
    """The names of data/evals/prepare.py, with some of its settings changed."""
    script = runpy.run_path(str(ROOT / 'data' / 'evals' / 'prepare.py'), run_name='prepare')
    script['main'].__globals__.update(settings)
    return script


def test_a_row_of_the_hub_that_is_not_utf8_is_one_line(tmp_path, monkeypatch):
    datasets = pytest.importorskip('datasets')

    class Rows(list):
        def __iter__(self):
            yield self[0]
            b'caf\xe9'.decode()             # as pyarrow does

    rows = Rows([dict(text='a b')] * 2)
    monkeypatch.setattr(datasets, 'load_dataset', lambda **options: rows)
    script = run_evals(output=str(tmp_path), tasks='lambada')
    with pytest.raises(UserError, match='row 2 is not an example of lambada .*utf-8'):
        script['main']()


def test_the_hub_says_why_a_task_is_not_downloaded(tmp_path, monkeypatch):
    """`datasets` does not: it has one error for a name, a gate and a network."""
    datasets = pytest.importorskip('datasets')

    def fail(**options):
        raise ConnectionError("Couldn't reach it on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, 'load_dataset', fail)
    hub = Hub({'datasets/allenai/ai2_arc': {}})
    hub.reach(monkeypatch, tmp_path)
    try:
        with pytest.raises(UserError, match='shows you no dataset EleutherAI/lambada_openai'):
            run_evals(output=str(tmp_path), tasks='lambada')['main']()
        with pytest.raises(RunError, match="Couldn't reach it .*use --input=FOLDER"):
            run_evals(output=str(tmp_path), tasks='arc_easy')['main']()
    finally:
        hub.close()


def test_two_prepares_at_once_write_one_after_the_other(tmp_path):
    script = run_evals(output=str(tmp_path))
    task = script['Task']('a.txt', 'text', 1, 'lines')
    writing = []
    crowds = []

    @contextmanager
    def slow_write(path, mode):
        writing.append(path)
        time.sleep(0.05)
        crowds.append(len(writing))
        with atomic_write(path, mode) as file:
            yield file
        writing.pop()

    script['main'].__globals__.update(atomic_write=slow_write)
    threads = [threading.Thread(target=script['write_task'], args=(task,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert crowds == [1, 1, 1] and (tmp_path / 'a.txt').read_text() == 'text'


@pytest.mark.parametrize('name, content', [
    ('hellaswag_val.jsonl', '{"ctx": "a"}\n'),
    ('hellaswag_val.jsonl', '{"ctx": \n'),
    ('lambada_test.jsonl', '[1]\n'),
    ('lambada_test.jsonl', '[' * 10 ** 5),
    ('piqa_valid-labels.lst', '1\n0\n'),
    ('piqa_valid-labels.lst', 'x\n')])
def test_a_damaged_file_is_one_line(workspace, raw, tmp_path, name, content):
    (raw / name).write_text(content, encoding='utf-8')
    result = workspace.run('data/evals/prepare.py', f'--input={raw}',
                           f'--output={tmp_path / "made"}', code=2)
    assert str(raw) in result.stderr and result.stderr.count('\n') == 1


def test_an_unknown_task_is_one_line_of_prepare_too(workspace):
    result = workspace.run('data/evals/prepare.py', '--tasks=nothing', code=2)
    assert result.stderr.count('\n') == 1
