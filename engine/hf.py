"""Hugging Face weights, in and out: GPT-2, and what hf_shapes.py has beyond it."""

import re
from pathlib import Path

import torch

from engine.errors import RunError, UserError
from engine.hf_shapes import CLASSES, kind_of, read_config, read_weights, write_config, write_weights

NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', 'distilgpt2')      # on the hub without an owner


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
