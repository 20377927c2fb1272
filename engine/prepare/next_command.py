"""The command that trains on a dataset: a config that fits the size of its text and this machine."""

import math
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

MOST_EPOCHS = 40            # a text is read at most so often, but in FEWEST_ITERATIONS
FEWEST_ITERATIONS = 100


@dataclass
class Recipe:
    """A config file, and what it says. tests/prepare/ holds these numbers to the file."""
    config: str
    tokens_per_iteration: int
    block_size: int
    max_iters: int
    most_epochs: int = MOST_EPOCHS
    flags: tuple[str, ...] = ()


SMALL = Recipe('train_stdlib_char', 12 * 128, 128, 2500)
# A vocabulary of 50,000 tokens makes an iteration several times as long.
SMALL_WITH_WORDS = Recipe('train_stdlib_char', 12 * 128, 128, 1000)
# what a GPU trains in minutes, and in hours
MEDIUM = Recipe('train_shakespeare_char', 64 * 256, 256, 5000)
LARGE = Recipe('train_gpt2', 12 * 1024 * 40, 1024, 600_000, 4, ('--wandb_log=False',))
# tokens of a text that is worth it
ENOUGH_FOR_MEDIUM = 500_000
ENOUGH_FOR_LARGE = 100_000_000


def has_gpu() -> bool:
    """True where NVIDIA's driver runs, as far as one can tell without PyTorch."""
    return Path('/dev/nvidiactl').exists() or shutil.which('nvidia-smi') is not None


def choose_recipe(train_tokens: int, has_characters: bool, gpu: bool) -> Recipe:
    """The Recipe for a text. has_characters: its tokens are characters."""
    if gpu and train_tokens >= ENOUGH_FOR_LARGE and not has_characters:
        return LARGE
    if gpu and train_tokens >= ENOUGH_FOR_MEDIUM:
        return MEDIUM
    if has_characters:
        return SMALL
    return SMALL_WITH_WORDS


def next_lines(dataset: str, tokens: dict[str, int], has_characters: bool, gpu: bool) -> list[str]:
    """Two lines: how often the next command reads the text, and the command for a shell.

    dataset: its name. tokens: how many 'train' and 'val' have. gpu: as of has_gpu().
    """
    recipe = choose_recipe(tokens['train'], has_characters, gpu)
    options = [f'--dataset={dataset}', f'--out_dir=out-{dataset}', *recipe.flags]

    # a block needs the token after it, in either split
    block_size = recipe.block_size
    while block_size > 1 and block_size >= min(tokens.values()):
        block_size //= 2
    if block_size != recipe.block_size:
        options.append(f'--block_size={block_size}')
    tokens_per_iteration = recipe.tokens_per_iteration * block_size // recipe.block_size

    most = recipe.most_epochs * tokens['train'] / tokens_per_iteration
    iterations = min(recipe.max_iters, max(FEWEST_ITERATIONS, math.ceil(most)))
    if iterations != read_max_iters(recipe):
        options += [f'--max_iters={iterations}', f'--lr_decay_iters={iterations}']

    read = iterations * tokens_per_iteration
    command = shlex.join(['python', 'train.py', f'config/{recipe.config}.py', *options])
    return [f'the next command reads {read:,} tokens, {read / tokens["train"]:.3g} epochs of '
            f'train.bin',
            f'next: {command}']


def read_max_iters(recipe):
    """The iterations that the recipe's config file has by itself."""
    if recipe is SMALL_WITH_WORDS:
        return SMALL.max_iters
    return recipe.max_iters
