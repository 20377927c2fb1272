"""GPT-2 and its successors: configuration, layers, forward pass, loading and saving of weights.

Parameter names and shapes are nanoGPT's (`transformer.wte.weight`,
`transformer.h.0.attn.c_attn.weight`, ...), so checkpoints load in both projects.

Shapes: B sequences, T positions, C channels, H heads, D = C / H, G heads of keys and values, V vocabulary,
F = mlp_width.
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
from engine.model_checks import check_config, check_weights
from engine.positions import alibi_bias, rotary_angles, rotate

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
    activation: str = 'gelu'    # 'gelu' is exact, as in nanoGPT; 'gelu_tanh' is the approximation in OpenAI's weights;
                                # 'relu2' (arXiv:2109.08668); 'swiglu' (arXiv:2002.05202)
    # GPT-2 has none of the following
    position: str = 'learned'   # 'learned' embeddings; 'rotary' (arXiv:2104.09864); 'alibi' (arXiv:2108.12409)
    rope_theta: float = 1e4     # rotary: the slowest channels turn once in about 2 pi rope_theta positions
    norm: str = 'layernorm'     # 'rmsnorm' has no parameters (arXiv:1910.07467), 'rmsnorm_gain' scales each channel
    norm_eps: float = 1e-5      # keeps a norm of zeros finite
    qk_norm: bool = False       # normalizes queries and keys in each head (arXiv:2010.04245)
    embedding_norm: bool = False    # normalizes what the first block reads
    n_kv_head: int = 0          # heads of keys and values, each for n_head / n_kv_head queries (arXiv:2305.13245); 0: n_head
    n_inner: int = 0            # width of the MLP; 0: 4 n_embd, with 'swiglu' 8/3 n_embd, which has as many parameters
    tied: bool = True           # the embedding is also the head
    softcap: float = 0.0        # squeezes logits into (-softcap, softcap) by a tanh (arXiv:2408.00118); 0: never
    zero_init: bool = False     # each block starts as the identity, an untied head with equal probabilities
    init_std: float = 0.02      # of the initial weights; narrow models learn faster with 0.02 sqrt(768 / n_embd)

    def __post_init__(self):
        check_config(self)

    head_size = property(lambda self: self.n_embd // self.n_head)
    kv_heads = property(lambda self: self.n_kv_head or self.n_head)
    gated = property(lambda self: self.activation == 'swiglu')
    mlp_width = property(lambda self: self.n_inner or (-(-8 * self.n_embd // 192) * 64 if self.gated else 4 * self.n_embd))


class Attention(nn.Module):
    """Causal self-attention with H heads of queries, and G of keys and values."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.dropout = config.n_head, config.kv_heads, config.dropout
        self.c_attn = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * config.head_size, bias=config.bias)
        self.q_norm = build_norm(config.head_size, config) if config.qk_norm else nn.Identity()
        self.k_norm = build_norm(config.head_size, config) if config.qk_norm else nn.Identity()
        self.c_proj = residual_projection(config.n_embd, config)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, kv_cache=None, rotation=None, attn_bias=None):     # (B, T, C)
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, -1, C // self.n_head)         # (B, T, H + 2 G, D)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=2)     # each (B, T, H or G, D)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if kv_cache is None:
            y = F.scaled_dot_product_attention(q, k, v, None if attn_bias is None else attn_bias.to(q.dtype),
                                               is_causal=attn_bias is None, dropout_p=self.dropout if self.training else 0.0,
                                               enable_gqa=self.n_kv_head < self.n_head)
        else:
            y = kv_cache.attend(q, k, v, attn_bias)             # over the cached positions too
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two Linears, with F channels between them."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.mlp_width * (2 if config.gated else 1), bias=config.bias)
        self.activation = dict(gelu=nn.GELU(), gelu_tanh=nn.GELU('tanh'), relu2=relu2, swiglu=swiglu)[config.activation]
        self.c_proj = residual_projection(config.mlp_width, config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):                                       # (B, T, C)
        h = self.activation(self.c_fc(x))                       # (B, T, F)
        return self.dropout(self.c_proj(h))


def relu2(x):
    return F.relu(x).square()


