"""Downloads a single file from a web address, so that a stopped download can continue."""

import http.client
import urllib.error
import urllib.request
from functools import partial
from http import HTTPStatus
from pathlib import Path

from tqdm import tqdm

from engine.downloads import Download, try_three_times

BLOCK = 1 << 16             # bytes read at once
TIMEOUT = 30                # seconds that a server may be silent


def download_file(url: str, part: Path, name: str) -> None:
    """Download what is behind `url` to the file `part`, after the bytes that it has already.

    name: of the file, for the progress bar and for an error. Whoever calls this compares the digest
    of the whole file, since what was there may be of another one.

    A failure that may pass is tried three times. Raises UserError or RunError, as try_three_times,
    and the file then keeps what has arrived.
    """
    download = Download(name, 'use --input=FILE if you have the file', cache=None)
    try_three_times(partial(continue_file, url, part, name), download)


def continue_file(url, part, name):
    """Download the rest of a file, with the errors of urllib and http.client as they are."""
    begin = 0
    if part.exists():
        begin = part.stat().st_size
    request = urllib.request.Request(url)
    if begin:
        request.add_header('Range', f'bytes={begin}-')

    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if begin and error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return                      # nothing is left to read
        raise
    except urllib.error.URLError as error:
        error.url = url                 # for the message, as HTTPError has it
        raise

    with response:
        if response.status != HTTPStatus.PARTIAL_CONTENT:
            begin = 0                   # the server sends the whole file
        write_response(response, part, begin, name)


def write_response(response, part, begin, name):
    """Write what a server sends to the file `part`, from byte `begin` on."""
    length = response.headers.get('Content-Length')
    total = None
    if length is not None:
        total = begin + int(length)

    part.parent.mkdir(exist_ok=True)
    bar = tqdm(desc=f'downloading {name}', initial=begin, total=total, unit='B', unit_scale=True,
               disable=None)
    with bar, open(part, 'ab') as file:
        file.truncate(begin)
        while block := response.read(BLOCK):
            file.write(block)
            bar.update(len(block))

    # http.client does not tell when a connection ends early
    size = part.stat().st_size
    if total is not None and size < total:
        raise http.client.IncompleteRead(b'', total - size)
