"""Token files to batches.

A batch is a pure function of (seed, stream, numbers of its sequences). Nothing is remembered
between batches, so a resumed run and any number of ranks draw the same ones.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from engine.errors import RunError, UserError
from engine.files import atomic_write
from engine.tokenizer import GPT2, read_digests, read_meta

DATA = Path(__file__).resolve().parent.parent / 'data'
GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)    # 2**64 divided by the golden ratio, odd


class TokenDataset:
    """The token files of data/NAME, checked once: their sizes, and every id within the vocabulary.

    tokens: {'train': (N,) uint16 memory map, 'val': ...}. fingerprint: a short hash of both.
    tokenizer: a spec of engine.tokenizer. Set block_size with `set_block_size` before `batch`.
    Raises UserError for a dataset that is missing or damaged.
    """

    def __init__(self, name):
        self.folder = dataset_folder(name)
        if not (self.folder / 'train.bin').is_file() or not (self.folder / 'val.bin').is_file():
            script = self.folder / 'prepare.py'
            prepared = sorted(path.parent.name for path in DATA.glob('*/train.bin'))
            advice = ('prepare.py stopped before it finished; run the same command again'
                      if (self.folder / 'unfinished.json').exists() else
                      f'run: python data/{name}/prepare.py' if script.is_file() else
                      f'prepared datasets: {", ".join(prepared) or "none"}; for text of your own run: '
                      f'python data/text/prepare.py --input=PATH --name={name}')
            raise UserError(f'dataset {name!r} has no train.bin and val.bin in {self.folder}; {advice}')
        self.tokenizer = read_meta(self.folder)
        self.vocab_size = self.tokenizer['vocab_size']
        self.tokens, digests, expected = {}, [], read_digests(self.folder)
        for split in ('train', 'val'):
            path = self.folder / f'{split}.bin'
            size = path.stat().st_size
            if size == 0 or size % 2:
                raise UserError(f'{path} has {size:,} bytes, and a token takes 2; prepare the dataset again')
            digest, largest, position = scan(path)
            if expected.get(path.name, digest) != digest:
                raise UserError(f'{path} is not the file that meta.json describes; prepare the dataset again')
            if largest >= self.vocab_size:
                raise UserError(f'{path}: token {position:,} has id {largest}, beyond the vocabulary of '
                                f'{self.vocab_size}; prepare the dataset again')
            self.tokens[split] = np.memmap(path, dtype='<u2', mode='r')
            digests.append(digest)
        self.fingerprint = hashlib.sha256(''.join(digests).encode()).hexdigest()[:16]

    def set_block_size(self, block_size):
        """Batches have block_size tokens from now on. UserError where a split is shorter."""
        for split, tokens in self.tokens.items():
            if len(tokens) <= block_size:
                raise UserError(f'{self.folder / split}.bin has {len(tokens):,} tokens, and a block takes '
                                f'{block_size + 1}; try --block_size={len(tokens) - 1}, or more text')
        self.block_size = block_size

    def check_same(self, saved, accept_change):
        """UserError where a saved run used another vocabulary, or (unless accepted) another text."""
        tokenizer, fingerprint = saved.get('tokenizer'), saved.get('fingerprint')
        if tokenizer and tokenizer != self.tokenizer:
            raise UserError(f'{self.folder.name} has another vocabulary than the run, so its tokens mean other '
                            f'text; resume with the dataset of the run')
        if fingerprint and fingerprint != self.fingerprint and not accept_change:
            raise UserError(f'{self.folder.name} is not what the run was trained on (fingerprint '
                            f'{self.fingerprint}, was {fingerprint}); restore it, or go on with '
                            f'--accept_dataset_change=True')

    def batch(self, seed, stream, first, count):
        """`count` sequences of a stream ('train', 'eval train' or 'eval val'), starting at number `first`.

        Returns (x, y), each (count, block_size) int64; y is x one token later.

        Window starts follow a golden-ratio (Weyl) sequence, so consecutive windows cover the text
        evenly; independent draws would leave a third of an epoch unseen. The seed sets where the
        sequence begins. Evaluation always begins at 0, so runs of all seeds are judged by the same text.
        """
        tokens = self.tokens['val' if stream == 'eval val' else 'train']
        offset = np.random.Philox(key=seed).random_raw() if stream == 'train' else 0    # stable over NumPy versions
        fractions = np.arange(first, first + count, dtype=np.uint64) * GOLDEN_RATIO + np.uint64(offset)
        starts = ((fractions >> np.uint64(11)) * (2.0 ** -53 * (len(tokens) - self.block_size))).astype(np.int64)
        windows = np.lib.stride_tricks.sliding_window_view(tokens, self.block_size + 1)[starts]
        windows = torch.from_numpy(windows.astype(np.int64))    # (count, block_size + 1)
        # train.bin was checked at the start, but a program may have written over it since.
        if windows.max() >= self.vocab_size:
            raise RunError(f'{self.folder} changed while it was read: id {windows.max()} is beyond the vocabulary of '
                           f'{self.vocab_size}; restore it, and go on with --init_from=resume')
        return windows[:, :-1], windows[:, 1:]


def open_dataset(name, env):
    """The TokenDataset of data/NAME, on every rank. The first rank of each machine checks the files, and the
    others find its result in the cache."""
    with env.raise_on_all_ranks():
        data = TokenDataset(name) if env.local_rank == 0 else None
    with env.raise_on_all_ranks():
        return data or TokenDataset(name)


def train_batches(data, seed, iterations, micro_batch_size, env):
    """This rank's micro-batches on its device. The ranks share the global batch.
    iterations: (number of the first sequence, micro-batches of each rank) of each one."""
    return prefetch(data.batch, ((seed, 'train', first + (env.rank * micro_steps + m) * micro_batch_size, micro_batch_size)
                                 for first, micro_steps in iterations for m in range(micro_steps)), env.device)


def eval_batches(data, split, count, batch_size, env):
    """This rank's share of the `count` evaluation batches, which are the same for every run. Every rank gets
    equally many, as a sharded model computes on all ranks at once: the last one may be a repetition."""
    numbers = (min(first + env.rank, count - 1) for first in range(0, count, env.world_size))
    return prefetch(data.batch, ((0, f'eval {split}', number * batch_size, batch_size) for number in numbers), env.device)


def dataset_folder(name):
    """The folder data/NAME. UserError where `name` is not a plain folder name."""
    if not isinstance(name, str) or not name or name.startswith('.') or set(name) & set('/\\:\0') or len(name.encode('utf-8', 'replace')) > 200:
        raise UserError(f'dataset={name!r} should be the name of a folder in {DATA}')
    return DATA / name


def dataset_tokenizer(name):
    """The tokenizer spec of data/NAME; GPT-2's where `name` is None or there is no such folder."""
    return read_meta(dataset_folder(name)) if name else GPT2


