"""Files of evaluation tasks: JSON lines in llm-foundry's format, texts, and the CORE bundle.

What is read here comes from elsewhere, so it is checked: its size, its encoding, every field.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from engine.errors import UserError

MAX_BYTES = 1 << 30                 # of a file
MAX_OPTIONS = 1000                  # of an example

# The fields of a JSON line, by the kind of task.
FIELDS = {
    'multiple_choice': dict(query=str, choices=list, gold=int),
    'schema': dict(context_options=list, continuation=str, gold=int),
    'language_modelling': dict(context=str, continuation=str),
    'exact': dict(prompt=str, answer=str),
}
OPTION_FIELDS = {'multiple_choice': 'choices', 'schema': 'context_options'}

# CORE of DataComp-LM (arXiv:2406.11794, appendix G). The columns: name, file, how many solved
# examples come before each question, accuracy by chance in percent as the bundle's
# eval_meta_data.csv has it, and A where '\nAnswer: ' stands before the answer in place of a space.
CORE = """
hellaswag_zeroshot               language_understanding/hellaswag                          0   25
jeopardy                         world_knowledge/jeopardy_all                             10    0  A
bigbench_qa_wikidata             world_knowledge/bigbench_qa_wikidata                     10    0
arc_easy                         world_knowledge/arc_easy                                 10   25  A
arc_challenge                    world_knowledge/arc_challenge                            10   25  A
copa                             commonsense_reasoning/copa                                0   50
commonsense_qa                   commonsense_reasoning/commonsense_qa                     10   20
piqa                             commonsense_reasoning/piqa                               10   50  A
openbook_qa                      commonsense_reasoning/openbook_qa                         0   25
lambada_openai                   language_understanding/lambada_openai                     0    0
hellaswag                        language_understanding/hellaswag                         10   25
winograd                         language_understanding/winograd_wsc                       0   50
winogrande                       language_understanding/winogrande                         0   50
bigbench_dyck_languages          symbolic_problem_solving/bigbench_dyck_languages         10    0
agi_eval_lsat_ar                 symbolic_problem_solving/agi_eval_lsat_ar                 3   20
bigbench_cs_algorithms           symbolic_problem_solving/bigbench_cs_algorithms          10    0
bigbench_operators               symbolic_problem_solving/bigbench_operators              10    0
bigbench_repeat_copy_logic       symbolic_problem_solving/bigbench_repeat_copy_logic      10    0
squad                            reading_comprehension/squad                              10    0
coqa                             reading_comprehension/coqa                                0    0
boolq                            reading_comprehension/boolq                              10   62  A
bigbench_language_identification language_understanding/bigbench_language_identification  10  9.1
"""


class CoreTask(NamedTuple):
    """A task of CORE."""
    name: str
    file: str           # in the bundle, without .jsonl
    shots: int          # solved examples that come before each question
    baseline: float     # accuracy by chance, 0 to 1
    delimiter: str      # between question and answer


def core_tasks() -> list[CoreTask]:
    """The tasks of CORE, in the order of its table."""
    tasks = []
    for line in CORE.strip().split('\n'):
        name, file, shots, chance, *answer = line.split()
        delimiter = '\nAnswer: ' if answer else ' '
        tasks.append(CoreTask(name, file, int(shots), float(chance) / 100, delimiter))
    return tasks


# Finding

def find_core(folder: Path) -> tuple[list[tuple[CoreTask, Path]], list[str]]:
    """The tasks of CORE that have a file in `folder`, with the file, and the others' names."""
    found = []
    missing = []
    for task in core_tasks():
        for place in (folder, folder / 'eval_data'):
            path = place / f'{task.file}.jsonl'
            if path.exists():
                found.append((task, path))
                break
        else:
            missing.append(task.name)

    if not found:
        example = core_tasks()[0].file
        raise UserError(f'{folder} holds no file of CORE, such as eval_data/{example}.jsonl; '
                        f'name the unpacked evaluation bundle, as in --data=eval_bundle')
    return found, missing


