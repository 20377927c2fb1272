"""Token files to batches.

A batch is a pure function of (seed, stream, numbers of its sequences). Nothing is remembered
between batches, so a resumed run and any number of ranks draw the same ones.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
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
from engine.distributed import Environment
from engine.errors import RunError, UserError, check_choice
from engine.tokenizer import GPT2, DatasetMeta, TokenizerSpec, read_meta, same_tokens

CHOICES = dict(sampling=('windows', 'epoch'), documents=('any', 'whole'))
DATA = Path(__file__).resolve().parents[2] / 'data'
SEARCHED_TOKENS = 1 << 20       # how far documents='whole' looks for the next document
IGNORED = -1                    # a target that does not count in the loss


class BatchRequest(NamedTuple):
    """The arguments of TokenDataset.batch."""

    seed: int
    stream: str
    first: int
    count: int


class Batch(NamedTuple):
    """Inputs and targets, each (count, block_size) int64. Targets are inputs one token later."""

    x: torch.Tensor
    y: torch.Tensor


@dataclass(frozen=True)
class Record:
    """The field `record` of meta.json: a dataset of records of one length, each with a prompt."""

    length: int                 # tokens of each record
    prompt: int                 # tokens at its start that are no targets


class TokenDataset:
    """The token files of data/NAME, checked once: see engine.dataloader.token_files.

    sampling: 'windows' draws training windows evenly over the text, and 'epoch' reads every window
    once before any comes again. documents: 'any' starts a window anywhere, and 'whole' starts
    training windows at documents.

    Attributes: tokens is {'train': TokenStream, 'val': ...}. tokenizer is a
    TokenizerSpec. record is a Record, or None. fingerprint is a short hash of both splits.
    Call `set_block_size` before `batch`.

    Raises UserError for a dataset that is missing or damaged, and for an unknown sampling or
    documents.
    """

    def __init__(self, name: str, sampling: str = 'windows', documents: str = 'any'):
        self.folder = dataset_folder(name)
        check_order(sampling, documents)
        self.sampling = sampling
        self.documents = documents
        files = self.find_files()

        # What meta.json says
        meta = DatasetMeta.read(self.folder)
        self.tokenizer = meta.spec
        self.vocab_size = meta.spec.vocab_size
        dtype = self.read_dtype(meta)
        expected = meta.sha256
        if not isinstance(expected, dict):
            expected = {}

        # What the files hold
        self.tokens = {}
        facts = []
        for split in SPLITS:
            self.tokens[split] = TokenStream(self.folder, files[split], dtype)
            facts.append(check_split(self.tokens[split], split, self.vocab_size, expected))

        self.record = read_record(self.folder, meta, self.tokens)
        self.stride = 1                     # windows of evaluation start at multiples of it
        if self.record:
            self.stride = self.record.length
            facts.append(json.dumps(asdict(self.record), sort_keys=True))
        self.fingerprint = hashlib.sha256(''.join(facts).encode()).hexdigest()[:16]

    def find_files(self):
        """The token files of both splits. UserError where a split is missing or being replaced."""
        name = self.folder.name
        files = find_token_files(self.folder)
        if not files['train'] or not files['val']:
            raise UserError(f'dataset {name!r} has no train.bin and val.bin in {self.folder}, nor '
                            f'shards of both; {advice(name)}')

        if (self.folder / REPLACING).exists():
            raise UserError(f'{self.folder} is being replaced; if no prepare.py runs, start it '
                            f'again to complete that')
        return files

    def read_dtype(self, meta):
        """The type of ids, from meta.json or else from the vocabulary."""
        dtype = meta.dtype
        if dtype is None:
            return token_dtype(self.vocab_size)
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise UserError(f'{self.folder / "meta.json"}: dtype is {dtype!r}, not uint16 or '
                            f'uint32; prepare the dataset again')
        return dtype

    # The size of windows

    def set_block_size(self, block_size: int) -> None:
        """Batches have block_size tokens from now on.

        Raises UserError where a split is shorter, where block_size does not fit the records, and
        with documents='whole' where train has no end-of-text token.
        """
        self.check_length(block_size)
        if self.record:
            self.check_records(block_size)

        self.block_size = block_size
        if self.documents == 'whole':
            self.first_document = self.next_document(0)
            if self.first_document is None:
                raise UserError(f'{self.folder} has no end-of-text token among its first '
                                f"{SEARCHED_TOKENS:,}, so documents='whole' finds no document to "
                                f'start at; leave --documents=any')

    def check_length(self, block_size):
        """UserError where a split has no window of block_size tokens and the one after."""
        split = min(SPLITS, key=lambda split: len(self.tokens[split]))
        tokens = self.tokens[split]
        if len(tokens) > block_size:
            return
        file = f'{split}.bin'
        if len(tokens.names) > 1:
            file = f'the shards of {split}'
        tries = f'--block_size={len(tokens) - 1}, or more text'
        if len(tokens) < 2:
            tries = 'more text'
        raise UserError(f'{self.folder / file} has {len(tokens):,} tokens, and a block takes '
                        f'{block_size + 1}; try {tries}')

    def check_records(self, block_size):
        """UserError where the records do not fit the settings."""
        if block_size < self.record.prompt:
            raise UserError(f'block_size={block_size} ends within the prompt of a record, so no '
                            f'target would count; try --block_size={self.record.length - 1}')

        if self.documents == 'whole':
            raise UserError(f'the windows of {self.folder.name} start at its records; leave '
                            f'--documents=any')

    # Batches

    def batch(self, seed: int, stream: str, first: int, count: int) -> Batch:
        """`count` sequences of a stream, starting at sequence number `first`.

        stream: 'train', 'eval train' or 'eval val'. Evaluation windows do not depend on the seed,
        on sampling or on documents, so runs with the same block_size, batch_size and eval_iters are
        judged by the same text. engine.dataloader.window_order has the orders of 'train'.
        In a dataset of records, windows start at records, and y is -1 where the target lies in a
        prompt.

        With documents='whole', a window starts at the next end-of-text token. If there is none
        within SEARCHED_TOKENS, it starts at the first one of the text. So a document's tokens
        beyond block_size are never read.

        Raises RunError for an id beyond the vocabulary.
        """
        split = 'train'
        if stream == 'eval val':
            split = 'val'
        tokens = self.tokens[split]

        # Where the windows start: (count,)
        if stream == 'train':
            starts = self.training_starts(seed, first, count)
        else:
            starts = weyl_starts(first, count, self.count_starts(tokens)) * self.stride

        # The tokens of each window, and the one after it: (count, block_size + 1)
        windows = torch.from_numpy(tokens.windows(starts, self.block_size + 1))
        self.check_ids(windows, tokens, starts)

        x = windows[:, :-1]
        y = windows[:, 1:]
        if self.record:
            y = y.masked_fill(self.is_prompt(), IGNORED)
        return Batch(x, y)

    def count_starts(self, tokens):
        """How many multiples of the stride a window of `tokens` can start at."""
        return (len(tokens) - self.block_size - 1) // self.stride + 1

    def training_starts(self, seed, first, count):
        """The starts of training windows, in the order that the settings choose. (count,)"""
        tokens = self.tokens['train']
        n_starts = self.count_starts(tokens)

        if self.sampling == 'windows':
            starts = weyl_starts(first, count, n_starts, seed) * self.stride
        elif self.record:
            # Records take the place of tokens, in blocks of one. epoch_starts leaves out one block.
            starts = epoch_starts(first, count, n_starts + 1, 1, seed) * self.stride
        else:
            starts = epoch_starts(first, count, len(tokens), self.block_size, seed)

        if self.documents == 'whole':
            starts = np.array([self.document_from(start) for start in starts.tolist()])
        return starts

    def document_from(self, start):
        """Where the first document at or after `start` begins; else the first one of the text."""
        found = self.next_document(start)
        if found is None:
            return self.first_document
        return found

    def next_document(self, start: int) -> int | None:
        """The position of the first end-of-text token of train at `start` or after, or None.

        The search ends SEARCHED_TOKENS after `start`, and before the last block. The token
        separates documents: it stands before or after each.
        """
        token = self.tokenizer.end_of_text
        if token is None:
            return None

        tokens = self.tokens['train']
        last = len(tokens) - self.block_size - 1
        return tokens.find(token, start, min(start + SEARCHED_TOKENS, last + 1))

    def is_prompt(self):
        """True for the targets of a window that lie in the prompt of a record. (block_size,)"""
        places = torch.arange(1, self.block_size + 1) % self.record.length
        return places < self.record.prompt

    def check_ids(self, windows, tokens, starts):
        """RunError where an id is beyond the vocabulary.

        Files are checked at the start, shards only in part, and a program may have written over
        them since.
        """
        largest = windows.max()
        if largest < self.vocab_size:
            return

        row, column = divmod(int(windows.argmax()), self.block_size + 1)
        path, position = tokens.locate(starts[row] + column)
        raise RunError(f'{path} is damaged, or changed while it was read: id {largest} of token '
                       f'{position:,} is beyond the vocabulary of {self.vocab_size}; restore it, '
                       f'and go on with --init_from=resume')

    # Resuming

    def check_same(self, tokenizer: dict | None, fingerprint: str | None,
                   accept_change: bool) -> None:
        """UserError where a saved run used another vocabulary, or another text.

        tokenizer, fingerprint: those of the run's dataset, or None where its checkpoint lacks them.
        accept_change: accept another text.
        """
        if tokenizer and not self.has_tokens_of(tokenizer):
            raise UserError(f'{self.folder.name} has another vocabulary than the run that would '
                            f'go on, so its tokens mean other text; restore the dataset of the '
                            f'run, or train a new model in another --out_dir')

        if fingerprint and fingerprint != self.fingerprint and not accept_change:
            raise UserError(f'{self.folder.name} is not what the run was trained on (fingerprint '
                            f'{self.fingerprint}, was {fingerprint}); restore it, or go on with '
                            f'--accept_dataset_change=True')

    def has_tokens_of(self, tokenizer):
        """True where the dict `tokenizer`, of a checkpoint, gives a text the same ids."""
        try:
            spec = TokenizerSpec.from_dict(tokenizer)
        except UserError:               # a damaged file
            return False
        return same_tokens(spec, self.tokenizer)


# Opening datasets

def open_dataset(
    name: str, env: Environment, sampling: str = 'windows', documents: str = 'any',
) -> TokenDataset:
    """The TokenDataset of data/NAME, on every rank.

    The first rank of each machine checks the files and leaves the result in NAME.checked.json,
    which the others read.
    """
    data = None
    with env.raise_on_all_ranks():
        if env.local_rank == 0:
            data = TokenDataset(name, sampling, documents)

    with env.raise_on_all_ranks():
        if env.local_rank != 0:
            data = TokenDataset(name, sampling, documents)
    return data


def check_order(sampling: str, documents: str) -> None:
    """UserError where `sampling` or `documents` is unknown, or the two do not fit each other."""
    settings = dict(sampling=sampling, documents=documents)
    for name, values in CHOICES.items():
        check_choice(settings, name, values)

    if sampling == 'epoch' and documents == 'whole':
        raise UserError('sampling=epoch reads each window once, and documents=whole moves windows, '
                        'so that some coincide; try --sampling=windows or --documents=any')


def dataset_folder(name: str) -> Path:
    """The folder data/NAME. UserError where `name` is not a plain folder name."""
    if not is_folder_name(name):
        raise UserError(f'dataset={name!r} should be the name of a folder in {DATA}')
    return DATA / name


def is_folder_name(name):
    """True for a name that stays within its folder on every system."""
    if not isinstance(name, str) or not name:
        return False
    if name.startswith('.') or set(name) & set('/\\:\0'):
        return False
    return len(name.encode('utf-8', 'replace')) <= 200


def dataset_tokenizer(name: str | None) -> TokenizerSpec:
    """The tokenizer spec of data/NAME; GPT-2's where `name` is None or there is no such folder."""
    if not name:
        return GPT2
    return read_meta(dataset_folder(name))


