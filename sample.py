"""Generate text from a trained model, or from GPT-2.

    python sample.py out-shakespeare-char
    python sample.py --init_from=gpt2-xl --start="The answer is" --num_samples=5
    python sample.py --out_dir=out --start=FILE:prompt.txt > out.txt
    python sample.py --out_dir=out --prompts=FILE.jsonl --out=answers.jsonl

The text goes to stdout, everything else to stderr.
"""

import os
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from console import log_to, print0, print_text, report_errors  # before torch: see console.py

import torch
from tqdm import tqdm

import configurator
from engine import chat_layout
from engine.atomic_files import advice_on, atomic_write
from engine.checkpoint.load_model import load_model
from engine.device import DTYPES, derive_seed
from engine.distributed import start_environment
from engine.errors import RunError, UserError
from engine.generation.cpu import optimize_for_generation
from engine.generation.prompt_file import Prompt, answer_line, read_prompts
from engine.generation.text import Text
from engine.tokenizer import Tokenizer
from model import GPT

# model
init_from = 'resume'        # resume (the model in out_dir), the folder of a run, gpt2, gpt2-medium,
                            # gpt2-large, gpt2-xl, another hub name, or a folder of Hugging Face
                            # weights, with their tokenizer
out_dir = 'out'             # where ckpt.pt lies; or a kept model, as out/ckpt_001000.pt
# text
start = '\n'                # what to continue: text, or FILE:PATH
prompts = ''                # file of prompts to answer, with lines such as {"prompt": "The sky is"}
out = ''                    # file to write the answers to, as JSON lines
num_samples = 10            # of start; of each prompt in a file, 1 unless it is named
max_new_tokens = 500        # per sample
temperature = 0.8           # 1 samples as trained, less is safer, 0 takes the likeliest token
top_k = 200                 # sample among the k likeliest tokens; 0 among all
top_p = 1.0                 # sample among the likeliest tokens that make up this probability
min_p = 0.0                 # sample among tokens at least this times as likely as the likeliest;
                            # 0 among all
repetition_penalty = 1.0    # above 1 makes tokens that the text already has less likely
stop = ''                   # text that ends a sample, such as <|endoftext|>; it is not shown
chat = False                # True takes a prompt as what a user says, and samples the assistant's
                            # answer, with a model that is trained on conversations
max_batch = 64              # samples generated at once; lower it where memory is short
exact_window = False        # True reads the whole context again per token once it is full: slower
seed = 1337                 # fixes the random numbers of each sample; sums round differently with
                            # num_samples and max_batch, which may change a text
# machine
device = 'auto'             # auto, cuda, cuda:1, mps or cpu
dtype = 'auto'              # auto, float32, bfloat16 or float16
compile = False             # True compiles the decoding step; worth its minute on a GPU

MAX_PROMPT_BYTES = 1 << 26
BATCHES_AT_ONCE = 16        # answers to a file are made and held in groups of so many batches


def read_prompt(text):
    """The text to continue, from a file if `text` is FILE:PATH."""
    if not text.startswith('FILE:'):
        return text

    path = Path(text.removeprefix('FILE:'))
    try:
        if not path.exists():
            raise UserError('there is no such file')
        if not path.is_file():
            raise UserError('it is not a regular file')
        if path.stat().st_size > MAX_PROMPT_BYTES:
            raise UserError(f'it has over {MAX_PROMPT_BYTES >> 20} MiB')
        return path.read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        raise UserError(f'the prompt {text[5:]!r} is not UTF-8 at byte {error.start:,}; save it '
                        f'as UTF-8') from None
    except (OSError, ValueError) as error:
        raise UserError(f'the prompt {text[5:]!r} cannot be read: {error}') from None


@dataclass
class Prompter:
    """How a model is asked, and where its answers end."""
    tokenizer: Tokenizer
    layout: chat_layout.ChatLayout | None   # of its conversations, with --chat=True
    ending: str                             # text that ends a sample; '' where nothing does

    def encode(self, prompt, where='start', example='--start="A"'):
        """The ids that the model continues: at least one.

        where: what an error says about the prompt's place. example: one that is not empty.
        """
        try:
            if self.layout:
                turn = chat_layout.Turn('user', prompt)
                return chat_layout.encode_prompt(self.tokenizer, self.layout.prompt([turn]))
            ids = self.tokenizer.encode(prompt)
        except UserError as error:
            raise UserError(f'{where}: {error}') from None

        if ids:
            return ids
        if self.tokenizer.end_of_text is None:
            raise UserError(f'{where} is empty, and this model needs something to begin with; '
                            f'try {example}')
        return [self.tokenizer.end_of_text]             # a document begins after this token


