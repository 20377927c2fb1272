"""Fixtures of the tests of engine/chat."""

import threading

import pytest
from chat_harness import SETTINGS, make_chat_model

from engine.chat import server as chat_server


@pytest.fixture(scope='module')
def server():
    """A ChatServer that runs, and waits for slow clients a fraction of a second."""
    patch = pytest.MonkeyPatch()
    patch.setattr(chat_server, 'SECONDS_TO_ASK', 0.5)
    patch.setattr(chat_server, 'SECONDS_BETWEEN_LOOKS', 0.02)
    server = chat_server.ChatServer('127.0.0.1', 0, make_chat_model(), SETTINGS, 'toy', 2)
    thread = threading.Thread(target=server.serve_forever, args=[0.02])
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
    patch.undo()
