"""Tokenizers, and what meta.json says of a dataset.

    TokenizerSpec   describes a tokenizer; meta.json and checkpoints keep its fields
    Tokenizer       turns text into ids and back, as a spec says
    DatasetMeta     is the content of a meta.json: the spec, and what the token files hold
    TokenizerJson   reads Hugging Face's tokenizer.json
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.downloads import Download, download_url, try_three_times
from engine.errors import UserError
from engine.meta_pkl import Vocabulary, numbers_only, read_vocabulary

END_OF_TEXT = 50256             # GPT-2's token between documents
PADDED_SIZE = 50304             # GPT-2's 50257 tokens, rounded up to a multiple of 64

# The keys in files, in their order. Every tokenizer has its name and its size first, then the keys
# of its kind, and special_tokens where that is not None. meta.json goes on with META_KEYS.
KEYS = dict(
    gpt2=(),
    char=('chars', 'end_of_text'),
    hf=('end_of_text', 'tokenizer_name', 'tokenizer_revision', 'tokenizer_sha256',
        'tokenizer_json', 'tokenizer_config'),
)
META_KEYS = ('record', 'chat', 'dtype', 'tokens', 'sha256', 'source')

MAX_VOCAB_SIZE = 1 << 24
MAX_CHARS = 1 << 16             # of a vocabulary of characters
CHAR_END = '\x03'               # the character END OF TEXT of ASCII, after each document
CHAR_END_NAME = '<|endoftext|>' # how a prompt and a sample spell it, as with other tokenizers
MAX_FILE_CHARACTERS = 1 << 26   # the tokenizer.json of the largest vocabularies have about half

# tokenizer_name of vocabularies that come with a dataset: of numbers, of words, of anything else
NUMBERS = 'ids'
WORDS = 'words'
PIECES = 'pieces'
# What such vocabularies call the token after each document, and the one for what they lack
END_NAMES = ('<|endoftext|>', '<eos>', '</s>', '<EOS>', '[EOS]', '<|eos|>')
UNKNOWN_NAMES = ('<unk>', '<UNK>', '[UNK]', '<|unk|>')


# Specs

@dataclass(frozen=True)
class TokenizerSpec:
    """Everything that decides which ids a text gets, as meta.json and checkpoints keep it.

    There are three kinds. 'gpt2' is GPT-2's byte-level BPE, and its only spec is GPT2. 'char' is a
    vocabulary of single characters. 'hf' is any tokenizer of Hugging Face's tokenizers library; its
    spec holds the files, so a dataset or a checkpoint needs no other file. engine.hf.tokenizer_json
    makes such specs. What a kind lacks is None.
    """

    kind: str                               # 'gpt2', 'char' or 'hf'; "tokenizer" in files
    vocab_size: int                         # every id is below it
    chars: str | None = None                # 'char': the characters, in the order of their ids
    end_of_text: int | None = None          # the id after each document, where there is one

    # Only of 'hf'
    tokenizer_name: str | None = None       # a hub name, a folder's name, or 'bpe' for our own
    tokenizer_revision: str | None = None   # the commit on the hub; None for a folder
    tokenizer_sha256: str | None = None     # the fingerprint of tokenizer_json
    tokenizer_json: str | None = None       # the text of tokenizer.json
    tokenizer_config: str | None = None     # the text of tokenizer_config.json

    # Of 'gpt2' and 'hf': what a special token becomes that a text spells, such as <|endoftext|>.
    # True: that token. False: ordinary text. None, as in all datasets before this field: ordinary
    # text in the data, and the token in a prompt.
    special_tokens: bool | None = None

    @classmethod
    def from_dict(cls, found: Any) -> 'TokenizerSpec':
        """The spec that `found` describes: the content of a meta.json, or a checkpoint's tokenizer.

        Keys that the kind lacks are ignored. Raises UserError where `found` describes no tokenizer.
        Only Tokenizer reads tokenizer_json.
        """
        if not isinstance(found, dict):
            raise UserError(f'the tokenizer is a {type(found).__name__}, not a dict')

        size = found.get('vocab_size')
        if type(size) is not int or not 0 < size <= MAX_VOCAB_SIZE:
            raise UserError(f'vocab_size is {size!r}')

        special = found.get('special_tokens')
        if type(special) not in (bool, type(None)):
            raise UserError(f'special_tokens is {special!r}')

        kind = found.get('tokenizer')
        if kind == 'gpt2' and size == GPT2.vocab_size:
            return replace(GPT2, special_tokens=special)

        if kind == 'char':
            check_char_keys(found)
        elif kind == 'hf':
            check_hf_keys(found)
        else:
            raise UserError(f'unknown tokenizer {kind!r} of {size} tokens')

        fields = {key: found.get(key) for key in KEYS[kind]}
        return cls(kind, size, special_tokens=special, **fields)

    @property
    def label(self) -> str:
        """Its name for people: 'gpt2', 'char', 'bpe', or the name of a foreign tokenizer."""
        return self.tokenizer_name or self.kind

    def to_dict(self) -> dict[str, Any]:
        """The dict of a checkpoint, from which `from_dict` makes the spec again."""
        fields = dict(tokenizer=self.kind, vocab_size=self.vocab_size)
        for key in KEYS[self.kind]:
            fields[key] = getattr(self, key)

        # Most vocabularies of characters have no such token, and no such key.
        if self.kind == 'char' and self.end_of_text is None:
            del fields['end_of_text']
        if self.special_tokens is not None:
            fields['special_tokens'] = self.special_tokens
        return fields


def check_char_keys(found):
    size = found['vocab_size']
    chars = found.get('chars')
    if type(chars) is not str or len(chars) != size or len(set(chars)) != size:
        raise UserError(f'chars should be {size} different characters')
    check_end_of_text(found)


def check_hf_keys(found):
    check_end_of_text(found)

    if not isinstance(found.get('tokenizer_revision'), (str, type(None))):
        raise UserError(f'tokenizer_revision is {found["tokenizer_revision"]!r}')

    for key in ('tokenizer_name', 'tokenizer_sha256', 'tokenizer_json', 'tokenizer_config'):
        if type(found.get(key)) is not str or len(found[key]) > MAX_FILE_CHARACTERS:
            raise UserError(f'{key} should be a text of at most {MAX_FILE_CHARACTERS:,} characters')


def check_end_of_text(found):
    end = found.get('end_of_text')
    if end is not None and (type(end) is not int or not 0 <= end < found['vocab_size']):
        raise UserError(f'end_of_text is {end!r}')


GPT2 = TokenizerSpec('gpt2', 50257, end_of_text=END_OF_TEXT)


def char_spec(chars: Collection[str], ends_documents: bool = False) -> TokenizerSpec:
    """The spec of a tokenizer whose tokens are the characters in `chars`, in code point order.

    ends_documents: the vocabulary has CHAR_END as well, as the end-of-text token. UserError where
    it is one of `chars`.
    """
    if ends_documents:
        if CHAR_END in chars:
            raise UserError(f'the text has the character {CHAR_END!r}, which would end each '
                            f'document; remove it, or try --tokenizer=gpt2')
        chars = [*chars, CHAR_END]
    if len(chars) > MAX_CHARS:
        raise UserError(f'the text has {len(chars):,} different characters, and a vocabulary of '
                        f'characters at most {MAX_CHARS:,}; try --tokenizer=gpt2')

    in_order = ''.join(sorted(chars))
    end = None
    if ends_documents:
        end = in_order.index(CHAR_END)
    return TokenizerSpec('char', len(chars), chars=in_order, end_of_text=end)


def add_characters(spec: TokenizerSpec, chars: Collection[str]) -> TokenizerSpec:
    """A spec of characters with more of them, whose ids follow those that it has.

    Raises UserError where they are too many.
    """
    size = spec.vocab_size + len(chars)
    if size > MAX_CHARS:
        raise UserError(f'{size:,} different characters are too many, as a vocabulary of '
                        f'characters has at most {MAX_CHARS:,}; try --tokenizer=gpt2')
    return replace(spec, vocab_size=size, chars=spec.chars + ''.join(sorted(chars)))


def vocabulary_spec(vocabulary: Vocabulary) -> TokenizerSpec:
    """The spec of a vocabulary that came with a dataset, as a table of tokens.

    Raises UserError where it is too large.
    """
    texts = vocabulary.all_texts()
    if vocabulary.are_characters and not vocabulary.are_numbers:
        return TokenizerSpec.from_dict(
            dict(tokenizer='char', vocab_size=len(texts), chars=''.join(texts)))

    name = PIECES
    if vocabulary.are_numbers:
        name = NUMBERS
    elif vocabulary.are_words:
        name = WORDS
    parts = table_parts(texts, vocabulary.are_words)

    # transformers marks the end of a text as special, so an export that comes back is the same
    config = dict(tokenizer_class='PreTrainedTokenizerFast', clean_up_tokenization_spaces=False)
    end = None
    end_name = next((name for name in END_NAMES if name in texts), None)
    if end_name:
        end = texts.index(end_name)
        config.update(eos_token=end_name)
        parts['added_tokens'].append(dict(
            id=end, content=end_name, single_word=False, lstrip=False, rstrip=False,
            normalized=False, special=True))
    return TokenizerSpec.from_dict(dict(
        tokenizer='hf',
        vocab_size=len(texts),
        end_of_text=end,
        tokenizer_name=name,
        tokenizer_sha256=fingerprint(parts),
        tokenizer_json=json.dumps(parts),
        tokenizer_config=json.dumps(config)))


def table_parts(texts, are_words):
    """The content of a tokenizer.json in which each id has one of `texts`, as the library has it.

    are_words: spaces part the tokens of a text. Otherwise the longest token that fits comes next.
    """
    unknown = next((name for name in UNKNOWN_NAMES if name in texts), '')
    model = dict(type='WordLevel', vocab={text: i for i, text in enumerate(texts)},
                 unk_token=unknown)
    decoder = None                      # puts a space between tokens
    if are_words:
        splits = [split_at(' +', 'Removed')]
        if '\n' in texts:
            splits.append(split_at(r'\n', 'Isolated'))
        else:
            splits.append(dict(type='WhitespaceSplit'))
    else:
        longest_first = sorted((text for text in texts if len(text) > 1), key=len, reverse=True)
        pattern = '|'.join([*map(re.escape, longest_first), r'[\s\S]'])
        splits = [split_at(pattern, 'Isolated')]
        decoder = dict(type='Fuse')     # puts nothing between tokens

    return dict(
        version='1.0', truncation=None, padding=None, added_tokens=[], normalizer=None,
        pre_tokenizer=dict(type='Sequence', pretokenizers=splits),
        post_processor=None, decoder=decoder, model=model)


def split_at(pattern, behavior):
    """The part of a tokenizer.json that splits a text at a regular expression."""
    return dict(type='Split', pattern=dict(Regex=pattern), behavior=behavior, invert=False)


def padded_vocab_size(vocab_size: int) -> int:
    """The vocabulary of a new model for that many tokens.

    GPT-2's 50257 are padded to 50304, which multiplies faster, and tokens that were added to them
    take rows of the padding. 65 characters stay 65.
    """
    if GPT2.vocab_size <= vocab_size <= PADDED_SIZE:
        return PADDED_SIZE
    return vocab_size


def same_tokens(spec: TokenizerSpec, other: TokenizerSpec) -> bool:
    """True where an id means the same in both specs, wherever they came from.

    They may differ in what they make of special tokens that a text spells.
    """
    decisive = ('kind', 'vocab_size', 'chars', 'tokenizer_sha256')
    return all(getattr(spec, name) == getattr(other, name) for name in decisive)


# Tokenizers

class Tokenizer:
    """Text to token ids and back, as a spec says: Tokenizer(spec) gives the kind that it names.

    Attributes: every id is below vocab_size. end_of_text is the id between documents, or None.
    chars has the characters of a vocabulary of characters, and is None in other kinds.
    special_tokens has the texts of the special tokens.
    splits_like_gpt2 is True where engine.prepare.encode.safe_pieces may cut a text.
    drops_characters is True where a text may have characters that become no token.

    Raises UserError for a tokenizer_json that is damaged. Raises RunError where tiktoken cannot
    download GPT-2's encoding, which it does once.
    """

    chars: str | None = None
    special_tokens: Collection[str] = ()
    splits_like_gpt2 = False
    drops_characters = False

    def __new__(cls, spec: TokenizerSpec = GPT2):
        """Tokenizer(spec) is an instance of a subclass, as with pathlib.Path."""
        if cls is Tokenizer:
            kinds = {'gpt2': GPT2Tokenizer, 'char': CharTokenizer, 'hf': HFTokenizer}
            cls = kinds[spec.kind]
        return super().__new__(cls)

    def __init__(self, spec: TokenizerSpec = GPT2):
        self.spec = spec
        self.vocab_size = spec.vocab_size
        self.end_of_text = spec.end_of_text
        self.dtype = '<u2'                          # of arrays of ids
        if self.vocab_size > 1 << 16:
            self.dtype = '<u4'

        # whether special tokens that a text spells count as such
        self.special_in_prompts = spec.special_tokens is not False
        self.special_in_data = spec.special_tokens is True

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt.

        Special tokens that the text spells, such as `<|endoftext|>`, count as such, unless the spec
        says that they are ordinary text. A tokenizer of Hugging Face adds what it puts before a
        text. UserError for what cannot be encoded.
        """
        raise NotImplementedError

    def default_prompt(self) -> str:
        """What a sample begins with unless a person says so: a newline, or the first token of a
        vocabulary that has none."""
        try:
            if self.encode('\n'):
                return '\n'
        except UserError:
            pass
        first = self.decode([0])
        if first.isspace():
            return first
        return first.strip()            # words have a space before them

    def encode_to_numpy(self, text: str, as_document: bool = False) -> np.ndarray:
        """An array of ids, for data.

        Special tokens that the text spells are ordinary text, unless the spec says that they count
        as such. GPT-2's ids then equal those of tiktoken's encode_ordinary. A character tokenizer
        expects characters of its own only. as_document: with what a tokenizer of Hugging Face puts
        around a text, such as `<s>`, and with end_of_text after it.
        """
        ids = self.encode_data(text, as_document)
        if as_document and self.end_of_text is not None and self.end_of_text not in ids[-1:]:
            ids = np.append(ids, np.array(self.end_of_text, self.dtype))
        return ids

    def encode_data(self, text, as_document):
        """The array of encode_to_numpy, without an end_of_text of our own after it."""
        raise NotImplementedError

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 bytes of ids within a text. The last token may end within a character."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, with U+FFFD for a character that is cut."""
        return self.decode_bytes(ids).decode('utf-8', 'replace')

    def bytes_per_token(self, ids: np.ndarray) -> float:
        """Bytes of text in UTF-8 per token of `ids`, of which end-of-text tokens have none.

        A loss in nats per token, divided by this and by ln 2, is in bits per byte, in which models
        with different tokenizers can be compared.
        """
        text_ids = ids
        if self.end_of_text is not None:
            text_ids = ids[ids != self.end_of_text]
        return len(self.decode_bytes(text_ids.tolist())) / len(ids)


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE, by tiktoken."""

    special_tokens = ('<|endoftext|>',)
    splits_like_gpt2 = True

    def __init__(self, spec=GPT2):
        super().__init__(spec)
        self.bpe = load_gpt2_encoding()

    def encode(self, text):
        return self.bpe.encode(text, **self.special_arguments(self.special_in_prompts))

    def encode_data(self, text, as_document):
        arguments = self.special_arguments(self.special_in_data)
        try:
            ids = self.bpe.encode_to_numpy(text, **arguments)
        except (UnicodeEncodeError, AttributeError):    # half a surrogate pair; tiktoken < 0.9
            ids = np.array(self.bpe.encode(text, **arguments))
        return ids.astype(self.dtype)

    def special_arguments(self, count):
        """The arguments of tiktoken with which special tokens that a text spells count as such."""
        allowed = set()
        if count:
            allowed.update(self.special_tokens)
        return dict(allowed_special=allowed, disallowed_special=())

    def decode_bytes(self, ids):
        return self.bpe.decode_bytes(ids)


class CharTokenizer(Tokenizer):
    """A vocabulary of single characters, perhaps with an end-of-text token, which CHAR_END_NAME
    spells in a prompt and in a decoded text."""

    def __init__(self, spec):
        super().__init__(spec)
        self.chars = spec.chars
        self.ids = {char: i for i, char in enumerate(self.chars)}
        self.table = np.zeros(0x110000, self.dtype)     # id of each code point
        self.table[code_points(self.chars)] = np.arange(self.vocab_size)
        self.names = list(self.chars)                   # what each id is decoded to
        if self.end_of_text is not None:
            self.names[self.end_of_text] = CHAR_END_NAME

    def encode(self, text):
        if self.end_of_text is not None:
            text = text.replace(CHAR_END_NAME, self.chars[self.end_of_text])

        unknown = sorted(set(text) - self.ids.keys())
        if unknown:
            known = repr(self.chars)
            if len(self.chars) > 200:
                known = f'its {len(self.chars):,} characters'
            raise UserError(f'the character {unknown[0]!r} is not in the vocabulary of this model; '
                            f'use only {known}')

        return [self.ids[char] for char in text]

    def encode_data(self, text, as_document):
        return self.table[code_points(text)]

    def decode_bytes(self, ids):
        return ''.join(self.names[i] for i in ids).encode('utf-8', 'surrogatepass')


class HFTokenizer(Tokenizer):
    """A tokenizer of Hugging Face's tokenizers library."""

    def __init__(self, spec):
        super().__init__(spec)
        self.file = TokenizerJson(spec.tokenizer_json)
        self.special_tokens = self.file.special_tokens
        self.splits_like_gpt2 = self.file.splits_like_gpt2
        if self.special_in_data and not self.file.special_tokens_stay_whole:
            self.splits_like_gpt2 = False
        self.drops_characters = self.file.drops_characters
        self.decode_id = cache(self.file.decode_bytes)      # the bytes of a single id

        is_same_file = self.file.fingerprint == spec.tokenizer_sha256
        if not is_same_file or self.file.vocab_size != self.vocab_size:
            raise UserError(f'the tokenizer.json of {spec.tokenizer_name[:100]} is damaged; '
                            f'prepare the dataset again')

    def encode(self, text):
        return self.file.encode(text, self.special_in_prompts)

    def encode_data(self, text, as_document):
        ids = self.file.encode_data(text, as_document, self.special_in_data)
        return np.array(ids, self.dtype)

    def decode_bytes(self, ids):
        return b''.join(map(self.decode_id, ids))


