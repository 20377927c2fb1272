"""Where tokenizers come from, other than a dataset, and the files that they become in an export.

Nothing here runs code of a hub or of a folder.
"""

import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

from engine.chat_layout import ChatLayout
from engine.downloads import Download, download_files, split_revision
from engine.errors import RunError, UserError
from engine.hf.own_fields import read_own_fields
from engine.log import is_main_process
from engine.tokenizer import (
    END_NAMES,
    END_OF_TEXT,
    GPT2,
    MAX_VOCAB_SIZE,
    TokenizerJson,
    TokenizerSpec,
    byte_letters,
    check_ids,
    fingerprint,
    load,
    load_gpt2_encoding,
    read_meta,
)

END = '<|endoftext|>'
OWN_BPE = 'bpe'             # tokenizer_name of what train_bpe makes
VOCABULARIES = ('tokenizer.json', 'vocab.json', 'vocab.txt', 'tokenizer.model', 'spiece.model',
                'tekken.json')
BYTE_PAIRS = ('vocab.json', 'merges.txt')
SENTENCEPIECE_FILES = {'tokenizer.model', 'spiece.model'}
DOWNLOADED = (*VOCABULARIES, 'merges.txt', 'tokenizer_config.json', 'special_tokens_map.json',
              'added_tokens.json', 'config.json')

# A run of letters, or of spaces, that train_bpe takes as a word, at most
LONGEST_WORD = 1000
LONG_RUN = re.compile(rf'\S{{{LONGEST_WORD}}}|\s{{{LONGEST_WORD}}}')

# Those that name ids
WITH_IDS = ('tokenizer.json', 'vocab.json', 'added_tokens.json', 'tokenizer_config.json')

# The fingerprint of the tokenizer.json that gpt2_files() makes
GPT2_FINGERPRINT = '9e11a8b32668ffdedd05cdbba72ae5942ad90fee5e64568f85465be111b1f6f4'


# The tokenizer of pretrained weights

def pretrained_spec(source: str) -> TokenizerSpec | None:
    """The tokenizer spec of the weights `source`, a hub name or a folder.

    None where no tokenizer lies beside the weights.
    """
    from engine.hf.weights import NAMES
    if split_revision(source)[0] in NAMES and not Path(source).is_dir():
        return GPT2

    folder, revision = find_folder(source)
    if not has_vocabulary(folder):
        return None
    return spec_of_files(folder, source, revision)


def pretrained_chat(source: str) -> ChatLayout | None:
    """The layout of conversations that our export wrote beside the weights `source`, or None."""
    from engine.hf.weights import NAMES
    if split_revision(source)[0] in NAMES and not Path(source).is_dir():
        return None
    folder, _ = find_folder(source)
    return read_own_fields(folder).chat


def download_pretrained(source: str) -> None:
    """Download the weights and the tokenizer that --init_from=SOURCE of train.py names on the hub.

    Ranks do so before they meet, since a download may take longer than they wait for each other.
    If a download fails, rank 0 raises the UserError or RunError of download_files, and the other
    ranks raise an error when they load the weights.
    """
    from engine.hf.weights import find_weights
    if source in ('scratch', 'resume', 'auto'):
        return

    try:
        find_weights(source)
        pretrained_spec(source)
    except (UserError, RunError):
        if is_main_process():
            raise


# The tokenizer that a person names

def document_spec(source: str) -> TokenizerSpec:
    """The spec of --tokenizer=SOURCE for a dataset of documents.

    Raises UserError where it has no token to put between documents, and as named_spec.
    """
    spec = named_spec(source)
    if spec.end_of_text is None:
        raise UserError(f'the tokenizer {source} has no token that ends a document; name another '
                        f'--tokenizer=')
    return spec


