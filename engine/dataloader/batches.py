"""Token files to batches.

A batch is a pure function of (seed, stream, numbers of its sequences). Nothing is remembered
between batches, so a resumed run and any number of ranks draw the same ones.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from engine.dataloader.token_files import (
    DTYPES,
    REPLACING,
    SPLITS,
    TokenStream,
    check_split,
    find_token_files,
    token_dtype,
)
from engine.dataloader.window_order import epoch_starts, weyl_starts
from engine.errors import RunError, UserError, check_choice
from engine.tokenizer import GPT2, end_of_text, read_meta, same_tokens

CHOICES = dict(sampling=('windows', 'epoch'), documents=('any', 'whole'))
DATA = Path(__file__).resolve().parents[2] / 'data'
SEARCHED_TOKENS = 1 << 20       # how far documents='whole' looks for the next document


class BatchRequest(NamedTuple):     # for TokenDataset.batch
    seed: int
    stream: str
    first: int
    count: int


class TokenDataset:
    """The token files of data/NAME, checked once: see engine.dataloader.token_files.

    sampling: 'windows' draws training windows evenly over the text, 'epoch' reads every window once before
    any comes again. documents: 'any' starts a window anywhere, 'whole' starts training windows at documents.
    tokens: {'train': TokenStream, 'val': ...}. fingerprint: a short hash of both. tokenizer: a spec
    of engine.tokenizer. record: of read_record. Set block_size with `set_block_size` before `batch`.
    Raises UserError for a dataset that is missing or damaged, and for an unknown sampling or documents.
    """

    def __init__(self, name, sampling='windows', documents='any'):
        self.folder, self.sampling, self.documents = dataset_folder(name), sampling, documents
        check_order(sampling, documents)
        files = find_token_files(self.folder)
        if not files['train'] or not files['val']:
            raise UserError(f'dataset {name!r} has no train.bin and val.bin in {self.folder}, nor shards of both; '
                            f'{advice(name)}')
        if (self.folder / REPLACING).exists():
            raise UserError(f'{self.folder} is being replaced; if no prepare.py runs, start it again to complete that')
        self.tokenizer = read_meta(self.folder)
        self.vocab_size = self.tokenizer['vocab_size']
        meta = read_fields(self.folder)
        dtype = meta.get('dtype', token_dtype(self.vocab_size))
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise UserError(f'{self.folder / "meta.json"}: dtype is {dtype!r}, not uint16 or uint32; prepare the dataset '
                            f'again')
        expected = meta['sha256'] if isinstance(meta.get('sha256'), dict) else {}
        self.tokens, digests = {}, []
        for split in SPLITS:
            self.tokens[split] = TokenStream(self.folder, files[split], dtype)
            digests.append(check_split(self.tokens[split], split, self.vocab_size, expected))
        self.record = read_record(self.folder, meta, self.tokens)
        facts = digests + ([json.dumps(self.record, sort_keys=True)] if self.record else [])
        self.fingerprint = hashlib.sha256(''.join(facts).encode()).hexdigest()[:16]

    def set_block_size(self, block_size):
        """Batches have block_size tokens from now on. UserError where a split is shorter, and with documents='whole'
        where train has no end-of-text token."""
        for split, tokens in self.tokens.items():
            if len(tokens) <= block_size:
                file = f'{split}.bin' if len(tokens.names) == 1 else f'the shards of {split}'
                raise UserError(f'{self.folder / file} has {len(tokens):,} tokens, and a block takes '
                                f'{block_size + 1}; try --block_size={len(tokens) - 1}, or more text')
        if self.record and block_size < self.record['prompt']:
            raise UserError(f'block_size={block_size} ends within the prompt of a record, so no target would count; '
                            f'try --block_size={self.record["length"] - 1}')
        if self.record and self.documents == 'whole':
            raise UserError(f'the windows of {self.folder.name} start at its records; leave --documents=any')
        self.block_size = block_size
        if self.documents == 'whole':
            self.first_document = self.next_document(0)
            if self.first_document is None:
                raise UserError(f'{self.folder} has no end-of-text token among its first {SEARCHED_TOKENS:,}, so '
                                f"documents='whole' finds no document to start at; leave --documents=any")

    def next_document(self, start):
        """The position of the first end-of-text token of train at `start` or up to SEARCHED_TOKENS after, with a
        block after it; else None. The token separates documents, before or after each."""
        last = len(self.tokens['train']) - self.block_size - 1
        token = end_of_text(self.tokenizer)
        return None if token is None else self.tokens['train'].find(token, start, min(start + SEARCHED_TOKENS, last + 1))

    def check_same(self, saved, accept_change):
        """UserError where a saved run used another vocabulary, or (unless accepted) another text."""
        tokenizer, fingerprint = saved.get('tokenizer'), saved.get('fingerprint')
        if tokenizer and not same_tokens(tokenizer, self.tokenizer):
            raise UserError(f'{self.folder.name} has another vocabulary than the run, so its tokens mean other '
                            f'text; resume with the dataset of the run')
        if fingerprint and fingerprint != self.fingerprint and not accept_change:
            raise UserError(f'{self.folder.name} is not what the run was trained on (fingerprint '
                            f'{self.fingerprint}, was {fingerprint}); restore it, or go on with '
                            f'--accept_dataset_change=True')

    def batch(self, seed, stream, first, count):
        """`count` sequences of a stream ('train', 'eval train' or 'eval val'), starting at number `first`.

        Returns (x, y), each (count, block_size) int64; y is x one token later. engine.dataloader.window_order has the orders
        of 'train'. Evaluation windows depend on no setting, so all runs are judged by the same text.
        In a dataset of records, windows start at records, and y is -1 where the target lies in a prompt.

        With documents='whole' a window moves forward to the next end-of-text token, and from the end of the
        text, or where the document is longer than SEARCHED_TOKENS, to the first one. So text further than
        block_size into its document is not read, and what follows a long document is read more often.
        """
        tokens = self.tokens['val' if stream == 'eval val' else 'train']
        step = self.record['length'] if self.record else 1
        n_starts = (len(tokens) - self.block_size - 1) // step + 1
        if stream != 'train':
            starts = weyl_starts(first, count, n_starts) * step
        elif self.sampling == 'windows':
            starts = weyl_starts(first, count, n_starts, seed) * step
        elif self.record:       # counted in records; epoch_starts cuts n + 1 of them into n windows of one
            starts = epoch_starts(first, count, n_starts + 1, 1, seed) * step
        else:
            starts = epoch_starts(first, count, len(tokens), self.block_size, seed)
        if stream == 'train' and self.documents == 'whole':
            found = (self.next_document(start) for start in starts.tolist())
            starts = np.array([self.first_document if start is None else start for start in found])
        windows = torch.from_numpy(tokens.windows(starts, self.block_size + 1))         # (count, block_size + 1)
        # Files are checked at the start, shards only in part; and a program may have written over them since.
        if windows.max() >= self.vocab_size:
            row, column = divmod(int(windows.argmax()), self.block_size + 1)
            path, position = tokens.locate(starts[row] + column)
            raise RunError(f'{path} is damaged, or changed while it was read: id {windows.max()} of token {position:,} is '
                           f'beyond the vocabulary of {self.vocab_size}; restore it, and go on with --init_from=resume')
        x, y = windows[:, :-1], windows[:, 1:]
        if self.record:
            places = torch.arange(1, self.block_size + 1) % self.record['length']       # of the targets in their records
            y = y.masked_fill(places < self.record['prompt'], -1)
        return x, y


def check_order(sampling, documents):
    """UserError where `sampling` or `documents` is unknown, or the two do not fit each other."""
    for name, values in CHOICES.items():
        check_choice(dict(sampling=sampling, documents=documents), name, values)
    if sampling == 'epoch' and documents == 'whole':
        raise UserError('sampling=epoch reads each window once, and documents=whole moves windows, so that some coincide; '
                        'try --sampling=windows or --documents=any')


def open_dataset(name, env, sampling='windows', documents='any'):
    """The TokenDataset of data/NAME, on every rank. The first rank of each machine checks the files, and the
    others find its result in the cache."""
    with env.raise_on_all_ranks():
        data = TokenDataset(name, sampling, documents) if env.local_rank == 0 else None
    with env.raise_on_all_ranks():
        return data or TokenDataset(name, sampling, documents)


def train_batches(data, seed, iterations, env):
    """This rank's micro-batches on its device. The ranks share the global batch.
    iterations: (number of its first sequence, micro_steps, micro_batch_size) of each; see BatchSchedule."""
    requests = (BatchRequest(seed, 'train', first + (env.rank * micro_steps + m) * size, size)
                for first, micro_steps, size in iterations for m in range(micro_steps))
    return prefetch(data.batch, requests, env.device)


def eval_batches(data, split, count, batch_size, env):
    """This rank's share of the `count` evaluation batches, which are the same for every run. Every rank gets
    the same number, because the ranks of a sharded model compute together; a rank's last batch may repeat another."""
    numbers = (min(first + env.rank, count - 1) for first in range(0, count, env.world_size))
    requests = (BatchRequest(0, f'eval {split}', number * batch_size, batch_size) for number in numbers)
    return prefetch(data.batch, requests, env.device)


