import pytest

import configurator

SCRIPT = '''"""A script.

    python script.py
"""
import math
# size
width = 4               # channels; more is slower
                        # and better
rate = 1e-3
# names
name = 'a=b'            # text, or None
fast = 'auto'           # auto, True or False
quiet = False


def main():
    hidden = 3
'''


@pytest.fixture
def script(tmp_path):
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT)
    return {'__file__': str(path), 'width': 4, 'rate': 1e-3, 'name': 'a=b', 'fast': 'auto', 'quiet': False}


def config(script, text):
    path = script['__file__'].replace('script.py', 'some_config.py')
    with open(path, 'w') as file:
        file.write(text)
    return path


def test_files_and_flags_apply_from_left_to_right(script):
    file = config(script, 'width = 8\nrate = 1')
    given = configurator.configure(script, ['--width=6', '--rate=0.5', file, '--rate=2'])
    assert given == {'width': 8, 'rate': 2.0} and type(given['rate']) is float
    assert (script['width'], script['rate'], script['name']) == (8, 2.0, 'a=b')


@pytest.mark.parametrize('flag, name, value', [
    ('--name=x=y', 'name', 'x=y'), ('--name=', 'name', ''), ('--name=5', 'name', '5'), ('--name=None', 'name', None),
    ('--fast=False', 'fast', False), ('--fast=true', 'fast', True), ('--quiet=true', 'quiet', True),
    ('--quiet=False', 'quiet', False), ('--rate=3', 'rate', 3.0), ('--width=-2', 'width', -2)])
def test_a_flag_means_what_it_spells(script, flag, name, value):
    configurator.configure(script, [flag])
    assert script[name] == value and type(script[name]) is type(value)


@pytest.mark.parametrize('flag, words', [
    ('--widht=3', 'did you mean width'), ('--width=3.5', 'whole number'), ('--width=None', 'whole number'),
    ('--width=wide', 'whole number'), ('--rate=fast', 'a number'), ('--quiet=1', 'True or False'), ('--width', '--width=4'),
    ('--width=', 'whole number'), ('--__file__=x', 'no setting'), ('--main=1', 'no setting'), ('nowhere.py', 'nowhere.py')])
def test_a_mistake_is_named(script, flag, words):
    before = dict(script)
    with pytest.raises(ValueError, match=words):
        configurator.configure(script, ['--rate=1', flag])
    assert script == before                                     # nothing is half applied


def test_a_config_is_python_over_a_copy_of_the_defaults(script):
    file = config(script, 'import math\nfrom os import path as p\n_half = width // 2\nwidth = _half + int(math.sqrt(9))\n'
                          'quiet = __file__.endswith("some_config.py")')
    assert configurator.configure(script, [file]) == {'width': 5, 'quiet': True}


@pytest.mark.parametrize('text, words', [
    ('width = 1\nwdith = 2', 'did you mean width'), ('width =', 'line 1'), ('width = 1\nrate = 1 / 0', 'line 2.*division'),
    ('rate = "high"', 'a number'), ('width = True', 'whole number'), ('fast = None', 'text')])
def test_a_mistake_in_a_config_names_the_file(script, text, words):
    with pytest.raises(ValueError, match=f'some_config.py.*{words}'):
        configurator.configure(script, [config(script, text)])


def test_a_setting_given_at_its_default_counts_as_given(script):
    assert configurator.configure(script, [config(script, 'width = 4'), '--quiet=False']) == {'width': 4, 'quiet': False}


def test_help_shows_every_setting_with_its_comment(script, capsys):
    with pytest.raises(SystemExit) as end:
        configurator.configure(script, ['--help'])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert shown.index('\nsize\n') < shown.index('--width=4') < shown.index('\nnames\n') < shown.index("--name='a=b'")
    assert 'channels; more is slower and better' in shown and 'hidden' not in shown and 'python script.py' in shown


def test_bare_names_are_found_in_config():
    assert configurator.find_config('eval_gpt2').name == 'eval_gpt2.py'
    with pytest.raises(ValueError, match='did you mean train_shakespeare_char'):
        configurator.find_config('train_shakespear_char')


@pytest.mark.parametrize('script, name, default', [('train.py', 'learning_rate', 6e-4), ('train.py', 'max_iters', 600000),
                                                   ('sample.py', 'top_k', 200), ('bench.py', 'profile', False)])
def test_the_real_scripts_show_their_settings(workspace, script, name, default):
    shown = workspace.run(script, '--help').stdout
    assert f'--{name}={default}' in shown
    assert workspace.run(script, f'--{name}x=1', code=2).stderr.count('\n') == 1
