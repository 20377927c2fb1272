"""Files of evaluation tasks: JSON lines in llm-foundry's format, texts, and the CORE bundle.

What is read here comes from elsewhere, so it is checked: its size, its encoding, every field.
"""

import json
import re
from typing import NamedTuple

from engine.errors import UserError

MAX_BYTES = 1 << 30
FIELDS = {                                          # of a JSON line, by kind of task
    'multiple_choice': dict(query=str, choices=list, gold=int),
    'schema': dict(context_options=list, continuation=str, gold=int),
    'language_modelling': dict(context=str, continuation=str),
    'exact': dict(prompt=str, answer=str)}

# CORE of DataComp-LM (arXiv:2406.11794, appendix G): file, examples shown before each question, accuracy by chance in
# percent as the bundle's eval_meta_data.csv has it, and A where '\nAnswer: ' stands before the answer in place of a space.
CORE = '''
hellaswag_zeroshot                language_understanding/hellaswag                           0  25
jeopardy                          world_knowledge/jeopardy_all                              10   0  A
bigbench_qa_wikidata              world_knowledge/bigbench_qa_wikidata                      10   0
arc_easy                          world_knowledge/arc_easy                                  10  25  A
arc_challenge                     world_knowledge/arc_challenge                             10  25  A
copa                              commonsense_reasoning/copa                                 0  50
commonsense_qa                    commonsense_reasoning/commonsense_qa                      10  20
piqa                              commonsense_reasoning/piqa                                10  50  A
openbook_qa                       commonsense_reasoning/openbook_qa                          0  25
lambada_openai                    language_understanding/lambada_openai                      0   0
hellaswag                         language_understanding/hellaswag                          10  25
winograd                          language_understanding/winograd_wsc                        0  50
winogrande                        language_understanding/winogrande                          0  50
bigbench_dyck_languages           symbolic_problem_solving/bigbench_dyck_languages          10   0
agi_eval_lsat_ar                  symbolic_problem_solving/agi_eval_lsat_ar                  3  20
bigbench_cs_algorithms            symbolic_problem_solving/bigbench_cs_algorithms           10   0
bigbench_operators                symbolic_problem_solving/bigbench_operators               10   0
bigbench_repeat_copy_logic        symbolic_problem_solving/bigbench_repeat_copy_logic       10   0
squad                             reading_comprehension/squad                               10   0
coqa                              reading_comprehension/coqa                                 0   0
boolq                             reading_comprehension/boolq                               10  62  A
bigbench_language_identification  language_understanding/bigbench_language_identification   10 9.1
'''


class CoreTask(NamedTuple):
    name: str
    file: str           # in the bundle, without .jsonl
    shots: int          # solved examples that come before each question
    baseline: float     # accuracy by chance, 0 to 1
    delimiter: str      # between question and answer


def core_tasks():
    rows = [line.split() for line in CORE.split('\n') if line]
    return [CoreTask(name, file, int(shots), float(chance) / 100, '\nAnswer: ' if answer else ' ')
            for name, file, shots, chance, *answer in rows]


def find_core(folder):
    """[(CoreTask, Path)] of the tasks whose file lies in `folder`, and the names of the others."""
    places = [(task, place / f'{task.file}.jsonl') for task in core_tasks()
              for place in (folder / 'eval_data', folder)]
    found = {task.name: (task, path) for task, path in places if path.exists()}
    if not found:
        raise UserError(f'{folder} holds no file of CORE, such as eval_data/{places[0][0].file}.jsonl; name the '
                        f'unpacked evaluation bundle, as in --data=eval_bundle')
    return list(found.values()), [task.name for task in core_tasks() if task.name not in found]


def find_task(folder, name):
    """The file of a task: NAME.jsonl or NAME.txt in `folder`, or the text that the name begins with."""
    base = re.sub(r'_(blocks|stride512)$', '', name)
    paths = [folder / f'{name}.jsonl', folder / f'{name}.txt', folder / f'{base}.txt']
    safe = re.fullmatch(r'[\w.-]+', name) and not name.startswith('.')
    for path in paths if safe else ():
        if path.exists():
            return path
    known = sorted({path.stem for path in folder.glob('*.jsonl')} | {path.stem for path in folder.glob('*.txt')})
    raise UserError(f'there is no task {name[:50]!r} in {folder}, which has {", ".join(known)[:300] or "none"}; '
                    f'python data/evals/prepare.py writes more')


def read_bytes(path):
    try:
        if not path.is_file():
            raise UserError(f'{path} is not a regular file')
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f'{path} has over {MAX_BYTES >> 30} GiB, which is too large for an evaluation task')
        return path.read_bytes()
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror})') from None


def read_text(path):
    """The text of a UTF-8 file as it is."""
    try:
        return read_bytes(path).decode('utf-8')
    except UnicodeDecodeError as error:
        raise UserError(f'{path} is not UTF-8 at byte {error.start:,}; prepare it again') from None


