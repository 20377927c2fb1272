"""Config files and --key=value flags over a script's settings.

A setting is a global that a script assigns above its first function. Its name, default and
trailing comment are read from the source, so `--help` always agrees with the script.
"""

import ast
import difflib
import os
import sys
import textwrap
import traceback
import types
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from console import describe, print0

from engine.errors import UserError, check_range, shorten  # noqa: F401  scripts call configurator.check_range

ROOT = Path(__file__).resolve().parent
TYPE_NAMES = {int: 'a whole number', float: 'a number', bool: 'True or False', str: 'text'}
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
    """`value` as the type of the setting's default, or UserError with what was expected.
    None, and True or False for a text, are accepted where the comment mentions them."""
    expected = type(setting.default)
    if expected is float and type(value) is int and abs(value) < 1e300:
        return float(value)
    is_constant = value is None or type(value) is bool
    if type(value) is not expected and not (is_constant and str(value) in setting.comment):
        raise UserError(f'{name}={shorten(value)} should be {TYPE_NAMES[expected]}, such as the default {setting.default!r}')
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


def unknown_setting(name, settings):
    close = difflib.get_close_matches(name, settings, n=1, cutoff=0.5)
    return UserError(f'there is no setting {name!r}; ' + (f'did you mean {close[0]}?' if close else '--help lists them all'))


def find_config(name):
    """A path as typed, or the bare name of a file in config/."""
    for path in (Path(name), ROOT / 'config' / name, ROOT / 'config' / f'{name}.py'):
        with suppress(OSError, ValueError):         # too long a name, or a NUL in it
            if path.is_file():
                return path
    known = sorted(path.stem for path in (ROOT / 'config').glob('*.py'))
    close = difflib.get_close_matches(Path(name).stem, known, n=1)
    raise UserError(f'there is no config file {shorten(name)}; '
                    + (f'did you mean {close[0]}?' if close else f'config/ has {", ".join(known)}'))


def run_config(path, settings, values):
    """{name: value} of what the config file at `path` assigns, when run over a copy of `values`.

    Functions, classes, modules, loop variables, imported names, names with a leading underscore and
    names in capitals are the file's own. Any other unknown name is a misspelled setting: UserError.
    """
    namespace = dict(values, __file__=str(path), __name__='config')
    try:
        tree = ast.parse(path.read_text(encoding='utf-8-sig'), str(path))
        exec(compile(tree, str(path), 'exec'), namespace)
    except KeyboardInterrupt:
        raise
    except BaseException as error:                  # a config is a program: it may even call sys.exit
        line = getattr(error, 'lineno', None) or max(
            (f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)), default=1)
        raise UserError(f'{path}, line {line}: {describe(error)}') from None
    nodes = list(ast.walk(tree))
    assigned = {target.id for node in nodes if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.NamedExpr))
                for target in ast.walk(node) if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store)}
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    overrides = {}
    for name, value in namespace.items():
        try:
            # assigned here, even to the same value; or changed by an import such as `from x import *`
            if name in settings and (name in stored or value is not values[name]):
                overrides[name] = convert(name, settings[name], value)
            elif (name in assigned and name not in settings and name.islower() and not name.startswith('_')
                    and not isinstance(value, (types.FunctionType, type, types.ModuleType))):
                raise UserError(f'{unknown_setting(name, settings)} (a leading _ makes a name the file\'s own)')
        except UserError as error:
            raise UserError(f'{path}: {error}') from None
    return overrides


def show_help(script, settings, positional):
    typed = os.path.relpath(sys.argv[0]) if sys.argv[0].endswith(os.path.basename(script)) else os.path.basename(script)
    print0(ast.get_docstring(ast.parse(Path(script).read_text(encoding='utf-8'))))
    print0(f'\nusage: python {typed} {"CONFIG_FILE ..." if positional is None else "FOLDER ..."} [--SETTING=VALUE ...]')
    group = None
    for name, setting in settings.items():
        if setting.group != group:
            print0(f'\n{setting.group}' if setting.group else '')
        group = setting.group
        print0(f'  {f"--{name}={setting.default!r}":<38}  {setting.comment}'.rstrip())


def configure(namespace, arguments, positional=None):
    """Apply config files and flags, from left to right, to a script's globals.

    namespace: the script's globals(). arguments: the command line without the script's name.
    positional: a list that gets the arguments without dashes; None reads them as config files.
    Returns {name: value} of the settings that were named. Raises UserError for what is unknown or
    of the wrong type, before anything changes. --help prints and exits 0.
    """
    settings = read_settings(namespace['__file__'])
    if '--help' in arguments or '-h' in arguments:
        show_help(namespace['__file__'], settings, positional)
        raise SystemExit(0)
    overrides = {}
    for argument in arguments:
        if not argument.startswith('-'):
            if positional is not None:
                positional.append(argument)
                continue
            values = {name: overrides.get(name, setting.default) for name, setting in settings.items()}
            overrides.update(run_config(find_config(argument), settings, values))
            continue
        name, equals, text = argument.lstrip('-').partition('=')
        if name not in settings:
            raise unknown_setting(name, settings)
        if not equals:
            raise UserError(f'{argument} lacks its value, as in --{name}={settings[name].default}')
        overrides[name] = convert(name, settings[name], parse(settings[name], text))
    namespace.update(overrides)
    return overrides


def restore_settings(namespace, saved, overrides, keep):
    """Put the settings of a saved run into a script's globals, but for those in `overrides` and `keep`.

    saved: {name: value}, perhaps of nanoGPT: unknown names and unusable values are skipped. Returns
    {name: (saved value, override)} of the overrides that differ.
    """
    settings, differences = read_settings(namespace['__file__']), {}
    for name, value in saved.items():
        if name in settings and name not in keep:
            with suppress(UserError):
                value = convert(name, settings[name], value)
                if name not in overrides:
                    namespace[name] = value
                elif overrides[name] != value:
                    differences[name] = value, overrides[name]
    return differences


def describe_settings(overrides):
    """The settings that were named, as a wrapped line for the log."""
    text = 'settings: ' + (', '.join(f'{name}={value!r}' for name, value in overrides.items()) or 'defaults')
    return textwrap.fill(text, 110, subsequent_indent='  ', break_long_words=False, break_on_hyphens=False)
