"""Log-likelihoods of tokens under a GPT, for many examples at once.

The options of an example are read as a tree: what all of them begin with is read once, then each
option, which attends to that and to itself. The trees of a batch follow one another in a single
row, so no layer but attention computes padding. `score` needs only GPT.hidden and GPT.logits.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from engine.attention import CausalAttention, attention
from engine.device import evaluation_mode
from engine.distributed import Environment
from engine.errors import RunError
from engine.generation.kv_cache import decoding_attention
from engine.log import progress_bar

LOGIT_ROWS = 512        # positions whose logits are held at once: 103 MB for GPT-2's vocabulary


class Option(NamedTuple):
    """Tokens of which the last ones are scored, given those before them."""
    tokens: np.ndarray          # (T,) ids
    start: int                  # the first one that is scored, from 1 to T - 1

    @property
    def n_scored(self):
        return len(self.tokens) - self.start


class Score(NamedTuple):
    """What the model says of an option's scored tokens."""
    loglikelihood: float        # nats, summed over them
    tokens: int                 # how many they are
    greedy: bool                # True where each of them is the likeliest at its place
    last_greedy: bool           # the same of the last one alone


class TokenScores(NamedTuple):
    """What the model says of each scored token of an option."""
    logprobs: np.ndarray        # (n,) nats
    ranks: np.ndarray           # (n,) 1 for the likeliest token at that place, and so on


def common_prefix(arrays: list[np.ndarray]) -> int:
    """The number of leading elements that all `arrays` share."""
    length = min(len(array) for array in arrays)
    first = arrays[0][:length]
    differs = np.any([array[:length] != first for array in arrays], axis=0)     # (length,)
    if not differs.any():
        return length
    return int(differs.argmax())


class Tree:
    """The inputs of an example's options. What all options begin with is there only once.

    tokens, positions: (S,)
    branches: (S,), 0 for the shared tokens, else the number of the option, from 1 on.
    option_nodes: for each option, the places in `tokens` whose outputs predict its scored tokens.
    """

    def __init__(self, options):
        inputs = [option.tokens[:-1] for option in options]
        shared = common_prefix(inputs)
        trunk = np.arange(shared)

        # The shared tokens come first, then what each option has of its own.
        tokens = [inputs[0][:shared]]
        positions = [trunk]
        branches = [np.zeros(shared, int)]
        self.option_nodes = []
        end = shared
        for number, option in enumerate(options, 1):
            own = inputs[number - 1][shared:]
            tokens.append(own)
            positions.append(shared + np.arange(len(own)))
            branches.append(np.full(len(own), number))

            path = np.concatenate([trunk, end + np.arange(len(own))])   # the option's whole input
            self.option_nodes.append(path[option.start - 1:])
            end += len(own)

        self.tokens = np.concatenate(tokens).astype(np.int64)
        self.positions = np.concatenate(positions).astype(np.int64)
        self.branches = np.concatenate(branches).astype(np.int64)


