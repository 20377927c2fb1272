"""The models of transformers whose shape GPT covers, as a GPTConfig and weights by our names.

`gpt2`, `nanochat`, `llama` and `qwen3` are the names that transformers gives them (model_type).
Weights are dicts of names and tensors. C channels, H heads, D = C / H, G heads of keys and values.
"""

import dataclasses
import re
from pathlib import Path

import torch
from torch import nn

from engine.downloads import Download, damaged_file, download_files, split_revision
from engine.errors import UserError

# What each kind is

@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of model in transformers.

    title: its name in messages.
    classes: the names of its configuration and its model.
    options: {option of GPTConfig: values that the kind has}; reading it gives the first one.
    settings: {setting of transformers: values that GPT has}.
    layer: {weight of a layer in GPT: those of transformers that make it, one below the other};
        None where the names are the same.
    """
    title: str
    classes: tuple[str, str]
    options: dict[str, tuple]
    settings: dict[str, tuple]
    layer: dict[str, tuple] | None


# Every kind has these options of GPTConfig, or they matter in training alone.
COMMON_OPTIONS = {
    'block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias', 'n_kv_head',
    'n_inner', 'norm_eps', 'rope_theta', 'tied', 'softcap', 'zero_init', 'init_std',
    'attention_dropout'}

# What NanoChat, Llama and Qwen3 share
PLAIN_SETTINGS = dict(
    attention_bias=(False,),
    mlp_bias=(False, None),
    sliding_window=(None,),
)
LAYER = {
    'ln_1': ('input_layernorm',),
    'ln_2': ('post_attention_layernorm',),
    'attn.q_norm': ('self_attn.q_norm',),
    'attn.k_norm': ('self_attn.k_norm',),
    'attn.c_attn': ('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'),
    'attn.c_proj': ('self_attn.o_proj',),
    'mlp.c_fc': ('mlp.gate_proj', 'mlp.up_proj'),
    'mlp.c_proj': ('mlp.down_proj',),
}

GPT2 = Kind(
    title='GPT-2',
    classes=('GPT2Config', 'GPT2LMHeadModel'),
    options=dict(
        position=('learned',),
        norm=('layernorm',),
        activation=('gelu', 'gelu_tanh'),
        qk_norm=(False,),
        embedding_norm=(False,),
        n_kv_head=(0,),
        softcap=(0,),
    ),
    settings=dict(
        scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,),
        add_cross_attention=(False,),
        activation_function=('gelu_new', 'gelu_pytorch_tanh', 'gelu'),
    ),
    layer=None,
)
NANOCHAT = Kind(
    title='NanoChat',
    classes=('NanoChatConfig', 'NanoChatForCausalLM'),
    options=dict(
        position=('rotary',),
        norm=('rmsnorm',),
        activation=('relu2',),
        qk_norm=(True,),
        embedding_norm=(True,),
        bias=(False,),
    ),
    settings=dict(PLAIN_SETTINGS, hidden_act=('relu2',)),
    layer={**LAYER, 'mlp.c_fc': ('mlp.fc1',), 'mlp.c_proj': ('mlp.fc2',)},
)
LLAMA = Kind(
    title='Llama',
    classes=('LlamaConfig', 'LlamaForCausalLM'),
    options=dict(
        position=('rotary',),
        norm=('rmsnorm_gain',),
        activation=('swiglu',),
        qk_norm=(False,),
        embedding_norm=(False,),
        softcap=(0,),
        bias=(False,),
    ),
    settings=dict(PLAIN_SETTINGS, hidden_act=('silu',)),
    layer=LAYER,
)
QWEN3 = Kind(
    title='Qwen3',
    classes=('Qwen3Config', 'Qwen3ForCausalLM'),
    options=dict(LLAMA.options, qk_norm=(True,)),
    settings=LLAMA.settings,
    layer=LAYER,
)
KINDS = dict(gpt2=GPT2, nanochat=NANOCHAT, llama=LLAMA, qwen3=QWEN3)
CLASSES = {name: kind.classes for name, kind in KINDS.items()}

# GPT-2's names for activations, and the name that an export gives to each of ours.
ACTIVATIONS = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu'}
ACTIVATION_NAMES = {'gelu_tanh': 'gelu_new', 'gelu': 'gelu'}

# transformers stores these weights of GPT-2 as (in, out), a Linear as (out, in).
TRANSPOSED = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')

# Masks of attention, which transformers saved among the weights of GPT-2 until 2023.
MASKS = ('.attn.bias', '.attn.masked_bias')

# The files of weights on the hub. Older models have pickled ones only.
SAFETENSORS_FILES = ('config.json', 'model.safetensors', 'model-*-of-*.safetensors',
                     'model.safetensors.index.json', 'adapter_config.json')
PICKLED_FILES = ('config.json', 'pytorch_model.bin', 'pytorch_model-*-of-*.bin',
                 'pytorch_model.bin.index.json')

# A clone without Git LFS has such texts in place of its large files.
LFS_POINTER = b'version https://git-lfs'

# Models on the hub whose names have no owner.
NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', 'distilgpt2')

LAYER_LIMIT = 1000          # transformers would build more layers for hours


# Settings

def read_config(config) -> dict:
    """GPTConfig's arguments for a config of transformers.

    Raises UserError for a variant that GPT does not have.
    """
    kind = config.model_type
    check_settings(config, kind)
    if config.num_hidden_layers > LAYER_LIMIT:
        raise UserError(f'n_layer={config.num_hidden_layers} should be at most {LAYER_LIMIT}')

    arguments = {name: values[0] for name, values in KINDS[kind].options.items()}
    arguments.update(
        block_size=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_embd=config.hidden_size,
        tied=config.tie_word_embeddings,
    )

    if kind == 'gpt2':
        arguments.update(read_gpt2_options(config))
    else:
        arguments.update(read_rotary_options(config))

    # One way to say the usual width, so that nanoGPT reads the checkpoints of a plain GPT-2.
    if arguments['n_inner'] == 4 * config.hidden_size and kind in ('gpt2', 'nanochat'):
        arguments['n_inner'] = 0
    return arguments


def read_gpt2_options(config):
    return dict(
        bias=True,
        activation=ACTIVATIONS[config.activation_function],
        norm_eps=config.layer_norm_epsilon,
        n_inner=config.n_inner or 0,
    )


def read_rotary_options(config):
    # GPTConfig says 0 where there are as many as heads of queries.
    kv_heads = config.num_key_value_heads
    if kv_heads == config.num_attention_heads:
        kv_heads = 0

    return dict(
        n_kv_head=kv_heads,
        norm_eps=config.rms_norm_eps,
        rope_theta=float(config.rope_parameters['rope_theta']),
        softcap=getattr(config, 'final_logit_softcapping', None) or 0.0,
        n_inner=config.intermediate_size,
    )


def check_settings(config, kind):
    """UserError where a config of transformers asks for what GPT does not have."""
    settings = dict(KINDS[kind].settings)

    # GPT's heads have C / H channels.
    if kind != 'gpt2':
        settings['head_dim'] = (config.hidden_size // config.num_attention_heads, None)
    for name, values in settings.items():
        if getattr(config, name, None) not in values:
            raise unsupported(config, name)

    if kind != 'gpt2':
        rope = config.rope_parameters
        is_plain = rope.get('rope_type') == 'default'
        if not is_plain or rope.get('partial_rotary_factor', 1) != 1:
            raise unsupported(config, 'rope_parameters')


def unsupported(config, name):
    return UserError(f'{name}={getattr(config, name)!r} is a variant of {config.model_type} '
                     f'that is not supported')


def kind_of(config) -> str:
    """The kind that a GPTConfig is. UserError that names an option which the nearest one lacks."""
    misfits = {name: misfit_options(config, kind) for name, kind in KINDS.items()}
    nearest = min(misfits, key=lambda name: len(misfits[name]))

    unknown = misfits[nearest] + unknown_options(config, KINDS[nearest])
    if unknown:
        name = unknown[0]
        message = (f"{name}={getattr(config, name)!r} is not an option of transformers' "
                   f'{KINDS[nearest].title}')
        if name in KINDS[nearest].options:
            known = ' or '.join(map(repr, KINDS[nearest].options[name]))
            message += f', which has {known}; train with that for an export to transformers'
        raise UserError(message)
    return nearest


def misfit_options(config, kind):
    """The options of a GPTConfig with a value that the kind does not have."""
    found = [name for name, values in kind.options.items() if getattr(config, name) not in values]

    # n_head is another way to say 0.
    if 'n_kv_head' in found and config.kv_heads == config.n_head:
        found.remove('n_kv_head')
    return found


def unknown_options(config, kind):
    """The options that somebody added to GPTConfig, where they are used."""
    known = COMMON_OPTIONS | kind.options.keys()
    return [field.name for field in dataclasses.fields(config)
            if field.name not in known and getattr(config, field.name) != field.default]


def write_config(config, kind: str) -> dict:
    """The arguments of the kind's config in transformers, for a GPTConfig."""
    last_id = min(50256, config.vocab_size - 1)
    arguments = dict(
        vocab_size=config.vocab_size,
        bos_token_id=last_id,
        eos_token_id=last_id,
        tie_word_embeddings=config.tied,
    )

    if kind == 'gpt2':
        arguments.update(write_gpt2_options(config))
    else:
        arguments.update(write_rotary_options(config))
    if kind == 'nanochat':
        arguments.update(final_logit_softcapping=config.softcap or None)
    return arguments