def named_spec(source: str, others: str = '') -> TokenizerSpec:
    """The spec of --tokenizer=SOURCE.

    source: gpt2, a folder of transformers' tokenizer files, a dataset of this project, or a hub
    name. others: what else the error should suggest, such as '--tokenizer=char, '.

    Raises UserError where there is no such tokenizer, RunError where the hub is out of reach.
    """
    if source == 'gpt2':
        return GPT2

    if source and any(Path(source, name).is_file() for name in ('meta.json', 'meta.pkl')):
        return read_meta(Path(source))

    is_folder = source and Path(source).is_dir()
    if not is_folder and source.count('/') != 1:
        raise UserError(f'tokenizer={source!r} is unknown; try --tokenizer=gpt2, {others}a '
                        f'folder that holds a tokenizer.json, or a hub name such as '
                        f'openai-community/gpt2')

    folder, revision = find_folder(source)
    if not has_vocabulary(folder):
        raise UserError(f'{source} holds no tokenizer ({", ".join(VOCABULARIES)}); name another '
                        f'--tokenizer=')
    return spec_of_files(folder, source, revision)


# Folders of tokenizer files

def find_folder(source):
    """(folder, revision) of tokenizer files. The files of a hub name are downloaded once.

    The revision of a folder is None.
    """
    if Path(source).is_dir():
        return Path(source).resolve(), None

    name, revision = split_revision(source)
    download = Download(
        f'the tokenizer of {source}', 'name a folder', repository=name, revision=revision)
    folder = download_files(download, DOWNLOADED)
    return folder, folder.name          # the hub's cache names the folder by the commit


def has_vocabulary(folder):
    return any((folder / name).is_file() for name in VOCABULARIES)


def spec_of_files(folder, name, revision):
    """The spec of a folder's tokenizer as transformers' AutoTokenizer reads it.

    What equals GPT-2's tokenizer, or an exported character vocabulary, gets the spec that datasets
    of those have. name, revision: of the hub. Without a revision the name is the folder's own.
    """
    try:
        check_files(folder)
        check_sentencepiece(folder)
        if has_byte_pairs_alone(folder):
            text, config, end = read_byte_pairs(folder)
        else:
            text, config, end = read_with_transformers(folder)
        name, _ = split_revision(name)
        if not revision:
            name = folder.name
        spec = known_spec(text)
        if spec is None:
            spec = hf_spec(text, json.dumps(config, indent=2), end, name, revision)
        return read_own_fields(folder).complete(spec)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:      # many kinds; the tokenizers' panics are not Exceptions
        reason = ' '.join(str(error).split())[:300]
        raise UserError(f'the tokenizer of {name} cannot be used: {reason}') from None


def check_files(folder):
    """UserError for a folder or a pipe under the name of a tokenizer file, and for a huge id."""
    for name in DOWNLOADED:
        path = folder / name
        if path.exists() and not path.is_file():
            raise UserError(f'{name} is not a regular file')

        if path.exists() and name in WITH_IDS:
            check_ids(path.read_text(encoding='utf-8', errors='replace'), name)


def check_sentencepiece(folder):
    """UserError where the only vocabulary is a file that the package sentencepiece reads."""
    from transformers.utils import is_sentencepiece_available
    found = {name for name in VOCABULARIES if (folder / name).is_file()}
    if found and found <= SENTENCEPIECE_FILES and not is_sentencepiece_available():
        raise UserError(f'{min(found)} is read by the package sentencepiece; '
                        f'pip install sentencepiece')


def has_byte_pairs_alone(folder):
    """True where vocab.json and merges.txt are all that tells of the tokenizer, as the tokenizers
    library's ByteLevelBPETokenizer saves them. transformers needs a file that names the kind."""
    has_both = all((folder / name).is_file() for name in BYTE_PAIRS)
    return has_both and not any((folder / name).exists() for name in DOWNLOADED
                                if name not in (*BYTE_PAIRS, 'config.json'))


