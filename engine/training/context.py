"""Another context length for weights that were trained with one."""

from pathlib import Path

from torch import nn

from engine.checkpoint.contents import Checkpoint
from engine.errors import UserError
from engine.log import log


def change_context(model: nn.Module, block_size: int, saved: Checkpoint | None) -> None:
    """Let a GPT read contexts of block_size tokens, and log what that means.

    saved: the state that the run goes on from, or None. drop_outgrown_optimizer says what becomes
    of its optimizer.
    Raises UserError where the number of learned positions would change and the state is in shards,
    which are read into tensors of the same shape.
    """
    context = model.config.block_size
    if block_size == context:
        return

    is_learned = model.config.position == 'learned'
    is_stretched = is_learned and block_size > context
    if is_learned and saved and saved.shards_folder:
        raise UserError(f'{saved.path} has shards of {context} positions, which cannot be changed '
                        f'to block_size={block_size}; begin a new run with its model, '
                        f'by --init_from={Path(saved.path).parent} and another --out_dir')

    model.resize_context(block_size)
    adapts = saved is not None and saved.base is not None
    if adapts and saved.model_args.get('block_size') == block_size:
        return          # only the base changes; the run has had this context before
    log.info(f'note: the weights have read contexts of {context} tokens, '
             f'and now read {block_size}')
    if not is_stretched:
        return

    log.info(f'note: the {context} learned positions are stretched to {block_size} by linear '
             f'interpolation, and need some training')
    if saved and saved.optimizer and not adapts:
        log.info('note: the optimizer starts afresh, as its moments are of fewer positions')


def drop_outgrown_optimizer(saved: Checkpoint, block_size: int) -> None:
    """Drop the optimizer of a state whose learned positions were stretched to block_size, because
    its moments are of fewer positions.

    An optimizer of adapters stays: it has no moments of positions. All ranks call this, as
    change_context may have run on one alone.
    """
    arguments = saved.model_args
    is_learned = arguments.get('position', 'learned') == 'learned'
    if is_learned and saved.base is None and arguments.get('block_size', block_size) < block_size:
        saved.optimizer = None
