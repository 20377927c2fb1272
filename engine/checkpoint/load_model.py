"""A model and its tokenizer, from a run or from Hugging Face weights."""

from engine.checkpoint import run_folder
from engine.dataloader.batches import dataset_tokenizer
from engine.errors import UserError
from engine.hf.tokenizer_json import pretrained_spec
from engine.tokenizer import GPT2, check_spec


def load_model(GPT, init_from, out_dir):
    """(model, tokenizer spec, iteration). init_from='resume' takes the run in out_dir; else it names Hugging Face
    weights, which have no iteration. GPT: the class, which this module cannot import. UserError where they do not fit."""
    if init_from == 'resume':
        saved = run_folder.load_newest_model(out_dir)
        model, spec, iter_num, source = GPT.from_checkpoint(saved), checkpoint_spec(saved), saved['iter_num'], out_dir
        advice = 'restore the dataset in data/ that the model was trained on'
    else:
        model, spec, iter_num, source = GPT.from_pretrained(init_from), pretrained_spec(init_from) or GPT2, None, init_from
        advice = 'put its own tokenizer.json beside the weights'
    if spec['vocab_size'] > model.config.vocab_size:
        raise UserError(f'{source} has {model.config.vocab_size} tokens, and its tokenizer {spec["vocab_size"]}; {advice}')
    return model, spec, iter_num


def checkpoint_spec(saved):
    """The tokenizer spec of a checkpoint: its own, else that of the dataset it names, else GPT-2's."""
    # nanoGPT's files have no tokenizer, but they name the dataset.
    spec = saved.get('tokenizer') or dataset_tokenizer((saved.get('config') or {}).get('dataset'))
    try:
        return check_spec(spec)
    except UserError as error:
        raise UserError(f'{saved["path"]}: {error}') from None
