"""Time what this repository does, and how close that comes to what the machine can do.

    python bench.py                                     # the training step: train_step of train.py
    python bench.py --bench=sample --dtype=float16      # generation, as in sample.py
    python bench.py --bench=data                        # GPT-2's encoding; with --real_data=True batches too
    python bench.py --profile=True                      # writes bench-trace.json for ui.perfetto.dev
    python bench.py --report=figures.md                 # all of these, as a table for this machine
"""

import json
import statistics
import sys
import tempfile
import time
from itertools import count

from console import print0, report_errors  # before torch: see console.py

import torch

import configurator
from engine import device as devices
from engine import distributed
from engine.dataloader.batches import TokenDataset, prefetch
from engine.distributed import hard_exit, report_first_failure, start
from engine.errors import UserError
from engine.generation import cpu as cpu_generation
from engine.tokenizer import padded_vocab_size
from engine.training import optim, parallel
from engine.training.run import BatchSchedule, Progress, Run
from engine.training.settings_checks import CHOICES
from model import GPT, GPTConfig
from train import train_step  # the one script that another imports: a copy would drift

# work
bench = 'train'                         # train, sample or data
compare = ''                            # transformers: its GPT-2 of the same shape, in turn with this one
compare_dtype = 'auto'                  # precision of transformers: auto is the same, float32, bfloat16 or float16
batch_size = 12                         # sequences per micro-batch; of sample: sequences at once (1 if not given)
block_size = 1024                       # tokens per sequence
gradient_accumulation_steps = 1         # micro-batches per step
real_data = False                       # True reads `dataset`, False draws random tokens
dataset = 'openwebtext'
prompt_tokens = 32                      # of sample
new_tokens = 100                        # of sample, per repeat
# model: GPT-2 124M
n_layer = 12
n_head = 12
n_embd = 768
vocab_size = 50304                      # of random tokens; real data brings its own
dropout = 0.0
bias = False
# measurement
warmup_steps = 5                        # untimed, compilation included
steps = 20                              # timed, one by one; of sample and data: a fourth of them
profile = False                         # True records 5 steps more as bench-trace.json
report = ''                             # a file for the table of everything that is timed on this machine
figures = False                         # True ends with the figures as a line of JSON
# machine
device = 'auto'                         # auto, cuda, cuda:1, mps or cpu
dtype = 'auto'                          # auto, float32, bfloat16 or float16
compile = 'auto'                        # auto (on CUDA), True or False
recompute = False                       # True recomputes activations in backward
strategy = 'ddp'                        # of several ranks, under torchrun: ddp, fsdp or hsdp
backend = 'auto'                        # between ranks: auto, nccl or gloo
seed = 1337


def time_interleaved(functions, warmup, repeats):
    """{name: [seconds]} of functions that wait for their own result. They run in turn, so that a
    machine that slows down slows all of them."""
    seconds = {name: [] for name in functions}
    for i in range(warmup + repeats):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def print_times(seconds, amount, unit):
    """Print a line for each function: the median, its spread, `amount` per second; then the ratio of
    the second to the first. Returns the first one's median in seconds."""
    for name, times in seconds.items():
        middle = statistics.median(times)
        print0(f'{name:<13}{middle * 1000:.2f} ms, median of {len(times)} ({min(times) * 1000:.2f} to '
               f'{max(times) * 1000:.2f}), {amount / middle:,.1f} {unit}')
    if len(seconds) > 1:
        first, second = seconds.values()
        ratios = [b / a for a, b in zip(first, second)]
        print0(f'ratio        {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})')
    return statistics.median(next(iter(seconds.values())))


def build(env, vocab_size):
    """The model, and transformers' reference model with its precision, or None and None."""
    torch.manual_seed(seed)
    # Of a sharded model, rank 0 gives the others their parts.
    on_meta = not env.is_main and bench == 'train' and parallel.check_strategy(strategy, 'float32', env)
    with torch.device('meta' if on_meta else env.device):
        model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias or bool(compare)))
    reference = reference_dtype = None
    if compare:
        from engine.hf import weights as hf_weights
        reference = hf_weights.to_transformers(model.config, model.state_dict()).to(env.device)
        reference.loss_type = 'ForCausalLM'
        reference_dtype = env.dtype if compare_dtype == 'auto' else devices.choose_dtype(compare_dtype, env.device)[0]
        print0(f'transformers in {reference_dtype}' + (', not compiled' if env.compile else ''))
    return model, reference, reference_dtype


