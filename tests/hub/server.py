"""A Hugging Face Hub in memory, on two ports of 127.0.0.1: what the real client needs to push, look up and download.

The second port plays the CDN, to which the client must not send its token. Large files go up as plain LFS, or through
the client's own Xet library, whose `local://` store in a folder takes the place of the Xet servers.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = ('.safetensors', '.bin')


class HubError(Exception):
    """An answer that is an error; `code` is what the client tells errors apart by."""

    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Blob:
    """A file: as LFS object it goes by its SHA-256, otherwise by git's SHA-1."""

    def __init__(self, path, data):
        self.data, self.large, self.xet = data, path.endswith(LARGE), None
        self.git = hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()
        self.oid = hashlib.sha256(data).hexdigest() if self.large else self.git


class Repo:
    """Commits are mappings from paths to blobs; branches and tags name them."""

    def __init__(self, private=False):
        self.private, self.commits, self.refs = private, {}, {}
        self.commit('main', {})

    def commit(self, branch, files):
        sha = hashlib.sha1(f'{branch} {len(self.commits)} {time.monotonic_ns()}'.encode()).hexdigest()
        self.commits[sha], self.refs[branch] = files, sha
        return sha

    def sha(self, revision):
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise HubError(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return sha

    def files(self, revision='main'):
        return self.commits[self.sha(revision)]


class Hub:
    """The state and the answers.

    Args:
        tokens: User by token.
        xet: Folder for the store of the Xet library, None for plain LFS.
    """

    def __init__(self, tokens, xet=None):
        self.tokens, self.xet_folder = tokens, xet
        self.repos, self.objects, self.log = {}, {}, []
        self.tamper = lambda path, data: data  # what is sent in place of the content of a file
        self.cuts = 0  # downloads to break off in the middle
        self.failure = None  # status that answers all requests
        self.servers = [Server(('127.0.0.1', 0), Handler) for _ in range(2)]
        self.url, self.cdn = (f'http://127.0.0.1:{server.server_port}' for server in self.servers)
        for server in self.servers:
            server.hub = self
            threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True).start()

    def stop(self):
        """Vanish, with the connections that the client keeps."""
        for server in self.servers:
            server.stop()
        self.servers = []

    def put(self, repo_id, files):
        """Commit files, contents by path, behind the client's back."""
        repo = self.repos.setdefault(repo_id, Repo())
        return repo.commit('main', {**repo.files(), **{path: Blob(path, data) for path, data in files.items()}})

    def user(self, request):
        header = request.headers.get('Authorization')
        if header is None:
            return None
        if header.removeprefix('Bearer ') not in self.tokens:
            raise HubError(401, 'Invalid credentials in Authorization header')
        return self.tokens[header.removeprefix('Bearer ')]

    def repo(self, request, repo_id, write=False):
        user, repo = self.user(request), self.repos.get(repo_id)
        if repo is None or (repo.private and user != repo_id.split('/')[0]):
            raise HubError(401 if user is None else 404, 'Repository not found', 'RepoNotFound')
        if write and user != repo_id.split('/')[0]:
            raise HubError(401 if user is None else 403, 'You do not have write access')
        return repo

    def create_repo(self, request):
        user, body = self.user(request), request.json()
        owner = body.get('organization') or user
        if user is None or user != owner:
            raise HubError(401 if user is None else 403, 'You cannot create this repository')
        repo_id = f'{owner}/{body["name"]}'
        exists = repo_id in self.repos
        if not exists:
            self.repos[repo_id] = Repo(body.get('visibility') == 'private' or bool(body.get('private')))
        request.reply(409 if exists else 200, {'url': f'{self.url}/{repo_id}', 'id': repo_id, 'name': repo_id})

    def validate_yaml(self, request):
        return {'errors': [], 'warnings': []}

    def info(self, request, repo_id, revision='main'):
        repo = self.repo(request, repo_id)
        return {'id': repo_id, 'sha': repo.sha(revision), 'private': repo.private, 'tags': [], 'siblings': []}

    def tree(self, request, repo_id, revision):
        return [
            {'type': 'file', 'path': path, 'size': len(blob.data), 'oid': blob.git}
            | ({'lfs': {'oid': blob.oid, 'size': len(blob.data), 'pointerSize': 134}} if blob.large else {})
            for path, blob in sorted(self.repo(request, repo_id).files(revision).items())
        ]

    def create_branch(self, request, repo_id, branch):
        repo = self.repo(request, repo_id, write=True)
        if branch in repo.refs:
            raise HubError(409, 'Reference already exists')
        repo.refs[branch] = repo.sha('main')
        return {}

    def preupload(self, request, repo_id, revision):
        files = self.repo(request, repo_id, write=True).files(revision)
        return {
            'files': [
                {
                    'path': file['path'],
                    'shouldIgnore': False,
                    'uploadMode': 'lfs' if file['path'].endswith(LARGE) else 'regular',
                    'oid': files[file['path']].oid if file['path'] in files else None,
                }
                for file in request.json()['files']
            ]
        }

    def lfs_batch(self, request, repo_id):
        self.repo(request, repo_id, write=True)
        return {
            'transfer': 'basic',
            'objects': [
                {'oid': wanted['oid'], 'size': wanted['size']}
                | ({} if wanted['oid'] in self.objects else {'actions': self._lfs_actions(wanted['oid'])})
                for wanted in request.json()['objects']
            ],
        }

    def _lfs_actions(self, oid):
        return {'upload': {'href': f'{self.cdn}/_lfs/{oid}'}, 'verify': {'href': f'{self.url}/_lfs/verify'}}

    def lfs_put(self, request, oid):
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, 'The content is not that of the oid')
        self.objects[oid] = request.body
        return {}

    def lfs_verify(self, request):
        wanted = request.json()
        if len(self.objects.get(wanted['oid'], b'')) != wanted['size']:
            raise HubError(404, 'No such object')
        return {}

    def xet_token(self, request, repo_id, kind, revision):
        self.repo(request, repo_id, write=kind == 'write')
        if self.xet_folder is None:
            raise HubError(404, 'No Xet here')
        store, expires = f'local://{self.xet_folder}', int(time.time()) + 3600
        for name, value in (('Cas-Url', store), ('Access-Token', 'xet'), ('Token-Expiration', expires)):
            request.extra[f'X-Xet-{name}'] = str(value)
        return {'casUrl': store, 'accessToken': 'xet', 'exp': expires}

    def commit(self, request, repo_id, revision):
        repo = self.repo(request, repo_id, write=True)
        _, *operations = [json.loads(line) for line in request.body.splitlines() if line.strip()]
        files = dict(repo.files(revision))
        for operation in operations:
            value = operation['value']
            if operation['key'] == 'file':
                files[value['path']] = Blob(value['path'], base64.b64decode(value['content']))
            elif operation['key'] == 'lfsFile':
                files[value['path']] = self._large_blob(value)
            else:
                del files[value['path']]
        sha = repo.commit(revision, files)
        return {'success': True, 'commitOid': sha, 'commitUrl': f'{self.url}/{repo_id}/commit/{sha}'}

    def _large_blob(self, value):
        if value['oid'] in self.objects:
            return Blob(value['path'], self.objects[value['oid']])
        stored = dict(_stored_by_xet(self.xet_folder)) if self.xet_folder else {}
        if value['oid'] not in stored:
            raise HubError(400, f'No object for {value["path"]}')
        blob = Blob(value['path'], b'\0' * value['size'])
        blob.oid, blob.xet = value['oid'], stored[value['oid']]
        return blob

    def resolve(self, request, repo_id, revision, path):
        repo = self.repo(request, repo_id)
        sha = request.extra['X-Repo-Commit'] = repo.sha(revision)
        blob = repo.commits[sha].get(path)
        if blob is None:
            raise HubError(404, 'Entry not found', 'EntryNotFound')
        if not blob.large:
            request.extra['ETag'] = f'"{blob.oid}"'
            return request.reply_file(self.tamper(path, blob.data))
        request.extra |= {'X-Linked-Etag': f'"{blob.oid}"', 'X-Linked-Size': str(len(blob.data))}
        request.extra['Location'] = f'{self.cdn}/_cdn/{repo_id}/{sha}/{path}'
        if blob.xet:
            request.extra['X-Xet-Hash'] = blob.xet
            request.extra['X-Xet-Refresh-Route'] = f'{self.url}/api/models/{repo_id}/xet-read-token/{sha}'
        return request.reply(302, b'')

    def download(self, request, repo_id, sha, path):
        if 'Authorization' in request.headers:
            raise HubError(400, 'A token came to the CDN')
        request.reply_file(self.tamper(path, self.repos[repo_id].commits[sha][path].data))

    ID, REVISION = '([^/]+/[^/]+)', '([^/]+)'
    ROUTES = (
        ('POST', '/api/repos/create', create_repo),
        ('POST', '/api/validate-yaml', validate_yaml),
        ('GET', f'/api/models/{ID}', info),
        ('GET', f'/api/models/{ID}/revision/{REVISION}', info),
        ('GET', f'/api/models/{ID}/tree/{REVISION}', tree),
        ('POST', f'/api/models/{ID}/branch/{REVISION}', create_branch),
        ('POST', f'/api/models/{ID}/preupload/{REVISION}', preupload),
        ('POST', f'/api/models/{ID}/commit/{REVISION}', commit),
        ('GET', f'/api/models/{ID}/xet-(read|write)-token/{REVISION}', xet_token),
        ('POST', rf'/{ID}\.git/info/lfs/objects/batch', lfs_batch),
        ('PUT', '/_lfs/([0-9a-f]{64})', lfs_put),
        ('POST', '/_lfs/verify', lfs_verify),
        ('GET', f'/{ID}/resolve/{REVISION}/(.+)', resolve),
        ('GET', f'/_cdn/{ID}/{REVISION}/(.+)', download),
    )

    def answer(self, request, method, path):
        """Reply to a request."""
        if self.failure:
            raise HubError(self.failure, 'The server has a bad day')
        for verb, pattern, handler in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and verb == method:
                content = getattr(self, handler.__name__)(request, *map(unquote, match.groups()))
                if not request.replied:
                    request.reply(200, content)
                return
        raise HubError(404, f'No route for {method} {path}')


