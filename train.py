"""Train or finetune a GPT.

    python train.py config/train_shakespeare_char.py                                    # one process, on a GPU if there is one
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py              # on 8 GPUs

Everything random depends only on the seed, the iteration and the index in it. So a stopped run
goes on exactly (--init_from=resume), and several ranks draw the batches that one would.
"""

import math
import signal
import sys
from dataclasses import asdict
from itertools import islice

from console import print0, progress_bar, report_errors, status  # before torch: see console.py

import torch

import configurator
from engine.checkpoint import run_folder
from engine.checkpoint import sharded as sharded_checkpoint
from engine.checkpoint.run_folder import write_run_json
from engine.dataloader.batches import eval_batches, open_dataset, train_batches
from engine.device import derive_seed, grad_scaler
from engine.distributed import hard_exit, report_first_failure, start
from engine.errors import UserError
from engine.evaluation.results import TaskScorer
from engine.generation.generate import TextSampler
from engine.hf.tokenizer_json import check_same_tokens
from engine.metrics.health import HealthMonitor
from engine.metrics.metrics_file import MetricsWriter
from engine.metrics.step_log import StepLog
from engine.tokenizer import padded_vocab_size
from engine.training import optim, parallel
from engine.training.run import BatchSchedule, Progress, Run
from engine.training.settings_checks import check_training, training_notes
from model import GPT, GPTConfig

# input and output
out_dir = 'out'                     # holds the model, the state and the metrics of the run
eval_interval = 2000                # iterations between evaluations; each one saves
log_interval = 1                    # iterations between log lines
eval_iters = 200                    # batches of batch_size per split and evaluation
eval_only = False                   # evaluate once, write nothing, and end
checkpoint = 'gathered'             # gathered: ckpt.pt and state.pt, written by rank 0; sharded: a folder state/, to
                                    # which each rank writes its shards while training goes on
always_save_checkpoint = True       # False replaces ckpt.pt only when the val loss improves
init_from = 'scratch'               # scratch, resume, auto (resume if there is a run), a hub model (gpt2, gpt2-medium,
                                    # gpt2-large, gpt2-xl, OWNER/NAME), or a folder of Hugging Face weights
