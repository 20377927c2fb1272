"""Config files and --key=value flags over a script's settings, and its errors as one line.

A setting is a plain global that a script assigns above its first function. Name, default
and trailing comment are read from the source itself, so `--help` cannot drift from it.
This file is the command line, so it alone among the libraries prints and exits.
"""

import ast
import difflib
import os
import sys
import textwrap
import time
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
MAIN_RANK = os.environ.get('RANK', '0') == '0'      # torchrun sets RANK; one rank speaks for all
KINDS = {int: 'a whole number', float: 'a number', bool: 'True or False', str: 'text'}
CONSTANTS = {'None': None, 'True': True, 'False': False, 'true': True, 'false': False}


class Setting(NamedTuple):
    default: object
    comment: str        # trailing, with the indented comment lines below it
    group: str          # the last comment that began a line


def read_settings(script):
    """{name: Setting} of what a script assigns above its first function or class, in order."""
    source = Path(script).read_text(encoding='utf-8')
    lines, settings, group, above = source.splitlines(), {}, '', 0
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            break
        headings = [line[2:] for line in lines[above:node.lineno - 1] if line.startswith('# ')]
        group, above = headings[-1] if headings else group, node.end_lineno
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            comment = [lines[above - 1][node.end_col_offset:].strip('# ')]
            for line in lines[above:]:
                if not line.startswith(' ') or not line.strip().startswith('#'):
                    break
                comment.append(line.strip('# '))
            if name.islower() and not name.startswith('_'):
                settings[name] = Setting(ast.literal_eval(node.value), ' '.join(comment), group)
    return settings


def snapshot(namespace):
    """The present settings of a script, {name: value}, from its globals."""
    return {name: namespace[name] for name in read_settings(namespace['__file__'])}


def convert(name, setting, value):
    """`value` as the type of the setting's default, or ValueError with what was expected.

    None, and True or False for a text, are taken where the comment mentions them.
    """
    wanted = type(setting.default)
    if wanted is float and type(value) is int:
        return float(value)
    named = value is None or type(value) is bool
    if type(value) is not wanted and not (named and str(value) in setting.comment):
        raise ValueError(f'{name}={value!r} should be {KINDS[wanted]}, '
                         f'such as the default {setting.default!r}')
    return value


def parse(setting, text):
    """What a flag's text means: itself for a text, else the Python literal that it spells."""
    if text in CONSTANTS and str(CONSTANTS[text]) in setting.comment:
        return CONSTANTS[text]
    if type(setting.default) is str:
        return text
    try:
        return CONSTANTS[text] if text in CONSTANTS else ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text                                 # convert() then says what was expected


def unknown(name, settings):
    close = difflib.get_close_matches(name, settings, n=1, cutoff=0.5)
    hint = f'did you mean {close[0]}?' if close else '--help lists them all'
    return ValueError(f'there is no setting {name!r}; {hint}')


def find_config(name):
    """A path as typed, or the bare name of a file in config/."""
    for path in (Path(name), ROOT / 'config' / name, ROOT / 'config' / f'{name}.py'):
        if path.is_file():
            return path
    known = sorted(path.stem for path in (ROOT / 'config').glob('*.py'))
    close = difflib.get_close_matches(Path(name).stem, known, n=1)
    raise ValueError(f'there is no config file {name!r}; '
                     + (f'did you mean {close[0]}?' if close else f'config/ has {", ".join(known)}'))


