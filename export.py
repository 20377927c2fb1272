"""Write the model of a run for other tools.

    python export.py out-shakespeare my-gpt2                        # a folder that transformers loads
    python export.py out-shakespeare out-nanogpt --to=nanogpt       # a folder that nanoGPT resumes
"""

import sys
import tempfile
from pathlib import Path

import configurator
from console import describe, print0, report_errors
from engine.errors import RunError, UserError

to = 'hf'       # hf: config.json and model.safetensors; nanogpt: a ckpt.pt with the optimizer's state in it


def export_hf(source, folder):
    """Write the model of the run `source` as transformers saves it."""
    from engine import hf, run_folder
    from model import GPT
    model = GPT.from_checkpoint(run_folder.load_newest_model(source))
    hf.to_transformers(model.config, model.state_dict()).save_pretrained(folder)


def export_nanogpt(source, folder):
    """Write the last state of the run `source` as the ckpt.pt that nanoGPT resumes from."""
    from engine import checkpoint, run_folder
    saved, _ = run_folder.load_state(source)
    if 'sharded' in saved:
        raise UserError(f'{source} has a sharded state; resume it once with --checkpoint=gathered, and stop it')
    if saved.get('activation', 'gelu') != 'gelu':
        raise UserError(f'{source} has the activation {saved["activation"]}, and nanoGPT only the exact GELU; '
                        f'its results would differ')
    folder.mkdir()
    names = ('model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config')
    checkpoint.write(folder / checkpoint.MODEL, {name: saved[name] for name in names if name in saved})


def main(folders):
    if to not in ('hf', 'nanogpt'):
        raise UserError(f"to={to!r} is unknown; try 'hf' or 'nanogpt'")
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
