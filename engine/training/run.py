"""A run: what is trained, how far it is, and what its checkpoints hold."""

import math
import shlex
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from engine.checkpoint import gathered
from engine.checkpoint.sharded import ShardedSaver
from engine.errors import RunError, UserError
from engine.metrics.metrics_file import MetricsWriter
from engine.metrics.step_log import short_number
from engine.training import optim, parallel


def split_batch(n_sequences, batch_size, world_size):
    """(micro_steps, micro_batch_size) of one rank: an equal share of n_sequences in equal micro-batches, as
    large as batch_size allows. UserError where the ranks cannot share them equally."""
    if n_sequences % world_size:
        raise UserError(f'{n_sequences} sequences do not divide over {world_size} ranks')
    share = n_sequences // world_size
    micro_batch_size = next(size for size in range(min(batch_size, share), 0, -1) if share % size == 0)
    return share // micro_batch_size, micro_batch_size


class BatchSchedule:
    """The global batch: gradient_accumulation_steps * batch_size sequences, whatever the number of ranks.

    ramp_start, ramp_tokens: begin with ramp_start tokens, and grow linearly over the first ramp_tokens,
    in steps of ramp_start (GPT-3, arXiv:2005.14165, appendix B). 0 is no ramp. A batch depends only on the
    tokens before it, so a resumed run and any number of ranks take the same ones.
    Micro-batches have one size during the ramp, as ramp_start allows, and another after it: torch.compile
    compiles each of the two.
    Raises UserError for numbers that do not divide, with settings that do.
    """

    def __init__(self, gradient_accumulation_steps, batch_size, block_size, world_size, ramp_start=0, ramp_tokens=0):
        self.full, self.block_size, self.ramp_tokens = gradient_accumulation_steps * batch_size, block_size, ramp_tokens
        self.smallest = ramp_start // block_size or self.full
        if ramp_start and (ramp_start % block_size or self.smallest > self.full or self.full % self.smallest):
            fitting = max(n for n in range(1, min(self.smallest or 1, self.full) + 1) if self.full % n == 0)
            raise UserError(f'batch_ramp_start={ramp_start} is not a part of the {self.full} x {block_size} tokens that the full '
                            f'batch has; try --batch_ramp_start={fitting * block_size}')
        self.full_tokens = self.full * block_size
        try:
            self.smallest_split = split_batch(self.smallest, batch_size, world_size)
            self.full_split = split_batch(self.full, batch_size, world_size)
        except UserError as error:
            nearest = -(-gradient_accumulation_steps // world_size) * world_size
            fitting = next((n for n in range(self.smallest, self.full + 1) if self.full % n == 0 and n % world_size == 0), 0)
            advice = (f'--batch_ramp_start={fitting * block_size}' if ramp_start and fitting else
                      f'--gradient_accumulation_steps={nearest}')
            raise UserError(f'{error}; try {advice}') from None

    def n_sequences(self, tokens):
        """The sequences of the iteration that follows `tokens` tokens of training."""
        if tokens >= self.ramp_tokens:
            return self.full
        return self.smallest * (1 + (self.full // self.smallest - 1) * tokens // self.ramp_tokens)

    def split(self, tokens):
        """(micro_steps, micro_batch_size) of this rank in the iteration that follows `tokens` tokens of training."""
        if tokens >= self.ramp_tokens:
            return self.full_split
        micro_steps, micro_batch_size = self.smallest_split
        return micro_steps * self.n_sequences(tokens) // self.smallest, micro_batch_size

    def micro_steps(self, tokens):
        return self.split(tokens)[0]

    def iterations(self, sequences, tokens):
        """Yield (number of its first sequence, micro_steps, micro_batch_size) of each iteration after so much training."""
        while True:
            yield sequences, *self.split(tokens)
            n_sequences = self.n_sequences(tokens)
            sequences, tokens = sequences + n_sequences, tokens + n_sequences * self.block_size

    def tokens_after(self, iterations, tokens=0):
        """The tokens of training after so many more iterations."""
        while iterations and tokens < self.ramp_tokens:
            tokens, iterations = tokens + self.n_sequences(tokens) * self.block_size, iterations - 1
        return tokens + iterations * self.full * self.block_size


@dataclass
class Progress:
    """How far a run is. Checkpoints hold these fields by name."""
    iter_num: int = 0                   # optimizer steps
    sequences: int = 0                  # drawn from the training split
    tokens: int = 0                     # in those sequences
    best_val_loss: float = math.inf
    best_iter: int = 0                  # iteration of that evaluation
    last_eval: int | None = None        # iteration of the last evaluation

    @classmethod
    def of(cls, saved, sequences_per_iter, block_size):
        """The progress in a checkpoint; none without one. A checkpoint of nanoGPT does not count sequences,
        so its iterations are counted with this run's batch."""
        if not saved:
            return cls()
        fields = {name: saved[name] for name in cls.__dataclass_fields__ if saved.get(name) is not None}
        fields.setdefault('sequences', saved['iter_num'] * sequences_per_iter)
        fields.setdefault('tokens', fields['sequences'] * block_size)
        fields.setdefault('best_iter', saved['iter_num'])
        return cls(**fields)


@dataclass
class Run:
    """A model in training. save and finish are collective: every rank calls them."""
    model: torch.nn.Module              # the plain module, for saving and sampling
    wrapped_model: torch.nn.Module      # what the training step calls: compiled, and over the ranks
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    batch_schedule: BatchSchedule
    grad_clip: float
    seed: int
    progress: Progress
    out_dir: str = ''
    description: dict | None = None     # {'config', 'tokenizer', 'fingerprint'} for checkpoints
    scorer: Callable | None = None      # of eval_tasks: an evals.TaskScorer
    saver: ShardedSaver | None = None   # where each rank writes its own shards
    writer: MetricsWriter | None = None

    @property
    def micro_steps(self):
        """Micro-batches of this rank in the iteration that comes next."""
        return self.batch_schedule.micro_steps(self.progress.tokens)

    def summary(self, data, max_iters, env):
        """Two lines to show the user: what an iteration computes, and how much text the run reads of `data`."""
        progress, schedule, available = self.progress, self.batch_schedule, len(data.tokens['train'])
        tokens = schedule.tokens_after(max(0, max_iters - progress.iter_num), progress.tokens)
        micro_steps, micro_batch_size = schedule.split(progress.tokens)
        return (f'{self.model.get_num_params():,} parameters, {micro_steps * env.world_size} micro-batches of '
                f'{micro_batch_size} x {data.block_size} tokens per iteration, from iteration {progress.iter_num}\n'
                f'{data.folder.name}: {available:,} tokens to train on; {max(max_iters, progress.iter_num):,} iterations read '
                f'{short_number(tokens)}, {tokens / available:.3g} epochs')

    def count_iteration(self):
        """Note that one more iteration is done."""
        n_sequences = self.batch_schedule.n_sequences(self.progress.tokens)
        self.progress.iter_num += 1
        self.progress.sequences += n_sequences
        self.progress.tokens += n_sequences * self.batch_schedule.block_size

    def evaluation_is_due(self, eval_interval, max_iters):
        iter_num = self.progress.iter_num
        return self.progress.last_eval != iter_num and (iter_num % eval_interval == 0 or iter_num >= max_iters)

    def scores_are_due(self, interval, max_iters):
        return self.progress.iter_num % interval == 0 or self.progress.iter_num >= max_iters

    def is_out_of_patience(self, eval_interval, patience):
        """True at an evaluation where the last `patience` ones, at multiples of eval_interval, did not improve the best
        val loss. 0 is never."""
        iter_num, best_iter, last_eval = self.progress.iter_num, self.progress.best_iter, self.progress.last_eval
        return bool(patience) and last_eval == iter_num and iter_num // eval_interval - best_iter // eval_interval >= patience

    def record_losses(self, losses, scores):
        """Record an evaluation at this iteration. scores: of tasks, {name: value}. True where the loss is the best.
        RunError where it is not finite."""
        progress = self.progress
        if not math.isfinite(losses['val']):
            self.wait_for_save()
            raise RunError(f'step {progress.iter_num}: val loss {losses["val"]}; {self.out_dir} keeps what was saved before')
        improved, progress.last_eval = losses['val'] < progress.best_val_loss, progress.iter_num
        if improved:
            progress.best_val_loss, progress.best_iter = losses['val'], progress.iter_num
        if self.writer:
            self.writer.write(progress.iter_num, train_loss=losses['train'], val_loss=losses['val'], **scores)
        return improved

    def save(self, env, model_too=False):
        """Write state.pt, and with model_too ckpt.pt; or begin to write state/. RunError where that fails."""
        optimizer_state = optim.state_dict(self.optimizer, self.scaler)
        rest = dict(asdict(self.progress), wandb_id=self.writer and self.writer.wandb_id, **self.description)
        if self.saver:
            contents = self.model.to_checkpoint()
            del contents['model']
            self.saver.save(self.model, optimizer_state, {**contents, **rest})
            return
        model, optimizer_state = parallel.gather_model(self.model), parallel.gather(optimizer_state)
        if env.is_main:
            if model_too:
                gathered.write(Path(self.out_dir) / gathered.MODEL, {**model, **rest})
            gathered.write(Path(self.out_dir) / gathered.STATE, {**model, **rest, **optimizer_state},
                           keep_as=gathered.PREVIOUS)

    def wait_for_save(self):
        """Wait until the last save is on disk. RunError where it failed."""
        if self.saver:
            self.saver.wait()

    def finish(self, stop_signal, max_iters, resume_flags, read_only, env, print_line):
        """Say what the run made, once it is saved, and end together with the other ranks.

        resume_flags: what a resume on this machine has to repeat. read_only: nothing was saved. print_line: prints one line.
        Raises SystemExit with 128 + stop_signal.
        """
        progress, out_dir = self.progress, shlex.quote(self.out_dir)
        if stop_signal and not read_only:
            print_line(f'{signal.Signals(stop_signal).name}: saved at iteration {progress.iter_num}; go on with: '
                       f'{env.launcher} train.py --init_from=resume --out_dir={out_dir}{resume_flags}')
        elif self.writer:
            if progress.iter_num < max_iters:
                print_line('stopped early, as the val loss did not improve; go on with more --patience, or with --patience=0')
            print_line(f'{progress.iter_num:,} iterations, {short_number(progress.tokens)} tokens, {self.writer.elapsed()}; '
                       f'best val loss {progress.best_val_loss:.4f} at iteration {progress.best_iter}\n'
                       f'next: python sample.py --out_dir={out_dir}    (to train longer, resume with more --max_iters)')
        if self.writer:
            self.writer.close()
        env.barrier()                                   # if the last save fails, every rank fails
        if stop_signal:
            raise SystemExit(128 + stop_signal)
