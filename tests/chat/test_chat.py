"""chat.py in the terminal and with a pipe."""

import errno
import io
import json
import re
import sys

import pytest
from chat_harness import SPEC, make_model
from harness import script_settings

import chat
from engine.chat.chat_model import ChatModel
from engine.chat_layout import ChatLayout
from engine.checkpoint import gathered
from engine.errors import UserError


@pytest.fixture(scope='module')
def run_folder(tmp_path_factory):
    """A run whose model has a chat layout."""
    folder = tmp_path_factory.mktemp('out-chat')
    gathered.write(folder / gathered.MODEL, dict(
        make_model().to_checkpoint(), iter_num=1, best_val_loss=1.0, config={},
        tokenizer=SPEC.to_dict(), chat=ChatLayout().to_dict()))
    return folder


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self):
        return True


def talk(monkeypatch, capsys, folder, typed, *flags, stream=io.StringIO):
    """(stdout, stderr) of chat.py over what is typed."""
    monkeypatch.setattr(sys, 'stdin', stream(typed))
    flags = ['--device=cpu', '--dtype=float32', '--max_new_tokens=20', *flags]
    with script_settings(chat, f'--out_dir={folder}', *flags) as overrides:
        chat.main(overrides)
    return capsys.readouterr()


def test_each_line_of_a_pipe_gets_an_answer(run_folder, monkeypatch, capsys):
    shown = talk(monkeypatch, capsys, run_folder, 'Hi\n\nBye')      # no newline at the end
    assert '> ' not in shown.out.replace('<|', '') and '\x1b' not in shown.out
    assert len(shown.out) == 2 * 21                                 # with their newlines
    assert shown.err.startswith("settings: out_dir='")
    assert f'{run_folder / "ckpt.pt"}: the last model, iteration 1' in shown.err
    assert talk(monkeypatch, capsys, run_folder, 'Hi\nBye\n').out == shown.out
    other = talk(monkeypatch, capsys, run_folder, 'Hi\nBye\n', '--seed=2').out
    assert other != shown.out


def test_commands(run_folder, monkeypatch, capsys, tmp_path):
    path = tmp_path / 'talk.jsonl'
    typed = f'Hi\n/retry\n/temperature 0\n/retry\n/retry\n/save {path}\n/new\nHi\n/quit\nHi\n'
    shown = talk(monkeypatch, capsys, run_folder, typed)
    answers = re.findall(r'[^\0]{20}\n', shown.out)
    assert ''.join(answers) == shown.out and len(answers) == 5
    assert answers[0] != answers[1] and answers[2] == answers[3] == answers[4]
    messages = json.loads(path.read_text(encoding='utf-8'))['messages']
    assert messages == [dict(role='user', content='Hi'),
                        dict(role='assistant', content=answers[3][:-1])]
    assert 'temperature is 0.0 now' in shown.err and f'wrote {path}' in shown.err


def test_help_lists_every_command_within_80_columns(run_folder, monkeypatch, capsys):
    shown = talk(monkeypatch, capsys, run_folder, '/help\n/top_k\n')
    lines = shown.err.partition('/new')[2].splitlines()
    assert max(map(len, lines)) <= 79 and '  /temperature 0.8' in lines
    assert lines[-1] == 'top_k is 200'
    for command in ('/retry', '/save FILE.jsonl', '/quit'):
        assert any(line.startswith(command) for line in lines)


@pytest.mark.parametrize('typed, said', [
    ('/retry', 'there is no answer yet'), ('/save', 'needs the name of a file'),
    ('/temperature hot', "temperature='hot' should be a number"),
    ('/temperature {[]: 1}', "temperature='{[]: 1}' should be a number"),
    ('/top_p 2', 'top_p=2.0 should be at most 1 and above 0'),
    ('/nonsense', 'there is no command /nonsense'), ('/', 'there is no command /'),
    ('☺', "'☺' is not in the vocabulary"), ('x' * 300, 'shorten it')])