def code_points(text: str) -> np.ndarray:
    """The code points of `text` as a uint32 array."""
    return np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), '<u4')


def load_gpt2_encoding():
    """tiktoken's Encoding of GPT-2. RunError where it cannot be downloaded."""
    import tiktoken.load
    download = Download(
        "tiktoken's encoding of GPT-2",
        'set TIKTOKEN_CACHE_DIR to a folder that holds it',
        cache='TIKTOKEN_CACHE_DIR')

    # tiktoken's own download would wait for a silent server without end.
    read_file = tiktoken.load.read_file
    tiktoken.load.read_file = download_url
    try:
        return try_three_times(partial(tiktoken.get_encoding, 'gpt2'), download)
    finally:
        tiktoken.load.read_file = read_file


def gpt2_is_cached() -> bool:
    """True where tiktoken has GPT-2's two files, so that loading them needs no network."""
    folder = Path(tempfile.gettempdir(), 'data-gym-cache')
    for variable in ('DATA_GYM_CACHE_DIR', 'TIKTOKEN_CACHE_DIR'):       # the last one counts
        if variable in os.environ:
            folder = Path(os.environ[variable])

    # tiktoken names a file after the hash of its address.
    for name in ('vocab.bpe', 'encoder.json'):
        address = f'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}'
        if not (folder / hashlib.sha1(address.encode()).hexdigest()).is_file():
            return False
    return True


