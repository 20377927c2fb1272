"""Downloads from the Hugging Face hub, and why a download failed.

    Download            what a person asked for
    split_revision      OWNER/NAME@REVISION of the hub
    download_files      the files of a repository of the hub, as a folder of its cache
    download_url        the bytes behind an address
    try_three_times     any other download
    explain_failure     the one line to show where a download fails, from any library
    damaged_file        the one line to show for a file that a download left damaged
"""

import errno
import logging
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from engine.errors import RunError, UserError
from engine.log import log

HUB = 'https://huggingface.co'
TRIES = 3
SECONDS_BETWEEN_TRIES = 3
SECONDS_OF_SILENCE = 30         # of a server that is asked by download_url
LONGEST_WAIT = 300              # seconds that a busy server may ask for; beyond them a run ends

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)

# How libraries call a connection that never was, and one that ended early. Those of several
# libraries have the same names, and none of them needs to be installed.
UNREACHABLE = {'ConnectError', 'ConnectTimeout', 'NewConnectionError', 'ConnectionRefusedError',
               'ProxyError', 'PoolTimeout'}
CUT = {'RemoteProtocolError', 'ReadError', 'ReadTimeout', 'ChunkedEncodingError', 'IncompleteRead',
       'ContentTooShortError', 'ConnectionResetError', 'TimeoutError'}


@dataclass(frozen=True)
class Download:
    """What a person asked for, as messages speak of it.

    name: such as 'gpt2' or 'the tokenizer of owner/name'.
    instead: what a person can do without the download, such as 'use --input=FOLDER'.
    repository: OWNER/NAME on the hub; None for a file that comes from elsewhere.
    is_dataset: whether the repository is a dataset of the hub, and not a model.
    revision: the commit, branch or tag; None for the newest.
    cache: the environment variable that moves what is downloaded to another folder.
    """
    name: str
    instead: str
    repository: str | None = None
    is_dataset: bool = False
    revision: str | None = None
    cache: str | None = 'HF_HOME'

    @property
    def page(self) -> str:
        """The repository's page on the hub."""
        hub = os.environ.get('HF_ENDPOINT') or HUB
        kind = ''
        if self.is_dataset:
            kind = 'datasets/'
        return f'{hub.rstrip("/")}/{kind}{self.repository}'

    @property
    def repo_type(self) -> str:
        """What the hub's client calls the kind of the repository."""
        if self.is_dataset:
            return 'dataset'
        return 'model'


def split_revision(source: str) -> tuple[str, str | None]:
    """(OWNER/NAME, revision) of OWNER/NAME@REVISION; the revision is None where none is named."""
    name, _, revision = source.partition('@')
    return name, revision or None


# Downloading

def download_files(download: Download, patterns: Sequence[str]) -> Path:
    """The folder of the hub's cache that has the repository's files whose names fit a pattern.

    The files are downloaded one after the other, by this thread, so that Ctrl-C ends at once. Files
    that are whole in the cache are not downloaded again. Where the hub cannot be asked, the folder
    is what the cache has.

    Raises UserError or RunError, as try_three_times.
    """
    tell_of_offline_mode()
    return try_three_times(partial(fetch, download, patterns), download)


def download_url(url: str) -> bytes:
    """What is behind an address. A server that is silent for too long raises an error.

    The errors are those of requests, which is installed with tiktoken.
    """
    import requests
    response = requests.get(url, timeout=SECONDS_OF_SILENCE)
    response.raise_for_status()
    return response.content


def try_three_times(action: Callable[[], Any], download: Download) -> Any:
    """What action() returns. If it fails in a way that may pass, it is called again.

    Raises UserError or RunError, as explain_failure.
    """
    for attempt in range(1, TRIES + 1):
        try:
            return action()
        except Exception as error:          # the clients raise errors of several libraries
            seconds = seconds_until_it_passes(error)
            if attempt == TRIES or seconds is None:
                raise explain_failure(error, download) from None
            log.info(f'note: {reason_of(error)}; trying again in {seconds} seconds '
                     f'({attempt + 1} of {TRIES})')
            time.sleep(seconds)


