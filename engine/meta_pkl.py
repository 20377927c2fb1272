"""The vocabulary in a meta.pkl, as nanoGPT and its kin write it: vocab_size, itos, stoi."""

from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import UserError
from engine.plain_pickle import load_plain

MAX_BYTES = 1 << 26             # of a meta.pkl
MAX_TOKENS = 1 << 20            # of a vocabulary that is no tokenizer's
MAX_TEXT = 1000                 # characters of a token


class Vocabulary(NamedTuple):
    """How many ids a dataset has, and the texts of those that have one."""

    size: int
    texts: dict[int, str]
    are_numbers: bool           # the tokens are numbers, or only their ids are known

    @property
    def are_characters(self) -> bool:
        """True where each id has a character."""
        return len(self.texts) == self.size and all(len(text) == 1 for text in self.texts.values())

    @property
    def are_words(self) -> bool:
        """True where spaces part the tokens of a text, as no token has a space in it."""
        if self.are_numbers:
            return True
        n_long = sum(len(text) > 1 for text in self.texts.values())
        has_spaces = any(' ' in text or text[0] in '▁Ġ' for text in self.texts.values())
        return 2 * n_long > len(self.texts) and not has_spaces

    def all_texts(self) -> list[str]:
        """A text for each id, in their order, all different. An id that has none is '<17>', and
        '17' where no id has one."""
        if not self.texts:
            return [str(i) for i in range(self.size)]

        known = set(self.texts.values())
        texts = []
        for i in range(self.size):
            text = self.texts.get(i, f'<{i}>')
            while i not in self.texts and text in known:
                text = f'<{text}>'
            texts.append(text)
        return texts


def numbers_only(size: int) -> Vocabulary:
    """The vocabulary of a dataset that tells nothing but its size."""
    return checked(Vocabulary(size, {}, are_numbers=True))


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary of a meta.pkl.

    It has any of vocab_size, itos ({id: token}, or a list of tokens) and stoi ({token: id}). Tokens
    are texts or numbers; others have no text. Raises UserError for a file that is damaged or
    hostile, and where two ids have the same text.
    """
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f'it has over {MAX_BYTES >> 20} MiB')
    meta = load_plain(path.read_bytes())
    if not isinstance(meta, dict) or not meta.keys() & {'vocab_size', 'itos', 'stoi'}:
        raise UserError('it should be a dict with vocab_size, or with itos or stoi')

    tokens = read_tokens(meta)
    size = meta.get('vocab_size')
    largest = max(tokens, default=-1)
    if size is None:
        size = largest + 1
    if type(size) is int and size <= largest:
        size = largest + 1              # vocab_size leaves out ids that itos has

    texts = {i: token_text(token) for i, token in tokens.items()}
    texts = {i: text for i, text in texts.items() if text}
    check_different(texts)
    are_numbers = all(isinstance(token, (int, float)) for token in tokens.values())
    return checked(Vocabulary(size, texts, are_numbers))


def read_tokens(meta):
    """{id: token} of the content of a meta.pkl."""
    itos = meta.get('itos')
    if itos is None:
        stoi = meta.get('stoi') or {}
        if not isinstance(stoi, dict):
            raise UserError('stoi should map tokens to ids')
        itos = {}
        for token, i in stoi.items():
            if type(i) is not int:
                raise UserError('stoi should map tokens to ids, which are whole numbers')
            itos.setdefault(i, token)           # the first one, where several have an id
    if isinstance(itos, (list, tuple)):
        itos = dict(enumerate(itos))

    is_table = isinstance(itos, dict) and all(type(i) is int and i >= 0 for i in itos)
    if not is_table:
        raise UserError('itos should map ids to tokens, and ids are whole numbers from 0 on')
    return itos


def token_text(token: Any) -> str | None:
    """The text of a token. None where it has none, such as bytes that end within a character."""
    if isinstance(token, (int, float)):
        return str(token)
    if isinstance(token, bytes):
        try:
            token = token.decode()
        except UnicodeDecodeError:
            return None
    if not isinstance(token, str) or len(token) > MAX_TEXT:
        return None
    return token


def check_different(texts):
    """UserError where two ids have the same text."""
    ids = {}
    for i, text in texts.items():
        if text in ids:
            raise UserError(f'ids {ids[text]} and {i} are both {text[:20]!r}, and a vocabulary has '
                            f'different tokens')
        ids[text] = i


def checked(vocabulary):
    """The vocabulary, where its size is possible. UserError otherwise."""
    size = vocabulary.size
    if type(size) is not int or not 0 < size <= MAX_TOKENS:
        raise UserError(f'vocab_size should be a whole number from 1 to {MAX_TOKENS:,}')
    return vocabulary
