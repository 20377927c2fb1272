"""Generation token by token, with key/value caches.

`GPT.generate` and `GPT.stream` call `stream`. It uses only model.hidden, model.logits and model.config.
"""

import math
from typing import NamedTuple

import torch

from engine.errors import UserError
from engine.generation.kv_cache import StaticKVCache, decoding_attention, new_caches
from engine.tokenizer import Tokenizer


class CompiledDecoder:
    """From one token to the next in one compiled graph: the model, its caches, the sampling, the position.

    Everything that the graph reads and writes stays at one address, so on a GPU it is recorded
    once as a CUDA graph: launching the small kernels of one token takes longer than running them.
    """

    def __init__(self, model, batch_size, positions, sampling):
        self.kv_caches = new_caches(model, batch_size, positions, StaticKVCache)
        device = self.kv_caches[0].keys.device
        self.token = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self.noise = torch.zeros(batch_size, 1, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.seen = new_seen(model, batch_size, sampling, device)
        for buffer in [self.token, self.noise, self.position, self.seen] + [
                buffer for cache in self.kv_caches for buffer in (cache.keys, cache.values)]:
            torch._dynamo.mark_static_address(buffer)

        def step(token, position, noise, seen, kv_caches):
            x = model.hidden(token, kv_caches, position)
            token.copy_(next_token(model, x, token, seen, noise, sampling))
            position.add_(1)
        self.step = torch.compile(step, mode='reduce-overhead', fullgraph=True, dynamic=False)

    def __call__(self, token, noise):
        """The tokens (B, 1) that follow `token` (B, 1), which follows what the caches hold."""
        self.token.copy_(token)
        self.noise.copy_(noise)
        self.position.fill_(self.kv_caches[0].length)
        for kv_cache in self.kv_caches:
            kv_cache.position = self.position
        # Each (batch size, cache size, options) compiles once; PyTorch's limit of 8 is for accidents.
        with torch._dynamo.config.patch(recompile_limit=1000):
            self.step(self.token, self.position, self.noise, self.seen, self.kv_caches)
        for kv_cache in self.kv_caches:
            kv_cache.position = None
            kv_cache.length += 1
        return self.token.clone()


@torch.inference_mode()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=1.0, noise=None, vocab_size=None,
           exact_window=False, compile=False, min_p=0.0, repetition_penalty=1.0):
    """Yield the next token of every sequence, (B,), max_new_tokens times, after idx (B, T).

    temperature: 0 takes the likeliest token. top_k: sample among the k likeliest; None or 0
    for all. top_p: sample among the likeliest that together reach this probability. min_p: and
    among those that are at least min_p times as likely as the likeliest (arXiv:2407.01082).
    repetition_penalty: divides a positive logit, and multiplies a negative one, of every token
    in idx or sampled since (arXiv:1909.05858); 1 changes none. noise: (B, max_new_tokens) uniform
    numbers in [0, 1), one for each token; None takes them from torch's global generator.
    vocab_size: larger ids (the padding of the embedding) are never sampled. compile: compile
    the step that reads one token. Raises UserError for bad options.

    A full cache does not slide, whatever the positions: learned ones belong to their places, and with
    rotary ones or ALiBi the keys that stay would still know what left the window. Once block_size is
    full, the model reads the last half of the window again and the cache goes on from there: one pass
    per half block. exact_window=True reads the whole last window again for every token instead.
    """
    if not temperature >= 0 or (top_k or 0) < 0 or not 0 < top_p <= 1:
        raise UserError(f'temperature={temperature} and top_k={top_k} should be 0 or more, '
                        f'top_p={top_p} should be above 0 and at most 1')
    if not 0 <= min_p <= 1 or not 0 < repetition_penalty < math.inf:
        raise UserError(f'min_p={min_p} should be from 0 to 1, repetition_penalty={repetition_penalty} above 0')
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, vocab_size)
    B, block_size = idx.size(0), model.config.block_size
    if noise is None:
        noise = torch.rand(B, max_new_tokens, device=idx.device)
    noise = noise.t().unsqueeze(2).contiguous()                 # (max_new_tokens, B, 1)
    window = unread = idx[:, -block_size:]
    positions = min(block_size, window.size(1) + max_new_tokens)
    if compile:
        positions = min(block_size, -(-positions // 256) * 256)     # few shapes to compile for
        decoder = compiled_decoder(model, B, positions, sampling)
        kv_caches, seen = decoder.kv_caches, decoder.seen.zero_()
    else:
        kv_caches, seen = new_caches(model, B, positions), new_seen(model, B, sampling, idx.device)
    if repetition_penalty != 1:
        seen.scatter_(1, idx, True)
    for kv_cache in kv_caches:
        kv_cache.length = 0
    for i in range(max_new_tokens):
        if kv_caches[0].length + unread.size(1) > block_size:
            unread = window[:, -(block_size if exact_window else -(-block_size // 2)):]
            for kv_cache in kv_caches:
                kv_cache.length = 0
        with decoding_attention(idx.device):
            if compile and kv_caches[0].length:
                unread = decoder(unread, noise[i])              # (B, 1)
            else:
                x = model.hidden(unread, kv_caches)
                unread = next_token(model, x, unread, seen, noise[i], sampling)
        window = torch.cat([window, unread], dim=1)[:, -block_size:]
        yield unread[:, 0]


def compiled_decoder(model, *shape_and_options):
    """The model's CompiledDecoder for these arguments. The model keeps the latest one, so that the next
    call with the same arguments neither compiles nor allocates."""
    if getattr(model, 'decoder_arguments', None) != shape_and_options:
        model.decoder_arguments, model.decoder = shape_and_options, CompiledDecoder(model, *shape_and_options)
    return model.decoder


class TextSampler:
    """Continues one prompt with the same random numbers each time, at sample.py's default temperature and top_k.

    spec: the tokenizer. Raises UserError for a prompt that it cannot encode.
    """

    def __init__(self, spec, prompt, max_new_tokens, seed):
        self.tokenizer, self.prompt = Tokenizer(spec), prompt
        try:
            self.ids = self.tokenizer.encode(prompt)
        except UserError as error:
            raise UserError(f'sample_prompt: {error}; or print no sample, with --sample_tokens=0') from None
        if not self.ids:
            raise UserError('sample_prompt is empty; give it a character to begin with')
        self.noise = torch.rand(1, max_new_tokens, generator=torch.Generator().manual_seed(seed))

    def __call__(self, model):
        """The prompt and its continuation. The model's mode and the global generators stay as they are."""
        device = next(model.parameters()).device
        was_training, _ = model.training, model.eval()
        idx = torch.tensor([self.ids], device=device)
        tokens = stream(model, idx, self.noise.size(1), 0.8, 200, noise=self.noise.to(device),
                        vocab_size=self.tokenizer.vocab_size)
        text = self.prompt + self.tokenizer.decode([token.item() for token in tokens])
        model.train(was_training)
        return text


class Sampling(NamedTuple):
    """The options of stream that choose a token."""
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float
    vocab_size: int | None


def new_seen(model, batch_size, sampling, device):
    """(B, V), where a token occurs in the text so far. Empty without a repetition penalty."""
    width = 0 if sampling.repetition_penalty == 1 else model.config.vocab_size
    return torch.zeros(batch_size, width, dtype=torch.bool, device=device)


def next_token(model, x, read, seen, noise, sampling):
    """The sampled tokens (B, 1), from hidden's x (B, T, C). read: the tokens (B, T) that it was computed from."""
    temperature, top_k, top_p, min_p, repetition_penalty, vocab_size = sampling
    logits = model.logits(x[:, -1]).float()[:, :vocab_size]     # (B, V)
    if repetition_penalty != 1:
        seen.scatter_(1, read, True)
        penalized = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen[:, :vocab_size], penalized, logits)
    return sample_token(logits, temperature, top_k, top_p, noise, min_p)[:, None]


def sample_token(logits, temperature, top_k, top_p, noise, min_p=0.0):
    """One token per row, (B,), from float32 logits (B, V). The same noise (B, 1) gives the same token."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    ids = None
    if top_k and top_k < logits.size(-1) or top_p < 1 or min_p:
        logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # descending
    # Subtracting the largest keeps a small temperature from overflowing; float32 has none below 1e-45.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, 1e-30)
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)          # (B, V or k)
    total = cumulative[:, -1:]
    if top_p < 1:                                               # nucleus sampling, arXiv:1904.09751
        fewest = torch.searchsorted(cumulative, total * top_p).clamp(max=cumulative.size(-1) - 1)
        total = cumulative.gather(1, fewest)
    if min_p:
        last = (logits >= math.log(min_p)).sum(dim=-1, keepdim=True) - 1
        total = torch.minimum(total, cumulative.gather(1, last))
    # The total differs from 1 by rounding; after the division, every noise below 1 finds a token.
    index = torch.searchsorted(cumulative / total, noise, right=True).clamp(max=logits.size(-1) - 1)
    return (index if ids is None else ids.gather(1, index))[:, 0]
