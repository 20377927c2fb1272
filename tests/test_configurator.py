import dataclasses
import runpy
import sys

import pytest
from harness import ROOT

import configurator
from engine.errors import UserError
from model import GPTConfig

SCRIPT = '''"""A script.

    python script.py
"""
import math
from typing import Literal
# size
width = 4               # channels; more is slower
                        # and better
rate = 1e-3
# names
name = 'a=b'            # text, or None
fast: Literal['auto', True, False] = 'auto'     # whether it hurries
quiet = False


def main():
    hidden = 3
'''


@pytest.fixture
def script(tmp_path):
    """The globals of a small script."""
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT)
    settings = dict(width=4, rate=1e-3, name='a=b', fast='auto', quiet=False)
    return dict(settings, __file__=str(path))


def write_config(script, text):
    path = script['__file__'].replace('script.py', 'some_config.py')
    if isinstance(text, str):
        text = text.encode()
    with open(path, 'wb') as file:
        file.write(text)
    return path


# Settings

def test_files_and_flags_apply_from_left_to_right(script):
    file = write_config(script, 'width = 8\nrate = 1')
    overrides = configurator.configure(script, ['--width=6', '--rate=0.5', file, '--rate=2'])
    assert overrides == {'width': 8, 'rate': 2.0}
    assert type(overrides['rate']) is float
    assert (script['width'], script['rate'], script['name']) == (8, 2.0, 'a=b')


@pytest.mark.parametrize('flag, name, value', [
    ('--name=x=y', 'name', 'x=y'),
    ('--name=', 'name', ''),
    ('--name=5', 'name', '5'),
    ('--name=None', 'name', 'None'),            # a comment's word changes no type
    ('--fast=False', 'fast', False),
    ('--fast=true', 'fast', True),
    ('--quiet=true', 'quiet', True),
    ('--quiet=False', 'quiet', False),
    ('--rate=3', 'rate', 3.0),
    ('--width=-2', 'width', -2),
])
def test_a_flag_means_what_it_spells(script, flag, name, value):
    configurator.configure(script, [flag])
    assert script[name] == value
    assert type(script[name]) is type(value)


@pytest.mark.parametrize('flag, words', [
    ('--widht=3', "there is no setting 'widht'; did you mean width"),
    ('--padding_side=3', "there is no setting 'padding_side'; --help lists them all"),
    ('--width=3.5', 'width=3.5 should be a whole number'),
    ('--width=None', 'width=None should be a whole number'),
    ('--width=wide', "width='wide' should be a whole number"),
    ('--rate=fast', "rate='fast' should be a number"),
    ('--quiet=1', 'True or False'),
    ('--quiet=yes', 'True or False'),
    ('--width', '--width lacks its value, as in --width=4'),
    ('--width=', 'whole number'),
    ('--__file__=x', 'no setting'),
    ('--main=1', 'no setting'),
    ('--rate=' + '[' * 9999, 'a number'),
    ('nowhere.py', "no config file 'nowhere.py'"),
    ('a\0b', 'no config file'),
    ('x' * 9999, 'no config file'),
])
def test_a_mistake_is_named(script, flag, words):
    before = dict(script)
    with pytest.raises(UserError, match=words):
        configurator.configure(script, ['--rate=1', flag])
    assert script == before                                     # nothing is half applied


@pytest.mark.parametrize('flag', ['--fast=maybe', '--fast=None', '--fast=1'])
def test_a_value_that_an_annotation_does_not_name_is_refused(script, flag):
    with pytest.raises(UserError, match="should be one of 'auto', True, False"):
        configurator.configure(script, [flag])


