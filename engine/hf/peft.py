"""The adapters of a run as peft saves them: adapter_config.json and adapter_model.safetensors.

peft adapts a model of transformers, so the layers have the names of transformers here. Where
transformers has several matrices in the place of one of ours, each gets a copy of A, and its own
rows of B.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.downloads import split_revision
from engine.errors import UserError
from engine.hf.weights import KINDS, find_weights, kind_of, swap_rotated


@dataclass
class TrainedAdapters:
    """What is exported.

    config: the GPTConfig of the model.
    weights: {name: weight} of the merged model by our names.
    adapters: {name: matrix} by our names, such as transformer.h.0.attn.c_attn.lora_a.
    source: the weights that they adapt: a hub name, or a folder.
    base: what is known of their config.json, {name: value}; at least n_positions and vocab_size
        are compared with the run.
    alpha: the lora_alpha of the run.
    """
    config: object
    weights: dict[str, torch.Tensor]
    adapters: dict[str, torch.Tensor]
    source: str
    base: dict
    alpha: float


def write(folder: str | Path, trained: TrainedAdapters) -> list[str]:
    """Write adapters to a new folder. Returns notes to show the user, a list of lines.

    Raises UserError where transformers has no such model, and where the run has positions or tokens
    that the weights which it adapts lack.
    """
    import safetensors.torch

    kind = kind_of(trained.config)
    check_base(trained, kind)
    rank = check_adapters(trained)
    targets = set()
    tensors = {}
    for name, a in trained.adapters.items():
        layer, _, which = name.rpartition('.')
        if which == 'lora_b':
            continue
        b = trained.adapters[f'{layer}.lora_b']
        for own_name, own_rows in split_rows(kind, layer, b, trained.config).items():
            targets.add('.'.join(own_name.split('.')[-2:]))
            tensors[f'base_model.model.{own_name}.lora_A.weight'] = a.clone()
            tensors[f'base_model.model.{own_name}.lora_B.weight'] = own_rows.contiguous()

    source, revision = split_revision(trained.source)
    settings = dict(
        peft_type='LORA',
        task_type='CAUSAL_LM',
        base_model_name_or_path=source,
        revision=revision,
        r=rank,
        lora_alpha=trained.alpha,
        target_modules=sorted(targets),
        fan_in_fan_out=kind == 'gpt2',              # whose matrices are (in, out)
        bias='none',
        inference_mode=True,
    )
    folder = Path(folder)
    folder.mkdir()
    path = folder / 'adapter_model.safetensors'
    safetensors.torch.save_file(tensors, path, metadata={'format': 'pt'})
    config_path = folder / 'adapter_config.json'
    config_path.write_text(json.dumps(settings, indent=2) + '\n', encoding='utf-8')
    path.chmod(config_path.stat().st_mode)          # safetensors lets only the owner read it
    return [f'it adapts {trained.source}, which peft loads first; --to=hf writes both merged']


def split_rows(kind, layer, b, config):
    """{name in transformers: its rows of B} of a layer, such as transformer.h.0.mlp.c_fc."""
    if kind == 'gpt2':
        return {layer: b}

    _, _, number, own = layer.split('.', 3)
    parts = KINDS[kind].layer[own]
    sizes = [len(b) // len(parts)] * len(parts)
    if len(parts) == 3:                             # queries, keys, values
        heads = (config.n_head, config.kv_heads, config.kv_heads)
        sizes = [n * config.head_size for n in heads]

    rows = swap_rotated(kind, b.split(sizes), config.head_size)
    names = [f'model.layers.{number}.{part}' for part in parts]
    return dict(zip(names, rows))


# Checks

def check_adapters(trained: TrainedAdapters) -> int:
    """The rank of all adapters. UserError unless each is a pair that fits a matrix of a block."""
    ranks = {len(matrix) for name, matrix in trained.adapters.items() if name.endswith('.lora_a')}
    if len(ranks) != 1:
        raise UserError('the checkpoint has no adapters, or some of another rank than others')

    rank = ranks.pop()
    wanted = {}                         # {name: shape}
    for name in trained.adapters:
        layer = name.rpartition('.')[0]
        weight = trained.weights.get(f'{layer}.weight')
        if layer.startswith('transformer.h.') and weight is not None and weight.dim() == 2:
            n_out, n_in = weight.shape
            wanted[f'{layer}.lora_a'] = (rank, n_in)
            wanted[f'{layer}.lora_b'] = (n_out, rank)
    if wanted != {name: tuple(matrix.shape) for name, matrix in trained.adapters.items()}:
        raise UserError('the checkpoint has adapters that are not pairs of matrices, or that do '
                        'not fit its model')
    return rank


def check_base(trained, kind):
    """UserError where the weights that are adapted have fewer positions or tokens than the run."""
    if any(name.endswith('.lora_rows') for name in trained.adapters):
        raise UserError(f'the run has new tokens, whose rows {trained.source} lacks, and an '
                        f'adapter cannot bring them; try --to=hf, which writes the whole model')
    wanted = dict(vocab_size=trained.config.vocab_size)
    if kind == 'gpt2':
        wanted.update(n_positions=trained.config.block_size)
    for name, size in wanted.items():
        found = trained.base.get(name, size)
        if type(found) is int and found < size:
            raise UserError(f'the run has {name}={size}, and {trained.source}, which it adapts, '
                            f'has {found}; peft would lack the others, so try --to=hf')


def read_config(source: str) -> dict:
    """The config.json of a hub model or a folder, {name: value}; empty where it has none."""
    path = find_weights(source) / 'config.json'
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
