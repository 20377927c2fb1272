"""Every command of the README: its script and settings exist, and it runs at toy size."""

import ast
import importlib
import re
import shlex
import shutil

import pytest
from harness import CAN_FORK, ROOT, SETTINGS, script_settings

import configurator
import train
from engine.metrics import bench_report, peers
from engine.training.settings_checks import check_training

README = (ROOT / 'README.md').read_text(encoding='utf-8')
BLOCKS = [block.replace('\\\n', ' ').strip()
          for block in re.findall(r'```sh\n(.*?)```', README, re.DOTALL)]


def script_and_arguments(command):
    """'torchrun --nproc_per_node=8 train.py --n_layer=2' to ('train.py', ['--n_layer=2'])."""
    words = shlex.split(command, comments=True)
    position = next(i for i, word in enumerate(words) if word.endswith('.py'))
    return words[position], words[position + 1:]


def find_commands():
    """The commands of all blocks that start a script, each once."""
    commands = []
    for line in '\n'.join(BLOCKS).splitlines():
        for command in line.split(' && '):
            command = re.sub(r' --node_rank=\d', '', command.strip())
            if re.search(r'^(python3?|torchrun) .*\w\.py\b', command) and command not in commands:
                commands.append(command)
    return commands


COMMANDS = find_commands()


def commands_of(script):
    return [c for c in COMMANDS if script_and_arguments(c)[0] == script and '--help' not in c]


def configured(script, arguments):
    """The settings of a script after its command line, {name: value}."""
    known = configurator.read_settings(ROOT / script)
    settings = {name: setting.default for name, setting in known.items()}
    settings['__file__'] = str(ROOT / script)
    positional = None
    if script in ('export.py', 'plot.py'):
        positional = []
    arguments = [argument for argument in arguments if argument != '--help']
    configurator.configure(settings, arguments, positional=positional)
    return settings


def needs_download(command):
    script, arguments = script_and_arguments(command)
    return str(configured(script, arguments).get('init_from', '')).startswith('gpt2')


def test_the_first_two_blocks_are_one_command_line_each_with_an_environment_of_their_own():
    first, second = BLOCKS[:2]
    environment = ('python3 -m venv .venv && . .venv/bin/activate && '
                   'pip install -r requirements.txt && python ')
    for block in (first, second):
        assert '\n' not in block
        assert block.startswith(environment)
    assert re.search(r'prepare\.py.* && python train\.py .* && python sample\.py ', first)
    assert second.endswith('python -m pytest -q -n auto')


def test_the_commands_are_found():
    """A block in another form would leave its commands untested."""
    lines = [line for block in BLOCKS for line in block.splitlines()
             if '.py' in line and not line.startswith('#')]
    assert lines
    assert all(re.match(r'python3? |torchrun ', line) for line in lines)
    scripts = {script_and_arguments(c)[0] for c in COMMANDS}
    assert scripts >= {'train.py', 'sample.py', 'bench.py', 'export.py', 'tests/chaos.py'}


@pytest.mark.parametrize('command', COMMANDS)
def test_the_script_and_settings_of_a_command_exist(command):
    script, arguments = script_and_arguments(command)
    assert (ROOT / script).is_file()
    settings = configured(script, arguments)
    if script == 'train.py':
        with script_settings(train):
            vars(train).update(settings)
            check_training(vars(train))


def test_what_is_timed_on_a_cpu_is_shakespeares_command_for_a_cpu():
    (command,) = [command for command in commands_of('train.py')
                  if 'train_shakespeare_char' in command and '--device=cpu' in command]
    settings = configured(*script_and_arguments(command))

    # the study of faster recipes, and the report of bench.py
    tree = ast.parse((ROOT / 'studies/recipe.py').read_text(encoding='utf-8'))
    (study,) = [node.value.func.value.value for node in tree.body
                if isinstance(node, ast.Assign) and node.targets[0].id == 'GPT2']
    report = bench_report.rows(ROOT, 'cpu', True, 'out')[-1].command
    for arguments in (study.split(), report[1:]):
        timed = configured('train.py', arguments)
        differing = {name for name in settings if timed[name] != settings[name]}
        assert differing <= {'log_interval', 'compile', 'out_dir', 'sample_tokens'}

    # bench.py --peers
    case = peers.CASES['shakespeare']
    assert case.batch_size == settings['batch_size']
    for name in ('n_layer', 'n_head', 'n_embd', 'block_size'):
        assert getattr(case.shape, name) == settings[name]


def test_commands_do_not_write_to_the_same_folder():
    """But for variants of one run by hardware or number of machines, of which a person uses one."""
    folders = {}
    for command in commands_of('train.py'):
        settings = configured(*script_and_arguments(command))
        if settings['init_from'] not in ('auto', 'resume') and not settings['eval_only']:
            folders.setdefault(settings['out_dir'], []).append(command)
    folders.pop('out-shakespeare-char')
    folders['out-gpt2'] = [c for c in folders.get('out-gpt2', []) if '--nnodes' not in c]
    assert all(len(commands) <= 1 for commands in folders.values()), folders


