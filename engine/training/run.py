"""A run: its batch, how far it is, what is trained, and what its checkpoints hold."""

import math
import shlex
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from engine.checkpoint import gathered, run_folder, sharded
from engine.checkpoint.contents import Checkpoint
from engine.checkpoint.kept import kept_name
from engine.checkpoint.sharded import ShardedSaver
from engine.dataloader.batches import TokenDataset
from engine.dataloader.open_dataset import check_same_dataset
from engine.device import grad_scaler
from engine.distributed import Environment
from engine.errors import RunError, UserError
from engine.log import log
from engine.metrics.metrics_file import MetricsWriter
from engine.metrics.step_log import short_number
from engine.training import lora, optim, parallel
from engine.training.context import drop_outgrown_optimizer

MANY_EPOCHS = 100           # a run that reads its text so often says so

# The batch

class RankShare(NamedTuple):
    """How a rank takes its share of a batch."""
    micro_steps: int
    micro_batch_size: int               # sequences


class IterationBatch(NamedTuple):
    """What one iteration reads."""
    first_sequence: int                 # the number of its first sequence, over all ranks
    micro_steps: int                    # of each rank
    micro_batch_size: int               # sequences


def share_of_batch(n_sequences: int, batch_size: int, world_size: int) -> RankShare:
    """An equal share of n_sequences for each rank, in equal micro-batches of at most batch_size.

    The micro-batches are as large as that allows. Raises UserError where the ranks cannot share the
    sequences equally.
    """
    if n_sequences % world_size:
        raise UserError(f'{n_sequences} sequences do not divide over {world_size} ranks')
    share = n_sequences // world_size
    size = min(batch_size, share)
    while share % size:
        size -= 1
    return RankShare(share // size, size)


class BatchSchedule:
    """The global batch: gradient_accumulation_steps * batch_size sequences for any number of ranks.

    ramp_start, ramp_tokens: the batch begins with ramp_start tokens and grows linearly over the
    first ramp_tokens, in steps of ramp_start (GPT-3, arXiv:2005.14165, appendix B); 0 is no ramp.
    A batch depends only on the tokens before it, so a resumed run and any number of ranks take the
    same ones. Micro-batches have one size during the ramp, as ramp_start allows, and another after
    it, and torch.compile compiles each of the two.
    Raises UserError for numbers that do not divide; its message proposes some that do.
    """

    def __init__(self, gradient_accumulation_steps: int, batch_size: int, block_size: int,
                 world_size: int, ramp_start: int = 0, ramp_tokens: int = 0):
        self.full = gradient_accumulation_steps * batch_size            # sequences
        self.block_size = block_size
        self.full_tokens = self.full * block_size
        self.ramp_tokens = ramp_tokens
        self.smallest = self.full                                       # sequences
        if ramp_start:
            self.smallest = ramp_start // block_size
            self.check_ramp(ramp_start)

        try:
            self.smallest_share = share_of_batch(self.smallest, batch_size, world_size)
            self.full_share = share_of_batch(self.full, batch_size, world_size)
        except UserError as error:
            steps = math.ceil(gradient_accumulation_steps / world_size) * world_size
            advice = f'--gradient_accumulation_steps={steps}'
            fitting = [n for n in range(self.smallest, self.full + 1)
                       if self.full % n == 0 and n % world_size == 0]
            if ramp_start and fitting:
                advice = f'--batch_ramp_start={fitting[0] * block_size}'
            raise UserError(f'{error}; try {advice}') from None

    def check_ramp(self, ramp_start):
        """UserError unless the first batch has whole sequences that divide the full batch."""
        is_whole = ramp_start % self.block_size == 0
        if is_whole and self.smallest <= self.full and self.full % self.smallest == 0:
            return
        largest = max(1, min(self.smallest, self.full))
        fitting = max(n for n in range(1, largest + 1) if self.full % n == 0)
        raise UserError(f'batch_ramp_start={ramp_start} is not a part of the {self.full} x '
                        f'{self.block_size} tokens that the full batch has; '
                        f'try --batch_ramp_start={fitting * self.block_size}')

    def n_sequences(self, tokens: int) -> int:
        """The sequences of the iteration that follows `tokens` tokens of training."""
        if tokens >= self.ramp_tokens:
            return self.full
        steps = self.full // self.smallest - 1
        return self.smallest * (1 + steps * tokens // self.ramp_tokens)

    def rank_share(self, tokens: int) -> RankShare:
        """This rank's share of the iteration that follows `tokens` tokens of training."""
        if tokens >= self.ramp_tokens:
            return self.full_share
        micro_steps, micro_batch_size = self.smallest_share
        times = self.n_sequences(tokens) // self.smallest
        return RankShare(micro_steps * times, micro_batch_size)

    def iterations(self, sequences: int, tokens: int) -> Iterator[IterationBatch]:
        """Yield the batch of each iteration, after so many sequences and tokens of training."""
        while True:
            yield IterationBatch(sequences, *self.rank_share(tokens))
            n_sequences = self.n_sequences(tokens)
            sequences += n_sequences
            tokens += n_sequences * self.block_size

    def tokens_after(self, iterations: int, tokens: int = 0) -> int:
        """How many tokens a run has read after `tokens` tokens and so many more iterations."""
        while iterations and tokens < self.ramp_tokens:
            tokens += self.n_sequences(tokens) * self.block_size
            iterations -= 1
        return tokens + iterations * self.full_tokens


# The run

@dataclass
class Progress:
    """How far a run is. Checkpoints hold these fields by name."""
    iter_num: int = 0                   # optimizer steps
    sequences: int = 0                  # drawn from the training split
    tokens: int = 0                     # in those sequences
    best_val_loss: float = math.inf     # in nats; infinity before the first evaluation
    best_iter: int = 0                  # iteration of the evaluation that found it
    last_eval: int | None = None        # iteration of the last evaluation
    last_val_loss: float | None = None  # of that evaluation

    @classmethod
    def of(cls, saved: Checkpoint | None, sequences_per_iter: int, block_size: int) -> 'Progress':
        """The progress in a checkpoint; a new one where `saved` is None.

        A checkpoint of nanoGPT does not count sequences, so its iterations are counted with this
        run's batch of sequences_per_iter.
        """
        if saved is None:
            return cls()

        sequences = saved.sequences
        if sequences is None:
            sequences = saved.iter_num * sequences_per_iter

        tokens = saved.tokens
        if tokens is None:
            tokens = sequences * block_size

        best_iter = saved.best_iter
        if best_iter is None:
            best_iter = saved.iter_num
        return cls(saved.iter_num, sequences, tokens, saved.best_val_loss, best_iter,
                   saved.last_eval, saved.last_val_loss)


@dataclass
class Run:
    """A model in training. save and finish are collective: every rank calls them."""
    model: torch.nn.Module              # the plain module, for saving and sampling
    wrapped_model: torch.nn.Module      # what the step calls: compiled, and over the ranks
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    batch_schedule: BatchSchedule
    grad_clip: float                    # largest norm of the gradient; 0 does not clip
    seed: int
    progress: Progress
    out_dir: str = ''
    # whether the gradient was clipped in each of the last steps; a HealthMonitor keeps it
    clipped: list[bool] = field(default_factory=list)
    # what the run is trained with, for its checkpoints
    settings: dict | None = None        # train.py's, {name: value}
    tokenizer: dict | None = None       # the spec of the dataset's tokenizer
    chat: dict | None = None            # the dataset's ChatLayout, as in meta.json
    fingerprint: str | None = None      # of the dataset
    dtype: str | None = None            # precision of the step, such as 'bfloat16'
    base: dict | None = None            # what its adapters adapt, of lora.replace_linears
    bytes_per_token: float | None = None    # of the text of val, where it is known; on rank 0
    # what it works with
    scorer: Callable | None = None      # scores eval_tasks: an evaluation.results.TaskScorer
    sampler: Callable | None = None     # makes the sample at evaluations: a TextSampler
    saver: ShardedSaver | None = None   # writes this rank's shards, with --checkpoint=sharded
    writer: MetricsWriter | None = None

    @property
    def micro_steps(self) -> int:
        """Micro-batches of this rank in the iteration that comes next."""
        return self.batch_schedule.rank_share(self.progress.tokens).micro_steps

    def summary(self, data: TokenDataset, max_iters: int, env: Environment) -> str:
        """Lines to show: what an iteration computes, and how much of `data` the run reads.

        Further lines say how many parameters are trained, if some are frozen, and that the run
        would read a dataset MANY_EPOCHS times or more.
        """
        schedule = self.batch_schedule
        iter_num = self.progress.iter_num
        micro_steps, micro_batch_size = schedule.rank_share(self.progress.tokens)
        n_params = self.model.get_num_params(non_embedding=False)
        n_micro_batches = micro_steps * env.world_size
        plural = '' if n_micro_batches == 1 else 'es'
        batch = (f'{n_params:,} parameters, {n_micro_batches} micro-batch{plural} of '
                 f'{micro_batch_size} x {data.block_size} tokens per iteration, '
                 f'from iteration {iter_num}')

        available = data.n_train_tokens
        iterations_left = max(0, max_iters - iter_num)
        tokens = schedule.tokens_after(iterations_left, self.progress.tokens)
        text = (f'{data.name}: {available:,} tokens to train on; '
                f'{max(max_iters, iter_num):,} iterations read {short_number(tokens)}, '
                f'{tokens / available:.3g} epochs')
        lines = [batch, text]
        n_trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        if n_trained < n_params:
            lines.append(f'{n_trained:,} of the parameters are trained; the others are frozen')
        if iterations_left and not self.settings['eval_only']:
            lines += many_epochs_note(data, tokens)
        return '\n'.join(lines)

    def open_out_dir(self, saved: Checkpoint | None, command: list, env: Environment):
        """Make out_dir ready for saves, and open its files. Called once the run is sure to start.

        saved: what the run goes on from, or None. command: what was typed, for run.json.
        """
        settings = self.settings
        if settings['checkpoint'] == 'sharded':
            self.saver = ShardedSaver(self.out_dir, env)
        if not env.is_main:
            return
        run_folder.clean_out_dir(self.out_dir, saved)
        run_folder.write_run_json(self.out_dir, command, settings, env)

        wandb_arguments = None                # the arguments of wandb.init
        if settings['wandb_log']:
            wandb_arguments = dict(
                project=settings['wandb_project'], name=settings['wandb_run_name'],
                config=settings, dir=self.out_dir, resume='allow')
        progress = self.progress
        was_evaluated = progress.last_eval == progress.iter_num
        wandb_id = saved.wandb_id if saved else None
        self.writer = MetricsWriter(self.out_dir, progress.iter_num, was_evaluated,
                                    wandb_arguments, wandb_id)

    def is_evaluation_due(self) -> bool:
        """True every eval_interval iterations, where a model is kept, and after the last iteration.

        False where this iteration is evaluated already.
        """
        iter_num = self.progress.iter_num
        if self.progress.last_eval == iter_num:
            return False
        settings = self.settings
        intervals = [settings['eval_interval']]
        if settings['keep_interval']:
            intervals.append(settings['keep_interval'])
        at_the_end = iter_num >= settings['max_iters']
        return at_the_end or any(iter_num % interval == 0 for interval in intervals)

    def is_out_of_patience(self) -> bool:
        """True at an evaluation where `patience` multiples of eval_interval have passed since the
        best val loss.

        With patience=0 it is never True.
        """
        patience = self.settings['patience']
        interval = self.settings['eval_interval']
        progress = self.progress
        if not patience or progress.last_eval != progress.iter_num:
            return False
        return progress.iter_num // interval - progress.best_iter // interval >= patience

    def count_iteration(self):
        """Note that one more iteration is done."""
        progress = self.progress
        n_sequences = self.batch_schedule.n_sequences(progress.tokens)
        progress.iter_num += 1
        progress.sequences += n_sequences
        progress.tokens += n_sequences * self.batch_schedule.block_size

    def record_losses(self, losses: dict, scores: dict) -> bool:
        """Record an evaluation at this iteration. True where its val loss is the best so far.

        losses: {'train': nats, 'val': nats}, and 'val/NAME' for each dataset of a mixture.
        scores: of tasks, {name: value}.
        Raises RunError where the val loss is not finite.
        """
        progress = self.progress
        if not math.isfinite(losses['val']):
            self.wait_for_save()
            raise RunError(f'step {progress.iter_num}: val loss {losses["val"]}; '
                           f'{self.out_dir} keeps what was saved before')

        progress.last_eval = progress.iter_num
        progress.last_val_loss = losses['val']
        improved = losses['val'] < progress.best_val_loss
        if improved:
            progress.best_val_loss = losses['val']
            progress.best_iter = progress.iter_num
        if self.writer:
            numbers = {f'{name}_loss': loss for name, loss in losses.items()}
            self.writer.write(progress.iter_num, **numbers, bytes_per_token=self.bytes_per_token,
                              **scores)
        return improved

    # Saving

    def save(self, env: Environment, model_too: bool = False):
        """Write state.pt, and with model_too ckpt.pt; or begin to write state/.

        Before them it writes the model that is kept for good, where keep_interval wants it. So a
        run that resumes from the state has it, and one that resumes from the state before writes
        it again.
        Raises RunError where that fails.
        """
        if self.is_model_kept():
            self.keep_model(env)
        state = self.to_checkpoint()
        if self.saver:
            self.saver.save(self.model, state)
            return

        state.optimizer = gathered.gather(state.optimizer)
        weights = None
        if model_too or not self.base:
            weights = self.whole_weights()
        if not env.is_main:
            return

        folder = Path(self.out_dir)
        if model_too:
            model = replace(state, model=weights, optimizer=None, scaler=None)
            gathered.write(folder / gathered.MODEL, model.to_payload())
        if not self.base:
            state.model = weights
        gathered.write(folder / gathered.STATE, state.to_payload(), keep_as=gathered.PREVIOUS)

    def is_model_kept(self) -> bool:
        """True where the model of this iteration is kept for good, once it is evaluated."""
        interval = self.settings['keep_interval']
        progress = self.progress
        if not interval or progress.iter_num == 0:
            return False
        is_evaluated = progress.last_eval == progress.iter_num
        return is_evaluated and progress.iter_num % interval == 0

    def keep_model(self, env: Environment):
        """Write the model to a file that no later save replaces, in the format of ckpt.pt."""
        kept = replace(self.to_checkpoint(), optimizer=None, scaler=None)
        kept.model = self.whole_weights()
        if env.is_main:
            path = Path(self.out_dir) / kept_name(kept.iter_num)
            gathered.write(path, kept.to_payload())

    def whole_weights(self) -> dict:
        """{name: weight} of a plain GPT on rank 0, with adapters merged. A collective."""
        if self.base:
            return lora.merged_weights(self.model)
        return gathered.gather_weights(self.model)

    def to_checkpoint(self) -> Checkpoint:
        """The run as it is now. Weights and moments are shards where the parameters are.

        A run that trains adapters has these in place of the weights.
        """
        model = self.model.to_checkpoint()
        if self.base:
            model.update(model={}, adapters=lora.adapters(self.model), base=self.base)
        clipped = None                          # files of most runs have no such field
        if self.clipped:
            clipped = self.clipped
        return Checkpoint(
            **model,
            **asdict(self.progress),
            clipped=clipped,
            wandb_id=self.writer.wandb_id if self.writer else None,
            config=self.settings,
            tokenizer=self.tokenizer,
            chat=self.chat,
            fingerprint=self.fingerprint,
            dtype=self.dtype,
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
        )

    def wait_for_save(self):
        """Wait until the last save is on disk. RunError where it failed."""
        if self.saver:
            self.saver.wait()

    # The end

    def tell_how_to_resume(self, stop_signal: int, overrides: dict, repeated: tuple,
                           env: Environment):
        """Say that a signal ended the run, and what to type to go on.

        overrides: the settings that this command named, {name: value}. repeated: the names of those
        that a resume does not take from the checkpoint.
        """
        flags = ''.join(f' --{name}={overrides[name]}' for name in repeated if name in overrides)
        log.info(f'{signal.Signals(stop_signal).name}: saved at iteration '
                 f'{self.progress.iter_num}; go on with:\n'
                 f'  {env.launcher} train.py --init_from=resume '
                 f'--out_dir={shlex.quote(self.out_dir)}{flags}')

    def tell_of_the_end(self, max_iters: int):
        """Say what the run made, on rank 0."""
        if not self.writer:
            return
        progress = self.progress
        stopped_early = progress.iter_num < max_iters
        if stopped_early:
            log.info('stopped early, as the val loss did not improve; '
                     'go on with more --patience, or with --patience=0')
        parts = [f'{progress.iter_num:,} iterations', f'{short_number(progress.tokens)} tokens']
        if self.writer.elapsed():
            parts.append(self.writer.elapsed())
        log.info(f'{", ".join(parts)}; best val loss {progress.best_val_loss:.4f} '
                 f'at iteration {progress.best_iter}')
        if progress.best_iter == 0 and math.isfinite(progress.best_val_loss):
            log.info('note: the val loss was best at iteration 0, before this run trained the '
                     'model: val.bin may hold another kind of text than train.bin, or '
                     '--learning_rate may be too high')
        if not stopped_early:
            log.info('to train longer, resume with more --max_iters and --lr_decay_iters')
        log.info(f'next: python sample.py --out_dir={shlex.quote(self.out_dir)}')

    def finish(self, stop_signal: int, env: Environment):
        """Close the files, and end together with the other ranks.

        Raises SystemExit with 128 + stop_signal, if there was one.
        """
        if self.writer:
            self.writer.close()
        # A rank whose last save failed never comes here, so the others fail too.
        env.barrier()
        if stop_signal:
            raise SystemExit(128 + stop_signal)


def many_epochs_note(data: TokenDataset, tokens: int) -> list[str]:
    """A line, if a run that reads so many tokens reads a dataset MANY_EPOCHS times or more."""
    epochs = {part.name: part.share * tokens / part.data.n_train_tokens for part in data.parts}
    name = max(epochs, key=epochs.get)
    if epochs[name] < MANY_EPOCHS:
        return []
    return [f'note: this run reads {name} {epochs[name]:,.0f} times, so that it will know the text '
            f'by heart; lower --max_iters and --lr_decay_iters']


def start_run(settings: dict, model: torch.nn.Module, data: TokenDataset,
              saved: Checkpoint | None, env: Environment) -> Run:
    """The Run: `model` on its device and over the ranks, its optimizer, and where it goes on.

    settings: train.py's, {name: value}. saved: the state that the run goes on from, or None.
    Raises UserError on all ranks where they do not fit each other.
    """
    # the batch and the data
    block_size = model.config.block_size
    with env.raise_on_all_ranks():
        batch_schedule = BatchSchedule(
            settings['gradient_accumulation_steps'], settings['batch_size'], block_size,
            env.world_size, settings['batch_ramp_start'], settings['batch_ramp_tokens'])
        scaler = grad_scaler(env.device, env.dtype)
        data.set_block_size(block_size)
        if saved:
            check_same_dataset(data, saved.tokenizer, saved.fingerprint,
                               settings['accept_dataset_change'])
            drop_outgrown_optimizer(saved, block_size)

    # the shape that the weights have is saved, not the one that was asked for
    settings = dict(settings)
    for name, value in asdict(model.config).items():
        if name in settings:
            settings[name] = value
    progress = Progress.of(saved, batch_schedule.full, block_size)
    env.assert_same_on_all_ranks({
        **settings, 'the dataset': data.fingerprint, 'iter_num': progress.iter_num})

    # wrap first: FSDP puts shards in the place of parameters, and the optimizer has to hold those
    with env.raise_on_all_ranks():
        wrapped_model = parallel.wrap(model, env, settings['strategy'], settings['recompute'],
                                      settings['reduce_dtype'])
        betas = (settings['beta1'], settings['beta2'])
        optimizer = optim.build(
            settings['optimizer'], model, settings['learning_rate'], settings['weight_decay'],
            betas, settings['muon_lr'], settings['muon_momentum'])
        if saved and saved.shards_folder:
            optim.check_same_optimizer(optimizer, saved)
            saved = sharded.load(saved, model, optimizer, env)
        optim.load_state_dict(optimizer, scaler, saved)

    # for the reader of metrics.jsonl
    bytes_per_token = None
    if env.is_main:
        bytes_per_token = data.bytes_per_token()
    clipped = []
    if saved and saved.clipped and settings['health_interval']:
        clipped = [value is True for value in saved.clipped]

    return Run(
        model, wrapped_model.train(), optimizer, scaler, batch_schedule,
        grad_clip=settings['grad_clip'], seed=settings['seed'], progress=progress,
        out_dir=settings['out_dir'], clipped=clipped,
        settings=settings, tokenizer=data.tokenizer.to_dict(), chat=data.chat,
        fingerprint=data.fingerprint, dtype=env.dtype, bytes_per_token=bytes_per_token)