def fetch(download, patterns):
    """What `download_files` returns, with the errors of the hub's client as they are."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    # which files there are
    name = download.repository
    kind = download.repo_type
    try:
        api = huggingface_hub.HfApi()
        info = api.repo_info(name, revision=download.revision, repo_type=kind)
    except Exception as error:
        return find_in_cache(download, patterns, error)
    files = filter_repo_objects([file.rfilename for file in info.siblings], allow_patterns=patterns)

    # the files
    for file in files:
        huggingface_hub.hf_hub_download(name, file, revision=info.sha, repo_type=kind)

    # With every file at hand, this only notes in the cache which commit the revision is.
    folder = huggingface_hub.snapshot_download(
        name, revision=download.revision, repo_type=kind, allow_patterns=patterns,
        tqdm_class=silent_bar())
    return Path(folder)


def find_in_cache(download, patterns, error):
    """The folder of the cache, where the hub could not be asked. Raises `error` without one."""
    import huggingface_hub
    try:
        folder = huggingface_hub.snapshot_download(
            download.repository, revision=download.revision, repo_type=download.repo_type,
            allow_patterns=patterns, local_files_only=True)
    except huggingface_hub.errors.LocalEntryNotFoundError:
        raise error from None

    if 'OfflineModeIsEnabled' not in names_of(error):
        log.info(f'note: {reason_of(error)}; {download.name} is taken from the cache')
    return Path(folder)


def silent_bar():
    """A class of progress bars that show nothing."""
    from huggingface_hub.utils import tqdm

    class SilentBar(tqdm):
        def __init__(self, *arguments, **options):
            options['disable'] = True
            super().__init__(*arguments, **options)

    return SilentBar


class OfflineHint(logging.Handler):
    """Names HF_HUB_OFFLINE once, when the hub's client says that it waits."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.is_told = False

    def emit(self, record):
        message = record.getMessage()
        if not self.is_told and ('Retrying in' in message or 'Waiting' in message):
            self.is_told = True
            log.info('note: Ctrl-C stops waiting; with HF_HUB_OFFLINE=1 nothing is asked of the '
                     'hub, and what was downloaded before is used')


def tell_of_offline_mode():
    """Have the hub's client say when it waits, and what a person can do about it."""
    from huggingface_hub.utils import logging as hub_logging
    hub_logging.set_verbosity_warning()
    logger = hub_logging.get_logger('huggingface_hub')
    if not any(isinstance(handler, OfflineHint) for handler in logger.handlers):
        logger.addHandler(OfflineHint())


# What an error says

def causes_of(error: BaseException) -> Iterator[BaseException]:
    """The error, and every error that it came from."""
    left = [error]
    seen = []
    while left:
        error = left.pop(0)
        if error is None or any(error is other for other in seen):
            continue
        seen.append(error)
        yield error
        left += [error.__cause__, error.__context__]
        # urllib hides its cause in `reason`, and requests in its arguments.
        hidden = [getattr(error, 'reason', None), *error.args]
        left += [value for value in hidden if isinstance(value, BaseException)]


def names_of(error):
    """The names of the classes that the error and its causes are of."""
    return {kind.__name__ for cause in causes_of(error) for kind in type(cause).__mro__}


def status_of(error):
    """(status of the answer, its headers); (None, {}) where no server answered."""
    for cause in causes_of(error):
        response = getattr(cause, 'response', None)
        status = getattr(response, 'status_code', None) or getattr(cause, 'code', None)
        if type(status) is int and status >= 400:
            return status, getattr(response or cause, 'headers', None) or {}
    return None, {}


def errno_of(error, numbers):
    """The first OSError among the causes that has one of these numbers, or None."""
    for cause in causes_of(error):
        if isinstance(cause, OSError) and cause.errno in numbers:
            return cause
    return None


def text_of(error):
    """The texts of all causes, in one line."""
    return ' '.join(' '.join(str(cause) for cause in causes_of(error)).split())


def is_cut(error):
    """True where the connection ended, or stood still, before the file was whole."""
    names = names_of(error)
    if names & UNREACHABLE:
        return False
    return bool(names & CUT) or 'Consistency check failed' in text_of(error)


def seconds_until_it_passes(error):
    """How long to wait before the same download may succeed; None where waiting does not help."""
    status, headers = status_of(error)
    if status == 429:
        seconds = wait_of(headers) or SECONDS_BETWEEN_TRIES
        if seconds <= LONGEST_WAIT:
            return seconds
        return None

    is_server_fault = status is not None and status >= 500
    if is_server_fault or status is None and is_cut(error) and not is_full(error):
        return SECONDS_BETWEEN_TRIES
    return None


def wait_of(headers):
    """The seconds that a busy server asks for, or None."""
    wait = headers.get('Retry-After') or ''
    if wait.isdigit():
        return int(wait)
    return None


def is_full(error):
    # hf_xet's errors have no number.
    return errno_of(error, NO_SPACE) or 'os error 28' in text_of(error)


