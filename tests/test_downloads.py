"""The real clients against a stand-in of the hub, and what a failed download tells."""

import errno
import logging
import os
import re
import signal
import socket
import time

import pytest
from hub_stand_in import Fault, Hub

from engine import downloads
from engine.downloads import Download, damaged_file, download_files, explain_failure
from engine.errors import RunError, UserError

pytest.importorskip('huggingface_hub')

NAME = 'owner/model'
FILES = {
    'config.json': b'{"a": 1}',
    'model.safetensors': bytes(range(256)) * 2000,
    'readme.md': b'not asked for',
}
OLDER = {**FILES, 'config.json': b'{"a": 0}'}
PATTERNS = ['*.json', '*.safetensors']
BUSY = {'Retry-After': '1'}
GATED = {'X-Error-Code': 'GatedRepo'}
HIDDEN = {'X-Error-Code': 'RepoNotFound'}
EXPIRED = {'X-Error-Message': 'User Access Token "mine" is expired'}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = Hub({NAME: FILES, f'datasets/{NAME}': OLDER}, {NAME: {'v1': OLDER}})
    hub.reach(monkeypatch, tmp_path)
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    yield hub
    hub.close()


def fetch(**changes):
    """{name: content} of the folder that download_files returns."""
    download = Download(NAME, 'name a folder', **{'repository': NAME, **changes})
    folder = download_files(download, PATTERNS)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def wanted(files):
    return {name: data for name, data in files.items() if name != 'readme.md'}


# What arrives

def test_the_files_that_fit_a_pattern_arrive_and_are_asked_for_once(hub):
    assert fetch() == wanted(FILES)
    assert not any('readme' in request for request in hub.asked)

    hub.asked.clear()
    assert fetch() == wanted(FILES)
    assert not any('resolve' in request for request in hub.asked)


def test_a_revision_and_a_dataset_are_files_of_their_own(hub):
    assert fetch(revision='v1') == wanted(OLDER)
    assert fetch(is_dataset=True) == wanted(OLDER)
    assert fetch() == wanted(FILES)


@pytest.mark.parametrize('faults', [
    [Fault('model.safetensors', cut=True)],
    [Fault('config.json', 503)],
    [Fault('/api/models', 500), Fault('model.safetensors', 502)],
    [Fault('config.json', 429, BUSY)],
    [Fault('/api/models', 429, BUSY)],
], ids=['cut', '503', 'two 5xx', '429 for a file', '429'])
def test_a_fault_that_passes_costs_nothing_but_time(hub, faults):
    hub.faults += faults
    assert fetch() == wanted(FILES)
    assert not hub.faults


def test_without_the_hub_the_cache_is_used(hub, caplog):
    fetch()
    hub.close()
    with caplog.at_level(logging.INFO, 'plaingpt'):
        assert fetch() == wanted(FILES)
    assert f'{NAME} is taken from the cache' in caplog.text


def test_a_client_that_waits_names_the_offline_mode_once(hub, caplog):
    hub.faults += [Fault('config.json', 503)] * 4
    with caplog.at_level(logging.INFO, 'plaingpt'):
        fetch()
    assert caplog.text.count('HF_HUB_OFFLINE=1') == 1


@pytest.mark.skipif(os.name == 'nt', reason='Windows sends Ctrl-C in another way')
def test_ctrl_c_ends_a_download_within_a_file(hub, tmp_path):
    """No thread goes on, and no part of a file stays."""
    def press(number, frame):
        raise KeyboardInterrupt

    hub.before_file = lambda: os.kill(os.getpid(), signal.SIGINT)
    before = signal.signal(signal.SIGINT, press)
    try:
        with pytest.raises(KeyboardInterrupt):
            fetch()
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list(tmp_path.rglob('*.incomplete'))


# What a failure tells

