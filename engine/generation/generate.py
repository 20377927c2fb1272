"""Generation token by token, with key/value caches.

`GPT.generate` and `GPT.stream` call `stream`. It uses only model.hidden, model.logits and
model.config.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from engine.device import evaluation_mode
from engine.errors import UserError
from engine.generation.cpu import one_token_kernels
from engine.generation.kv_cache import (
    StaticKVCache,
    TextCache,
    decoding_attention,
    new_caches,
)
from engine.tokenizer import Tokenizer, TokenizerSpec

COMPILED_POSITIONS = 256        # a compiled cache is rounded up to a multiple, at most block_size
SAMPLE_TEMPERATURE = 0.8        # of TextSampler; the defaults of sample.py
SAMPLE_TOP_K = 200


class DrawOptions(NamedTuple):
    """The options of `stream` that decide how a token is drawn."""
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float
    vocab_size: int | None


class CompiledDecoder:
    """From one token to the next in one compiled graph: model, caches, sampling, position.

    Everything that the graph reads and writes stays at one address, so on a GPU it is recorded
    once as a CUDA graph: launching the small kernels of one token takes longer than running them.
    """

    def __init__(self, model: nn.Module, batch_size: int, positions: int, options: DrawOptions):
        self.kv_caches = new_caches(model, batch_size, positions, StaticKVCache)
        device = self.kv_caches[0].keys.device
        self.token = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self.noise = torch.zeros(batch_size, 1, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.seen = new_seen(model, batch_size, options, device)

        buffers = [self.token, self.noise, self.position, self.seen]
        for cache in self.kv_caches:
            buffers += [cache.keys, cache.values]
        for buffer in buffers:
            torch._dynamo.mark_static_address(buffer)

        def step(token, position, noise, seen, kv_caches):
            x = model.hidden(token, kv_caches, position)
            token.copy_(next_token(model, x, token, seen, noise, options))
            position.add_(1)

        self.step = torch.compile(step, mode='reduce-overhead', fullgraph=True, dynamic=False)

    def __call__(self, token: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The tokens (B, 1) that follow `token` (B, 1), which follows what the caches hold."""
        self.token.copy_(token)
        self.noise.copy_(noise)
        self.position.fill_(self.kv_caches[0].length)
        for kv_cache in self.kv_caches:
            kv_cache.position = self.position

        # Each (batch size, cache size, options) compiles once; PyTorch's limit of 8 is for
        # accidents.
        try:
            with torch._dynamo.config.patch(recompile_limit=1000):
                self.step(self.token, self.position, self.noise, self.seen, self.kv_caches)
        finally:                        # also after Ctrl-C: the model keeps this decoder
            for kv_cache in self.kv_caches:
                kv_cache.position = None

        for kv_cache in self.kv_caches:
            kv_cache.length += 1
        return self.token.clone()


