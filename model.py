"""GPT-2 as one file: configuration, layers, forward, generation, optimizer groups, flops.

Parameter names and shapes are those of the family's checkpoints (`transformer.wte.weight`,
`transformer.h.0.attn.c_attn.weight`, ...), so weights move between tools without a converter.
The model knows nothing of ranks, files or logging.

Shapes: B sequences, T positions, C channels, H heads, D = C / H, V vocabulary.
Sources: Radford et al. 2019 (GPT-2); Press & Wolf 2017 (tied embedding, arXiv:1608.05859).
"""

import inspect
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recomputed

import lean


@dataclass
class GPTConfig:
    """Shape of a GPT. ValueError where no such model can be built."""
    block_size: int = 1024      # longest context, tokens
    vocab_size: int = 50304     # GPT-2's 50257 rounded up to a multiple of 64, for fast matmuls
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True           # in Linears and LayerNorms
    activation: str = 'gelu'    # 'gelu' is exact, as the family trains; 'gelu_tanh' is GPT-2's own

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f'{name}={value!r} should be a whole number of at least 1')
        if self.n_embd % self.n_head:
            nearest = max(1, round(self.n_embd / self.n_head)) * self.n_head
            raise ValueError(f'n_embd={self.n_embd} does not divide over n_head={self.n_head}; '
                             f'try --n_embd={nearest}')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout={self.dropout} should be at least 0 and below 1')
        if self.activation not in ('gelu', 'gelu_tanh'):
            raise ValueError(f"activation={self.activation!r} should be 'gelu' or 'gelu_tanh'")


class Attention(nn.Module):
    """Causal self-attention of H heads over D channels each."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = residual_projection(config.n_embd, config)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, memory=None):                          # (B, T, C)
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                    # each (B, H, T, D)
        if memory is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                               dropout_p=self.dropout if self.training else 0.0)
        else:
            y = memory.attend(q, k, v)                          # earlier positions included
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Four times wider inside, GELU between."""

    def __init__(self, config):
        super().__init__()
        self.approximate = 'tanh' if config.activation == 'gelu_tanh' else 'none'
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = residual_projection(4 * config.n_embd, config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):                                       # (B, T, C)
        h = self.c_fc(x)                                        # (B, T, 4C)
        if lean.pays(h, h.numel()) and torch.is_grad_enabled() and type(self.c_proj) is nn.Linear:
            y = lean.GELULinear.apply(h, self.c_proj.weight, self.c_proj.bias, self.approximate)
        else:
            y = self.c_proj(F.gelu(h, approximate=self.approximate))
        return self.dropout(y)


class Block(nn.Module):
    """Pre-norm: each half reads a normalised copy of the stream and adds to the stream."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, memory=None):                          # (B, T, C)
        x = x + self.attn(self.ln_1(x), memory)
        return x + self.mlp(self.ln_2(x))


def residual_projection(n_in, config):
    """A Linear whose output is added to the stream. Its weights start smaller by
    1/sqrt(2 n_layer), so that the stream's variance does not grow with depth (GPT-2, 2.3)."""
    layer = nn.Linear(n_in, config.n_embd, bias=config.bias)
    layer.init_std = 0.02 / math.sqrt(2 * config.n_layer)
    return layer