overwrite = False                   # True replaces the run that out_dir holds
# at evaluations; none of these changes the weights, but patience may end the run
sample_tokens = 0                   # length of a sample printed at each evaluation; 0 prints none
sample_prompt = '\n'                # text that the sample continues
eval_tasks = ''                     # tasks of evaluate.py to score at evaluations, such as hellaswag,lambada; '' scores none
eval_tasks_interval = 0             # iterations between such scores; 0: at every evaluation
eval_tasks_limit = 0                # examples of each task, from the first on; 0: all. 1,000 tell 0.29 from 0.33
eval_tasks_data = 'data/evals'      # folder of the tasks, which data/evals/prepare.py fills
patience = 0                        # evaluations without a better val loss after which the run ends; 0 never ends it
health_interval = 0                 # iterations between measurements of each layer, printed and logged; 0 measures none
# wandb
wandb_log = False                   # True sends the metrics to wandb as well
wandb_project = 'owt'
wandb_run_name = 'gpt2'
# data
dataset = 'openwebtext'             # a folder of data/ that its prepare.py has filled
accept_dataset_change = False       # True resumes on a dataset that is not the one the run began with
sampling = 'windows'                # windows, spread evenly over the text; epoch: each window once, then again cut elsewhere
documents = 'any'                   # any: a sequence starts anywhere; whole: at the start of a document
gradient_accumulation_steps = 40    # micro-batches per iteration, over all ranks together
batch_size = 12                     # sequences per micro-batch, at most; lower it where memory is short
block_size = 1024                   # tokens of context; weights of --init_from that read more are cut to it
batch_ramp_start = 0                # tokens of the first batch, which then grows to the full one; 0 is no ramp
batch_ramp_tokens = 0               # tokens of training over which it grows; lr_decay_iters then counts full batches
# model; loaded weights keep their own shape
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0                       # 0 for pretraining; 0.1 or more for finetuning and small data
bias = False                        # biases in Linears and LayerNorms; GPT-2 has them
# model beyond GPT-2; model.py explains each
activation = 'gelu'                 # gelu, gelu_tanh, relu2 or swiglu
position = 'learned'                # learned, rotary or alibi
norm = 'layernorm'                  # layernorm, rmsnorm (without parameters) or rmsnorm_gain
qk_norm = False                     # normalize queries and keys
embedding_norm = False              # normalize what the first block reads
n_kv_head = 0                       # heads of keys and values; 0: n_head
n_inner = 0                         # width of the MLP; 0: 4 n_embd, or 8/3 n_embd with swiglu
tied = True                         # the embedding is also the head
softcap = 0.0                       # logits stay within (-softcap, softcap); 0: no limit
zero_init = False                   # start with residual projections, and an untied head, of zeros
init_std = 0.02                     # of the other initial weights; 0.02 sqrt(768 / n_embd) is better for narrow models
# optimizer
optimizer = 'adamw'                 # adamw; or muon for the matrices of the blocks, and AdamW for the rest
learning_rate = 6e-4                # the highest, after warm-up
muon_lr = 0.02                      # the highest of the matrices, with muon
muon_momentum = 0.95                # of the matrices, from iteration 300 on; it begins with 0.85
max_iters = 600000                  # optimizer steps in all
weight_decay = 0.1                  # on matrices and embeddings only
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0                     # largest norm of the gradient; 0 does not clip
# learning rate schedule
decay_lr = True                     # False keeps learning_rate throughout
lr_schedule = 'cosine'              # cosine; linear; or wsd: constant, then linear over the last cooldown_iters
warmup_iters = 2000                 # iterations of linear rise
lr_decay_iters = 600000             # where the rate reaches min_lr; about max_iters
cooldown_iters = 100000             # iterations of the fall, with wsd; about a sixth of lr_decay_iters
min_lr = 6e-5                       # about a tenth of learning_rate
# machine
strategy = 'ddp'                    # of several ranks: ddp (each has the whole model), fsdp (each has a shard of
                                    # it), hsdp (shards within a machine, copies across machines)
reduce_dtype = 'float32'            # of gradients between ranks; bfloat16 halves the traffic
backend = 'auto'                    # between ranks: auto, nccl (GPUs) or gloo (CPUs)
device = 'auto'                     # auto, cuda, cuda:1, mps or cpu
dtype = 'auto'                      # auto, float32, bfloat16 or float16 (with loss scaling)
compile = 'auto'                    # auto (on CUDA), True or False: torch.compile
recompute = False                   # True recomputes activations in backward: less memory, a third more work
seed = 1337                         # of the initial weights, the batches and dropout
rank_timeout = 600                  # seconds that ranks wait for a lost one before they give up

# A resumed run takes its saved settings, except these. The command that a stopped run prints repeats the first ones.
REPEATED = ('device', 'dtype', 'compile', 'backend', 'wandb_log')
NOT_RESTORED = (*REPEATED, 'out_dir', 'init_from', 'overwrite', 'eval_only', 'rank_timeout', 'accept_dataset_change')
SHAPE = ('n_layer', 'n_head', 'n_embd', 'bias', 'activation', 'position', 'norm', 'qk_norm', 'embedding_norm', 'n_kv_head',
         'n_inner', 'tied', 'softcap', 'zero_init', 'init_std')         # fields of GPTConfig, which loaded weights decide


