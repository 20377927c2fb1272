"""What values a setting may have."""

import math

from engine.dataloader import batches as dataloader
from engine.errors import UserError, check_choice, check_range

CHOICES = dict(lr_schedule=('cosine', 'linear', 'wsd'), optimizer=('adamw', 'muon'), strategy=('ddp', 'fsdp', 'hsdp'),
               reduce_dtype=('float32', 'bfloat16'), checkpoint=('gathered', 'sharded'), **dataloader.CHOICES)


def check_training(settings, combinations=True):
    """UserError for an impossible setting of train.py. combinations: also for values that do not fit each other."""
    check_range(settings, 'eval_interval log_interval eval_iters cooldown_iters', 1, 10 ** 9)
    check_range(settings, 'gradient_accumulation_steps batch_size', 1, 2 ** 20)
    check_range(settings, 'block_size', 1, 2 ** 24)
    check_range(settings, 'max_iters warmup_iters lr_decay_iters sample_tokens patience health_interval', 0, 10 ** 9)
    check_range(settings, 'eval_tasks_interval eval_tasks_limit', 0, 10 ** 9)
    check_range(settings, 'batch_ramp_start batch_ramp_tokens', 0, 10 ** 13)
    check_range(settings, 'min_lr weight_decay grad_clip', 0, below=math.inf)
    check_range(settings, 'learning_rate muon_lr', above=0, below=math.inf)
    check_range(settings, 'beta1 beta2 muon_momentum dropout', 0, below=1)
    check_range(settings, 'seed', 0, 2 ** 63 - 1)
    check_range(settings, 'rank_timeout', 1, 10 ** 7)
    for name, values in CHOICES.items():
        check_choice(settings, name, values)
    if not settings['out_dir'].strip() or '\0' in settings['out_dir']:
        raise UserError(f'out_dir={settings["out_dir"]!r} should be the name of a folder')
    if combinations and bool(settings['batch_ramp_start']) != bool(settings['batch_ramp_tokens']):
        raise UserError('a batch ramp takes both batch_ramp_start and batch_ramp_tokens')
    if combinations and settings['health_interval'] and settings['strategy'] != 'ddp':
        raise UserError(f'health_interval measures whole layers, and strategy={settings["strategy"]} gives a rank a part; '
                        f'try --health_interval=0, or --strategy=ddp')
    if combinations and settings['checkpoint'] == 'sharded' and not settings['always_save_checkpoint']:
        raise UserError('checkpoint=sharded keeps the last model, and always_save_checkpoint=False wants the best one; try '
                        '--always_save_checkpoint=True, or --checkpoint=gathered')
    if combinations and settings['decay_lr'] and settings['warmup_iters'] >= settings['lr_decay_iters']:
        max_iters = settings['max_iters']
        shorter = f', or --warmup_iters={max_iters // 10} --lr_decay_iters={max_iters}' if max_iters else ''
        raise UserError(f'warmup_iters={settings["warmup_iters"]} leaves nothing of lr_decay_iters={settings["lr_decay_iters"]}; '
                        f'try --decay_lr=False{shorter}')
    if combinations and settings['decay_lr'] and settings['min_lr'] > settings['learning_rate']:
        raise UserError(f'min_lr={settings["min_lr"]} is above learning_rate={settings["learning_rate"]}; '
                        f'try --min_lr={settings["learning_rate"] / 10:g}')


def training_notes(settings, saved, env):
    """Lines on settings of train.py that are possible and perhaps not meant. saved: the state to go on from, or None."""
    notes, max_iters, lr_decay_iters = [], settings['max_iters'], settings['lr_decay_iters']
    if env.world_size == 1 and settings['strategy'] != 'ddp':
        notes.append(f'strategy={settings["strategy"]} shards nothing here, as there is one rank; torchrun starts several')
    if settings['decay_lr'] and max_iters < lr_decay_iters and not settings['batch_ramp_start']:
        notes.append(f'the learning rate does not reach min_lr: lr_decay_iters={lr_decay_iters} is after max_iters={max_iters}')
    before = (saved or {}).get('dtype')
    if before in ('float32', 'bfloat16', 'float16') and before != env.dtype:
        notes.append(f'the run was trained in {before}, and goes on in {env.dtype}; to go on exactly, add --dtype={before}')
    return notes
