"""A model as a Hugging Face folder: weights, configurations, tokenizer, model card."""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.chat_layout import ChatLayout
from engine.errors import UserError
from engine.hf.chat_template import chat_template
from engine.hf.own_fields import FIELD, own_fields
from engine.hf.tokenizer_json import OWN_BPE, tokenizer_files
from engine.hf.weights import to_transformers
from engine.tokenizer import Tokenizer, TokenizerSpec

MAX_SHARD_SIZE = '5GB'
CARD_LENGTH = 100           # tokens of the text that the model card's example generates
CARD = '''---
library_name: transformers
pipeline_tag: text-generation
---
# {title}

{parameters:,} parameters, {architecture}, weights in {dtype}; {tokens:,} tokens ({tokenizer}).
{zeros}Trained{iterations}{dataset}.

| loss, nats per token | train | validation |
|----------------------|------:|-----------:|
{losses}

These lines generate a text. Run them in the folder of this file:

```python
from transformers import pipeline
generate = pipeline('text-generation', model='.')
print(generate({prompt!r}, max_length={length})[0]['generated_text'])
```
{special_tokens}
| setting | value |
|---------|-------|
{settings}
'''

# of a tokenizer without a token for the end of a text
CARD_SPECIAL_TOKENS = '''
The tokenizer has no token for the beginning or the end of a text, for padding, or for what it does
not know. Some trainers and converters want those. This adds one token for all four, which the model
has yet to learn:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained('.')
names = ('bos_token', 'eos_token', 'pad_token', 'unk_token')
tokenizer.add_special_tokens({name: '<|endoftext|>' for name in names})
model = AutoModelForCausalLM.from_pretrained('.')
model.resize_token_embeddings(len(tokenizer))
tokenizer.save_pretrained('with-special-tokens')
model.save_pretrained('with-special-tokens')
```
'''


@dataclass
class TrainedModel:
    """What is exported.

    config: the GPTConfig of the model.
    weights: the state_dict of the GPT.
    spec: the spec of the tokenizer.
    chat: the layout of the conversations that it was trained on, or None.

    For the model card:

    settings: those that the run was trained with, {name: value}.
    iter_num: the iteration that the weights are of, or None where it is not known.
    best_val_loss: the lowest validation loss until then, in nats, or None.
    losses: (iteration, train loss, val loss) of each evaluation of the run.
    """
    config: object
    weights: dict[str, torch.Tensor]
    spec: TokenizerSpec
    settings: dict
    iter_num: int | None
    best_val_loss: float | None
    losses: list[tuple[int, float, float]]
    chat: ChatLayout | None = None


def write(folder: str | Path, trained: TrainedModel, dtype: str = 'float32',
          trim_vocab: bool = False) -> list[str]:
    """Write a model to a new folder. Returns notes to show the user, a list of lines.

    dtype: the type of the weights.
    trim_vocab: drop the rows of ids that the tokenizer lacks.
    Raises UserError where transformers has no such model.
    """
    folder = Path(folder)
    tokenizer = Tokenizer(trained.spec)
    files = tokenizer_files(trained.spec)
    padding = padding_ids(trained.config, tokenizer)
    if trim_vocab and padding:
        trained = trim(trained, tokenizer.vocab_size)
        padding = range(0)

    # the model, with what generation needs to know
    model = to_transformers(trained.config, trained.weights).to(getattr(torch, dtype))
    for settings in (model.config, model.generation_config):
        settings.bos_token_id = tokenizer.end_of_text
        settings.eos_token_id = tokenizer.end_of_text
    # A GPT-2 of transformers cannot read more, and a pipeline generates 256 tokens by default.
    model.generation_config.max_length = trained.config.block_size
    if padding:                                     # whose logits were never trained
        model.generation_config.suppress_tokens = list(padding)
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    complete_config(folder / 'config.json')

    # the tokenizer and the card
    tokenizer_config = read_tokenizer_config(files['tokenizer_config.json'])
    tokenizer_config['model_max_length'] = trained.config.block_size
    if is_own_bpe(trained.spec):                    # transformers then pads batches of texts
        tokenizer_config['pad_token'] = tokenizer_config['eos_token']
    own = own_fields(trained.spec, trained.chat).to_dict()
    if own:
        tokenizer_config[FIELD] = own
    if trained.chat:                                # None is as good as no template
        tokenizer_config['chat_template'] = chat_template(trained.chat, tokenizer)
    files['tokenizer_config.json'] = json.dumps(tokenizer_config, indent=2)
    files['README.md'] = model_card(model, trained, dtype)
    for name, text in files.items():
        (folder / name).write_text(text, encoding='utf-8', newline='\n')

    # safetensors lets nobody but the owner read its files; they get the mode of the others
    for path in folder.glob('*.safetensors'):
        shutil.copymode(folder / 'README.md', path)

    return export_notes(model, trained.spec, padding)


def padding_ids(config, tokenizer):
    """The ids that the tokenizer lacks. UserError where the model lacks ids of the tokenizer."""
    if config.vocab_size < tokenizer.vocab_size:
        raise UserError(f'the tokenizer has {tokenizer.vocab_size} tokens and the model '
                        f'{config.vocab_size}; prepare the dataset that the model was trained on '
                        f'in data/ first')
    return range(tokenizer.vocab_size, config.vocab_size)