class AdamW(torch.optim.AdamW):
    """PyTorch's, without the wrappers that hide it from PyTorch's compiler: they import the compiler,
    which takes 0.85 s on two cores, and nothing here compiles an optimizer."""
    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


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
        self.lm_head.weight = self.transformer.wte.weight       # tied: one matrix, two names
        self.recompute = False      # True keeps only each block's input for backward, and runs it again there
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Embedding)):
                nn.init.normal_(layer.weight, std=getattr(layer, 'init_std', 0.02))
                if getattr(layer, 'bias', None) is not None:
                    nn.init.zeros_(layer.bias)

    def hidden(self, idx, memories=None, positions=None, embeddings=None):
        """The last layer's normalised output, (B, T, C), for idx (B, T).

        memories: one decoding.Memory per layer; idx then continues what they hold.
        positions: (T,) of idx, where they do not follow from that.
        embeddings: (B, T, C) of idx, where they were looked up already.
        """
        if positions is None:
            start = memories[0].length if memories else 0
            end = start + idx.size(1)
            if end > self.config.block_size:
                raise ValueError(f'{end} tokens do not fit block_size={self.config.block_size}')
            positions = torch.arange(start, end, device=idx.device)
        embeddings = self.transformer.wte(idx) if embeddings is None else embeddings
        x = self.transformer.drop(embeddings + self.transformer.wpe(positions))
        for block, memory in zip(self.transformer.h, memories or [None] * len(self.transformer.h)):
            x = recomputed(block, x, use_reentrant=False) if self.recompute and self.training else block(x, memory)
        return self.transformer.ln_f(x)                         # (B, T, C)

    def forward(self, idx, targets=None, loss_only=False):
        """Logits, and the mean cross-entropy in nats where targets are given.

        idx: (B, T) token ids. targets: (B, T) ids, -1 where a position does not count.
        Returns ((B, T, V), scalar), or ((B, 1, V), None): of the last position only.
        loss_only: None in place of logits; on a CPU, not compiled, many are then never held whole.
        """
        if targets is None:
            return self.lm_head(self.hidden(idx)[:, -1:]), None
        if loss_only and lean.pays(idx, idx.numel() * self.config.vocab_size):
            embeddings, weight = lean.TiedEmbedding.apply(self.transformer.wte.weight, idx)
            x = self.hidden(idx, embeddings=embeddings).flatten(0, 1)               # (N, C)
            return None, lean.LinearCrossEntropy.apply(x, weight, targets.flatten(), torch.is_grad_enabled())
        logits = self.lm_head(self.hidden(idx))                 # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return None if loss_only else logits, loss

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
        """idx (B, T) followed by max_new_tokens drawn ones: (B, T + max_new_tokens).

        Options are those of decoding.stream, which yields the same tokens one at a time.
        """
        drawn = [token[:, None] for token in self.stream(idx, max_new_tokens, temperature, top_k, **options)]
        return torch.cat([idx] + drawn, dim=1)

    def stream(self, idx, *arguments, **options):
        """Tokens as they are drawn, with the arguments of `generate`; see decoding.stream."""
        import decoding
        return decoding.stream(self, idx, *arguments, **options)

    # Weights from elsewhere

    @classmethod
    def from_pretrained(cls, source, override_args=None):
        """GPT-2 from Hugging Face: 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a folder
        saved by transformers. override_args: {'dropout': p} only, as the weights fix the rest.
        """
        import hf                                               # transformers takes seconds to import
        refused = set(override_args or {}) - {'dropout'}
        if refused:
            raise ValueError(f'the weights of {source} fix {", ".join(sorted(refused))}; '
                             f'only dropout can be given')
        arguments, weights = hf.load(source)
        return cls.from_weights(GPTConfig(**{**arguments, **(override_args or {})}), weights)

    @classmethod
    def from_weights(cls, config, weights):
        """A GPT that holds `weights` itself, {name: tensor}, without initialising others first.
        ValueError where a name or shape is missing, unknown or different."""
        # A hostile n_layer would build for hours, even without memory: count before building.
        layers = {name.split('.')[2] for name in weights if name.startswith('transformer.h.')}
        if len(layers) != config.n_layer:
            raise ValueError(f'the weights have {len(layers)} layers, the settings {config.n_layer}')
        with torch.device('meta'):
            model = cls(config)
        expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in weights.items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise ValueError(f'weight {name}: {found.get(name, "missing")} in the file, '
                                 f'{expected.get(name, "nothing of that name")} in the model')
        if not torch.equal(weights['lm_head.weight'], weights['transformer.wte.weight']):
            raise ValueError('lm_head.weight differs from transformer.wte.weight, and here they are one')
        model.load_state_dict(weights, assign=True)
        model.lm_head.weight = model.transformer.wte.weight
        return model.requires_grad_(True)

    def crop_block_size(self, block_size):
        """Shorten the context: fewer position embeddings, the same model otherwise."""
        if block_size > self.config.block_size:
            raise ValueError(f'block_size={block_size} is over the {self.config.block_size} that '
                             f'the weights were trained with; try --block_size={self.config.block_size}')
        self.config.block_size = block_size
        self.transformer.wpe = nn.Embedding.from_pretrained(
            self.transformer.wpe.weight.detach()[:block_size].clone(), freeze=False)

    # Training

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type=None):
        """AdamW with decay on matrices and embeddings, none on biases and LayerNorms.

        Fused on every device that PyTorch fuses it on, the CPU included (three times faster
        than its loop there). The order of groups and parameters is the family's, so that
        optimizer states of its checkpoints fit. device_type: not needed, taken for habit.
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [dict(params=[p for p in parameters if p.dim() >= 2], weight_decay=weight_decay),
                  dict(params=[p for p in parameters if p.dim() < 2], weight_decay=0.0)]
        return AdamW(groups, lr=learning_rate, betas=betas, fused=True)

    def get_num_params(self, non_embedding=True):
        """Parameters, the tied matrix once; without the position embeddings by default."""
        count = sum(p.numel() for p in self.parameters())
        return count - self.transformer.wpe.weight.numel() if non_embedding else count

    def flops_per_token(self):
        """Floating point operations of forward and backward, per token of a full block.
        Source: Chowdhery et al. 2022, appendix B (arXiv:2204.02311)."""
        c = self.config
        return 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size

    def estimate_mfu(self, sequences, seconds, peak_flops):
        """Share of the device's peak that the model's own arithmetic uses.

        sequences, seconds: of one iteration. peak_flops: operations per second of this device
        and precision; None gives None, never a guess.
        """
        if peak_flops is None:
            return None
        return self.flops_per_token() * self.config.block_size * sequences / seconds / peak_flops