def make_prompter(loaded):
    """The Prompter of a LoadedModel, as the settings say."""
    tokenizer = Tokenizer(loaded.spec)
    if not chat:
        return Prompter(tokenizer, None, stop)
    if loaded.chat is None:
        raise UserError('this model was trained on no conversations, so it has no layout for '
                        '--chat=True; leave it out')
    return Prompter(tokenizer, loaded.chat, stop or loaded.chat.end)


def check_settings(overrides):
    check = configurator.check_range
    check(globals(), 'num_samples max_new_tokens max_batch', 1, 10 ** 7)
    check(globals(), 'temperature top_k', 0, below=float('inf'))
    check(globals(), 'top_p', above=0, high=1)
    check(globals(), 'min_p', 0, high=1)
    check(globals(), 'repetition_penalty', above=0, below=float('inf'))
    check(globals(), 'seed', 0, 2 ** 63 - 1)

    if prompts and not out:
        raise UserError('prompts needs a file for the answers, as in --out=answers.jsonl')
    if out and not prompts:
        raise UserError('out is for the answers to a file of prompts; name it with '
                        '--prompts=FILE.jsonl')
    if prompts and 'start' in overrides:
        raise UserError('start and prompts are both named; name one')
    if out and os.path.realpath(out) == os.path.realpath(prompts):
        raise UserError(f'prompts and out are the same file, {out}; name another one for the '
                        f'answers')
    if chat and not prompts and 'start' not in overrides:
        raise UserError('chat=True needs a message; try --start="Hello"')
    if out and (Path(out).is_dir() or not Path(out).absolute().parent.is_dir()):
        raise UserError(f'out={out!r} should be a file in a folder that exists')


class Sequence(NamedTuple):
    """A text to generate."""
    ids: list[int]              # of its prompt
    number: int                 # of the sample; it fixes the random numbers


def pad_prompts(sequences):
    """What prompts of different lengths give `GPT.stream`, for B sequences.

    Returns (idx (B, T), the beginnings, as long as the shortest prompt; prompt_rest (B, R), what
    follows of the others, then -1; noise (B, R + max_new_tokens)).
    """
    shortest = min(len(sequence.ids) for sequence in sequences)
    longest = max(len(sequence.ids) for sequence in sequences)
    idx = torch.tensor([sequence.ids[:shortest] for sequence in sequences])
    prompt_rest = torch.full((len(sequences), longest - shortest), -1)
    noise = torch.zeros(len(sequences), longest - shortest + max_new_tokens)

    for i, sequence in enumerate(sequences):
        rest = sequence.ids[shortest:]
        prompt_rest[i, :len(rest)] = torch.tensor(rest)
        generator = torch.Generator().manual_seed(derive_seed(seed, 'sample', sequence.number))
        noise[i, len(rest):len(rest) + max_new_tokens] = torch.rand(
            max_new_tokens, generator=generator)
    return idx, prompt_rest, noise


def generate_texts(model, prompter, sequences, env, bar, is_live=False):
    """The Texts of Sequences, at most max_batch. is_live: print the only one as it grows."""
    texts = [Text(prompter.tokenizer, prompter.ending) for _ in sequences]
    vocab_size = prompter.tokenizer.vocab_size
    idx, prompt_rest, noise = (tensor.to(env.device) for tensor in pad_prompts(sequences))
    steps = model.stream(idx, noise.size(1), temperature, top_k, top_p, noise=noise, min_p=min_p,
                         repetition_penalty=repetition_penalty, vocab_size=vocab_size,
                         exact_window=exact_window, compile=env.compile, prompt_rest=prompt_rest)

    for step, tokens in enumerate(steps, 1):
        for text, sequence, token in zip(texts, sequences, tokens.tolist()):
            n = step - (len(sequence.ids) - idx.size(1))    # sampled tokens of this text
            if 0 < n <= max_new_tokens:
                text.add(token, last=n == max_new_tokens)
                bar.update()
        if is_live:
            print(texts[0].new_part(), end='', flush=True)
        if all(text.ended for text in texts):
            break
    return texts


# A file of prompts

class Question(NamedTuple):
    """A prompt that is answered once."""
    prompt: Prompt
    sample: int                 # number of the answer among those to the prompt, from 0
    sequence: Sequence


def read_questions(prompter, block_size, n_answers):
    """Yield the Questions of the file `prompts`, in its order, n_answers for each prompt."""
    number = 0
    for prompt in read_prompts(prompts):
        ids = prompter.encode(prompt.text, prompt.where, 'a prompt such as "A"')
        for sample in range(n_answers):
            yield Question(prompt, sample, Sequence(ids[-block_size:], number))
            number += 1