def get_lr(iteration):
    """Linear rise, then a fall to min_lr at lr_decay_iters: a cosine (arXiv:1608.03983), a line from the rise on, or
    a line over the last cooldown_iters (arXiv:2404.06395). iteration: with a batch ramp, in full batches."""
    if not decay_lr:
        return learning_rate
    if iteration < warmup_iters:
        return learning_rate * (iteration + 1) / (warmup_iters + 1)
    start = max(warmup_iters, lr_decay_iters - cooldown_iters) if lr_schedule == 'wsd' else warmup_iters
    progress = min(1.0, max(0.0, (iteration - start) / (lr_decay_iters - start)))
    share = 0.5 * (1 + math.cos(math.pi * progress)) if lr_schedule == 'cosine' else 1 - progress
    return min_lr + (learning_rate - min_lr) * share


def train_step(run, batches, env):
    """One optimizer step over this rank's micro-batches.

    Returns {'loss': mean over them in nats, 'grad_norm': of the global batch}, scalar tensors not read
    yet, so that the host runs ahead of a GPU. Where either is not finite, the weights stay as they are.
    """
    loss_sum = torch.zeros((), device=env.device)
    for micro_step in range(run.micro_steps):
        x, y = next(batches)                            # each (B, T)
        if run.model.config.dropout:
            torch.manual_seed(derive_seed(run.seed, 'dropout', run.progress.iter_num, env.rank * run.micro_steps + micro_step))
        with parallel.sync_gradients(run.wrapped_model, enabled=micro_step == run.micro_steps - 1):
            with env.autocast():
                loss = run.wrapped_model(x, y)[1]
            run.scaler.scale(loss / run.micro_steps).backward()
        loss_sum += loss.detach()
    loss = loss_sum / run.micro_steps
    grad_norm = optim.step(run.optimizer, run.scaler, loss, run.grad_clip)      # clips, updates, clears the gradients
    return dict(loss=loss, grad_norm=grad_norm)


