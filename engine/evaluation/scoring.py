"""Log-likelihoods of tokens under a GPT, for many examples at once.

The options of an example are read as a tree: what all of them begin with is read once, then each
option, which attends to that and to itself. The trees of a batch follow one another in a single row,
so no layer but attention computes padding. `score` needs only GPT.hidden and GPT.logits.
"""

from typing import NamedTuple

import numpy as np
import torch

from engine.attention import CausalAttention, attention
from engine.errors import RunError
from engine.generation.kv_cache import decoding_attention

LOGIT_ROWS = 512                # positions whose logits are held at once: 103 MB for GPT-2's vocabulary


class Option(NamedTuple):
    """Tokens of which the last ones are scored, given those before them."""
    tokens: np.ndarray          # (T,) ids
    start: int                  # the first one that is scored, from 1 to T - 1


class Score(NamedTuple):
    """What the model says of an option's scored tokens."""
    loglikelihood: float        # nats, summed over them
    tokens: int                 # how many they are
    greedy: bool                # True where each of them is the likeliest at its place
    last_greedy: bool           # the same of the last one alone


def common_prefix(arrays):
    """The number of leading elements that all `arrays` share."""
    length = min(len(array) for array in arrays)
    differs = np.any([array[:length] != arrays[0][:length] for array in arrays], axis=0)
    return int(differs.argmax()) if differs.any() else length


class Tree:
    """The inputs of an example's options, with those that all options begin with only once.

    tokens, positions: (S,). branches: (S,), 0 for the shared tokens, else the number of the option.
    option_nodes: for each option, (T,) the places in `tokens` whose outputs predict its scored tokens.
    """

    def __init__(self, options):
        inputs = [option.tokens[:-1] for option in options]
        shared = common_prefix(inputs)
        parts, positions, branches = [inputs[0][:shared]], [np.arange(shared)], [np.zeros(shared, int)]
        self.option_nodes, end = [], shared
        for number, (option, tokens) in enumerate(zip(options, inputs), 1):
            parts.append(tokens[shared:])
            positions.append(np.arange(shared, len(tokens)))
            branches.append(np.full(len(tokens) - shared, number))
            nodes = np.concatenate([np.arange(shared), np.arange(end, end + len(tokens) - shared)])
            self.option_nodes.append(nodes[option.start - 1:])
            end += len(tokens) - shared
        self.tokens, self.positions, self.branches = (np.concatenate(x).astype(np.int64)
                                                      for x in (parts, positions, branches))


class TreeAttention(CausalAttention):
    """Attention within each tree of a row of trees, in which the trees of a batch follow one another.

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
        """The bias of each query and key of a tree, (B, H, S, S), from that of each query and position
        (1, H, N, n_keys)."""
        bias = self.pad(bias[0])                                            # (B, H, S, n_keys)
        keys = self.positions[:, None, None].expand(*bias.shape[:3], -1)    # (B, H, S, S)
        return bias.gather(3, keys)


def make_batches(examples, batch_size):
    """Lists of indices of examples of similar length, longest first. A batch has at most batch_size options,
    or one example."""
    def length(i):
        return sum(len(option.tokens) for option in examples[i])
    batches, count = [[]], 0
    for i in sorted(range(len(examples)), key=length, reverse=True):
        if batches[-1] and count + len(examples[i]) > batch_size:
            batches.append([])
            count = 0
        batches[-1].append(i)
        count += len(examples[i])
    return batches


@torch.no_grad()
def score_batch(model, examples, env):
    """A list of Scores for each example, a list of Options."""
    trees = [Tree(options) for options in examples]
    starts = np.cumsum([0, *(len(tree.tokens) for tree in trees)])
    nodes = [nodes + start for tree, start in zip(trees, starts) for nodes in tree.option_nodes]
    options = [option for example in examples for option in example]
    idx, positions, scored, targets = (
        torch.from_numpy(np.concatenate(arrays).astype(np.int64)).to(env.device) for arrays in (
            [tree.tokens for tree in trees], [tree.positions for tree in trees],
            nodes, [option.tokens[option.start:] for option in options]))
    with env.autocast(), decoding_attention(env.device):
        x = model.hidden(idx[None], [TreeAttention(trees, env.device)] * model.config.n_layer, positions)   # (1, N, C)
        logprobs, greedy = [], []
        for rows, ids in zip(x[0, scored].split(LOGIT_ROWS), targets.split(LOGIT_ROWS)):
            logits = model.logits(rows).float()                 # (up to LOGIT_ROWS, V)
            logprobs.append(logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(dim=1))
            greedy.append(logits.argmax(dim=1) == ids)
    logprobs, greedy = torch.cat(logprobs).double().cpu().numpy(), torch.cat(greedy).cpu().numpy()
    if not np.isfinite(logprobs).all():
        raise RunError(f'the model gives probabilities that are not finite numbers in {env.dtype}; '
                       f'try --dtype=float32, or an earlier checkpoint')
    scores, end = [], 0
    for example in examples:
        scores.append([])
        for option in example:
            begin, end = end, end + len(option.tokens) - option.start
            scores[-1].append(Score(float(logprobs[begin:end].sum()), end - begin,
                                    bool(greedy[begin:end].all()), bool(greedy[end - 1])))
    return scores


def score(model, examples, env, batch_size=32, progress=lambda items, total: items, should_stop=lambda: False):
    """A list of Scores for each example, a list of Options. Every rank calls it and gets all of them.

    The batches are the same for any number of ranks, so the results are too. progress: wraps the
    batches of this rank, as tqdm does. should_stop: asked after each batch, as often on every rank;
    where it is true, the result is None. The model's mode stays as it is, and no random number is drawn.
    """
    batches = make_batches(examples, batch_size)
    was_training, _ = model.training, model.eval()
    rounds, scores = -(-len(batches) // env.world_size), {}
    try:
        for i in progress(range(env.rank, rounds * env.world_size, env.world_size), rounds):
            if i < len(batches):
                scores.update(zip(batches[i], score_batch(model, [examples[j] for j in batches[i]], env)))
            if should_stop():
                return None
    finally:
        model.train(was_training)
    merged = {}
    for part in env.all_gather(scores):
        merged.update(part)
    return [merged[i] for i in range(len(examples))]
