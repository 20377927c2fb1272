"""Write the model of a run for other tools.

    python export.py out-shakespeare my-gpt2                    # a folder that transformers loads
    python export.py out-shakespeare/ckpt_001000.pt my-gpt2     # from a kept model
    python export.py out-shakespeare my-gpt2 --dtype=bfloat16 --trim_vocab=True
    python export.py out-shakespeare out-nanogpt --to=nanogpt   # a folder that nanoGPT resumes
    python export.py out-lora my-adapter --to=peft              # adapters alone, for peft
"""

import dataclasses
import shlex
import signal
import sys
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

from console import describe, print0, report_errors

import configurator
from engine.errors import RunError, UserError

to = 'hf'               # hf: weights, config.json, tokenizer and model card;
                        # nanogpt: a ckpt.pt with the optimizer's state in it;
                        # peft: the adapters that train.py --lora_rank=8 has trained
dtype = 'float32'       # type of the weights, for hf: float32, bfloat16 or float16
trim_vocab = False      # True cuts the padding of the vocabulary, 50,304 tokens to GPT-2's 50,257

CHOICES = dict(to=('hf', 'nanogpt', 'peft'), dtype=('float32', 'bfloat16', 'float16'))
NANOGPT_KEYS = ('model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config')


def export_hf(source, folder):
    """Write the model and the tokenizer of the run `source` as transformers saves them."""
    from engine.checkpoint import load_model, run_folder
    from engine.hf import save_pretrained
    from engine.metrics.metrics_file import read_losses
    from model import GPT

    saved = run_folder.newest_checkpoint(source)
    folder_of_run = source
    if run_folder.is_one_model(source):
        folder_of_run = Path(source).parent
    model = GPT.from_checkpoint(saved)
    trained = save_pretrained.TrainedModel(
        config=model.config,
        weights=model.state_dict(),
        spec=load_model.checkpoint_spec(saved),
        settings=saved.config or {},
        iter_num=saved.iter_num,
        best_val_loss=saved.best_val_loss,
        losses=read_losses(folder_of_run),
        chat=load_model.checkpoint_chat(saved),
    )
    for note in save_pretrained.write(folder, trained, dtype, trim_vocab):
        print0(f'note: {note}', file=sys.stderr)


def export_nanogpt(source, folder):
    """Write the last state of the run `source` as the ckpt.pt that nanoGPT resumes from."""
    from engine.checkpoint import gathered, run_folder
    from engine.checkpoint import sharded as sharded_checkpoint
    from model import GPT

    if run_folder.is_one_model(source):
        raise UserError(f'{source} has no optimizer, with which nanoGPT resumes; its sample.py '
                        f'reads a copy of {source} that is called ckpt.pt')
    saved, _ = run_folder.load_state(source)
    if saved.adapters is not None:
        raise UserError(f'{source} has the optimizer of adapters, which nanoGPT cannot take; '
                        f'its sample.py reads {source}/{gathered.MODEL} as it is')
    if saved.shards_folder:
        saved = sharded_checkpoint.load_whole(saved, moments_too=True)
    GPT.from_checkpoint(saved)                      # it refuses weights that do not fit

    # These two are of the initial weights, which matter no longer.
    arguments = {name: value for name, value in saved.model_args.items()
                 if name not in ('init_std', 'zero_init')}
    check_nanogpt_has(saved, arguments, source)

    payload = dataclasses.replace(saved, model_args=arguments).to_payload()
    kept = {name: payload[name] for name in NANOGPT_KEYS if payload.get(name) is not None}
    folder.mkdir()
    gathered.write(folder / gathered.MODEL, kept)


def check_nanogpt_has(saved, arguments, source):
    """UserError where the run `source` has what nanoGPT does not have."""
    from engine.checkpoint.contents import NANOGPT_ARGS

    activation = saved.activation or 'gelu'
    if activation != 'gelu':
        raise UserError(f'{source} has the activation {activation}, and nanoGPT only the exact '
                        f'GELU; its results would differ')

    beyond = sorted(set(arguments) - set(NANOGPT_ARGS))
    groups = (saved.optimizer or {}).get('param_groups', ())
    if not beyond and any('momentum' in group for group in groups):
        beyond = ['the optimizer Muon']
    if beyond:
        raise UserError(f'{source} has {", ".join(beyond)}, which nanoGPT does not have')


