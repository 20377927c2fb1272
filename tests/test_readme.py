"""Every command of the README: its scripts exist, its settings are known, and it runs at toy size."""

import re
import shlex
import shutil

import pytest
from conftest import ROOT, TINY

import configurator

BLOCKS = re.findall(r'```sh\n(.*?)```', (ROOT / 'README.md').read_text(encoding='utf-8'), re.DOTALL)
COMMANDS = [command for block in BLOCKS for line in block.splitlines() for command in line.split(' && ')]
NETWORK = ('gpt2-xl', 'eval_gpt2', 'finetune_shakespeare', '--dataset=shakespeare ', 'data/openwebtext', 'data/shakespeare',
           '--dataset=mine', 'data/text')             # need a download or GPT-2's encoding
SMALL = [a for a in TINY if not a.startswith('--dataset')]


def test_the_first_two_blocks_are_one_command_line_each():
    first, second = (block.strip() for block in BLOCKS[:2])
    assert '\n' not in first and '\n' not in second
    assert first.startswith('pip install') and 'train.py' in first and 'sample.py' in first
    assert second.startswith('pip install') and 'pytest' in second


@pytest.mark.parametrize('command', [c for c in COMMANDS if '.py' in c])
def test_scripts_and_settings_of_a_command_exist(command):
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.endswith('.py'))
    script, arguments = ROOT / words[at], words[at + 1:]
    assert script.is_file()
    if arguments != ['--help'] and script.name not in ('hf.py', 'metrics.py'):
        settings = {name: setting.default for name, setting in configurator.read_settings(script).items()}
        configurator.configure({**settings, '__file__': str(script)}, arguments)


def test_blocks_do_not_collide():
    """No two commands that train from scratch or finetune write to the same folder, but for the one
    command of a first result that has variants by hardware."""
    folders = {}
    for command in COMMANDS:
        words = shlex.split(command)
        if 'train.py' in words and '--help' not in words and '--init_from=auto' not in words and 'eval_gpt2' not in command:
            script = ROOT / 'train.py'
            settings = {name: setting.default for name, setting in configurator.read_settings(script).items()}
            settings['__file__'] = str(script)
            configurator.configure(settings, words[words.index('train.py') + 1:])
            folders.setdefault(settings['out_dir'], set()).add(re.sub(r'--node_rank=\d', '', command))
    variants = folders.pop('out-shakespeare-char')
    assert len(variants) == 3                           # GPU, CPU and Mac: a person has one of them
    folders['out-gpt2'] = {c for c in folders['out-gpt2'] if '--nnodes' not in c}       # or on several machines
    assert all(len(commands) == 1 for commands in folders.values()), folders


@pytest.mark.parametrize('command', [c for c in COMMANDS if re.match(r'python (train|sample|bench)\.py', c)
                                     and not any(word in c for word in NETWORK)])
def test_a_command_runs_at_toy_size(trained, command):
    script, *arguments = shlex.split(command)[1:]
    if script == 'train.py':
        arguments = [a for a in arguments if not a.startswith(('--n_', '--device'))]
        out_dir = trained.folder / 'out-readme'
        shutil.rmtree(out_dir, ignore_errors=True)      # test_blocks_do_not_collide sees to the real ones
        trained.run(script, *arguments, *SMALL, '--dataset=toy', '--max_iters=3', '--warmup_iters=0',
                    '--wandb_log=False', f'--out_dir={out_dir}')
        assert '--help' in arguments or (out_dir / 'state.pt').exists()
    elif script == 'sample.py':
        (trained.folder / 'prompt.txt').write_text('def ')
        shown = trained.run(script, *[a for a in arguments if not a.startswith('--start=R')], '--out_dir=out-toy',
                            '--max_new_tokens=20', '--device=cpu').stdout
        assert shown.count('---------------') == (3 if '--num_samples=3' in arguments else 10)
    else:
        trained.run(script, *arguments, '--device=cpu', '--n_layer=1', '--n_head=2', '--n_embd=32', '--block_size=32',
                    '--vocab_size=50', '--steps=2', '--warmup_steps=1', '--prompt_tokens=5', '--new_tokens=20')