def test_fields_of_a_dataclass_are_settings_with_their_comments_and_values(tmp_path, capsys):
    """As the options of the model are in train.py, which does not list them."""
    (tmp_path / 'shapes.py').write_text(
        'from dataclasses import dataclass\n'
        'from typing import Literal\n'
        '@dataclass\n'
        'class Shape:\n'
        '    width: int = 3              # channels\n'
        '    size: int = 5               # of the data\n'
        "    kind: Literal['a', 'b'] = 'a'\n"
        '                                # what it is: a is\n'
        '                                # the usual one\n'
        '    deep: bool = False          # True has layers\n')
    path = tmp_path / 'script.py'
    path.write_text(
        'from shapes import Shape\n'
        'width = 4                   # channels of ours\n'
        '# of the shape\n'
        "OPTIONS = configurator.add_options(globals(), Shape, leave_out=('size',))\n"
        '# rest\n'
        'last = 1.0\n')
    namespace = {'__file__': str(path), 'width': 4, 'last': 1.0}
    sys.path.insert(0, str(tmp_path))
    try:
        from shapes import Shape
    finally:
        sys.path.remove(str(tmp_path))

    added = configurator.add_options(namespace, Shape, leave_out=('size',))
    assert added == ('kind', 'deep')
    assert configurator.snapshot(namespace) == dict(width=4, kind='a', deep=False, last=1.0)
    overrides = configurator.configure(namespace, ['--kind=b', '--deep=True'])
    assert overrides == dict(kind='b', deep=True)
    assert (namespace['kind'], namespace['deep']) == ('b', True)
    with pytest.raises(UserError, match="kind='c' should be one of 'a', 'b'"):
        configurator.configure(namespace, ['--kind=c'])

    with pytest.raises(SystemExit):
        configurator.configure(namespace, ['--help'])
    shown = capsys.readouterr().out
    assert shown.index('\nof the shape\n') < shown.index("--kind='a'") < shown.index('\nrest\n')
    assert 'what it is: a is the usual one' in shown
    assert '--size' not in shown


def test_a_comment_is_read_whole_behind_letters_of_several_bytes(tmp_path):
    path = tmp_path / 'script.py'
    path.write_text("name = 'äöüäöü'  # whose name it is\n", encoding='utf-8')
    assert configurator.read_settings(path)['name'].comment == 'whose name it is'


def test_every_option_of_the_model_is_a_setting_of_train_py():
    """But for the vocabulary, which the data decide."""
    settings = configurator.read_settings(configurator.ROOT / 'train.py')
    fields = {field.name for field in dataclasses.fields(GPTConfig)}
    assert fields - set(settings) == {'vocab_size'}
    assert all(settings[name].comment for name in fields - {'vocab_size'})


@pytest.mark.parametrize('script, typed, meant', [
    ('train.py', 'early_stopping_patience', 'patience'),
    ('train.py', 'data_dir', 'dataset'),
    ('train.py', 'lr', 'learning_rate'),
    ('train.py', 'output_dir', 'out_dir'),
    ('train.py', 'n_layers', 'n_layer'),
    ('sample.py', 'prompt', 'prompts'),
    ('sample.py', 'data_dir', None),
    ('train.py', 'gradient_checkpointing', None),
    ('train.py', 'padding_side', None),
    ('train.py', 'epochs', None),
])
def test_a_guess_is_near_or_is_not_made(script, typed, meant):
    settings = configurator.read_settings(configurator.ROOT / script)
    assert configurator.nearest_setting(typed, settings) == meant


def test_a_second_configuration_begins_with_the_defaults(script):
    configurator.configure(script, ['--width=6', '--quiet=True'])
    assert configurator.configure(script, ['--rate=0.5']) == {'rate': 0.5}
    assert configurator.snapshot(script) == dict(
        width=4, rate=0.5, name='a=b', fast='auto', quiet=False)


def test_an_existing_path_is_a_setting_where_a_script_says_so(script, tmp_path):
    folder = tmp_path / 'out-mine'
    folder.mkdir()
    config = write_config(script, 'width = 7')
    overrides = configurator.configure(script, [str(folder), config], path_setting='name')
    assert overrides == dict(name=str(folder), width=7)

    with pytest.raises(UserError, match='both name name; name one'):
        configurator.configure(script, [str(folder), str(tmp_path)], path_setting='name')
    with pytest.raises(UserError, match="no folder or config file 'out-none'"):
        configurator.configure(script, ['out-none'], path_setting='name')
    with pytest.raises(UserError, match='check the name, or see --help for name$'):
        configurator.configure(script, ['out-shakespeare-char'], path_setting='name')
    with pytest.raises(UserError, match='is a folder, and a config file is expected here'):
        configurator.configure(script, [str(folder)])


def test_positional_arguments_are_folders_where_a_script_takes_them(script):
    folders = []
    arguments = ['out-a', '--width=5', 'out-b']
    assert configurator.configure(script, arguments, positional=folders) == {'width': 5}
    assert folders == ['out-a', 'out-b']


