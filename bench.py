"""Time what this repository does, and how close that comes to what the machine can do.

    python bench.py                                     # the training step: train_step of train.py
    python bench.py --bench=sample --dtype=float16      # generation, as in sample.py
    python bench.py --bench=data                        # GPT-2's encoding of text
    python bench.py --bench=data --real_data=True       # the same, and reading batches
    python bench.py --profile=True                      # writes a trace for ui.perfetto.dev
    python bench.py --report=figures.md                 # all of these, as a table for this machine
    python bench.py --peers=../nanoGPT                  # step and sampling beside another checkout
    python bench.py --plan=H100 --config=train_gpt2     # memory and time of a step, by arithmetic

A time depends on what else the machine does, so compare those of one run.
"""

import json
import statistics
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Literal

from console import print0, report_errors  # before torch: see console.py

import torch

import configurator
import train  # the one script that another imports: a copy would drift
from engine import device as devices
from engine import distributed
from engine.checkpoint import gathered
from engine.dataloader.batches import TokenDataset, WeightedBatch, prefetch
from engine.distributed import hard_exit, report_first_failure, start_environment
from engine.errors import RunError, UserError
from engine.generation import cpu as cpu_generation
from engine.hf import weights as hf_weights
from engine.metrics import bench_report
from engine.metrics import peers as peer_timing
from engine.prepare.encode import in_order, safe_pieces
from engine.tokenizer import Tokenizer, padded_vocab_size
from engine.training import lora, optim, parallel, settings_checks
from engine.training.cpu import keep_freed_memory
from engine.training.freeze import freeze
from engine.training.plan import Step, describe_plan
from engine.training.run import BatchSchedule, Progress, Run
from model import GPT, GPTConfig

# work
bench = 'train'                         # what to time: train, sample or data
compare = ''                            # 'transformers' times its GPT-2 of the same shape in turn
compare_dtype = 'auto'                  # precision of transformers: auto (that of this project),
                                        # float32, bfloat16 or float16
batch_size = 12                         # sequences per micro-batch; for sample, sequences at once
                                        # (1 if not given)
block_size = 1024                       # tokens per sequence
gradient_accumulation_steps = 1         # micro-batches per step
real_data = False                       # True reads `dataset`, False draws random tokens
dataset = 'openwebtext'                 # a folder of data/
prompt_tokens = 32                      # length of the prompt, for sample
new_tokens = 100                        # tokens that each repeat generates, for sample
# model: GPT-2 124M
n_layer = 12
n_head = 12
n_embd = 768
vocab_size = 50304                      # size for random tokens; real data brings its own
dropout = 0.0
lora_rank = 0                           # rank of adapters that the training step trains in place
                                        # of the weights; 0: none
bias = False                            # transformers' GPT-2 has biases, so compare sets them
# measurement
warmup_steps = 5                        # steps that are not timed; they include compilation
steps = 20                              # steps that are timed one by one; sample and data repeat
                                        # a fourth as often
profile = False                         # True records 5 steps more as bench-trace.json
report = ''                             # file for a table of everything that this machine can time
figures = False                         # True prints the figures as a last line of JSON
# another checkout
peers = ''                              # folder of nanoGPT, or of another checkout with its
                                        # commands: times its step and sampling in turns with those
                                        # here; with report, they end that file
peers_cases = ''                        # only these, separated by commas: shakespeare, step_124m,
                                        # step_124m_bfloat16, sample_124m, sample_6x384
# a plan
plan = ''                               # name of a GPU, such as H100: prints what a step takes
                                        # there by arithmetic, and times nothing
config = ''                             # config file of train.py to plan; flags of this script
                                        # change it
init_from = 'scratch'                   # scratch, or weights to plan the finetuning of: gpt2,
                                        # gpt2-medium, gpt2-large or gpt2-xl
