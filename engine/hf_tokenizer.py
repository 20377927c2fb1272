"""A tokenizer.json of Hugging Face's tokenizers library: loaded, used, compared."""

import hashlib
import json
import re
from functools import cached_property

from engine.errors import UserError


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
        and nothing is put around the text. Then engine.tokenfiles.safe_pieces may cut documents."""
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