def write_gpt2_options(config):
    return dict(
        n_positions=config.block_size,
        n_ctx=config.block_size,                    # transformers needs neither this nor n_inner,
        n_inner=config.mlp_width,                   # but other readers do
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        activation_function=ACTIVATION_NAMES[config.activation],
        layer_norm_epsilon=config.norm_eps,
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=dropout_of_attention(config),
    )


def write_rotary_options(config):
    return dict(
        max_position_embeddings=config.block_size,
        hidden_size=config.n_embd,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.kv_heads,
        intermediate_size=config.mlp_width,
        head_dim=config.head_size,
        rms_norm_eps=config.norm_eps,
        attention_dropout=dropout_of_attention(config),
        pad_token_id=None,
        rope_parameters=dict(rope_type='default', rope_theta=float(config.rope_theta)),
    )


def dropout_of_attention(config):
    """The share of attention weights that training sets to zero."""
    if config.attention_dropout:
        return config.dropout
    return 0.0


# Weights

def names_in(kind, n_layer):
    """{name in GPT: names in transformers}, for a kind whose names are not those of GPT.

    The weights of those names, one below the other, make the one weight of GPT.
    """
    names = {
        'transformer.wte.weight': ['model.embed_tokens.weight'],
        'transformer.ln_f.weight': ['model.norm.weight'],
        'lm_head.weight': ['lm_head.weight'],
    }
    for i in range(n_layer):
        for own, parts in KINDS[kind].layer.items():
            hf_names = [f'model.layers.{i}.{part}.weight' for part in parts]
            names[f'transformer.h.{i}.{own}.weight'] = hf_names
    return names