def bench_train(env):
    data = TokenDataset(dataset) if real_data else None
    size = vocab_size
    if data:
        data.set_block_size(block_size)
        size = padded_vocab_size(data.vocab_size)
    model, reference, reference_dtype = build(env, size)
    micro_steps = gradient_accumulation_steps
    wrapped_model = parallel.wrap(model, env, strategy, recompute).train()
    run = Run(model, wrapped_model, optim.adamw(model, 1e-4, 0.1, (0.9, 0.95)),
              devices.grad_scaler(env.device, env.dtype),
              BatchSchedule(micro_steps * env.world_size, batch_size, block_size, env.world_size), 1.0, seed, Progress())
    generator = torch.Generator().manual_seed(seed)

    def random_batch(seed, stream, first, count):
        tokens = torch.randint(size, (count, block_size + 1), generator=generator)
        return tokens[:, :-1], tokens[:, 1:]

    batches = prefetch(data.batch if data else random_batch,
                       ((seed, 'train', ((i * env.world_size + env.rank) * micro_steps + m) * batch_size, batch_size)
                        for i in count() for m in range(micro_steps)), env.device)
    losses = []

    def step():
        losses.append(devices.read_async(train_step(run, batches, env)['loss'][None])()[0])
        run.count_iteration()

    functions = {'this project': step}
    if reference:
        reference_optimizer = torch.optim.AdamW(reference.train().parameters(), 1e-4, (0.9, 0.95), fused=True)

        def reference_step():
            for _ in range(micro_steps):
                x, _ = next(batches)
                with devices.autocast(env.device, reference_dtype):
                    loss = reference(x, labels=x).loss / micro_steps
                loss.backward()
            torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
            reference_optimizer.step()
            reference_optimizer.zero_grad()
            loss.item()
        functions['transformers'] = reference_step
    peaks = [devices.peak_flops(env.device, env.dtype, budget=0.3)]     # before and after: a busy CPU shows less
    n_sequences = micro_steps * batch_size
    seconds = print_times(time_interleaved(functions, warmup_steps, steps), n_sequences * env.world_size * block_size, 'tokens/s')
    peaks.append(devices.peak_flops(env.device, env.dtype, budget=0.3))
    peak = max(peaks) if all(peaks) else None
    mfu = model.estimate_mfu(n_sequences, seconds, peak)
    print0(f'loss         {losses[0]:.4f} first, {losses[-1]:.4f} last')
    print0('mfu          ' + (f'{mfu:.1%} of {peak / 1e12:,.2f} TFLOP/s, the peak' if mfu else 'n/a, as the peak is not known')
           + (' measured here' if env.device.type == 'cpu' else ''))
    if not reference:
        weights, moments = (sum(distributed.local_part(tensor).nbytes for tensor in tensors) / 2 ** 30 for tensors in (
            model.parameters(), (value for moment in run.optimizer.state.values() for value in moment.values())))
        print0(f'memory       {devices.peak_memory(env.device) / 2 ** 30:.2f} GiB at the most; of this rank: weights {weights:.2f}, '
               f'gradients {weights:.2f}, moments {moments:.2f}')
    if profile:
        with torch.profiler.profile() as recorded:      # the CPU, and the GPU where there is one
            for _ in range(5):
                step()
        if env.is_main:
            recorded.export_chrome_trace('bench-trace.json')
        by = 'self_device_time_total' if env.device.type == 'cuda' else 'self_cpu_time_total'
        print0(recorded.key_averages().table(sort_by=by, row_limit=10, max_name_column_width=40))
        print0('trace        bench-trace.json')
    batches.close()
    return dict(ms=seconds * 1000, tokens_per_second=n_sequences * env.world_size * block_size / seconds, mfu=mfu,
                peak_tflops=peak and peak / 1e12, memory_gib=devices.peak_memory(env.device) / 2 ** 30)


