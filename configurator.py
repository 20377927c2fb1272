"""Config files and --key=value flags over a script's settings.

A setting is a global that a script assigns above its first function. Its name, default and trailing
comment are read from the source, so `--help` always agrees with the script. Its type is that of the
default; an annotation such as Literal['auto', True, False] names the values that it may have.
A script may add the fields of a dataclass, as train.py adds the options of the model: add_options.
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

from console import describe, print0, report_errors, terminal_width, wrap

from engine.errors import UserError, check_range, shorten  # noqa: F401, scripts use check_range

ROOT = Path(__file__).resolve().parent
TYPE_NAMES = {int: 'a whole number', float: 'a number', bool: 'True or False', str: 'text'}
CONSTANTS = {'None': None, 'True': True, 'False': False, 'true': True, 'false': False}
HELP_COLUMN = 30        # where the comments of --help begin

# What other programs call our settings, {their name: ours}.
OTHER_NAMES = dict(
    lr='learning_rate', steps='max_iters', max_steps='max_iters', context_length='block_size',
    max_seq_len='block_size', seq_len='block_size', data_dir='dataset', data_path='dataset',
    output_dir='out_dir', save_dir='out_dir', checkpoint_dir='out_dir', model='init_from',
    resume='init_from', resume_from_checkpoint='init_from', prompt='start',
    max_length='max_new_tokens')


class Setting(NamedTuple):
    default: object
    comment: str            # trailing, with the lines of comment below it in the same column
    group: str              # the last comment that began a line
    choices: tuple = ()     # all values that it may have; none where the type alone decides


# Reading settings from source

def read_settings(script):
    """{name: Setting} of what a script assigns above its first function or class, in order."""
    source = Path(script).read_text(encoding='utf-8')
    tree = ast.parse(source)
    settings = {}
    for node, comment, group in statements_with_comments(tree.body, source):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            break
        if is_call_of_add_options(node):
            options = read_options(tree, Path(script).parent, node.value, group)
            settings.update({option: setting for option, setting in options.items()
                             if option not in settings})
            continue
        name = assigned_name(node)
        if name.islower() and not name.startswith('_'):
            default = ast.literal_eval(node.value)
            settings[name] = Setting(default, comment, group, literals(node))
    return settings


def assigned_name(node):
    """The name that a statement such as `width = 3` or `width: int = 3` assigns, else ''."""
    target = None
    if isinstance(node, ast.Assign):
        target = node.targets[0]
    elif isinstance(node, ast.AnnAssign):
        target = node.target
    return target.id if isinstance(target, ast.Name) else ''


def statements_with_comments(body, source):
    """Yield (statement, its trailing comment, its group) of a module's or a class's body."""
    lines = source.splitlines()
    group = ''
    end_of_last = body[0].lineno - 1
    for node in body:
        # a heading is the last comment above that begins where statements begin
        margin = ' ' * node.col_offset + '# '
        for line in lines[end_of_last:node.lineno - 1]:
            if line.startswith(margin):
                group = line.removeprefix(margin)
        end_of_last = node.end_lineno

        # the comment behind the statement goes on in the lines below it, further to the right
        last_line = lines[node.end_lineno - 1].encode()     # Python counts columns in bytes
        parts = [last_line[node.end_col_offset:].decode().strip('# ')]
        for line in lines[node.end_lineno:]:
            indent = len(line) - len(line.lstrip())
            if indent <= node.col_offset or not line.strip().startswith('#'):
                break
            parts.append(line.strip('# '))
        yield node, ' '.join(parts).strip(), group


def add_options(namespace, dataclass, leave_out=()):
    """Add the fields of `dataclass` to a script's settings, at their defaults.

    Fields that the script assigns itself above the call, and those in leave_out, stay as they are.
    Returns the names of the added ones.
    """
    added = []
    for name, field in dataclass.__dataclass_fields__.items():
        if name not in namespace and name not in leave_out:
            namespace[name] = field.default
            added.append(name)
    return tuple(added)


def is_call_of_add_options(node):
    """True for the statement `NAMES = configurator.add_options(...)`."""
    return (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
            and ast.unparse(node.value.func) == 'configurator.add_options')


def read_options(tree, folder, call, group):
    """{name: Setting} of the fields that a call of add_options in the script `tree` adds."""
    class_name = call.args[1].id
    leave_out = ()
    for keyword in call.keywords:
        if keyword.arg == 'leave_out':
            leave_out = ast.literal_eval(keyword.value)
    module = next(node.module for node in tree.body if isinstance(node, ast.ImportFrom)
                  and any(alias.name == class_name for alias in node.names))

    source = (folder / f'{module}.py').read_text(encoding='utf-8')
    body = next(node.body for node in ast.parse(source).body
                if isinstance(node, ast.ClassDef) and node.name == class_name)
    return {
        node.target.id: Setting(ast.literal_eval(node.value), comment, group, literals(node))
        for node, comment, _ in statements_with_comments(body, source)
        if isinstance(node, ast.AnnAssign) and node.target.id not in leave_out}


def literals(node):
    """The values in the annotation `Literal[...]` of an assignment; none without one."""
    annotation = getattr(node, 'annotation', None)
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == 'Literal':
        return tuple(ast.literal_eval(ast.Tuple(annotation.slice.elts, ast.Load())))
    return ()


def snapshot(namespace):
    """The present settings of a script, {name: value}, from its globals."""
    return {name: namespace[name] for name in read_settings(namespace['__file__'])}


# Values

def convert(name, setting, value):
    """`value` as the type of the setting's default, or UserError with what was expected."""
    if setting.choices:
        if not any(type(value) is type(known) and value == known for known in setting.choices):
            raise UserError(f'{name}={shorten(value)} should be one of '
                            f'{", ".join(map(repr, setting.choices))}')
        return value
    expected = type(setting.default)
    if expected is float and type(value) is int and abs(value) < 1e300:
        return float(value)
    if type(value) is not expected:
        raise UserError(f'{name}={shorten(value)} should be {TYPE_NAMES[expected]}, '
                        f'such as the default {setting.default!r}')
    return value