def find_task(folder: Path, name: str) -> Path:
    """The file of a task: NAME.jsonl or NAME.txt, or the text that the name begins with."""
    is_file_name = re.fullmatch(r'[\w.-]+', name) and not name.startswith('.')
    if is_file_name:
        base = re.sub(r'_(blocks|stride512)$', '', name)
        for file in (f'{name}.jsonl', f'{name}.txt', f'{base}.txt'):
            if (folder / file).exists():
                return folder / file

    known = {path.stem for path in folder.glob('*.jsonl')}
    known |= {path.stem for path in folder.glob('*.txt')}
    listed = ', '.join(sorted(known))[:300] or 'none'
    raise UserError(f'there is no task {name[:50]!r} in {folder}, which has {listed}; '
                    f'python data/evals/prepare.py writes more')


# Reading

def read_bytes(path):
    try:
        if not path.is_file():
            raise UserError(f'{path} is not a regular file')
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f'{path} has over {MAX_BYTES >> 30} GiB, which is too large for an '
                            f'evaluation task')
        return path.read_bytes()
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror})') from None


def read_text(path: Path) -> str:
    """The text of a UTF-8 file as it is."""
    try:
        return read_bytes(path).decode('utf-8')
    except UnicodeDecodeError as error:
        raise UserError(f'{path} is not UTF-8 at byte {error.start:,}; prepare it again') from None


def read_records(path: Path) -> tuple[str, list[dict]]:
    """The kind of a task and its examples, from a file of JSON lines.

    The first line decides the kind. UserError names a line that does not fit.
    """
    kind = None
    records = []
    for number, line in enumerate(read_bytes(path).split(b'\n'), 1):
        if not line.strip():
            continue

        try:
            record = json.loads(line.decode('utf-8'))
        except (ValueError, RecursionError) as error:
            raise UserError(f'{path}, line {number:,} is not JSON ({str(error)[:100]}); '
                            f'prepare the task again') from None

        if kind is None:
            kind = find_kind(record)
        if kind is None:
            known = ', or '.join(', '.join(fields) for fields in FIELDS.values())
            raise UserError(f'{path}, line {number:,} is not an example of a task: it should have '
                            f'the fields {known}')

        fault = find_fault(kind, record)
        if fault:
            raise UserError(f'{path}, line {number:,} is not a valid {kind.replace("_", " ")} '
                            f'example: {fault}')
        records.append(record)

    if not records:
        raise UserError(f'{path} is empty; prepare the task again')
    return kind, records


def find_kind(record):
    """The kind of task whose fields a record has, or None."""
    if not isinstance(record, dict):
        return None
    for kind, fields in FIELDS.items():
        if fields.keys() <= record.keys():
            return kind
    return None


def find_fault(kind, record):
    """What is wrong with a record, or None."""
    if not isinstance(record, dict):
        return f'it is a {type(record).__name__}, not an object'

    for name, expected in FIELDS[kind].items():
        value = record.get(name)
        if type(value) is not expected:
            return f'{name} should be a {expected.__name__}, and is {str(value)[:60]!r}'

    if kind in OPTION_FIELDS:
        options = record[OPTION_FIELDS[kind]]
        are_texts = all(type(option) is str and option for option in options)
        if not (2 <= len(options) <= MAX_OPTIONS and are_texts):
            return f'its options should be 2 to {MAX_OPTIONS} texts'
        if not 0 <= record['gold'] < len(options):
            return f'gold={record["gold"]} is not one of its {len(options)} options'

    for name in ('continuation', 'answer'):
        if name in FIELDS[kind] and not record[name]:
            return f'{name} is empty'
    return None


# Texts