def run_train_command(workspace, command, out_dir):
    """Run a train command for a few iterations, with a toy model in out_dir."""
    _, arguments = script_and_arguments(command)
    max_iters = 3
    if configured('train.py', arguments)['init_from'] in ('auto', 'resume'):
        max_iters = 22                          # the run that it resumes has 20
    ranks = 1
    if command.startswith('torchrun'):
        ranks = 2

    replaced = ('--n_', '--device', '--dtype', '--out_dir')
    kept = [argument for argument in arguments if not argument.startswith(replaced)]
    # the toy dataset has no documents
    toy = dict(SETTINGS, out_dir=out_dir, wandb_log=False, max_iters=max_iters, documents='any')
    flags = [f'--{name}={value}' for name, value in toy.items()]
    workspace.run('train.py', *kept, *flags, ranks=ranks)


@pytest.mark.parametrize('command', [c for c in commands_of('train.py') if not needs_download(c)])
def test_a_train_command_runs_at_toy_size(trained, command):
    if command.startswith('torchrun') and not CAN_FORK:
        pytest.skip('two ranks are started by fork')
    out_dir = trained.folder / 'out-readme'
    shutil.rmtree(out_dir, ignore_errors=True)
    if '--init_from=resume' in command or '--init_from=auto' in command:
        shutil.copytree(trained.folder / 'out-toy', out_dir)
    run_train_command(trained, command, out_dir)
    assert (out_dir / 'state.pt').exists() or (out_dir / 'state').is_dir()


def test_the_first_block_can_be_repeated(trained):
    command = next(c for c in BLOCKS[0].split(' && ') if 'train.py' in c)
    for _ in range(2):
        run_train_command(trained, command, trained.folder / 'out-repeated')


@pytest.mark.parametrize('command', [c for c in commands_of('sample.py') if not needs_download(c)])
def test_a_sample_command_runs_at_toy_size(trained, command):
    _, arguments = script_and_arguments(command)
    (trained.folder / 'prompt.txt').write_text('abc')
    replaced = ('--start=', '--out_dir=', '--device=')
    arguments = [argument for argument in arguments
                 if argument.startswith('--start=FILE:') or not argument.startswith(replaced)]
    shown = trained.run('sample.py', *arguments, '--out_dir=out-toy', '--max_new_tokens=20',
                        '--device=cpu').stdout
    assert shown.count('---------------') == configured('sample.py', arguments)['num_samples']


@pytest.mark.parametrize('command', [c for c in commands_of('chat.py')
                                     if not needs_download(c) and '--port=' not in c])
def test_a_chat_command_runs_at_toy_size(trained, command):
    """Over an empty input. tests/chat has the answers and the page."""
    _, arguments = script_and_arguments(command)
    arguments = [argument for argument in arguments if not argument.startswith('--out_dir=')]
    result = trained.run('chat.py', *arguments, '--out_dir=out-toy', '--device=cpu')
    assert 'out-toy/ckpt.pt: the last model' in result.stderr and result.stdout == ''


@pytest.mark.parametrize('command', [c for c in commands_of('bench.py')
                                     if '--bench=data' not in c and '--peers' not in c])
def test_a_bench_command_runs_at_toy_size(workspace, command):
    """Those with --bench=data run in test_bench; they would encode 10 MB here too.

    So do those with --peers, which need another checkout.
    """
    _, arguments = script_and_arguments(command)
    arguments = [argument for argument in arguments
                 if not argument.startswith(('--report', '--device'))]
    workspace.run('bench.py', *arguments, '--device=cpu', '--n_layer=1', '--n_head=2',
                  '--n_embd=32', '--block_size=32', '--batch_size=2', '--vocab_size=50',
                  '--steps=2', '--warmup_steps=1', '--prompt_tokens=5', '--new_tokens=20')


@pytest.mark.parametrize('command', commands_of('export.py') + commands_of('plot.py'))
def test_a_command_for_folders_runs(trained, command):
    script, arguments = script_and_arguments(command)
    if script == 'export.py':
        pytest.importorskip('transformers')
        shutil.rmtree(trained.folder / arguments[-1], ignore_errors=True)
    trained.run(script, *[re.sub('^out-.*', 'out-toy', argument) for argument in arguments])


@pytest.mark.parametrize('command', [c for c in COMMANDS if '--help' in c])
def test_a_command_for_help_shows_the_settings(workspace, command):
    script, _ = script_and_arguments(command)
    assert '\nusage: python ' in workspace.run(script, '--help').stdout


def test_the_names_in_lines_of_python_exist():
    """What the block under `From Python` imports, and what it uses of those modules."""
    text = (ROOT / 'docs' / 'extending.md').read_text(encoding='utf-8')
    blocks = re.findall(r'## From Python\n+```python\n(.*?)```', text, re.DOTALL)
    (block,) = blocks
    nodes = list(ast.walk(ast.parse(block)))

    modules = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                modules[alias.asname or alias.name] = importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                assert hasattr(importlib.import_module(node.module), alias.name)

    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in modules:
                assert hasattr(modules[node.value.id], node.attr), ast.unparse(node)
