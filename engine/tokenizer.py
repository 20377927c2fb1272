"""Tokenizers, and the meta files that name a dataset's tokenizer.

A spec is a dict, one of these three. meta.json, checkpoints and Tokenizer all use it.

    tokenizer='gpt2', vocab_size=50257
    tokenizer='char', vocab_size=int, chars=str
    tokenizer='hf', vocab_size=int, end_of_text=id or None, tokenizer_name=str, tokenizer_revision=str or None,
        tokenizer_sha256=str, tokenizer_json=str, tokenizer_config=str

'hf' is any tokenizer of Hugging Face's tokenizers library. The last two hold its files, so a dataset or a
checkpoint needs no other file. engine.hf.tokenizer_json makes such specs.
"""

import hashlib
import json
import pickle
import re
from functools import cached_property

import numpy as np

from engine.errors import RunError, UserError

GPT2 = dict(tokenizer='gpt2', vocab_size=50257)
END_OF_TEXT = 50256             # GPT-2's token between documents
KEYS = ('tokenizer', 'vocab_size', 'chars', 'end_of_text', 'tokenizer_name', 'tokenizer_revision', 'tokenizer_sha256',
        'tokenizer_json', 'tokenizer_config')
MAX_VOCAB_SIZE = 1 << 24
MAX_FILE_CHARACTERS = 1 << 26   # of a tokenizer.json; those of the largest vocabularies have about half


class Tokenizer:
    """Text to token ids and back, as `spec` says. tiktoken downloads GPT-2's encoding once.

    vocab_size: every id is below it. end_of_text: the id between documents, or None. splits_like_gpt2: True where
    engine.prepare.encode.safe_pieces may cut a text. dtype: of arrays of ids, '<u4' where vocab_size is over 65,536, else '<u2'.
    """

    def __init__(self, spec=GPT2):
        check_spec(spec)
        self.spec, self.vocab_size, self.chars = spec, spec['vocab_size'], spec.get('chars')
        self.dtype = '<u2' if self.vocab_size <= 1 << 16 else '<u4'
        self.end_of_text, self.bpe, self.hf, self.splits_like_gpt2 = end_of_text(spec), None, None, False
        if spec['tokenizer'] == 'gpt2':
            self.bpe, self.splits_like_gpt2 = load_gpt2_encoding(), True
        elif spec['tokenizer'] == 'hf':
            self.hf = HFTokenizer(spec['tokenizer_json'])
            self.splits_like_gpt2 = self.hf.splits_like_gpt2
            if self.hf.fingerprint != spec['tokenizer_sha256'] or self.hf.vocab_size != self.vocab_size:
                raise UserError(f'the tokenizer.json of {spec["tokenizer_name"][:100]} is damaged; prepare the dataset again')
        else:
            self.ids = {char: i for i, char in enumerate(self.chars)}
            self.table = np.zeros(0x110000, self.dtype)         # id of each code point
            self.table[code_points(self.chars)] = np.arange(self.vocab_size)

    def encode(self, text):
        """A list of ids for a prompt. Special tokens in it, such as `<|endoftext|>`, count as such, and a tokenizer
        of Hugging Face adds what it puts around a text. UserError names a character that is not in the vocabulary."""
        if self.bpe:
            return self.bpe.encode(text, allowed_special={'<|endoftext|>'})
        if self.hf:
            return self.hf.encode(text)
        unknown = sorted(set(text) - self.ids.keys())
        if unknown:
            known = f'its {len(self.chars):,} characters' if len(self.chars) > 200 else repr(self.chars)
            raise UserError(f'the character {unknown[0]!r} is not in the vocabulary of this model; use only {known}')
        return [self.ids[char] for char in text]

    def encode_to_numpy(self, text, as_document=False):
        """An array of ids, with special tokens as ordinary text. GPT-2's equal tiktoken's encode_ordinary.

        A character tokenizer expects characters of its own only. as_document: with what a tokenizer of
        Hugging Face puts around a text, such as `<s>`, and with end_of_text after it.
        """
        if self.hf:
            ids = np.array(self.hf.encode_ordinary(text, as_document), self.dtype)
        elif self.bpe:
            try:
                ids = self.bpe.encode_to_numpy(text, disallowed_special=())
            except (UnicodeEncodeError, AttributeError):    # half a surrogate pair, from JSON; tiktoken < 0.9
                ids = np.array(self.bpe.encode_ordinary(text))
            ids = ids.astype(self.dtype)
        else:
            ids = self.table[code_points(text)]
        if as_document and self.end_of_text is not None and self.end_of_text not in ids[-1:]:
            ids = np.append(ids, np.array(self.end_of_text, self.dtype))
        return ids

    def decode_bytes(self, ids):
        """UTF-8 bytes of ids within a text. The last token may end within a character."""
        if self.bpe:
            return self.bpe.decode_bytes(ids)
        if self.hf:
            return b''.join(map(self.hf.decode_bytes, ids))
        return ''.join(self.chars[i] for i in ids).encode('utf-8', 'surrogatepass')

    def decode(self, ids):
        """The text of `ids`, with U+FFFD for a character that is cut."""
        return self.decode_bytes(ids).decode('utf-8', 'replace')


