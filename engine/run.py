"""A run: what is trained, how far it is, and what its checkpoints hold."""

import math
import shlex
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from engine import checkpoint, optim, parallel
from engine.batch_schedule import BatchSchedule
from engine.errors import RunError
from engine.metrics import MetricsWriter, short_number
from engine.sharded_checkpoint import ShardedSaver


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
                checkpoint.save_model(self.out_dir, model, **rest)
            checkpoint.save_state(self.out_dir, model, **rest, **optimizer_state)

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
