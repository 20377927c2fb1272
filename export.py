"""Write the model of a run for other tools.

    python export.py out-shakespeare my-gpt2                        # a folder that transformers loads
    python export.py out-shakespeare my-gpt2 --dtype=bfloat16 --trim_vocab=True
    python export.py out-shakespeare out-nanogpt --to=nanogpt       # a folder that nanoGPT resumes
"""

import sys
import tempfile
from pathlib import Path

from console import describe, print0, report_errors

import configurator
from engine.errors import RunError, UserError

to = 'hf'               # hf: weights, config.json, tokenizer and model card;
                        # nanogpt: a ckpt.pt with the optimizer's state in it
dtype = 'float32'       # of the weights, for hf: float32, bfloat16 or float16
trim_vocab = False      # True cuts the padding of the vocabulary, 50,304 tokens to GPT-2's 50,257


def export_hf(source, folder):
    """Write the model and the tokenizer of the run `source` as transformers saves them."""
    from engine.checkpoint import load_model, run_folder
    from engine.hf import save_pretrained
    from engine.metrics.metrics_file import read_losses
    from model import GPT
    saved = run_folder.load_newest_model(source)
    model, spec = GPT.from_checkpoint(saved), load_model.checkpoint_spec(saved)
    for note in save_pretrained.write(folder, model.config, model.state_dict(), saved, spec, dtype, trim_vocab, read_losses(source)):
        print0(f'note: {note}', file=sys.stderr)


def export_nanogpt(source, folder):
    """Write the last state of the run `source` as the ckpt.pt that nanoGPT resumes from."""
    from engine.checkpoint import gathered, run_folder
    from engine.checkpoint import sharded as sharded_checkpoint
    from model import NANOGPT_ARGS
    saved, _ = run_folder.load_state(source)
    if 'sharded' in saved:
        saved = sharded_checkpoint.load_whole(saved, moments_too=True)
    if saved.get('activation', 'gelu') != 'gelu':
        raise UserError(f'{source} has the activation {saved["activation"]}, and nanoGPT only the exact GELU; '
                        f'its results would differ')
    arguments = {name: value for name, value in saved['model_args'].items() if name not in ('init_std', 'zero_init')}
    beyond = sorted(set(arguments) - set(NANOGPT_ARGS))         # not of the initial weights, which matter no longer
    if beyond or any('momentum' in group for group in saved.get('optimizer', {}).get('param_groups', ())):
        raise UserError(f'{source} has {", ".join(beyond) or "the optimizer Muon"}, which nanoGPT does not have')
    folder.mkdir()
    names = ('model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config')
    kept = {name: saved[name] for name in names if name in saved}
    gathered.write(folder / gathered.MODEL, dict(kept, model_args=arguments))


def main(folders):
    for name, value, choices in (('to', to, ('hf', 'nanogpt')), ('dtype', dtype, ('float32', 'bfloat16', 'float16'))):
        if value not in choices:
            raise UserError(f'{name}={value!r} is unknown; try {", ".join(map(repr, choices))}')
    if to == 'nanogpt' and (dtype != 'float32' or trim_vocab):
        raise UserError('--dtype and --trim_vocab are for --to=hf; nanoGPT reads the run as it was trained')
    if len(folders) != 2:
        raise UserError('name a run and the folder to write, as in: python export.py out-shakespeare my-gpt2')
    source, target = folders[0], Path(folders[1])
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f'{target} exists already; name a new folder')
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f'{target.name}.') as temporary:
            folder = Path(temporary) / 'model'
            export_nanogpt(source, folder) if to == 'nanogpt' else export_hf(source, folder)
            folder.replace(target)
    except (UserError, RunError):
        raise
    except Exception as error:                          # safetensors has errors of its own for a full disk
        raise RunError(f'{target} was not written ({describe(error)})') from None
    print0(f'wrote {target}')


if __name__ == '__main__':
    with report_errors():
        run_and_target = []
        configurator.configure(globals(), sys.argv[1:], positional=run_and_target)
        main(run_and_target)
