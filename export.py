"""Write the model of a run as a folder that transformers loads.

    python export.py out-shakespeare my-gpt2
"""

import sys
import tempfile
from pathlib import Path

import configurator
from console import describe, print0, report_errors
from engine.errors import RunError, UserError


def main(folders):
    if len(folders) != 2:
        raise UserError('name a run and the folder to write, as in: python export.py out-shakespeare my-gpt2')
    source, target = folders[0], Path(folders[1])
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f'{target} exists already; name a new folder')
    from engine import checkpoint, hf                   # they import torch
    from model import GPT
    model = GPT.from_checkpoint(checkpoint.load_newest_model(source))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f'{target.name}.') as temporary:
            hf.to_transformers(model.config, model.state_dict()).save_pretrained(Path(temporary) / 'model')
            (Path(temporary) / 'model').replace(target)
    except UserError:
        raise
    except Exception as error:                          # safetensors has errors of its own for a full disk
        raise RunError(f'{target} was not written ({describe(error)})') from None
    print0(f'wrote {target}')


if __name__ == '__main__':
    with report_errors():
        run_and_target = []
        configurator.configure(globals(), sys.argv[1:], positional=run_and_target)
        main(run_and_target)
