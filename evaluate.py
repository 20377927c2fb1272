"""Score a model on published tasks: multiple choice, last words, perplexities.

    python evaluate.py --out_dir=out-gpt2 --tasks=hellaswag,lambada,wikitext2
    python evaluate.py --init_from=gpt2 --tasks=hellaswag --limit=1000
    python evaluate.py --init_from=gpt2 --tasks=core --data=eval_bundle
    torchrun --standalone --nproc_per_node=8 evaluate.py --out_dir=out-gpt2

python data/evals/prepare.py fetches the tasks. docs/evaluation.md says how each number is computed.
The table goes to stdout, everything else to stderr.
"""

import json
import sys
import time
from pathlib import Path

from console import print0, progress_bar, report_errors  # before torch: see console.py

import torch

import configurator
from engine.atomic_files import atomic_write
from engine.checkpoint.load_model import load_model
from engine.distributed import hard_exit, report_first_failure, start
from engine.errors import RunError
from engine.evaluation import results as evaluation_results
from engine.evaluation import tasks as evaluation_tasks
from engine.tokenizer import Tokenizer
from model import GPT

# model
init_from = 'resume'        # resume (the model in out_dir), or Hugging Face weights: gpt2, another name, or a folder
out_dir = 'out'             # where ckpt.pt lies, and where eval.json is written
# tasks
tasks = 'hellaswag,lambada,wikitext2'       # names of files in data, without .jsonl or .txt; core for the CORE bundle
data = 'data/evals'         # folder of the tasks
limit = 0                   # first examples of each task to score (documents of a text), 0 for all
batch_size = 32             # texts read at once; lower it where memory is short, the results stay the same
examples = ''               # file to write the log-likelihoods of every example to, as JSON lines; '' writes none
# machine
device = 'auto'             # auto, cuda, cuda:1, mps or cpu
dtype = 'auto'              # auto, float32, bfloat16 or float16; published figures are mostly float32
rank_timeout = 600          # seconds that ranks wait for a lost one before they give up


def format_table(results):
    """The results as lines of aligned columns."""
    rows = [('task', 'metric', 'value', 'stderr', 'examples', 'protocol')]
    for r in results:
        stderr = 'n/a' if r['stderr'] is None else f'{r["stderr"]:.4f}'
        rows.append((r['task'], r['metric'], f'{r["value"]:.4f}', stderr, f'{r["examples"]:,}', r['protocol']))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return '\n'.join('  '.join([row[0].ljust(widths[0]), row[1].ljust(widths[1]),
                                *(text.rjust(width) for text, width in zip(row[2:5], widths[2:])), row[5]]) for row in rows)


def write_file(path, lines):
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.writelines(lines)
    except OSError as error:
        raise RunError(f'{path} was not written ({error.strerror}); the results are printed above') from None


def example_lines(task, scores):
    """A JSON line for each example: what the model says of each of its options."""
    for i, options in enumerate(scores):
        gold = {'gold': task.gold[i]} if task.gold else {}
        yield json.dumps(dict(task=task.name, example=task.numbers[i] if task.numbers else i, **gold,
                              loglikelihood=[s.loglikelihood for s in options], tokens=[s.tokens for s in options],
                              greedy=[s.greedy for s in options])) + '\n'


def main(overrides):
    configurator.check_range(globals(), 'limit', 0, 10 ** 9)
    configurator.check_range(globals(), 'batch_size', 1, 2 ** 20)
    configurator.check_range(globals(), 'rank_timeout', 1, 10 ** 7)
    began = time.perf_counter()
    env = start(device, dtype, timeout=rank_timeout)
    if env.dtype == 'float32':
        torch.set_float32_matmul_precision('highest')   # training takes TF32, which rounds to 11 bits
    print0(f'{configurator.describe_settings(overrides)}\n{env.summary}', file=sys.stderr)
    with env.raise_on_all_ranks():
        model, spec, iter_num = load_model(GPT, init_from, out_dir)
        loaded, missing = evaluation_tasks.load_tasks(tasks, Path(data), Tokenizer(spec), model.config.block_size, limit, progress_bar)
    for task in loaded:
        if task.skipped:
            print0(f'note: {task.name}: {task.skipped:,} examples are left out, as this model cannot read them: '
                   f'{task.reason}', file=sys.stderr)
    model.to(env.device)
    lines = []
    results = evaluation_results.evaluate_tasks(model, loaded, env, batch_size, missing, progress_bar,
                                   on_scores=lambda task, scores: lines.extend(example_lines(task, scores)))
    if env.is_main:
        print0(format_table(results))
        content = dict(results=results, iter_num=iter_num, seconds=round(time.perf_counter() - began, 3),
                       model=str(out_dir if init_from == 'resume' else init_from), limit=limit, device=env.summary)
        if init_from == 'resume' or 'out_dir' in overrides:     # GPT-2's results do not belong into somebody's run
            write_file(Path(out_dir) / 'eval.json', json.dumps(content, indent=2) + '\n')
        if examples:
            write_file(examples, lines)
    env.barrier()


if __name__ == '__main__':
    with hard_exit(), report_errors(), report_first_failure():
        main(configurator.configure(globals(), sys.argv[1:]))
