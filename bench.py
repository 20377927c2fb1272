"""Time what this repository does, and how near that comes to what the machine can do.

    python bench.py                                     # the training step: the step of train.py itself
    python bench.py --bench=sample --dtype=float16      # generation, as in sample.py
    python bench.py --bench=data                        # GPT-2's encoding; with --real_data=True batches too
    python bench.py --compare=transformers --device=cpu --batch_size=4 --block_size=256
    python bench.py --profile=True                      # writes bench-trace.json for ui.perfetto.dev
"""

import statistics
import sys
import time
from itertools import count

import torch

import configurator
import runtime
from dataloader import Dataset, prefetch
from decoding import lay_out
from model import GPT, GPTConfig
from train import train_step            # the one script that another imports: a copy would drift

# work
bench = 'train'                         # train, sample or data
compare = ''                            # transformers: its GPT-2 of the same shape in turn with ours
compare_dtype = 'auto'                  # theirs: auto is that of ours, float32, bfloat16 or float16
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
# machine
device = 'auto'                         # auto, cuda, cuda:1, mps or cpu
dtype = 'auto'                          # auto, float32, bfloat16 or float16
compile = 'auto'                        # auto (on CUDA), True or False
recompute = False                       # True recomputes activations in backward
backend = 'auto'                        # between ranks, under torchrun: auto, nccl or gloo
seed = 1337


def race(runners, warmup, repeats):
    """{name: [seconds]} of functions that wait for their own result, run in turn, so that a
    machine that slows down slows all of them."""
    seconds = {name: [] for name in runners}
    for i in range(warmup + repeats):
        for name, run in runners.items():
            began = time.perf_counter()
            run()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def report(rt, seconds, amount, unit):
    """A line for each runner: the median, its spread, and `amount` per second; then the ratio."""
    for name, times in seconds.items():
        middle = statistics.median(times)
        rt.say(f'{name:<10}{middle * 1000:.2f} ms, median of {len(times)} ({min(times) * 1000:.2f} to '
               f'{max(times) * 1000:.2f}), {amount / middle:,.1f} {unit}')
    if len(seconds) > 1:
        ours, theirs = seconds.values()
        ratios = [b / a for a, b in zip(ours, theirs)]
        rt.say(f'ratio     {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})')
    return statistics.median(next(iter(seconds.values())))