def test_a_config_is_python_over_a_copy_of_the_defaults(script):
    file = write_config(script, '''
import math
from os import path as p
_half = width // 2
width = _half + int(math.sqrt(9))
quiet = __file__.endswith("some_config.py")
''')
    assert configurator.configure(script, [file]) == {'width': 5, 'quiet': True}


@pytest.mark.parametrize('text, words', [
    ('width = 1\nwdith = 2', "there is no setting 'wdith'; did you mean width"),
    ('width =', 'line 1: SyntaxError'),
    ('width = 1\nrate = = 1', 'line 2: SyntaxError'),
    ('width = 1\nrate = 1 / 0', 'line 2: ZeroDivisionError: division'),
    ('rate = "high"', "rate='high' should be a number"),
    ('\n\nwidth = "four"', "width='four' should be a whole number"),
    ('width = True', 'whole number'),
    ('fast = None', 'should be one of'),
    ('import sys\nsys.exit(0)', 'line 2: SystemExit'),
    ('x\0y', ''),
    (b'width = 4 # \xff\xfe', 'UnicodeDecodeError'),
])
def test_a_mistake_in_a_config_names_the_file(script, text, words):
    with pytest.raises(UserError, match=f'some_config.py.*{words}'):
        configurator.configure(script, [write_config(script, text)])


def test_a_setting_named_at_its_default_counts_as_an_override(script):
    file = write_config(script, 'width = 4')
    overrides = configurator.configure(script, [file, '--quiet=False'])
    assert overrides == {'width': 4, 'quiet': False}


def test_bare_names_are_found_in_config():
    assert configurator.find_config('eval_gpt2').name == 'eval_gpt2.py'
    for name in ('train_shakespear_char', 'train_shakespeare_chars'):
        with pytest.raises(UserError, match='did you mean train_shakespeare_char'):
            configurator.find_config(name)


@pytest.mark.parametrize('limits, words', [
    (dict(low=5), 'width=4 should be at least 5'),
    (dict(high=3), 'width=4 should be at most 3'),
    (dict(low=5, high=1000000), 'at least 5 and at most 1,000,000'),
    (dict(above=4), 'above 4'),
    (dict(below=4), 'below 4'),
])
def test_a_value_out_of_its_range_is_refused(script, limits, words):
    configurator.check_range(script, 'width rate', -1, 4)
    with pytest.raises(UserError, match=words):
        configurator.check_range(script, 'width', **limits)
    with pytest.raises(UserError, match='rate=nan'):
        configurator.check_range(dict(script, rate=float('nan')), 'rate')


def test_saved_settings_come_back_but_for_overrides_and_those_of_this_command(script):
    saved = dict(width=9, rate=0.5, name='saved', quiet=True, unknown=1, fast=7)
    overrides = configurator.configure(script, ['--width=6', '--rate=0.5'])
    differences = configurator.restore_settings(script, saved, overrides, keep=('name',))
    assert differences == {'width': (9, 6)}
    assert configurator.snapshot(script) == dict(
        width=6, rate=0.5, name='a=b', fast='auto', quiet=True)
    assert 'unknown' not in script


def test_the_settings_are_told_in_lines_of_a_terminal(monkeypatch):
    monkeypatch.setenv('COLUMNS', '60')
    assert configurator.describe_settings({}) == 'settings: defaults'

    lines = configurator.describe_settings({f'setting_{i}': i for i in range(20)}).splitlines()
    assert len(lines) > 1
    assert all(len(line) <= 60 for line in lines)
    together = ', '.join(f'setting_{i}={i}' for i in range(20))
    assert ' '.join(line.strip() for line in lines) == 'settings: ' + together


# Help

def test_help_shows_every_setting_with_its_comment(script, capsys):
    with pytest.raises(SystemExit) as end:
        configurator.configure(script, ['--help'])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    places = [shown.index(text) for text in (
        '\nsize\n', '--width=4', '\nnames\n', "--name='a=b'")]
    assert places == sorted(places)
    assert ' '.join(shown.split()).count('channels; more is slower and better') == 1
    assert 'hidden' not in shown
    assert 'python script.py' in shown


