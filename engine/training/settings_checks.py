"""What values the settings of train.py may have, and which of them fit together."""

import math
from pathlib import Path

from engine.checkpoint.contents import Checkpoint
from engine.checkpoint.run_folder import find_run
from engine.dataloader import batches
from engine.distributed import Environment
from engine.errors import UserError, check_choice, check_range
from engine.log import log
from engine.training import parallel

CHOICES = dict(
    lr_schedule=('cosine', 'linear', 'wsd'),
    optimizer=('adamw', 'muon'),
    strategy=parallel.STRATEGIES,
    reduce_dtype=('float32', 'bfloat16'),
    checkpoint=('gathered', 'sharded'),
    **batches.CHOICES)
COUNTS_FROM_1 = 'eval_interval log_interval eval_iters cooldown_iters'
COUNTS_FROM_0 = ('max_iters warmup_iters lr_decay_iters sample_tokens patience health_interval '
                 'eval_tasks_interval eval_tasks_limit keep_interval')


def check_training(settings: dict, combinations: bool = True):
    """UserError for an impossible setting of train.py.

    settings: {name: value}. combinations: whether values must also fit each other. Those of a
    resumed run can only be judged once its saved settings are known.
    """
    check_range(settings, COUNTS_FROM_1, 1, 10 ** 9)
    check_range(settings, COUNTS_FROM_0, 0, 10 ** 9)
    check_range(settings, 'gradient_accumulation_steps batch_size', 1, 2 ** 20)
    check_range(settings, 'block_size', 1, 2 ** 24)
    check_range(settings, 'batch_ramp_start batch_ramp_tokens', 0, 10 ** 13)
    check_range(settings, 'min_lr weight_decay grad_clip', 0, below=math.inf)
    check_range(settings, 'learning_rate muon_lr', above=0, below=math.inf)
    check_range(settings, 'beta1 beta2 muon_momentum dropout lora_dropout', 0, below=1)
    check_range(settings, 'lora_rank', 0, 2 ** 16)
    check_range(settings, 'lora_alpha', above=0, below=math.inf)
    check_range(settings, 'seed', 0, 2 ** 63 - 1)
    check_range(settings, 'rank_timeout', 1, 10 ** 7)
    for name, values in CHOICES.items():
        check_choice(settings, name, values)
    if not settings['out_dir'].strip() or '\0' in settings['out_dir']:
        raise UserError(f'out_dir={settings["out_dir"]!r} should be the name of a folder')
    if combinations:
        check_combinations(settings)
        if settings['decay_lr']:
            check_decay(settings)


def check_combinations(settings):
    """UserError for settings of which each is possible, and both together are not."""
    if bool(settings['batch_ramp_start']) != bool(settings['batch_ramp_tokens']):
        raise UserError('a batch ramp takes both batch_ramp_start and batch_ramp_tokens')

    if settings['health_interval'] and settings['strategy'] != 'ddp':
        raise UserError(f'health_interval measures whole layers, and '
                        f'strategy={settings["strategy"]} gives a rank a part; '
                        f'try --health_interval=0, or --strategy=ddp')

    source = find_run(settings['init_from'])
    folder = source
    if source and source.is_file():                 # a kept model
        folder = source.parent
    replaces_source = source and folder.resolve() == Path(settings['out_dir']).resolve()
    if replaces_source and not settings['eval_only']:
        raise UserError(f'{source} cannot be both what the run begins with and what it replaces; '
                        f'choose another --out_dir, or go on with --init_from=resume')

    if settings['checkpoint'] == 'sharded' and not settings['always_save_checkpoint']:
        raise UserError('checkpoint=sharded keeps the last model, and '
                        'always_save_checkpoint=False wants the best one; '
                        'try --always_save_checkpoint=True, or --checkpoint=gathered')

    if settings['lora_rank']:
        check_adapters(settings)


def check_adapters(settings):
    """UserError for settings that a run with adapters cannot have."""
    beginning = f'lora_rank={settings["lora_rank"]}'
    if settings['freeze']:
        raise UserError(f'{beginning} trains adapters alone, so freeze={settings["freeze"]} has '
                        f"nothing to freeze; try --freeze='', or --lora_rank=0")
    if settings['optimizer'] == 'muon':
        raise UserError(f'{beginning} trains pairs of matrices, and Muon moves each matrix by '
                        f'itself; try --optimizer=adamw')
    if settings['checkpoint'] == 'sharded':
        raise UserError(f'{beginning} saves adapters, which one rank writes; '
                        f'try --checkpoint=gathered')


