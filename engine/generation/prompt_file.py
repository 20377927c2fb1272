"""Prompts from a file of JSON lines, and the answers to them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from engine.errors import UserError

MAX_LINE_BYTES = 1 << 26
EXAMPLE = '{"prompt": "The sky is"}'


class Prompt(NamedTuple):
    """A line of the file."""
    id: str | int               # its own, or the number of the line
    text: str
    where: str                  # the file and the line, for messages


def read_prompts(path: str) -> Iterator[Prompt]:
    """Yield the Prompt of each line that is not empty. One line at a time is held.

    A line is an object with "prompt" and perhaps "id", a text or a whole number; other fields are
    ignored. Raises UserError that names a line without a prompt, and where there are no prompts.
    """
    is_empty = True
    try:
        if not Path(path).is_file():                        # a FIFO cannot be read twice
            raise UserError(f'prompts={path!r} is no regular file; name a file with lines such as '
                            f'{EXAMPLE}')
        with open(path, 'rb') as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b''), 1):
                where = f'{path}, line {number:,}'
                if len(line) == MAX_LINE_BYTES:
                    raise UserError(f'{where} has over {MAX_LINE_BYTES >> 20} MiB; shorten it')
                if line.strip(b'\xef\xbb\xbf \t\r\n'):
                    is_empty = False
                    yield parse_prompt(line, number, where)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f'prompts={path!r} cannot be read: {error}') from None
    if is_empty:
        raise UserError(f'{path} has no prompts; write lines such as {EXAMPLE}')


def parse_prompt(line, number, where):
    """The Prompt of a line of bytes."""
    try:
        found = json.loads(line.decode('utf-8-sig'))
        json.dumps(found, ensure_ascii=False).encode()      # fails for half a surrogate pair
    except (ValueError, RecursionError) as error:
        raise UserError(f'{where} is not JSON in UTF-8 ({str(error)[:100]}); write lines such as '
                        f'{EXAMPLE}') from None

    if not isinstance(found, dict) or not isinstance(found.get('prompt'), str):
        raise UserError(f'{where} has no "prompt" that is a text; write lines such as {EXAMPLE}')
    own_id = found.get('id', number)
    if type(own_id) not in (str, int):
        raise UserError(f'{where} has an "id" that is neither a text nor a whole number')
    return Prompt(own_id, found['prompt'], where)


def answer_line(prompt: Prompt, answer: str, sample: int) -> str:
    """The line of JSON of an answer. sample: its number among the answers to the prompt, from 0."""
    record = dict(id=prompt.id, prompt=prompt.text, answer=answer, sample=sample)
    return json.dumps(record, ensure_ascii=False) + '\n'