@torch.inference_mode()
def stream(model: nn.Module, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0,
           top_k: int | None = None, top_p: float = 1.0, noise: torch.Tensor | None = None,
           vocab_size: int | None = None, exact_window: bool = False, compile: bool = False,
           min_p: float = 0.0, repetition_penalty: float = 1.0,
           prompt_rest: torch.Tensor | None = None,
           text_cache: TextCache | None = None) -> Iterator[torch.Tensor]:
    """Yield the next token of every sequence, (B,), max_new_tokens times, after idx (B, T).

    temperature: 0 takes the likeliest token.
    top_k: sample among the k likeliest; None or 0 for all.
    top_p: sample among the likeliest that together reach this probability.
    min_p: and among those that are at least min_p times as likely as the likeliest
    (arXiv:2407.01082).
    repetition_penalty: divides a positive logit, and multiplies a negative one, of every token
        in idx or sampled since (arXiv:1909.05858); 1 changes none.
    noise: (B, max_new_tokens) uniform numbers in [0, 1), one for each token; None takes them from
        torch's global generator.
    vocab_size: larger ids (the padding of the embedding) are never sampled.
    compile: compile the step that reads one token.
    prompt_rest: for prompts of different lengths, of which idx has the beginnings: (B, R) tokens
        that follow idx, and -1 from where on a sequence is sampled. They are read and yielded in
        place of sampled ones, so each sequence gets what it would get alone.
    text_cache: for one sequence that is not compiled: what of idx it holds is not read again. It
        then holds what was read, also if the caller takes fewer tokens.
    Raises UserError for bad options.

    A full cache does not slide. Learned positions belong to their places. With rotary positions
    and ALiBi, old keys were computed from tokens that have left the window. So once block_size
    is full, the model reads the last half of the window again, and the cache goes on from there:
    one pass per half block. exact_window=True reads the whole window again for every token.
    """
    options = DrawOptions(temperature, top_k, top_p, min_p, repetition_penalty, vocab_size)
    check_draw_options(options)
    B = idx.size(0)
    block_size = model.config.block_size
    if noise is None:
        noise = torch.rand(B, max_new_tokens, device=idx.device)
    noise = noise.t().unsqueeze(2).contiguous()                 # (max_new_tokens, B, 1)

    # caches for the text, or for a whole block where it is longer
    window = idx[:, -block_size:]
    unread = window                             # what the caches lack
    n_positions = min(block_size, window.size(1) + max_new_tokens)
    decoder = None
    if compile:
        n_positions = COMPILED_POSITIONS * math.ceil(n_positions / COMPILED_POSITIONS)
        decoder = compiled_decoder(model, B, min(block_size, n_positions), options)
        kv_caches = decoder.kv_caches
        seen = decoder.seen.zero_()
        empty(kv_caches)
    else:
        seen = new_seen(model, B, options, idx.device)
        if text_cache is None:
            kv_caches = new_caches(model, B, n_positions)

    # the caches of an earlier text, as far as it is the same
    if text_cache is not None:
        n_held = text_cache.common_length(window[0].tolist())
        text_cache.truncate(n_held)
        kv_caches = text_cache.kv_caches
        unread = window[:, n_held:]
    if repetition_penalty != 1:
        seen.scatter_(1, idx, True)

    # one token after the other
    n_read_again = block_size if exact_window else math.ceil(block_size / 2)
    for i in range(max_new_tokens):
        if kv_caches[0].length + unread.size(1) > block_size:
            unread = window[:, -n_read_again:]
            empty(kv_caches)
            if text_cache is not None:
                text_cache.ids.clear()

        with decoding_attention(idx.device):
            if decoder and kv_caches[0].length:
                unread = decoder(unread, noise[i])              # (B, 1)
            else:
                with one_token_kernels(unread):
                    x = model.hidden(unread, kv_caches)
                    if text_cache is not None:
                        text_cache.ids += unread[0].tolist()
                    unread = next_token(model, x, unread, seen, noise[i], options)
        if prompt_rest is not None and i < prompt_rest.size(1):
            given = prompt_rest[:, i:i + 1]                     # (B, 1)
            unread = torch.where(given < 0, unread, given)
        window = torch.cat([window, unread], dim=1)[:, -block_size:]
        yield unread[:, 0]


def check_draw_options(options):
    """UserError for an option that is out of its range."""
    if not options.temperature >= 0 or (options.top_k or 0) < 0 or not 0 < options.top_p <= 1:
        raise UserError(f'temperature={options.temperature} and top_k={options.top_k} should be '
                        f'0 or more, top_p={options.top_p} should be above 0 and at most 1')

    if not 0 <= options.min_p <= 1 or not 0 < options.repetition_penalty < math.inf:
        raise UserError(f'min_p={options.min_p} should be from 0 to 1, '
                        f'repetition_penalty={options.repetition_penalty} above 0')


def empty(kv_caches):
    for kv_cache in kv_caches:
        kv_cache.length = 0


def compiled_decoder(model, *shape_and_options):
    """The model's CompiledDecoder for these arguments. The model keeps the latest one, so that
    the next call with the same arguments neither compiles nor allocates."""
    if getattr(model, 'decoder_arguments', None) != shape_and_options:
        model.decoder_arguments = shape_and_options
        model.decoder = CompiledDecoder(model, *shape_and_options)
    return model.decoder


