"""GPT-2 weights of Hugging Face, in and out.

`python hf.py OUT_DIR FOLDER` writes the model of OUT_DIR/ckpt.pt as a folder that transformers loads.
"""

from pathlib import Path

import torch

NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
# transformers stores these four as (in, out), a Linear as (out, in)
TRANSPOSED = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')
ACTIVATIONS = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu'}


def load(source):
    """(arguments of GPTConfig, weights by our names) of a hub model or a folder.

    source: one of NAMES, or a folder saved by transformers. Weights are float32.
    Raises ValueError for what is not a plain GPT-2, RuntimeError where the hub is out of reach.
    """
    if source not in NAMES and not Path(source).is_dir():
        raise ValueError(f'init_from={source!r} is neither scratch, resume, auto, {", ".join(NAMES)} nor a folder')
    import huggingface_hub
    from transformers import GPT2Config, GPT2LMHeadModel, PretrainedConfig, logging
    logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    if Path(source).is_dir():
        logging.disable_progress_bar()                  # nothing to download
    try:
        settings, _ = PretrainedConfig.get_config_dict(source)
        if settings.get('model_type') != 'gpt2':
            raise ValueError(f'its model_type is {settings.get("model_type")!r}, not gpt2')
        config = GPT2Config.from_dict(settings)
        arguments = to_arguments(config)
        model, report = GPT2LMHeadModel.from_pretrained(source, config=config, dtype=torch.float32,
                                                        output_loading_info=True)
        strange = [f'{what} {names}' for what, names in report.items() if names]
        if strange:
            raise ValueError(f'its weights do not fit: {"; ".join(strange)[:200]}')
    except Exception as error:                          # the hub's client raises many kinds
        reason = ' '.join(str(error).split())[:300]
        if source in NAMES and not Path(source).is_dir():
            raise RuntimeError(f'{source} could not be downloaded from the hub ({type(error).__name__}: {reason}); '
                               f'go online once, or name a folder of weights') from None
        raise ValueError(f'{source} cannot be used as GPT-2 weights: {reason}') from None
    weights = {name: tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor
               for name, tensor in model.state_dict().items() if not name.endswith(('.attn.bias', '.masked_bias'))}
    return arguments, weights


def to_arguments(config):
    """GPTConfig's arguments for a transformers GPT2Config; ValueError for a variant we lack."""
    plain = dict(n_inner=(None, 4 * config.n_embd), scale_attn_weights=(True,), layer_norm_epsilon=(1e-5,),
                 scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,),
                 activation_function=tuple(ACTIVATIONS), tie_word_embeddings=(True,))
    for name, known in plain.items():
        if getattr(config, name) not in known:
            raise ValueError(f'{name}={getattr(config, name)!r} is not GPT-2 as it is built here')
    return dict(block_size=config.n_positions, vocab_size=config.vocab_size, n_layer=config.n_layer,
                n_head=config.n_head, n_embd=config.n_embd, bias=True,
                activation=ACTIVATIONS[config.activation_function])


def to_transformers(model):
    """A transformers GPT2LMHeadModel with the weights of `model`. GPT-2 there always has
    biases; without any, they are zero."""
    from transformers import GPT2Config, GPT2LMHeadModel
    ours = model.config
    names = {value: key for key, value in reversed(ACTIVATIONS.items())}
    config = GPT2Config(vocab_size=ours.vocab_size, n_positions=ours.block_size, n_embd=ours.n_embd,
                        n_layer=ours.n_layer, n_head=ours.n_head, activation_function=names[ours.activation],
                        resid_pdrop=ours.dropout, embd_pdrop=ours.dropout, attn_pdrop=ours.dropout,
                        bos_token_id=min(50256, ours.vocab_size - 1), eos_token_id=min(50256, ours.vocab_size - 1))
    theirs = GPT2LMHeadModel(config)
    weights = model.state_dict()
    with torch.no_grad():
        for name, target in theirs.state_dict().items():
            if name in weights:
                target.copy_(weights[name].t() if name.endswith(TRANSPOSED) else weights[name])
            else:                                       # a bias that our model does without
                target.zero_()
    return theirs.eval()


if __name__ == '__main__':
    import sys

    import checkpoint
    import configurator
    with configurator.plain_errors():
        if len(sys.argv) != 3:
            raise ValueError('name the run and the folder to write, as in: python hf.py out-gpt2 gpt2-mine')
        to_transformers(checkpoint.build_model(checkpoint.load_model(sys.argv[1]))).save_pretrained(sys.argv[2])
        print(f'wrote {sys.argv[2]}')