def answer_lines(model, prompter, questions, env, bar):
    """Yield a line of JSON for each of the Questions, in their order, in bounded memory.

    A batch has prompts of nearly the same length, as those that are shorter generate until the
    longest is done.
    """
    questions = iter(questions)
    while group := list(islice(questions, BATCHES_AT_ONCE * max_batch)):
        by_length = sorted(range(len(group)), key=lambda i: len(group[i].sequence.ids))
        answers = {}                                # {place in the group: text}
        for begin in range(0, len(group), max_batch):
            places = by_length[begin:begin + max_batch]
            sequences = [group[i].sequence for i in places]
            texts = generate_texts(model, prompter, sequences, env, bar)
            answers.update(zip(places, [text.text for text in texts]))
        for i, question in enumerate(group):
            yield answer_line(question.prompt, answers[i], question.sample)


def write_answers(model, prompter, n_questions, n_answers, env):
    """Write `out`, whole or not at all."""
    bar = tqdm(total=n_questions * max_new_tokens, unit='token', disable=None)
    questions = read_questions(prompter, model.config.block_size, n_answers)
    try:
        with atomic_write(out) as file:
            file.writelines(answer_lines(model, prompter, questions, env, bar))
    except (OSError, UnicodeEncodeError) as error:
        raise RunError(f'{out} was not written ({error}); {advice_on(error)}') from None
    bar.close()
    print_text(f'wrote {n_questions:,} answers to {out}', file=sys.stderr)


def check_prompts(prompter, block_size):
    """How many prompts the file has. UserError for one that cannot be answered."""
    count = 0
    n_too_long = 0
    for prompt in read_prompts(prompts):
        ids = prompter.encode(prompt.text, prompt.where, 'a prompt such as "A"')
        count += 1
        n_too_long += len(ids) > block_size
    if n_too_long:
        print_text(f'note: {n_too_long:,} of {count:,} prompts have more than {block_size:,} '
                   f'tokens; the model reads their last {block_size:,}', file=sys.stderr)
    return count


# Samples of one prompt

def print_samples(model, prompter, prompt, ids, env):
    """Print num_samples texts that continue a prompt, max_batch at a time."""
    if hasattr(sys.stdout, 'reconfigure'):              # a notebook has another kind of stdout
        sys.stdout.reconfigure(errors='replace')        # a pipe on Windows lacks some characters
    is_live = sys.stdout.isatty() and num_samples == 1
    disable = True if is_live else None         # tqdm: None shows the bar on a terminal only
    bar = tqdm(total=num_samples * max_new_tokens, unit='token', disable=disable)

    for first in range(0, num_samples, max_batch):
        numbers = range(first, min(first + max_batch, num_samples))
        if is_live:
            print(prompt, end='', flush=True)
        sequences = [Sequence(ids, number) for number in numbers]
        texts = generate_texts(model, prompter, sequences, env, bar, is_live)
        bar.clear()
        for text in texts:
            if not is_live:
                print(prompt + text.text, end='')
            print('\n---------------', flush=True)
    bar.close()


def main(overrides):
    """overrides: the settings that a config file or a flag named."""
    log_to('stderr')
    check_settings(overrides)
    env = start_environment(device, dtype, compile)

    # the model and its prompt, or its file of prompts
    loaded = load_model(GPT, init_from, out_dir)
    model = loaded.model
    prompter = make_prompter(loaded)
    block_size = model.config.block_size
    n_texts = num_samples
    if prompts:
        n_answers = num_samples if 'num_samples' in overrides else 1
        n_texts = n_answers * check_prompts(prompter, block_size)
    else:
        prompt = read_prompt(start)
        if start == '\n' and 'start' not in overrides:
            prompt = prompter.tokenizer.default_prompt()
        ids = prompter.encode(prompt)
        if chat:
            prompt += '\n'                              # shown before the answer
        if len(ids) > block_size:
            print_text(f'note: the prompt has {len(ids):,} tokens, the model reads its last '
                       f'{block_size:,}', file=sys.stderr)
    print0(configurator.describe_settings(overrides), file=sys.stderr)
    print_text(env.summary, file=sys.stderr)
    if loaded.description:
        print_text(loaded.description, file=sys.stderr)

    # the model on its device
    model.to(env.device, DTYPES[env.dtype]).eval()
    if env.device.type == 'cpu' and not env.compile:    # the compiler chooses layouts itself
        optimize_for_generation(model, min(n_texts, max_batch))

    if prompts:
        write_answers(model, prompter, n_texts, n_answers, env)
    else:
        print_samples(model, prompter, prompt, ids, env)


if __name__ == '__main__':
    with report_errors():
        main(configurator.configure(globals(), sys.argv[1:], path_setting='out_dir'))
