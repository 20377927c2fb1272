"""Train or finetune a GPT: in one process, or with torchrun on several GPUs.

    python train.py config/train_shakespeare_char.py
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

Everything random depends only on the seed, the iteration and the place in it. So a stopped run
goes on exactly (--init_from=resume), and several ranks draw the batches that one would.
"""

import math
import signal
import sys
from contextlib import ExitStack
from functools import partial
from itertools import islice
from typing import Literal

from console import print0, print_text, report_errors, status  # before torch

import torch

import configurator
from engine.checkpoint import load_model, run_folder
from engine.dataloader.batches import train_batches
from engine.dataloader.open_dataset import open_dataset
from engine.device import derive_seed
from engine.distributed import hard_exit, report_first_failure, start_environment
from engine.errors import UserError
from engine.evaluation.results import TaskScorer
from engine.generation.generate import TextSampler
from engine.metrics.health import HealthMonitor
from engine.metrics.step_log import StepLog
from engine.tokenizer import padded_vocab_size
from engine.training import lora, optim, parallel, settings_checks
from engine.training.context import change_context
from engine.training.cpu import keep_freed_memory
from engine.training.freeze import freeze_layers
from engine.training.mean_loss import mean_loss
from engine.training.run import start_run
from model import GPT, GPTConfig

# what most runs set
out_dir = 'out'          # folder of the run: its model, state and metrics
init_from = 'scratch'    # scratch, resume, auto (resume if there is a run), or
                         # weights to begin with: gpt2, gpt2-medium, -large, -xl,
                         # OWNER/NAME[@REVISION], a folder of them, a run's folder or kept model
dataset = 'openwebtext'  # a folder of data/, or a path; or a mixture, by
                         # shares of the sequences: openwebtext:0.7,mine:0.3
n_layer = 12             # blocks; loaded weights keep their own shape
n_head = 12              # heads of attention in each block
n_embd = 768             # channels, a multiple of n_head
block_size = 1024        # tokens of context; loaded weights are cut to it,
                         # and stretched to it only if a flag or a config file names it
batch_size = 12          # sequences per micro-batch; fewer take less memory
learning_rate = 6e-4     # the highest, after warm-up
max_iters = 600000       # optimizer steps in all
# evaluation, log and checkpoints
eval_interval = 2000     # iterations between evaluations; each one saves
log_interval = 1         # iterations between log lines
eval_iters = 200         # batches per split and evaluation
eval_only = False        # evaluate once, write nothing, and end
checkpoint = 'gathered'  # gathered: rank 0 writes ckpt.pt and state.pt;
                         # sharded: each rank writes to state/ while training goes on
always_save_checkpoint = True   # False keeps the ckpt.pt of the best val loss
keep_interval = 0        # iterations between models that stay, as ckpt_001000.pt; 0: none
overwrite = False        # True replaces the run that out_dir holds
# at evaluations; none of these changes the weights, but patience may end the run
sample_tokens = 0        # length of a sample at each evaluation; 0: none
sample_prompt = '\n'     # text that the sample continues
eval_tasks = ''          # tasks of evaluate.py, such as hellaswag,lambada
eval_tasks_interval = 0  # iterations between such scores, a multiple of eval_interval; 0: always
eval_tasks_limit = 0     # score only the first examples, such as 1,000; 0: all
eval_tasks_data = 'data/evals'  # folder that data/evals/prepare.py fills
patience = 0             # eval_intervals without a better val loss that end the run; 0: never
health_interval = 0      # iterations between measurements of each layer; 0: none
# wandb
wandb_log = False        # True sends the metrics to wandb
wandb_project = 'owt'
wandb_run_name = 'gpt2'
# data
accept_dataset_change = False   # True goes on with another dataset
sampling = 'windows'     # windows: spread evenly, they may overlap; epoch:
                         # each window once, and the next epoch cuts the text elsewhere
documents = 'any'        # any: sequences start anywhere; whole: where documents do
gradient_accumulation_steps = 40    # micro-batches of batch_size in an iteration
batch_ramp_start = 0     # tokens of the first batch, which then grows; 0 is no ramp
batch_ramp_tokens = 0    # tokens until the batch is full; with a ramp,
                         # warmup_, cooldown_ and lr_decay_iters count full batches