def build(rt, size):
    """Our model, and transformers' with its precision, or None and None."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size, size, n_layer, n_head, n_embd, dropout, bias or bool(compare)))
    theirs = their_dtype = None
    if compare:
        import hf
        theirs = hf.to_transformers(model).to(rt.device)
        their_dtype = rt.dtype if compare_dtype == 'auto' else runtime.choose_dtype(compare_dtype, rt.device)[0]
        rt.say(f'theirs is transformers in {their_dtype}' + (', not compiled' if rt.compile else ''))
    return model.to(rt.device), theirs, their_dtype


def bench_train(rt):
    data = Dataset(dataset) if real_data else None
    size = vocab_size
    if data:
        data.cut(block_size)
        size = 50304 if data.vocab_size == 50257 else data.vocab_size
    model, theirs, their_dtype = build(rt, size)
    model.recompute = recompute
    net, scaler, micros = rt.wrap(model), rt.scaler(), gradient_accumulation_steps
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95))

    def random_batch(seed, stream, first, count):
        tokens = torch.randint(size, (count, block_size + 1))
        return tokens[:, :-1], tokens[:, 1:]

    batches = prefetch(data.batch if data else random_batch,
                       ((seed, 'train', ((i * rt.world + rt.rank) * micros + m) * batch_size, batch_size)
                        for i in count() for m in range(micros)), rt.device)
    iteration, losses = count(), []

    def step():
        numbers = train_step(net, optimizer, scaler, batches, micros, next(iteration), rt)
        losses.append(rt.read_later(numbers)()[0])

    runners = {'ours': step}
    if theirs:
        their_optimizer = torch.optim.AdamW(theirs.train().parameters(), 1e-4, (0.9, 0.95), fused=True)

        def their_step():
            for _ in range(micros):
                x, _ = next(batches)
                with torch.autocast(rt.device.type, runtime.DTYPES[their_dtype], enabled=their_dtype != 'float32'):
                    loss = theirs(x, labels=x).loss / micros
                loss.backward()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            their_optimizer.step()
            their_optimizer.zero_grad()
            loss.item()
        runners['theirs'] = their_step
    rt.peak_flops(look=0.3)                             # before and after: a busy CPU hides its peak
    sequences = micros * batch_size
    seconds = report(rt, race(runners, warmup_steps, steps), sequences * rt.world * block_size, 'tokens/s')
    peak = rt.peak_flops(look=0.3)
    mfu = model.estimate_mfu(sequences, seconds, peak)
    where = 'measured here' if rt.device.type == 'cpu' else "the data sheet's"
    rt.say(f'loss      {losses[0]:.4f} first, {losses[-1]:.4f} last')
    rt.say(f'mfu       {mfu:.1%} of {peak / 1e12:,.2f} TFLOP/s, {where}' if mfu else
           'mfu       n/a, the peak of this device is not known')
    if not theirs:
        rt.say(f'memory    {rt.peak_memory() / 2 ** 30:.2f} GiB at the most')
    if profile:
        with torch.profiler.profile() as recorded:      # the CPU, and the GPU where there is one
            for _ in range(5):
                step()
        if rt.main:
            recorded.export_chrome_trace('bench-trace.json')
        rt.say(recorded.key_averages().table(sort_by='self_cpu_time_total', row_limit=10, max_name_column_width=40))
        rt.say('trace     bench-trace.json')
    batches.close()


def bench_sample(rt, sequences):
    model, theirs, their_dtype = build(rt, vocab_size)
    model.to(runtime.DTYPES[rt.dtype]).eval()
    stored = sum(p.numel() * p.element_size() for p in model.parameters()) - model.transformer.wpe.weight.nbytes
    if rt.device.type == 'cpu' and not rt.compile:
        lay_out(model, sequences)
    prompt = torch.randint(vocab_size, (sequences, prompt_tokens), device=rt.device)
    runners = {'ours': lambda: model.generate(prompt, new_tokens, top_k=200, compile=rt.compile).tolist()}
    if theirs:
        theirs.to(runtime.DTYPES[their_dtype]).eval()
        runners['theirs'] = lambda: theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=200, pad_token_id=0,
            min_new_tokens=new_tokens, max_new_tokens=new_tokens).tolist()
    rate = rt.memory_rate()
    seconds = report(rt, race(runners, 1, max(2, steps // 4)), new_tokens * sequences, 'tokens/s')
    read = stored * new_tokens / seconds
    rt.say(f'weights   {read / 1e9:.1f} GB/s read, {read / rate:.0%} of the {rate / 1e9:.1f} GB/s measured here')


def bench_data(rt):
    sys.path.insert(0, str(configurator.ROOT / 'data'))
    import tokenfiles
    if real_data:
        data = Dataset(dataset)
        data.cut(block_size)
        batch, read, rate = count(), batch_size * block_size * 2, rt.memory_rate('cpu')
        seconds = report(rt, race({'batch': lambda: data.batch(seed, 'train', next(batch) * batch_size, batch_size)}, 50, 1000),
                         read / 1e9, 'GB/s')
        rt.say(f'tokens    {read / seconds / rate:.1%} of the {rate / 1e9:.1f} GB/s that memory was read at here')
    text = ''.join(path.read_text(encoding='utf-8') for path in sorted(configurator.ROOT.rglob('*.py'))
                   if 'site-packages' not in path.parts)
    text = (text * (1 + 10 ** 7 // len(text)))[:10 ** 7]        # our own source, 10 MB of it
    encode = tokenfiles.encoder(tokenfiles.GPT2)
    pieces = [piece for piece, _ in tokenfiles.safe_pieces([text])]
    size = sum(len(piece.encode()) for piece in pieces) / 1e6
    report(rt, race({'all cores': lambda: list(tokenfiles.in_order(encode, pieces, 0)),
                     'one core': lambda: [encode(piece) for piece in pieces]}, 1, max(2, steps // 4)), size, 'MB/s of text')


def main(given):
    for name in ('batch_size', 'gradient_accumulation_steps', 'warmup_steps', 'steps', 'prompt_tokens', 'new_tokens'):
        if globals()[name] < 1:
            raise ValueError(f'{name}={globals()[name]} should be at least 1')
    for name, known in (('bench', ('train', 'sample', 'data')), ('compare', ('', 'transformers')),
                        ('compare_dtype', ('auto', *runtime.DTYPES))):
        if globals()[name] not in known:
            raise ValueError(f"{name}={globals()[name]!r} should be one of {', '.join(map(repr, known))}")
    rt = runtime.start(device, dtype, compile, backend, seed)
    if compare_dtype != 'auto' and not compare:
        raise ValueError('compare_dtype is of --compare=transformers, which is not asked for')
    if compare and bench == 'sample' and prompt_tokens + new_tokens > block_size:
        raise ValueError(f'transformers cannot go past block_size={block_size}; try --new_tokens={max(1, block_size - prompt_tokens)}')
    if compare and rt.world > 1:
        raise ValueError('compare=transformers runs in one process; leave torchrun away')
    rt.say(rt.summary + f', PyTorch {torch.__version__}')
    if bench == 'train':
        bench_train(rt)
    elif bench == 'sample':
        bench_sample(rt, given.get('batch_size', 1))
    else:
        bench_data(rt)
    rt.part()


if __name__ == '__main__':
    with runtime.parting(), configurator.plain_errors(), runtime.one_voice():
        main(configurator.configure(globals(), sys.argv[1:]))
