"""A model and its tokenizer as a Hugging Face folder: weights, configurations, tokenizer, model card."""

import dataclasses
import json
from pathlib import Path

import torch

from engine.errors import UserError
from engine.hf.tokenizer_json import tokenizer_files
from engine.hf.weights import to_transformers
from engine.tokenizer import Tokenizer

MAX_SHARD_SIZE = '5GB'
CARD = '''---
library_name: transformers
pipeline_tag: text-generation
---
# {title}

{parameters:,} parameters, {architecture}, weights in {dtype}; {tokens:,} tokens ({tokenizer}). Trained for {iterations:,}
iterations{dataset}.

| loss, nats per token | train | validation |
|----------------------|------:|-----------:|
{losses}

```python
from transformers import pipeline
print(pipeline('text-generation', model='.')('A', max_new_tokens=100)[0]['generated_text'])
```

| setting | value |
|---------|-------|
{settings}
'''


def write(folder, config, weights, saved, spec, dtype='float32', trim_vocab=False, losses=()):
    """Write a GPT of `config`, a GPTConfig, with `weights` to a new folder. Returns notes to show the user, a list of lines.

    saved: the checkpoint, for the model card. spec: its tokenizer. dtype: of the weights. trim_vocab: drop the rows of ids
    that the tokenizer lacks. losses: (iteration, train loss, val loss) of the run's evaluations, for the model card.
    Raises UserError where transformers has no such model.
    """
    folder = Path(folder)
    tokenizer, files, notes = Tokenizer(spec), tokenizer_files(spec), []
    padding = range(tokenizer.vocab_size, config.vocab_size)
    if config.vocab_size < tokenizer.vocab_size:
        raise UserError(f'the tokenizer has {tokenizer.vocab_size} tokens and the model {config.vocab_size}; '
                        f'prepare the dataset that the model was trained on in data/ first')
    if padding and trim_vocab:
        # The head and the embedding have a row per token; a head that is tied is the embedding.
        weights = {name: value[:tokenizer.vocab_size] if name in ('transformer.wte.weight', 'lm_head.weight') else value
                   for name, value in weights.items()}
        config, padding = dataclasses.replace(config, vocab_size=tokenizer.vocab_size), range(0)
    model = to_transformers(config, weights).to(getattr(torch, dtype))
    for settings in (model.config, model.generation_config):
        settings.bos_token_id = settings.eos_token_id = tokenizer.end_of_text
    # The padding's logits were never trained.
    model.generation_config.suppress_tokens = list(padding) or None
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    complete_config(folder / 'config.json')
    files['tokenizer_config.json'] = json.dumps(
        dict(read_tokenizer_config(files['tokenizer_config.json']), model_max_length=config.block_size), indent=2)
    files['README.md'] = model_card(model, saved, spec, dtype, losses)
    for name, text in files.items():
        (folder / name).write_text(text, encoding='utf-8', newline='\n')
    if getattr(model.config, 'activation_function', None) == 'gelu':
        notes.append("the model has the exact GELU, which config.json names; llama.cpp computes GPT-2 with the tanh "
                     "approximation, so its numbers differ slightly")
    if padding:
        notes.append(f'{len(padding)} of {config.vocab_size:,} ids are padding that the tokenizer lacks; '
                     f'--trim_vocab=True leaves them out')
    return notes


def read_tokenizer_config(text):
    """The dict of a tokenizer_config.json, which may come from a checkpoint of anybody, without names of code."""
    try:
        return {key: value for key, value in json.loads(text).items() if key != 'auto_map'}
    except (ValueError, AttributeError, RecursionError):
        raise UserError("the checkpoint's tokenizer_config is not a JSON object; prepare its dataset again") from None


def complete_config(path):
    """Add to a GPT-2's config.json what readers of older formats expect: llama.cpp's converter reads n_ctx."""
    settings = json.loads(path.read_text(encoding='utf-8'))
    settings['torch_dtype'] = settings.get('dtype')
    if settings['model_type'] == 'gpt2':
        settings.update(n_ctx=settings['n_positions'], n_inner=settings['n_inner'] or 4 * settings['n_embd'])
    path.write_text(json.dumps(settings, indent=2) + '\n', encoding='utf-8')


def model_card(model, saved, spec, dtype, losses=()):
    """The text of README.md: what was trained, on what, how long, with which settings."""
    settings = {name: value for name, value in (saved.get('config') or {}).items() if type(value) in (str, int, float, bool)}
    dataset = settings.get('dataset')
    rows = [f'| {name} | {cell(value)} |' for name, value in settings.items()]
    losses = [f'| iteration {iteration:,} | {train:.4f} | {val:.4f} |' for iteration, train, val in losses
              if iteration <= saved['iter_num']]
    return CARD.format(
        title=cell(settings.get('out_dir', 'GPT')), parameters=model.num_parameters(), dtype=dtype,
        architecture=type(model).__name__, tokens=spec['vocab_size'],
        tokenizer=cell(spec.get('tokenizer_name', spec['tokenizer'])), iterations=saved['iter_num'],
        dataset=f' on the dataset {cell(dataset)}' if dataset else '',
        losses='\n'.join([*losses[-1:], f'| best evaluation | | {saved["best_val_loss"]:.4f} |']), settings='\n'.join(rows))


def cell(value):
    """`value` on one line, short, without what Markdown gives a meaning."""
    text = ' '.join(str(value).split())[:100]
    return ''.join(f'\\{letter}' if letter in '\\`*_[]<>|#' else letter for letter in text) or "''"
