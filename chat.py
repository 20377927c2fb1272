"""Talk to a trained model, or to GPT-2: in the terminal, or on a page in the browser.

    python chat.py out-chat
    python chat.py --init_from=gpt2 --temperature=0.7
    python chat.py --out_dir=out-chat --port=8000       # a page at http://127.0.0.1:8000
    python chat.py out-chat < questions.txt > answers.txt

A model that was trained on conversations answers; any other one continues the text. In the
terminal, each line is a message, /help lists the commands, Ctrl-C ends an answer, and Ctrl-D
leaves. The answers go to stdout, everything else to stderr.
"""

import ast
import errno
import sys
from contextlib import closing, suppress
from dataclasses import asdict, fields
from pathlib import Path

from console import log_to, print0, print_text, report_errors  # before torch: see console.py

import configurator
from engine.chat.chat_model import AnswerSettings, ChatModel
from engine.chat.conversation import Conversation
from engine.chat.server import ChatServer
from engine.checkpoint.load_model import load_model
from engine.device import DTYPES
from engine.distributed import start_environment
from engine.errors import UserError
from engine.generation.cpu import optimize_for_generation
from engine.tokenizer import Tokenizer
from model import GPT

# model
init_from = 'resume'        # resume (the model in out_dir), the folder of a run, gpt2, gpt2-medium,
                            # gpt2-large, gpt2-xl, another hub name, or a folder of Hugging Face
                            # weights, with their tokenizer
out_dir = 'out'             # where ckpt.pt lies; or a kept model, as out/ckpt_001000.pt
# answers
max_new_tokens = 500        # at most, per answer
temperature = 0.8           # 1 samples as trained, less is safer, 0 takes the likeliest token
top_k = 200                 # sample among the k likeliest tokens; 0 among all
top_p = 1.0                 # sample among the likeliest tokens that make up this probability
min_p = 0.0                 # sample among tokens at least this times as likely as the likeliest;
                            # 0 among all
repetition_penalty = 1.0    # above 1 makes tokens that the text already has less likely
seed = 1337                 # fixes the random numbers of the first answer, the second, and so on
# page
port = 0                    # port of the page, such as 8000; 0 talks in the terminal
host = '127.0.0.1'          # address of the page; 0.0.0.0 lets other machines reach it, and anyone
                            # on them can then use the model
max_readers = 8             # answers that are computed at once; each needs memory for its cache
# machine
device = 'auto'             # auto, cuda, cuda:1, mps or cpu
dtype = 'auto'              # auto, float32, bfloat16 or float16

HELP = '''\
/new               begin a new conversation
/retry             answer the last message again
/save FILE.jsonl   write the conversation, as data/text/prepare.py reads it
/quit              leave, as Ctrl-D does; Ctrl-C ends an answer
/NAME VALUE        change a setting of the answers; the present ones are'''


def answer_settings():
    """The AnswerSettings that the settings of this script make."""
    return AnswerSettings(**{field.name: globals()[field.name] for field in fields(AnswerSettings)})


def check_settings():
    check = configurator.check_range
    check(globals(), 'seed', 0, 2 ** 63 - 1)
    check(globals(), 'port', 0, 65535)
    check(globals(), 'max_readers', 1, 64)
    if not host:                                        # it would stand for every address
        raise UserError("host='' is no address; try --host=127.0.0.1, or --host=0.0.0.0 for other "
                        'machines too')
    answer_settings()                                   # raises UserError for a bad one


def make_chat_model(env):
    """(the ChatModel, a line for people that says which model it is)."""
    loaded = load_model(GPT, init_from, out_dir)
    loaded.model.to(env.device, DTYPES[env.dtype]).eval()
    if env.device.type == 'cpu':
        optimize_for_generation(loaded.model, 1)
    chat_model = ChatModel(loaded.model, Tokenizer(loaded.spec), loaded.chat, seed)
    return chat_model, loaded.description or f'the model {init_from}'


# In the terminal

def talk(conversation):
    """Read messages and commands, and print answers, until the end of the input."""
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        print_text('Type a message, or /help. Ctrl-C ends an answer, Ctrl-D leaves.',
                   file=sys.stderr)
        with suppress(ImportError):                     # Windows has no readline
            import readline  # noqa: F401, input() then keeps a history

    while (line := read_line(is_terminal)) is not None:
        try:
            if line.strip() == '/quit':
                break
            if line.startswith('/'):
                run_command(conversation, line)
            elif line.strip():
                print_answer(conversation.ask(line))
        except UserError as error:
            print_text(str(error), file=sys.stderr)


