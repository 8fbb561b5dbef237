"""A missing package is named with the command that installs it; an error inside a package is not hidden."""

import sys
from types import ModuleType

import pytest

from gpt.errors import UserError, check_installed, is_installed, require


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


def test_what_is_installed_is_known_without_its_import(tmp_path, monkeypatch):
    (tmp_path / "costly_package.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert is_installed("costly_package")
    check_installed("costly_package", extra="torch")
    assert "costly_package" not in sys.modules
    monkeypatch.setitem(sys.modules, "costly_package", None)
    for name in ("costly_package", "absent_package"):
        assert not is_installed(name)
        with pytest.raises(UserError, match=rf"^this needs {name}, .*: pip install 'twingrad\[torch\]'$"):
            check_installed(name, extra="torch")


def test_an_imported_module_without_a_specification_is_installed(monkeypatch):
    """As a notebook's or a test's own is."""
    monkeypatch.setitem(sys.modules, "made_by_hand", ModuleType("made_by_hand"))
    assert is_installed("made_by_hand")