# Meta files

@dataclass
class DatasetMeta:
    """What meta.json says of the dataset in its folder.

    What a meta.json leaves out is None: those of others may have nothing but the tokenizer. Only
    the spec is checked when a file is read; whoever uses another field checks it.
    """

    spec: TokenizerSpec                     # its keys stand beside the others in the file
    record: dict[str, int] | None = None    # {'length': tokens} of a dataset of records
    chat: dict[str, str] | None = None      # the ChatLayout of a dataset of conversations
    dtype: str | None = None                # the type of ids, 'uint16' or 'uint32'
    tokens: dict[str, int] | None = None    # how many tokens each split has
    sha256: dict[str, str] | None = None    # the digest of each token file and mask, by its name
    source: str | None = None               # the key of the ShardWriter that made shards

    @classmethod
    def from_dict(cls, found: Any) -> 'DatasetMeta':
        """What the content of a meta.json says. Raises UserError as TokenizerSpec.from_dict."""
        spec = TokenizerSpec.from_dict(found)
        return cls(spec, **{key: found.get(key) for key in META_KEYS})

    def to_dict(self) -> dict[str, Any]:
        """The content of meta.json."""
        fields = self.spec.to_dict()
        if self.spec.kind == 'char':        # such files have always begun with the size
            fields = dict(vocab_size=self.spec.vocab_size) | fields

        for key in META_KEYS:
            if getattr(self, key) is not None:
                fields[key] = getattr(self, key)
        return fields

    @classmethod
    def read(cls, folder: Path) -> 'DatasetMeta':
        """What meta.json says of the dataset in `folder`.

        If it names no tokenizer and no vocab_size, or is missing, the spec comes from nanoGPT's
        meta.pkl, and without that it is GPT-2's. Raises UserError where a file is damaged or
        hostile.
        """
        path = folder / 'meta.json'
        found = {}
        try:
            if path.is_file():
                found = json.loads(path.read_text(encoding='utf-8-sig'))
            spec = json_spec(found)
            if spec is None:
                path = folder / 'meta.pkl'
                spec = GPT2
                if path.is_file():
                    spec = vocabulary_spec(read_vocabulary(path))
            return cls(spec, **{key: found.get(key) for key in META_KEYS})
        except Exception as error:          # a damaged file can raise anything
            reason = str(error)
            if not isinstance(error, UserError):
                reason = f'{type(error).__name__}: {error}'
            advice = 'prepare the dataset again'
            if path.name == 'meta.pkl':
                advice += (f', or write {{"vocab_size": SIZE}} to {folder / "meta.json"}, so that '
                           f'ids are trained on as numbers')
            raise UserError(f'{path} cannot be read: {reason}; {advice}') from None