class TreeAttention(CausalAttention):
    """Attention within each tree of a row, in which the trees of a batch follow one another.

    The row has N tokens. For attention, the B trees are padded to the S tokens of the longest.
    """

    def __init__(self, trees: list[Tree], device: torch.device):
        super().__init__()
        lengths = [len(tree.tokens) for tree in trees]
        longest = max(lengths)
        starts = np.cumsum([0, *lengths])

        # for each place in the padded trees: the place in the row, the position, the branch
        rows = np.zeros((len(trees), longest), np.int64)
        positions = np.zeros_like(rows)
        branches = np.zeros_like(rows)
        for i, tree in enumerate(trees):
            rows[i, :lengths[i]] = np.arange(starts[i], starts[i + 1])
            positions[i, :lengths[i]] = tree.positions
            branches[i, :lengths[i]] = tree.branches
        self.rows = torch.from_numpy(rows).to(device)                       # (B, S)
        self.positions = torch.from_numpy(positions).to(device)             # (B, S)
        self.n_positions = int(positions.max()) + 1

        # for each place in the row: the place in the padded trees, flattened
        padded = [i * longest + np.arange(length) for i, length in enumerate(lengths)]
        self.places = torch.from_numpy(np.concatenate(padded)).to(device)   # (N,)

        # a token sees those before it that all options share, and those of its own option
        self.visible = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
        self.is_causal = bool((branches == 0).all())                        # no tree has branches
        if not self.is_causal:
            branches = torch.from_numpy(branches).to(device)
            keys = branches[:, None]                                        # (B, 1, S)
            queries = branches[:, :, None]                                  # (B, S, 1)
            same = (keys == 0) | (keys == queries)
            self.visible = (self.visible & same)[:, None]                   # (B, 1, S, S)

    def n_keys(self, T):
        return self.n_positions

    def attend(self, q, k, v, bias=None):
        """Attention of the N tokens of a row, (1, H, N, D), each over its own tree."""
        q = self.pad(q[0])                                                  # (B, H, S, D)
        k = self.pad(k[0])                                                  # (B, G, S, D)
        v = self.pad(v[0])                                                  # (B, G, S, D)

        mask = None
        if not self.is_causal:
            mask = self.visible
        if bias is not None:
            mask = self.bias_of_pairs(bias).masked_fill(~self.visible, -torch.inf)

        y = attention(q, k, v, mask, is_causal=mask is None)
        return y.transpose(0, 1).flatten(1, 2)[:, self.places][None]        # (1, H, N, D)

    def pad(self, x):
        """x (H, N, ...) of a row as that of padded trees, (B, H, S, ...)."""
        return x[:, self.rows].transpose(0, 1)

    def bias_of_pairs(self, bias):
        """The bias of each query and key of a tree, (B, H, S, S), from `bias` (1, H, N, n_keys),
        which has that of each query and position."""
        bias = self.pad(bias[0])                                            # (B, H, S, n_keys)
        keys = self.positions[:, None, None].expand(*bias.shape[:3], -1)    # (B, H, S, S)
        return bias.gather(3, keys)


def make_batches(examples, batch_size):
    """Lists of indices of examples of similar length, the longest first.

    A batch has at most batch_size options, or one example.
    """
    def length(i):
        return sum(len(option.tokens) for option in examples[i])

    batches = [[]]
    n_options = 0                               # of the last batch
    for i in sorted(range(len(examples)), key=length, reverse=True):
        if batches[-1] and n_options + len(examples[i]) > batch_size:
            batches.append([])
            n_options = 0
        batches[-1].append(i)
        n_options += len(examples[i])
    return batches


@torch.no_grad()
def score_batch(model, examples, env):
    """A list of Scores for each example, a list of Options."""
    trees = [Tree(options) for options in examples]

    # The trees follow one another in a row. Its `nodes` predict the scored tokens.
    nodes = []
    targets = []
    begin = 0
    for tree, options in zip(trees, examples):
        for option, option_nodes in zip(options, tree.option_nodes):
            nodes.append(begin + option_nodes)
            targets.append(option.tokens[option.start:])
        begin += len(tree.tokens)
    nodes = join(nodes, env.device)                                         # (M,) scored tokens
    targets = join(targets, env.device)                                     # (M,)
    tokens = join([tree.tokens for tree in trees], env.device)              # (N,) nodes
    positions = join([tree.positions for tree in trees], env.device)        # (N,)

    # Forward pass
    with env.autocast(), decoding_attention(env.device):
        attention = TreeAttention(trees, env.device)
        x = model.hidden(tokens[None], [attention] * model.config.n_layer, positions)   # (1, N, C)
        logprobs, greedy = score_tokens(model, x[0, nodes], targets)
    check_finite(logprobs, env)

    # Back to examples and options
    scores = []
    end = 0
    for options in examples:
        scores.append([])
        for option in options:
            begin = end
            end += option.n_scored
            scores[-1].append(Score(
                loglikelihood=float(logprobs[begin:end].sum()),
                tokens=option.n_scored,
                greedy=bool(greedy[begin:end].all()),
                last_greedy=bool(greedy[end - 1])))
    return scores


def check_finite(logprobs, env):
    """RunError where a log-probability is not finite."""
    if not np.isfinite(logprobs).all():
        raise RunError(f'the model gives probabilities that are not finite numbers in {env.dtype}; '
                       f'try --dtype=float32, or an earlier checkpoint')


def join(arrays, device):
    """Arrays of integers, one after another, as a tensor on the device."""
    return torch.from_numpy(np.concatenate(arrays).astype(np.int64)).to(device)


