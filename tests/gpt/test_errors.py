"""A missing package is named with the command that installs it; an error inside a package is not hidden."""

import sys

import pytest

from gpt.errors import UserError, require


def test_require_returns_the_module():
    assert require("json.decoder", extra="torch") is sys.modules["json.decoder"]


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    with pytest.raises(UserError, match=r"^this needs absent_package, .*: pip install 'twingrad\[torch\]'$"):
        require("absent_package.part", extra="torch")


def test_a_broken_package_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import absent_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="absent_package"):
        require("broken_package", extra="torch")