# model; what follows bias comes from GPTConfig in model.py
dropout = 0.0            # 0 for pretraining; 0.1 or more for small data
bias = False             # biases in Linears and LayerNorms; GPT-2 has them
OPTIONS = configurator.add_options(globals(), GPTConfig, leave_out=('vocab_size',))
# optimizer
optimizer = 'adamw'      # adamw; or muon, for the matrices of the blocks
muon_lr = 0.02           # highest learning rate of Muon's matrices
muon_momentum = 0.95     # Muon's momentum; it rises from 0.85 over 300 iterations
weight_decay = 0.1       # it acts on matrices and embeddings only
beta1 = 0.9              # AdamW's decay of the mean of gradients
beta2 = 0.95             # AdamW's decay of the mean of their squares
grad_clip = 1.0          # largest norm of the gradient; 0 does not clip
# finetuning
lora_rank = 0            # rank of the adapters beside frozen weights; 0: none
lora_alpha = 16.0        # adapters are multiplied by lora_alpha / lora_rank
lora_targets = 'c_attn,c_proj,c_fc'     # Linears that get an adapter
lora_dropout = 0.0       # dropout of what the adapters read
freeze = ''              # layers to freeze, such as wte,wpe,h.0-5; empty: none
# learning rate schedule
decay_lr = True          # False keeps learning_rate throughout
lr_schedule = 'cosine'   # cosine; linear; wsd: constant, then linear at the end
warmup_iters = 2000      # iterations of linear rise
lr_decay_iters = 600000  # iteration where the rate reaches min_lr; about max_iters
cooldown_iters = 100000  # iterations of the fall with wsd; about a sixth of all
min_lr = 6e-5            # about a tenth of learning_rate
# machine
strategy = 'ddp'         # ddp: each rank has the whole model; fsdp: a shard of it;
                         # hsdp: shards within a machine, copies across machines
reduce_dtype = 'float32' # precision in which ranks exchange gradients
backend = 'auto'         # between ranks: auto, nccl (GPUs) or gloo (CPUs)
device = 'auto'          # auto, cuda, cuda:1, mps or cpu
dtype = 'auto'           # auto, float32, bfloat16 or float16 (with loss scaling)
compile: Literal['auto', True, False] = 'auto'  # torch.compile; auto: on CUDA
recompute = False        # True recomputes activations: less memory, more work
seed = 1337              # fixes the initial weights, the batches and dropout
rank_timeout = 600       # seconds that ranks wait for a lost one

# A resumed run takes its saved settings, except those of NOT_RESTORED. A stopped run prints the
# command that resumes it; flags of REPEATED that were given are in that command too.
REPEATED = ('device', 'dtype', 'compile', 'backend', 'wandb_log')
NOT_RESTORED = (*REPEATED, 'out_dir', 'init_from', 'overwrite', 'eval_only', 'rank_timeout',
                'accept_dataset_change')
# Loaded weights decide these settings.
MODEL_SETTINGS = ('n_layer', 'n_head', 'n_embd', 'bias', *OPTIONS)


# One iteration

def get_lr(iteration):
    """The learning rate: a linear rise, then a fall to min_lr at lr_decay_iters.

    The fall is a cosine (arXiv:1608.03983), a straight line from the end of warm-up on, or a
    straight line over the last cooldown_iters (arXiv:2404.06395).
    iteration: how many iterations are done; with a batch ramp, how many full batches.
    """
    if not decay_lr:
        return learning_rate
    if iteration < warmup_iters:
        return learning_rate * (iteration + 1) / (warmup_iters + 1)

    first = warmup_iters                # iteration at which the fall begins
    if lr_schedule == 'wsd':
        first = max(warmup_iters, lr_decay_iters - cooldown_iters)
    fraction = (iteration - first) / (lr_decay_iters - first)
    fraction = min(1.0, max(0.0, fraction))
    if lr_schedule == 'cosine':
        share = 0.5 * (1 + math.cos(math.pi * fraction))
    else:
        share = 1 - fraction
    return min_lr + (learning_rate - min_lr) * share


