"""Where tokenizers come from, other than a dataset, and the files that they become in an export.

Nothing here runs code of a hub or of a folder.
"""

import json
import sys
import tempfile
from pathlib import Path

from engine.errors import RunError, UserError
from engine.tokenizer import (
    END_OF_TEXT,
    GPT2,
    MAX_VOCAB_SIZE,
    HFTokenizer,
    Tokenizer,
    byte_letters,
    check_spec,
    load_gpt2_encoding,
    read_meta,
    same_tokens,
)

END = '<|endoftext|>'
VOCABULARIES = ('tokenizer.json', 'vocab.json', 'vocab.txt', 'tokenizer.model', 'spiece.model', 'tekken.json')
DOWNLOADED = (*VOCABULARIES, 'merges.txt', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json',
              'config.json')
# fingerprint() of the tokenizer.json that gpt2_files() makes
GPT2_FINGERPRINT = '9e11a8b32668ffdedd05cdbba72ae5942ad90fee5e64568f85465be111b1f6f4'


# Specs


def pretrained_spec(source):
    """The tokenizer spec of the weights `source`, a hub name or a folder; None where no tokenizer lies beside them."""
    from engine.hf.weights import NAMES
    if source in NAMES and not Path(source).is_dir():
        return GPT2
    folder, revision = find_folder(source)
    return spec_of_files(folder, source, revision) if has_vocabulary(folder) else None


def check_same_tokens(source, vocab_size, dataset, spec):
    """UserError where the weights `source`, with vocab_size tokens, were trained on other tokens than a dataset has.

    dataset, spec: its name and its tokenizer's spec. Without a tokenizer beside the weights only characters are told apart.
    """
    known = pretrained_spec(source)
    if (not same_tokens(known, spec) if known else spec['tokenizer'] == 'char' and spec['vocab_size'] != vocab_size):
        raise UserError(f'the tokens of {dataset} are not those of {source}; prepare its text with '
                        f'data/text/prepare.py --tokenizer={"gpt2" if known in (None, GPT2) else source}')


def document_tokenizer(source):
    """The Tokenizer of --tokenizer=SOURCE for a dataset of documents, which needs a token between them."""
    tokenizer = Tokenizer(named_spec(source))
    if tokenizer.end_of_text is None:
        raise UserError(f'the tokenizer {source} has no token that ends a document; name another --tokenizer=')
    return tokenizer


def named_spec(source, others=''):
    """The spec of --tokenizer=SOURCE: gpt2, a folder of transformers' tokenizer files, a dataset of this project, or a
    hub name. UserError where there is no such tokenizer, RunError where the hub is out of reach. others: to name in it."""
    if source == 'gpt2':
        return GPT2
    if source and Path(source, 'meta.json').is_file():
        return read_meta(Path(source))
    if not source or not Path(source).is_dir() and source.count('/') != 1:
        raise UserError(f'tokenizer={source!r} is unknown; try --tokenizer=gpt2, {others}a '
                        f'folder that holds a tokenizer.json, or a hub name such as openai-community/gpt2')
    folder, revision = find_folder(source)
    if not has_vocabulary(folder):
        raise UserError(f'{source} holds no tokenizer ({", ".join(VOCABULARIES)}); name another --tokenizer=')
    return spec_of_files(folder, source, revision)


def find_folder(source):
    """(folder, revision) of the tokenizer files of a folder, or of a hub name, which are downloaded once."""
    if Path(source).is_dir():
        return Path(source).resolve(), None
    import huggingface_hub
    try:
        folder = Path(huggingface_hub.snapshot_download(source, allow_patterns=list(DOWNLOADED)))
    except Exception as error:                          # the hub's client raises many kinds
        raise RunError(f'the tokenizer of {source} could not be downloaded ({type(error).__name__}: '
                       f'{" ".join(str(error).split())[:200]}); go online once, or name a folder') from None
    return folder, folder.name                          # the hub's cache names the folder by the commit


def has_vocabulary(folder):
    return any((folder / name).is_file() for name in VOCABULARIES)


def spec_of_files(folder, name, revision):
    """The spec of a folder's tokenizer as transformers' AutoTokenizer reads it. What equals GPT-2's tokenizer,
    or an exported character vocabulary, gets the spec that datasets of those have.

    name, revision: of the hub. Without a revision the name is the folder's own."""
    from transformers import AutoTokenizer, logging
    logging.set_verbosity_error()
    try:
        for file in DOWNLOADED:
            if (folder / file).exists() and not (folder / file).is_file():
                raise UserError(f'{file} is not a regular file')
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with tempfile.TemporaryDirectory() as written:
            tokenizer.save_pretrained(written)
            text, config = (Path(written, f'{file}.json').read_text(encoding='utf-8') for file in ('tokenizer', 'tokenizer_config'))
        config = {key: value for key, value in json.loads(config).items() if key not in ('auto_map', 'name_or_path')}
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
        name = name if revision else folder.name
        return known_spec(text) or hf_spec(text, json.dumps(config, indent=2), end, name, revision)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:                      # many kinds; panics of the tokenizers library are not Exceptions
        raise UserError(f'the tokenizer of {name} cannot be used: {" ".join(str(error).split())[:300]}') from None