gpus = 1                                # GPUs to plan for, up to 8 in each machine
assumed_mfu = 0.4                       # share of the GPU's peak that a plan counts on
# machine
device = 'auto'                         # auto, cuda, cuda:1, mps or cpu
dtype = 'auto'                          # auto, float32, bfloat16 or float16
compile: Literal['auto', True, False] = 'auto'      # whether torch.compile is used; auto: on CUDA
recompute = False                       # True recomputes activations in the backward pass
strategy = 'ddp'                        # how several ranks share the work: ddp, fsdp or hsdp
backend = 'auto'                        # how ranks communicate: auto, nccl or gloo
seed = 1337

GIB = 2 ** 30
TRACE = 'bench-trace.json'
# Shapes of OpenAI's weights, for a plan of finetuning: layers, heads, channels
GPT2 = {
    'gpt2': (12, 12, 768),
    'gpt2-medium': (24, 16, 1024),
    'gpt2-large': (36, 20, 1280),
    'gpt2-xl': (48, 25, 1600),
}
GPT2_VOCAB_SIZE = 50257
# What can be chosen beside --peers, whose cases decide the rest
PEERS_SETTINGS = ('peers', 'peers_cases', 'report', 'device', 'compile')


# Timing

def time_interleaved(functions, warmup, repeats):
    """Time functions that wait for their own result: {name: function} gives {name: [seconds]}.

    They run in turn, so that a machine that slows down slows all of them. The first `warmup`
    calls of each are not timed.
    """
    seconds = {name: [] for name in functions}
    for i in range(warmup + repeats):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def print_times(seconds, amount, unit):
    """Print a line for each function, and the ratio of the second to the first.

    seconds: what time_interleaved returned. amount: what one call gets done, in `unit` times
    seconds. Returns the first function's median in seconds.
    """
    for name, times in seconds.items():
        middle = statistics.median(times)
        print0(f'{name:<13}{middle * 1000:.2f} ms, median of {len(times)} '
               f'({min(times) * 1000:.2f} to {max(times) * 1000:.2f}), '
               f'{amount / middle:,.1f} {unit}')

    if len(seconds) > 1:
        first, second = seconds.values()
        ratios = [b / a for a, b in zip(first, second)]
        print0(f'ratio        {statistics.median(ratios):.2f} times as fast '
               f'({min(ratios):.2f} to {max(ratios):.2f})')

    return statistics.median(next(iter(seconds.values())))


# Models

@dataclass
class Reference:
    """transformers' GPT-2, with the weights of the model that it is compared with."""
    model: torch.nn.Module
    dtype: str                          # a name in devices.DTYPES


def build_model(env, size):
    """A model with random weights and a vocabulary of `size` tokens."""
    torch.manual_seed(seed)
    config = GPTConfig(
        block_size=block_size,
        vocab_size=size,
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        dropout=dropout,
        bias=bias or bool(compare),
    )

    # Where a model is sharded, rank 0 alone has its weights, and gives the others their parts.
    place = env.device
    is_sharded = bench == 'train' and parallel.is_sharded(strategy, env)
    if is_sharded and not env.is_main:
        place = 'meta'
    with torch.device(place):
        return GPT(config)


def build_reference(model, env):
    """The Reference of a model, or None without --compare."""
    if not compare:
        return None

    reference = hf_weights.to_transformers(model.config, model.state_dict()).to(env.device)
    reference.loss_type = 'ForCausalLM'

    reference_dtype = env.dtype
    if compare_dtype != 'auto':
        reference_dtype, _ = devices.choose_dtype(compare_dtype, env.device)
    note = ''
    if env.compile:
        note = ', not compiled'
    print0(f'transformers in {reference_dtype}{note}')
    return Reference(reference, reference_dtype)


# The training step

