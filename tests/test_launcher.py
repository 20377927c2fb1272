"""The launcher that starts the scripts of other tests."""

import time

import pytest
from harness import CAN_FORK
from launcher import Proxy

if not CAN_FORK:
    pytest.skip('the launcher forks', allow_module_level=True)


def test_a_script_that_ended_before_its_pids_were_read_is_not_waited_for(workspace, monkeypatch):
    """On a busy machine a quick one does. Both answers of the server then lie in the pipe."""
    launcher = workspace.launcher
    workspace.run('export.py', '--help')                # the server imports what it needs
    stdout = launcher.server.stdout

    def be_late():
        time.sleep(1)
        return stdout.readline()
    monkeypatch.setattr(launcher.server, 'stdout', Proxy(stdout, readline=be_late))

    result = launcher.run('export.py', '--help', timeout=10)
    assert result.codes == [0]
    assert not result.timed_out
    assert result.seconds < 10


def test_a_setting_of_the_hub_counts_although_its_client_was_imported_before(workspace):
    """It is read when huggingface_hub is imported, which the server does before it forks."""
    script = workspace.folder / 'show_hub.py'
    script.write_text('import huggingface_hub.constants as c; print(c.HF_HUB_OFFLINE)')
    assert workspace.run('export.py', '--help').code == 0       # the server imports transformers
    assert workspace.run('show_hub.py', HF_HUB_OFFLINE='1').stdout == 'True\n'
    assert workspace.run('show_hub.py').stdout == 'False\n'
