"""Token files to batches, and the tokenizer that a dataset was made with.

A batch is a pure function of (seed, stream, numbers of its sequences): nothing is remembered
between batches, so a resumed run or another number of ranks draws the same ones.
"""

import hashlib
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).resolve().parent / 'data'
GPT2 = dict(tokenizer='gpt2', vocab_size=50257)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)          # 2**64 divided by the golden ratio, odd


class Dataset:
    """The token files of data/NAME, checked once: sizes, and every id within the vocabulary.

    tokens: {'train': (N,) uint16 memory map, 'val': ...}. fingerprint: a short hash of both.
    tokenizer: {'tokenizer', 'vocab_size', 'chars'}, see Tokenizer. `cut` makes it yield batches.
    Raises ValueError for a dataset that is missing or damaged.
    """

    def __init__(self, name):
        self.folder = dataset_folder(name)
        if not (self.folder / 'train.bin').is_file() or not (self.folder / 'val.bin').is_file():
            script = self.folder / 'prepare.py'
            known = sorted(path.parent.name for path in DATA.glob('*/train.bin'))
            advice = (f'run: python data/{name}/prepare.py' if script.is_file() else
                      f'prepared are: {", ".join(known) or "none"}; for text of your own run: '
                      f'python data/text/prepare.py --input=PATH --name={name}')
            raise ValueError(f'dataset {name!r} has no train.bin and val.bin in {self.folder}; {advice}')
        self.tokenizer = read_meta(self.folder)
        self.vocab_size = self.tokenizer['vocab_size']
        self.tokens, digests = {}, []
        for split in ('train', 'val'):
            path = self.folder / f'{split}.bin'
            size = path.stat().st_size
            if size == 0 or size % 2:
                raise ValueError(f'{path} has {size:,} bytes, it takes 2 a token; prepare it again')
            digest, largest, position = scan(path)
            if largest >= self.vocab_size:
                raise ValueError(f'{path}: token {position:,} has id {largest}, beyond the vocabulary '
                                 f'of {self.vocab_size}; prepare the dataset again')
            self.tokens[split] = np.memmap(path, dtype='<u2', mode='r')
            digests.append(digest)
        self.fingerprint = hashlib.sha256(''.join(digests).encode()).hexdigest()[:16]

    def cut(self, block_size):
        """Batches are of block_size tokens from now on; ValueError where a split is shorter."""
        for split, tokens in self.tokens.items():
            if len(tokens) <= block_size:
                raise ValueError(f'{self.folder / split}.bin has {len(tokens):,} tokens, and a block takes '
                                 f'{block_size + 1}; try --block_size={len(tokens) - 1}, or more text')
        self.block_size = block_size

    def check_same(self, state, accept_change):
        """ValueError where a saved run was made with other tokens, or (unless accepted) other text."""
        tokenizer, fingerprint = state.get('tokenizer'), state.get('fingerprint')
        if tokenizer and tokenizer != self.tokenizer:
            raise ValueError(f'{self.folder.name} has another vocabulary than the run, so its tokens would '
                             f'mean other text; resume with the dataset of the run')
        if fingerprint and fingerprint != self.fingerprint and not accept_change:
            raise ValueError(f'{self.folder.name} is not what the run was trained on (fingerprint '
                             f'{self.fingerprint}, was {fingerprint}); restore it, or go on with '
                             f'--accept_dataset_change=True')

    def batch(self, seed, stream, first, count):
        """Sequences number first to first + count, one gather for all, of a stream: 'train' to train
        on, 'eval train' or 'eval val' to judge by.

        Returns (x, y), each (count, block_size) int64; y is x one token later.

        Each window starts a golden section of the text behind the one before, from a place that the
        seed decides; in evaluation from the beginning, so that runs of all seeds are judged by the same
        text. Any number of successive windows, a batch as well as an epoch, is spread evenly over the
        text, where independent draws leave a third of an epoch unseen.
        """
        tokens = self.tokens['val' if stream == 'eval val' else 'train']
        begin = np.random.Philox(key=seed).random_raw() if stream == 'train' else 0     # NumPy fixed it for good
        turns = np.arange(first, first + count, dtype=np.uint64) * GOLDEN + np.uint64(begin)
        starts = ((turns >> np.uint64(11)) * (2.0 ** -53 * (len(tokens) - self.block_size))).astype(np.int64)
        windows = np.lib.stride_tricks.sliding_window_view(tokens, self.block_size + 1)[starts]
        both = torch.from_numpy(windows.astype(np.int64))       # (count, block_size + 1)
        return both[:, :-1], both[:, 1:]


def prefetch(make, requests, device):
    """make(*request) on `device` for each request in turn, one made in the background.
    To a GPU it is copied from pinned memory on a stream of its own, beside the computation."""
    cuda = device.type == 'cuda'
    side = torch.cuda.Stream(device) if cuda else None

    def fetch(request):
        if not cuda:
            return tuple(t.to(device) for t in make(*request))
        with torch.cuda.stream(side):                           # which is also this thread's device then
            return tuple(t.contiguous().pin_memory().to(device, non_blocking=True) for t in make(*request))

    def hand_over(future):
        batch = future.result()
        if cuda:
            torch.cuda.current_stream(device).wait_stream(side)
            for tensor in batch:                                # their memory is not free before we are done
                tensor.record_stream(torch.cuda.current_stream(device))
        return batch

    with ThreadPoolExecutor(1, 'prefetch') as thread:
        ahead = None
        for request in requests:
            ready, ahead = ahead, thread.submit(fetch, request)
            if ready:
                yield hand_over(ready)
        if ahead:
            yield hand_over(ahead)