def code_points(text):
    """The code points of `text` as a uint32 array."""
    return np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), '<u4')


def load_gpt2_encoding():
    import tiktoken
    try:
        return tiktoken.get_encoding('gpt2')
    except Exception as error:          # its download raises errors of many libraries
        raise RunError(f"tiktoken could not fetch GPT-2's encoding ({type(error).__name__}); go online once, "
                       f'or set TIKTOKEN_CACHE_DIR to a folder that holds it') from None


def char_spec(chars):
    """The spec of a tokenizer whose tokens are the characters in `chars`, in code point order."""
    if len(chars) > 1 << 16:
        raise UserError(f'the text has {len(chars):,} different characters, and a vocabulary of characters at most 65,536; '
                        f'try --tokenizer=gpt2')
    return dict(vocab_size=len(chars), tokenizer='char', chars=''.join(sorted(chars)))


def check_spec(spec):
    """`spec`, if it describes a tokenizer. Raises UserError otherwise. Only Tokenizer reads tokenizer_json."""
    if not isinstance(spec, dict):
        raise UserError(f'the tokenizer is a {type(spec).__name__}, not a dict')
    kind, size = spec.get('tokenizer'), spec.get('vocab_size')
    if type(size) is not int or not 0 < size <= MAX_VOCAB_SIZE:
        raise UserError(f'vocab_size is {size!r}')
    if kind == 'char':
        chars = spec.get('chars')
        if type(chars) is not str or len(chars) != size or len(set(chars)) != size:
            raise UserError(f'chars should be {size} different characters')
    elif kind == 'hf':
        end = spec.get('end_of_text')
        if end is not None and (type(end) is not int or not 0 <= end < size):
            raise UserError(f'end_of_text is {end!r}')
        if not isinstance(spec.get('tokenizer_revision'), (str, type(None))):
            raise UserError(f'tokenizer_revision is {spec["tokenizer_revision"]!r}')
        for key in ('tokenizer_name', 'tokenizer_sha256', 'tokenizer_json', 'tokenizer_config'):
            if type(spec.get(key)) is not str or len(spec[key]) > MAX_FILE_CHARACTERS:
                raise UserError(f'{key} should be a text of at most {MAX_FILE_CHARACTERS:,} characters')
    elif kind != 'gpt2' or size != GPT2['vocab_size']:
        raise UserError(f'unknown tokenizer {kind!r} of {size} tokens')
    return spec


def end_of_text(spec):
    """The id that follows each document of a dataset with this spec, or None."""
    return END_OF_TEXT if spec['tokenizer'] == 'gpt2' else spec.get('end_of_text')


def padded_vocab_size(vocab_size):
    """The vocabulary of a new model for that many tokens: GPT-2's 50257 are padded to 50304, which multiplies faster.
    65 characters stay 65."""
    return 50304 if vocab_size == GPT2['vocab_size'] else vocab_size


def same_tokens(spec, other):
    """True where both specs give every text the same ids, wherever they came from."""
    return all(spec.get(key) == other.get(key) for key in ('tokenizer', 'vocab_size', 'chars', 'tokenizer_sha256'))


class RestrictedUnpickler(pickle.Unpickler):
    """Reads containers, strings and numbers. Refuses a pickle that names a class or function."""

    def find_class(self, module, name):
        raise UserError(f'it asks to run {module}.{name}')


def read_meta(folder):
    """The tokenizer spec of a dataset: from meta.json, else from nanoGPT's meta.pkl, else GPT-2's.

    folder: Path of the dataset. Raises UserError where the file is damaged or hostile.
    """
    path = folder / 'meta.json'
    try:
        if path.is_file():
            meta = json.loads(path.read_text(encoding='utf-8-sig'))
            return check_spec({key: meta[key] for key in KEYS if key in meta})
        path = folder / 'meta.pkl'
        if path.is_file():
            with open(path, 'rb') as file:
                meta = RestrictedUnpickler(file).load()
            itos = meta['itos']
            chars = [itos[i] for i in range(meta['vocab_size'])]
            if not all(type(char) is str and len(char) == 1 for char in chars):
                raise UserError('itos should map ids to single characters')
            return check_spec(dict(tokenizer='char', vocab_size=len(itos), chars=''.join(chars)))
    except Exception as error:          # a damaged file can raise anything
        reason = str(error) if isinstance(error, UserError) else f'{type(error).__name__}: {error}'
        raise UserError(f'{path} cannot be read: {reason}; prepare the dataset again') from None
    return GPT2


