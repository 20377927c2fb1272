"""Generate text from a trained model, or from GPT-2.

    python sample.py out-shakespeare-char
    python sample.py --init_from=gpt2-xl --start="The answer is" --num_samples=5
    python sample.py --out_dir=out --start=FILE:prompt.txt > out.txt

The text goes to stdout, everything else to stderr.
"""

import codecs
import sys
from pathlib import Path

from console import log_to, print0, print_text, report_errors  # before torch: see console.py

import torch
from tqdm import tqdm

import configurator
from engine.checkpoint.load_model import load_model
from engine.device import DTYPES, derive_seed
from engine.distributed import start_environment
from engine.errors import UserError
from engine.generation.cpu import optimize_for_generation
from engine.tokenizer import Tokenizer
from model import GPT

# model
init_from = 'resume'        # resume (the model in out_dir), the folder of a run, gpt2, gpt2-medium,
                            # gpt2-large, gpt2-xl, another hub name, or a folder of Hugging Face
                            # weights, with their tokenizer
out_dir = 'out'             # where ckpt.pt lies
# text
start = '\n'                # what to continue: text, or FILE:PATH
num_samples = 10
max_new_tokens = 500        # per sample
temperature = 0.8           # 1 samples as trained, less is safer, 0 takes the likeliest token
top_k = 200                 # sample among the k likeliest tokens; 0 among all
top_p = 1.0                 # sample among the likeliest tokens that make up this probability
min_p = 0.0                 # sample among tokens at least this times as likely as the likeliest;
                            # 0 among all
repetition_penalty = 1.0    # above 1 makes tokens that the text already has less likely
stop = ''                   # text that ends a sample, such as <|endoftext|>; it is not shown
max_batch = 64              # samples generated at once; lower it where memory is short
exact_window = False        # True reads the whole context again per token once it is full: slower
seed = 1337                 # fixes the random numbers of each sample; sums round differently with
                            # num_samples and max_batch, which may change a text
# machine
device = 'auto'             # auto, cuda, cuda:1, mps or cpu
dtype = 'auto'              # auto, float32, bfloat16 or float16
compile = False             # True compiles the decoding step; worth its minute on a GPU

MAX_PROMPT_BYTES = 1 << 26


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
    except (OSError, ValueError) as error:
        raise UserError(f'the prompt {text[5:]!r} cannot be read: {error}') from None


def encode_prompt(prompt, tokenizer):
    """The ids that the model continues: at least one."""
    try:
        ids = tokenizer.encode(prompt)
    except UserError as error:
        raise UserError(f'start: {error}') from None

    if ids:
        return ids
    if tokenizer.end_of_text is None:
        raise UserError('start is empty, and this model needs something to begin with; '
                        'try --start="A"')
    return [tokenizer.end_of_text]                      # a document begins after this token


class Text:
    """One sample as it grows: whole characters only, and nothing from `stop` on."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')
        self.text = ''
        self.n_shown = 0                                # characters of the text
        self.ended = False

    def add(self, token, last):
        """Append a sampled token. last: no more tokens follow."""
        if self.ended:
            return
        self.text += self.decoder.decode(self.tokenizer.decode_bytes([token]), final=last)
        self.ended = last
        if stop and stop in self.text:
            self.text = self.text[:self.text.index(stop)]
            self.ended = True

    def new_part(self):
        """What can be shown and was not yet. The end of the text may still turn out to begin
        `stop`."""
        end = len(self.text)
        if not self.ended and stop:
            end = max(self.n_shown, end - (len(stop) - 1))
        part = self.text[self.n_shown:end]
        self.n_shown = end
        return part


def check_settings():
    check = configurator.check_range
    check(globals(), 'num_samples max_new_tokens max_batch', 1, 10 ** 7)
    check(globals(), 'temperature top_k', 0, below=float('inf'))
    check(globals(), 'top_p', above=0, high=1)
    check(globals(), 'min_p', 0, high=1)
    check(globals(), 'repetition_penalty', above=0, below=float('inf'))
    check(globals(), 'seed', 0, 2 ** 63 - 1)


def draw_noise(first, count):
    """The random numbers of the samples from number `first` on, (count, max_new_tokens)."""
    rows = []
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(derive_seed(seed, 'sample', number))
        rows.append(torch.rand(max_new_tokens, generator=generator))
    return torch.stack(rows)


def generate_texts(model, tokenizer, ids, first, count, env, bar, is_live):
    """The `count` Texts of the samples from number `first` on. is_live: print the only one as it
    grows."""
    texts = [Text(tokenizer) for _ in range(count)]
    idx = torch.tensor([ids] * count, device=env.device)
    steps = model.stream(idx, max_new_tokens, temperature, top_k, top_p,
                         noise=draw_noise(first, count).to(env.device), min_p=min_p,
                         repetition_penalty=repetition_penalty, vocab_size=tokenizer.vocab_size,
                         exact_window=exact_window, compile=env.compile)

    for n, tokens in enumerate(steps, 1):
        for text, token in zip(texts, tokens.tolist()):
            text.add(token, last=n == max_new_tokens)
        if is_live:
            print(texts[0].new_part(), end='', flush=True)
        bar.update(count)
        if all(text.ended for text in texts):
            break
    return texts


def main(overrides):
    check_settings()
    env = start_environment(device, dtype, compile)

    # the model and its prompt
    model, spec, _ = load_model(GPT, init_from, out_dir)
    tokenizer = Tokenizer(spec)
    prompt = read_prompt(start)
    ids = encode_prompt(prompt, tokenizer)
    if len(ids) > model.config.block_size:
        print_text(f'note: the prompt has {len(ids):,} tokens, the model reads its last '
                   f'{model.config.block_size:,}', file=sys.stderr)
    print0(configurator.describe_settings(overrides), file=sys.stderr)
    print_text(env.summary, file=sys.stderr)

    # the model on its device
    model.to(env.device, DTYPES[env.dtype]).eval()
    if env.device.type == 'cpu' and not env.compile:    # the compiler chooses layouts itself
        optimize_for_generation(model, min(num_samples, max_batch))

    # samples, max_batch at a time
    if hasattr(sys.stdout, 'reconfigure'):              # a notebook has another kind of stdout
        sys.stdout.reconfigure(errors='replace')        # a pipe on Windows lacks some characters
    is_live = sys.stdout.isatty() and num_samples == 1
    disable = True if is_live else None         # tqdm: None shows the bar on a terminal only
    bar = tqdm(total=num_samples * max_new_tokens, unit='token', disable=disable)
    for first in range(0, num_samples, max_batch):
        count = min(max_batch, num_samples - first)
        if is_live:
            print(prompt, end='', flush=True)
        texts = generate_texts(model, tokenizer, ids, first, count, env, bar, is_live)
        bar.clear()
        for text in texts:
            if not is_live:
                print(prompt + text.text, end='')
            print('\n---------------', flush=True)
    bar.close()


if __name__ == '__main__':
    log_to('stderr')
    with report_errors():
        main(configurator.configure(globals(), sys.argv[1:], path_setting='out_dir'))