def read_byte_pairs(folder):
    """What read_with_transformers returns, of a vocab.json and a merges.txt, as GPT-2 has them.

    Pairs that are not of bytes are read by transformers, if a config.json names their kind.
    Otherwise raises UserError.
    """
    from tokenizers import AddedToken, models
    tokenizer = byte_level(models.BPE.from_file(*(str(folder / name) for name in BYTE_PAIRS)))
    vocabulary = tokenizer.get_vocab()
    if not vocabulary.keys() >= set(byte_letters()):
        if (folder / 'config.json').exists():
            return read_with_transformers(folder)
        raise UserError('its vocab.json lacks tokens for some bytes, so it is not like GPT-2, and '
                        'nothing says how it splits text; save it as a tokenizer.json')

    end_name = next((name for name in END_NAMES if name in vocabulary), None)
    if end_name:
        end_token = AddedToken(end_name, normalized=False, special=True)
        tokenizer.add_special_tokens([end_token])
    config = json.loads(tokenizer_config('PreTrainedTokenizerFast', end_name))
    return tokenizer.to_str(), config, vocabulary.get(end_name)


def read_with_transformers(folder):
    """(text of tokenizer.json, fields of tokenizer_config.json, id of the end of a text or None).

    transformers writes the two files as it understood the folder.
    """
    from transformers import AutoTokenizer, logging
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False,
                                              local_files_only=True)

    with tempfile.TemporaryDirectory() as written:
        tokenizer.save_pretrained(written)
        text = Path(written, 'tokenizer.json').read_text(encoding='utf-8')
        config = Path(written, 'tokenizer_config.json').read_text(encoding='utf-8')

    # 'auto_map' names code, and 'name_or_path' a folder of this machine.
    config = {key: value for key, value in json.loads(config).items()
              if key not in ('auto_map', 'name_or_path')}

    end = tokenizer.eos_token_id
    if end is None:
        end = tokenizer.bos_token_id
    return text, config, end


# Specs of a tokenizer.json

def hf_spec(
    tokenizer_json: str, tokenizer_config: str, end_of_text: int | None, name: str,
    revision: str | None = None,
) -> TokenizerSpec:
    """The spec of the two files' texts. UserError where they cannot be used."""
    tokenizer = TokenizerJson(tokenizer_json)
    if not 0 < tokenizer.vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(f'it has {tokenizer.vocab_size:,} tokens')

    return TokenizerSpec.from_dict(dict(
        tokenizer='hf',
        vocab_size=tokenizer.vocab_size,
        end_of_text=end_of_text,
        tokenizer_name=name,
        tokenizer_revision=revision,
        tokenizer_sha256=tokenizer.fingerprint,
        tokenizer_json=tokenizer_json,
        tokenizer_config=tokenizer_config))


def known_spec(tokenizer_json: str) -> TokenizerSpec | None:
    """The spec of GPT-2 or of a character vocabulary, if `tokenizer_json` does the same."""
    tokenizer = TokenizerJson(tokenizer_json)
    if tokenizer.fingerprint == GPT2_FINGERPRINT:
        return GPT2

    vocabulary = tokenizer.tokenizer.get_vocab()
    has_words = tokenizer.parts['model']['type'] == 'WordLevel'
    if not has_words or any(len(token) != 1 for token in vocabulary):
        return None

    # A vocabulary of characters is one that we would write in the same way.
    chars = ''.join(sorted(vocabulary, key=vocabulary.get))
    exported = TokenizerJson(char_tokenizer(chars).to_str())
    if exported.fingerprint != tokenizer.fingerprint:
        return None
    return TokenizerSpec.from_dict(
        dict(tokenizer='char', vocab_size=len(vocabulary), chars=chars))


