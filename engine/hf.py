"""GPT-2 weights of Hugging Face, in and out."""

import dataclasses
from pathlib import Path

import torch

from engine.errors import RunError, UserError

NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
# transformers stores these four as (in, out), a Linear as (out, in).
TRANSPOSED = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')
OPTIONS = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias', 'activation')   # of GPTConfig
ACTIVATIONS = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu'}


def load(source):
    """(GPTConfig's arguments, weights by our names) of a hub model or a folder.

    source: one of NAMES, or a folder saved by transformers. Weights are float32.
    Raises UserError for what is not a plain GPT-2, RunError where the hub is out of reach.
    """
    if source not in NAMES and not (source and Path(source).is_dir()):
        raise UserError(f'init_from={source!r} should be scratch, resume, auto, {", ".join(NAMES)}, or a folder of weights')
    import huggingface_hub
    from transformers import GPT2Config, GPT2LMHeadModel, PretrainedConfig, logging
    logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    if Path(source).is_dir():
        logging.disable_progress_bar()                  # nothing to download
    try:
        settings, _ = PretrainedConfig.get_config_dict(source)
        if settings.get('model_type') != 'gpt2':
            raise UserError(f'its model_type is {settings.get("model_type")!r}, not gpt2')
        config = GPT2Config.from_dict(settings)
        arguments = read_config(config)
        model, report = GPT2LMHeadModel.from_pretrained(source, config=config, dtype=torch.float32,
                                                        output_loading_info=True)
        misfits = [f'{what} {names}' for what, names in report.items() if names]
        if misfits:
            raise UserError(f'its weights do not fit: {"; ".join(misfits)[:200]}')
    except Exception as error:                          # the hub's client raises many kinds
        reason = ' '.join(str(error).split())[:300]
        if source in NAMES and not Path(source).is_dir():
            raise RunError(f'{source} could not be downloaded from the hub ({type(error).__name__}: {reason}); '
                           f'go online once, or name a folder of weights') from None
        raise UserError(f'{source} cannot be used as GPT-2 weights: {reason}') from None
    weights = {name: tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor
               for name, tensor in model.state_dict().items() if not name.endswith(('.attn.bias', '.masked_bias'))}
    return arguments, weights


def read_config(config):
    """GPTConfig's arguments for a transformers GPT2Config. UserError for a variant that GPT does not have."""
    supported = dict(n_inner=(None, 4 * config.n_embd), scale_attn_weights=(True,), layer_norm_epsilon=(1e-5,),
                     scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,),
                     activation_function=tuple(ACTIVATIONS), tie_word_embeddings=(True,))
    for name, values in supported.items():
        if getattr(config, name) not in values:
            raise UserError(f'{name}={getattr(config, name)!r} is a variant of GPT-2 that is not supported')
    if config.n_layer > 1000:                           # transformers would build layers for hours
        raise UserError(f'n_layer={config.n_layer} should be at most 1000')
    return dict(block_size=config.n_positions, vocab_size=config.vocab_size, n_layer=config.n_layer,
                n_head=config.n_head, n_embd=config.n_embd, bias=True,
                activation=ACTIVATIONS[config.activation_function])


def to_transformers(config, weights):
    """A transformers GPT2LMHeadModel of a GPTConfig and a GPT's state_dict.

    GPT-2 there always has biases; a model without them gets zeros. Raises UserError for an option or a
    weight that GPT-2 does not have, and where it lacks any other weight.
    """
    for field in dataclasses.fields(config):
        if field.name not in OPTIONS and getattr(config, field.name) != field.default:
            raise UserError(f"{field.name}={getattr(config, field.name)!r} is not an option of transformers' GPT-2")
    from transformers import GPT2Config, GPT2LMHeadModel, logging
    logging.disable_progress_bar()
    activations = {value: key for key, value in reversed(ACTIVATIONS.items())}
    last_id = min(50256, config.vocab_size - 1)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd, n_layer=config.n_layer,
        n_head=config.n_head, activation_function=activations[config.activation], resid_pdrop=config.dropout,
        embd_pdrop=config.dropout, attn_pdrop=config.dropout, bos_token_id=last_id, eos_token_id=last_id))
    extra = sorted(set(weights) - set(model.state_dict()))
    if extra:
        raise UserError(f"transformers' GPT-2 has no weight {extra[0]}")
    with torch.no_grad():
        for name, target in model.state_dict().items():
            if name in weights:
                target.copy_(weights[name].t() if name.endswith(TRANSPOSED) else weights[name])
            elif name.endswith('.bias'):
                target.zero_()
            else:
                raise UserError(f'the model has no weight {name}, which a GPT-2 of transformers needs')
    return model.eval()