def read_records(path):
    """(kind, [dict]) of a file of JSON lines; the first line decides the kind. UserError names a line that does not fit."""
    kind, records = None, []
    for number, line in enumerate(read_bytes(path).split(b'\n'), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode('utf-8'))
        except (ValueError, RecursionError) as error:
            raise UserError(f'{path}, line {number:,} is not JSON ({str(error)[:100]}); prepare the task again') from None
        if not kind:
            kind = next((kind for kind in FIELDS if isinstance(record, dict) and FIELDS[kind].keys() <= record.keys()), None)
            if not kind:
                raise UserError(f'{path}, line {number:,} is not an example of a task: it should have the fields '
                                + ', or '.join(', '.join(fields) for fields in FIELDS.values()))
        if fault := find_fault(kind, record):
            raise UserError(f'{path}, line {number:,} is not a valid {kind.replace("_", " ")} example: {fault}')
        records.append(record)
    if not records:
        raise UserError(f'{path} is empty; prepare the task again')
    return kind, records


def find_fault(kind, record):
    """What is wrong with a record, or None."""
    if not isinstance(record, dict):
        return f'it is a {type(record).__name__}, not an object'
    for name, expected in FIELDS[kind].items():
        if type(record.get(name)) is not expected:
            return f'{name} should be a {expected.__name__}, and is {str(record.get(name))[:60]!r}'
    options = next((record[name] for name in ('choices', 'context_options') if name in FIELDS[kind]), None)
    if options is not None and not (2 <= len(options) <= 1000 and all(type(o) is str and o for o in options)):
        return 'its options should be 2 to 1000 texts'
    if options is not None and not 0 <= record['gold'] < len(options):
        return f'gold={record["gold"]} is not one of its {len(options)} options'
    for name in ('continuation', 'answer'):
        if name in FIELDS[kind] and not record[name]:
            return f'{name} is empty'
    return None


# Texts

# The detokenizer of Megatron-LM and lm-evaluation-harness for WikiText, in its order.
WIKITEXT = [
    (r"s '", "s'"), (' @-@ ', '-'), (' @,@ ', ','), (r' @\.@ ', '.'),
    (' : ', ': '), (' ; ', '; '), (r' \. ', '. '), (' ! ', '! '), (r' \? ', '? '), (' , ', ', '),
    (r'\(\s*([^)]*?)\s*\)', r'(\1)'), (r'\[\s*([^\]]*?)\s*\]', r'[\1]'), (r'{\s*([^}]*?)\s*}', r'{\1}'),
    (r'"\s*([^"]*?)\s*"', r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'"),
    ('= = = =', '===='), ('= = =', '==='), ('= =', '=='), (' ° ', '°'), (' \n', '\n'), ('\n ', '\n'),
    (' N ', ' 1 '), (" 's", "'s")]


def detokenize_wikitext(page):
    for pattern, replacement in WIKITEXT:
        page = re.sub(pattern, replacement, page)
    return page


def wikitext_pages(text):
    """The pages of raw WikiText: each begins at a heading of the first level, ` = Title = `."""
    return [page for page in re.split(r'\n(?= = (?!= ).*(?<= )= (?:\n|$))', text) if page.strip()]


def wikitext_rows(text):
    """Raw WikiText as transformers' guide to perplexity reads it: the rows of the hub's data set, with blank
    lines between them. A row is a line and its end, and a blank line is an empty row."""
    return ['\n\n'.join(line + '\n' if line.strip() else '' for line in text.split('\n')[:-1])]


def whole(text):
    return [text]


class TextProtocol(NamedTuple):
    """How the perplexity of a text is computed."""
    description: str
    metrics: dict                   # {metric: what the log-likelihood is divided by: token, word, byte, character}
    documents: object = whole       # function from the text to a list of documents
    clean: object = str             # function from a document to what the model reads
    count_words: object = lambda document: len(document.split())
    stride: int = 0                 # tokens between windows; 0: blocks after <|endoftext|>, the last with a full context


def text_protocol(name):
    """The TextProtocol of the text task `name`."""
    text, _, windows = name.partition('_')
    if windows in ('blocks', 'stride512'):
        stride, what = (512, 'windows 512 apart') if windows == 'stride512' else (1024, 'disjoint blocks')
        return TextProtocol(f"raw text, per token, {what}, as transformers' guide", dict(token_perplexity='token'),
                            wikitext_rows if text.startswith('wikitext') else whole, stride=stride)
    if text.startswith('wikitext'):
        return TextProtocol('detokenized pages, per word and byte of the raw ones, as lm-evaluation-harness',
                            dict(word_perplexity='word', byte_perplexity='byte', bits_per_byte='byte'),
                            wikitext_pages, detokenize_wikitext, lambda page: len(re.split(r'\s+', page)))
    if name == 'ptb':
        return TextProtocol('text as it is, per word and line end', dict(word_perplexity='word'),
                            count_words=lambda text: len(text.split()) + text.count('\n'))
    if name in ('enwik8', 'text8'):
        return TextProtocol('text as it is, in blocks', dict(bits_per_character='byte'))
    return TextProtocol('text as it is, in blocks', dict(token_perplexity='token', bits_per_byte='byte'))