class TextSampler:
    """Continues one prompt with the same random numbers each time, at sample.py's default
    temperature and top_k.

    spec: the tokenizer. prompt: a newline becomes the tokenizer's default_prompt().
    Raises UserError for a prompt that it cannot encode.
    """

    def __init__(self, spec: TokenizerSpec, prompt: str, max_new_tokens: int, seed: int):
        self.tokenizer = Tokenizer(spec)
        if prompt == '\n':
            prompt = self.tokenizer.default_prompt()
        self.prompt = prompt
        try:
            self.ids = self.tokenizer.encode(prompt)
        except UserError as error:
            raise UserError(f'sample_prompt: {error}; or print no sample, '
                            f'with --sample_tokens=0') from None
        if not self.ids:
            raise UserError('sample_prompt is empty; give it a character to begin with')

        generator = torch.Generator().manual_seed(seed)
        self.noise = torch.rand(1, max_new_tokens, generator=generator)

    def __call__(self, model: nn.Module) -> str:
        """The prompt and its continuation. The model's mode and the global generators do not
        change."""
        device = next(model.parameters()).device
        idx = torch.tensor([self.ids], device=device)
        with evaluation_mode(model):
            tokens = stream(model, idx, self.noise.size(1), SAMPLE_TEMPERATURE, SAMPLE_TOP_K,
                            noise=self.noise.to(device), vocab_size=self.tokenizer.vocab_size)
            ids = [token.item() for token in tokens]
        return self.prompt + self.tokenizer.decode(ids)


# From logits to tokens

def new_seen(model, batch_size, options, device):
    """(B, V), where a token occurs in the text so far. Empty without a repetition penalty."""
    width = model.config.vocab_size
    if options.repetition_penalty == 1:
        width = 0
    return torch.zeros(batch_size, width, dtype=torch.bool, device=device)


def next_token(model, x, read, seen, noise, options):
    """The sampled tokens (B, 1), from hidden's x (B, T, C). read: its tokens (B, T)."""
    vocab_size = options.vocab_size
    penalty = options.repetition_penalty
    logits = model.logits(x[:, -1]).float()[:, :vocab_size]     # (B, V)
    if penalty != 1:
        seen.scatter_(1, read, True)
        penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen[:, :vocab_size], penalized, logits)
    tokens = sample_token(logits, options.temperature, options.top_k, options.top_p, noise,
                          options.min_p)
    return tokens[:, None]


def sample_token(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float,
                 noise: torch.Tensor, min_p: float = 0.0) -> torch.Tensor:
    """One token per row, (B,), from float32 logits (B, V). The same noise (B, 1) gives the same
    token."""
    if temperature == 0:
        return logits.argmax(dim=-1)

    # the candidates, the likeliest first where their order matters
    vocab_size = logits.size(-1)
    k = min(top_k or vocab_size, vocab_size)
    ids = None
    if k < vocab_size or top_p < 1 or min_p:
        logits, ids = logits.topk(k)

    # Subtracting the largest keeps a small temperature from overflowing. One below 1e-45 would be
    # 0 in float32, hence the floor.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, 1e-30)
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)          # (B, V or k)

    # the probability of all candidates up to the last one that may be sampled
    total = cumulative[:, -1:]
    if top_p < 1:                                               # nucleus sampling, arXiv:1904.09751
        last_by_top_p = torch.searchsorted(cumulative, total * top_p).clamp(max=k - 1)
        total = cumulative.gather(1, last_by_top_p)
    if min_p:
        last_by_min_p = (logits >= math.log(min_p)).sum(dim=-1, keepdim=True) - 1
        total = torch.minimum(total, cumulative.gather(1, last_by_min_p))

    # The total differs from 1 by rounding; after the division, every noise below 1 finds a token.
    index = torch.searchsorted(cumulative / total, noise, right=True).clamp(max=k - 1)
    if ids is not None:
        index = ids.gather(1, index)
    return index[:, 0]
