"""Serves page.html, and streams answers to it.

The server keeps no conversations: the page sends its own with each question, so those of several
readers cannot mix. Everything that arrives is hostile. Any web page may ask a browser to send
requests here, also under another name for this address (DNS rebinding): so Host and Origin are
checked.
"""

import base64
import hashlib
import ipaddress
import json
import re
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from engine.chat.answer_queue import AnswerQueue
from engine.chat.chat_model import AnswerSettings, ChatModel
from engine.chat_layout import Turn
from engine.errors import RunError, UserError, shorten

PAGE = Path(__file__).with_name('page.html')
MAX_BODY = 1 << 19              # bytes of a question with its conversation
MAX_TURNS = 1000
MAX_CONNECTIONS = 64
SECONDS_TO_ASK = 10             # for a whole request to arrive
SECONDS_TO_READ = 10            # for a part of an answer to be taken
SECONDS_BETWEEN_LOOKS = 0.2     # at whether a reader is still there
ROLES = ('user', 'assistant')


class Refusal(Exception):
    """A request that gets an error in place of an answer."""

    def __init__(self, status: HTTPStatus, text: str):
        super().__init__(text)
        self.status = status


# The server

class ChatServer(ThreadingHTTPServer):
    """A page at http://host:port. `serve_forever` runs it, and `server_close` ends it."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, host: str, port: int, chat_model: ChatModel, settings: AnswerSettings,
                 name: str, max_readers: int):
        """port: 0 takes a free one, which `server_port` then tells. settings: those that a reader
        finds. name: of the model, on the page. max_readers: answers that are computed at once."""
        self.host = host
        self.chat_model = chat_model
        self.settings = settings
        self.name = name
        self.page = PAGE.read_bytes()
        self.page_headers = security_headers(self.page.decode())
        self.arriving: dict[socket.socket, float] = {}      # when a request has to have arrived
        self.places = threading.BoundedSemaphore(MAX_CONNECTIONS)   # free ones
        self.answers = AnswerQueue(chat_model, max_readers)
        if ':' in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), Handler)             # it raises OSError for a taken port

    def server_bind(self):
        """Bind, without the question to a name server that HTTPServer asks."""
        socketserver.TCPServer.server_bind(self)
        self.server_name = self.host
        self.server_port = self.server_address[1]

    def server_close(self):
        super().server_close()
        self.answers.close()

    # Each request has a thread of its own, and there are MAX_CONNECTIONS at most.

    def process_request(self, request, client_address):
        if not self.places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        self.arriving[request] = time.monotonic() + SECONDS_TO_ASK
        try:
            super().process_request(request, client_address)
        except RuntimeError:                                # the system has no more threads
            self.arriving.pop(request, None)
            self.places.release()
            raise

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.arriving.pop(request, None)
            self.places.release()

    def service_actions(self):
        """Close the connections whose requests take too long. serve_forever calls this twice a
        second."""
        now = time.monotonic()
        for connection, deadline in list(self.arriving.items()):
            if now > deadline:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address):
        """Print the traceback of a bug, and nothing where a reader has gone."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def security_headers(page: str) -> dict[str, str]:
    """The headers of every response. Of all scripts and styles, only those that are in the page
    itself run, by their sums."""
    sums = {}
    for tag in ('script', 'style'):
        parts = re.findall(f'<{tag}>(.*?)</{tag}>', page, re.DOTALL)
        digests = [hashlib.sha256(part.encode()).digest() for part in parts]
        sums[tag] = ' '.join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    policy = (f"default-src 'none'; script-src {sums['script']}; style-src {sums['style']}; "
              f"connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
              f"frame-ancestors 'none'")
    return {
        'Content-Security-Policy': policy,
        'X-Content-Type-Options': 'nosniff',
        'X-Frame-Options': 'DENY',
        'Referrer-Policy': 'no-referrer',
        'Cross-Origin-Opener-Policy': 'same-origin',
        'Cross-Origin-Resource-Policy': 'same-origin',
        'Cache-Control': 'no-store',
    }


# One request

