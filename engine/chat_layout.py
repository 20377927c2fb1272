"""How a conversation is written as a text, for the datasets and for those who talk to a model.

A dataset of conversations keeps its layout in meta.json, and the checkpoints of a run keep it
beside the tokenizer. So a prompt has the tokens that the model was trained on.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from engine.errors import UserError
from engine.tokenizer import Tokenizer

MAX_MARKER = 100            # characters of a marker, which is read from files of others


class Turn(NamedTuple):
    """What one side of a conversation says."""
    role: str               # 'system', 'user' or 'assistant'
    text: str


class Segment(NamedTuple):
    """A part of a document that is encoded by itself."""
    text: str
    counts: bool = True     # its tokens count in the loss


@dataclass(frozen=True)
class ChatLayout:
    """The markers of a conversation, which are text that every tokenizer can spell:

        <|user|>Why is the sky blue?<|end|><|assistant|>Air scatters blue light.<|end|>

    A vocabulary that has a marker as a token may spell it with that one token.
    """

    system: str = '<|system|>'          # before what each role says
    user: str = '<|user|>'
    assistant: str = '<|assistant|>'
    end: str = '<|end|>'                # after it

    @classmethod
    def from_dict(cls, found: Any) -> 'ChatLayout':
        """The layout that a meta.json or a checkpoint describes. UserError where it is none."""
        names = [field.name for field in fields(cls)]
        if not isinstance(found, dict) or sorted(found) != sorted(names):
            raise UserError(f'the chat layout should have {", ".join(names)}')
        for name in names:
            marker = found[name]
            if type(marker) is not str or not 0 < len(marker) <= MAX_MARKER:
                raise UserError(f'the marker {name!r} of the chat layout should be a text of 1 to '
                                f'{MAX_MARKER} characters')
        return cls(**found)

    def to_dict(self) -> dict[str, str]:
        """The markers by their names, as meta.json and checkpoints keep them."""
        return asdict(self)

    def segments(self, turns: Iterable[Turn]) -> list[Segment]:
        """The segments of a conversation: what the assistant says counts in the loss.

        The marker that ends an answer counts too, as the model has to write it. Each marker is a
        segment, so that its tokens are the same wherever it stands.
        """
        segments = []
        for role, text in turns:
            is_answer = role == 'assistant'
            segments.append(Segment(getattr(self, role), False))
            segments.append(Segment(text, is_answer))
            segments.append(Segment(self.end, is_answer))
        return segments

    def prompt(self, turns: Iterable[Turn]) -> list[Segment]:
        """The segments after which the assistant's next answer comes."""
        return [*self.segments(turns), Segment(self.assistant, False)]


def document_start(tokenizer: Tokenizer) -> list[int]:
    """The ids that a document of segments begins with: what the tokenizer puts before a text."""
    return tokenizer.encode('')


def encode_prompt(tokenizer: Tokenizer, segments: Iterable[Segment]) -> list[int]:
    """The ids of a prompt, with what comes before a document in a dataset.

    That is the end-of-text token of the document before it, where the tokenizer has one. Raises
    UserError for a character that the vocabulary lacks.
    """
    ids = document_start(tokenizer)
    if tokenizer.end_of_text is not None:
        ids = [tokenizer.end_of_text, *ids]
    return ids + encode_segments(tokenizer, segments)


def encode_segments(tokenizer: Tokenizer, segments: Iterable[Segment]) -> list[int]:
    """The ids of segments within a document. Raises UserError as encode_prompt."""
    ids = []
    for text, _ in segments:
        if tokenizer.chars is not None:
            ids += tokenizer.encode(text)               # it refuses other characters
        else:
            ids += tokenizer.encode_to_numpy(text).tolist()
    return ids
