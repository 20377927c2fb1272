"""The transformers models whose shape GPT covers: their settings as GPTConfig's, and their weights by our names.

`gpt2`, `nanochat`, `llama` and `qwen3` are the names that transformers gives them (model_type). Weights are dicts of
names and tensors. C channels, H heads, D = C / H, G heads of keys and values.
"""

import dataclasses
import re
from pathlib import Path

import torch

from engine.errors import RunError, UserError

CLASSES = dict(gpt2=('GPT2Config', 'GPT2LMHeadModel'), nanochat=('NanoChatConfig', 'NanoChatForCausalLM'),
               llama=('LlamaConfig', 'LlamaForCausalLM'), qwen3=('Qwen3Config', 'Qwen3ForCausalLM'))
ACTIVATIONS = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu', 'relu2': 'relu2', 'silu': 'swiglu'}

# The options of GPTConfig that a kind has; the first value is the one that reading it gives.
GPT2 = dict(position=('learned',), norm=('layernorm',), activation=('gelu', 'gelu_tanh'), qk_norm=(False,),
            embedding_norm=(False,), n_kv_head=(0,), softcap=(0,))
NANOCHAT = dict(position=('rotary',), norm=('rmsnorm',), activation=('relu2',), qk_norm=(True,), embedding_norm=(True,),
                bias=(False,))
LLAMA = dict(position=('rotary',), norm=('rmsnorm_gain',), activation=('swiglu',), qk_norm=(False,), embedding_norm=(False,),
             softcap=(0,), bias=(False,))
OPTIONS = dict(gpt2=GPT2, nanochat=NANOCHAT, llama=LLAMA, qwen3={**LLAMA, 'qk_norm': (True,)})
# Every kind has these, or they matter in training alone.
COMMON = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias', 'n_kv_head', 'n_inner', 'norm_eps',
          'rope_theta', 'tied', 'softcap', 'zero_init')

# transformers stores these weights of GPT-2 as (in, out), a Linear as (out, in).
TRANSPOSED = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')
NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', 'distilgpt2')      # on the hub without an owner


# Settings