def advice(name):
    """What to type where data/NAME is not a dataset."""
    folder = DATA / name
    if (folder / 'unfinished.json').exists() or (folder / 'unfinished').exists():
        return 'prepare.py stopped before it finished; run the same command again'
    if (folder / 'prepare.py').is_file():
        return f'run: python data/{name}/prepare.py'

    token_files = [*DATA.glob('*/train.bin'), *DATA.glob('*/*train_*.bin')]
    prepared = ', '.join(sorted({path.parent.name for path in token_files}))
    return (f'prepared datasets: {prepared or "none"}; for text of your own run: '
            f'python data/text/prepare.py --input=PATH --name={name}')


def read_record(folder, meta, tokens):
    """The Record of a DatasetMeta, or None. UserError where the token files do not fit it."""
    found = meta.record
    if found is None:
        return None

    if not is_record(found):
        raise UserError(f'{folder / "meta.json"}: record is {found!r:.60}, and should be like '
                        f'{{"length": 10, "prompt": 6}}; prepare the dataset again')

    record = Record(found['length'], found['prompt'])
    for split, stream in tokens.items():
        if len(stream) % record.length:
            raise UserError(f'{folder}: the {len(stream):,} tokens of {split} are not whole '
                            f'records of {record.length:,}; prepare the dataset again')
    return record


