"""Another context length for weights that were trained with one."""

from pathlib import Path

from torch import nn

from engine.checkpoint.contents import Checkpoint
from engine.errors import UserError
from engine.log import log


def change_context(model: nn.Module, block_size: int, saved: Checkpoint | None) -> None:
    """Let a GPT read contexts of block_size tokens, and log what that means.

    saved: the state that the run goes on from, or None. If learned positions are stretched, its
    optimizer is dropped, as the moments of positions are too few. An optimizer of adapters stays:
    it has no moments of positions.
    Raises UserError where positions would be stretched and the optimizer is in shards, of which no
    part can be dropped alone.
    """
    context = model.config.block_size
    if block_size == context:
        return

    is_stretched = block_size > context and model.config.position == 'learned'
    if is_stretched and saved and saved.shards_folder:
        raise UserError(f'{saved.path} has shards of {context} positions, which cannot be '
                        f'stretched to block_size={block_size}; begin a new run with its model, '
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
        saved.optimizer = None
        log.info('note: the optimizer starts afresh, as its moments are of fewer positions')
