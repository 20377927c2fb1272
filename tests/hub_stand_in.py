"""A small server that answers the clients of the Hugging Face hub as the hub does.

    hub = Hub({'owner/name': {'config.json': b'{}'}, 'datasets/owner/data': {...}})
    hub.reach(monkeypatch, tmp_path)                # the clients of this process ask it
    hub.faults += [Fault('config.json', 503), Fault('config.json', cut=True)]

Clients of other processes reach it by the variables of `hub.environment(tmp_path)`.
"""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

# The hub keeps large files elsewhere, and redirects to them.
LARGE = ('.safetensors', '.bin', '.parquet')


@dataclass
class Fault:
    """What goes wrong once, with the next request whose path has `words` in it.

    status: the answer, with `headers`; None for the right one. cut: the connection ends in the
    middle of the file. Only GET can be cut.
    """
    words: str
    status: int | None = None
    headers: dict = field(default_factory=dict)
    cut: bool = False


class Hub:
    """The server.

    repositories: {name: {path: bytes}}; the names of datasets begin with 'datasets/'.
    revisions: {name: {tag: {path: bytes}}}, beside main. asked: 'METHOD path' of each request.
    """

    def __init__(self, repositories, revisions=None):
        self.repositories = repositories
        self.revisions = revisions or {}
        self.faults = []
        self.asked = []
        self.before_file = None         # called when a file was asked for, before it is sent

        handler = type('Handler', (HubHandler,), {'hub': self})
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, folder):
        """The variables by which clients in other processes reach it, with `folder` as cache."""
        return dict(HF_ENDPOINT=self.url, HF_HOME=str(folder / 'hf'), NO_PROXY='127.0.0.1',
                    no_proxy='127.0.0.1', HF_HUB_DISABLE_TELEMETRY='1', HF_HUB_OFFLINE='0')

    def reach(self, monkeypatch, folder):
        """Have the clients of this process ask it, with `folder` as cache.

        huggingface_hub reads its variables when it is imported.
        """
        from huggingface_hub import constants
        for name, value in self.environment(folder).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, 'ENDPOINT', self.url)
        monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE',
                            self.url + '/{repo_id}/resolve/{revision}/{filename}')
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
        for name in ('HF_HUB_CACHE', 'HUGGINGFACE_HUB_CACHE'):
            monkeypatch.setattr(constants, name, str(folder / 'hf' / 'hub'))

    def files(self, name, revision):
        """({path: bytes}, commit) of main, a tag, or a commit; None if there is none."""
        named = {'main': self.repositories[name], **self.revisions.get(name, {})}
        for tag, files in named.items():
            if revision in (tag, commit_of(files)):
                return files, commit_of(files)
        return None


def commit_of(files):
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class HubHandler(BaseHTTPRequestHandler):
    """Answers /api/models/NAME, its /revision and /tree, and /NAME/resolve/REVISION/PATH."""

    hub: Hub                            # HTTP/1.0: no connection outlives its request

    def do_GET(self):
        self.hub.asked.append(f'{self.command} {self.path}')
        self.cut = False
        path = unquote(urlsplit(self.path).path)
        for fault in self.hub.faults:
            if fault.words in path and not (fault.cut and self.command == 'HEAD'):
                self.hub.faults.remove(fault)
                self.cut = fault.cut
                if fault.status:
                    return self.answer(fault.status, headers=fault.headers)
                break

        name = path.removeprefix('/api/').removeprefix('/models/').removeprefix('models/')
        name = name.removeprefix('/')
        repository = next((known for known in self.hub.repositories
                           if f'{name}/'.startswith(f'{known}/')), None)
        if repository is None:
            return self.answer(404, headers={'X-Error-Code': 'RepoNotFound'})
        what, _, rest = name.removeprefix(repository).strip('/').partition('/')
        revision, _, file = rest.partition('/')

        found = self.hub.files(repository, revision or 'main')
        if found is None:
            return self.answer(404, headers={'X-Error-Code': 'RevisionNotFound'})
        if what in ('resolve', 'cdn'):
            return self.send_file(repository, what, *found, file)
        return self.send_json(repository, what, *found)

    do_HEAD = do_GET
    do_POST = do_GET

    def send_json(self, repository, what, files, commit):
        """Its description, or the list of its files."""
        if what in ('tree', 'paths-info'):
            size = int(self.headers.get('Content-Length', 0))
            wanted = parse_qs(self.rfile.read(size).decode()).get('paths', files)
            content = [dict(type='file', path=path, size=len(data), oid=etag_of(data))
                       for path, data in files.items() if path in wanted]
        else:
            content = dict(id=repository.removeprefix('datasets/'), sha=commit, tags=[],
                           siblings=[dict(rfilename=path) for path in files])
        self.answer(200, json.dumps(content).encode(), {'Content-Type': 'application/json'})

    def send_file(self, repository, what, files, commit, path):
        """A file, or where a large one is."""
        headers = {'X-Repo-Commit': commit, 'Accept-Ranges': 'bytes'}
        if path not in files:
            return self.answer(404, headers={**headers, 'X-Error-Code': 'EntryNotFound'})

        data = files[path]
        headers['ETag'] = f'"{etag_of(data)}"'
        if path.endswith(LARGE) and what == 'resolve':
            place = f'{self.hub.url}/{repository}/cdn/{commit}/{path}'
            linked = {'X-Linked-Size': str(len(data)), 'X-Linked-Etag': headers['ETag']}
            return self.answer(302, headers={**headers, **linked, 'Location': place})

        if self.hub.before_file and self.command == 'GET':
            self.hub.before_file()

        # a client that goes on after a cut asks for bytes=START-
        start = int(self.headers.get('Range', 'bytes=0-')[6:].split('-')[0])
        if start:
            headers['Content-Range'] = f'bytes {start}-{len(data) - 1}/{len(data)}'
        self.answer(206 if start else 200, data[start:], headers)

    def answer(self, status, data=b'', headers=None):
        self.send_response(status)
        for name, value in {'Content-Length': str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.cut:
            data = data[:len(data) // 2]
        if self.command != 'HEAD':
            self.wfile.write(data)

    def log_message(self, *arguments):
        pass


def etag_of(data):
    return hashlib.sha256(data).hexdigest()
