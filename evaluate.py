"""Score a model on published tasks (multiple choice, last words, perplexities), or on a text.

    python evaluate.py --out_dir=out-gpt2 --tasks=hellaswag,lambada,wikitext2
    python evaluate.py --init_from=gpt2 --tasks=hellaswag --limit=1000
    python evaluate.py --init_from=gpt2 --tasks=core --data=eval_bundle
    python evaluate.py out-chat --tasks=held_out --data=data/chat --chat=True
    python evaluate.py --out_dir=out-gpt2 --text=FILE --per_token=tokens.jsonl
    torchrun --standalone --nproc_per_node=8 evaluate.py --out_dir=out-gpt2

python data/evals/prepare.py fetches the tasks. docs/evaluation.md says how each number is computed.
The table goes to stdout, everything else to stderr.
"""

import json
import math
import sys
import time
from pathlib import Path

from console import (  # before torch: see console.py
    log_to,
    print0,
    print_text,
    report_errors,
    terminal_width,
)

import torch

import configurator
from engine.atomic_files import atomic_write
from engine.checkpoint.kept import scores_path
from engine.checkpoint.load_model import load_model
from engine.distributed import hard_exit, report_first_failure, start_environment
from engine.errors import RunError, UserError
from engine.evaluation.own_text import TextScorer, load_own_text
from engine.evaluation.results import evaluate_tasks
from engine.evaluation.tasks import load_tasks
from engine.tokenizer import Tokenizer
from model import GPT

# model
init_from = 'resume'        # resume (the model in out_dir), the folder of a run, or Hugging Face
                            # weights: gpt2, another name, or a folder
out_dir = 'out'             # where ckpt.pt lies, and where eval.json is written; or a kept model,
                            # as out/ckpt_001000.pt
# tasks
tasks = 'hellaswag,lambada,wikitext2'   # names of files in data, without .jsonl or .txt; core for
                                        # the CORE bundle
data = 'data/evals'         # folder of the tasks
limit = 0                   # examples of each task, from the first on; of wikitext2, documents;
                            # 0: all
batch_size = 32             # texts read at once; lower it where memory is short, the results stay
                            # the same
chat = False                # True asks the prompts of a task as a user does, with a model that is
                            # trained on conversations, and scores the assistant's answers
examples = ''               # file to write the log-likelihoods of every example to, as JSON lines;
                            # '' writes none
# a text of your own, instead of tasks
text = ''                   # file to score, whose perplexity and bits per byte are printed
per_token = ''              # file to write the log-probability and the rank of each token of the
                            # text to, as JSON lines; '' writes none
stride = 0                  # tokens between the beginnings of two windows of block_size tokens;
                            # 0: half of block_size. Fewer give each token more context
# machine
device = 'auto'             # auto, cuda, cuda:1, mps or cpu
dtype = 'auto'              # auto, float32, bfloat16 or float16; published figures are mostly
                            # float32
rank_timeout = 600          # seconds that ranks wait for a lost one before they give up


def format_table(results, width=None):
    """The results as lines of aligned columns.

    width: the columns of a terminal. If the lines do not fit it, each protocol has a line of its
    own below its row.
    """
    rows = [('task', 'metric', 'value', 'stderr', 'examples', 'protocol')]
    for result in results:
        stderr = 'n/a'
        if result['stderr'] is not None:
            stderr = f'{result["stderr"]:.4f}'
        rows.append((result['task'], result['metric'], f'{result["value"]:.4f}', stderr,
                     f'{result["examples"]:,}', result['protocol']))

    widths = [max(len(text) for text in column) for column in zip(*rows)]
    lines = []
    is_narrow = width is not None and sum(widths) + 2 * (len(widths) - 1) > width
    for task, metric, *numbers, protocol in rows:
        cells = [task.ljust(widths[0]), metric.ljust(widths[1])]
        cells += [text.rjust(size) for text, size in zip(numbers, widths[2:])]
        if not is_narrow:
            lines.append('  '.join([*cells, protocol]))
            continue
        lines.append('  '.join(cells))
        if lines[1:]:                               # a row below the names of the columns
            lines.append(f'  {protocol}')
    return '\n'.join(lines)


def print_table(results):
    """Print the results, on a terminal so that they fit it."""
    width = None
    if sys.stdout.isatty():
        width = terminal_width()
    print0(format_table(results, width))


def example_lines(task, scores):
    """A JSON line for each example: what the model says of each of its options."""
    for example, options in zip(task.examples, scores):
        record = dict(task=task.name, example=example.number)
        if task.kind != 'perplexity':
            record['gold'] = example.gold
        record['loglikelihood'] = [score.loglikelihood for score in options]
        record['tokens'] = [score.tokens for score in options]
        record['greedy'] = [score.greedy for score in options]
        yield json.dumps(record) + '\n'


