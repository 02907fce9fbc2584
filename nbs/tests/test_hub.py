"Solvers from and to a repository, with a stand-in of the hub on this machine."

import base64
import hashlib
import json
import logging
import re
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from neuralsolver import hub
from neuralsolver.hub import fetch_solver, parse_solver, push_solver, solver_card
from neuralsolver.neural import load_solver
from neuralsolver.solvers import Solver

SOLVER = load_solver('sit-xl-2', 8)


class Hub(BaseHTTPRequestHandler):
    "As much of the hub's interface as publishing and loading a file need."

    commits = {}  # hash: {file: content}; the last one is main
    sizes = {}  # file: the size to claim

    def log_message(self, *args):
        pass

    def _reply(self, content, code=200, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {'Content_Length': len(content), **headers}.items():
            self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)

    def _revision(self, name):
        main = list(self.commits)[-1] if self.commits else None
        return main if name == 'main' else name

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        file = re.fullmatch(r'/user/repo/resolve/([^/]+)/([\w.-]+)', self.path)
        commit = self._revision(file[1]) if file else None
        if file and commit in self.commits and file[2] in self.commits[commit]:
            content = self.commits[commit][file[2]]
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            if self.command == 'HEAD' and file[2] in self.sizes:
                return self._reply(b'', ETag=etag, X_Repo_Commit=commit, Content_Length=10**9)
            return self._reply(content, ETag=etag, X_Repo_Commit=commit)
        if self.path.startswith('/api/models/user/repo/tree'):
            files = self.commits[self._revision('main')] if self.commits else {}
            return self._reply([dict(type='file', path=p, size=1, oid='0') for p in files])
        if self.path.startswith('/api/models/user/repo'):
            files = self.commits[self._revision('main')] if self.commits else {}
            siblings = [dict(rfilename=name) for name in files]
            return self._reply(dict(id='user/repo', siblings=siblings))
        self._reply(dict(error='not found'), 404, X_Error_Code='EntryNotFound')

    def _body(self):
        if 'Content-Length' in self.headers:
            return self.rfile.read(int(self.headers['Content-Length']))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(parts)

    def do_POST(self):
        body = self._body()
        if self.path == '/api/repos/create':
            return self._reply(dict(url='http://127.0.0.1/user/repo', id='user/repo'))
        if '/preupload/' in self.path:
            files = [f['path'] for f in json.loads(body)['files']]
            modes = [dict(path=p, uploadMode='regular', shouldIgnore=False) for p in files]
            return self._reply(dict(files=modes))
        if '/commit/' not in self.path:
            return self._reply(dict(errors=[], warnings=[]))  # validate-yaml
        files = dict(self.commits[self._revision('main')]) if self.commits else {}
        for line in map(json.loads, body.splitlines()):
            if line['key'] == 'file':
                files[line['value']['path']] = base64.b64decode(line['value']['content'])
        commit = hashlib.sha1(json.dumps(sorted(files)).encode() + body).hexdigest()
        self.commits[commit] = files
        url = f'http://127.0.0.1/user/repo/commit/{commit}'
        self._reply(dict(success=True, commitUrl=url, commitOid=commit, hookOutput=''))


@pytest.fixture
def server(tmp_path, monkeypatch):
    "The stand-in, and a client with an empty cache that talks to it only."
    Hub.commits, Hub.sizes = {}, {}
    service = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{service.server_port}'
    monkeypatch.setattr(constants, 'ENDPOINT', url)
    template = url + '/{repo_id}/resolve/{revision}/{filename}'
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY'):
        monkeypatch.delenv(name, raising=False)
    yield Hub
    service.shutdown()
    service.server_close()


def test_pushed_solver_is_loaded(server):
    mine = replace(SOLVER, name='mine', provenance=dict(searched_on='a model', seed=3))
    commit = push_solver(mine, 'user/repo', token='hf_test')
    again = load_solver('user/repo', 8, revision=commit)
    assert again.digest == mine.digest and again.name == 'mine'
    assert again.provenance == dict(
        searched_on='a model', seed=3, repository='user/repo', revision=commit
    )
    assert set(server.commits[commit]) == {'solver-8.json', 'README.md'}


def test_revision_pins_the_numbers(server, caplog):
    first = push_solver(SOLVER, 'user/repo', token='t')
    other = replace(load_solver('flowdcn-b-2', 8), provenance={})
    second = push_solver(other, 'user/repo', token='t')
    assert load_solver('user/repo', 8, revision=first).digest == SOLVER.digest
    with caplog.at_level(logging.WARNING, 'neuralsolver'):
        assert load_solver('user/repo', 8).digest == other.digest
    assert second in caplog.text


