"""Train or finetune a GPT.

One process, on whatever this machine has:
    python train.py config/train_shakespeare_char.py
One machine with 8 GPUs, and one of two such machines:
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=HOST --master_port=29500 train.py config/train_gpt2.py

Everything random is a function of the seed and of the place in training, so that a stopped
run goes on exactly (--init_from=resume), and ranks draw the batches that one process would.
"""

import datetime
import math
import signal
import sys
import time
from collections import deque

import torch

import checkpoint
import configurator
import runtime
from dataloader import Dataset, prefetch
from metrics import Metrics
from model import GPT, GPTConfig

# input and output
out_dir = 'out'                     # holds ckpt.pt, state.pt, metrics.jsonl
eval_interval = 2000                # iterations between evaluations; each one saves
log_interval = 1                    # iterations between log lines
eval_iters = 200                    # batches of batch_size per split and evaluation
eval_only = False                   # evaluate once, write nothing, and end
always_save_checkpoint = True       # False replaces ckpt.pt only when the val loss improves
init_from = 'scratch'               # scratch, resume, auto (resume if there is a run), gpt2, gpt2-medium,
                                    # gpt2-large, gpt2-xl, or a folder of Hugging Face weights
overwrite = False                   # True lets scratch replace the run that out_dir holds
# wandb
wandb_log = False                   # True sends the metrics to wandb as well
wandb_project = 'owt'
wandb_run_name = 'gpt2'
# data
dataset = 'openwebtext'             # a folder of data/ that its prepare.py has filled
accept_dataset_change = False       # True resumes on a dataset that is not the one the run began with
gradient_accumulation_steps = 40    # times batch_size: sequences per iteration, over all ranks together
batch_size = 12                     # sequences per micro-batch, at most; lower it where memory is short
block_size = 1024                   # tokens of context
# model
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0                       # 0 for pretraining; 0.1 or more for finetuning and small data
bias = False                        # biases in Linears and LayerNorms; GPT-2 has them
# optimizer: AdamW
learning_rate = 6e-4                # the highest, after warm-up
max_iters = 600000                  # optimizer steps in all
weight_decay = 0.1                  # on matrices and embeddings only
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0                     # largest norm of the gradient; 0 does not clip
# learning rate schedule
decay_lr = True                     # False keeps learning_rate throughout
warmup_iters = 2000                 # iterations of linear rise
lr_decay_iters = 600000             # where the cosine reaches min_lr; about max_iters
min_lr = 6e-5                       # about a tenth of learning_rate
# machine
backend = 'auto'                    # between ranks: auto, nccl (GPUs) or gloo (CPUs)
device = 'auto'                     # auto, cuda, cuda:1, mps or cpu
dtype = 'auto'                      # auto, float32, bfloat16 or float16 (with loss scaling)
compile = 'auto'                    # auto (on CUDA), True or False: torch.compile
recompute = False                   # True recomputes activations in backward: less memory, a third more work
seed = 1337                         # of the initial weights, the batches and dropout
rank_timeout = 600                  # seconds that ranks wait for a lost one before they give up


def check_settings():
    """ValueError for a value that cannot be, before anything is touched."""
    rules = (
        ('eval_interval log_interval eval_iters gradient_accumulation_steps batch_size rank_timeout',
         lambda v: v >= 1, 'at least 1'),
        ('max_iters warmup_iters lr_decay_iters min_lr weight_decay grad_clip',
         lambda v: 0 <= v < math.inf, 'zero or more'),
        ('learning_rate', lambda v: 0 < v < math.inf, 'above zero'),
        ('beta1 beta2 dropout', lambda v: 0 <= v < 1, 'at least 0 and below 1'),
        ('seed', lambda v: 0 <= v < 2 ** 63, 'at least 0 and below 2**63'),
        ('out_dir', lambda v: v.strip(), 'the name of a folder'),
    )
    for names, holds, words in rules:
        for name in names.split():
            if not holds(globals()[name]):
                raise ValueError(f'{name}={globals()[name]!r} should be {words}')
    if decay_lr and warmup_iters >= lr_decay_iters:
        raise ValueError(f'warmup_iters={warmup_iters} leaves nothing of lr_decay_iters={lr_decay_iters}; '
                         f'try --warmup_iters={lr_decay_iters // 10}')
    if decay_lr and min_lr > learning_rate:
        raise ValueError(f'min_lr={min_lr} is above learning_rate={learning_rate}; '
                         f'try --min_lr={learning_rate / 10:g}')


