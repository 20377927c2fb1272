"""A model that answers: the turns of a conversation in, the text of its answer out."""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from engine.chat_layout import (
    ChatLayout,
    Segment,
    Turn,
    document_start,
    encode_prompt,
    encode_segments,
)
from engine.device import derive_seed
from engine.errors import UserError, check_range, shorten
from engine.generation.kv_cache import TextCache
from engine.generation.text import Text
from engine.tokenizer import Tokenizer

ROOM_FOR_ANSWER = 4             # one part in so many of block_size stays free for the answer


@dataclass(frozen=True)
class AnswerSettings:
    """How an answer is sampled, by the names of sample.py. Raises UserError for a value out of
    range."""
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    max_new_tokens: int

    def __post_init__(self):
        values = asdict(self)
        check_range(values, 'temperature', 0, 1000)
        check_range(values, 'top_k', 0, 1 << 30)
        check_range(values, 'top_p', above=0, high=1)
        check_range(values, 'min_p', 0, high=1)
        check_range(values, 'repetition_penalty', above=0, high=1000)
        check_range(values, 'max_new_tokens', 1, 1 << 16)

    def changed(self, values: dict[str, Any]) -> 'AnswerSettings':
        """These settings with some of them changed.

        values: {name: number}, as a person typed them or a page sent them. Raises UserError for an
        unknown name, for what is no number, and for a number out of range.
        """
        types = {field.name: field.type for field in fields(self)}
        numbers = {}
        for name, value in values.items():
            if name not in types:
                raise UserError(f'there is no setting {shorten(name)}; there are '
                                f'{", ".join(types)}')
            is_whole = type(value) is int and abs(value) <= 1 << 62
            if types[name] is int and not is_whole:
                raise UserError(f'{name}={shorten(value)} should be a whole number')
            if not is_whole and type(value) is not float:
                raise UserError(f'{name}={shorten(value)} should be a number')
            numbers[name] = types[name](value)
        return replace(self, **numbers)


class Prompt(NamedTuple):
    """What the model reads before it answers."""
    ids: list[int]
    n_dropped: int              # turns at the beginning of the conversation that are left out


class ChatModel:
    """A model that answers in conversations.

    It holds no conversation, so answers to several may be computed in turns.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, layout: ChatLayout | None,
                 seed: int):
        """model: a GPT on its device. layout: of the conversations that it was trained on. Without
        one, the model continues the text of all turns. seed: fixes the random numbers of the first
        answer, of the second, and so on."""
        self.model = model
        self.tokenizer = tokenizer
        self.layout = layout
        self.seed = seed
        self.numbers = itertools.count()        # of the answers

        if layout is None:
            self.start = document_start(tokenizer)
            self.before_answer = []
            self.stop = None
        else:
            self.start = encode_prompt(tokenizer, [])
            self.before_answer = encode_segments(tokenizer, [Segment(layout.assistant)])
            self.stop = layout.end

    def prompt(self, turns: list[Turn], max_new_tokens: int) -> Prompt:
        """The prompt of the answer to the last turn, which is one of the user.

        What fits block_size beside some room for the answer stays; the oldest turns are left out.
        Raises UserError where the last turn alone does not fit, and for a character that the
        vocabulary lacks.
        """
        block_size = self.model.config.block_size
        room = block_size - min(max_new_tokens, block_size // ROOM_FOR_ANSWER)
        room -= len(self.start) + len(self.before_answer)

        # the newest turns that fit
        kept = []
        n_tokens = 0
        for turn in reversed(turns):
            ids = self.encode_turn(turn)
            n_tokens += len(ids)
            if n_tokens > room:
                break
            kept.insert(0, ids)
        if not kept:
            raise UserError(f'this message has {n_tokens:,} tokens, and the model reads messages '
                            f'of at most {max(room, 0):,}; shorten it')

        # An answer without its question would mislead the model.
        n_dropped = len(turns) - len(kept)
        while n_dropped and turns[n_dropped].role == 'assistant':
            kept.pop(0)
            n_dropped += 1

        ids = sum(kept, self.start) + self.before_answer
        if not ids:
            raise UserError('the message is empty; type something')
        return Prompt(ids, n_dropped)

    def encode_turn(self, turn):
        """The ids of a turn. Without a layout, what a user says begins a line."""
        if self.layout is not None:
            return encode_segments(self.tokenizer, self.layout.segments([turn]))
        text = turn.text
        if turn.role == 'assistant' and '\n' in (self.tokenizer.chars or '\n'):
            text += '\n'
        return encode_segments(self.tokenizer, [Segment(text)])

    def answer(self, prompt: Prompt, settings: AnswerSettings,
               text_cache: TextCache) -> Iterator[str]:
        """Yield the text of an answer, a part for each token; '' where it completes no character.

        text_cache: what of the prompt it holds is not read again; it holds the answer too then.
        """
        device = self.model.transformer.wte.weight.device
        generator = torch.Generator().manual_seed(
            derive_seed(self.seed, 'answer', next(self.numbers)))
        noise = torch.rand(1, settings.max_new_tokens, generator=generator)
        options = asdict(settings)
        tokens = self.model.stream(
            torch.tensor([prompt.ids], device=device), **options, noise=noise.to(device),
            vocab_size=self.tokenizer.vocab_size, text_cache=text_cache)

        text = Text(self.tokenizer, self.stop)
        for number, token in enumerate(tokens, 1):
            if token.item() == self.tokenizer.end_of_text:
                text.finish()
            else:
                text.add(token.item(), last=number == settings.max_new_tokens)
            yield text.new_part()
            if text.ended:
                return