def build_run(model, env):
    """The Run that train.py would make, with a constant learning rate."""
    if lora_rank:
        lora.adapt(model, dict(vars(train), lora_rank=lora_rank, seed=seed), env.dtype)
    wrapped_model = parallel.wrap(model, env, strategy, recompute).train()
    n_micro_batches = gradient_accumulation_steps * env.world_size
    return Run(
        model=model,
        wrapped_model=wrapped_model,
        optimizer=optim.adamw(model, 1e-4, 0.1, (0.9, 0.95)),
        scaler=devices.grad_scaler(env.device, env.dtype),
        batch_schedule=BatchSchedule(n_micro_batches, batch_size, block_size, env.world_size),
        grad_clip=1.0,
        seed=seed,
        progress=Progress(),
    )


def batch_requests(env):
    """The arguments of TokenDataset.batch for each micro-batch of this rank, without an end."""
    micro_steps = gradient_accumulation_steps
    for iteration in count():
        for micro_step in range(micro_steps):
            number = (iteration * env.world_size + env.rank) * micro_steps + micro_step
            yield seed, 'train', number * batch_size, batch_size


def random_batches(size):
    """A function that takes the arguments of TokenDataset.batch, and draws tokens below `size`."""
    generator = torch.Generator().manual_seed(seed)

    def batch(_seed, _stream, _first, n_sequences):
        tokens = torch.randint(size, (n_sequences, block_size + 1), generator=generator)
        return WeightedBatch(tokens[:, :-1], tokens[:, 1:], weight=1.0)
    return batch


def read_batches(data):
    """A function that takes the arguments of TokenDataset.batch, and reads that batch of `data`."""
    def batch(*request):
        return WeightedBatch(*data.batch(*request), weight=1.0)
    return batch


class ProjectStep:
    """The step of train.py. A call runs one.

    As in train.py, a GPU runs a step while the loss of the step before is read. Beside another
    model each call waits for its own loss, or a step would take time from the other model.
    """

    def __init__(self, run, batches, env, waits):
        self.run = run
        self.batches = batches
        self.env = env
        self.losses = []                # those that are read
        self.unread = deque()           # functions that wait for a loss
        self.n_unread = 0
        if devices.is_asynchronous(env.device) and not waits:
            self.n_unread = 1

    def __call__(self):
        loss = train.train_step(self.run, self.batches, self.env)['loss']
        self.unread.append(devices.read_async(loss[None]))
        self.run.count_iteration()
        self.read_losses(leave=self.n_unread)

    def read_losses(self, leave=0):
        """Read all losses but the newest `leave`."""
        while len(self.unread) > leave:
            self.losses += self.unread.popleft()()