class HFTokenizer:
    """Text to ids and single ids to bytes, as a tokenizer.json says. UserError where it is damaged."""

    def __init__(self, tokenizer_json):
        self.tokenizer, self.ordinary = load(tokenizer_json), load(tokenizer_json)
        self.ordinary.encode_special_tokens = True              # special tokens in a text are ordinary text
        self.parts = json.loads(self.tokenizer.to_str())
        self.added = {i: token.content for i, token in self.tokenizer.get_added_tokens_decoder().items()}
        self.vocab_size = 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self.fingerprint = fingerprint(self.parts)
        decoder = json.dumps(self.parts['decoder'])
        self.names_bytes = '"ByteFallback"' in decoder          # SentencePiece's <0x00> to <0xFF> are bytes
        self.bytes_of_letters = {letter: byte for byte, letter in enumerate(byte_letters())} if '"ByteLevel"' in decoder else {}

    def encode(self, text):
        """A list of ids, with special tokens as such, and with what the tokenizer puts around a text."""
        return self.run(self.tokenizer, text, True)

    def encode_ordinary(self, text, as_document=False):
        """A list of ids, with special tokens as ordinary text. as_document: with what the tokenizer puts around it."""
        return self.run(self.ordinary, text, as_document)

    def run(self, tokenizer, text, add_special_tokens):
        # UTF-8 lacks halves of surrogate pairs: U+FFFD for each
        text = text.encode('utf-16-le', 'surrogatepass').decode('utf-16-le', 'replace')
        try:
            # 'fast' leaves out positions and takes a third of the time
            return tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except Exception as error:                              # a vocabulary without a token for the unknown
            raise UserError(f'the tokenizer cannot encode this text: {error}') from None

    @cached_property
    def splits_like_gpt2(self):
        """True where GPT-2's pattern splits a text, nothing before it looks at more than single characters,
        and nothing is put around the text. Then engine.prepare.encode.safe_pieces may cut documents."""
        splitter = self.parts['pre_tokenizer'] or {}
        *before, last = splitter.get('pretokenizers', [splitter])
        return (last.get('type') == 'ByteLevel' and last['use_regex'] and not last['add_prefix_space']
                and all(step['type'] == 'Digits' for step in before) and not self.parts['normalizer']
                and all(token['special'] for token in self.parts['added_tokens']) and not self.encode(''))

    @cached_property
    def token_before(self):
        """A list of one id that any token can follow; of none, if the vocabulary has no 'a'."""
        return self.encode_ordinary('a')[-1:]

    def decode_bytes(self, i):
        """The bytes of a token within a text."""
        token = self.tokenizer.id_to_token(i)
        if self.names_bytes and re.fullmatch('<0x[0-9A-F]{2}>', token or ''):
            return bytes([int(token[3:5], 16)])
        if token is None or i in self.added:                    # None: some vocabularies leave out ids
            return self.added.get(i, '').encode()
        if self.bytes_of_letters and not set(token) - self.bytes_of_letters.keys():
            return bytes(self.bytes_of_letters[letter] for letter in token)
        # Decoders treat the first token of a text in ways of their own, so this one is decoded after another.
        alone, both = (self.tokenizer.decode([*self.token_before, *ids], skip_special_tokens=False) for ids in ((), (i,)))
        return both.removeprefix(alone).encode()


def load(tokenizer_json):
    """The tokenizers.Tokenizer of a tokenizer.json, which never cuts or pads a text. UserError where it is damaged."""
    import tokenizers
    try:
        tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:                              # the library's own panics are not Exceptions
        raise UserError(f'the tokenizer.json cannot be used: {" ".join(str(error).split())[:200]}') from None


def fingerprint(parts):
    """SHA-256 of the parts of a tokenizer.json that decide which ids a text gets, however the file is written."""
    added = [{key: token[key] for key in ('id', 'content', 'special')} for token in parts['added_tokens']]
    model = {key: value for key, value in parts['model'].items() if value}      # an absent part is None or ''
    decisive = [added, parts['normalizer'], parts['pre_tokenizer'], model]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def byte_letters():
    """The letters of the bytes 0 to 255 in byte-level BPE files: Latin-1's printable characters stand for
    themselves, the code points from 256 on for the others. Source: the vocab.json that OpenAI published."""
    printable = {*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