def test_a_mistake_is_told_and_the_conversation_goes_on(run_folder, monkeypatch, capsys, typed,
                                                        said):
    shown = talk(monkeypatch, capsys, run_folder, f'{typed}\nHi\n')
    assert said in shown.err and len(shown.out) == 21


def test_a_terminal_gets_a_prompt_and_ctrl_c_ends_an_answer_only(run_folder, monkeypatch, capsys):
    """Ctrl-C comes with the fifth part of the first answer, then in place of a line, and then twice
    in place of one."""
    answer = ChatModel.answer
    n_parts = 0

    def interrupted(self, *arguments):
        nonlocal n_parts
        for part in answer(self, *arguments):
            n_parts += 1
            if n_parts == 5:
                raise KeyboardInterrupt
            yield part

    typed = ['Hi', KeyboardInterrupt, 'Bye', KeyboardInterrupt, KeyboardInterrupt]
    prompts = []

    def type_line(prompt):
        prompts.append(prompt)
        line = typed.pop(0)
        if line is KeyboardInterrupt:
            raise line
        return line

    monkeypatch.setattr(ChatModel, 'answer', interrupted)
    monkeypatch.setattr('builtins.input', type_line)
    terminal = Terminal()
    monkeypatch.setattr(sys, 'stdout', terminal)
    talk(monkeypatch, capsys, run_folder, '', stream=Terminal)
    assert prompts == ['> '] * 5 and not typed
    shown = terminal.getvalue()
    assert ' (stopped)\n' in shown and shown.endswith('\n')
    assert len(shown) < 4 + len(' (stopped)\n') + 21 + 4


def test_a_model_without_a_layout_continues_the_text(run_folder, monkeypatch, capsys, tmp_path):
    gathered.write(tmp_path / gathered.MODEL, dict(
        make_model().to_checkpoint(), iter_num=1, best_val_loss=1.0, config={},
        tokenizer=SPEC.to_dict()))
    shown = talk(monkeypatch, capsys, tmp_path, 'Hi\n')
    assert 'note: this model was trained on no conversations, so it continues' in shown.err
    assert len(shown.out) == 21
    assert 'no conversations' not in talk(monkeypatch, capsys, run_folder, 'Hi\n').err


def test_a_taken_port_is_one_line_with_another(run_folder, server, monkeypatch, capsys):
    with pytest.raises(UserError, match='no page can be served .*in use.*try --host=127.0.0.1'):
        talk(monkeypatch, capsys, run_folder, '', f'--port={server.server_port}')


def test_the_advice_on_a_taken_port_keeps_the_page_open_to_other_machines(
        run_folder, monkeypatch, capsys):
    def refuse(*arguments):
        raise OSError(errno.EADDRINUSE, 'Address already in use')
    monkeypatch.setattr(chat, 'ChatServer', refuse)
    with pytest.raises(UserError, match='try --host=0.0.0.0 --port=8000$'):
        talk(monkeypatch, capsys, run_folder, '', '--host=0.0.0.0', '--port=1024')


def test_an_empty_host_does_not_open_the_page_to_every_machine(run_folder, monkeypatch, capsys):
    with pytest.raises(UserError, match="host='' is no address; try --host=127.0.0.1"):
        talk(monkeypatch, capsys, run_folder, '', '--port=8000', '--host=')


def test_the_page_is_served_until_ctrl_c(run_folder, monkeypatch, capsys):
    served = []

    def serve_forever(self):
        served.append((self.host, self.name, self.answers))
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.ChatServer, 'server_bind', lambda self: None)
    monkeypatch.setattr(chat.ChatServer, 'server_activate', lambda self: None)
    monkeypatch.setattr(chat.ChatServer, 'serve_forever', serve_forever)
    shown = talk(monkeypatch, capsys, run_folder, '', '--port=8000')
    (host, name, answers), = served
    assert (host, name) == ('127.0.0.1', run_folder.name)
    assert not answers.thread.is_alive()
    assert 'http://127.0.0.1:8000 has the page' in shown.err