@pytest.mark.parametrize('faults, kind, words', [
    (Fault('resolve', 403, GATED), UserError,
     'owner/model is gated: accept its terms at http://.*/owner/model, then run `hf auth login`'),
    (Fault('/api/models', 401, EXPIRED), UserError,
     'refuses your token .User Access Token "mine" is expired.; .*`hf auth login`'),
    (Fault('/api/models', 401, HIDDEN), UserError, 'no model owner/model; check the spelling, or'),
    (Fault('/api/models', 401), UserError, r'refuses it \(401\); run `hf auth login` with a token'),
    (Fault('/api/models', 403), UserError, r'refuses it \(403\); run `hf auth login`'),
    (Fault('/api/models', 429, {'Retry-After': '900'}), RunError, r'\(429\); run again in 900 sec'),
    (Fault('/api/models', 503), RunError, r'fault of its own \(503\); run again later, or name a'),
    (Fault('model.safetensors', cut=True), RunError, 'was cut, or stood still, before .* whole; '),
])
def test_an_answer_of_the_hub_is_told_with_what_to_do(hub, faults, kind, words):
    hub.faults += [faults] * 100
    with pytest.raises(kind, match=words) as caught:
        fetch()
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('changes, words', [
    (dict(repository='owner/nothing'), 'shows you no model owner/nothing; check the spelling'),
    (dict(repository='owner/nothing', is_dataset=True), 'shows you no dataset owner/nothing'),
    (dict(revision='v9'), 'owner/model has no revision v9; http.*/owner/model lists'),
])
def test_what_the_hub_does_not_have_is_a_mistake(hub, changes, words):
    with pytest.raises(UserError, match=words):
        fetch(**changes)


def test_a_full_disk_is_told_as_such(hub):
    """By a limit on the size of files, which the system reports when a file is written."""
    resource = pytest.importorskip('resource')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(RunError, match='the disk is full; free some space, or set HF_HOME'):
            fetch()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_connection_is_told_with_what_to_do_instead(hub):
    hub.close()
    words = 'no connection to 127.0.0.1:[0-9]+; go online once, or name a folder'
    with pytest.raises(RunError, match=words):
        fetch()


def test_the_offline_mode_is_named_where_the_cache_lacks_the_files(hub, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(RunError, match='HF_HUB_OFFLINE is set, and .*; unset it, or name a'):
        fetch()


def chain(*errors):
    """The last of the errors, each of which came from the one before."""
    for cause, error in zip(errors, errors[1:]):
        error.__context__ = cause
    return errors[-1]


@pytest.mark.parametrize('error, words', [
    (chain(OSError(errno.ENOSPC, 'No space left on device'), ValueError('a'), KeyError('b')),
     'the disk is full; free some space, or set HF_HOME'),
    (RuntimeError('IO Error: No space left on device (os error 28)'), 'the disk is full'),
    (PermissionError(errno.EACCES, 'Permission denied', '/cache/a'), '/cache/a cannot be written'),
    (chain(socket.gaierror(socket.EAI_AGAIN, 'x'), OSError('y')), 'no name server answers'),
    (chain(socket.gaierror(socket.EAI_NONAME, 'x'), OSError('y')), 'the name .* is not known'),
    (OSError(errno.ENETUNREACH, 'Network is unreachable'), 'there is no network'),
    (ValueError('some\nthing'), 'ValueError: some thing; go online once, or name a folder'),
])
def test_the_first_cause_is_told_however_deep_it_lies(error, words):
    told = explain_failure(error, Download('x', 'name a folder'))
    assert type(told) is RunError
    assert re.search(words, str(told))


def test_a_damaged_file_of_the_cache_is_named_by_its_real_path(tmp_path):
    (tmp_path / 'blob').write_bytes(b'')
    (tmp_path / 'link.parquet').symlink_to(tmp_path / 'blob')
    told = str(damaged_file(tmp_path / 'link.parquet', 'no magic bytes'))
    assert f'remove {tmp_path.resolve() / "blob"} and run again' in told


def test_another_library_is_tried_three_times_too(monkeypatch):
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    calls = []

    def action():
        calls.append(1)
        if len(calls) < downloads.TRIES:
            raise ConnectionResetError('cut')
        return 'whole'

    assert downloads.try_three_times(action, Download('x', 'y')) == 'whole'
    assert len(calls) == 3