@torch.no_grad()
def estimate_loss(run, data, env):
    """{'train': nats, 'val': nats} over the same eval_iters batches each time, shared over the
    ranks. None if a signal reached any rank. The model is left in evaluation mode."""
    run.wrapped_model.eval()
    losses, mine = {}, len(range(env.rank, eval_iters, env.world_size))
    for split in ('train', 'val'):
        total = torch.zeros((), device=env.device)
        batches = eval_batches(data, split, eval_iters, batch_size, env)
        show = progress_bar(f'evaluating on {split}', batches, -(-eval_iters // env.world_size), at_once=env.compile)
        for i, batch in enumerate(show):
            with env.autocast():
                loss = run.wrapped_model(*batch)[1]
            if i < mine:                                # a rank's last batch may be a repeat, which does not count
                total += loss
            if env.stop_signal():
                return None
        losses[split] = env.all_reduce(total).item() / eval_iters
    return losses


def build_model(saved, data, overrides):
    """The model to train: new, of a saved run, or of pretrained weights."""
    if not saved and init_from in ('scratch', 'auto'):
        torch.manual_seed(seed)
        shape = {name: globals()[name] for name in SHAPE}
        return GPT(GPTConfig(block_size, padded_vocab_size(data.vocab_size), dropout=dropout, **shape))
    model = GPT.from_checkpoint(saved, dropout) if saved else GPT.from_pretrained(init_from, {'dropout': dropout})
    if not saved:
        check_same_tokens(init_from, model.config.vocab_size, dataset, data.tokenizer)
    if data.vocab_size > model.config.vocab_size:
        raise UserError(f'dataset {dataset} has {data.vocab_size} tokens, and the model only {model.config.vocab_size}')
    for name in SHAPE:
        value = getattr(model.config, name)
        if overrides.get(name, value) != value:
            print0(f'note: {name}={overrides[name]} has no effect, the weights have {name}={value}')
    context = model.config.block_size
    if block_size != context and ('block_size' in overrides or not saved and block_size < context):
        print0(f'note: the weights have read contexts of {context} tokens, and now read {block_size}')
        model.crop_block_size(block_size)
    return model


def resume_or_start(overrides, env):
    """(the saved state to go on from or None, the lock of out_dir). Takes over the settings of a saved run."""
    saved, notes, run_lock = run_folder.open_run(out_dir, init_from, overwrite, eval_only, env)    # locked until the end
    if saved:
        changes = configurator.restore_settings(globals(), saved.get('config') or {}, overrides, NOT_RESTORED)
        notes += [f'{name} {old!r} -> {new!r}' for name, (old, new) in changes.items() if name not in SHAPE]
        if batch_ramp_start and {'batch_size', 'gradient_accumulation_steps', 'block_size'} & set(changes):
            notes.append('the learning rate counts full batches, and the full batch has changed')
    check_training(globals())
    for note in notes + training_notes(globals(), saved, env):
        print0(f'note: {note}')
    return saved, run_lock


def start_run(saved, data, overrides, env):
    """The Run: its model on the device and over the ranks, its optimizer, and where it goes on."""
    with env.raise_on_all_ranks():
        sharded = parallel.check_strategy(strategy, reduce_dtype, env, optimizer)
        if sharded and (sample_tokens or eval_tasks):
            raise UserError(f'sample_tokens and eval_tasks read the whole model, and strategy={strategy} gives a rank a part; '
                            f"try --sample_tokens=0 --eval_tasks=''")
        # Rank 0 gives the others their shards, so only one copy of the whole model exists on a machine.
        model = None if sharded and not env.is_main else build_model(saved, data, overrides)
    model_config = model.config if model else None
    if sharded:
        model_config = env.all_gather(model_config)[0]
        with torch.device('meta'):
            model = model or GPT(model_config)
    with env.raise_on_all_ranks():
        batch_schedule = BatchSchedule(gradient_accumulation_steps, batch_size, model_config.block_size, env.world_size,
                                       batch_ramp_start, batch_ramp_tokens)
        scaler = grad_scaler(env.device, env.dtype)
        data.set_block_size(model_config.block_size)
        if saved:
            data.check_same(saved, accept_dataset_change)
    settings, progress = configurator.snapshot(globals()), Progress.of(saved, batch_schedule.full, model_config.block_size)
    settings.update({name: value for name, value in asdict(model_config).items() if name in settings})      # of the weights
    env.assert_same_on_all_ranks({**settings, 'the dataset': data.fingerprint, 'iter_num': progress.iter_num})
    with env.raise_on_all_ranks():                      # each rank finds the same mistakes, and rank 0 prints them
        wrapped_model = parallel.wrap(model, env, strategy, recompute, reduce_dtype).train()
        built_optimizer = optim.build(optimizer, model, learning_rate, weight_decay, (beta1, beta2), muon_lr, muon_momentum)
        if saved and 'sharded' in saved:
            saved = sharded_checkpoint.load(saved, model, built_optimizer, env)
        optim.load_state_dict(built_optimizer, scaler, saved or {})
        scorer = eval_tasks and TaskScorer(eval_tasks, eval_tasks_data, eval_tasks_limit, data.tokenizer, model)
    description = dict(config=settings, tokenizer=data.tokenizer, fingerprint=data.fingerprint, dtype=env.dtype)
    run = Run(model=model, wrapped_model=wrapped_model, optimizer=built_optimizer, scaler=scaler, batch_schedule=batch_schedule,
              grad_clip=grad_clip, seed=seed, progress=progress, out_dir=out_dir, description=description, scorer=scorer)
    if checkpoint == 'sharded' and not eval_only:
        run.saver = sharded_checkpoint.ShardedSaver(out_dir, env)
    if env.is_main and not eval_only:
        run_folder.clean_out_dir(out_dir, saved)
        write_run_json(out_dir, sys.argv, settings, env)
        wandb_run = dict(project=wandb_project, name=wandb_run_name, config=settings, dir=out_dir, resume='allow')
        run.writer = MetricsWriter(out_dir, progress.iter_num, progress.last_eval == progress.iter_num,
                                   wandb_log and wandb_run, (saved or {}).get('wandb_id'))
    return run


def main(overrides):
    """overrides: the settings that a config file or a flag named."""
    check_training(globals(), combinations=init_from not in ('resume', 'auto'))
    env = start(device, dtype, compile, backend, rank_timeout)
    try:
        env.catch_signals(signal.SIGTERM)               # takes effect in the loop; Ctrl-C still ends the start-up
        print0(f'{configurator.describe_settings(overrides)}\n{env.summary}')
        saved, run_lock = resume_or_start(overrides, env)       # out_dir is locked until main ends
        data = open_dataset(dataset, env, sampling, documents)
        sampler = TextSampler(data.tokenizer, sample_prompt, sample_tokens, seed) if sample_tokens else None
        run = start_run(saved, data, overrides, env)
        del saved                                       # unmaps the checkpoint file
        train(run, data, sampler, overrides, env)
    finally:
        env.restore_signals()                           # for a program that called main, and goes on


def train(run, data, sampler, overrides, env):
    """Train until max_iters, a stop signal, or the end of patience. sampler: of the sample at evaluations, or None."""
    progress, batch_schedule = run.progress, run.batch_schedule
    print0(run.summary(data, max_iters, env))
    iterations = islice(batch_schedule.iterations(progress.sequences, progress.tokens), max(0, max_iters - progress.iter_num))
    batches = train_batches(data, seed, iterations, env)
    log = StepLog(env, run.writer, tokens=progress.tokens, flops_per_token=run.model.flops_per_token(),
                  log_interval=log_interval, max_iters=max_iters, before_error=run.wait_for_save,
                  advice=f'{out_dir} keeps what was saved before. A lower --learning_rate may help.',
                  health=HealthMonitor(run, data, env, health_interval) if health_interval and run.writer else None)
    env.catch_signals()

    first_iteration = progress.iter_num
    while True:
        # evaluate, sample, save
        if eval_only or run.evaluation_is_due(eval_interval, max_iters):
            log.flush()
            losses, scores = estimate_loss(run, data, env), {}
            if losses and run.scorer and (eval_only or run.scores_are_due(eval_tasks_interval or eval_interval, max_iters)):
                scores = run.scorer(run.model, env)
            run.wrapped_model.train()
            if losses is None or scores is None:
                log.stop_signal = env.stop_signal()
                break
            print0(f'step {progress.iter_num}: train loss {losses["train"]:.4f}, val loss {losses["val"]:.4f}')
            if scores:
                print0(f'step {progress.iter_num}: ' + ', '.join(f'{name} {value:.4f}' for name, value in scores.items()))
            improved = run.record_losses(losses, scores)
            if sampler and env.is_main:
                print0(sampler(run.model))
            if not eval_only:
                with status('saving'):
                    run.save(env, model_too=progress.iter_num > 0 and (improved or always_save_checkpoint))
            log.restart_clock()
        if eval_only or progress.iter_num >= max_iters or run.is_out_of_patience(eval_interval, patience):
            break

        # one iteration
        lr = get_lr(progress.tokens / batch_schedule.full_tokens if batch_ramp_start else progress.iter_num)
        optim.set_lr(run.optimizer, lr, progress.iter_num)
        with status('compiling the training step' if env.compile and progress.iter_num == first_iteration else ''):
            step = train_step(run, batches, env)
        run.count_iteration()
        if log.push(progress.iter_num - 1, step, progress.tokens, lr=lr):   # reads the step before; true when asked to stop
            break

    batches.close()
    log.flush()
    with status('saving'):
        if log.stop_signal and not eval_only:
            run.save(env)
        run.wait_for_save()
    repeated = ''.join(f' --{name}={overrides[name]}' for name in REPEATED if name in overrides)
    run.finish(log.stop_signal, max_iters, repeated, eval_only, env, print0)


if __name__ == '__main__':
    with hard_exit(), report_errors(), report_first_failure():
        main(configurator.configure(globals(), sys.argv[1:]))
