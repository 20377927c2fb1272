"""The loss of a model on a split of a dataset."""

import math

import torch

from engine.dataloader.batches import TokenDataset, eval_batches
from engine.distributed import Environment
from engine.errors import UserError
from engine.log import progress_bar


@torch.no_grad()
def mean_loss(
    model: torch.nn.Module, data: TokenDataset, split: str, eval_iters: int, batch_size: int,
    env: Environment,
) -> float | None:
    """The mean loss, in nats, over the targets that count in eval_iters batches of batch_size.

    The ranks share the batches, which are the same each time. Returns None if a signal reached any
    rank. Raises UserError where no target counts.
    """
    n_batches = math.ceil(eval_iters / env.world_size)              # of each rank
    n_own = len(range(env.rank, eval_iters, env.world_size))        # those that repeat no other
    total = torch.zeros(2, device=env.device)           # of the losses, and of their weights

    batches = eval_batches(data, split, eval_iters, batch_size, env)
    bar = progress_bar(f'evaluating on {split}', batches, n_batches, at_once=env.compile)
    for i, (x, y, weight) in enumerate(bar):
        with env.autocast():
            loss = model(x, y)[1]
        if i < n_own:
            total[0] += loss * weight
            total[1] += weight

        # on every rank, or on none; several ranks wait for one another, so they ask seldom
        if (env.world_size == 1 or i % 10 == 0) and env.stop_signal():
            return None

    loss_sum, weight_sum = env.all_reduce(total).tolist()
    if not weight_sum:
        raise UserError(f'no target counts in the {eval_iters} batches that evaluate the {split} '
                        f'split of {data.name}; try --eval_iters={10 * eval_iters}')
    return loss_sum / weight_sum
