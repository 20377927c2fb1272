"""The command that trains on a dataset: a config for the size of its text and for this machine."""

import math
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

MOST_EPOCHS = 40            # a text is read at most so often, unless it has only a few tokens
FEWEST_ITERATIONS = 20
# of SMALL where tokens are no characters: a vocabulary of 50,000 makes each several times as long
MOST_ITERATIONS_OF_WORDS = 1000


@dataclass
class Recipe:
    """A config file, and what it says. tests/prepare/ holds these numbers to the file."""
    config: str
    tokens_per_iteration: int
    block_size: int
    max_iters: int
    warmup_iters: int
    most_epochs: int = MOST_EPOCHS
    flags: tuple[str, ...] = ()


SMALL = Recipe('train_stdlib_char', 12 * 128, 128, 2500, 100)
# what a GPU trains in minutes, and in hours
MEDIUM = Recipe('train_shakespeare_char', 64 * 256, 256, 5000, 100)
LARGE = Recipe('train_gpt2', 12 * 1024 * 40, 1024, 600_000, 2000, 4, ('--wandb_log=False',))
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
    return SMALL


def next_lines(
    dataset: str, tokens: dict[str, int], has_characters: bool, gpu: bool, answers: bool = False,
) -> list[str]:
    """Two lines: how often the next command reads the text, and the command for a shell.

    dataset: its name, or a path. tokens: how many 'train' and 'val' have. gpu: as of has_gpu().
    answers: only answers count in the loss, and an end-of-text token follows each.
    """
    recipe = choose_recipe(tokens['train'], has_characters, gpu)
    options = [f'--dataset={dataset}', f'--out_dir=out-{Path(dataset).name}', *recipe.flags]
    if answers:
        # The best val loss comes before a model knows the answers of train.bin by heart.
        options += ['--documents=whole', '--always_save_checkpoint=True']

    # a block needs the token after it, in either split
    block_size = recipe.block_size
    while block_size > 1 and block_size >= min(tokens.values()):
        block_size //= 2
    if block_size != recipe.block_size:
        options.append(f'--block_size={block_size}')
    tokens_per_iteration = recipe.tokens_per_iteration * block_size // recipe.block_size

    # fewer iterations than the file has, where the text is short or the vocabulary large
    most = math.ceil(recipe.most_epochs * tokens['train'] / tokens_per_iteration)
    iterations = min(recipe.max_iters, max(FEWEST_ITERATIONS, most))
    if recipe is SMALL and not has_characters:
        iterations = min(iterations, MOST_ITERATIONS_OF_WORDS)
    if iterations != recipe.max_iters:
        options += [f'--max_iters={iterations}', f'--lr_decay_iters={iterations}']
    if iterations < 5 * recipe.warmup_iters:
        options.append(f'--warmup_iters={iterations // 10}')

    read = iterations * tokens_per_iteration
    command = shlex.join(['python', 'train.py', f'config/{recipe.config}.py', *options])
    return [f'the next command reads {read:,} tokens, {read / tokens["train"]:.3g} epochs of '
            f'train.bin',
            f'next: {command}']

