"""Files that are whole or not there, whatever fails."""

import os
import stat

import pytest

from engine import atomic_files
from engine.atomic_files import atomic_write, remove


def test_a_file_is_replaced_and_the_one_before_is_kept(tmp_path):
    path = tmp_path / 'a.txt'
    for text in ('one', 'twö'):
        with atomic_write(path, keep_as='b.txt') as file:
            file.write(text)
    assert path.read_bytes() == 'twö'.encode()
    assert (tmp_path / 'b.txt').read_bytes() == b'one'
    assert {p.name for p in tmp_path.iterdir()} == {'a.txt', 'b.txt'}


@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
def test_a_failure_leaves_everything_as_it_was(tmp_path, error):
    (tmp_path / 'a').write_bytes(b'whole')
    with pytest.raises(error):
        with atomic_write(tmp_path / 'a', 'wb', keep_as='b') as file:
            file.write(b'half')
            raise error
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [('a', b'whole')]


def test_a_killed_writer_leaves_no_obstacle(tmp_path):
    (tmp_path / 'a.tmp').write_bytes(b'what a killed process had written')
    with atomic_write(tmp_path / 'a', 'wb') as file:
        file.write(b'whole')
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [('a', b'whole')]


@pytest.mark.skipif(os.name != 'posix', reason='Windows asks for a privilege to make links')
def test_a_planted_link_is_never_followed(tmp_path):
    """Neither one under the temporary name nor one under the file's own name."""
    (tmp_path / 'target').write_bytes(b'precious')
    for name in ('a.tmp', 'a'):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to(tmp_path / 'target')
        with atomic_write(tmp_path / 'a', 'wb') as file:
            file.write(b'new')
        assert (tmp_path / 'target').read_bytes() == b'precious'
        assert (tmp_path / 'a').read_bytes() == b'new'
        assert not (tmp_path / 'a').is_symlink()


@pytest.mark.skipif(os.name != 'posix', reason='Windows asks for a privilege to make links')
def test_a_link_planted_at_the_last_moment_is_refused(tmp_path, monkeypatch):
    """After the old temporary file was removed."""
    (tmp_path / 'target').write_bytes(b'precious')
    (tmp_path / 'a.tmp').symlink_to(tmp_path / 'target')
    monkeypatch.setattr(atomic_files.Path, 'unlink', lambda path, missing_ok: None)
    with pytest.raises(FileExistsError):
        with atomic_write(tmp_path / 'a', 'wb'):
            pass
    assert (tmp_path / 'target').read_bytes() == b'precious'
    assert not (tmp_path / 'a').exists()


@pytest.mark.skipif(os.name != 'posix', reason='Windows asks for a privilege to make links')
def test_a_file_a_folder_and_a_link_are_removed_alike(tmp_path):
    """And what a link points to stays."""
    target = tmp_path / 'target'
    target.mkdir()
    (target / 'precious').write_bytes(b'')
    (tmp_path / 'folder' / 'below').mkdir(parents=True)
    (tmp_path / 'file').write_bytes(b'')
    (tmp_path / 'link to a folder').symlink_to(target)
    (tmp_path / 'link to a file').symlink_to(target / 'precious')
    (tmp_path / 'link to nothing').symlink_to(tmp_path / 'nothing')
    for path in [*tmp_path.iterdir(), tmp_path / 'nothing']:
        if path != target:
            remove(path)
    assert list(tmp_path.iterdir()) == [target]
    assert (target / 'precious').exists()


@pytest.mark.skipif(os.name != 'posix', reason='Windows syncs a folder by itself')
def test_content_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """The order of the system calls of a save that keeps the file before."""
    (tmp_path / 'a').write_bytes(b'old')
    order = []
    fsync = os.fsync
    replace = os.replace

    def record_fsync(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        order.append('sync folder' if is_folder else f'sync {os.fstat(descriptor).st_size} bytes')
        fsync(descriptor)

    def record_replace(old, new):
        order.append(f'{old.name} to {new.name}')
        replace(old, new)

    monkeypatch.setattr(atomic_files.os, 'fsync', record_fsync)
    monkeypatch.setattr(atomic_files.os, 'replace', record_replace)
    with atomic_write(tmp_path / 'a', 'wb', keep_as='b') as file:
        file.write(b'12345')
    assert order == ['sync 5 bytes', 'a to b', 'a.tmp to a', 'sync folder']
