"""Comparing files with the Hub's record."""

import hashlib

import pytest
from huggingface_hub.hf_api import RepoFile

from timm_sape2.hub.files import compare_files


def recorded(path, data, large):
    git = hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()
    lfs = {'oid': hashlib.sha256(data).hexdigest(), 'size': len(data), 'pointerSize': 134}
    return RepoFile(path=path, size=len(data), oid=git, **({'lfs': lfs} if large else {}))


@pytest.mark.parametrize('large', [False, True])
def test_one_file(tmp_path, large):
    """A small file has git's SHA-1, a large one its SHA-256."""
    (tmp_path / 'config.json').write_bytes(b'hello')
    assert compare_files(tmp_path, [recorded('config.json', b'hello', large)]) == []
    assert compare_files(tmp_path, [recorded('config.json', b'hellp', large)]) == ['config.json']


def test_missing_on_either_side(tmp_path):
    (tmp_path / 'config.json').write_bytes(b'hello')
    assert compare_files(tmp_path, []) == ['config.json']
    record = [recorded('config.json', b'hello', False), recorded('README.md', b'', False)]
    assert compare_files(tmp_path, record) == ['README.md']


def test_files_of_others_do_not_count(tmp_path):
    (tmp_path / 'notes.txt').write_bytes(b'mine')
    assert compare_files(tmp_path, [recorded('setup.py', b'', False), recorded('a/config.json', b'', False)]) == []


def test_a_folder_in_place_of_a_file(tmp_path):
    (tmp_path / 'config.json').mkdir()
    assert compare_files(tmp_path, [recorded('config.json', b'hello', False)]) == ['config.json']
