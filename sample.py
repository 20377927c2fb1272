"""Generate text from a trained model, or from GPT-2.

    python sample.py --out_dir=out-shakespeare-char
    python sample.py --init_from=gpt2-xl --start="What is the answer?" --num_samples=5
    python sample.py --start=FILE:prompt.txt
"""

import codecs
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
import configurator
import runtime
from dataloader import GPT2, Tokenizer, check_tokenizer, dataset_tokenizer
from decoding import lay_out
from model import GPT

# model
init_from = 'resume'        # resume (out_dir's ckpt.pt), gpt2, gpt2-medium, gpt2-large, gpt2-xl,
                            # or a folder of Hugging Face weights
out_dir = 'out'             # where ckpt.pt lies
# text
start = '\n'                # what to continue: text, or FILE:PATH
num_samples = 10
max_new_tokens = 500        # per sample
temperature = 0.8           # 1 samples as trained, less is safer, 0 takes the likeliest token
top_k = 200                 # draw among the k likeliest tokens; 0 among all
top_p = 1.0                 # draw among the likeliest tokens that make up this probability
stop = ''                   # text that ends a sample, such as <|endoftext|>; it is not shown
max_batch = 64              # samples generated at once; lower it where memory is short
exact_window = False        # True reads the whole context again per token once it is full: slower
seed = 1337                 # sample i depends on this and i alone
# machine
device = 'auto'             # auto, cuda, cuda:1, mps or cpu
dtype = 'auto'              # auto, float32, bfloat16 or float16
compile = False             # True compiles the decoding step; worth its minute on a GPU


def load():
    """The model, and what tokenizer it has: the checkpoint's, else its dataset's, else GPT-2's."""
    if init_from != 'resume':
        return GPT.from_pretrained(init_from), GPT2
    saved = checkpoint.load_model(out_dir)
    # files of the family carry no tokenizer, but name the dataset that has it
    spec = saved.get('tokenizer') or dataset_tokenizer((saved.get('config') or {}).get('dataset'))
    return checkpoint.build_model(saved, dropout=0.0), check_tokenizer(spec)


def read_prompt(text):
    if not text.startswith('FILE:'):
        return text
    try:
        return Path(text[5:]).read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f'the prompt {text[5:]!r} cannot be read: {error}') from None


class Text:
    """One sample as it grows: whole characters only, and nothing from `stop` on."""

    def __init__(self, tokenizer):
        self.tokenizer, self.text, self.shown, self.ended = tokenizer, '', 0, False
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')

    def add(self, token, last):
        if not self.ended:
            self.text += self.decoder.decode(self.tokenizer.decode_bytes([token]), final=last)
            before, found, _ = self.text.partition(stop) if stop else (self.text, '', '')
            self.text, self.ended = before, bool(found) or last

    def fresh(self):
        """What can be shown that was not yet: the end may still turn out to begin `stop`."""
        end = len(self.text) if self.ended else max(self.shown, len(self.text) - max(0, len(stop) - 1))
        piece, self.shown = self.text[self.shown:end], end
        return piece


def main():
    for name, low in (('num_samples', 1), ('max_new_tokens', 1), ('temperature', 0), ('top_k', 0), ('seed', 0),
                      ('max_batch', 1)):
        if not globals()[name] >= low:
            raise ValueError(f'{name}={globals()[name]} should be {low} or more')
    if not 0 < top_p <= 1:
        raise ValueError(f'top_p={top_p} should be above 0 and at most 1')
    rt = runtime.start(device, dtype, compile, seed=seed)
    model, spec = load()
    if spec['vocab_size'] > model.config.vocab_size:
        raise ValueError(f'the tokenizer has {spec["vocab_size"]} tokens and the model {model.config.vocab_size}, so they '
                         f'do not belong together; prepare the dataset that the model was trained on in data/ first')
    tokenizer, prompt = Tokenizer(spec), read_prompt(start)
    ids = tokenizer.encode(prompt)
    if not ids and not tokenizer.bpe:
        raise ValueError('start is empty, and this model needs a character to begin with; try --start="A"')
    ids = ids or [tokenizer.bpe.eot_token]              # GPT-2 begins a document after this token
    block_size = model.config.block_size
    if len(ids) > block_size:
        print(f'note: the prompt has {len(ids):,} tokens, the model reads its last {block_size:,}', file=sys.stderr)
    print(rt.summary, file=sys.stderr)
    sys.stdout.reconfigure(errors='replace')            # a pipe on Windows has not every character
    model.to(rt.device, runtime.DTYPES[rt.dtype]).eval()
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p, exact_window=exact_window, compile=rt.compile,
                   vocab_size=tokenizer.vocab_size)
    if rt.device.type == 'cpu' and not rt.compile:      # the compiler lays out for itself
        lay_out(model, min(num_samples, max_batch))
    live = sys.stdout.isatty() and num_samples == 1
    bar = tqdm(total=num_samples * max_new_tokens, unit='token', disable=True if live else None)
    for first in range(0, num_samples, max_batch):
        count = min(max_batch, num_samples - first)
        noise = torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(
            runtime.derive_seed(seed, 'sample', first + i))) for i in range(count)])
        texts = [Text(tokenizer) for _ in range(count)]
        if live:
            print(prompt, end='', flush=True)
        idx = torch.tensor([ids] * count, device=rt.device)
        for n, tokens in enumerate(model.stream(idx, max_new_tokens, noise=noise.to(rt.device), **options), 1):
            for text, token in zip(texts, tokens.tolist()):
                text.add(token, last=n == max_new_tokens)
            if live:
                print(texts[0].fresh(), end='', flush=True)
            bar.update(count)
            if all(text.ended for text in texts):
                break
        bar.clear()
        for text in texts:
            print('' if live else prompt + text.text, '\n---------------', sep='')
    bar.close()


if __name__ == '__main__':
    with configurator.plain_errors():
        configurator.configure(globals(), sys.argv[1:])
        main()