def swiglu(x):                                                  # (..., 2 F)
    gate, value = x.chunk(2, dim=-1)                            # each (..., F)
    return F.silu(gate) * value


class Block(nn.Module):
    """Attention, then an MLP. Each reads a normalized copy of the residual stream and adds its output to it."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = build_norm(config.n_embd, config)
        self.attn = Attention(config)
        self.ln_2 = build_norm(config.n_embd, config)
        self.mlp = MLP(config)

    def forward(self, x, kv_cache=None, rotation=None, attn_bias=None):     # (B, T, C)
        x = x + self.attn(self.ln_1(x), kv_cache, rotation, attn_bias)
        return x + self.mlp(self.ln_2(x))


def build_norm(size, config):
    if config.norm == 'layernorm':
        return nn.LayerNorm(size, config.norm_eps, bias=config.bias)
    return nn.RMSNorm(size, config.norm_eps, elementwise_affine=config.norm == 'rmsnorm_gain')


def residual_projection(n_in, config):
    """A Linear whose output is added to the residual stream. Its initial weights are scaled by
    1/sqrt(2 n_layer), so that the variance of the stream does not grow with depth (GPT-2, 2.3)."""
    layer = nn.Linear(n_in, config.n_embd, bias=config.bias)
    layer.init_std = 0.0 if config.zero_init else config.init_std / math.sqrt(2 * config.n_layer)
    return layer


class GPT(nn.Module):
    """Token ids to the logits of the next token. config: GPTConfig. The weights are drawn from torch's global generator."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.keep_logits = True         # False: a training step may leave them out, to save memory
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd) if config.position == 'learned' else None,
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
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Embedding)):
                nn.init.normal_(layer.weight, std=getattr(layer, 'init_std', config.init_std))
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

        kv_caches: one engine.generation.kv_cache.KVCache per layer; idx then continues what they hold.
        positions: (T,), by default the next ones. A compiled decoder passes them, as a Python number would
        recompile it for every token.
        """
        if positions is None:
            start = kv_caches[0].length if kv_caches else 0
            end = start + idx.size(1)
            if end > self.config.block_size:
                raise UserError(f'{end} tokens do not fit block_size={self.config.block_size}')
            positions = torch.arange(start, end, device=idx.device)
        x, rotation, attn_bias = self.transformer.wte(idx), None, None  # (B, T, C)
        if self.config.position == 'learned':
            x = x + self.transformer.wpe(positions)
        elif self.config.position == 'rotary':
            rotation = rotary_angles(positions, self.config.head_size, self.config.rope_theta)
        else:
            n_keys = kv_caches[0].n_keys(idx.size(1)) if kv_caches else idx.size(1)
            attn_bias = alibi_bias(positions, n_keys, self.config.n_head)
        if self.config.embedding_norm:
            x = self.transformer.ln_e(x)
        x = self.transformer.drop(x)
        for block, kv_cache in zip(self.transformer.h, kv_caches or [None] * self.config.n_layer):
            x = block(x, kv_cache, rotation, attn_bias)
        return self.transformer.ln_f(x)

    def logits(self, x):
        """(..., V) from the output of hidden, (..., C)."""
        logits, softcap = self.lm_head(x), self.config.softcap
        return softcap * torch.tanh(logits / softcap) if softcap else logits

    def loss_fn(self, x, targets):
        """(logits, mean cross-entropy in nats) of hidden's x (B, T, C). The logits are None where they are not kept."""
        if not self.keep_logits:
            from engine.training import chunked_loss
            if chunked_loss.is_worth_chunking(targets.numel(), self.config.vocab_size):
                return None, chunked_loss.chunked_cross_entropy(
                    x, self.lm_head.weight, targets, self.config.softcap)
        logits = self.logits(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def checkpoint_activations(self):
        """Save only the input of each block for the backward pass, which then runs the block again."""
        for block in self.transformer.h:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    # Generation

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
        """idx (B, T) followed by max_new_tokens sampled ones: (B, T + max_new_tokens).
        The options are those of engine.generation.generate.stream."""
        tokens = [token[:, None] for token in self.stream(idx, max_new_tokens, temperature, top_k, **options)]
        return torch.cat([idx] + tokens, dim=1)

    def stream(self, idx, *arguments, **options):
        """Yield each sampled token, (B,), as soon as it exists."""
        from engine.generation.generate import stream
        return stream(self, idx, *arguments, **options)

    # Loading and saving weights

    @classmethod
    def from_pretrained(cls, source, override_args=None):
        """Weights from Hugging Face: the name of a model on the hub, or a folder saved by transformers, of a
        kind that engine.hf knows. override_args: {'dropout': p} only, as the weights set the rest."""
        from engine.hf import weights as hf_weights  # transformers takes seconds to import
        refused = set(override_args or {}) - {'dropout'}
        if refused:
            raise UserError(f'the weights of {source} set {", ".join(sorted(refused))}; only dropout can be given')
        arguments, weights = hf_weights.load(source)
        return cls.from_weights(GPTConfig(**{**arguments, **(override_args or {})}), weights)

    @classmethod
    def from_checkpoint(cls, saved, dropout=0.0):
        """The model of a checkpoint: a run's folder, or what engine.checkpoint.load_model returned.
        float32, in memory of its own. UserError where the weights do not fit the configuration."""
        if not isinstance(saved, dict):
            from engine.checkpoint.run_folder import load_newest_model
            saved = load_newest_model(saved)
        try:
            config = GPTConfig(**{'activation': saved.get('activation') or 'gelu', **saved['model_args'], 'dropout': dropout})
            if 'model' not in saved:                            # engine.checkpoint.sharded reads the weights later
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
        if self.config.activation.startswith('gelu'):           # nanoGPT loads either, and computes the exact one
            model_args.pop('activation', None)
        return dict(activation=self.config.activation, model_args=model_args, model=self.state_dict())

    @classmethod
    def from_weights(cls, config, weights):
        """A GPT that takes over `weights`, {name: tensor}, without initializing others first.
        UserError where a name or shape is missing, unknown or different."""
        with torch.device('meta'):
            model = cls(config)
        check_weights(model, weights)
        model.load_state_dict(weights, assign=True)
        if config.tied:
            model.lm_head.weight = model.transformer.wte.weight
        return model.requires_grad_(True)

    def crop_block_size(self, block_size):
        """Shorten the context by dropping position embeddings. Rotary positions and ALiBi have none, and may
        also read more than they were trained with: ALiBi is made for it, rotary positions get worse."""
        if self.config.position == 'learned':
            if block_size > self.config.block_size:
                raise UserError(f'block_size={block_size} is over the {self.config.block_size} that the weights were '
                                f'trained with; try --block_size={self.config.block_size}')
            self.transformer.wpe = nn.Embedding.from_pretrained(
                self.transformer.wpe.weight.detach()[:block_size].clone(), freeze=False)
        self.config.block_size = block_size

    # Training

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type=None):
        """The optimizer of engine.training.optim. device_type is accepted as nanoGPT passes it, and not needed."""
        from engine.training import optim
        return optim.adamw(self, learning_rate, weight_decay, betas)

    def get_num_params(self, non_embedding=True):
        """Number of parameters, the tied matrix once; without learned position embeddings by default."""
        position_embeddings = self.config.block_size * self.config.n_embd * (self.config.position == 'learned')
        return sum(p.numel() for p in self.parameters()) - position_embeddings * non_embedding

    def flops_per_token(self):
        """Floating point operations of the forward and backward pass, per token of a full block.
        Source: Chowdhery et al. 2022, appendix B (arXiv:2204.02311)."""
        c = self.config
        lookups = 0 if c.tied else c.vocab_size * c.n_embd      # an embedding that is not also the head multiplies nothing
        return 6 * (self.get_num_params() - lookups) + 12 * c.n_layer * c.n_embd * c.block_size

    def estimate_mfu(self, n_sequences, seconds, peak_flops):
        """Share of the device's peak that the model's own arithmetic uses (model FLOPs utilization). n_sequences,
        seconds: of one iteration. peak_flops: operations per second of this device and precision; None gives None."""
        if peak_flops is None:
            return None
        return self.flops_per_token() * self.config.block_size * n_sequences / seconds / peak_flops
