"""What engine/ tells people: lines through Python's logging, and progress bars.

    log.info('note: the text is short')

`console` sets the handler of the logger `plaingpt`, which prints the lines as they are. A program
that imports engine/ without console gets them wherever its own logging sends them.
"""

import logging
import os
from collections.abc import Iterable, Iterator

log = logging.getLogger('plaingpt')


def is_main_process():
    """True on rank 0, which alone prints.

    torchrun sets both variables. A leftover RANK without WORLD_SIZE must not silence the error that
    refuses it.
    """
    return os.environ.get('RANK', '0') == '0' or os.environ.get('WORLD_SIZE', '1') == '1'


def progress_bar(text: str, items: Iterable, total: int, at_once: bool = False) -> Iterator:
    """The `total` items, with a bar on a terminal once they take two seconds.

    The bar disappears at the end. at_once: it shows before the first item is done, which may take
    long.
    """
    from tqdm import tqdm
    disable = None                      # tqdm: None shows the bar on a terminal only
    if not is_main_process():
        disable = True
    return tqdm(items, text, total, delay=0 if at_once else 2, leave=False, disable=disable)
