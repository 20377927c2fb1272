"""Tokenizers, and the meta files that name a dataset's tokenizer.

A spec is a dict {'tokenizer': 'gpt2' or 'char', 'vocab_size': int, 'chars': str with 'char'}.
meta.json, checkpoints and Tokenizer all use it.
"""

import json
import pickle

import numpy as np

from engine.errors import RunError, UserError

GPT2 = dict(tokenizer='gpt2', vocab_size=50257)
END_OF_TEXT = 50256             # GPT-2's token between documents
KEYS = ('tokenizer', 'vocab_size', 'chars')


class Tokenizer:
    """Text to token ids and back, as `spec` says. tiktoken downloads GPT-2's encoding once."""

    def __init__(self, spec=GPT2):
        check_spec(spec)
        self.vocab_size, self.chars, self.bpe = spec['vocab_size'], spec.get('chars'), None
        if spec['tokenizer'] == 'gpt2':
            self.bpe = load_gpt2_encoding()
        else:
            self.ids = {char: i for i, char in enumerate(self.chars)}
            self.table = np.zeros(0x110000, '<u2')              # id of each code point
            self.table[code_points(self.chars)] = np.arange(self.vocab_size)

    def encode(self, text):
        """A list of ids, with `<|endoftext|>` as GPT-2's token.
        UserError names a character that is not in the vocabulary."""
        if self.bpe:
            return self.bpe.encode(text, allowed_special={'<|endoftext|>'})
        unknown = sorted(set(text) - self.ids.keys())
        if unknown:
            known = f'its {len(self.chars):,} characters' if len(self.chars) > 200 else repr(self.chars)
            raise UserError(f'the character {unknown[0]!r} is not in the vocabulary of this model; use only {known}')
        return [self.ids[char] for char in text]

    def encode_to_numpy(self, text):
        """A uint16 array of ids, with `<|endoftext|>` as ordinary text.

        A character tokenizer expects characters of its own only. GPT-2's ids equal tiktoken's encode_ordinary.
        """
        if not self.bpe:
            return self.table[code_points(text)]
        try:
            ids = self.bpe.encode_to_numpy(text, disallowed_special=())
        except (UnicodeEncodeError, AttributeError):    # half a surrogate pair, from JSON; tiktoken < 0.9
            ids = np.array(self.bpe.encode_ordinary(text))
        return ids.astype('<u2')

    def decode_bytes(self, ids):
        """UTF-8 bytes. The last token may end within a character."""
        if self.bpe:
            return self.bpe.decode_bytes(ids)
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
        raise UserError(f'the text has {len(chars):,} different characters and uint16 holds 65,536 ids; '
                        f'try --tokenizer=gpt2')
    return dict(vocab_size=len(chars), tokenizer='char', chars=''.join(sorted(chars)))


def check_spec(spec):
    """`spec`, if it describes a tokenizer. Raises UserError otherwise."""
    if not isinstance(spec, dict):
        raise UserError(f'the tokenizer is a {type(spec).__name__}, not a dict')
    kind, size = spec.get('tokenizer'), spec.get('vocab_size')
    if type(size) is not int or not 0 < size <= 65536:
        raise UserError(f'vocab_size is {size!r}')
    if kind == 'char':
        chars = spec.get('chars')
        if type(chars) is not str or len(chars) != size or len(set(chars)) != size:
            raise UserError(f'chars should be {size} different characters')
    elif kind != 'gpt2' or size != GPT2['vocab_size']:
        raise UserError(f'unknown tokenizer {kind!r} of {size} tokens')
    return spec


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


def read_digests(folder):
    """{'train.bin': sha256, 'val.bin': sha256} of meta.json, as far as it has them. See read_meta for its errors."""
    try:
        digests = json.loads((folder / 'meta.json').read_text(encoding='utf-8-sig')).get('sha256')
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
    return digests if isinstance(digests, dict) else {}