def parse(setting, text):
    """What a flag's text means: itself for a text, else the Python literal that it spells."""
    if text in CONSTANTS and CONSTANTS[text] in setting.choices:
        return CONSTANTS[text]
    if type(setting.default) is str:
        return text
    if text in CONSTANTS:
        return CONSTANTS[text]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text                                 # convert() then says what was expected


# Config files

def unknown_setting(name, settings):
    """The UserError about the name of no setting."""
    advice = '--help lists them all'
    meant = nearest_setting(name, settings)
    if meant:
        advice = f'did you mean {meant}?'
    return UserError(f'there is no setting {shorten(name)}; {advice}')


def nearest_setting(name, settings):
    """The setting that `name` is likely to mean, or None.

    It is spelled nearly so, or other programs call it so, or it is the only one whose words are all
    in `name`, as patience is in early_stopping_patience.
    """
    close = difflib.get_close_matches(name, settings, n=1, cutoff=0.75)
    if close:
        return close[0]
    if OTHER_NAMES.get(name) in settings:
        return OTHER_NAMES[name]

    words = set(name.split('_'))
    contained = [known for known in settings if words >= set(known.split('_'))]
    if len(contained) == 1:
        return contained[0]
    return None


def find_config(name, path_setting=None):
    """A path as typed, or the bare name of a file in config/.

    path_setting: the setting that the name of a folder would set, for the message.
    """
    for path in (Path(name), ROOT / 'config' / name, ROOT / 'config' / f'{name}.py'):
        with suppress(OSError, ValueError):         # too long a name, or a NUL in it
            if path.is_file():
                return path

    if os.path.isdir(name):
        raise UserError(f'{shorten(name)} is a folder, and a config file is expected here; '
                        f'a folder follows the name of its setting, as in --out_dir={name}')

    what = 'config file'
    if path_setting:
        what = 'folder or config file'
    known = sorted(path.stem for path in (ROOT / 'config').glob('*.py'))
    close = difflib.get_close_matches(Path(name).stem, known, n=1)
    advice = f'config/ has {", ".join(known)}'
    if path_setting:                                # the name of a run is often like a config's
        advice = f'check the name, or see --help for {path_setting}'
    elif close:
        advice = f'did you mean {close[0]}?'
    raise UserError(f'there is no {what} {shorten(name)}; {advice}')


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
    except BaseException as error:                  # a config is a program: it may call sys.exit
        line = failing_line(error, path)
        raise UserError(f'{path}, line {line}: {describe(error)}') from None

    assigned, stored = stored_names(tree)
    overrides = {}
    for name, value in namespace.items():
        # assigned here, even to the same value; or changed by an import, as `from x import *` does
        is_override = name in settings and (name in stored or value is not values[name])
        try:
            if is_override:
                overrides[name] = convert(name, settings[name], value)
            elif name in assigned and looks_like_a_setting(name, value) and name not in settings:
                raise UserError(f"{unknown_setting(name, settings)} "
                                f"(a leading _ makes a name the file's own)")
        except UserError as error:
            raise UserError(f'{path}: {error}') from None
    return overrides