def dataset_folder(name):
    """The folder data/NAME. UserError where `name` is not a plain folder name."""
    if (not isinstance(name, str) or not name or name.startswith('.') or set(name) & set('/\\:\0')
            or len(name.encode('utf-8', 'replace')) > 200):
        raise UserError(f'dataset={name!r} should be the name of a folder in {DATA}')
    return DATA / name


def dataset_tokenizer(name):
    """The tokenizer spec of data/NAME; GPT-2's where `name` is None or there is no such folder."""
    return read_meta(dataset_folder(name)) if name else GPT2


def advice(name):
    """What to type where data/NAME is not a dataset."""
    folder = DATA / name
    if (folder / 'unfinished.json').exists() or (folder / 'unfinished').exists():
        return 'prepare.py stopped before it finished; run the same command again'
    if (folder / 'prepare.py').is_file():
        return f'run: python data/{name}/prepare.py'
    prepared = sorted({path.parent.name for pattern in ('*/train.bin', '*/*train_*.bin') for path in DATA.glob(pattern)})
    return (f'prepared datasets: {", ".join(prepared) or "none"}; for text of your own run: '
            f'python data/text/prepare.py --input=PATH --name={name}')


def read_fields(folder):
    """What meta.json says of the token files, {} without one. read_meta() has refused a damaged one."""
    path = folder / 'meta.json'
    return json.loads(path.read_text(encoding='utf-8-sig')) if path.is_file() else {}


def read_record(folder, meta, tokens):
    """The field `record` of meta.json, {'length': tokens of each record, 'prompt': those at its start that are not
    targets}, or None. UserError where that does not fit the token files."""
    record = meta.get('record')
    if record is None:
        return None
    numbers = [record.get(name) for name in ('length', 'prompt')] if isinstance(record, dict) else [None]
    if not all(type(number) is int for number in numbers) or not 0 < numbers[1] < numbers[0]:
        raise UserError(f'{folder / "meta.json"}: record is {record!r:.60}, and should be like '
                        f'{{"length": 10, "prompt": 6}}; prepare the dataset again')
    length, prompt = numbers
    for split, stream in tokens.items():
        if len(stream) % length:
            raise UserError(f'{folder}: the {len(stream):,} tokens of {split} are not whole records of {length:,}; '
                            f'prepare the dataset again')
    return dict(length=length, prompt=prompt)


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