class Handler(BaseHTTPRequestHandler):
    """Carries requests to the Hub and its replies back."""

    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        """Say nothing."""

    def handle_any(self):
        self.extra, self.replied, hub = {}, False, self.server.hub
        self.body = self._read_body()
        path = urlsplit(self.path).path
        try:
            hub.answer(self, 'GET' if self.command == 'HEAD' else self.command, path)
        except HubError as error:
            self.extra['X-Error-Message'] = error.message
            if error.code:
                self.extra['X-Error-Code'] = error.code
            self.reply(error.status, {'error': error.message})
        hub.log.append((self.command, path, self.status, self.headers.get('Range')))

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def json(self):
        return json.loads(self.body)

    def reply_file(self, data):
        self.extra['Accept-Ranges'] = 'bytes'
        match = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        if not match:
            return self.reply(200, data, cut=self._cuts())
        start = int(match[1])
        self.extra['Content-Range'] = f'bytes {start}-{len(data) - 1}/{len(data)}'
        return self.reply(206, data[start:], cut=self._cuts())

    def reply(self, status, content, cut=False):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.replied, self.status = True, status
        self.send_response(status)
        kind = 'application/octet-stream' if isinstance(content, bytes) else 'application/json'
        for name, value in {'Content-Type': kind, 'Content-Length': len(body), **self.extra}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut

    def _cuts(self):
        hub = self.server.hub
        if self.command == 'HEAD' or not hub.cuts:
            return False
        hub.cuts -= 1
        return True

    def _read_body(self):
        if self.headers.get('Transfer-Encoding', '').lower() != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length') or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(parts)


class Server(ThreadingHTTPServer):
    """A server that can end its connections too."""

    daemon_threads = True

    def get_request(self):
        connection, address = super().get_request()
        self.connections = [*getattr(self, 'connections', []), connection]
        return connection, address

    def stop(self):
        self.shutdown()
        self.server_close()
        for connection in getattr(self, 'connections', []):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _stored_by_xet(folder):
    """Yield SHA-256 and Xet hash of the files that the shards in a local store describe.

    A shard is a header of 48 bytes, then for each file an entry of its hash, flags and number of segments, as many
    entries for the segments (twice as many if they have checksums), and one with its SHA-256. An entry has 48 bytes.
    """
    for shard in Path(folder, 'xet', 'xorbs', 'shards').glob('*.mdb'):
        data, start = shard.read_bytes(), 48
        while data[start : start + 32] != b'\xff' * 32:
            flags, segments = struct.unpack_from('<II', data, start + 32)
            xet = _hash_text(data[start : start + 32])
            start += 48 * (1 + segments * (2 if flags & 1 << 31 else 1))
            if flags & 1 << 30:
                yield _hash_text(data[start : start + 32]), xet
                start += 48


def _hash_text(data):
    return ''.join(f'{word:016x}' for word in struct.unpack('<4Q', data))