def reason_of(error: BaseException) -> str:
    """Why a server gave no file, in a few words."""
    status, headers = status_of(error)
    name_error = next((cause for cause in causes_of(error)
                       if isinstance(cause, socket.gaierror)), None)
    host = host_of(error)

    if status == 429:
        return f'{host} takes no more requests for now (429)'
    if status is not None and status >= 500:
        return f'{host} has a fault of its own ({status})'
    if status is not None:
        return f'{host} refuses it ({status})'

    if 'OfflineModeIsEnabled' in names_of(error):
        return 'HF_HUB_OFFLINE is set, and the cache does not have it'
    if name_error is not None:
        if name_error.errno == socket.EAI_AGAIN:
            return f'no name server answers for {host}; there may be no network'
        return f'the name {host} is not known; there may be no network'
    if any(isinstance(cause, ssl.SSLError) for cause in causes_of(error)):
        return f'the certificate of {host} is not trusted'
    if errno_of(error, (errno.ENETUNREACH, errno.EHOSTUNREACH)):
        return f'there is no network to {host}'
    if is_cut(error):
        return f'the connection to {host} was cut, or stood still, before the file was whole'
    if names_of(error) & UNREACHABLE:
        return f'no connection to {host}'

    last = ' '.join(str(error).split())[:200]
    return f'{type(error).__name__}: {last}'


def host_of(error):
    """The server that was asked, as far as the error knows."""
    for cause in causes_of(error):
        source = getattr(cause, 'response', None) or cause
        try:
            url = source.request.url                    # of httpx and of requests
        except (AttributeError, RuntimeError):          # httpx raises the second one
            url = getattr(cause, 'url', None)           # of urllib
        if url:
            return str(url).split('://')[-1].split('/')[0]
    return 'the server'


# What to tell

def explain_failure(error: BaseException, download: Download) -> UserError | RunError:
    """The error to raise where a download failed: what happened, and what to do about it.

    error: what a library raised; its causes are looked through too. What a person can set right is
    a UserError, and the rest a RunError.
    """
    if isinstance(error, (UserError, RunError)):
        return error
    failed = f'{download.name} could not be downloaded'

    # this machine
    moved = ''
    if download.cache:
        moved = f', or set {download.cache} to a folder on another disk'
    if is_full(error):
        return RunError(f'{failed}: the disk is full; free some space{moved}')
    refused = errno_of(error, NOT_WRITABLE)
    if refused and refused.filename:
        return RunError(f'{failed}: {refused.filename} cannot be written ({refused.strerror}); '
                        f'change its permissions{moved}')

    # the hub's answer
    answer = explain_answer(error, download)
    if answer is not None:
        return answer

    # the network
    reason = reason_of(error)
    if is_cut(error):
        return RunError(f'{failed}: {reason}; run again: files that are whole are kept, or '
                        f'{download.instead}')
    if 'OfflineModeIsEnabled' in names_of(error):
        return RunError(f'{failed}: {reason}; unset it, or {download.instead}')
    return RunError(f'{failed}: {reason}; go online once, or {download.instead}')


def explain_answer(error, download):
    """The error to raise where a server answered that it does not give the file, or None."""
    status, headers = status_of(error)
    names = names_of(error)
    name = download.name
    repository = download.repository

    if 'GatedRepoError' in names:
        return UserError(f'{name} is gated: accept its terms at {download.page}, then run '
                         f'`hf auth login` with a token of that account')
    if status == 401 and is_token_refused(headers):
        message = ' '.join(headers['X-Error-Message'].split())[:100]
        return UserError(f'the hub refuses your token ({message}); make a new one at '
                         f'{HUB}/settings/tokens and run `hf auth login`, or unset HF_TOKEN')
    if 'RevisionNotFoundError' in names:
        return UserError(f'{repository} has no revision {download.revision}; {download.page} lists '
                         f'those that it has')
    if 'RepositoryNotFoundError' in names:
        return UserError(f'the hub shows you no {download.repo_type} {repository}; check the '
                         f'spelling, or run `hf auth login` if it is private')

    if status in (401, 403):
        message = ' '.join(headers.get('X-Error-Message', '').split())[:100]
        if message:
            message = f': {message}'
        return UserError(f'{name} could not be downloaded: {reason_of(error)}{message}; run `hf '
                         f'auth login` with a token that may read it, or {download.instead}')
    if status == 429:
        seconds = wait_of(headers) or LONGEST_WAIT
        return RunError(f'{name} could not be downloaded: {reason_of(error)}; run again in '
                        f'{seconds} seconds, or run `hf auth login`, which raises the limit')
    if status is not None and status >= 500:
        return RunError(f'{name} could not be downloaded: {reason_of(error)}; run again later, or '
                        f'{download.instead}')
    if status is not None:
        return RunError(f'{name} could not be downloaded: {reason_of(error)}; {download.instead}')
    return None


def is_token_refused(headers):
    message = headers.get('X-Error-Message') or ''
    return 'expired' in message or 'Invalid credentials' in message


def damaged_file(path: Path, reason: str) -> UserError:
    """The error to raise where a file of the hub's cache is damaged.

    The cache has links to its files, and a link that is removed would come back to the same file.
    """
    return UserError(f'{path} is damaged ({reason}); remove {path.resolve()} and run again')