def test_card_shows_all_tables_of_the_repository(server):
    push_solver(SOLVER, 'user/repo', token='t')
    commit = push_solver(load_solver('sit-xl-2', 5), 'user/repo', token='t')
    card = server.commits[commit]['README.md'].decode()
    assert card.startswith('---\nlibrary_name: neuralsolver\n')
    assert f'`{SOLVER.digest}`' in card and '| 5 | 5 | 15 | velocity |' in card
    assert "ns.load_solver('user/repo', 5" in card and 'searched_on' in card


def test_card_cannot_be_broken_by_a_provenance():
    evil = replace(SOLVER, provenance=dict(note='```\n# heading\n<script>'))
    card = solver_card([evil], 'user/repo')
    assert card.count('```') == 4 and '\n# heading' not in card


def hostile():
    good = SOLVER.to_dict()
    text = json.dumps(good)
    return {
        'large': b'[' + b'0,' * (hub.LARGEST_FILE // 2) + b'0]',
        'pickle': b'\x80\x04K\x01.',
        'nested': b'[' * 200_000,
        'nan': text.replace('0.0', 'NaN', 1).encode(),
        'infinity': text.replace('0.0', '1e999', 1).encode(),
        'digits': text.replace('0.0', '1' * 5000, 1).encode(),
        'list': b'[]',
        'cut': text[:300].encode(),
        'row': json.dumps(good | dict(weights=good['weights'][:-1] + [[0.0]])).encode(),
        'nodes': json.dumps(good | dict(nodes=good['nodes'][:-1])).encode(),
        'text': json.dumps(good | dict(nodes=['0'] * 9)).encode(),
        'table': json.dumps(good | dict(path=dict(name='ddpm', train_steps=10**8))).encode(),
        'path': json.dumps(good | dict(path=dict(name='__class__'))).encode(),
        'name': json.dumps(good | dict(name='../../etc/passwd')).encode(),
        'sums': json.dumps(
            good | dict(weights=[[0.5 for _ in row] for row in good['weights']])
        ).encode(),
        'steps': json.dumps(good | dict(steps=True)).encode(),
    }


@pytest.mark.parametrize('kind', hostile())
def test_hostile_file_is_refused_in_a_sentence(server, kind):
    server.commits['a' * 40] = {'solver-8.json': hostile()[kind]}
    with pytest.raises(ValueError) as error:
        load_solver('user/repo', 8, revision='a' * 40)
    said = str(error.value)
    assert 'user/repo/solver-8.json' in said and '\n' not in said and len(said) < 400


def test_size_is_looked_at_before_the_download(server):
    server.commits['b' * 40] = {'solver-8.json': json.dumps(SOLVER.to_dict()).encode()}
    server.sizes['solver-8.json'] = 10**9
    with pytest.raises(ValueError, match='too large'):
        fetch_solver('user/repo', 8)


def test_what_is_not_there_is_named(server):
    commit = push_solver(SOLVER, 'user/repo', token='t')
    for given in (dict(steps=5), dict(steps=8, revision='c' * 40)):
        with pytest.raises(ValueError, match='could not be fetched'):
            load_solver('user/repo', **given)
    with pytest.raises(ValueError, match='steps=None'):
        load_solver('user/repo', revision=commit)
    with pytest.raises(ValueError, match='is not known'):
        load_solver('a/b/c', 8)


def test_another_number_of_steps_is_refused(server):
    server.commits['d' * 40] = {'solver-5.json': json.dumps(SOLVER.to_dict()).encode()}
    with pytest.raises(ValueError, match='has 8 steps, not steps=5'):
        load_solver('user/repo', 5)


def test_nothing_is_published_that_cannot_be_loaded(server):
    with pytest.raises(ValueError, match='name must be'):
        push_solver(replace(SOLVER, name='no\nname'), 'user/repo', token='t')
    with pytest.raises(ValueError, match='one solver a number of steps'):
        push_solver([SOLVER, SOLVER], 'user/repo', token='t')
    assert not server.commits


def test_every_table_passes_the_checks():
    for name, steps in (('sit-xl-2', 5), ('dit-xl-2', 10), ('flowdcn-b-2', 15)):
        solver = load_solver(name, steps)
        assert parse_solver(json.dumps(solver.to_dict()).encode(), name).digest == solver.digest
    assert isinstance(Solver.from_dict(SOLVER.to_dict()), Solver)
