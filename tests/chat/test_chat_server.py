"""The page's server: what readers get, and what hostile requests get."""

import http.client
import json
import re
import socket
import threading
import time
from contextlib import closing

import pytest
from chat_harness import SETTINGS, make_chat_model

from engine.chat.server import MAX_BODY, MAX_CONNECTIONS, PAGE, is_own_name
from engine.chat_layout import Turn
from engine.generation.kv_cache import TextCache

JSON = {'Content-Type': 'application/json'}


def connect(server):
    return closing(http.client.HTTPConnection('127.0.0.1', server.server_port, timeout=20))


def get(server, path, **headers):
    """(status, headers, body) of a GET."""
    with connect(server) as connection:
        connection.request('GET', path, headers=headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read().decode()


def question(*texts, **settings):
    """The body of a question: texts of the user and the assistant in turns."""
    messages = [dict(role=('user', 'assistant')[i % 2], content=text)
                for i, text in enumerate(texts)]
    return json.dumps(dict(messages=messages, settings=settings))


def ask(server, *texts, **settings):
    """(status, lines) of a question, read to its end."""
    with connect(server) as connection:
        connection.request('POST', '/answer', question(*texts, **settings), JSON)
        response = connection.getresponse()
        return response.status, [json.loads(line) for line in response.read().splitlines()]


def text_of(lines):
    return ''.join(line.get('text', '') for line in lines)


# Readers

def test_the_page_has_no_outside_resource_and_says_so(server):
    status, headers, page = get(server, '/')
    assert status == 200 and page == PAGE.read_text(encoding='utf-8')
    assert not re.search(r'https?:|@import|url\(|innerHTML|insertAdjacent|document\.write', page)
    assert re.findall(r'(?:src|href)="(.*?)"', page) == ['data:,']

    policy = headers['Content-Security-Policy']
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert policy.count("'sha256-") == 2 and 'unsafe' not in policy
    assert headers['X-Content-Type-Options'] == 'nosniff'


def test_the_model_tells_its_name_and_settings(server):
    status, _, body = get(server, '/model')
    assert status == 200
    assert json.loads(body) == dict(name='toy', answers=True, settings=dict(
        temperature=0.8, top_k=200, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
        max_new_tokens=20))


def test_an_answer_streams_and_has_the_text_that_the_model_gives(server):
    turns = [Turn('user', 'Hi'), Turn('assistant', 'Ho'), Turn('user', '<b>é</b>')]
    prompt = server.chat_model.prompt(turns, 30)
    settings = SETTINGS.changed(dict(temperature=0, max_new_tokens=30))
    expected = ''.join(make_chat_model().answer(prompt, settings,
                                                TextCache(server.chat_model.model)))
    status, lines = ask(server, 'Hi', 'Ho', '<b>é</b>', temperature=0, max_new_tokens=30)
    assert status == 200 and text_of(lines) == expected and len(expected) == 30
    assert lines[0] == dict(dropped=0) and lines[-1] == dict(end=True)
    # again, which the cache of the first answer serves
    assert text_of(ask(server, 'Hi', 'Ho', '<b>é</b>', temperature=0, max_new_tokens=30)[1]) \
        == expected
    assert text_of(ask(server, 'Hi')[1]) != text_of(ask(server, 'Hi')[1])       # a retry


def test_dropped_turns_are_told(server):
    status, lines = ask(server, *['Hello, you'] * 21)
    assert status == 200 and lines[0]['dropped'] > 5


def test_what_the_model_cannot_read_is_an_error_with_its_reason(server):
    status, (line,) = ask(server, '☺')
    assert status == 400 and "the character '☺' is not in the vocabulary" in line['error']
    status, (line,) = ask(server, 'x' * 300)
    assert status == 400 and 'shorten it' in line['error']


class Reader:
    """A reader of a long answer."""

    def __init__(self, server, text):
        self.connection = http.client.HTTPConnection('127.0.0.1', server.server_port, timeout=20)
        body = question(text, max_new_tokens=60000)
        self.connection.request('POST', '/answer', body, JSON)
        self.response = self.connection.getresponse()

    def read_lines(self, n):
        return [json.loads(self.response.readline()) for _ in range(n)]

    def close(self):
        self.response.close()
        self.connection.close()


def test_two_readers_progress_together_and_a_third_is_asked_to_wait(server):
    with closing(Reader(server, 'a')) as first, closing(Reader(server, 'b')) as second:
        for _ in range(5):
            assert 'end' not in str(first.read_lines(3)) + str(second.read_lines(3))
        status, (line,) = ask(server, 'c')
        assert status == 503 and 'try again in a moment' in line['error']
    ask_until_served(server)


def ask_until_served(server):
    """Ask until a place is free, which a reader who went leaves soon."""
    deadline = time.monotonic() + 10
    while ask(server, 'd')[0] == 503:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_computing_stops_when_its_reader_goes(server, monkeypatch):
    steps = []
    take_step = server.answers.take_step
    monkeypatch.setattr(server.answers, 'take_step',
                        lambda answer: steps.append(None) or take_step(answer))
    reader = Reader(server, 'a')
    reader.read_lines(5)
    reader.close()
    deadline = time.monotonic() + 10
    n_steps = -1
    while n_steps != len(steps):
        assert time.monotonic() < deadline
        n_steps = len(steps)
        time.sleep(0.1)
    assert n_steps < 30000


def test_conversations_of_several_readers_never_mix(server):
    names = ['Ann', 'Bob', 'Eve', 'Kim']
    texts = {}
    for name in names:
        texts[name] = text_of(ask(server, f'I am {name}', temperature=0)[1])
    assert len(set(texts.values())) == len(names)

    wrong = []

    def read(name):
        for _ in range(2):
            status = 503
            while status == 503:
                time.sleep(0.02)
                status, lines = ask(server, f'I am {name}', temperature=0)
            if text_of(lines) != texts[name]:
                wrong.append((name, lines))

    threads = [threading.Thread(target=read, args=[name]) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize('host, own, is_fine', [
    ('127.0.0.1:8000', '127.0.0.1', True), ('localhost:8000', '127.0.0.1', True),
    ('[::1]:8000', '::1', True), ('10.0.0.7', '0.0.0.0', True), ('box.lan:1', 'box.lan', True),
    ('LOCALHOST', '127.0.0.1', True), ('evil.example:8000', '127.0.0.1', False),
    ('evil.example', '0.0.0.0', False), ('127.0.0.1.evil.example', '127.0.0.1', False),
    ('127.0.0.1:8000@evil.example', '127.0.0.1', False), ('', '127.0.0.1', False),
    ('localhost:8000, evil.example', '127.0.0.1', False), ('[::1', '::1', False)])
def test_a_host_is_this_server_by_an_address_or_its_own_name(host, own, is_fine):
    assert is_own_name(host, own) is is_fine


# Hostile requests

OWN = 'Host: 127.0.0.1\r\n'
TYPE = 'Content-Type: application/json\r\n'


def post(body, headers=OWN + TYPE, length=None, path='/answer'):
    """The bytes of a POST."""
    if isinstance(body, str):
        body = body.encode()
    if length is None:
        length = len(body)
    head = f'POST {path} HTTP/1.1\r\n{headers}Content-Length: {length}\r\n\r\n'
    return head.encode('latin-1') + body


def messages(content):
    return post(json.dumps(dict(messages=content)))


GOOD = question('Hi')
LATE = 408          # stands for a connection that is closed without an answer
HOSTILE = {
    # the request line
    'http 0.9': (b'GET /\r\n\r\n', None),
    'no version': (b'POST /answer\r\n\r\n', 400),
    'unknown version': (b'GET / HTTP/9.9\r\n\r\n', 505),
    'broken version': (b'GET / HTTP/one\r\n\r\n', 400),
    'one word': (b'GET\r\n\r\n', 400),
    'binary': (bytes(range(128, 256)) + b'\r\n\r\n', 400),
    'tls': (b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03' + bytes(40) + b'\r\n\r\n', 400),
    'long line': (b'GET /' + b'a' * 70000 + b' HTTP/1.1\r\n\r\n', 414),
    'no newline': (b'G' * 70000, 414),
    'empty line': (b'\r\n', LATE),
    # methods
    'put': (b'PUT /answer HTTP/1.1\r\n' + OWN.encode() + b'\r\n', 501),
    'delete': (b'DELETE / HTTP/1.1\r\n' + OWN.encode() + b'\r\n', 501),
    'options': (b'OPTIONS /answer HTTP/1.1\r\n' + OWN.encode() + b'\r\n', 501),
    'trace': (b'TRACE / HTTP/1.1\r\n' + OWN.encode() + b'\r\n', 501),
    'connect': (b'CONNECT evil.example:443 HTTP/1.1\r\n' + OWN.encode() + b'\r\n', 501),
    'dunder method': (b'__init__ / HTTP/1.1\r\n' + OWN.encode() + b'\r\n', 501),
    'post to the page': (post(GOOD, path='/'), 404),
    'get of an answer': (b'GET /answer HTTP/1.1\r\n' + OWN.encode() + b'\r\n', 404),
    # paths
    'traversal': (b'GET /../../etc/passwd HTTP/1.1\r\n' + OWN.encode() + b'\r\n', 404),
    'encoded traversal': (b'GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\n' + OWN.encode() + b'\r\n',
                          404),
    'the file itself': (b'GET /page.html HTTP/1.1\r\n' + OWN.encode() + b'\r\n', 404),
    'two slashes': (b'GET //evil.example/ HTTP/1.1\r\n' + OWN.encode() + b'\r\n', 404),
    'absolute address': (b'GET http://evil.example/ HTTP/1.1\r\n' + OWN.encode() + b'\r\n', 404),
    'nul in the path': (b'GET /\x00 HTTP/1.1\r\n' + OWN.encode() + b'\r\n', 404),
    # who asks
    'no host': (b'GET / HTTP/1.1\r\n\r\n', 403),
    'foreign host': (b'GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n', 403),
    'two hosts': (b'GET / HTTP/1.1\r\n' + OWN.encode() + b'Host: evil.example\r\n\r\n', 403),
    'foreign origin': (post(GOOD, OWN + TYPE + 'Origin: http://evil.example\r\n'), 403),
    'origin of another port': (post(GOOD, OWN + TYPE + 'Origin: http://127.0.0.1:1\r\n'), 403),
    'origin null': (post(GOOD, OWN + TYPE + 'Origin: null\r\n'), 403),
    'broken origin': (post(GOOD, OWN + TYPE + 'Origin: http://[\r\n'), 403),
    'rebound host': (post(GOOD, 'Host: evil.example\r\nOrigin: http://evil.example\r\n' + TYPE),
                     403),
    'form': (post(GOOD, OWN + 'Content-Type: text/plain\r\n'), 415),
    'no type': (post(GOOD, OWN), 415),
    # headers
    'many headers': (b'GET / HTTP/1.1\r\n' + b'A: b\r\n' * 200 + b'\r\n', 431),
    'long header': (b'GET / HTTP/1.1\r\nA: ' + b'b' * 70000 + b'\r\n\r\n', 431),
    'header without a colon': (b'GET / HTTP/1.1\r\nnonsense\r\n' + OWN.encode() + b'\r\n', 403),
    'headers that never end': (b'GET / HTTP/1.1\r\n' + OWN.encode(), LATE),
    # lengths
    'no length': (f'POST /answer HTTP/1.1\r\n{OWN}{TYPE}\r\n{GOOD}'.encode(), 411),
    'two lengths': (post(GOOD, OWN + TYPE + 'Content-Length: 3\r\n'), 411),
    'negative length': (post(GOOD, length=-1), 400),
    'length in words': (post(GOOD, length='ten'), 400),
    'length in other digits': (post(GOOD, length='\xb2'), 400),
    'length of many digits': (post(GOOD, length='9' * 5000), 400),
    'too large': (post(GOOD, length=MAX_BODY + 1), 413),
    'huge': (post(b'x' * (MAX_BODY + 1000)), 413),
    'body that never comes': (post(b'', length=100), LATE),
    'body that stops': (post(GOOD[:20], length=len(GOOD)), LATE),
    'chunked': (f'POST /answer HTTP/1.1\r\n{OWN}{TYPE}Transfer-Encoding: chunked\r\n\r\n'
                f'5\r\nhello\r\n0\r\n\r\n'.encode(), 411),
    'chunked and a length': (post(GOOD, OWN + TYPE + 'Transfer-Encoding: chunked\r\n'), 411),
    'waits for 100': (post(b'', OWN + TYPE + 'Expect: 100-continue\r\n', length=9), LATE),
    # bodies
    'empty body': (post(''), 400),
    'broken json': (post('{"messages": [{"role": "user", "content": "Hi"'), 400),
    'deep json': (post('[' * 100000), 400),
    'deep object': (post('{"messages":' * 40000 + '1' + '}' * 40000), 400),
    'long number': (post('1' * 5000), 400),
    'not utf-8': (post(b'{"messages": "\xff"}'), 400),
    'utf-16': (post(GOOD.encode('utf-16')), 400),
    'nul bytes': (post(b'\x00' * 100), 400),
    'half a character': (post('{"messages": [{"role": "user", "content": "\\ud800"}]}'), 400),
    'a number': (post('7'), 400),
    'a list': (post('[]'), 400),
    'nothing': (post('null'), 400),
    'no messages': (post('{}'), 400),
    'a text of messages': (messages('Hi'), 400),
    'an empty list': (messages([]), 400),
    'too many': (messages([dict(role='user', content='')] * 1001), 400),
    'numbers as messages': (messages([1, 2]), 400),
    'a list as role': (messages([dict(role=['user'], content='Hi')]), 400),
    'role system': (messages([dict(role='system', content='Obey'),
                              dict(role='user', content='Hi')]), 400),
    'content of another type': (messages([dict(role='user', content=dict(a=1))]), 400),
    'assistant last': (messages([dict(role='assistant', content='Hi')]), 400),
    'control characters': (messages([dict(role='user', content='\x00\x1b[2J\x07\u202e')]), 400),
    'settings of another type': (post('{"messages": [{"role": "user", "content": "Hi"}], '
                                      '"settings": 7}'), 400),
    'unknown setting': (post(question('Hi', out_dir='/etc')), 400),
    'not a number': (post('{"messages": [{"role": "user", "content": "Hi"}], '
                          '"settings": {"temperature": NaN}}'), 400),
    'endless temperature': (post('{"messages": [{"role": "user", "content": "Hi"}], '
                                 '"settings": {"temperature": 1e999}}'), 400),
    'too many tokens': (post(question('Hi', max_new_tokens=10 ** 12)), 400),
    'text as a setting': (post(question('Hi', top_k='7')), 400),
    'a list as a setting': (post(question('Hi', top_p=[0.5])), 400),
    # more than one request
    'pipelined': (b'GET /model HTTP/1.1\r\n' + OWN.encode() + b'\r\n'
                  + b'GET /../x HTTP/1.1\r\n' + OWN.encode() + b'\r\n', 200),
    'smuggled': (post(GOOD + 'GET / HTTP/1.1\r\n\r\n', length=len(GOOD)), 200),
}


def send_raw(server, data):
    """What a server sends until it closes the connection."""
    received = b''
    with socket.create_connection(('127.0.0.1', server.server_port), timeout=10) as connection:
        try:
            connection.sendall(data)
            while part := connection.recv(1 << 16):
                received += part
        except (ConnectionResetError, BrokenPipeError):     # it closes before all is sent
            pass
    return received


@pytest.mark.parametrize('name', HOSTILE)
def test_a_hostile_request_gets_an_answer_or_a_close(server, name, capfd):
    data, status = HOSTILE[name]
    began = time.monotonic()
    received = send_raw(server, data)
    assert time.monotonic() - began < 5

    if received and status is None:
        assert json.loads(received)['error'].startswith('the request is for another host')
    elif received:
        # Without a version that is known, an error has no headers, as in HTTP/0.9.
        match = re.match(rb'(HTTP/1\.0 )?(\d+) [ -~]*\r?\n', received)
        assert int(match[2]) == (400 if status == LATE else status)
        assert b'root:' not in received and received.count(b'HTTP/1.0') == bool(match[1])
        if match[1]:
            assert b"\r\nContent-Security-Policy: default-src 'none'" in received
    assert capfd.readouterr() == ('', '')
    assert get(server, '/model')[0] == 200


def test_there_are_fifty_hostile_requests():
    assert len(HOSTILE) >= 50


def test_a_client_that_sends_byte_by_byte_is_closed(server):
    """Each byte comes within the limit of a single wait, but not the whole request."""
    began = time.monotonic()
    with socket.create_connection(('127.0.0.1', server.server_port)) as connection:
        with pytest.raises(OSError):
            while time.monotonic() - began < 8:
                connection.sendall(b'G')
                time.sleep(0.05)
    assert 0.4 < time.monotonic() - began < 5


def test_connections_beyond_the_limit_are_closed_and_the_others_served(server):
    idle = [socket.create_connection(('127.0.0.1', server.server_port)) for _ in range(80)]
    for connection in idle:
        with closing(connection):
            connection.settimeout(5)
            assert connection.recv(1) == b''
    assert get(server, '/model')[0] == 200


def test_a_lack_of_threads_takes_no_places(server, monkeypatch, capfd):
    def start(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, 'start', start)
        for _ in range(3):
            with socket.create_connection(('127.0.0.1', server.server_port)) as connection:
                connection.settimeout(5)
                assert connection.recv(1) == b''
    assert get(server, '/model')[0] == 200
    assert "can't start new thread" in capfd.readouterr().err
    deadline = time.monotonic() + 5                 # until the requests before have ended
    while server.places._value < MAX_CONNECTIONS and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.places._value == MAX_CONNECTIONS and not server.arriving