def write_file(path, lines, advice='the results are printed above'):
    """Write lines, or a text, to a file whose folder may not exist yet."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.writelines(lines)
    except OSError as error:
        raise RunError(f'{path} was not written ({error.strerror}); {advice}') from None


def check_settings(overrides):
    """UserError for an impossible setting, and for one that has no effect beside the others."""
    configurator.check_range(globals(), 'limit', 0, 10 ** 9)
    configurator.check_range(globals(), 'stride', 0, 10 ** 9)
    configurator.check_range(globals(), 'batch_size', 1, 2 ** 20)
    configurator.check_range(globals(), 'rank_timeout', 1, 10 ** 7)

    of_tasks = [name for name in ('tasks', 'limit', 'chat', 'examples') if name in overrides]
    of_a_text = [name for name in ('per_token', 'stride') if name in overrides]
    if text and of_tasks:
        raise UserError(f'{of_tasks[0]} is for tasks, and --text={text} scores a text; name one')
    if of_a_text and not text:
        raise UserError(f'{of_a_text[0]} is for a text; name it with --text=FILE')
    for name, example in (('per_token', 'tokens.jsonl'), ('examples', 'examples.jsonl')):
        path = globals()[name]
        if path and Path(path).is_dir():
            raise UserError(f'{name}={path!r} is a folder; name a file, as in '
                            f'--{name}={Path(path) / example}')


def read_text(tokenizer, block_size):
    """The OwnText of the setting `text`."""
    configurator.check_range(globals(), 'stride', 0, block_size)
    apart = stride or math.ceil(block_size / 2)
    return load_own_text(text, tokenizer, block_size, apart)


def score_text(own_text, model, env):
    """Score the tokens of a text, write them to `per_token`, and print the table."""
    scorer = TextScorer(own_text, model, env, batch_size)
    lines = (line.to_json() for line in scorer.lines())
    if per_token and env.is_main:
        write_file(per_token, lines, advice='name another file with --per_token')
    else:
        for _ in lines:                                 # every rank reads its part of the text
            pass
    print_table(scorer.results())


def main(overrides):
    """overrides: the settings that a config file or a flag named."""
    log_to('stderr')
    check_settings(overrides)

    # the machine
    began = time.perf_counter()
    env = start_environment(device, dtype, timeout=rank_timeout)
    if env.dtype == 'float32':
        torch.set_float32_matmul_precision('highest')   # training takes TF32: 11 bits
    print0(configurator.describe_settings(overrides), file=sys.stderr)
    print_text(env.summary, file=sys.stderr)

    # the model and the tasks
    with env.raise_on_all_ranks():
        loaded_model = load_model(GPT, init_from, out_dir)
        model = loaded_model.model
        iter_num = loaded_model.iter_num
        tokenizer = Tokenizer(loaded_model.spec)
        block_size = model.config.block_size
        if text:
            own_text = read_text(tokenizer, block_size)
        else:
            if chat and loaded_model.chat is None:
                raise UserError('this model was trained on no conversations, so it has no layout '
                                'for --chat=True; leave it out')
            layout = loaded_model.chat if chat else None
            loaded, missing = load_tasks(tasks, Path(data), tokenizer, block_size, limit, layout)
    if loaded_model.description:
        print_text(loaded_model.description, file=sys.stderr)
    model.to(env.device)

    # a text
    if text:
        score_text(own_text, model, env)
        env.barrier()
        return

    # the scores of tasks
    lines = []                                          # of the file of examples
    listed = ', '.join(f'{task.name} ({len(task.examples):,} examples)' for task in loaded)
    print_text(f'scoring {listed}', file=sys.stderr)
    started = time.perf_counter()

    def keep_examples(task, scores):
        lines.extend(example_lines(task, scores))
        seconds = time.perf_counter() - started
        print0(f'{task.name} is scored, after {seconds:.0f} s', file=sys.stderr)
    results = evaluate_tasks(model, loaded, env, batch_size, missing, on_scores=keep_examples)

    # the table and the files
    if env.is_main:
        print_table(results)
        content = dict(
            results=results,
            iter_num=iter_num,
            seconds=round(time.perf_counter() - began, 3),
            model=str(out_dir if init_from == 'resume' else init_from),
            limit=limit,
            device=env.summary,
        )
        # The results of GPT-2 do not belong into the folder of somebody's run.
        if init_from == 'resume' or 'out_dir' in overrides:
            write_file(scores_path(out_dir), json.dumps(content, indent=2) + '\n')
        if examples:
            write_file(examples, lines)
    env.barrier()


if __name__ == '__main__':
    with hard_exit(), report_errors(), report_first_failure():
        main(configurator.configure(globals(), sys.argv[1:], path_setting='out_dir'))
