"""Token files to batches.

A batch is a pure function of (seed, stream, numbers of its sequences). Nothing is remembered
between batches, so a resumed run and any number of ranks draw the same ones.
"""

import hashlib
import json
import math
import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from engine.chat_layout import ChatLayout
from engine.dataloader.file_formats import DTYPES
from engine.dataloader.masks import open_masks
from engine.dataloader.token_files import (
    REPLACING,
    SPLITS,
    TokenStream,
    check_split,
    check_width,
    find_token_files,
    token_dtype,
)
from engine.dataloader.window_order import epoch_starts, weyl_starts
from engine.distributed import Environment
from engine.errors import RunError, UserError, check_choice
from engine.tokenizer import (
    GPT2,
    NUMBERS,
    DatasetMeta,
    Tokenizer,
    TokenizerSpec,
    gpt2_is_cached,
    read_meta,
)

CHOICES = dict(sampling=('windows', 'epoch'), documents=('any', 'whole'))
DATASETS_SHOWN = 10             # in an error's line
SAMPLED_WINDOWS = 64            # that show whether windows reach what counts
DATA = Path(__file__).resolve().parents[2] / 'data'
SEARCHED_TOKENS = 1 << 20       # how far documents='whole' looks for the next document
IGNORED = -1                    # a target that does not count in the loss
SIZE_SAMPLE = 1 << 17           # tokens by which the bytes of a token are counted


class BatchRequest(NamedTuple):
    """The arguments of TokenDataset.batch."""

    seed: int
    stream: str
    first: int
    count: int


class Batch(NamedTuple):
    """Inputs and targets, each (count, block_size) int64.

    Targets are inputs one token later, and -1 where a mask says that they do not count.
    """

    x: torch.Tensor
    y: torch.Tensor


class WeightedBatch(NamedTuple):
    """A batch, and what its mean loss weighs in the mean over all batches, which is 1 on average.

    Without masks each batch has the same number of targets, and each weight is 1.
    """

    x: torch.Tensor
    y: torch.Tensor
    weight: float


class Part(NamedTuple):
    """One of the datasets that a run reads, by its share of the sequences."""

    name: str
    share: float                # of the sequences; the shares of all parts add up to 1
    data: 'TokenDataset'