def check_ranks(settings: dict, env: Environment):
    """UserError where the ranks, the machine or the precision rule out a setting of train.py."""
    parallel.check_strategy(settings['strategy'], settings['reduce_dtype'], env,
                            settings['optimizer'])
    if settings['lora_rank'] and parallel.is_sharded(settings['strategy'], env):
        raise UserError(f'lora_rank={settings["lora_rank"]} keeps the base whole on each rank, and '
                        f'strategy={settings["strategy"]} gives a rank a part; '
                        f'try --strategy=ddp')
    reads_whole_model = settings['sample_tokens'] or settings['eval_tasks']
    if reads_whole_model and parallel.is_sharded(settings['strategy'], env):
        raise UserError(f'sample_tokens and eval_tasks read the whole model, and '
                        f'strategy={settings["strategy"]} gives a rank a part; '
                        f"try --sample_tokens=0 --eval_tasks=''")


def check_decay(settings):
    """UserError where the learning rate has no room to fall, or would rise."""
    warmup_iters = settings['warmup_iters']
    lr_decay_iters = settings['lr_decay_iters']
    if warmup_iters >= lr_decay_iters:
        advice = 'try --decay_lr=False'
        max_iters = settings['max_iters']
        if max_iters:
            advice += f', or --warmup_iters={max_iters // 10} --lr_decay_iters={max_iters}'
        raise UserError(f'warmup_iters={warmup_iters} leaves nothing of '
                        f'lr_decay_iters={lr_decay_iters}; {advice}')

    learning_rate = settings['learning_rate']
    if settings['min_lr'] > learning_rate:
        raise UserError(f'min_lr={settings["min_lr"]} is above learning_rate={learning_rate}; '
                        f'try --min_lr={learning_rate / 10:g}')


def training_notes(settings: dict, saved: Checkpoint | None, env: Environment) -> list[str]:
    """Lines on settings of train.py that are possible and perhaps not meant.

    saved: the state that the run goes on from, or None.
    """
    notes = []
    if saved and saved.base:
        notes.append(f'{saved.path} has adapters alone; their base is read again from '
                     f'{saved.base["source"]}')
    if env.world_size == 1 and settings['strategy'] != 'ddp':
        notes.append(f'strategy={settings["strategy"]} shards nothing here, as there is one rank; '
                     f'torchrun starts several')

    max_iters = settings['max_iters']
    lr_decay_iters = settings['lr_decay_iters']
    ends_before_min_lr = settings['decay_lr'] and max_iters < lr_decay_iters
    if ends_before_min_lr and not settings['batch_ramp_start']:
        notes.append(f'the learning rate does not reach min_lr: '
                     f'lr_decay_iters={lr_decay_iters} is after max_iters={max_iters}')
    stays_at_min_lr = settings['decay_lr'] and max_iters > lr_decay_iters
    if stays_at_min_lr and not settings['batch_ramp_start']:
        notes.append(f'the learning rate stays at min_lr={settings["min_lr"]:g} from iteration '
                     f'{lr_decay_iters} on; --lr_decay_iters={max_iters} lets it fall until '
                     f'max_iters')

    interval = settings['eval_interval']
    tasks_interval = settings['eval_tasks_interval']
    if settings['eval_tasks'] and tasks_interval % interval:
        notes.append(f'eval_tasks_interval={tasks_interval} is no multiple of '
                     f'eval_interval={interval}, so tasks are scored only where an evaluation '
                     f'falls on a multiple of {tasks_interval}')

    before = saved.dtype if saved else None
    if before in ('float32', 'bfloat16', 'float16') and before != env.dtype:
        notes.append(f'the run was trained in {before}, and goes on in {env.dtype}; '
                     f'to go on exactly, add --dtype={before}')
    return notes


def notes_on_changes(changes: dict, shape: tuple, ramp_start: int) -> list[str]:
    """Lines on the settings of a saved run that this command overrides.

    changes: {name: (saved value, new value)}. shape: the settings that the weights decide, which
    have notes of their own. ramp_start: the tokens of the first batch, 0 without a ramp.
    """
    notes = [f'{name} {old!r} -> {new!r}' for name, (old, new) in changes.items()
             if name not in shape]
    of_the_batch = {'batch_size', 'gradient_accumulation_steps', 'block_size'}
    if ramp_start and of_the_batch & set(changes):
        notes.append('the learning rate counts full batches, and the full batch has changed')
    return notes


def tell_what_weights_decide(config: object, names: tuple, overrides: dict):
    """Log which of the settings `names` have no effect, as the weights have another shape.

    config: the GPTConfig of the weights. overrides: the settings that this command named.
    """
    for name in names:
        value = getattr(config, name)
        if overrides.get(name, value) != value:
            log.info(f'note: {name}={overrides[name]} has no effect, '
                     f'the weights have {name}={value}')