def dataset_folder(name):
    if not isinstance(name, str) or not name or name != os.path.basename(name) or name.startswith('.') or '\\' in name:
        raise ValueError(f'dataset={name!r} should be the name of a folder in {DATA}')
    return DATA / name


def scan(path):
    """(sha256 of the file, its largest id, where that stands), read once and then cached beside
    it, by size and modification time; a folder that cannot be written is read each time."""
    stat = path.stat()
    cache, key = path.with_suffix('.checked.json'), [stat.st_size, stat.st_mtime_ns]
    try:
        cached = json.loads(cache.read_text(encoding='utf-8'))
        if cached['key'] == key:
            return str(cached['sha256']), int(cached['largest']), int(cached['position'])
    except (OSError, ValueError, KeyError, TypeError):
        pass                                                    # no cache, or a damaged one
    digest, largest, position, done = hashlib.sha256(), -1, -1, 0
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
            ids = np.frombuffer(chunk, dtype='<u2')
            if ids.max() > largest:
                largest, position = int(ids.max()), done + int(ids.argmax())
            done += len(ids)
    try:
        temporary = cache.with_suffix(f'.{os.getpid()}.tmp')
        temporary.write_text(json.dumps(dict(key=key, sha256=digest.hexdigest(), largest=largest,
                                             position=position)), encoding='utf-8')
        os.replace(temporary, cache)
    except OSError:
        pass
    return digest.hexdigest(), largest, position


class PlainUnpickler(pickle.Unpickler):
    """Containers, strings and numbers only: a pickle that names any class or function is refused."""

    def find_class(self, module, name):
        raise ValueError(f'it asks for {module}.{name}')


def read_meta(folder):
    """The tokenizer of a dataset, {'tokenizer', 'vocab_size', 'chars'}, from meta.json or the
    family's meta.pkl; GPT-2's without either. ValueError where the file is damaged or hostile."""
    path = folder / 'meta.json'
    try:
        if path.is_file():
            meta = json.loads(path.read_text(encoding='utf-8'))
            return check_tokenizer({key: meta[key] for key in ('tokenizer', 'vocab_size', 'chars')
                                    if key in meta})
        path = folder / 'meta.pkl'
        if path.is_file():
            with open(path, 'rb') as file:
                meta = PlainUnpickler(file).load()
            itos = meta['itos']
            chars = [itos[i] for i in range(meta['vocab_size'])]
            if not all(type(char) is str and len(char) == 1 for char in chars):
                raise ValueError('its itos maps to something else than characters')
            return check_tokenizer(dict(tokenizer='char', vocab_size=len(itos), chars=''.join(chars)))
    except Exception as error:                                  # whatever a damaged file provokes
        raise ValueError(f'{path} cannot be used: {type(error).__name__}: {error}; '
                         f'prepare the dataset again') from None
    return GPT2


def dataset_tokenizer(name):
    """The tokenizer of data/NAME; GPT-2's where there is no such folder or no meta file in it."""
    return read_meta(dataset_folder(name)) if name else GPT2


def check_tokenizer(spec):
    """`spec` if it describes a tokenizer that exists, else ValueError."""
    if not isinstance(spec, dict):
        raise ValueError(f'it is a {type(spec).__name__}')
    kind, size = spec.get('tokenizer'), spec.get('vocab_size')
    if type(size) is not int or not 0 < size <= 65536:
        raise ValueError(f'vocab_size is {size!r}')
    if kind == 'char':
        chars = spec.get('chars')
        if type(chars) is not str or len(chars) != size or len(set(chars)) != size:
            raise ValueError(f'its characters are not {size} different ones')
    elif kind != 'gpt2' or size != 50257:
        raise ValueError(f'unknown tokenizer {kind!r} of {size} tokens')
    return spec


class Tokenizer:
    """Text to ids and back, as `spec` says: {'tokenizer': 'char' or 'gpt2', 'vocab_size', 'chars'}.
    GPT-2's byte pair encoding is fetched once by tiktoken."""

    def __init__(self, spec=GPT2):
        check_tokenizer(spec)
        self.vocab_size, self.chars, self.bpe = spec['vocab_size'], spec.get('chars'), None
        if spec['tokenizer'] == 'gpt2':
            import tiktoken
            try:
                self.bpe = tiktoken.get_encoding('gpt2')
            except Exception as error:                          # its download raises what it likes
                raise RuntimeError(f"tiktoken could not fetch GPT-2's encoding "
                                   f'({type(error).__name__}); go online once, or set '
                                   f'TIKTOKEN_CACHE_DIR to a folder that holds it') from None
        else:
            self.ids = {char: i for i, char in enumerate(self.chars)}

    def encode(self, text):
        """A list of ids. ValueError names a character that the model never saw."""
        if self.bpe:
            return self.bpe.encode(text, allowed_special={'<|endoftext|>'})
        strange = sorted(set(text) - self.ids.keys())
        if strange:
            raise ValueError(f'the model never saw the character {strange[0]!r}; '
                             f'it knows {self.chars!r}')
        return [self.ids[char] for char in text]

    def decode_bytes(self, ids):
        """UTF-8 bytes: the ids of one piece may end within a character."""
        if self.bpe:
            return self.bpe.decode_bytes(ids)
        return ''.join(self.chars[i] for i in ids).encode('utf-8', 'surrogatepass')

    def decode(self, ids):
        return self.decode_bytes(ids).decode('utf-8', 'replace')