# The detokenizer of Megatron-LM and lm-evaluation-harness for WikiText, in its order.
WIKITEXT = [
    (r"s '", "s'"),
    (' @-@ ', '-'),
    (' @,@ ', ','),
    (r' @\.@ ', '.'),
    (' : ', ': '),
    (' ; ', '; '),
    (r' \. ', '. '),
    (' ! ', '! '),
    (r' \? ', '? '),
    (' , ', ', '),
    (r'\(\s*([^)]*?)\s*\)', r'(\1)'),
    (r'\[\s*([^\]]*?)\s*\]', r'[\1]'),
    (r'{\s*([^}]*?)\s*}', r'{\1}'),
    (r'"\s*([^"]*?)\s*"', r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    ('= = = =', '===='),
    ('= = =', '==='),
    ('= =', '=='),
    (' ° ', '°'),
    (' \n', '\n'),
    ('\n ', '\n'),
    (' N ', ' 1 '),
    (" 's", "'s"),
]


def detokenize_wikitext(page):
    """A page of raw WikiText as ordinary text."""
    for pattern, replacement in WIKITEXT:
        page = re.sub(pattern, replacement, page)
    return page


def wikitext_pages(text):
    """The pages of raw WikiText: each begins at a heading of the first level, ` = Title = `."""
    pages = re.split(r'\n(?= = (?!= ).*(?<= )= (?:\n|$))', text)
    return [page for page in pages if page.strip()]


def wikitext_rows(text):
    """Raw WikiText as transformers' guide to perplexity reads it, in a list of one document.

    The guide joins the rows of the hub's data set with blank lines. A row is a line and its end,
    and a blank line is an empty row.
    """
    rows = []
    for line in text.split('\n')[:-1]:
        rows.append(line + '\n' if line.strip() else '')
    return ['\n\n'.join(rows)]


def whole(text):
    return [text]


def count_words(document):
    return len(document.split())


def count_words_with_empty_ends(document):
    """As lm-evaluation-harness counts: white space at an end has an empty word beside it."""
    return len(re.split(r'\s+', document))


def count_words_and_line_ends(document):
    return len(document.split()) + document.count('\n')


@dataclass
class TextProtocol:
    """How the perplexity of a text is computed."""
    description: str
    metrics: dict[str, str]             # {metric: what it is per: token, word or byte}
    documents: Callable[[str], list[str]] = whole       # the text to its documents
    clean: Callable[[str], str] = str                   # a document to what the model reads
    count_words: Callable[[str], int] = count_words
    # Tokens between windows. 0: blocks, of which the first begins after <|endoftext|> and the last
    # has a full context.
    stride: int = 0


def raw_text_protocol(text, stride, what):
    """As transformers' guide to perplexity computes it. what: describes the windows."""
    documents = whole
    if text.startswith('wikitext'):
        documents = wikitext_rows
    return TextProtocol(f"raw text, per token, {what}, as transformers' guide",
                        dict(token_perplexity='token'), documents, stride=stride)


def text_protocol(name: str) -> TextProtocol:
    """The protocol of the text task `name`."""
    text, _, windows = name.partition('_')
    if windows == 'blocks':
        return raw_text_protocol(text, 1024, 'disjoint blocks')
    if windows == 'stride512':
        return raw_text_protocol(text, 512, 'windows 512 apart')

    if text.startswith('wikitext'):
        return TextProtocol(
            'detokenized pages, per word and byte of the raw ones, as lm-evaluation-harness',
            dict(word_perplexity='word', byte_perplexity='byte', bits_per_byte='byte'),
            documents=wikitext_pages, clean=detokenize_wikitext,
            count_words=count_words_with_empty_ends)

    if name == 'ptb':
        return TextProtocol('text as it is, per word and line end', dict(word_perplexity='word'),
                            count_words=count_words_and_line_ends)

    if name in ('enwik8', 'text8'):
        return TextProtocol('text as it is, in blocks', dict(bits_per_character='byte'))

    return TextProtocol('text as it is, in blocks',
                        dict(token_perplexity='token', bits_per_byte='byte'))
