"""The command line against a small server in memory."""

import pytest

from memcube.cli import main
from memcube.testing.api import KEY, FakeApi


@pytest.fixture
def api():
    return FakeApi()


@pytest.fixture
def memcube(api, capsys, tmp_path, monkeypatch):
    """Runs a command; its exit code, stdout and stderr."""
    for name in ("MEMCUBE_URL", "MEMCUBE_API_KEY", "MEMCUBE_HOME"):
        monkeypatch.delenv(name, raising=False)
    options = ["--url", "http://server", "--key", KEY, "--data", str(tmp_path / "data")]

    def run(*argv, options=options):
        with pytest.raises(SystemExit) as ended:
            main([*options, *argv], transport=api.transport)
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run