def swap_halves(weight, head_size):
    """Queries or keys, (H D, C), with the two halves of each head's channels in the other order.

    NanoChat turns pairs of channels the other way round, which is the same for swapped channels.
    """
    halves = weight.view(-1, 2, head_size // 2, weight.size(1))     # (H, 2, D / 2, C)
    return halves.flip(1).reshape(weight.shape)


def swap_rotated(kind, parts, head_size):
    """The weights that make one of GPT, with the halves of NanoChat's queries and keys swapped."""
    if kind != 'nanochat' or len(parts) != 3:       # three are queries, keys and values
        return parts

    q, k, v = parts
    return [swap_halves(q, head_size), swap_halves(k, head_size), v]


def read_weights(kind: str, hf_weights: dict, n_layer: int, head_size: int) -> dict:
    """The weights of GPT, {name: tensor}, of a state_dict of transformers.

    Raises UserError where it has one that GPT does not have. One that is missing is reported by
    GPT.from_weights.
    """
    if kind == 'gpt2':
        return read_gpt2_weights(hf_weights)

    weights = {}
    left = dict(hf_weights)
    for own, names in names_in(kind, n_layer).items():
        if not all(name in left for name in names):
            continue

        parts = swap_rotated(kind, [left.pop(name) for name in names], head_size)
        weights[own] = parts[0]
        if len(parts) > 1:
            weights[own] = torch.cat(parts)

    if left:
        raise UserError(f'its weight {min(left)} has no place in a {kind} here')
    return weights


def read_gpt2_weights(hf_weights):
    weights = {}
    for name, tensor in hf_weights.items():
        if name.endswith(MASKS):
            continue
        if name.endswith(TRANSPOSED):
            tensor = tensor.t().contiguous()
        weights[name] = tensor
    return weights


def write_weights(kind: str, weights: dict, shapes: dict, head_size: int, n_layer: int) -> dict:
    """The weights that transformers loads, {name: tensor}, of a GPT's state_dict.

    shapes: {name: shape} of the weights that transformers wants.
    Raises UserError where either has a weight that the other lacks.
    """
    left = dict(weights)
    if kind == 'gpt2':
        hf_weights = write_gpt2_weights(left, shapes)
    else:
        hf_weights = {}
        for own, names in names_in(kind, n_layer).items():
            if own in left:
                parts = left.pop(own).split([shapes[name][0] for name in names])
                hf_weights.update(zip(names, swap_rotated(kind, parts, head_size)))

    if left:
        raise UserError(f"transformers' {KINDS[kind].title} has no weight {min(left)}")

    missing = shapes.keys() - hf_weights.keys()
    if missing:
        raise UserError(f'the model has no weight {min(missing)}, '
                        f'which a {KINDS[kind].title} of transformers needs')
    return hf_weights


def write_gpt2_weights(left, shapes):
    """The weights of a GPT-2, which are taken out of `left`.

    GPT-2 always has biases in transformers; they are zeros if GPT has none.
    """
    hf_weights = {}
    for name, shape in shapes.items():
        if name in left:
            weight = left.pop(name)
            if name.endswith(TRANSPOSED):
                weight = weight.t()
            hf_weights[name] = weight
        elif name.endswith('.bias'):
            hf_weights[name] = torch.zeros(shape)
    return hf_weights


# Models

def load(source: str) -> tuple[dict, dict]:
    """(GPTConfig's arguments, weights by our names in float32) of a hub model or a folder.

    source: one of NAMES, owner/name on the hub, either with @revision, or a folder saved by
    transformers.
    Raises UserError for a model that GPT cannot represent, RunError where the hub is out of reach.
    """
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()         # download_files has bars of its own

    is_folder = bool(source) and Path(source).is_dir()
    folder = find_weights(source)
    try:
        check_files(folder, is_folder)
        return load_supported(folder)
    except UserError as error:
        raise UserError(f'{source} cannot be used as weights: {error}') from None
    except Exception as error:                          # a damaged file can raise anything
        reason = ' '.join(str(error).split())[:300]
        raise UserError(f'{source} cannot be used as weights: {reason}') from None


def find_weights(source: str) -> Path:
    """The folder that holds the weights `source`; those of the hub are downloaded once.

    Raises UserError for what is neither a folder nor a name of the hub, and as download_files.
    """
    if source and Path(source).is_dir():
        return Path(source)

    name, revision = split_revision(source)
    if name.endswith('.pt'):
        fault = f'there is no file {source}'
        if Path(source).is_file():
            fault = f'{source} is no file of a run'
        raise UserError(f'{fault}; name the folder of a run, or a model that it keeps, such as '
                        f'out/ckpt_001000.pt')
    if name not in NAMES and not re.fullmatch(r'\w[\w.-]*/\w[\w.-]*', name):
        raise UserError(f'{source!r} is neither a folder nor a hub model '
                        f'({", ".join(NAMES)}, OWNER/NAME, OWNER/NAME@REVISION); '
                        f'--help lists what else --init_from takes')

    download = Download(source, 'name a folder of weights', repository=name, revision=revision)
    folder = download_files(download, SAFETENSORS_FILES)
    if not any(folder.glob('*.safetensors')):
        folder = download_files(download, PICKLED_FILES)
    return folder


def check_files(folder, is_own):
    """UserError where a folder of weights is something else, or has a damaged file.

    is_own: whether it is a person's folder, and not one of the hub's cache.
    """
    if not (folder / 'config.json').is_file():
        raise UserError(describe_other_folder(folder))
    if not any(folder.glob('*.safetensors')) and not any(folder.glob('*.bin')):
        raise UserError('it has a config.json, and no weights beside it that PyTorch reads; take '
                        'its model.safetensors or pytorch_model.bin as well')

    for path in sorted(folder.glob('*.safetensors')):
        if is_lfs_pointer(path):
            raise UserError(f'{path.name} is a pointer of Git LFS; run `git lfs pull` in '
                            f'the folder')
        reason = find_damage(path)
        if reason and is_own:
            raise UserError(f'{path.name} is damaged ({reason}); copy it again')
        if reason:
            raise damaged_file(path, reason)


def is_lfs_pointer(path):
    with open(path, 'rb') as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def describe_other_folder(folder):
    """What a folder without config.json holds, and what to do about it."""
    if (folder / 'adapter_config.json').is_file():
        return ('it is an adapter of peft, without the weights that it adapts; load both with '
                'peft, and save what merge_and_unload() returns with save_pretrained()')
    if any(folder.glob('*.gguf')):
        return ('it holds a .gguf, which is a format of llama.cpp; take the files that it was '
                'made from, with a config.json and *.safetensors')
    return 'it has no config.json; take the whole folder that save_pretrained() wrote'


def find_damage(path):
    """Why a .safetensors file cannot be read; None where it can."""
    import safetensors
    try:
        with safetensors.safe_open(path, 'pt'):
            return None
    except safetensors.SafetensorError as error:
        return ' '.join(str(error).split())[:100]


def load_supported(folder):
    """What `load` returns, with the errors of transformers as they are."""
    import transformers

    # its configuration
    settings, _ = transformers.PretrainedConfig.get_config_dict(folder)
    kind = settings.get('model_type')
    if kind not in KINDS:
        raise UserError(f'its model_type is {kind!r}, and only {", ".join(KINDS)} are supported')

    config_class, model_class = classes_of(kind)
    config = config_class.from_dict(settings)
    arguments = read_config(config)

    # its weights
    model, report = model_class.from_pretrained(folder, config=config, dtype=torch.float32,
                                                output_loading_info=True)
    misfits = []
    for what, names in report.items():
        names = [name for name in names if not str(name).endswith(MASKS)]
        if names:
            misfits.append(f'{what} {", ".join(map(str, names))}')
    if misfits:
        raise UserError(f'its weights do not fit: {"; ".join(misfits)[:200]}')

    head_size = arguments['n_embd'] // arguments['n_head']
    weights = read_weights(kind, model.state_dict(), arguments['n_layer'], head_size)
    return arguments, weights


def to_transformers(config, weights: dict[str, torch.Tensor]) -> nn.Module:
    """A model of transformers, of the kind that fits a GPTConfig.

    weights: the state_dict of a GPT. GPT-2 always has biases in transformers; a model without them
    gets zeros.
    Raises UserError for an option or a weight that the kind does not have, and where `weights`
    lacks one of its other weights.
    """
    import transformers
    transformers.logging.disable_progress_bar()

    # a model with weights that are drawn
    kind = kind_of(config)
    config_class, model_class = classes_of(kind)
    model = model_class(config_class(**write_config(config, kind)))

    # ours in their place
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    hf_weights = write_weights(kind, weights, shapes, config.head_size, config.n_layer)
    model.load_state_dict(hf_weights)
    return model.eval()


def classes_of(kind):
    """The two classes that transformers has for a kind: its configuration, its model."""
    import transformers
    config_name, model_name = CLASSES[kind]
    return getattr(transformers, config_name), getattr(transformers, model_name)