def failing_line(error, path):
    """The number of the line in the config file `path` that raised `error`."""
    line = getattr(error, 'lineno', None)           # of a SyntaxError
    if line:
        return line
    frames = traceback.extract_tb(error.__traceback__)
    return max((frame.lineno for frame in frames if frame.filename == str(path)), default=1)


def stored_names(tree):
    """Two sets of names: those that assignments of a file store, and all that it stores, such as
    the variables of loops too."""
    assigned, stored = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            stored.add(node.id)
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.NamedExpr)):
            assigned.update(target.id for target in ast.walk(node)
                            if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store))
    return assigned, stored


def looks_like_a_setting(name, value):
    is_plain = not isinstance(value, (types.FunctionType, type, types.ModuleType))
    return is_plain and name.islower() and not name.startswith('_')


# Help

def show_help(script, settings, usage):
    """Print a script's docstring, how to call it, and its settings in their groups.

    usage: the arguments that it takes before its settings.
    """
    width = terminal_width()
    typed = os.path.basename(script)
    if sys.argv[0].endswith(typed):
        typed = os.path.relpath(sys.argv[0])
    words = ['usage: python', typed, usage, '[--SETTING=VALUE ...]']

    # what it is for
    docstring = ast.get_docstring(ast.parse(Path(script).read_text('utf-8')))
    if docstring:
        for paragraph in docstring.split('\n\n'):
            print0(fit_paragraph(paragraph, width) + '\n')
    print0(' '.join(word for word in words if word))

    # its settings
    group = None
    for name, setting in settings.items():
        if setting.group != group:
            group = setting.group
            print0(f'\n{textwrap.fill(group, width)}' if group else '')
        print0(describe_setting(f'  --{name}={setting.default!r}', setting.comment, width))


def fit_paragraph(paragraph, width):
    """A paragraph of a docstring, in lines of `width` columns.

    Commands are indented and stay whole; the comment behind one may move to the line below it.
    """
    if not paragraph.startswith(' '):
        return textwrap.fill(' '.join(paragraph.split()), width)

    lines = []
    for line in paragraph.splitlines():
        command, separator, comment = line.partition('  # ')
        if separator and len(line) > width:
            line = f'{command.rstrip()}\n        # {comment}'
        lines.append(line)
    return '\n'.join(lines)


def describe_setting(flag, comment, width):
    """The lines of a setting in --help: the flag, and beside it the comment in a column."""
    lines = textwrap.wrap(comment, max(width - HELP_COLUMN, 20))
    if not lines:
        return flag
    first = textwrap.fill(flag, width, subsequent_indent='    ', break_on_hyphens=False)
    if len(flag) <= HELP_COLUMN - 2:                # otherwise the comment begins below the flag
        first = flag.ljust(HELP_COLUMN) + lines.pop(0)
    return '\n'.join([first, *(' ' * HELP_COLUMN + line for line in lines)])


