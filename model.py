"""GPT-2: configuration, layers, forward pass, loading and saving of weights.

Parameter names and shapes are nanoGPT's (`transformer.wte.weight`,
`transformer.h.0.attn.c_attn.weight`, ...), so checkpoints load in both projects.

Shapes: B sequences, T positions, C channels, H heads, D = C / H, V vocabulary.
Sources: Radford et al. 2019 (GPT-2); Press & Wolf 2017 (tied embedding, arXiv:1608.05859).
"""

import math
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from engine.errors import UserError


NANOGPT_ARGS = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias')


@dataclass
class GPTConfig:
    """The shape of a GPT. UserError for a shape that cannot be built."""
    block_size: int = 1024      # longest context, tokens
    vocab_size: int = 50304     # GPT-2's 50257 rounded up to a multiple of 64, for fast matrix products
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True           # in Linears and LayerNorms
    activation: str = 'gelu'    # 'gelu' is exact, as in nanoGPT; 'gelu_tanh' is the approximation in OpenAI's weights

    def __post_init__(self):
        limits = dict(block_size=2 ** 24, vocab_size=2 ** 24, n_layer=1000, n_head=2 ** 17, n_embd=2 ** 17)
        for name, limit in limits.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= limit:
                raise UserError(f'{name}={value!r} should be a whole number from 1 to {limit:,}')
        if self.n_embd % self.n_head:
            nearest = max(1, round(self.n_embd / self.n_head)) * self.n_head
            raise UserError(f'n_embd={self.n_embd} does not divide over n_head={self.n_head}; try --n_embd={nearest}')
        if not 0 <= self.dropout < 1:
            raise UserError(f'dropout={self.dropout} should be at least 0 and below 1')
        if self.activation not in ('gelu', 'gelu_tanh'):
            raise UserError(f"activation={self.activation!r} should be 'gelu' or 'gelu_tanh'")


class Attention(nn.Module):
    """Causal self-attention with H heads."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = residual_projection(config.n_embd, config)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, kv_cache=None):                        # (B, T, C)
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                    # each (B, H, T, D)
        if kv_cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                               dropout_p=self.dropout if self.training else 0.0)
        else:
            y = kv_cache.attend(q, k, v)                        # over the cached positions too
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two Linears, four times as wide between them. engine.cpu may replace forward, for the same result."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate='tanh' if config.activation == 'gelu_tanh' else 'none')
        self.c_proj = residual_projection(4 * config.n_embd, config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):                                       # (B, T, C)
        h = self.gelu(self.c_fc(x))                             # (B, T, 4C)
        return self.dropout(self.c_proj(h))


class Block(nn.Module):
    """Attention, then an MLP. Each reads a normalized copy of the residual stream and adds its output to it."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, kv_cache=None):                        # (B, T, C)
        x = x + self.attn(self.ln_1(x), kv_cache)
        return x + self.mlp(self.ln_2(x))