def train_bpe(texts: Iterable[str], vocab_size: int) -> TokenizerSpec:
    """The spec of a byte-level BPE tokenizer with GPT-2's splitting pattern, trained on `texts`.

    It has vocab_size tokens, fewer where the texts are short: the end-of-text token, 256 bytes, and
    merges. The same texts give the same tokenizer. A text without spaces is cut into words of
    LONGEST_WORD characters, as the time grows with the square of a word's length.
    Source: Sennrich et al. 2016 (arXiv:1508.07909), on bytes as in GPT-2.
    """
    import tokenizers
    if not 257 <= vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(f'vocab_size={vocab_size} should be at least 257, 256 bytes and the end of '
                        f'a text, and at most {MAX_VOCAB_SIZE:,}')

    tokenizer = byte_level(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], show_progress=sys.stderr.isatty(),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(bounded_words(texts), trainer)

    config = tokenizer_config('PreTrainedTokenizerFast', END)
    return hf_spec(tokenizer.to_str(), config, tokenizer.token_to_id(END), OWN_BPE)


def bounded_words(texts: Iterable[str]) -> Iterator[str]:
    """The texts, cut where LONGEST_WORD characters have no space between them, or are all space."""
    for text in texts:
        start = 0
        for run in LONG_RUN.finditer(text):
            yield text[start:run.end()]
            start = run.end()
        if start < len(text):
            yield text[start:]


# Tokens that are added to a tokenizer

def add_tokens(spec: TokenizerSpec, tokens: Iterable[str]) -> TokenizerSpec:
    """The spec with new special tokens, such as `<|user|>`, whose ids follow those that it has.

    Raises UserError for a token that the tokenizer has, and for one that is named twice.
    """
    from tokenizers import AddedToken
    name = spec.tokenizer_name or spec.kind
    tokenizer = load(tokenizer_files(spec)['tokenizer.json'])
    known = tokenizer.get_vocab(with_added_tokens=True).keys()
    seen = set()
    for token in tokens:
        if not token.strip() or token != token.strip():
            raise UserError(f'the token {token!r} begins or ends with white space; name it '
                            f'without')
        if token in known:
            raise UserError(f'{token!r} is a token of {name} already; leave it out')
        if token in seen:
            raise UserError(f'{token!r} is named twice; leave one out')
        seen.add(token)

    added = [AddedToken(token, normalized=False, special=True) for token in tokens]
    tokenizer.add_special_tokens(added)
    for i, token in enumerate(tokens, spec.vocab_size):
        if tokenizer.token_to_id(token) != i:
            raise UserError(f'the tokenizer {name} leaves out ids below {spec.vocab_size:,}, so '
                            f'tokens cannot be added behind them; name another --tokenizer=')

    config = spec.tokenizer_config
    if spec.kind == 'gpt2':
        config = tokenizer_config('PreTrainedTokenizerFast', END)
    elif spec.kind == 'char':
        config = tokenizer_config('PreTrainedTokenizerFast')
    added_spec = hf_spec(tokenizer.to_str(), config, spec.end_of_text, name)
    return replace(added_spec, special_tokens=spec.special_tokens)


def extends(spec: TokenizerSpec, known: TokenizerSpec) -> bool:
    """True where `spec` has all tokens of `known` with the same ids, and more behind them."""
    if spec.vocab_size <= known.vocab_size:
        return False
    if spec.kind == 'char':
        return known.kind == 'char' and spec.chars.startswith(known.chars)
    if spec.kind != 'hf':
        return False

    parts = TokenizerJson(spec.tokenizer_json).parts
    parts['added_tokens'] = [token for token in parts['added_tokens']
                             if token['id'] < known.vocab_size]
    return fingerprint(parts) == fingerprint_of(known)


def fingerprint_of(spec):
    """The fingerprint of the tokenizer.json that a spec is exported as."""
    if spec.kind == 'gpt2':
        return GPT2_FINGERPRINT
    if spec.kind == 'char':
        return TokenizerJson(char_tokenizer(spec.chars).to_str()).fingerprint
    return spec.tokenizer_sha256