def is_record(found):
    """True for a dict with the fields of a Record: integers of which the prompt is the smaller."""
    if not isinstance(found, dict):
        return False
    length = found.get('length')
    prompt = found.get('prompt')
    return type(length) is int and type(prompt) is int and 0 < prompt < length


# Batches on the device

def train_batches(
    data: TokenDataset, seed: int, iterations: Iterable[tuple[int, int, int]], env: Environment,
) -> Iterator[Batch]:
    """This rank's micro-batches on its device. The ranks share the global batch.

    iterations: for each iteration, the number of its first sequence, the micro-steps of a rank and
    the sequences of a micro-batch; see BatchSchedule.iterations.
    """
    def requests():
        for first, micro_steps, size in iterations:
            for micro_step in range(micro_steps):
                number = env.rank * micro_steps + micro_step    # among all ranks' micro-batches
                yield BatchRequest(seed, 'train', first + number * size, size)

    return prefetch(data.batch, requests(), env.device)


def eval_batches(
    data: TokenDataset, split: str, count: int, batch_size: int, env: Environment,
) -> Iterator[Batch]:
    """This rank's share of the `count` evaluation batches, which do not depend on the seed.

    Every rank gets the same number, because the ranks of a sharded model compute together. A rank's
    last batch may repeat another.
    """
    def requests():
        for first in range(0, count, env.world_size):
            number = min(first + env.rank, count - 1)
            yield BatchRequest(0, f'eval {split}', number * batch_size, batch_size)

    return prefetch(data.batch, requests(), env.device)