def usage_of(script, positional, path_setting):
    """The arguments of a script before its settings, where it does not name them itself."""
    if positional is not None:
        return 'FOLDER ...'
    if path_setting:
        return f'[{path_setting.upper()}]'
    if Path(script).resolve().parent == ROOT:       # config/ lies beside it
        return '[CONFIG_FILE ...]'
    return None


# What scripts call

def configure(namespace, arguments, positional=None, path_setting=None, usage=None):
    """Apply config files and flags, from left to right, to the defaults of a script's settings.

    namespace: the script's globals(). arguments: the command line without the script's name.
    positional: a list that gets the arguments without dashes; None reads them as config files.
    path_setting: the setting that an argument without dashes sets where it is an existing path and
    no config file. usage: the arguments without dashes, for --help.
    Returns {name: value} of the settings that were named. Raises UserError for what is unknown or
    of the wrong type, before anything changes. --help prints and exits 0.
    """
    script = namespace['__file__']
    settings = read_settings(script)
    if '--help' in arguments or '-h' in arguments:
        show_help(script, settings, usage or usage_of(script, positional, path_setting))
        raise SystemExit(0)

    defaults = {name: setting.default for name, setting in settings.items()}
    overrides = {}
    paths = []
    for argument in arguments:
        if argument.startswith('-'):
            name, value = read_flag(argument, settings)
            overrides[name] = value
        elif positional is not None:
            positional.append(argument)
        elif path_setting and os.path.exists(argument) and not argument.endswith('.py'):
            paths.append(argument)
            overrides[path_setting] = argument
        else:
            path = find_config(argument, path_setting)
            overrides.update(run_config(path, settings, {**defaults, **overrides}))
    if len(paths) > 1:
        raise UserError(f'{" and ".join(map(shorten, paths))} both name {path_setting}; name one')

    # A program may configure a script more than once, as a notebook does.
    namespace.update(defaults)
    namespace.update(overrides)
    return overrides


def read_flag(argument, settings):
    """(name, value) of a flag such as --width=3."""
    name, equals, text = argument.lstrip('-').partition('=')
    if name not in settings:
        raise unknown_setting(name, settings)
    setting = settings[name]
    if not equals:
        raise UserError(f'{argument} lacks its value, as in --{name}={setting.default}')
    return name, convert(name, setting, parse(setting, text))


def restore_settings(namespace, saved, overrides, keep):
    """Put the settings of a saved run into a script's globals, but for `overrides` and `keep`.

    saved: {name: value}, perhaps of nanoGPT: unknown names and unusable values are skipped. Returns
    {name: (saved value, override)} of the overrides that differ.
    """
    settings = read_settings(namespace['__file__'])
    differences = {}
    for name, value in saved.items():
        if name not in settings or name in keep:
            continue
        try:
            value = convert(name, settings[name], value)
        except UserError:
            continue
        if name not in overrides:
            namespace[name] = value
        elif overrides[name] != value:
            differences[name] = value, overrides[name]
    return differences


def describe_settings(overrides):
    """The settings that were named, as lines that fit the terminal."""
    named = ', '.join(f'{name}={value!r}' for name, value in overrides.items())
    return wrap(f'settings: {named or "defaults"}')


# Scripts of nanoGPT's kind

def configure_globals(namespace, arguments):
    """Apply config files and flags to the globals of a script of nanoGPT's kind.

    Such a script does exec(open('configurator.py').read()) below its settings. Those may be
    computed, so they are found among its globals: numbers, texts, True and False. A mistake ends
    the script with one line.
    """
    settings = {name: Setting(value, '', '') for name, value in namespace.items()
                if type(value) in TYPE_NAMES and name.islower() and not name.startswith('_')}
    values = {name: setting.default for name, setting in settings.items()}

    with report_errors():
        for argument in arguments:
            if argument.startswith('-'):
                name, value = read_flag(argument, settings)
                values[name] = value
            else:
                values.update(run_config(find_config(argument), settings, values))
        namespace.update(values)


if Path(__file__).name != 'configurator.py':    # it is run in the globals of such a script
    import configurator
    configurator.configure_globals(globals(), sys.argv[1:])