def learning_rate_at(iteration):
    """Linear rise, cosine fall to min_lr, constant after that. (arXiv:1608.03983)"""
    if not decay_lr:
        return learning_rate
    if iteration < warmup_iters:
        return learning_rate * (iteration + 1) / (warmup_iters + 1)
    progress = min(1.0, (iteration - warmup_iters) / (lr_decay_iters - warmup_iters))
    return min_lr + (learning_rate - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def estimate_loss(model, data, rt):
    """{'train': nats, 'val': nats} over the same eval_iters batches each time, shared over
    the ranks. None if a signal came on any rank meanwhile."""
    model.eval()
    losses = {}
    for split in ('train', 'val'):
        mine = [(seed, f'eval {split}', i * batch_size, batch_size) for i in range(rt.rank, eval_iters, rt.world)]
        batches = prefetch(data.batch, mine, rt.device)
        total = torch.zeros((), device=rt.device)
        for _ in range(0, eval_iters, rt.world):        # as often on every rank
            batch = next(batches, None)
            if batch:
                with rt.autocast():
                    total += model(*batch, loss_only=True)[1]
            if rt.signal_anywhere():
                batches.close()
                model.train()
                return None
        losses[split] = rt.sum(total).item() / eval_iters
    model.train()
    return losses


def train_step(model, optimizer, scaler, batches, micros, iteration, rt):
    """One optimizer step over this rank's `micros` micro-batches.

    Returns a tensor not yet read, (2 + signals,): mean loss in nats and gradient norm, both of
    the global batch, then runtime's signal flags. Where either number is not finite the
    weights stay as they are, decided on the device, so that the host need not wait. (A Mac's
    AdamW does not look; the run still ends before anything is saved.)
    """
    loss_sum = torch.zeros((), device=rt.device)
    for micro in range(micros):
        x, y = next(batches)                            # each (B, T)
        rt.seed_for('dropout', iteration, rt.rank * micros + micro)
        with rt.without_sync(model, skip=micro < micros - 1):
            with rt.autocast():
                _, loss = model(x, y, loss_only=True)
            scaler.scale(loss / micros).backward()      # the last one averages over the ranks
        loss_sum += loss.detach()
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
    loss = loss_sum / micros
    if scaler.is_enabled():
        scaler.step(optimizer)                          # skips the step itself, and scales less
        scaler.update()
    else:
        optimizer.found_inf = (~torch.isfinite(loss + norm)).float()
        optimizer.step()                                # the fused AdamW looks at found_inf
    optimizer.zero_grad(set_to_none=True)
    numbers = rt.sum(torch.cat([torch.stack([loss, norm]), rt.signal_flags()]))
    numbers[:2] /= rt.world                             # the norm is the same on every rank
    return numbers


def load_or_build(data, given, rt):
    """The model to train from, and the saved state where a run is resumed, else None."""
    holds_run, state = checkpoint.holds_run(out_dir), None
    resume = init_from == 'resume' or init_from == 'auto' and holds_run
    if holds_run and not (resume or overwrite or eval_only):
        raise ValueError(f'{out_dir} already holds a run; go on with --init_from=resume, choose '
                         f'another --out_dir, or replace it with --overwrite=True')
    if init_from in ('scratch', 'auto') and not resume:
        # GPT-2's 50257 tokens are padded to 50304, which multiplies faster; 65 characters are 65
        size = 50304 if data.vocab_size == 50257 else data.vocab_size
        torch.manual_seed(seed)
        return GPT(GPTConfig(block_size, size, n_layer, n_head, n_embd, dropout, bias)), None
    if resume:
        state, faults = checkpoint.load_state(out_dir)
        for fault in faults:
            rt.say(f'note: {fault}')
        data.check_same(state, accept_dataset_change)
        model = checkpoint.build_model(state, dropout)
    else:
        model = GPT.from_pretrained(init_from, {'dropout': dropout})
    if data.vocab_size > model.config.vocab_size:
        raise ValueError(f'dataset {dataset} has {data.vocab_size} tokens, the model '
                         f'{model.config.vocab_size}; they do not belong together')
    for name in ('n_layer', 'n_head', 'n_embd', 'bias'):
        weights_have = getattr(model.config, name)
        if given.get(name, weights_have) != weights_have:
            rt.say(f'note: {name}={given[name]} does not count, the weights have {name}={weights_have}')
    if given.get('block_size', model.config.block_size) != model.config.block_size:
        model.crop_block_size(block_size)
    return model, state


class Progress:
    """Reads the numbers of finished steps, checks them, and logs them."""

    def __init__(self, model, metrics, sequences, rt):
        self.model, self.metrics, self.rt = model, metrics, rt
        self.sequences, self.peak = sequences, rt.peak_flops()
        self.pending = deque()                          # (iteration, function that waits for numbers)
        self.seconds = None                             # per iteration, smoothed, from the second line on
        self.lines = self.skipped = 0
        self.restart_clock()

    def restart_clock(self):
        self.began, self.steps = time.perf_counter(), 0

    def add(self, iteration, numbers):
        """Note a step, and read those before it: a GPU computes this one meanwhile.
        Returns the number of a signal that reached any rank, or 0."""
        self.pending.append((iteration, self.rt.read_later(numbers)))
        return self.settle(leave=1 if self.rt.asynchronous else 0)

    def settle(self, leave=0):
        caught = 0
        while len(self.pending) > leave:
            iteration, read = self.pending.popleft()
            loss, norm, *flags = read()
            caught = caught or self.rt.signal_from(flags)
            # float16 meets infinite gradients while its loss scale settles, and skips those steps
            self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
            if not math.isfinite(loss) or self.skipped > (20 if self.rt.dtype == 'float16' else 0):
                raise RuntimeError(f'iteration {iteration}: loss {loss}, gradient norm {norm}; stopped before '
                                   f'that update, what {out_dir} holds is from before it; '
                                   f'a lower --learning_rate may help')
            self.steps += 1
            if iteration % log_interval == 0:
                self.log(iteration, loss, norm)
        return caught

    def log(self, iteration, loss, norm):
        seconds = (time.perf_counter() - self.began) / self.steps
        self.restart_clock()
        self.lines += 1                                 # the first line may hold a minute of compilation
        self.seconds = seconds if self.lines < 3 else 0.9 * self.seconds + 0.1 * seconds
        tokens = self.sequences * self.model.config.block_size / seconds
        mfu = self.model.estimate_mfu(self.sequences / self.rt.world, seconds, self.peak)
        left = datetime.timedelta(seconds=round(self.seconds * (max_iters - iteration - 1)))
        lr = learning_rate_at(iteration)
        self.rt.say(f'iter {iteration}: loss {loss:.4f}, {seconds * 1000:.1f} ms, {tokens:,.0f} tok/s, '
                    f'mfu {"n/a" if mfu is None else f"{mfu:.1%}"}, grad {norm:.2f}, lr {lr:.1e}, eta {left}')
        if self.metrics:
            self.metrics.log(iteration, loss=loss, grad_norm=norm, lr=lr, ms=seconds * 1000,
                             tokens_per_second=tokens, mfu=mfu)


def main(given):
    """given: the settings that a config file or a flag named."""
    check_settings()
    rt = runtime.start(device, dtype, compile, backend, seed, rank_timeout)
    rt.catch_signals(but=signal.SIGINT)                 # until the loop begins, Ctrl-C ends a download at once
    with rt.together():
        micros, micro_size = rt.share_of_batch(gradient_accumulation_steps, batch_size)
        if rt.local_rank == 0:
            Dataset(dataset)                            # scanned once a machine, the others find its cache
    with rt.together():
        data = Dataset(dataset)
        model, state = load_or_build(data, given, rt)
        data.cut(model.config.block_size)
        model.to(rt.device)
        model.recompute = recompute
        optimizer = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2))
        scaler = rt.scaler()
        iteration, best_val_loss, evaluated, wandb_id = 0, math.inf, None, None
        if state:
            iteration, best_val_loss = state['iter_num'], state['best_val_loss']
            evaluated, wandb_id = state.get('evaluated'), state.get('wandb_id')
            checkpoint.restore_optimizer(optimizer, scaler, state)
        held = checkpoint.lock(out_dir, state) if rt.main and not eval_only else None  # until the process ends
        resumed, state = state is not None, None        # lets go of the mapped file
    config = configurator.snapshot(globals())
    rt.check_same({**config, 'the dataset': data.fingerprint,
                   'the iteration to go on from (all machines need to see the same out_dir)': iteration})
    rt.say(rt.summary)
    rt.say(f'{model.get_num_params():,} parameters, {micros * rt.world} micro-batches of {micro_size} x '
           f'{model.config.block_size} tokens per iteration' + (f', from iteration {iteration}' if resumed else ''))
    writes, metrics = held is not None, None
    if writes:
        wandb_run = dict(project=wandb_project, name=wandb_run_name, config=config, dir=out_dir,
                         id=wandb_id, resume='allow')
        metrics = Metrics(out_dir, iteration, evaluated == iteration, rt.say, wandb_run if wandb_log else None)

    def save_state():
        if writes:
            checkpoint.save_state(out_dir, model, optimizer, scaler, iter_num=iteration, evaluated=evaluated,
                                  best_val_loss=best_val_loss, config=config, tokenizer=data.tokenizer,
                                  fingerprint=data.fingerprint, wandb_id=metrics.wandb_id)

    net = rt.wrap(model)
    net.train()
    sequences = micros * micro_size * rt.world          # in a global batch
    first = rt.rank * micros * micro_size               # where this rank's share of it begins
    batches = prefetch(data.batch, ((seed, 'train', i * sequences + first + m * micro_size, micro_size)
                                    for i in range(iteration, max_iters) for m in range(micros)), rt.device)
    progress = Progress(model, metrics, sequences, rt)
    rt.catch_signals()
    if iteration >= max_iters and not eval_only:
        rt.say(f'nothing is left to train up to max_iters={max_iters}; raise it to go on')
    caught = 0
    while not caught:
        due = iteration % eval_interval == 0 or iteration >= max_iters
        if eval_only or due and evaluated != iteration:
            progress.settle()
            losses = estimate_loss(net, data, rt)
            if losses is None:
                caught = rt.signal_anywhere()
                break
            rt.say(f'step {iteration}: train loss {losses["train"]:.4f}, val loss {losses["val"]:.4f}')
            if not math.isfinite(losses['val']):
                raise RuntimeError(f'step {iteration}: val loss {losses["val"]}; what {out_dir} holds is from before it')
            improved, evaluated = losses['val'] < best_val_loss, iteration
            best_val_loss = min(best_val_loss, losses['val'])
            if writes:
                metrics.log(iteration, train_loss=losses['train'], val_loss=losses['val'])
                if iteration > 0 and (improved or always_save_checkpoint):
                    checkpoint.save_model(out_dir, model, iter_num=iteration, best_val_loss=best_val_loss,
                                          config=config, tokenizer=data.tokenizer)
                save_state()
            progress.peak = rt.peak_flops()             # a CPU's is measured again
            progress.restart_clock()
        if eval_only or iteration >= max_iters:
            break
        for group in optimizer.param_groups:
            group['lr'] = learning_rate_at(iteration)
        numbers = train_step(net, optimizer, scaler, batches, micros, iteration, rt)
        iteration += 1
        caught = progress.add(iteration - 1, numbers)
    progress.settle()
    batches.close()
    if caught and not eval_only:
        save_state()
        rt.say(f'{signal.Signals(caught).name}: saved at iteration {iteration}; go on with --init_from=resume')
    if metrics:
        metrics.close()
    rt.part()
    if caught:
        raise SystemExit(128 + caught)


if __name__ == '__main__':
    with runtime.parting(), configurator.plain_errors(), runtime.one_voice():
        main(configurator.configure(globals(), sys.argv[1:]))