def tokens_from(spec: TokenizerSpec, first: int) -> list[str]:
    """The texts of the tokens whose ids are `first` or more."""
    if spec.kind == 'char':
        return list(spec.chars[first:])
    if spec.kind == 'gpt2':
        return []
    tokenizer = TokenizerJson(spec.tokenizer_json).tokenizer
    return [str(tokenizer.id_to_token(i)) for i in range(first, spec.vocab_size)]


# Files of an export

def tokenizer_files(spec: TokenizerSpec) -> dict[str, str]:
    """{name: text} of the files that transformers and others load as the tokenizer of `spec`."""
    if spec.kind == 'gpt2':
        return dict(gpt2_files())
    if spec.kind == 'char':
        return char_files(spec.chars)

    return {'tokenizer.json': spec.tokenizer_json,
            'tokenizer_config.json': spec.tokenizer_config}


@cache
def gpt2_files() -> dict[str, str]:
    """GPT-2's tokenizer files, made from tiktoken's ranks.

    They are vocab.json, merges.txt, tokenizer.json and tokenizer_config.json.
    """
    from tokenizers import AddedToken, models
    bpe = load_gpt2_encoding()
    letters = byte_letters()

    # Tokens as bytes, with their ids, and as the letters that files have
    ranks = {bpe.decode_single_token_bytes(i): i for i in range(END_OF_TEXT)}
    names = {token: ''.join(letters[byte] for byte in token) for token in ranks}
    vocabulary = {name: ranks[token] for token, name in names.items()}
    vocabulary[END] = END_OF_TEXT

    merges = []
    for token in ranks:
        if len(token) > 1:
            first, second = last_merge(token, ranks)
            merges.append((names[first], names[second]))

    tokenizer = byte_level(models.BPE(vocabulary, merges))
    tokenizer.add_special_tokens([AddedToken(END, normalized=False, special=True)])
    config = tokenizer_config('GPT2Tokenizer', END, add_prefix_space=False)
    return {
        'vocab.json': json.dumps(vocabulary, ensure_ascii=False),
        'merges.txt': '#version: 0.2\n' + ''.join(f'{a} {b}\n' for a, b in merges),
        'tokenizer.json': tokenizer.to_str(),
        'tokenizer_config.json': config,
    }


def last_merge(token, ranks):
    """The two tokens that `token`, of two bytes or more, is merged from.

    Merges its bytes, each time the pair of the lowest rank, until two parts are left.
    """
    parts = [bytes([byte]) for byte in token]

    def rank(i):
        return ranks.get(parts[i] + parts[i + 1], len(ranks))

    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=rank)
        parts[best:best + 2] = [parts[best] + parts[best + 1]]
    return parts


def char_files(chars):
    """tokenizer.json and tokenizer_config.json of a vocabulary of characters."""
    if any('\ud800' <= char <= '\udfff' for char in chars):
        raise UserError('the vocabulary has half a surrogate pair, which a tokenizer.json cannot '
                        'hold')

    return {'tokenizer.json': char_tokenizer(chars).to_str(),
            'tokenizer_config.json': tokenizer_config('PreTrainedTokenizerFast')}


def char_tokenizer(chars):
    """A tokenizer whose tokens are the single characters `chars`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    tokenizer = Tokenizer(models.WordLevel({char: i for i, char in enumerate(chars)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
    tokenizer.decoder = decoders.Fuse()                 # nothing between the characters
    return tokenizer


def byte_level(model):
    """A tokenizer that splits as GPT-2's pattern does, without a space before a text."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def tokenizer_config(kind, end=None, **more):
    """The text of a tokenizer_config.json. end: the special token of every purpose, or None."""
    config = dict(tokenizer_class=kind)
    if end:
        config.update(bos_token=end, eos_token=end, unk_token=end)
    config.update(clean_up_tokenization_spaces=False, **more)
    return json.dumps(config, indent=2)