def transformers_step(reference, optimizer, batches, env):
    """The same step of transformers' model, written as its users write it."""
    for _ in range(gradient_accumulation_steps):
        x = next(batches).x
        with devices.autocast(env.device, reference.dtype):
            loss = reference.model(x, labels=x).loss / gradient_accumulation_steps
        loss.backward()
    torch.nn.utils.clip_grad_norm_(reference.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    loss.item()


def bench_train(env):
    """Time the training step. Returns its figures, {name: number}."""
    # what to train on
    data = None
    size = vocab_size
    make_batch = random_batches(size)
    if real_data:
        data = TokenDataset(dataset)
        data.set_block_size(block_size)
        size = padded_vocab_size(data.vocab_size)
        make_batch = read_batches(data)

    # the run, and what it is compared with
    model = build_model(env, size)
    reference = build_reference(model, env)
    run = build_run(model, env)
    batches = prefetch(make_batch, batch_requests(env), env.device)
    step = ProjectStep(run, batches, env, waits=reference is not None)
    functions = {'this project': step}
    if reference:
        optimizer = torch.optim.AdamW(
            reference.model.train().parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
        functions['transformers'] = partial(transformers_step, reference, optimizer, batches, env)

    # the times, between two looks at the peak, as a busy CPU shows less
    n_sequences = gradient_accumulation_steps * batch_size
    n_tokens = n_sequences * env.world_size * block_size
    peaks = [devices.peak_flops(env.device, env.dtype, budget=0.3)]
    times = time_interleaved(functions, warmup_steps, steps)
    step.read_losses()
    seconds = print_times(times, n_tokens, 'tokens/s')
    peaks.append(devices.peak_flops(env.device, env.dtype, budget=0.3))

    # what else is known of the step
    peak = peak_tflops = None
    if all(peaks):
        peak = max(peaks)
        peak_tflops = peak / 1e12
    mfu = model.estimate_mfu(n_sequences, seconds, peak)
    print_step(step.losses, mfu, peak, env)
    if not reference:
        print_memory(run, env)
    if profile:
        profile_steps(step, env)
    batches.close()

    return dict(
        ms=seconds * 1000,
        tokens_per_second=n_tokens / seconds,
        mfu=mfu,
        peak_tflops=peak_tflops,
        memory_gib=devices.peak_memory(env.device) / GIB,
    )


def print_step(losses, mfu, peak, env):
    """Print the first and last loss, and the share of the device's peak (operations per second)."""
    print0(f'loss         {losses[0]:.4f} first, {losses[-1]:.4f} last')

    share = 'n/a, as the peak is not known'
    if mfu:
        share = f'{mfu:.1%} of {peak / 1e12:,.2f} TFLOP/s, the peak'
    if env.device.type == 'cpu':
        share += ' measured here'
    print0(f'mfu          {share}')


def print_memory(run, env):
    """Print the peak of memory, and what the weights, gradients and moments of this rank take."""
    moments = [value for moment in run.optimizer.state.values() for value in moment.values()]
    parameters = list(run.model.parameters())
    weights_gib = local_bytes(parameters) / GIB
    gradients_gib = local_bytes(p for p in parameters if p.requires_grad) / GIB
    moments_gib = local_bytes(moments) / GIB
    peak_gib = devices.peak_memory(env.device) / GIB
    print0(f'memory       {peak_gib:.2f} GiB at the most; of this rank: weights {weights_gib:.2f}, '
           f'gradients {gradients_gib:.2f}, moments {moments_gib:.2f}')


def local_bytes(tensors):
    """The bytes of this rank's parts of tensors."""
    return sum(distributed.local_part(tensor).nbytes for tensor in tensors)


def profile_steps(step, env):
    """Run five steps more, write them as a trace, and print the operations that took longest."""
    with torch.profiler.profile() as recorded:      # the CPU, and the GPU where there is one
        for _ in range(5):
            step()
    if env.is_main:
        recorded.export_chrome_trace(TRACE)

    order = 'self_cpu_time_total'
    if env.device.type == 'cuda':
        order = 'self_device_time_total'
    averages = recorded.key_averages()
    print0(averages.table(sort_by=order, row_limit=10, max_name_column_width=40))
    print0(f'trace        {TRACE}')


# Generation

def generate(model, prompt, env):
    """Generate as sample.py does, until the tokens are read."""
    model.generate(prompt, new_tokens, top_k=200, compile=env.compile).tolist()


def generate_by_transformers(model, prompt):
    """Generate the same number of tokens by transformers."""
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        top_k=200,
        pad_token_id=0,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
    )
    generated.tolist()


def bench_sample(env, n_sequences):
    """Time the generation of n_sequences at once. Returns its figures, {name: number}."""
    # the model as sample.py has it
    model = build_model(env, vocab_size)
    reference = build_reference(model, env)
    model.to(devices.DTYPES[env.dtype]).eval()
    n_bytes = sum(p.nbytes for p in model.parameters()) - model.transformer.wpe.weight.nbytes
    if env.device.type == 'cpu' and not env.compile:
        cpu_generation.optimize_for_generation(model, n_sequences)

    # what generates
    prompt = torch.randint(vocab_size, (n_sequences, prompt_tokens), device=env.device)
    functions = {'this project': partial(generate, model, prompt, env)}
    if reference:
        reference.model.to(devices.DTYPES[reference.dtype]).eval()
        functions['transformers'] = partial(generate_by_transformers, reference.model, prompt)

    # the times, and the peak of memory before the bandwidth is measured, which takes gigabytes
    n_tokens = new_tokens * n_sequences
    times = time_interleaved(functions, 1, max(2, steps // 4))
    memory = devices.peak_memory(env.device)
    seconds = print_times(times, n_tokens, 'tokens/s')

    # the rate at which weights were read, against that of this machine
    bandwidth = devices.memory_bandwidth(env.device)
    read = n_bytes * new_tokens / seconds           # each token reads all weights once
    print0(f'weights      {read / 1e9:.1f} GB/s read, {read / bandwidth:.0%} of the '
           f'{bandwidth / 1e9:.1f} GB/s measured here')

    return dict(
        tokens_per_second=n_tokens / seconds,
        bandwidth_share=read / bandwidth,
        memory_gib=memory / GIB,
    )


# Data

def bench_data():
    """Time the encoding of text, and with real_data the reading of batches. Returns the figures."""
    if real_data:
        bench_batches()
    return bench_encoding()


def bench_batches():
    """Time how a batch is read, against the rate at which this machine reads memory."""
    data = TokenDataset(dataset)
    data.set_block_size(block_size)
    n_bytes = batch_size * block_size * 2           # a token takes two bytes
    bandwidth = devices.memory_bandwidth(torch.device('cpu'))

    numbers = count()

    def read_batch():
        data.batch(seed, 'train', next(numbers) * batch_size, batch_size)
    times = time_interleaved({'batch': read_batch}, 50, 1000)
    seconds = print_times(times, n_bytes / 1e9, 'GB/s')
    print0(f'tokens       {n_bytes / seconds / bandwidth:.1%} of the {bandwidth / 1e9:.1f} GB/s '
           'that memory was read at here')


def source_text(n_characters):
    """The source code of this repository, repeated until it has so many characters."""
    paths = [path for path in sorted(configurator.ROOT.rglob('*.py'))
             if 'site-packages' not in path.parts]
    text = ''.join(path.read_text(encoding='utf-8') for path in paths)
    repeats = 1 + n_characters // len(text)
    return (text * repeats)[:n_characters]


def bench_encoding():
    """Time the encoding of 10 MB by GPT-2's tokenizer, on all cores and on one."""
    encode = Tokenizer().encode_to_numpy
    pieces = [piece for piece, _ in safe_pieces([source_text(10 ** 7)])]
    megabytes = sum(len(piece.encode()) for piece in pieces) / 1e6

    functions = {
        'all cores': lambda: list(in_order(encode, pieces, 0)),
        'one core': lambda: [encode(piece) for piece in pieces],
    }
    times = time_interleaved(functions, 1, max(2, steps // 4))
    seconds = print_times(times, megabytes, 'MB/s of text')
    return dict(mb_per_second=megabytes / seconds)


# A plan

def settings_to_plan(overrides):
    """train.py's settings of the run that is planned, {name: value}.

    They are those of `config` and what this command changes, or without `config` this script's.
    """
    settings = dict(vars(train))
    known = configurator.read_settings(train.__file__)
    changes = overrides
    if config:
        configurator.configure(settings, [config])
    else:
        changes = configurator.snapshot(globals())
    settings.update({name: value for name, value in changes.items() if name in known})
    settings_checks.check_training(settings)
    return settings


def model_to_plan(settings, overrides):
    """The model of train.py's settings, without memory for its weights."""
    shape = {name: settings[name] for name in train.MODEL_SETTINGS}
    size = vocab_size
    source = settings['init_from']
    if source in GPT2:
        for name in ('n_layer', 'n_head', 'n_embd', 'bias', 'vocab_size'):
            if name in overrides:
                raise UserError(f'init_from={source} decides {name}; leave out --{name}, or add '
                                f'--init_from=scratch')
        shape['n_layer'], shape['n_head'], shape['n_embd'] = GPT2[source]
        shape['bias'] = True
        size = GPT2_VOCAB_SIZE
    elif source not in ('scratch', 'auto', 'resume'):
        raise UserError(f'init_from={source}: a plan knows the shapes of {", ".join(GPT2)}; '
                        f'add --init_from=scratch and name --n_layer, --n_head and --n_embd')

    with torch.device('meta'):
        return GPT(GPTConfig(settings['block_size'], size, dropout=settings['dropout'], **shape))


def print_plan(overrides):
    """Print what a step takes on the GPU `plan`, by arithmetic."""
    settings = settings_to_plan(overrides)

    # precision and compiler as the GPU would choose them
    planned_dtype = settings['dtype']
    if planned_dtype == 'auto':
        planned_dtype = devices.dtype_of_gpu(plan)
    peak = devices.data_sheet_flops(plan, planned_dtype)
    if peak is None:
        raise UserError(f'plan={plan!r} is no GPU whose peak is known here; '
                        f"try H100, A100, L40S, 'RTX 4090' or T4")

    # how the GPUs share the batch
    batch = BatchSchedule(settings['gradient_accumulation_steps'], settings['batch_size'],
                          settings['block_size'], gpus)
    ranks = distributed.Environment(
        torch.device('cuda'), planned_dtype, bool(settings['compile']), 0, 0, gpus, '')
    settings_checks.check_ranks(settings, ranks)

    step = Step(
        micro_batch_size=batch.full_share.micro_batch_size,
        micro_steps=batch.full_share.micro_steps,
        gpus=gpus,
        strategy=settings['strategy'],
        dtype=planned_dtype,
        compile=bool(settings['compile']),
        recompute=settings['recompute'],
        optimizer=settings['optimizer'],
    )
    max_iters = settings['max_iters'] if config else None
    model = model_to_plan(settings, overrides)
    freeze(model, settings['freeze'])
    if settings['lora_rank']:
        with torch.device('meta'):
            lora.adapt(model, settings, planned_dtype)
    for line in describe_plan(model, step, plan, assumed_mfu * peak, max_iters):
        print0(line)


# Another checkout

def names_of_cases():
    """The cases that the setting `peers_cases` names: all of them without it."""
    if not peers_cases:
        return list(peer_timing.CASES)
    return peers_cases.split(',')


def check_peers(overrides):
    """Raise UserError where `peers` is no checkout, and where another setting does not fit it."""
    if not peers:
        if peers_cases:
            raise UserError('peers_cases needs --peers=FOLDER, a checkout of nanoGPT')
        return

    for name in overrides:
        if name not in PEERS_SETTINGS:
            raise UserError(f'{name} does not change what --peers times; leave it out')

    folder = Path(peers).expanduser()
    if not any((folder / script).is_file() for script in ('train.py', 'sample.py')):
        raise UserError(f'peers={peers!r} has neither train.py nor sample.py; name the folder of '
                        f'a checkout of nanoGPT')

    for name in names_of_cases():
        if name not in peer_timing.CASES:
            raise UserError(f'peers_cases={peers_cases!r} has {name!r}; '
                            f'try {", ".join(peer_timing.CASES)}')


def write_model(folder, shape, dataset):
    """Write a ckpt.pt as nanoGPT's, with random weights and the tokens of a dataset, to `folder`.

    shape: a Shape of engine/metrics/peers.py.
    """
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**shape._asdict(), bias=False))
    payload = model.to_checkpoint()
    payload.update(iter_num=0, best_val_loss=1e9, config=dict(dataset=str(dataset)))
    folder.mkdir()
    gathered.write(folder / gathered.MODEL, payload)


def compare_with_peers():
    """Time this checkout beside the one in the folder `peers`. Returns a list of Comparisons."""
    env = start_environment(device, 'auto', compile)
    if env.world_size > 1:
        raise UserError('peers runs in one process; start it without torchrun')

    checkouts = [
        peer_timing.Checkout('peer', Path(peers).expanduser().resolve()),
        peer_timing.Checkout('here', configurator.ROOT),
    ]
    cases = [peer_timing.CASES[name] for name in names_of_cases()]
    print0(f'device {env.device}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}')
    return peer_timing.compare(checkouts, cases, str(env.device), env.compile, write_model)


def print_peers():
    """Print how this checkout compares. Raises RunError where every case failed."""
    comparisons = compare_with_peers()
    for line in peer_timing.table(comparisons):
        print0(line)
    if all(comparison.seconds is None for comparison in comparisons):
        raise RunError('no case could be timed; the lines above say why')


# The command

def check_settings(overrides):
    """Raise UserError for an impossible setting."""
    counts = 'batch_size gradient_accumulation_steps warmup_steps steps prompt_tokens new_tokens'
    configurator.check_range(globals(), counts, 1, 2 ** 20)
    configurator.check_range(globals(), 'gpus', 1, 2 ** 17)
    configurator.check_range(globals(), 'lora_rank', 0, 2 ** 16)
    configurator.check_range(globals(), 'assumed_mfu', above=0, below=1)
    for name in ('config', 'init_from', 'gpus', 'assumed_mfu'):
        if name in overrides and not plan:
            raise UserError(f'{name} is for a plan; try --plan=H100, or another GPU')
    if lora_rank and (bench != 'train' or compare):
        raise UserError('lora_rank is for the training step of this project; '
                        "try --bench=train --compare='', or --lora_rank=0")

    choices = dict(
        bench=('train', 'sample', 'data'),
        compare=('', 'transformers'),
        compare_dtype=('auto', *devices.DTYPES),
        strategy=parallel.STRATEGIES,
    )
    for name, known in choices.items():
        value = globals()[name]
        if value not in known:
            raise UserError(f"{name}={value!r} should be one of {', '.join(map(repr, known))}")


def check_comparison(env):
    """Raise UserError where transformers cannot do what was asked."""
    if compare_dtype != 'auto' and not compare:
        raise UserError('compare_dtype needs --compare=transformers')

    if compare and bench == 'sample' and prompt_tokens + new_tokens > block_size:
        fitting = max(1, block_size - prompt_tokens)
        raise UserError(f'transformers cannot go past block_size={block_size}; '
                        f'try --new_tokens={fitting}')

    if compare and env.world_size > 1:
        raise UserError('compare=transformers runs in one process; start it without torchrun')


def write_report():
    """Time everything in processes of their own, and write the table to the file `report`."""
    summary, kind = bench_report.describe_machine(device, dtype, compile, backend)
    print0(f'{summary}, PyTorch {torch.__version__}')
    with tempfile.TemporaryDirectory() as folder:
        rows = bench_report.rows(configurator.ROOT, device, kind == 'cpu', f'{folder}/run')
        more_lines = None
        if peers:
            def more_lines():
                return peer_timing.table(compare_with_peers())
        bench_report.write(report, f'Benchmarks on {summary}', rows, more_lines)
    print0(f'wrote {report}')


def main(overrides):
    check_settings(overrides)
    check_peers(overrides)
    print0(configurator.describe_settings(overrides))

    # what this process leaves to arithmetic, or to other processes
    if plan:
        print_plan(overrides)
        return
    if report:
        write_report()
        return
    if peers:
        print_peers()
        return

    # the machine
    env = start_environment(device, dtype, compile, backend)
    if env.device.type == 'cpu':
        keep_freed_memory()
    settings_checks.check_ranks(dict(vars(train), strategy=strategy, lora_rank=lora_rank), env)
    check_comparison(env)
    print0(f'{env.summary}, PyTorch {torch.__version__}')

    # the work
    if bench == 'train':
        results = bench_train(env)
    elif bench == 'sample':
        results = bench_sample(env, overrides.get('batch_size', 1))
    else:
        results = bench_data()

    if figures:
        print0(json.dumps(results))
    env.barrier()


if __name__ == '__main__':
    with hard_exit(), report_errors(), report_first_failure():
        main(configurator.configure(globals(), sys.argv[1:]))