def score_tokens(model, x, targets):
    """(log-probabilities in nats, whether each is the largest) of M tokens, two arrays (M,).

    x: what the model's last layer gives where it predicts them, (M, C). targets: their ids, (M,).
    """
    logprobs = []
    greedy = []
    for rows, ids in zip(x.split(LOGIT_ROWS), targets.split(LOGIT_ROWS)):
        logits = model.logits(rows).float()                     # (up to LOGIT_ROWS, V)
        chosen = logits.gather(1, ids[:, None])[:, 0]
        logprobs.append(chosen - logits.logsumexp(dim=1))
        greedy.append(logits.argmax(dim=1) == ids)
    return torch.cat(logprobs).double().cpu().numpy(), torch.cat(greedy).cpu().numpy()


def score(model: torch.nn.Module, examples: list[list[Option]], env: Environment,
          batch_size: int = 32, should_stop: Callable[[], bool] = lambda: False,
          title: str = 'scoring') -> list[list[Score]] | None:
    """A Score for each Option of each example, or None where should_stop was true.

    Every rank calls it and gets all of them. The batches are the same for any number of ranks, so
    the results are too. The model's mode stays as it is, and no random number is drawn.

    batch_size: how many options are read at once, at most.
    should_stop: is asked after each batch, as often on every rank.
    title: what the progress bar says.
    """
    batches = make_batches(examples, batch_size)
    rounds = math.ceil(len(batches) / env.world_size)
    own_batches = range(env.rank, rounds * env.world_size, env.world_size)

    scores = {}                                 # {index of an example: its Scores}, of this rank
    with evaluation_mode(model):
        for i in progress_bar(title, own_batches, rounds):
            if i < len(batches):                # else this rank has nothing to do in the last round
                batch = [examples[j] for j in batches[i]]
                scores.update(zip(batches[i], score_batch(model, batch, env)))
            if should_stop():
                return None

    merged = {}
    for part in env.all_gather(scores):
        merged.update(part)
    return [merged[i] for i in range(len(examples))]


# Each token by itself

def token_scores(model: torch.nn.Module, windows: list[Option], env: Environment,
                 batch_size: int = 32, title: str = 'scoring') -> Iterator[TokenScores]:
    """Yield the TokenScores of each window of a text, in their order.

    Every rank iterates over all of them and gets the same. A round of batches, one for each rank,
    is all that is held. The model's mode stays as it is.

    windows: of one length, as those of a text are.
    title: what the progress bar says.
    """
    batches = [windows[i:i + batch_size] for i in range(0, len(windows), batch_size)]
    firsts = range(0, len(batches), env.world_size)         # the first batch of each round

    for first in progress_bar(title, firsts, len(firsts)):
        own = []                                            # of this rank, perhaps none
        if first + env.rank < len(batches):
            with evaluation_mode(model):
                own = score_windows(model, batches[first + env.rank], env)
        for scores in env.all_gather(own):
            yield from scores


@torch.no_grad()
def score_windows(model, windows, env):
    """A list of the TokenScores of windows that have one length."""
    tokens = np.stack([window.tokens for window in windows]).astype(np.int64)
    tokens = torch.from_numpy(tokens).to(env.device)                        # (B, T + 1)
    scores = []

    with env.autocast(), decoding_attention(env.device):
        x = model.hidden(tokens[:, :-1])                                    # (B, T, C)
        for window, row, ids in zip(windows, x, tokens):
            logprobs, ranks = rank_tokens(model, row[window.start - 1:], ids[window.start:])
            scores.append(TokenScores(logprobs, ranks))

    for logprobs, _ in scores:
        check_finite(logprobs, env)
    return scores


def rank_tokens(model, x, targets):
    """(log-probabilities in nats, ranks) of M tokens, two arrays (M,), for x (M, C)."""
    logprobs = []
    ranks = []
    for rows, ids in zip(x.split(LOGIT_ROWS), targets.split(LOGIT_ROWS)):
        logits = model.logits(rows).float()                     # (up to LOGIT_ROWS, V)
        chosen = logits.gather(1, ids[:, None])
        logprobs.append(chosen[:, 0] - logits.logsumexp(dim=1))
        ranks.append(1 + (logits > chosen).sum(dim=1))
    return torch.cat(logprobs).double().cpu().numpy(), torch.cat(ranks).cpu().numpy()