def train_step(run, batches, env):
    """One optimizer step over this rank's micro-batches.

    Returns {'loss': this rank's mean in nats, 'grad_norm': that of all ranks together}, tensors
    that are not read yet, so that the host runs ahead of a GPU.
    """
    # forward and backward; the gradients of the micro-batches add up
    loss_sum = torch.zeros((), device=env.device)
    for micro_step in range(run.micro_steps):
        x, y, weight = next(batches)    # each (B, T), and 1 on average
        if run.model.config.dropout or lora_dropout:
            number = env.rank * run.micro_steps + micro_step
            iter_num = run.progress.iter_num
            torch.manual_seed(derive_seed(run.seed, 'dropout', iter_num, number))
        is_last = micro_step == run.micro_steps - 1
        with parallel.sync_gradients(run.wrapped_model, enabled=is_last):
            with env.autocast():
                loss = run.wrapped_model(x, y)[1] * weight
            run.scaler.scale(loss / run.micro_steps).backward()
        loss_sum += loss.detach()
    loss = loss_sum / run.micro_steps

    # clip
    run.scaler.unscale_(run.optimizer)
    grad_norm = optim.clip_grad_norm(run.optimizer, run.grad_clip)

    # update; a fused optimizer skips it where `found_inf` is 1, so the host need not read the loss.
    # A GradScaler sets it by itself. AdamW on a Mac updates all the same; StepLog ends that run.
    if not run.scaler.is_enabled():
        run.optimizer.found_inf = (~torch.isfinite(loss + grad_norm)).float()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    parallel.clear_gradients(run.optimizer, run.wrapped_model)
    return dict(loss=loss, grad_norm=grad_norm)


# Evaluation

def estimate_loss(run, data, env):
    """{'train': nats, 'val': nats}, means over the targets of the same eval_iters batches.

    For a mixture, they are averages over its datasets by their shares, with a 'val/NAME' for each.
    None if a signal reached any rank. The model is left in evaluation mode.
    """
    run.wrapped_model.eval()
    losses = dict(train=0.0, val=0.0)
    for split in ('train', 'val'):
        for part in data.parts:
            loss = mean_loss(run.wrapped_model, part.data, split, eval_iters, batch_size, env)
            if loss is None:
                return None
            losses[split] += part.share * loss
            if len(data.parts) > 1 and split == 'val':
                losses[f'val/{part.name}'] = loss
    return losses


def evaluate(run, data, env):
    """Evaluate, print and record. Returns whether the val loss is the best so far.

    Returns None, and records nothing, if a signal reached any rank. The model is left training.
    """
    iter_num = run.progress.iter_num
    losses = estimate_loss(run, data, env)
    scores = {}
    is_between = eval_tasks_interval and iter_num % eval_tasks_interval and iter_num < max_iters
    scores_are_due = eval_only or not is_between
    if losses and run.scorer and scores_are_due:
        scores = run.scorer(run.model, env)
    run.wrapped_model.train()
    if losses is None or scores is None:
        return None

    text = ', '.join(f'{name} loss {loss:.4f}' for name, loss in losses.items())
    print0(f'step {iter_num}: {text}')
    if scores:
        text = ', '.join(f'{name} {value:.4f}' for name, value in scores.items())
        print0(f'step {iter_num}: {text}')
    improved = run.record_losses(losses, scores)
    if run.sampler and env.is_main:
        print0(run.sampler(run.model))
    return improved


# Start-up

def resume_or_begin(overrides, env):
    """The saved state to go on from, or None. Takes over the settings of a saved run."""
    saved, notes = run_folder.open_run(out_dir, init_from, overwrite, eval_only, env)
    if saved:
        changes = configurator.restore_settings(
            globals(), saved.config or {}, overrides, NOT_RESTORED)
        notes += settings_checks.notes_on_changes(changes, MODEL_SETTINGS, batch_ramp_start)
    with env.raise_on_all_ranks():
        settings_checks.check_training(globals())
        settings_checks.check_ranks(globals(), env)
    for note in notes + settings_checks.training_notes(globals(), saved, env):
        print_text(f'note: {note}')
    return saved


def build_model(saved, data, overrides):
    """The model to train: new, of a saved run, or of pretrained weights."""
    source = init_from
    adapts = saved and saved.base       # the state then has only adapters
    if adapts:
        source = saved.base['source']

    if saved and not adapts:
        model = GPT.from_checkpoint(saved, dropout)
    elif source in ('scratch', 'auto'):
        torch.manual_seed(seed)
        shape = {name: globals()[name] for name in MODEL_SETTINGS}
        vocab_size = padded_vocab_size(data.vocab_size)
        return GPT(GPTConfig(block_size, vocab_size, dropout=dropout, **shape))
    else:
        model = load_model.load_to_train(GPT, source, dataset, data.tokenizer, dropout)

    if data.vocab_size > model.config.vocab_size:
        raise UserError(f'dataset {dataset} has {data.vocab_size} tokens, '
                        f'and the model only {model.config.vocab_size}; restore what it '
                        f'was trained on, or begin another --out_dir with '
                        f'--init_from={out_dir}')
    settings_checks.tell_what_weights_decide(model.config, MODEL_SETTINGS, overrides)

    # loaded weights are cut to block_size; a resumed run keeps its own unless it is told otherwise
    is_cut = not saved and block_size < model.config.block_size
    if 'block_size' in overrides or adapts or is_cut:
        change_context(model, block_size, saved)
    return model