def prefetch(
    make_batch: Callable[..., tuple[torch.Tensor, torch.Tensor]], requests: Iterable[tuple],
    device: torch.device,
) -> Iterator[Batch]:
    """Yield make_batch(*request) on `device` for each request.

    One batch is prepared in the background while the one before is used.
    """
    mover = BatchMover(device)

    def fetch(request):
        return mover.send(make_batch(*request))

    with ThreadPoolExecutor(1, 'prefetch', initializer=mover.use_device) as thread:
        ahead = None
        for request in requests:
            ready = ahead
            ahead = thread.submit(fetch, request)
            if ready:
                yield mover.receive(ready.result())
        if ahead:
            yield mover.receive(ahead.result())


class BatchMover:
    """Moves batches to a device.

    Batches for a GPU are copied from pinned memory on a stream of their own, beside the
    computation.
    """

    def __init__(self, device):
        self.device = device
        self.copy_stream = None             # None where the device is no GPU
        if device.type == 'cuda':
            self.copy_stream = torch.cuda.Stream(device)

    def use_device(self):
        """Prepare a new thread, which starts on GPU 0 and would open a context there."""
        if self.copy_stream:
            torch.cuda.set_device(self.device)

    def send(self, batch):
        """Start the copy of a batch to the device, in the background thread."""
        if not self.copy_stream:
            return Batch(*(tensor.to(self.device) for tensor in batch))

        with torch.cuda.stream(self.copy_stream):
            pinned = [tensor.contiguous().pin_memory() for tensor in batch]
            return Batch(*(tensor.to(self.device, non_blocking=True) for tensor in pinned))

    def receive(self, batch):
        """Return a batch that was sent, for use in the thread that computes."""
        if self.copy_stream:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_stream(self.copy_stream)
            # The allocator must not reuse their memory before this stream is done.
            for tensor in batch:
                tensor.record_stream(computing)
        return batch