def hf_spec(tokenizer_json, tokenizer_config, end_of_text, name, revision=None):
    """The spec of a tokenizer.json. UserError where it cannot be used."""
    tokenizer = HFTokenizer(tokenizer_json)
    if not 0 < tokenizer.vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(f'it has {tokenizer.vocab_size:,} tokens')
    return check_spec(dict(
        tokenizer='hf', vocab_size=tokenizer.vocab_size, end_of_text=end_of_text, tokenizer_name=name,
        tokenizer_revision=revision, tokenizer_sha256=tokenizer.fingerprint, tokenizer_json=tokenizer_json,
        tokenizer_config=tokenizer_config))


def known_spec(tokenizer_json):
    """The spec of GPT-2 or of a character vocabulary, if `tokenizer_json` does the same; else None."""
    tokenizer = HFTokenizer(tokenizer_json)
    if tokenizer.fingerprint == GPT2_FINGERPRINT:
        return GPT2
    vocabulary = tokenizer.tokenizer.get_vocab()
    if tokenizer.parts['model']['type'] == 'WordLevel' and all(len(token) == 1 for token in vocabulary):
        spec = dict(tokenizer='char', vocab_size=len(vocabulary), chars=''.join(sorted(vocabulary, key=vocabulary.get)))
        if HFTokenizer(char_tokenizer(spec['chars']).to_str()).fingerprint == tokenizer.fingerprint:
            return check_spec(spec)
    return None


def train_bpe(texts, vocab_size):
    """The spec of a byte-level BPE tokenizer with GPT-2's splitting pattern, trained on `texts`, an iterable.

    It has vocab_size tokens, fewer where the texts are short: the end-of-text token, 256 bytes, and merges.
    The same texts give the same tokenizer. Source: Sennrich et al. 2016 (arXiv:1508.07909), on bytes as in GPT-2.
    """
    import tokenizers
    if not 257 <= vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(f'vocab_size={vocab_size} should be at least 257, 256 bytes and the end of a text, '
                        f'and at most {MAX_VOCAB_SIZE:,}')
    tokenizer = byte_level(tokenizers.models.BPE())
    tokenizer.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], show_progress=sys.stderr.isatty(),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return hf_spec(tokenizer.to_str(), tokenizer_config('PreTrainedTokenizerFast', END), tokenizer.token_to_id(END), 'bpe')


# Files

def tokenizer_files(spec):
    """{name: text} of the files that transformers and others load as the tokenizer of `spec`."""
    if spec['tokenizer'] == 'gpt2':
        return gpt2_files()
    if spec['tokenizer'] == 'char':
        if any('\ud800' <= char <= '\udfff' for char in spec['chars']):
            raise UserError('the vocabulary has half a surrogate pair, which a tokenizer.json cannot hold')
        return {'tokenizer.json': char_tokenizer(spec['chars']).to_str(),
                'tokenizer_config.json': tokenizer_config('PreTrainedTokenizerFast')}
    return {'tokenizer.json': spec['tokenizer_json'], 'tokenizer_config.json': spec['tokenizer_config']}


def tokenizer_config(kind, end=None, **more):
    ends = dict(bos_token=end, eos_token=end, unk_token=end) if end else {}
    return json.dumps(dict(tokenizer_class=kind, **ends, clean_up_tokenization_spaces=False, **more), indent=2)


def byte_level(model):
    """A tokenizer that splits as GPT-2's pattern does, without a space before a text."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def gpt2_files():
    """GPT-2's vocab.json, merges.txt, tokenizer.json and tokenizer_config.json, made from tiktoken's ranks."""
    from tokenizers import AddedToken, models
    bpe, letters = load_gpt2_encoding(), byte_letters()
    ranks = {bpe.decode_single_token_bytes(i): i for i in range(END_OF_TEXT)}
    names = {token: ''.join(letters[byte] for byte in token) for token in ranks}
    merges = [tuple(names[part] for part in last_merge(token, ranks)) for token in ranks if len(token) > 1]
    vocabulary = {name: ranks[token] for token, name in names.items()} | {END: END_OF_TEXT}
    tokenizer = byte_level(models.BPE(vocabulary, merges))
    tokenizer.add_special_tokens([AddedToken(END, normalized=False, special=True)])
    return {'vocab.json': json.dumps(vocabulary, ensure_ascii=False),
            'merges.txt': '#version: 0.2\n' + ''.join(f'{a} {b}\n' for a, b in merges),
            'tokenizer.json': tokenizer.to_str(),
            'tokenizer_config.json': tokenizer_config('GPT2Tokenizer', END, add_prefix_space=False)}


def last_merge(token, ranks):
    """The two tokens that `token`, of two bytes or more, is merged from. Merges its bytes until two parts are left."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[best:best + 2] = [parts[best] + parts[best + 1]]
    return parts


def char_tokenizer(chars):
    """A tokenizer whose tokens are the single characters `chars`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    tokenizer = Tokenizer(models.WordLevel({char: i for i, char in enumerate(chars)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
    tokenizer.decoder = decoders.Fuse()                 # nothing between the characters
    return tokenizer