def read_meta(folder: Path) -> TokenizerSpec:
    """The tokenizer spec of the dataset in `folder`. Raises UserError as DatasetMeta.read."""
    return DatasetMeta.read(folder).spec


def json_spec(found):
    """The spec that the content of a meta.json names. None where it names none.

    Those that people write may have vocab_size alone, so that only the ids are known.
    """
    if not isinstance(found, dict):
        return TokenizerSpec.from_dict(found)       # which refuses it
    if found.get('tokenizer') == 'gpt2':
        return TokenizerSpec.from_dict({'vocab_size': GPT2.vocab_size} | found)
    if 'tokenizer' in found:
        return TokenizerSpec.from_dict(found)
    if 'vocab_size' in found:
        return vocabulary_spec(numbers_only(found['vocab_size']))
    return None


# Hugging Face's tokenizer.json

class TokenizerJson:
    """Text to ids and single ids to bytes, as the text of a tokenizer.json says.

    Attributes: parts is the parsed file. vocab_size is one more than the largest id. fingerprint is
    that of `fingerprint`. special_tokens has the texts of the special tokens. Raises UserError
    where the file is damaged.
    """

    def __init__(self, tokenizer_json: str):
        check_ids(tokenizer_json)
        self.tokenizer = load(tokenizer_json)
        self.parts = json.loads(self.tokenizer.to_str())
        self.fingerprint = fingerprint(self.parts)
        added = self.tokenizer.get_added_tokens_decoder()
        self.added = {i: token.content for i, token in added.items()}
        self.special_tokens = [token.content for token in added.values() if token.special]
        self.ordinary = self.tokenizer                  # takes special tokens in a text as text
        if self.special_tokens:
            self.ordinary = load(tokenizer_json)
            self.ordinary.encode_special_tokens = True
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values(), default=-1)

        # What tokens stand for: SentencePiece's <0x00> to <0xFF> are bytes, and so is each letter
        # of byte-level BPE.
        decoder = json.dumps(self.parts['decoder'])
        self.names_bytes = '"ByteFallback"' in decoder
        self.bytes_of_letters = {}
        if '"ByteLevel"' in decoder:
            self.bytes_of_letters = {letter: byte for byte, letter in enumerate(byte_letters())}

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """The ids of a prompt.

        What the tokenizer puts before a text is there, such as `<s>`. What it puts after one is
        not: behind `</s>`, a model would not go on with the text.
        special_tokens: whether those that the text spells count as such.
        """
        encoded = self.run(self.reader(special_tokens), text, add_special_tokens=True)
        return encoded.ids[:len(encoded.ids) - self.count_after(encoded)]

    def count_after(self, encoded):
        """How many tokens the tokenizer has put after a text."""
        if self.parts['post_processor'] is None:
            return 0
        is_added = encoded.special_tokens_mask
        if all(is_added):               # the text is empty, so nothing parts before from after
            is_added = self.run(self.tokenizer, 'a', add_special_tokens=True).special_tokens_mask
        if all(is_added):
            return 0
        return is_added[::-1].index(0)

    def encode_data(
        self, text: str, as_document: bool = False, special_tokens: bool = False,
    ) -> list[int]:
        """The ids, for data.

        as_document: with what the tokenizer puts around a text.
        special_tokens: whether those that the text spells count as such.
        """
        return self.run(self.reader(special_tokens), text, add_special_tokens=as_document).ids

    def reader(self, special_tokens):
        """The library's tokenizer for texts whose special tokens count as such, or do not."""
        if special_tokens:
            return self.tokenizer
        return self.ordinary

    def run(self, tokenizer, text, add_special_tokens):
        """The library's Encoding of a text."""
        # UTF-8 lacks halves of surrogate pairs: U+FFFD stands for each.
        text = text.encode('utf-16-le', 'surrogatepass').decode('utf-16-le', 'replace')
        try:
            # 'fast' leaves out positions and takes a third of the time.
            return tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        except Exception as error:      # a vocabulary without a token for the unknown
            reason = self.describe_unknown(text) or str(error)
            raise UserError(f'the tokenizer cannot encode this text: {reason}') from None

    def describe_unknown(self, text):
        """The first word of a text that a vocabulary of words lacks, for people, or None."""
        if self.parts['model']['type'] != 'WordLevel' or not self.parts['pre_tokenizer']:
            return None
        vocabulary = self.tokenizer.get_vocab()
        for word, _ in self.tokenizer.pre_tokenizer.pre_tokenize_str(text):
            if word not in vocabulary:
                known = ' '.join(map(repr, sorted(vocabulary, key=vocabulary.get)[:10]))
                return (f'{word[:50]!r} is none of its {len(vocabulary):,} tokens, such as '
                        f'{known:.200}')
        return None

    @cached_property
    def splits_like_gpt2(self) -> bool:
        """True where engine.prepare.encode.safe_pieces may cut documents.

        Then GPT-2's pattern splits a text, nothing before it looks at more than single characters,
        and nothing is put around the text.
        """
        splitter = self.parts['pre_tokenizer'] or {}
        *before, last = splitter.get('pretokenizers', [splitter])

        has_pattern = (last.get('type') == 'ByteLevel' and last['use_regex']
                       and not last['add_prefix_space'])
        if not has_pattern or any(step['type'] != 'Digits' for step in before):
            return False

        if self.parts['normalizer']:
            return False
        if not all(token['special'] for token in self.parts['added_tokens']):
            return False
        return not self.encode_data('', as_document=True)

    @cached_property
    def special_tokens_stay_whole(self) -> bool:
        """True where no place that engine.prepare.encode.safe_pieces may cut lies in a special
        token, or in the white space that the token takes with it."""
        return not any(token['rstrip'] or re.search(r'\s', token['content'])
                       for token in self.parts['added_tokens'] if token['special'])

    @cached_property
    def drops_characters(self) -> bool:
        """True where the tokenizer may leave out characters of a text: it is a BPE that has
        neither a token for each byte nor one for the unknown."""
        model = self.parts['model']
        if model['type'] != 'BPE' or model['unk_token'] is not None:
            return False

        vocabulary = self.tokenizer.get_vocab()
        before = json.dumps([self.parts['normalizer'], self.parts['pre_tokenizer']])
        if '"ByteLevel"' in before:
            return not vocabulary.keys() >= set(byte_letters())
        has_bytes = all(f'<0x{byte:02X}>' in vocabulary for byte in range(256))
        return not (model['byte_fallback'] and has_bytes)

    def decode_bytes(self, i: int) -> bytes:
        """The bytes of a token within a text."""
        token = self.tokenizer.id_to_token(i)
        if self.names_bytes and re.fullmatch('<0x[0-9A-F]{2}>', token or ''):
            return bytes([int(token[3:5], 16)])

        if token is None or i in self.added:            # None: some vocabularies leave out ids
            return self.added.get(i, '').encode()

        if self.bytes_of_letters and set(token) <= self.bytes_of_letters.keys():
            return bytes(self.bytes_of_letters[letter] for letter in token)

        # Decoders treat the first token of a text in ways of their own, so this one is decoded
        # after another.
        alone = self.decode_library(self.token_before)
        both = self.decode_library([*self.token_before, i])
        return both.removeprefix(alone).encode()

    def decode_library(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    @cached_property
    def token_before(self):
        """A list of one id that any token can follow."""
        try:
            found = self.encode_data('a')[-1:]
        except UserError:               # a vocabulary of other words
            found = []
        return found or [0]


def load(tokenizer_json):
    """The tokenizers.Tokenizer of a tokenizer.json, which never cuts or pads a text.

    Raises UserError where the file is damaged.
    """
    import tokenizers
    try:
        tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:      # the library's own panics are not Exceptions
        reason = ' '.join(str(error).split())[:200]
        raise UserError(f'the tokenizer.json cannot be used: {reason}') from None


def check_ids(tokenizer_json: str, name: str = 'tokenizer.json') -> None:
    """UserError where a tokenizer file has an id that is too large for a vocabulary.

    The tokenizers library counts from 0 to the largest id, which would take hours for 2^31.
    tokenizer_json: the text of the file. name: tokenizer.json, vocab.json, added_tokens.json, or
    tokenizer_config.json. A file that is damaged in another way is left to the library.
    """
    try:
        largest = max(ids_of_file(json.loads(tokenizer_json), name), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return
    if largest >= MAX_VOCAB_SIZE:
        raise UserError(f'the {name} has the id {largest:,}, and ids should be below '
                        f'{MAX_VOCAB_SIZE:,}')


def ids_of_file(content, name):
    """The ids in the content of a tokenizer file."""
    if name == 'tokenizer_config.json':
        return [int(i) for i in content.get('added_tokens_decoder') or {}]
    if name != 'tokenizer.json':        # {token: id}
        return [i for i in content.values() if type(i) is int]

    ids = [token['id'] for token in content.get('added_tokens') or []]
    vocabulary = content['model']['vocab']
    if isinstance(vocabulary, dict):    # a list has its ids by the places
        ids += vocabulary.values()
    return ids


def fingerprint(parts):
    """SHA-256 of the parts of a tokenizer.json that decide which ids a text gets.

    The fingerprint does not depend on how the file is written.
    """
    added = [{key: token[key] for key in ('id', 'content', 'special')}
             for token in parts['added_tokens']]
    # A part that is absent may be None or ''.
    model = {key: value for key, value in parts['model'].items() if value}

    decisive = [added, parts['normalizer'], parts['pre_tokenizer'], model]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def byte_letters() -> list[str]:
    """The letters of the bytes 0 to 255 in byte-level BPE files.

    Latin-1's printable characters stand for themselves, the code points from 256 on for the others.
    Source: the vocab.json that OpenAI published.
    """
    printable = {*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1),
                 *range(ord('®'), 256)}
    letters = []
    other = 256                         # the code point of the next byte that is not printable
    for byte in range(256):
        if byte in printable:
            letters.append(chr(byte))
        else:
            letters.append(chr(other))
            other += 1
    return letters