def trim(trained, vocab_size):
    """The model without the rows of the ids from vocab_size on."""
    # The head and the embedding have a row per token; a head that is tied is the embedding.
    weights = dict(trained.weights)
    for name in ('transformer.wte.weight', 'lm_head.weight'):
        weights[name] = weights[name][:vocab_size]

    config = dataclasses.replace(trained.config, vocab_size=vocab_size)
    return dataclasses.replace(trained, config=config, weights=weights)


def is_own_bpe(spec):
    """True for byte pairs that prepare.py --tokenizer=bpe trained."""
    return spec.tokenizer_name == OWN_BPE and spec.tokenizer_revision is None


def export_notes(model, spec, padding):
    """Lines on what may surprise. padding: the ids that the tokenizer lacks."""
    notes = []
    if spec.kind == 'char':
        notes.append('llama.cpp has no tokenizer of characters, so its converter refuses this one')
    elif getattr(model.config, 'activation_function', None) == 'gelu':
        notes.append('the model has the exact GELU, which config.json names; llama.cpp computes '
                     'GPT-2 with the tanh approximation, so its numbers differ slightly')

    if is_own_bpe(spec):
        notes.append("llama.cpp's converter refuses tokenizers that it does not know, such as "
                     "this one; add the hash that it prints to its get_vocab_base_pre, with "
                     "res = 'gpt-2'")
    if spec.end_of_text is None:
        notes.append('ctranslate2, trl and lm-evaluation-harness refuse a tokenizer without a '
                     'token for the end of a text, such as this one; README.md in the folder has '
                     'the lines that add one')
    if padding:
        notes.append(f'{len(padding)} of {model.config.vocab_size:,} ids are padding that the '
                     f'tokenizer lacks; --trim_vocab=True leaves them out')
    return notes


def read_tokenizer_config(text: str) -> dict:
    """A tokenizer_config.json without names of code: it may come from a checkpoint of anybody."""
    try:
        return {key: value for key, value in json.loads(text).items() if key != 'auto_map'}
    except (ValueError, AttributeError, RecursionError):
        raise UserError("the checkpoint's tokenizer_config is not a JSON object; "
                        'prepare its dataset again') from None


def complete_config(path):
    """Add to config.json what readers of older formats expect, such as n_ctx for llama.cpp."""
    settings = json.loads(path.read_text(encoding='utf-8'))
    settings['torch_dtype'] = settings.get('dtype')
    if settings['model_type'] == 'gpt2':
        settings['n_ctx'] = settings['n_positions']
        settings['n_inner'] = settings['n_inner'] or 4 * settings['n_embd']
    path.write_text(json.dumps(settings, indent=2) + '\n', encoding='utf-8')


def model_card(model: torch.nn.Module, trained: TrainedModel, dtype: str) -> str:
    """The text of README.md: what was trained, on what, how long, with which settings.

    model: the model of transformers. dtype: the type of its weights.
    """
    spec = trained.spec
    settings = {name: value for name, value in trained.settings.items()
                if type(value) in (str, int, float, bool)}
    dataset = ''
    if settings.get('dataset'):
        dataset = f' on the dataset {cell(settings["dataset"])}'

    tokenizer = spec.tokenizer_name
    if tokenizer is None:
        tokenizer = spec.kind

    # characters may lack the A
    prompt = 'A'
    if spec.chars and prompt not in spec.chars:
        prompt = spec.chars[0]

    special_tokens = ''
    if spec.end_of_text is None:
        special_tokens = CARD_SPECIAL_TOKENS

    iterations = ''
    if trained.iter_num is not None:
        iterations = f' for {trained.iter_num:,} iterations'

    # transformers' GPT-2 has biases where the run had none
    n_parameters = count_parameters(trained.weights)
    n_zeros = model.num_parameters() - n_parameters
    zeros = ''
    if n_zeros > 0:
        zeros = f'The files have {n_zeros:,} biases besides, which are zero. '

    return CARD.format(
        title=cell(settings.get('out_dir', 'GPT')),
        parameters=n_parameters,
        zeros=zeros,
        architecture=type(model).__name__,
        dtype=dtype,
        tokens=spec.vocab_size,
        tokenizer=cell(tokenizer),
        iterations=iterations,
        dataset=dataset,
        losses='\n'.join(loss_rows(trained)),
        prompt=prompt,
        special_tokens=special_tokens,
        length=min(CARD_LENGTH, model.config.max_position_embeddings),
        settings='\n'.join(f'| {name} | {cell(value)} |' for name, value in settings.items()),
    )


def count_parameters(weights):
    """How many numbers a state_dict holds. Tied weights, which share their memory, count once."""
    sizes = {weight.data_ptr(): weight.numel() for weight in weights.values()}
    return sum(sizes.values())


def loss_rows(trained):
    """Rows of a table: the last evaluation up to the checkpoint, and the best one."""
    rows = [f'| iteration {iteration:,} | {train:.4f} | {val:.4f} |'
            for iteration, train, val in trained.losses
            if trained.iter_num is None or iteration <= trained.iter_num]
    rows = rows[-1:]
    if trained.best_val_loss is not None:
        rows.append(f'| best evaluation | | {trained.best_val_loss:.4f} |')
    return rows


def cell(value):
    """`value` on one line, short, without what Markdown gives a meaning."""
    text = ' '.join(str(value).split())[:100]
    for letter in '\\`*_[]<>|#':                    # the backslash first, as the others get one
        text = text.replace(letter, f'\\{letter}')
    return text or "''"
