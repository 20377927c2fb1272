"""Pickles of plain values, read without running anything that they name.

nanoGPT's meta.pkl is one. Checkpoints are read by PyTorch's own unpickler, which takes numbers of
numpy as this one does.
"""

import io
import pickle
import struct
from typing import Any, NoReturn

from engine.errors import UserError

LONGEST_TEXT = 10_000       # characters of a numpy.str_, of which each use makes a copy
LARGEST_KEY = 2 ** 60       # a larger int may have the hash of many others
MOST_ARGUMENTS = 3          # what any name of NAMES is called with

# Formats of struct for the numbers that numpy has, by numpy's names of them
NUMPY_FORMATS = dict(b1='?', i1='b', i2='h', i4='i', i8='q', u1='B', u2='H', u4='I', u8='Q',
                     f2='e', f4='f', f8='d')

# The opcodes that are read as pickle's own unpickler in Python reads them
PLAIN_OPCODES = (
    'PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE '
    'INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT '
    'STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 '
    'BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_LIST LIST APPEND APPENDS '
    'EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT EMPTY_SET '
    'GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL'
)


def load_plain(content: bytes) -> Any:
    """The value of a pickle that holds containers, texts and numbers only.

    An OrderedDict or a defaultdict becomes a dict, and a number or text of numpy one of Python.
    Raises UserError for every other pickle, without running what it names. Memory and time are in
    proportion to the size of `content`.
    """
    try:
        return PlainUnpickler(io.BytesIO(content), encoding='latin-1').load()
    except UserError:
        raise
    except KeyError:
        raise UserError('it is damaged, or holds more than plain values') from None
    except Exception as error:          # a damaged pickle can raise anything
        reason = ' '.join(str(error).split())[:100]
        raise UserError(f'it is damaged ({type(error).__name__}: {reason})') from None


# A pickle gets these in place of what it names

class NumpyType:
    """Stands for numpy.dtype, so that no code of numpy reads what a file says."""

    def __init__(self, name, *rest):
        self.name = name
        self.order = '<'

    def __setstate__(self, state):
        if state[1] == '>':                         # the bytes of a machine with the other order
            self.order = '>'


def numpy_number(kind, content):
    """A number of numpy as Python's own. It stands for numpy's function that makes a scalar.

    kind: a NumpyType. content: the bytes of the number.
    """
    try:
        value, = struct.unpack(kind.order + NUMPY_FORMATS[kind.name], content)
    except (AttributeError, KeyError, TypeError, struct.error):
        raise UserError('it holds a value of numpy that is not a number') from None
    return value


def numpy_scalar(kind, content):
    """A number or a text of numpy as Python's own; see `numpy_number`."""
    name = getattr(kind, 'name', None)
    if not isinstance(name, str) or not name.startswith('U'):
        return numpy_number(kind, content)

    if type(content) is not bytes or len(content) > 4 * LONGEST_TEXT:
        raise UserError(f'it holds a text of numpy that is no text of at most {LONGEST_TEXT:,} '
                        f'characters')
    encoding = 'utf-32-le'
    if kind.order == '>':
        encoding = 'utf-32-be'
    return content.decode(encoding).rstrip('\0')


def encode_latin1(text, encoding):
    """The bytes of a number of numpy, which protocols before 3 hold as a text."""
    if encoding != 'latin1' or len(text) > 4 * LONGEST_TEXT:
        raise UserError('it asks to run _codecs.encode')
    return text.encode('latin-1')


def plain_dict(factory=None):
    """An empty dict, for an OrderedDict and for a defaultdict, whatever its factory is.

    Its items come later. Python 2 writes an OrderedDict with a list of them in place of a factory.
    """
    if isinstance(factory, list):
        raise UserError('it holds an OrderedDict of Python 2; save a plain dict')
    return {}


def plain_list(items=()):
    """Stands for `set`, which protocols before 4 call on a list. The list itself is returned."""
    return items


HARMLESS = object()         # stands for the factory of a defaultdict; it cannot be called
FACTORIES = ('int', 'long', 'float', 'str', 'unicode', 'list', 'dict')
BUILTINS = ('builtins', '__builtin__')      # the second one is of protocols below 3
NAMES = {
    'collections.OrderedDict': plain_dict,
    'collections.defaultdict': plain_dict,
    'numpy.dtype': NumpyType,
    'numpy._core.multiarray.scalar': numpy_scalar,
    'numpy.core.multiarray.scalar': numpy_scalar,               # before numpy 2
    '_codecs.encode': encode_latin1,
    **{f'{module}.set': plain_list for module in BUILTINS},
    **{f'{module}.{name}': HARMLESS for module in BUILTINS for name in FACTORIES},
}


# The unpickler

PLAIN_DISPATCH = {
    getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
    for name in PLAIN_OPCODES.split()
}


class PlainUnpickler(pickle._Unpickler):
    """Python's own unpickler in Python, with the opcodes of plain values alone.

    The one in C reserves as much memory as a few bytes of a pickle ask for.
    """

    def find_class(self, module, name):
        found = NAMES.get(f'{module}.{name}')
        if found is None:
            shown = ' '.join(f'{module}.{name}'.split())[:100]
            raise UserError(f'it asks to run {shown}')
        return found

    def load_reduce(self):
        arguments = self.stack.pop()
        if type(arguments) is not tuple or len(arguments) > MOST_ARGUMENTS:
            refuse_arguments()
        function = self.stack[-1]
        if not callable(function):
            refuse_arguments()
        self.stack[-1] = function(*arguments)

    def load_build(self):
        state = self.stack.pop()
        if type(self.stack[-1]) is not NumpyType:
            raise UserError('it holds an object that is no plain value')
        self.stack[-1].__setstate__(state)

    def load_setitem(self):
        value = self.stack.pop()
        key = self.stack.pop()
        self.stack[-1][checked_key(key)] = value

    def load_setitems(self):
        items = self.pop_mark()
        self.stack[-1].update(to_dict(items))

    def load_dict(self):
        items = self.pop_mark()         # which replaces self.append
        self.append(to_dict(items))

    def load_additems(self):
        items = self.pop_mark()
        self.stack[-1].update(map(checked_key, items))

    dispatch = PLAIN_DISPATCH | {
        pickle.REDUCE[0]: load_reduce,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.ADDITEMS[0]: load_additems,
    }


def refuse_arguments() -> NoReturn:
    raise UserError('it calls what no plain value needs')


def to_dict(items):
    """The dict of a list of keys and values in turn."""
    return {checked_key(key): value for key, value in zip(items[::2], items[1::2])}


def checked_key(key):
    """`key`, if it is text, a number, or a tuple of these. UserError for any other key.

    The hash of a deep tuple overflows the stack, and ints can be chosen to share one hash.
    """
    parts = [key]
    if type(key) is tuple:
        parts = key
    for part in parts:
        if not isinstance(part, (str, bytes, int, float, type(None))):
            raise UserError(f'it has a {type(part).__name__} in the key of a dict')
        if isinstance(part, int) and abs(part) > LARGEST_KEY:
            raise UserError('it has a number in the key of a dict that is no id')
    return key
