"""The names of kept models, and of the scores of a model.

ckpt_001000.pt is the model of iteration 1,000, in the format of ckpt.pt.
"""

import re
from pathlib import Path

NAME = re.compile(r'ckpt_(\d{6,15})\.pt')


def kept_name(iter_num: int) -> str:
    """The file of the model that is kept at an iteration."""
    return f'ckpt_{iter_num:06d}.pt'


def kept_models(out_dir: str | Path) -> dict[int, Path]:
    """{iteration: file} of the kept models in a folder, the earliest first."""
    found = {}
    for path in Path(out_dir).glob('ckpt_*.pt'):
        match = NAME.fullmatch(path.name)
        if match:
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def scores_path(model: str | Path) -> Path:
    """Where evaluate.py writes the scores of a model: in the folder of a run, or beside the file of
    a kept model, as ckpt_001000.eval.json."""
    path = Path(model)
    if path.is_file():
        return path.with_suffix('.eval.json')
    return path / 'eval.json'