def residual_projection(n_in, config):
    """A Linear whose output is added to the residual stream. Its initial weights are scaled by
    1/sqrt(2 n_layer), so that the variance of the stream does not grow with depth (GPT-2, 2.3)."""
    layer = nn.Linear(n_in, config.n_embd, bias=config.bias)
    layer.init_std = 0.02 / math.sqrt(2 * config.n_layer)
    return layer


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight       # tied: one matrix with two names
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Embedding)):
                nn.init.normal_(layer.weight, std=getattr(layer, 'init_std', 0.02))
                if getattr(layer, 'bias', None) is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, idx, targets=None):
        """Logits of the last position, or logits and the loss where targets are given.

        idx: (B, T) token ids. targets: (B, T) ids, -1 where a position does not count.
        Returns ((B, 1, V), None) without targets, else what loss_fn returns: (logits or None, loss).
        """
        x = self.hidden(idx)                                    # (B, T, C)
        if targets is None:
            return self.logits(x[:, -1:]), None
        return self.loss_fn(x, targets)

    def hidden(self, idx, kv_caches=None, positions=None):
        """The normalized output of the last layer, (B, T, C), for idx (B, T).

        kv_caches: one engine.generate.KVCache per layer; idx then continues what they hold.
        positions: (T,), by default the next ones. A compiled decoder passes them, as a Python number would
        recompile it for every token.
        """
        if positions is None:
            start = kv_caches[0].length if kv_caches else 0
            end = start + idx.size(1)
            if end > self.config.block_size:
                raise UserError(f'{end} tokens do not fit block_size={self.config.block_size}')
            positions = torch.arange(start, end, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))
        for block, kv_cache in zip(self.transformer.h, kv_caches or [None] * self.config.n_layer):
            x = block(x, kv_cache)
        return self.transformer.ln_f(x)

    def logits(self, x):
        """(..., V) from the output of hidden, (..., C)."""
        return self.lm_head(x)

    def loss_fn(self, x, targets):
        """(logits, mean cross-entropy in nats) of hidden's x (B, T, C). engine.chunked_loss replaces
        this function by one that returns None for the logits and never holds all of them."""
        logits = self.logits(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def checkpoint_activations(self):
        """Save only the input of each block for the backward pass, which then runs the block again."""
        for block in self.transformer.h:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    # Generation

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
        """idx (B, T) followed by max_new_tokens sampled ones: (B, T + max_new_tokens).
        The options are those of engine.generate.stream."""
        tokens = [token[:, None] for token in self.stream(idx, max_new_tokens, temperature, top_k, **options)]
        return torch.cat([idx] + tokens, dim=1)

    def stream(self, idx, *arguments, **options):
        """Yield each sampled token, (B,), as soon as it exists."""
        from engine.generate import stream
        return stream(self, idx, *arguments, **options)

    # Loading and saving weights

    @classmethod
    def from_pretrained(cls, source, override_args=None):
        """GPT-2 from Hugging Face: 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a folder
        saved by transformers. override_args: {'dropout': p} only, as the weights set the rest."""
        from engine import hf                                   # transformers takes seconds to import
        refused = set(override_args or {}) - {'dropout'}
        if refused:
            raise UserError(f'the weights of {source} set {", ".join(sorted(refused))}; only dropout can be given')
        arguments, weights = hf.load(source)
        return cls.from_weights(GPTConfig(**{**arguments, **(override_args or {})}), weights)

    @classmethod
    def from_checkpoint(cls, saved, dropout=0.0):
        """The model of a checkpoint: a run's folder, or what engine.checkpoint.load_model returned.
        float32, in memory of its own. UserError where the weights do not fit the configuration."""
        if not isinstance(saved, dict):
            from engine.run_folder import load_newest_model
            saved = load_newest_model(saved)
        try:
            config = GPTConfig(**{'activation': saved.get('activation') or 'gelu', **saved['model_args'], 'dropout': dropout})
            if 'model' not in saved:                            # engine.sharded_checkpoint reads the weights later
                return cls(config)
            # A copy, as the file that the tensors are mapped from may be replaced.
            weights = {name: value.to(torch.float32, copy=True).contiguous() for name, value in saved['model'].items()}
            return cls.from_weights(config, weights)
        except (UserError, TypeError) as error:                 # TypeError: an argument that GPTConfig does not have
            raise UserError(f'{saved.get("path", "the checkpoint")}: {error}') from None

    def to_checkpoint(self):
        """{'model_args', 'activation', 'model'} for a checkpoint. nanoGPT passes model_args to its own
        GPTConfig. So a field that it lacks is included only if it differs from its default."""
        model_args = {name: value for name, value in asdict(self.config).items()
                      if name in NANOGPT_ARGS or value != getattr(GPTConfig, name)}
        model_args.pop('activation', None)
        return dict(activation=self.config.activation, model_args=model_args, model=self.state_dict())

    @classmethod
    def from_weights(cls, config, weights):
        """A GPT that takes over `weights`, {name: tensor}, without initializing others first.
        UserError where a name or shape is missing, unknown or different."""
        layers = {name.split('.')[2] for name in weights if name.startswith('transformer.h.')}
        if len(layers) != config.n_layer:
            raise UserError(f'the weights have {len(layers)} layers, the settings {config.n_layer}')
        with torch.device('meta'):
            model = cls(config)
        expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in weights.items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise UserError(f'weight {name}: {found.get(name, "missing")} in the file, '
                                f'{expected.get(name, "no such name")} in the model')
        if not torch.equal(weights['lm_head.weight'], weights['transformer.wte.weight']):
            raise UserError('lm_head.weight differs from transformer.wte.weight, and here they are tied')
        model.load_state_dict(weights, assign=True)
        model.lm_head.weight = model.transformer.wte.weight
        return model.requires_grad_(True)

    def crop_block_size(self, block_size):
        """Shorten the context by dropping position embeddings."""
        if block_size > self.config.block_size:
            raise UserError(f'block_size={block_size} is over the {self.config.block_size} that the weights were '
                            f'trained with; try --block_size={self.config.block_size}')
        self.config.block_size = block_size
        self.transformer.wpe = nn.Embedding.from_pretrained(
            self.transformer.wpe.weight.detach()[:block_size].clone(), freeze=False)

    # Training

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type=None):
        """The optimizer of engine.optim. device_type is accepted as nanoGPT passes it, and not needed."""
        from engine import optim
        return optim.adamw(self, learning_rate, weight_decay, betas)

    def get_num_params(self, non_embedding=True):
        """Number of parameters, the tied matrix once; without the position embeddings by default."""
        count = sum(p.numel() for p in self.parameters())
        return count - self.transformer.wpe.weight.numel() if non_embedding else count

    def flops_per_token(self):
        """Floating point operations of the forward and backward pass, per token of a full block.
        Source: Chowdhery et al. 2022, appendix B (arXiv:2204.02311)."""
        c = self.config
        return 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size

    def estimate_mfu(self, n_sequences, seconds, peak_flops):
        """Share of the device's peak that the model's own arithmetic uses (model FLOPs utilization).

        n_sequences, seconds: of one iteration. peak_flops: operations per second of this device
        and precision, or None, which gives None.
        """
        if peak_flops is None:
            return None
        return self.flops_per_token() * self.config.block_size * n_sequences / seconds / peak_flops