def read_line(is_terminal):
    """A line of stdin; None at its end, and where Ctrl-C is typed twice in place of one."""
    if not is_terminal:
        try:
            return input()
        except (EOFError, KeyboardInterrupt):
            return None

    # The first Ctrl-C may have come too late for the end of an answer.
    try:
        return input('> ')
    except EOFError:
        pass
    except KeyboardInterrupt:
        print0()
        print_text('Ctrl-C again, or Ctrl-D, leaves.', file=sys.stderr)
        with suppress(EOFError, KeyboardInterrupt):
            return input('> ')
    print0()
    return None


def print_answer(parts):
    """Print an answer as it grows. Ctrl-C ends it."""
    try:
        with closing(parts):
            for part in parts:
                print(part, end='', flush=True)
        print(flush=True)
    except KeyboardInterrupt:
        print(' (stopped)', flush=True)


def run_command(conversation, line):
    """Do what a line such as '/temperature 0.7' says. UserError for one that says nothing."""
    name, _, argument = line[1:].strip().partition(' ')
    argument = argument.strip()
    settings = asdict(conversation.settings)

    if name == 'new':
        conversation.begin_anew()
        print_text('a new conversation', file=sys.stderr)
    elif name == 'retry':
        print_answer(conversation.retry())
    elif name == 'save' and argument:
        conversation.save(argument)
        print_text(f'wrote {argument}', file=sys.stderr)
    elif name == 'save':
        raise UserError('/save needs the name of a file, as in /save talk.jsonl')
    elif name == 'help':
        lines = [f'/{setting} {value}' for setting, value in settings.items()]
        print0('\n  '.join([HELP, *lines]), file=sys.stderr)
    elif name in settings and argument:
        conversation.settings = conversation.settings.changed({name: read_number(argument)})
        print_text(f'{name} is {getattr(conversation.settings, name)} now', file=sys.stderr)
    elif name in settings:
        print_text(f'{name} is {settings[name]}', file=sys.stderr)
    else:
        raise UserError(f'there is no command /{name:.40}; /help lists them')


def read_number(text):
    """The number that a text spells, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


# On a page

def serve(chat_model, settings, name):
    """Serve the page until Ctrl-C."""
    try:
        server = ChatServer(host, port, chat_model, settings, name, max_readers)
    except (OSError, UnicodeError) as error:
        other_host = '127.0.0.1'
        if getattr(error, 'errno', None) == errno.EADDRINUSE:
            other_host = host
        other_port = port - 1
        if other_port < 1024:                           # these need special rights
            other_port = 8000
        raise UserError(f'no page can be served at host={host!r}, port={port} ({error}); try '
                        f'--host={other_host} --port={other_port}') from None

    shown_host = host
    if ':' in host:
        shown_host = f'[{host}]'
    print_text(f'http://{shown_host}:{port} has the page; Ctrl-C ends it', file=sys.stderr)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print0(file=sys.stderr)
    finally:
        server.server_close()


def page_name():
    """What the page calls the model: the folder of its run, or its name on the hub."""
    source = init_from
    if init_from == 'resume':
        source = out_dir
    return Path(source).name or source


def main(overrides):
    """overrides: the settings that a config file or a flag named."""
    log_to('stderr')
    check_settings()
    env = start_environment(device, dtype)

    # the model on its device
    print0(configurator.describe_settings(overrides), file=sys.stderr)
    print_text(env.summary, file=sys.stderr)
    chat_model, description = make_chat_model(env)
    print_text(description, file=sys.stderr)
    if chat_model.layout is None:
        print_text('note: this model was trained on no conversations, so it continues your text',
                   file=sys.stderr)

    if port:
        serve(chat_model, answer_settings(), page_name())
        return
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, 'reconfigure'):              # a notebook has other kinds of streams
            stream.reconfigure(errors='replace')
    talk(Conversation(chat_model, answer_settings()))


if __name__ == '__main__':
    with report_errors():
        main(configurator.configure(globals(), sys.argv[1:], path_setting='out_dir'))