class TokenDataset:
    """The token files of data/NAME or of a path, checked once: see engine.dataloader.token_files.

    sampling: 'windows' draws training windows evenly over the text, and 'epoch' reads every window
    once before any comes again. documents: 'any' starts a window anywhere, and 'whole' starts
    training windows at documents.

    Attributes: tokens is {'train': TokenStream, 'val': ...}; masks is the same with the masks, or
    empty. tokenizer is a TokenizerSpec. chat is the ChatLayout of a dataset of conversations, as a
    dict, or None. fingerprint is a short hash of all files. Windows start at multiples of stride,
    which is the length of a record, or 1.
    Call `set_block_size` before `batch`.

    Raises UserError for a dataset that is missing or damaged, and for an unknown sampling or
    documents.
    """

    def __init__(self, name: str, sampling: str = 'windows', documents: str = 'any'):
        self.setting = name
        self.folder = dataset_folder(name)
        check_order(sampling, documents)
        self.sampling = sampling
        self.documents = documents
        files = self.find_files()

        # What meta.json says
        meta = DatasetMeta.read(self.folder)
        self.tokenizer = meta.spec
        self.vocab_size = meta.spec.vocab_size
        self.chat = read_chat(self.folder, meta)
        dtype = self.read_dtype(meta)
        expected = meta.sha256
        if not isinstance(expected, dict):
            expected = {}

        # What the files hold
        self.tokens = {}
        facts = []
        for split in SPLITS:
            if meta.dtype is None:
                check_width(self.folder, files[split], dtype)
            self.tokens[split] = TokenStream(self.folder, files[split], dtype)
            facts.append(check_split(self.tokens[split], split, self.vocab_size, expected))

        self.masks, mask_facts = open_masks(self.folder, self.tokens, expected)
        self.has_masks = bool(self.masks)
        facts += mask_facts

        self.stride = read_stride(self.folder, meta, self.tokens)
        if self.stride > 1:
            facts.append(json.dumps(meta.record))
        self.fingerprint = hashlib.sha256(''.join(facts).encode()).hexdigest()[:16]

    def find_files(self):
        """The token files of both splits. UserError where a split is missing or being replaced."""
        files = find_token_files(self.folder)
        if not files['train'] or not files['val']:
            cure = advice(self.folder, self.setting)
            raise UserError(f'dataset {self.setting!r} has no train.bin and val.bin in '
                            f'{self.folder}, nor shards of both; {cure}')

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
            raise UserError(f'{self.folder / "meta.json"}: dtype is {dtype!r:.100}, and should be '
                            f'{", ".join(DTYPES)}; prepare the dataset again')
        return dtype

    @property
    def name(self) -> str:
        """The name of the dataset, for people."""
        return self.folder.name

    @property
    def n_train_tokens(self) -> int:
        """How many tokens there are to train on."""
        return len(self.tokens['train'])

    @property
    def parts(self) -> list[Part]:
        """The dataset itself, as the only part of what a run reads."""
        return [Part(self.name, 1.0, self)]

    # The size of windows

    def set_block_size(self, block_size: int) -> None:
        """Batches have block_size tokens from now on.

        Raises UserError where a split is shorter, and with documents='whole' where train has no
        end-of-text token, or consists of records, or where no window reaches a token that counts.
        """
        self.check_length(block_size)
        if self.stride > 1 and self.documents == 'whole':
            raise UserError(f'the windows of {self.folder.name} start at its records; leave '
                            f'--documents=any')

        self.block_size = block_size
        if self.documents == 'whole':
            self.first_document = self.next_document(0)
            if self.first_document is None:
                raise UserError(f'{self.folder} has no end-of-text token among its first '
                                f"{SEARCHED_TOKENS:,}, so documents='whole' finds no document to "
                                f'start at; leave --documents=any')
            if self.masks:
                self.check_answers()

    def check_answers(self):
        """UserError where no window of documents='whole' would reach a token that counts."""
        starts = self.training_starts(0, 0, SAMPLED_WINDOWS)
        if self.counted('train', starts).any():
            return

        mask = self.masks['train']
        longest = 0                     # tokens from the start of a document to its answer
        for start in starts.tolist():
            found = mask.find(1, start + 1, min(start + SEARCHED_TOKENS, len(mask)))
            if found is not None:
                longest = max(longest, found - start)
        tries = 'leave --documents=any'
        if longest:
            tries = f'try --block_size={2 ** math.ceil(math.log2(longest + 1))}, or {tries}'
        raise UserError(f"documents='whole' reads the first {self.block_size} tokens of a document "
                        f'of {self.folder.name}, and no answer begins within them, so nothing '
                        f'would be learned; {tries}')

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

    # Batches

    def batch(self, seed: int, stream: str, first: int, count: int) -> Batch:
        """`count` sequences of a stream, starting at sequence number `first`.

        stream: 'train', 'eval train' or 'eval val'. Evaluation windows do not depend on the seed,
        on sampling or on documents, so runs with the same block_size, batch_size and eval_iters are
        judged by the same text. engine.dataloader.window_order has the orders of 'train'.
        In a dataset of records, windows start at records.

        With documents='whole', a window starts at the next end-of-text token. If there is none
        within SEARCHED_TOKENS, it starts at the first one of the text. A window that reaches the
        end of the text goes on at its beginning, so that the last documents and the first one are
        read too. A document's tokens beyond block_size are never read.

        Raises RunError for an id beyond the vocabulary.
        """
        split = split_of_stream(stream)
        starts = self.starts(seed, stream, first, count)
        windows = torch.from_numpy(self.windows(split, starts, np.int64))
        x = windows[:, :-1]
        y = windows[:, 1:]
        if self.masks:
            counted = torch.from_numpy(self.counted(split, starts))
            y = y.masked_fill(~counted, IGNORED)
        return Batch(x, y)

    def starts(self, seed, stream, first, count):
        """Where the windows of `batch` start: (count,)."""
        if stream == 'train':
            return self.training_starts(seed, first, count)
        tokens = self.tokens[split_of_stream(stream)]
        return weyl_starts(first, count, self.count_starts(tokens)) * self.stride

    def windows(self, split: str, starts: np.ndarray, dtype: type | None = None) -> np.ndarray:
        """The tokens of each window, and the one after it: (windows, block_size + 1).

        starts: where the windows start, as `starts` returns it. dtype: of the result; None takes
        that of the files. Raises RunError for an id beyond the vocabulary.
        """
        tokens = self.tokens[split]
        windows = ring_windows(tokens, starts, self.block_size + 1, dtype or tokens.dtype)
        self.check_ids(windows, tokens, starts)
        return windows

    def counted(self, split, starts):
        """True for the targets of the windows at `starts` that count: (windows, block_size)."""
        return ring_windows(self.masks[split], starts + 1, self.block_size, bool)

    def count_targets(self, seed: int, stream: str, first: int, count: int) -> int:
        """How many targets count in the sequences of `batch` with the same arguments."""
        if not self.masks:
            return count * self.block_size
        starts = self.starts(seed, stream, first, count)
        return int(self.counted(split_of_stream(stream), starts).sum())

    def count_starts(self, tokens):
        """How many multiples of the stride a window of `tokens` can start at."""
        return (len(tokens) - self.block_size - 1) // self.stride + 1

    def training_starts(self, seed, first, count):
        """The starts of training windows, in the order that the settings choose. (count,)"""
        tokens = self.tokens['train']
        n_starts = self.count_starts(tokens)
        if self.documents == 'whole':
            n_starts = len(tokens)          # the text is a ring

        if self.sampling == 'windows':
            starts = weyl_starts(first, count, n_starts, seed) * self.stride
        elif self.stride > 1:
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

        The search ends SEARCHED_TOKENS after `start`. The token separates documents: it stands
        before or after each.
        """
        token = self.tokenizer.end_of_text
        if token is None:
            return None

        tokens = self.tokens['train']
        return tokens.find(token, start, min(start + SEARCHED_TOKENS, len(tokens)))

    def check_ids(self, windows, tokens, starts):
        """RunError where an id is beyond the vocabulary.

        Files are checked at the start, shards only in part, and a program may have written over
        them since.
        """
        if windows.dtype == np.int64:
            windows = windows.view(np.uint64)       # a negative id is beyond every vocabulary
        largest = windows.max()
        if largest < self.vocab_size:
            return

        row, column = divmod(int(windows.argmax()), self.block_size + 1)
        path, position = tokens.locate((starts[row] + column) % len(tokens))
        raise RunError(f'{path} is damaged, or changed while it was read: id {largest} of token '
                       f'{position:,} is beyond the vocabulary of {self.vocab_size}; restore it, '
                       f'and go on with --init_from=resume')

    def bytes_per_token(self) -> float | None:
        """Bytes of text per token of val, by its first tokens; see Tokenizer.bytes_per_token.

        None where that would need a download, or a tokenizer that cannot be read.
        """
        if self.tokenizer.kind == 'gpt2' and not gpt2_is_cached():
            return None
        if self.tokenizer.tokenizer_name == NUMBERS:        # whose text is unknown
            return None
        try:
            tokenizer = Tokenizer(self.tokenizer)
        except (UserError, RunError):
            return None
        return tokenizer.bytes_per_token(self.tokens['val'][:SIZE_SAMPLE])


def ring_windows(
    stream: TokenStream, starts: np.ndarray, length: int, dtype: type,
) -> np.ndarray:
    """As TokenStream.windows, but a window that reaches the end goes on at the beginning.

    The stream has to have at least `length` tokens.
    """
    reaches_end = starts > len(stream) - length
    if not reaches_end.any():
        return stream.windows(starts, length, dtype)

    windows = np.empty((len(starts), length), dtype)
    windows[~reaches_end] = stream.windows(starts[~reaches_end], length, dtype)
    for row in np.flatnonzero(reaches_end):
        end = stream[int(starts[row]):]
        windows[row] = np.concatenate([end, stream[:length - len(end)]])
    return windows


def split_of_stream(stream):
    """The split that the windows of a stream are of: 'train' or 'val'."""
    if stream == 'eval val':
        return 'val'
    return 'train'


# Opening datasets

def check_order(sampling: str, documents: str) -> None:
    """UserError where `sampling` or `documents` is unknown, or the two do not fit each other."""
    settings = dict(sampling=sampling, documents=documents)
    for name, values in CHOICES.items():
        check_choice(settings, name, values)

    if sampling == 'epoch' and documents == 'whole':
        raise UserError('sampling=epoch reads each window once, and documents=whole moves windows, '
                        'so that some coincide; try --sampling=windows or --documents=any')


def dataset_folder(name: str) -> Path:
    """The folder that the setting `dataset` names: data/NAME, or that of a path.

    A relative path begins at data/, as in nanoGPT. UserError for what can be no path.
    """
    if not is_path(name):
        raise UserError(f'dataset={name!r:.100} should be the name of a folder in {DATA}, or a '
                        f'path')
    return DATA / os.path.expanduser(name)


def is_path(name):
    """True for what a file system accepts as a path."""
    if not isinstance(name, str) or not name or '\0' in name or len(name) > 2000:
        return False
    return all(len(part.encode('utf-8', 'replace')) <= 200 for part in Path(name).parts)


def dataset_tokenizer(name: str | None) -> TokenizerSpec:
    """The tokenizer spec of the dataset that a checkpoint names, as nanoGPT's do.

    It is GPT-2's where `name` is None, where there is no such folder, and for a path of another
    machine, which is not looked up.
    """
    if not name:
        return GPT2
    folder = dataset_folder(name)
    if name.startswith(('//', '\\\\')):
        return GPT2
    return read_meta(folder)


def advice(folder, setting):
    """What to type where `folder` is not a dataset. setting: what named it."""
    name = folder.name
    if (folder / 'unfinished.json').exists() or (folder / 'unfinished').exists():
        return 'prepare.py stopped before it finished; run the same command again'
    is_in_data = folder.parent == DATA
    if (folder / 'prepare.py').is_file() and is_in_data:
        return f'run: python data/{name}/prepare.py'
    if Path(setting).is_dir() and folder.resolve() != Path(setting).resolve():
        return (f'a relative path begins at {DATA}; '
                f'try --dataset={shlex.quote(str(Path(setting).resolve()))}')

    if ':' in name:                     # no folder of prepare.py has it in its name
        return (f'several datasets have shares, as in --dataset=NAME:0.7,OTHER:0.3; '
                f'one has none: try --dataset={shlex.quote(name.partition(":")[0])}')

    token_files = [*DATA.glob('*/*train*.bin'), *DATA.glob('*/*train*.npy')]
    names = sorted({path.parent.name for path in token_files})
    prepared = ', '.join(names[:DATASETS_SHOWN])
    if len(names) > DATASETS_SHOWN:
        prepared += f' and {len(names) - DATASETS_SHOWN} more'
    command = f'python data/text/prepare.py --input=PATH --name={name}'
    if not is_in_data:
        command += f', and name --dataset={name}'
    return f'prepared datasets: {prepared or "none"}; for text of your own run: {command}'


def read_chat(folder, meta):
    """The dict of the ChatLayout in meta.json, or None. UserError where it is none."""
    if meta.chat is None:
        return None
    try:
        return ChatLayout.from_dict(meta.chat).to_dict()
    except UserError as error:
        raise UserError(f'{folder / "meta.json"}: {error}; prepare the dataset again') from None


def read_stride(folder, meta, tokens):
    """The length of a record, as meta.json says; 1 for a dataset without records.

    UserError where the token files do not fit it.
    """
    found = meta.record
    if found is None:
        return 1

    length = None
    if isinstance(found, dict) and found.keys() == {'length'}:
        length = found['length']
    if type(length) is not int or length < 2:
        raise UserError(f'{folder / "meta.json"}: record is {found!r:.60}, and should be like '
                        f'{{"length": 10}}; prepare the dataset again')

    for split, stream in tokens.items():
        if len(stream) % length:
            raise UserError(f'{folder}: the {len(stream):,} tokens of {split} are not whole '
                            f'records of {length:,}; prepare the dataset again')
    return length


# Batches on the device

def train_batches(
    data: TokenDataset, seed: int, iterations: Iterable[tuple[int, int, int]], env: Environment,
) -> Iterator[WeightedBatch]:
    """This rank's micro-batches on its device. The ranks share the global batch.

    The weights give each target that counts the same share in the mean over the global batch.

    iterations: for each iteration, the number of its first sequence, the micro-steps of a rank and
    the sequences of a micro-batch; see BatchSchedule.iterations.
    """
    def requests():
        for first, micro_steps, size in iterations:
            n_batches = env.world_size * micro_steps    # of all ranks
            n_targets = data.count_targets(seed, 'train', first, n_batches * size)
            for micro_step in range(micro_steps):
                number = env.rank * micro_steps + micro_step
                request = BatchRequest(seed, 'train', first + number * size, size)
                yield request, n_targets / n_batches

    def make_batch(request, mean_targets):
        return weighted_batch(data, request, mean_targets)

    return prefetch(make_batch, requests(), env.device)


def eval_batches(
    data: TokenDataset, split: str, count: int, batch_size: int, env: Environment,
) -> Iterator[WeightedBatch]:
    """This rank's share of the `count` evaluation batches, which do not depend on the seed.

    Every rank gets the same number, because the ranks of a sharded model compute together. A rank's
    last batch may repeat another. The weight of a batch is the share of its targets that count.
    """
    def requests():
        for first in range(0, count, env.world_size):
            number = min(first + env.rank, count - 1)
            request = BatchRequest(0, f'eval {split}', number * batch_size, batch_size)
            yield request, batch_size * data.block_size

    def make_batch(request, mean_targets):
        return weighted_batch(data, request, mean_targets)

    return prefetch(make_batch, requests(), env.device)


def weighted_batch(
    data: TokenDataset, request: BatchRequest, mean_targets: float,
) -> WeightedBatch:
    """The batch of a request. Its weight is how many of its targets count, by mean_targets."""
    x, y = data.batch(*request)
    if not data.has_masks:
        return WeightedBatch(x, y, 1.0)

    n_counted = int((y != IGNORED).sum())
    if n_counted:
        return WeightedBatch(x, y, n_counted / mean_targets)

    # The mean over no targets would be 0 / 0. So one target counts, with a weight of 0.
    y[0, 0] = x[0, 0]
    return WeightedBatch(x, y, 0.0)


def prefetch(
    make_batch: Callable[..., tuple], requests: Iterable[tuple], device: torch.device,
) -> Iterator:
    """Yield make_batch(*request) for each request, with its tensors on `device`.

    make_batch: returns a named tuple with tensors `x` and `y`, such as a WeightedBatch.
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
                yield mover.receive(*ready.result())
        if ahead:
            yield mover.receive(*ahead.result())


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
        """Start the copy of a batch to the device, in the background thread.

        Returns it with the event of its arrival, which is None where the device is no GPU.
        """
        if not self.copy_stream:
            moved = batch._replace(x=batch.x.to(self.device), y=batch.y.to(self.device))
            return moved, None

        with torch.cuda.stream(self.copy_stream):
            x, y = (tensor.contiguous().pin_memory() for tensor in batch[:2])
            moved = batch._replace(x=x.to(self.device, non_blocking=True),
                                   y=y.to(self.device, non_blocking=True))
            return moved, self.copy_stream.record_event()

    def receive(self, batch, arrival):
        """Return a batch that was sent, for use in the thread that computes."""
        if arrival:
            # The stream may already copy the next batch, which this one need not wait for.
            computing = torch.cuda.current_stream(self.device)
            computing.wait_event(arrival)
            # The allocator must not reuse their memory before this stream is done.
            for tensor in (batch.x, batch.y):
                tensor.record_stream(computing)
        return batch
