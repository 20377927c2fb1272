"""Downloads of single files from a web address."""

import pytest
from hub_stand_in import Fault, Hub

from engine import downloads
from engine.errors import RunError
from engine.prepare.web_file import download_file

TEXT = b'To be, or not to be: that is the question.\n' * 3000


@pytest.fixture
def server(monkeypatch):
    """A server that has TEXT at the address `server.text`."""
    monkeypatch.setattr(downloads, 'SECONDS_BETWEEN_TRIES', 0)
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    server = Hub({'some/texts': {'text': TEXT}})
    server.text = f'{server.url}/some/texts/resolve/main/text'
    yield server
    server.close()


@pytest.mark.parametrize('faults', [
    [],
    [Fault('text', cut=True)],
    [Fault('text', 503), Fault('text', cut=True)]])
def test_a_file_is_whole_after_cuts_and_faults_of_the_server(server, tmp_path, faults):
    server.faults += faults
    download_file(server.text, tmp_path / 'a.part', 'the text')
    assert (tmp_path / 'a.part').read_bytes() == TEXT
    assert len(server.asked) == 1 + len(faults)


def test_a_stopped_download_continues_after_the_bytes_that_it_has(server, tmp_path):
    begun = b'?' * 1000                     # unlike the text, so that they are told apart
    (tmp_path / 'a.part').write_bytes(begun)
    download_file(server.text, tmp_path / 'a.part', 'the text')
    assert (tmp_path / 'a.part').read_bytes() == begun + TEXT[1000:]


def test_a_download_that_was_stopped_after_its_last_byte_is_whole(server, tmp_path):
    server.faults.append(Fault('text', 416))            # as servers answer
    (tmp_path / 'a.part').write_bytes(TEXT)
    download_file(server.text, tmp_path / 'a.part', 'the text')
    assert (tmp_path / 'a.part').read_bytes() == TEXT


def test_a_server_that_cannot_continue_sends_all_of_it(tmp_path):
    (tmp_path / 'served').write_bytes(TEXT)
    (tmp_path / 'a.part').write_bytes(b'?' * 1000)
    download_file((tmp_path / 'served').as_uri(), tmp_path / 'a.part', 'the text')
    assert (tmp_path / 'a.part').read_bytes() == TEXT


def test_three_faults_end_the_download_and_keep_what_has_arrived(server, tmp_path):
    server.faults += [Fault('text', cut=True), Fault('text', 503), Fault('text', 502)]
    with pytest.raises(RunError, match='the text could not be downloaded: .*use --input=FILE'):
        download_file(server.text, tmp_path / 'a.part', 'the text')
    assert TEXT.startswith((tmp_path / 'a.part').read_bytes()) and len(server.asked) == 3
    assert (tmp_path / 'a.part').stat().st_size >= len(TEXT) // 2