def run_config(path, settings, values):
    """{name: value} of what the config file at `path` assigns, given a copy of `values`."""
    namespace = dict(values, __file__=str(path), __name__='config')
    line = None
    try:
        tree = ast.parse(path.read_text(encoding='utf-8'), str(path))
        exec(compile(tree, str(path), 'exec'), namespace)
    except Exception as error:
        line = getattr(error, 'lineno', None) or max(
            (f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)), default=1)
        raise ValueError(f'{path}, line {line}: {type(error).__name__}: {error}') from None
    nodes = list(ast.walk(tree))
    imported = {(alias.asname or alias.name).split('.')[0] for node in nodes
                if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    assigned = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    given = {}
    for name, value in namespace.items():
        try:
            # assigned here, even to the same value; or changed by an import such as `from x import *`
            if name in settings and (name in assigned or value is not values[name]):
                given[name] = convert(name, settings[name], value)
            elif name not in settings and not name.startswith('_') and name not in imported:
                raise unknown(name, settings)
        except ValueError as error:
            raise ValueError(f'{path}: {error}') from None
    return given


def show_help(script, settings):
    print(ast.get_docstring(ast.parse(Path(script).read_text(encoding='utf-8'))))
    print(f'\nusage: python {os.path.basename(script)} [CONFIG_FILE ...] [--SETTING=VALUE ...]')
    group = None
    for name, setting in settings.items():
        if setting.group != group:
            print(f'\n{setting.group}')
        group = setting.group
        print(f'  {f"--{name}={setting.default!r}":<38}  {setting.comment}'.rstrip())


def configure(namespace, arguments):
    """Apply config files and flags, from left to right, to a script's globals.

    namespace: the script's globals(), whose settings are changed in place. arguments: the
    command line without the script's name. Returns {name: value} of what was given, so that
    a script can tell typed from default. Raises ValueError for what is unknown or of the
    wrong type; --help prints and exits 0.
    """
    settings = read_settings(namespace['__file__'])
    if '--help' in arguments or '-h' in arguments:
        if MAIN_RANK:
            show_help(namespace['__file__'], settings)
        raise SystemExit(0)
    given = {}
    for argument in arguments:
        if not argument.startswith('-'):
            values = {name: given.get(name, setting.default) for name, setting in settings.items()}
            given.update(run_config(find_config(argument), settings, values))
            continue
        name, equals, text = argument.lstrip('-').partition('=')
        if name not in settings:
            raise unknown(name, settings)
        if not equals:
            raise ValueError(f'{argument} lacks its value, as in --{name}={settings[name].default}')
        given[name] = convert(name, settings[name], parse(settings[name], text))
    namespace.update(given)
    if given and MAIN_RANK:
        print(textwrap.fill('settings: ' + ', '.join(f'{name}={value!r}' for name, value in given.items()), 110,
                            subsequent_indent='  ', break_long_words=False, break_on_hyphens=False))
    return given


@contextmanager
def plain_errors():
    """Turn failures into one line on stderr and an exit code: 2 for a person's mistake (a
    ValueError that this project raises), 1 for a failure while running (a RuntimeError of
    this project, or the system's own), 130 for Ctrl-C. The rest are bugs, with a traceback.
    """
    try:
        yield
    except BrokenPipeError:                         # `python sample.py | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None             # as SIGPIPE ends other programs: it may have been training
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        path = Path(last.filename).resolve()
        ours = path.is_relative_to(ROOT) and 'site-packages' not in path.parts and last.line.startswith('raise')
        out_of_memory = (type(error).__name__ == 'OutOfMemoryError' or isinstance(error, MemoryError)
                         or 'DefaultCPUAllocator' in str(error))
        if not (ours or isinstance(error, OSError) or out_of_memory):
            raise
        line = ' '.join(str(error).split()) or type(error).__name__
        if out_of_memory:
            line = f'out of memory; a smaller batch, or a smaller model, may fit ({line[:150]})'
        mistake = isinstance(error, ValueError)     # all ranks have it alike; a failure is one rank's own
        if MAIN_RANK or not mistake:
            where = '' if MAIN_RANK else f' rank {os.environ["RANK"]}:'
            print(f'{os.path.basename(sys.argv[0])}:{where} {line}', file=sys.stderr, flush=True)
        else:
            time.sleep(3)                           # torchrun ends all ranks with the first: let rank 0 speak
        raise SystemExit(2 if mistake else 1) from None