def main(overrides):
    """overrides: the settings that a config file or a flag named."""
    begins = init_from not in ('resume', 'auto')
    settings_checks.check_training(globals(), combinations=begins)
    load_model.download_source(init_from)   # before rank_timeout counts
    env = start_environment(device, dtype, compile, backend, rank_timeout)
    if env.device.type == 'cpu':
        keep_freed_memory()                 # fewer page faults, the same numbers
    with ExitStack() as at_exit:
        env.catch_signals(signal.SIGTERM)       # Ctrl-C still ends the start-up
        at_exit.callback(env.restore_signals)   # for a program that goes on
        print0(configurator.describe_settings(overrides))
        print_text(env.summary)

        at_exit.enter_context(run_folder.locked(out_dir, init_from, eval_only, env))
        saved = resume_or_begin(overrides, env)
        data = open_dataset(dataset, env, sampling, documents)

        # the model, its optimizer, and where the run goes on
        build = partial(build_model, saved, data, overrides)
        model = parallel.build_on_ranks(build, GPT, strategy, env)
        freeze_layers(model, freeze, env)
        settings = configurator.snapshot(globals())
        base = lora.replace_linears(model, settings, saved, env)    # or None
        run = start_run(settings, model, data, saved, env)
        run.base = base
        with env.raise_on_all_ranks():
            if sample_tokens:
                run.sampler = TextSampler(data.tokenizer, sample_prompt, sample_tokens, seed)
            if eval_tasks:
                run.scorer = TaskScorer(eval_tasks, eval_tasks_data, eval_tasks_limit,
                                        data.tokenizer, model)
        if not eval_only:
            run.open_out_dir(saved, sys.argv, env)
        del saved, build                # unmaps the checkpoint file

        print_text(run.summary(data, max_iters, env))
        env.catch_signals()     # from here on, Ctrl-C saves too
        if eval_only:
            evaluate(run, data, env)
            run.finish(env.stop_signal(), env)
        else:
            train(run, data, overrides, env)


def train(run, data, overrides, env):
    """Train until max_iters, a stop signal, or the end of patience."""
    progress = run.progress
    iterations = run.batch_schedule.iterations(progress.sequences, progress.tokens)
    iterations = islice(iterations, max(0, max_iters - progress.iter_num))
    batches = train_batches(data, seed, iterations, env)
    health = None
    if health_interval and run.writer:
        health = HealthMonitor(run, data, env, health_interval)
    step_log = StepLog(
        env, run.writer, tokens=progress.tokens, flops_per_token=run.model.flops_per_token(),
        log_interval=log_interval, max_iters=max_iters, before_error=run.wait_for_save,
        advice=f'{out_dir} keeps what was saved before. A lower --learning_rate may help.',
        health=health)

    first_iteration = progress.iter_num
    while True:
        # evaluate, sample, save
        if run.is_evaluation_due():
            step_log.flush()
            improved = evaluate(run, data, env)
            if improved is None:
                step_log.stop_signal = env.stop_signal()
                break
            is_model_due = progress.iter_num > 0 and (improved or always_save_checkpoint)
            with status('saving'):
                run.save(env, model_too=is_model_due)
            step_log.restart_clock()
        if progress.iter_num >= max_iters or run.is_out_of_patience():
            break

        # one optimizer step
        schedule_position = progress.iter_num
        if batch_ramp_start:
            schedule_position = progress.tokens / run.batch_schedule.full_tokens
        lr = get_lr(schedule_position)
        optim.set_lr(run.optimizer, lr, progress.iter_num)
        is_compiling = env.compile and progress.iter_num == first_iteration
        with status('compiling the training step' if is_compiling else ''):
            numbers = train_step(run, batches, env)
        run.count_iteration()

        # log; push returns True once a stop signal has reached any rank
        if step_log.push(progress.iter_num - 1, numbers, progress.tokens, lr=lr):
            break

    # save where a signal ended the loop
    batches.close()
    step_log.flush()
    with status('saving'):
        if step_log.stop_signal:
            run.save(env)
        run.wait_for_save()
    if step_log.stop_signal:
        run.tell_how_to_resume(step_log.stop_signal, overrides, REPEATED, env)
    else:
        run.tell_of_the_end(max_iters)
    run.finish(step_log.stop_signal, env)


if __name__ == '__main__':
    with hard_exit(), report_errors(), report_first_failure():
        main(configurator.configure(globals(), sys.argv[1:]))