def bench_sample(env, n_sequences):
    model, reference, reference_dtype = build(env, vocab_size)
    model.to(devices.DTYPES[env.dtype]).eval()
    stored = sum(p.nbytes for p in model.parameters()) - model.transformer.wpe.weight.nbytes
    if env.device.type == 'cpu' and not env.compile:
        cpu_generation.optimize_for_generation(model, n_sequences)
    prompt = torch.randint(vocab_size, (n_sequences, prompt_tokens), device=env.device)
    functions = {'this project': lambda: model.generate(prompt, new_tokens, top_k=200, compile=env.compile).tolist()}
    if reference:
        reference.to(devices.DTYPES[reference_dtype]).eval()
        functions['transformers'] = lambda: reference.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=200, pad_token_id=0,
            min_new_tokens=new_tokens, max_new_tokens=new_tokens).tolist()
    bandwidth = devices.memory_bandwidth(env.device)
    seconds = print_times(time_interleaved(functions, 1, max(2, steps // 4)), new_tokens * n_sequences, 'tokens/s')
    read = stored * new_tokens / seconds
    print0(f'weights      {read / 1e9:.1f} GB/s read, {read / bandwidth:.0%} of the {bandwidth / 1e9:.1f} GB/s measured here')
    return dict(tokens_per_second=new_tokens * n_sequences / seconds, bandwidth_share=read / bandwidth,
                memory_gib=devices.peak_memory(env.device) / 2 ** 30)


def bench_data():
    from engine.prepare.encode import in_order, safe_pieces
    from engine.tokenizer import Tokenizer
    repeats = max(2, steps // 4)
    if real_data:
        data = TokenDataset(dataset)
        data.set_block_size(block_size)
        batch, read, bandwidth = count(), batch_size * block_size * 2, devices.memory_bandwidth(torch.device('cpu'))
        seconds = print_times(time_interleaved({'batch': lambda: data.batch(seed, 'train', next(batch) * batch_size, batch_size)},
                                          50, 1000), read / 1e9, 'GB/s')
        print0(f'tokens       {read / seconds / bandwidth:.1%} of the {bandwidth / 1e9:.1f} GB/s that memory was read at here')
    text = ''.join(path.read_text(encoding='utf-8') for path in sorted(configurator.ROOT.rglob('*.py'))
                   if 'site-packages' not in path.parts)
    text = (text * (1 + 10 ** 7 // len(text)))[:10 ** 7]        # this repository's source, 10 MB of it
    encode = Tokenizer().encode_to_numpy
    pieces = [piece for piece, _ in safe_pieces([text])]
    size = sum(len(piece.encode()) for piece in pieces) / 1e6
    seconds = print_times(time_interleaved({'all cores': lambda: list(in_order(encode, pieces, 0)),
                             'one core': lambda: [encode(piece) for piece in pieces]}, 1, repeats), size, 'MB/s of text')
    return dict(mb_per_second=size / seconds)


def main(overrides):
    configurator.check_range(globals(), 'batch_size gradient_accumulation_steps warmup_steps steps prompt_tokens new_tokens',
                             1, 2 ** 20)
    for name, known in (('bench', ('train', 'sample', 'data')), ('compare', ('', 'transformers')),
                        ('compare_dtype', ('auto', *devices.DTYPES)), ('strategy', CHOICES['strategy'])):
        if globals()[name] not in known:
            raise UserError(f"{name}={globals()[name]!r} should be one of {', '.join(map(repr, known))}")
    env = start(device, dtype, compile, backend)
    if compare_dtype != 'auto' and not compare:
        raise UserError('compare_dtype needs --compare=transformers')
    if compare and bench == 'sample' and prompt_tokens + new_tokens > block_size:
        raise UserError(f'transformers cannot go past block_size={block_size}; try --new_tokens={max(1, block_size - prompt_tokens)}')
    if compare and env.world_size > 1:
        raise UserError('compare=transformers runs in one process; start it without torchrun')
    print0(configurator.describe_settings(overrides))
    print0(env.summary + f', PyTorch {torch.__version__}')
    if report:
        from engine.metrics import bench_report
        with tempfile.TemporaryDirectory() as folder:
            rows = bench_report.rows(configurator.ROOT, device, env.device.type == 'cpu', f'{folder}/run')
            bench_report.write(report, f'Benchmarks on {env.summary}', rows)
        print0(f'wrote {report}')
        return
    results = (bench_train(env) if bench == 'train' else
               bench_sample(env, overrides.get('batch_size', 1)) if bench == 'sample' else bench_data())
    if figures:
        print0(json.dumps(results))
    env.barrier()


if __name__ == '__main__':
    with hard_exit(), report_errors(), report_first_failure():
        main(configurator.configure(globals(), sys.argv[1:]))
