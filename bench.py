"""Time the training step alone: the step of train.py itself, without evaluation or saving.

    python bench.py
    python bench.py --batch_size=4 --block_size=256 --device=cpu
    python bench.py --profile=True      # writes bench-trace.json for ui.perfetto.dev or chrome://tracing
"""

import statistics
import sys
import time
from itertools import count

import torch

import configurator
import runtime
from dataloader import Dataset, prefetch
from model import GPT, GPTConfig
from train import train_step            # the one script that another imports: a copy would drift

# work
batch_size = 12                         # sequences per micro-batch
block_size = 1024                       # tokens per sequence
gradient_accumulation_steps = 1         # micro-batches per step
real_data = False                       # True reads `dataset`, False draws random tokens
dataset = 'openwebtext'
# model: GPT-2 124M
n_layer = 12
n_head = 12
n_embd = 768
vocab_size = 50304                      # of random tokens; real data brings its own
dropout = 0.0
bias = False
# measurement
warmup_steps = 5                        # untimed, compilation included
steps = 20                              # timed, one by one
profile = False                         # True records 5 steps more as bench-trace.json
# machine
device = 'auto'                         # auto, cuda, cuda:1, mps or cpu
dtype = 'auto'                          # auto, float32, bfloat16 or float16
compile = 'auto'                        # auto (on CUDA), True or False
backend = 'auto'                        # between ranks, under torchrun: auto, nccl or gloo
seed = 1337


def main():
    for name in ('batch_size', 'gradient_accumulation_steps', 'warmup_steps', 'steps'):
        if globals()[name] < 1:
            raise ValueError(f'{name}={globals()[name]} should be at least 1')
    rt = runtime.start(device, dtype, compile, backend, seed)
    rt.say(rt.summary)
    data = Dataset(dataset) if real_data else None
    size = vocab_size
    if data:
        data.cut(block_size)
        size = 50304 if data.vocab_size == 50257 else data.vocab_size
    rt.seed_for('weights')
    model = GPT(GPTConfig(block_size, size, n_layer, n_head, n_embd, dropout, bias)).to(rt.device)
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95))
    net = rt.wrap(model)
    scaler = rt.scaler()

    def random_batch(seed, stream, iteration, first, count):
        tokens = torch.randint(size, (count, block_size + 1))
        return tokens[:, :-1], tokens[:, 1:]

    micros = gradient_accumulation_steps                # per rank here: more ranks do more work
    batches = prefetch(data.batch if data else random_batch,
                       ((seed, 'train', i, (rt.rank * micros + m) * batch_size, batch_size)
                        for i in count() for m in range(micros)), rt.device)

    def step(iteration):
        """Seconds and loss of one step, waited for."""
        began = time.perf_counter()
        loss = rt.read_later(train_step(net, optimizer, scaler, batches, micros, iteration, rt))()[0]
        return time.perf_counter() - began, loss

    peak = rt.peak_flops()
    for i in range(warmup_steps):
        seconds, loss = step(i)
        rt.say(f'warm-up {i}: {seconds * 1000:.1f} ms, loss {loss:.4f}')
    timed = [step(warmup_steps + i)[0] for i in range(steps)]
    seconds = statistics.median(timed)
    sequences = micros * batch_size
    mfu = model.estimate_mfu(sequences, seconds, peak)
    rt.say(f'{model.get_num_params():,} parameters, {sequences * rt.world} x {block_size} tokens per step, {steps} steps')
    rt.say(f'time    {seconds * 1000:.1f} ms per iteration, median ({min(timed) * 1000:.1f} to {max(timed) * 1000:.1f})')
    rt.say(f'speed   {sequences * rt.world * block_size / seconds:,.0f} tokens/s')
    rt.say('mfu     ' + ('n/a, the peak of this device is not known' if mfu is None else
                         f'{mfu:.1%} of {peak / 1e12:,.2f} TFLOP/s'
                         + (', measured here' if rt.device.type == 'cpu' else ", the data sheet's")))
    rt.say(f'memory  {rt.peak_memory() / 2 ** 30:.2f} GiB at the most')
    if profile:
        with torch.profiler.profile() as recorded:      # the CPU, and the GPU where there is one
            for i in range(5):
                step(warmup_steps + steps + i)
        if rt.main:
            recorded.export_chrome_trace('bench-trace.json')
        rt.say(recorded.key_averages().table(sort_by='self_cpu_time_total', row_limit=10, max_name_column_width=40))
        rt.say('trace   bench-trace.json')
    batches.close()
    rt.close()


if __name__ == '__main__':
    with configurator.plain_errors():
        configurator.configure(globals(), sys.argv[1:])
        main()
