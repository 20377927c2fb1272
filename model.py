"""GPT-2 and its successors: configuration, layers, forward pass, loading and saving of weights.

Parameter names and shapes are nanoGPT's (`transformer.wte.weight`,
`transformer.h.0.attn.c_attn.weight`, ...), so checkpoints load in both projects.

Shapes: B sequences, T positions, C channels, H heads, D = C / H, G heads of keys and values,
V vocabulary, F = mlp_width.
Sources: Radford et al. 2019 (GPT-2); Press & Wolf 2017 (tied embedding, arXiv:1608.05859).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from engine.attention import CausalAttention
from engine.errors import UserError
from engine.model_checks import check_config, check_overrides, check_weights
from engine.positions import encode_positions, resize_positions


@dataclass
class GPTConfig:
    """The shape of a GPT. Raises UserError for a shape that cannot be built."""
    block_size: int = 1024      # longest context, in tokens
    vocab_size: int = 50304     # GPT-2's 50257, rounded up to a multiple of 64 for fast products
    n_layer: int = 12           # blocks
    n_head: int = 12            # heads of attention
    n_embd: int = 768           # channels of the residual stream
    dropout: float = 0.0        # share of the activations that training sets to zero
    bias: bool = True           # Linears and LayerNorms have a bias
    activation: Literal['gelu', 'gelu_tanh', 'relu2', 'swiglu'] = 'gelu'
                                # gelu is exact, gelu_tanh is OpenAI's approximation of it;
                                # relu2: arXiv:2109.08668; swiglu: arXiv:2002.05202
    # beyond GPT-2; the defaults are GPT-2's
    attention_dropout: bool = True  # dropout of attention weights too; a CPU is faster without
    position: Literal['learned', 'rotary', 'alibi'] = 'learned'
                                # learned embeddings, rotary (arXiv:2104.09864), alibi (2108.12409)
    rope_theta: float = 1e4     # rotary channels turn once in at most 2 pi rope_theta positions
    norm: Literal['layernorm', 'rmsnorm', 'rmsnorm_gain'] = 'layernorm'
                                # rmsnorm: arXiv:1910.07467; rmsnorm_gain multiplies by parameters
    norm_eps: float = 1e-5      # keeps a norm of zeros finite
    qk_norm: bool = False       # normalizes queries and keys in each head (arXiv:2010.04245)
    embedding_norm: bool = False    # normalizes what the first block reads
    n_kv_head: int = 0          # heads of keys and values (arXiv:2305.13245); 0: as many as n_head
    n_inner: int = 0            # width of the MLP; 0: 4 n_embd, or 8/3 n_embd with swiglu
    tied: bool = True           # the embedding is also the head
    softcap: float = 0.0        # a tanh keeps logits below this (arXiv:2408.00118); 0: no limit
    zero_init: bool = False     # blocks start as the identity, an untied head with equal logits
    init_std: float = 0.02      # deviation of the initial weights; narrow models learn faster with
                                # 0.02 sqrt(768 / n_embd)

    def __post_init__(self):
        check_config(self)

    @property
    def head_size(self):
        return self.n_embd // self.n_head

    @property
    def kv_heads(self):
        return self.n_kv_head or self.n_head

    @property
    def gated(self):
        return self.activation == 'swiglu'

    @property
    def mlp_width(self):
        if self.n_inner:
            return self.n_inner
        if self.gated:                                          # 8/3 n_embd, as a multiple of 64
            return 64 * math.ceil(8 * self.n_embd / (3 * 64))
        return 4 * self.n_embd


class Attention(nn.Module):
    """Causal self-attention with H heads of queries, and G of keys and values."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.n_kv_head = config.kv_heads
        n_projected = self.n_head + 2 * self.n_kv_head          # queries, keys and values
        self.c_attn = nn.Linear(config.n_embd, n_projected * config.head_size, bias=config.bias)
        self.q_norm = build_norm(config.head_size, config) if config.qk_norm else nn.Identity()
        self.k_norm = build_norm(config.head_size, config) if config.qk_norm else nn.Identity()
        self.c_proj = residual_projection(config.n_embd, config)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, encoding, attender):
        """x: (B, T, C). encoding: PositionEncoding. attender: CausalAttention, or a KVCache."""
        B, T, C = x.shape

        # queries, keys and values, from one product
        heads = self.c_attn(x).view(B, T, -1, C // self.n_head)             # (B, T, H + 2 G, D)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=2)

        # positions turn queries and keys, or add a bias to their scores
        q = encoding.rotate(self.q_norm(q))                                 # (B, T, H, D)
        k = encoding.rotate(self.k_norm(k))                                 # (B, T, G, D)

        q = q.transpose(1, 2)                                               # (B, H, T, D)
        k = k.transpose(1, 2)                                               # (B, G, T, D)
        v = v.transpose(1, 2)                                               # (B, G, T, D)
        y = attender.attend(q, k, v, encoding.bias)                          # (B, H, T, D)

        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two Linears, with F channels between them."""

    def __init__(self, config):
        super().__init__()
        width = config.mlp_width
        if config.gated:                                        # a gate beside each value
            width = 2 * width

        activations = dict(gelu=nn.GELU(), gelu_tanh=nn.GELU('tanh'), relu2=relu2, swiglu=swiglu)

        self.c_fc = nn.Linear(config.n_embd, width, bias=config.bias)
        self.activation = activations[config.activation]
        self.c_proj = residual_projection(config.mlp_width, config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):                                       # (B, T, C)
        h = self.activation(self.c_fc(x))                       # (B, T, F)
        return self.dropout(self.c_proj(h))


def relu2(x):
    y = F.relu(x)
    return y * y            # on a CPU, the gradient of square() takes longer


def swiglu(x):                                                  # (..., 2 F)
    gate, value = x.chunk(2, dim=-1)                            # each (..., F)
    return F.silu(gate) * value


class Block(nn.Module):
    """Attention, then an MLP. Each reads a normalized copy of the stream and adds to it."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = build_norm(config.n_embd, config)
        self.attn = Attention(config)
        self.ln_2 = build_norm(config.n_embd, config)
        self.mlp = MLP(config)

    def forward(self, x, encoding, attender):                    # (B, T, C)
        x = x + self.attn(self.ln_1(x), encoding, attender)
        x = x + self.mlp(self.ln_2(x))
        return x


def build_norm(size, config):
    if config.norm == 'layernorm':
        return nn.LayerNorm(size, config.norm_eps, bias=config.bias)
    has_gain = config.norm == 'rmsnorm_gain'
    return nn.RMSNorm(size, config.norm_eps, elementwise_affine=has_gain)


def residual_projection(n_in, config):
    """A Linear whose output is added to the residual stream. Its initial weights are scaled by
    1/sqrt(2 n_layer), so that the variance of the stream does not grow with depth (GPT-2, 2.3)."""
    layer = nn.Linear(n_in, config.n_embd, bias=config.bias)
    layer.init_std = config.init_std / math.sqrt(2 * config.n_layer)
    if config.zero_init:
        layer.init_std = 0.0
    return layer


class GPT(nn.Module):
    """Token ids to the logits of the next token. Its weights are drawn from torch's generator."""

    # Training changes these two, to save memory.
    keep_logits = True      # False: loss_fn returns None for the logits
    recompute = False       # True: the backward pass computes each block again, a third more work

    def __init__(self, config):
        super().__init__()
        self.config = config
        learned = config.position == 'learned'

        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd) if learned else None,
            ln_e=build_norm(config.n_embd, config) if config.embedding_norm else None,
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=build_norm(config.n_embd, config),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

        if config.tied:
            self.lm_head.weight = self.transformer.wte.weight   # one matrix with two names
        elif config.zero_init:
            self.lm_head.init_std = 0.0

        # initial weights: normal, but for those of the norms, and biases of zero
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Embedding)):
                std = getattr(layer, 'init_std', config.init_std)
                nn.init.normal_(layer.weight, std=std)
                if getattr(layer, 'bias', None) is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, idx, targets=None):
        """Logits of the last position, or logits and the loss where targets are given.

        idx: (B, T) token ids. targets: (B, T) ids, -1 where a position does not count.
        Returns ((B, 1, V), None) without targets, else what loss_fn returns.
        """
        x = self.hidden(idx)                                    # (B, T, C)
        if targets is None:
            return self.logits(x[:, -1:]), None
        return self.loss_fn(x, targets)

    def hidden(self, idx, attenders=None, positions=None):
        """The normalized output of the last layer, (B, T, C), for idx (B, T).

        attenders: for each layer a CausalAttention, such as a KVCache, whose text idx continues.
        By default, idx attends over itself.
        positions: (T,), by default the next ones. A compiled decoder passes them, as a Python
        number would recompile it for every token.
        """
        config = self.config
        T = idx.size(1)

        # what each layer attends over, and where in the text idx lies
        if attenders is None:
            dropout = config.dropout if self.training and config.attention_dropout else 0.0
            attenders = [CausalAttention(dropout)] * config.n_layer
        if positions is None:
            start = attenders[0].length
            if start + T > config.block_size:
                raise UserError(f'{start + T} tokens do not fit block_size={config.block_size}')
            positions = torch.arange(start, start + T, device=idx.device)
        encoding = encode_positions(config, positions, attenders[0].n_keys(T))

        # embeddings
        x = self.transformer.wte(idx)                           # (B, T, C)
        if config.position == 'learned':
            x = x + self.transformer.wpe(positions)
        if config.embedding_norm:
            x = self.transformer.ln_e(x)
        x = self.transformer.drop(x)

        # blocks
        for block, attender in zip(self.transformer.h, attenders):
            if self.recompute:
                x = checkpoint(block, x, encoding, attender, use_reentrant=False)
            else:
                x = block(x, encoding, attender)
        return self.transformer.ln_f(x)

    def logits(self, x):
        """(..., V) from the output of hidden, (..., C)."""
        logits = self.lm_head(x)
        softcap = self.config.softcap

        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        return logits

    def loss_fn(self, x, targets):
        """(logits or None, mean cross-entropy in nats), of hidden's x (B, T, C)."""
        # to save memory, the same loss from the logits of a few positions at a time
        if not self.keep_logits:
            from engine.training.chunked_loss import chunked_cross_entropy, is_worth_chunking
            weight = self.lm_head.weight
            if is_worth_chunking(targets.numel(), weight):
                return None, chunked_cross_entropy(x, weight, targets, self.config.softcap)

        # logits of all positions at once
        logits = self.logits(x)                                 # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        if not self.keep_logits:
            logits = None       # a compiled model would take gradients for logits that it returns
        return logits, loss

    # Generation

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
        """idx (B, T) followed by max_new_tokens sampled ones: (B, T + max_new_tokens).
        The options are those of engine.generation.generate.stream."""
        tokens = list(self.stream(idx, max_new_tokens, temperature, top_k, **options))
        return torch.cat([idx] + [token[:, None] for token in tokens], dim=1)

    def stream(self, idx, *arguments, **options):
        """Yield each sampled token, (B,), as soon as it exists."""
        from engine.generation.generate import stream
        return stream(self, idx, *arguments, **options)

    # Loading and saving weights

    @classmethod
    def from_pretrained(cls, source, override_args=None):
        """The model `source` of Hugging Face's hub, or of a folder that transformers saved.
        override_args: {'dropout': p} only, as the weights set the rest."""
        from engine.hf import weights as hf_weights  # transformers takes seconds to import
        overrides = check_overrides(override_args, source)
        arguments, weights = hf_weights.load(source)
        return cls.from_weights(GPTConfig(**{**arguments, **overrides}), weights)

    @classmethod
    def from_checkpoint(cls, saved, dropout=0.0):
        """The model of a checkpoint, in float32 and in memory of its own.

        saved: a run's folder, or an engine.checkpoint.contents.Checkpoint. If the weights of a
        sharded state are not read yet, the model has random ones until sharded.load reads them.
        Raises UserError where the weights do not fit the configuration.
        """
        if isinstance(saved, (str, Path)):
            from engine.checkpoint.run_folder import newest_checkpoint
            saved = newest_checkpoint(saved)

        try:
            config = GPTConfig(**saved.gpt_arguments(dropout))
            if saved.model is None:                 # engine.checkpoint.sharded reads them later
                return cls(config)
            return cls.from_weights(config, saved.float32_weights())
        except (UserError, TypeError) as error:     # TypeError: GPTConfig lacks an argument
            raise UserError(f'{saved.path or "the checkpoint"}: {error}') from None

    def to_checkpoint(self):
        """{'model_args', 'activation', 'model'}, as a Checkpoint has them."""
        from engine.checkpoint.contents import model_arguments
        return dict(activation=self.config.activation, model_args=model_arguments(self.config),
                    model=self.state_dict())

    @classmethod
    def from_weights(cls, config, weights):
        """A GPT that takes over `weights`, {name: tensor}, without initializing others first.
        Raises UserError where a name or shape is missing, unknown or different."""
        with torch.device('meta'):
            model = cls(config)
        check_weights(model, weights)
        model.load_state_dict(weights, assign=True)             # not copied
        if config.tied:
            model.lm_head.weight = model.transformer.wte.weight
        return model.requires_grad_(True)

    def resize_context(self, block_size):
        """Change the context. For a shorter one, learned positions are dropped; for a longer one,
        they are stretched by interpolation, and need some training. Without learned positions only
        the limit moves: ALiBi is made for longer contexts, rotary positions get worse."""
        if self.config.position == 'learned':
            rows = resize_positions(self.transformer.wpe.weight.detach(), block_size)
            self.transformer.wpe = nn.Embedding.from_pretrained(rows, freeze=False)
        self.config.block_size = block_size

    crop_block_size = resize_context    # nanoGPT's name

    # Training

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type=None):
        """The optimizer of engine.training.optim. nanoGPT passes device_type; it is not needed."""
        from engine.training import optim
        return optim.adamw(self, learning_rate, weight_decay, betas)

    def get_num_params(self, non_embedding=True):
        """Number of parameters, the tied matrix once; by default without learned positions."""
        n_params = sum(p.numel() for p in self.parameters())
        if non_embedding and self.config.position == 'learned':
            n_params -= self.config.block_size * self.config.n_embd
        return n_params

    def flops_per_token(self):
        """Floating point operations of the forward and backward pass, per token of a full block.
        Source: Chowdhery et al. 2022, appendix B (arXiv:2204.02311)."""
        c = self.config
        n_multiplied = self.get_num_params()
        if not c.tied:                              # then the embedding is only looked up
            n_multiplied -= c.vocab_size * c.n_embd
        # what is frozen has no gradient
        layers = (self.transformer.h, self.transformer.ln_f, self.lm_head)
        n_frozen = sum(p.numel() for layer in layers for p in layer.parameters()
                       if not p.requires_grad)
        return 6 * n_multiplied - 2 * n_frozen + 12 * c.n_layer * c.n_embd * c.block_size

    def estimate_mfu(self, n_sequences, seconds, peak_flops=312e12):
        """Share of the device's peak that the model's arithmetic uses (model FLOPs utilization).

        n_sequences, seconds: how many sequences an iteration reads, and how long it takes.
        peak_flops: operations per second of this device and precision, or None, which gives None.
            By default it is that of an A100 in bfloat16, as scripts of nanoGPT expect.
        """
        if peak_flops is None:
            return None
        flops = self.flops_per_token() * self.config.block_size * n_sequences
        return flops / seconds / peak_flops
