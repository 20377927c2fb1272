"""The names of kept models: ckpt_001000.pt is that of iteration 1,000, in the format of ckpt.pt."""

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