def read_config(config):
    """GPTConfig's arguments for a config of transformers. UserError for a variant that GPT does not have."""
    kind = config.model_type
    if kind == 'gpt2':
        supported = dict(scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,),
                         activation_function=('gelu_new', 'gelu_pytorch_tanh', 'gelu'))
    else:
        rope = config.rope_parameters
        rope_is_plain = rope.get('rope_type') == 'default' and rope.get('partial_rotary_factor', 1) == 1
        supported = dict(hidden_act=('relu2',) if kind == 'nanochat' else ('silu',), attention_bias=(False,),
                         mlp_bias=(False, None), head_dim=(config.hidden_size // config.num_attention_heads, None),
                         sliding_window=(None,), rope_parameters=(rope,) if rope_is_plain else ())
    for name, values in supported.items():
        if getattr(config, name, None) not in values:
            raise UserError(f'{name}={getattr(config, name)!r} is a variant of {kind} that is not supported')
    if config.num_hidden_layers > 1000:                 # transformers would build layers for hours
        raise UserError(f'n_layer={config.num_hidden_layers} should be at most 1000')
    arguments = {name: values[0] for name, values in OPTIONS[kind].items()}
    arguments.update(block_size=config.max_position_embeddings, vocab_size=config.vocab_size, n_layer=config.num_hidden_layers,
                     n_head=config.num_attention_heads, n_embd=config.hidden_size, tied=config.tie_word_embeddings)
    if kind == 'gpt2':
        width = config.n_inner or 0
        arguments.update(bias=True, activation=ACTIVATIONS[config.activation_function], norm_eps=config.layer_norm_epsilon)
    else:
        width, kv_heads = config.intermediate_size, config.num_key_value_heads
        arguments.update(n_kv_head=0 if kv_heads == config.num_attention_heads else kv_heads, norm_eps=config.rms_norm_eps,
                         rope_theta=float(rope['rope_theta']), softcap=getattr(config, 'final_logit_softcapping', None) or 0.0)
    # One way to say the usual width, so that nanoGPT reads the checkpoints of a plain GPT-2.
    return dict(arguments, n_inner=0 if width == 4 * config.hidden_size and kind in ('gpt2', 'nanochat') else width)


def kind_of(config):
    """The kind that a GPTConfig is. UserError that names an option which the nearest kind does not have."""
    misfits = {kind: [name for name, values in options.items() if getattr(config, name) not in values
                      and not (name == 'n_kv_head' and config.kv_heads == config.n_head)]
               for kind, options in OPTIONS.items()}
    kind = min(misfits, key=lambda kind: len(misfits[kind]))
    own = [field.name for field in dataclasses.fields(config)           # an option that somebody added to GPTConfig
           if field.name not in {*COMMON, *OPTIONS[kind]} and getattr(config, field.name) != field.default]
    for name in misfits[kind] + own:
        title = 'GPT-2' if kind == 'gpt2' else CLASSES[kind][0].removesuffix('Config')
        raise UserError(f"{name}={getattr(config, name)!r} is not an option of transformers' {title}")
    return kind


def write_config(config, kind):
    """The arguments of the kind's config in transformers, for a GPTConfig. Some (n_ctx, n_inner) only other readers need."""
    last_id = min(50256, config.vocab_size - 1)
    common = dict(vocab_size=config.vocab_size, bos_token_id=last_id, eos_token_id=last_id, tie_word_embeddings=config.tied)
    if kind == 'gpt2':
        names = {value: key for key, value in reversed(ACTIVATIONS.items())}
        return dict(common, n_positions=config.block_size, n_ctx=config.block_size, n_embd=config.n_embd, n_layer=config.n_layer,
                    n_head=config.n_head, n_inner=config.mlp_width, activation_function=names[config.activation],
                    layer_norm_epsilon=config.norm_eps, resid_pdrop=config.dropout, embd_pdrop=config.dropout,
                    attn_pdrop=config.dropout)
    common.update(max_position_embeddings=config.block_size, hidden_size=config.n_embd, num_hidden_layers=config.n_layer,
                  num_attention_heads=config.n_head, num_key_value_heads=config.kv_heads, intermediate_size=config.mlp_width,
                  head_dim=config.head_size, rms_norm_eps=config.norm_eps, attention_dropout=config.dropout, pad_token_id=None,
                  rope_parameters=dict(rope_type='default', rope_theta=float(config.rope_theta)))
    return dict(common, final_logit_softcapping=config.softcap or None) if kind == 'nanochat' else common


# Weights

def names_in(kind, n_layer):
    """{name in GPT: names in transformers}. The weights of those names, one below the other, make the one weight of GPT.
    GPT-2 needs no table, as its names are the same."""
    layer = {'ln_1': ['input_layernorm'], 'ln_2': ['post_attention_layernorm'], 'attn.q_norm': ['self_attn.q_norm'],
             'attn.k_norm': ['self_attn.k_norm'], 'attn.c_attn': [f'self_attn.{part}_proj' for part in 'qkv'],
             'attn.c_proj': ['self_attn.o_proj'], 'mlp.c_fc': ['mlp.gate_proj', 'mlp.up_proj'], 'mlp.c_proj': ['mlp.down_proj']}
    if kind == 'nanochat':
        layer.update({'mlp.c_fc': ['mlp.fc1'], 'mlp.c_proj': ['mlp.fc2']})
    names = {'transformer.wte': ['model.embed_tokens'], 'transformer.ln_f': ['model.norm'], 'lm_head': ['lm_head']}
    for i in range(n_layer):
        names.update({f'transformer.h.{i}.{own}': [f'model.layers.{i}.{name}' for name in hf_names]
                      for own, hf_names in layer.items()})
    return {f'{own}.weight': [f'{name}.weight' for name in hf_names] for own, hf_names in names.items()}


def swap_halves(weight, head_size):
    """Queries or keys, (H D, C), with the two halves of each head's channels in the other order. NanoChat turns
    pairs of channels the other way round, which is the same for swapped channels."""
    return weight.view(-1, 2, head_size // 2, weight.size(1)).flip(1).reshape(weight.shape)


def read_weights(kind, hf_weights, n_layer, head_size):
    """The weights of GPT, {name: tensor}, of a state_dict of transformers. UserError where it has one that GPT does not have."""
    if kind == 'gpt2':
        return {name: tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor
                for name, tensor in hf_weights.items() if not name.endswith(('.attn.bias', '.masked_bias'))}
    weights, left = {}, dict(hf_weights)
    for own, names in names_in(kind, n_layer).items():
        if all(name in left for name in names):         # a missing weight is reported by GPT.from_weights
            parts = [left.pop(name) for name in names]
            if kind == 'nanochat' and len(parts) == 3:
                parts[:2] = [swap_halves(part, head_size) for part in parts[:2]]
            weights[own] = torch.cat(parts) if len(parts) > 1 else parts[0]
    if left:
        raise UserError(f'its weight {min(left)} has no place in a {kind} here')
    return weights


def write_weights(kind, weights, shapes, head_size, n_layer):
    """The weights that transformers loads, with the names in `shapes` {name: shape}, of a GPT's state_dict. GPT-2 there
    always has biases, which are zeros if GPT has none. UserError where either has a weight that the other lacks."""
    hf_weights, left = {}, dict(weights)
    if kind == 'gpt2':
        for name, shape in shapes.items():
            if name in left:
                weight = left.pop(name)
                hf_weights[name] = weight.t() if name.endswith(TRANSPOSED) else weight
            elif name.endswith('.bias'):
                hf_weights[name] = torch.zeros(shape)
    else:
        for own, names in names_in(kind, n_layer).items():
            if own in left:
                parts = left.pop(own).split([shapes[name][0] for name in names])
                if kind == 'nanochat' and len(parts) == 3:
                    parts = [*(swap_halves(part, head_size) for part in parts[:2]), parts[2]]
                hf_weights.update(zip(names, parts))
    title = 'GPT-2' if kind == 'gpt2' else kind
    if left:
        raise UserError(f"transformers' {title} has no weight {min(left)}")
    if missing := sorted(set(shapes) - set(hf_weights)):
        raise UserError(f'the model has no weight {missing[0]}, which a {title} of transformers needs')
    return hf_weights


def load(source):
    """(GPTConfig's arguments, weights by our names) of a hub model or a folder.

    source: one of NAMES, owner/name on the hub, or a folder saved by transformers. Weights are float32.
    Raises UserError for a model that GPT cannot represent, RunError where the hub is out of reach.
    """
    is_folder = bool(source) and Path(source).is_dir()
    if not is_folder and source not in NAMES and not re.fullmatch(r'\w[\w.-]*/\w[\w.-]*', source):
        raise UserError(f'{source!r} is neither a folder nor a hub model ({", ".join(NAMES)}, OWNER/NAME); '
                        f'--help lists what else --init_from takes')
    import huggingface_hub
    import transformers
    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    if is_folder:
        transformers.logging.disable_progress_bar()     # nothing to download
    try:
        settings, _ = transformers.PretrainedConfig.get_config_dict(source)
        kind = settings.get('model_type')
        if kind not in CLASSES:
            raise UserError(f'its model_type is {kind!r}, and only {", ".join(CLASSES)} are supported')
        config_class, model_class = (getattr(transformers, name) for name in CLASSES[kind])
        config = config_class.from_dict(settings)
        arguments = read_config(config)
        model, report = model_class.from_pretrained(source, config=config, dtype=torch.float32, output_loading_info=True)
        misfits = [f'{what} {names}' for what, names in report.items() if names]
        if misfits:
            raise UserError(f'its weights do not fit: {"; ".join(misfits)[:200]}')
        head_size = arguments['n_embd'] // arguments['n_head']
        return arguments, read_weights(kind, model.state_dict(), arguments['n_layer'], head_size)
    except Exception as error:                          # the hub's client raises many kinds
        reason = ' '.join(str(error).split())[:300]
        if is_folder or isinstance(error, UserError):
            raise UserError(f'{source} cannot be used as weights: {reason}') from None
        if isinstance(error.__cause__, huggingface_hub.errors.RepositoryNotFoundError):
            raise UserError(f'{source} is neither a folder here nor a model that the hub shows you; '
                            f'check --init_from') from None
        raise RunError(f'{source} could not be downloaded from the hub ({type(error).__name__}: {reason}); '
                       f'go online once, or name a folder of weights') from None


def to_transformers(config, weights):
    """A model of transformers, of the kind that fits a GPTConfig, with the weights of a GPT's state_dict.

    GPT-2 there always has biases; a model without them gets zeros. Raises UserError for an option or a
    weight that the kind does not have, and where `weights` lacks one of its other weights.
    """
    import transformers
    transformers.logging.disable_progress_bar()
    kind = kind_of(config)
    config_class, model_class = (getattr(transformers, name) for name in CLASSES[kind])
    model = model_class(config_class(**write_config(config, kind)))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.load_state_dict(write_weights(kind, weights, shapes, config.head_size, config.n_layer))
    return model.eval()