@pytest.mark.parametrize('script, lines', [
    ('train.py', ['--learning_rate=0.0006', '--max_iters=600000',
                  'usage: python train.py [CONFIG_FILE ...] [--SETTING=VALUE ...]']),
    ('sample.py', ['--top_k=200', 'usage: python sample.py [OUT_DIR] [--SETTING=VALUE ...]']),
    ('bench.py', ['--profile=False']),
    ('plot.py', ["--picture=''", 'usage: python plot.py RUN ...']),
    ('export.py', ['usage: python export.py RUN TARGET [--SETTING=VALUE ...]']),
    ('data/stdlib_char/prepare.py', ['usage: python data/stdlib_char/prepare.py ']),
    ('data/text/prepare.py', ['usage: python data/text/prepare.py [INPUT] [--SETTING=VALUE ...]']),
])
def test_the_real_scripts_show_their_settings(workspace, script, lines):
    shown = workspace.run(script, '--help').stdout
    assert all(line in shown for line in lines), shown
    assert workspace.run(script, '--no_such_setting=1', code=2).stderr.count('\n') == 1


@pytest.mark.parametrize('columns', [60, 80, 100])
@pytest.mark.parametrize('name', ['train.py', 'sample.py', 'evaluate.py', 'scaling.py'])
def test_help_fits_the_terminal(name, columns, monkeypatch, capsys):
    """But for commands and long defaults, which fit 80 columns."""
    monkeypatch.setenv('COLUMNS', str(columns))
    with pytest.raises(SystemExit):
        configurator.configure({'__file__': str(configurator.ROOT / name)}, ['--help'])
    lines = capsys.readouterr().out.splitlines()
    texts = [line for line in lines if not line.startswith(('    ', '  --', 'usage'))
             or line.startswith(' ' * configurator.HELP_COLUMN)]
    assert len(texts) > 10
    assert max(map(len, texts)) <= columns
    assert max(map(len, lines)) <= max(columns, 80)


def test_help_begins_with_what_most_runs_set(capsys):
    with pytest.raises(SystemExit):
        configurator.configure({'__file__': str(configurator.ROOT / 'train.py')}, ['--help'])
    groups = capsys.readouterr().out.split('usage:')[1].split('\n\n')
    flags = [line for line in groups[1].splitlines() if line.startswith('  --')]
    assert groups[1].startswith('what most runs set\n')
    assert len(flags) == 10
    assert {'  --dataset', '  --out_dir', '  --max_iters'} <= {f.partition('=')[0] for f in flags}


def test_a_config_is_an_ordinary_python_file(script):
    """With a byte order mark, helpers, constants, loop variables and star imports of its own."""
    path = write_config(script, '''\ufefffrom math import *
import os
N = 64
class Helper: pass
def twice(x):
    return 2 * x
for i in range(3):
    _last = i
width = twice(N) + _last
''')
    assert configurator.configure(script, [path]) == {'width': 130}


# Scripts of nanoGPT's kind

OLD_SCRIPT = """
import os
batch_size = 6 * 2
learning_rate = 6e-4
device = 'cuda' if os.environ.get('NO_SUCH_VARIABLE') else 'cpu'
compile = True
config_keys = [k for k, v in globals().items()
               if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
exec(open('configurator.py').read())
config = {k: globals()[k] for k in config_keys}
"""


def run_old_script(tmp_path, monkeypatch, *arguments):
    """The `config` of OLD_SCRIPT at the end."""
    (tmp_path / 'old.py').write_text(OLD_SCRIPT)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'argv', ['old.py', *arguments])
    return runpy.run_path(str(tmp_path / 'old.py'), run_name='__main__')['config']


def test_a_script_that_runs_the_configurator_gets_its_flags(tmp_path, monkeypatch):
    file = tmp_path / 'some.py'
    file.write_text('batch_size = 3\nlearning_rate = 1')
    defaults = dict(batch_size=12, learning_rate=6e-4, device='cpu', compile=True)
    assert run_old_script(tmp_path, monkeypatch) == defaults

    arguments = [str(file), '--compile=False', '--device=cuda:1', '--batch_size=5']
    found = run_old_script(tmp_path, monkeypatch, *arguments)
    assert found == dict(batch_size=5, learning_rate=1.0, device='cuda:1', compile=False)


@pytest.mark.parametrize('argument, words', [
    ('--bach_size=5', "there is no setting 'bach_size'; did you mean batch_size?"),
    ('--batch_size=many', "batch_size='many' should be a whole number"),
])
def test_a_mistake_in_its_flags_ends_the_script(tmp_path, monkeypatch, capsys, argument, words):
    with pytest.raises(SystemExit) as stopped:
        run_old_script(tmp_path, monkeypatch, argument)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert words in error and error.count('\n') == 1