def export_peft(source, folder):
    """Write the adapters of the run `source` as peft saves them."""
    from engine.checkpoint import run_folder
    from engine.hf import peft
    from model import GPT

    saved = run_folder.newest_checkpoint(source)
    if saved.adapters is None:
        raise UserError(f'{source} has no adapters, as it was trained with lora_rank=0; '
                        f'try --to=hf, which writes the whole model')
    alpha = (saved.config or {}).get('lora_alpha')
    if type(alpha) not in (int, float):
        raise UserError(f'{saved.path} does not say what lora_alpha its adapters have')

    # what they adapt: weights of Hugging Face, or those of a run
    origin = saved.base['source']
    run = run_folder.find_run(origin)
    if run:
        arguments = run_folder.newest_checkpoint(run).model_args
        base = dict(vocab_size=arguments.get('vocab_size'),
                    n_positions=arguments.get('block_size'))
        notes = [f'{origin} is a run; python export.py {shlex.quote(origin)} FOLDER writes it as '
                 f'the weights that peft takes']
    else:
        base = read_base_config(source, origin)
        notes = []

    model = GPT.from_checkpoint(saved)
    trained = peft.TrainedAdapters(
        model.config, model.state_dict(), saved.adapters, origin, base, alpha)
    notes = peft.write(folder, trained) + notes
    for note in notes:
        print0(f'note: {note}', file=sys.stderr)


def read_base_config(source, origin):
    """The config.json of the weights `origin` that the run `source` adapts, {name: value}."""
    from engine.hf import peft

    try:
        return peft.read_config(origin)
    except UserError as error:
        raise UserError(f'{source} has adapters of {origin}, which cannot be read ({error}); put '
                        f'that back, or try --to=hf, which does without it') from None


def check_settings():
    for name, choices in CHOICES.items():
        value = globals()[name]
        if value not in choices:
            raise UserError(f'{name}={value!r} is unknown; try {", ".join(map(repr, choices))}')

    if to != 'hf' and (dtype != 'float32' or trim_vocab):
        raise UserError(f'--dtype and --trim_vocab are for --to=hf; '
                        f'--to={to} writes the run as it was trained')


def read_folders(folders):
    """(the run, the folder to write) that the command line names."""
    if len(folders) != 2:
        raise UserError('name a run and the folder to write, '
                        'as in: python export.py out-shakespeare my-gpt2')

    source = run_of(folders[0])
    target = Path(folders[1])
    is_empty_folder = target.is_dir() and not any(target.iterdir())
    if target.exists() and not is_empty_folder:
        raise UserError(f'{target} exists already; name a new folder')
    if target.is_symlink() and not target.exists():
        raise UserError(f'{target} is a link to {target.readlink()}, which does not exist; '
                        f'remove the link, or name a new folder')

    # where a link to an empty folder leads: that folder is replaced, and the link stays
    return source, target.resolve()


def run_of(source):
    """The folder of the run `source`, which may also be its ckpt.pt."""
    path = Path(source)
    if path.name == 'ckpt.pt' and path.is_file():
        return str(path.parent)
    return source


@contextmanager
def end_on_sigterm():
    """SIGTERM ends the block with SystemExit, so that its temporary files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield                                       # only the main thread may set a handler
        return

    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def write_whole(source, target):
    """Write the export of the run `source` to the folder `target`, whole or not at all."""
    # into a temporary folder beside the target, which gets the name when it is whole
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f'{target.name}.') as temporary:
            folder = Path(temporary) / 'model'
            exports = dict(hf=export_hf, nanogpt=export_nanogpt, peft=export_peft)
            exports[to](source, folder)
            folder.replace(target)
    except (UserError, RunError):
        raise
    except Exception as error:                      # safetensors has its own errors for a full disk
        raise RunError(f'{target} was not written ({describe(error)})') from None


def main(folders):
    check_settings()
    source, target = read_folders(folders)
    with end_on_sigterm():
        write_whole(source, target)
    print0(f'wrote {folders[1]}')


if __name__ == '__main__':
    with report_errors():
        run_and_target = []
        configurator.configure(globals(), sys.argv[1:], run_and_target, usage='RUN TARGET')
        main(run_and_target)