class Handler(BaseHTTPRequestHandler):
    """Answers one request, then closes the connection, as HTTP/1.0 does."""

    timeout = SECONDS_TO_READ
    error_content_type = 'text/plain; charset=utf-8'
    error_message_format = '%(code)d %(message)s\n'

    def version_string(self):
        return 'plaingpt'

    def log_message(self, format, *arguments):
        """Nothing: the terminal is not filled with requests."""

    def send_error(self, code, message=None, explain=None):
        """The error by its number and name: what a client sent is not repeated to it."""
        super().send_error(code)

    def end_headers(self):
        for name, value in self.server.page_headers.items():
            self.send_header(name, value)
        super().end_headers()

    def do_GET(self):
        with self.refusals():
            self.check_sender()
            if self.path == '/':
                self.send_whole(HTTPStatus.OK, 'text/html; charset=utf-8', self.server.page)
            elif self.path == '/model':
                self.send_json(HTTPStatus.OK, name=self.server.name,
                               settings=asdict(self.server.settings),
                               answers=self.server.chat_model.layout is not None)
            else:
                raise Refusal(HTTPStatus.NOT_FOUND, 'there is no such page')

    def do_POST(self):
        with self.refusals():
            self.check_sender()
            if self.path != '/answer':
                raise Refusal(HTTPStatus.NOT_FOUND, 'there is no such page')
            turns, settings = read_question(self.read_body(), self.server.settings)
            prompt = self.server.chat_model.prompt(turns, settings.max_new_tokens)

            answer = self.server.answers.submit(prompt, settings)
            if answer is None:
                raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE,
                              'the model answers others now; try again in a moment')
            try:
                self.stream(answer)
            finally:
                answer.cancel()

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Send the error that the block raises about the request."""
        try:
            yield
        except Refusal as refusal:
            self.send_json(refusal.status, error=str(refusal))
        except UserError as error:
            self.send_json(HTTPStatus.BAD_REQUEST, error=str(error))

    # What arrives

    def check_sender(self):
        """Refusal for a request that a page from elsewhere may have sent."""
        hosts = self.headers.get_all('Host', [])
        if len(hosts) != 1 or not is_own_name(hosts[0], self.server.host):
            raise Refusal(HTTPStatus.FORBIDDEN, 'the request is for another host; open the page '
                          'by the address of this machine, as in http://127.0.0.1:8000')

        host = hosts[0].lower()
        for origin in self.headers.get_all('Origin', []):
            if origin.lower() not in (f'http://{host}', f'https://{host}'):
                raise Refusal(HTTPStatus.FORBIDDEN, 'the request comes from another page')

    def read_body(self):
        """The bytes of the body."""
        if self.headers.get_content_type() != 'application/json':
            raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, 'the body should be JSON')
        lengths = self.headers.get_all('Content-Length', [])
        if 'Transfer-Encoding' in self.headers or len(lengths) != 1:
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, 'the body should have one Content-Length')
        if not re.fullmatch('[0-9]{1,18}', lengths[0]):
            raise Refusal(HTTPStatus.BAD_REQUEST, 'the Content-Length is no number')
        if int(lengths[0]) > MAX_BODY:
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                          f'the conversation has over {MAX_BODY >> 10} KiB; begin a new one')

        body = self.rfile.read(int(lengths[0]))
        self.server.arriving.pop(self.connection, None)
        if len(body) < int(lengths[0]):
            raise Refusal(HTTPStatus.BAD_REQUEST, 'the body is shorter than its Content-Length')
        return body

    # What is sent

    def stream(self, answer):
        """Send the parts of an answer as lines of JSON, until its end or until the reader goes."""
        self.send_response(HTTPStatus.OK)
        self.send_header('Content-Type', 'application/x-ndjson')
        self.end_headers()
        self.send_line(dropped=answer.prompt.n_dropped)
        try:
            while (text := answer.new_text(SECONDS_BETWEEN_LOOKS)) is not None:
                if is_gone(self.connection):
                    return
                if text:
                    self.send_line(text=text)
        except RunError as error:
            self.send_line(error=str(error))
            return
        self.send_line(end=True)

    def send_line(self, **values):
        self.wfile.write(json.dumps(values).encode() + b'\n')

    def send_json(self, status, **values):
        self.send_whole(status, 'application/json', json.dumps(values).encode())

    def send_whole(self, status, content_type, data):
        self.send_response(status)
        self.send_header('Content-Type', content_type)
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def is_own_name(host: str, own: str) -> bool:
    """True for a Host header that names this server: by an address, by localhost, or as --host.

    A page that another name leads here has that name in its requests (DNS rebinding), and never an
    address.
    """
    match = re.fullmatch(r'(\[[0-9a-fA-F:.]+\]|[0-9A-Za-z.-]+)(:[0-9]{1,5})?', host)
    if not match:
        return False
    name = match[1].strip('[]').lower()
    if name in ('localhost', own.lower()):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_gone(connection: socket.socket) -> bool:
    """True where the reader has closed the connection."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b''
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(SECONDS_TO_READ)


def read_question(body: bytes, defaults: AnswerSettings) -> tuple[list[Turn], AnswerSettings]:
    """The turns and the settings of a body such as

        {"messages": [{"role": "user", "content": "Hi"}], "settings": {"temperature": 0.5}}

    defaults: of the settings that it lacks. Raises Refusal for any other body.
    """
    try:
        question = json.loads(body.decode())
        json.dumps(question, ensure_ascii=False).encode()   # fails for half a surrogate pair
    except (ValueError, RecursionError):
        raise Refusal(HTTPStatus.BAD_REQUEST, 'the body is not JSON in UTF-8') from None
    if not isinstance(question, dict):
        raise Refusal(HTTPStatus.BAD_REQUEST, 'the body should be an object')

    # the conversation
    messages = question.get('messages')
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_TURNS:
        raise Refusal(HTTPStatus.BAD_REQUEST, f'messages should be a list of 1 to {MAX_TURNS}')
    turns = [read_turn(message) for message in messages]
    if turns[-1].role != 'user':
        raise Refusal(HTTPStatus.BAD_REQUEST, 'the last message should be one of the user')

    # the settings
    values = question.get('settings', {})
    if not isinstance(values, dict):
        raise Refusal(HTTPStatus.BAD_REQUEST, 'settings should be an object')
    return turns, defaults.changed(values)


def read_turn(message):
    role = None
    text = None
    if isinstance(message, dict):
        role = message.get('role')
        text = message.get('content')
    if role not in ROLES or not isinstance(text, str):
        raise Refusal(HTTPStatus.BAD_REQUEST, f'a message should be an object with the role user '
                      f'or assistant, and a text as its content, not {shorten(message)}')
    return Turn(role, text)