def scan(path):
    """(sha256 of the file, its largest id, the position of that id).

    The result is cached in NAME.checked.json beside the file. The cache's key is the file's inode,
    size and times of change: a file that was replaced or written to is read again.
    """
    stat = path.stat()
    key = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    cache = path.with_suffix('.checked.json')
    try:
        cached = json.loads(cache.read_text(encoding='utf-8')) if cache.is_file() else {}
        values = cached['sha256'], cached['largest'], cached['position']
        if cached['key'] == key and [type(value) for value in values] == [str, int, int] and len(values[0]) == 64:
            return values
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass                                                    # no cache, or a damaged one
    digest, largest, position, done = hashlib.sha256(), -1, -1, 0
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
            ids = np.frombuffer(chunk, dtype='<u2')
            if ids.max() > largest:
                largest, position = int(ids.max()), done + int(ids.argmax())
            done += len(ids)
    values = digest.hexdigest(), largest, position
    try:
        with atomic_write(cache) as file:
            json.dump(dict(zip(('key', 'sha256', 'largest', 'position'), (key, *values))), file)
    except OSError:
        pass                                                    # a folder that cannot be written is read each time
    return values


def prefetch(make_batch, requests, device):
    """Yield make_batch(*request) on `device` for each request, with one batch prepared in the background.
    Batches for a GPU are copied from pinned memory on a stream of their own, beside the computation."""
    is_cuda = device.type == 'cuda'
    copy_stream = torch.cuda.Stream(device) if is_cuda else None

    def use_device():                   # a new thread starts on GPU 0, and would open a context there
        if is_cuda:
            torch.cuda.set_device(device)

    def fetch(request):
        if not is_cuda:
            return tuple(tensor.to(device) for tensor in make_batch(*request))
        with torch.cuda.stream(copy_stream):
            return tuple(tensor.contiguous().pin_memory().to(device, non_blocking=True) for tensor in make_batch(*request))

    def take(future):
        batch = future.result()
        if is_cuda:
            torch.cuda.current_stream(device).wait_stream(copy_stream)
            for tensor in batch:        # the allocator must not reuse their memory before this stream is done
                tensor.record_stream(torch.cuda.current_stream(device))
        return batch

    with ThreadPoolExecutor(1, 'prefetch', initializer=use_device) as thread:
        ahead = None
        for request in requests:
            ready, ahead = ahead, thread.submit(fetch, request)
            if ready:
                yield take(ready)
        if ahead:
            yield take(ahead)
