"""The conversation in a terminal."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from engine.atomic_files import advice_on, atomic_write
from engine.chat.chat_model import AnswerSettings, ChatModel
from engine.chat_layout import Turn
from engine.errors import UserError
from engine.generation.kv_cache import TextCache
from engine.log import log


class Conversation:
    """Turns of a user and of a model that answers them.

    settings: how the next answer is sampled. The tokens of the turns so far stay in caches, so that
    the model reads only what is new.
    """

    def __init__(self, chat_model: ChatModel, settings: AnswerSettings):
        self.chat_model = chat_model
        self.settings = settings
        self.turns: list[Turn] = []
        self.text_cache = TextCache(chat_model.model)
        self.has_told_of_dropped = False
        self.saved_to: Path | None = None

    def ask(self, text: str) -> Iterator[str]:
        """Yield the answer to what the user says, in parts.

        If the caller stops, or Ctrl-C ends the computation, the answer so far stays. Raises
        UserError for a text that the model cannot read; the conversation is then as before.
        """
        yield from self.answer([*self.turns, Turn('user', text)])

    def retry(self) -> Iterator[str]:
        """Yield another answer to what the user said last, in parts."""
        if not self.turns:
            raise UserError('there is no answer yet; say something first')
        yield from self.answer(self.turns[:-1])

    def answer(self, turns):
        prompt = self.chat_model.prompt(turns, self.settings.max_new_tokens)
        if prompt.n_dropped and not self.has_told_of_dropped:
            self.has_told_of_dropped = True
            block_size = self.chat_model.model.config.block_size
            log.info(f'note: the model reads {block_size:,} tokens at most, so from now on it '
                     f'forgets the oldest turns')

        parts = []
        steps = self.chat_model.answer(prompt, self.settings, self.text_cache)
        try:
            with closing(steps):
                for part in steps:
                    parts.append(part)
                    yield part
        finally:
            self.turns = [*turns, Turn('assistant', ''.join(parts))]

    def begin_anew(self) -> None:
        """Forget all turns."""
        self.turns = []
        self.has_told_of_dropped = False
        self.saved_to = None

    def save(self, name: str) -> None:
        """Write the turns to a file as a line of JSON, which data/text/prepare.py reads.

        Raises UserError where there is nothing to write, where another file has that name, and
        where the file cannot be written.
        """
        path = Path(name)
        if not self.turns:
            raise UserError('there is nothing to save yet; say something first')
        if path.suffix != '.jsonl':
            raise UserError('data/text/prepare.py reads conversations from files whose names end '
                            'in .jsonl; try /save talk.jsonl')

        messages = [dict(role=turn.role, content=turn.text) for turn in self.turns]
        line = json.dumps(dict(messages=messages), ensure_ascii=False)
        try:
            path = path.expanduser()
            if path.exists() and path != self.saved_to:
                raise UserError(f'{name} is there already; choose another name')
            with atomic_write(path) as file:
                file.write(line + '\n')
        except UserError:
            raise
        except (OSError, ValueError, RuntimeError) as error:    # ~nobody, or a name with a NUL
            raise UserError(f'{name} was not written ({error}); {advice_on(error)}') from None
        self.saved_to = path
