"""Texts and data sets that tests, examples and figures use: where they come from and how to know them.

`get` looks in the folder that TWINGRAD_DATA names, then in the cache folder (TWINGRAD_CACHE, or twingrad in the
user's cache), and then downloads. Every file is verified by size and SHA-256 before it is used.
"""

from __future__ import annotations

import difflib
import os
import platform
import sysconfig
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt.data.download import DownloadError, download, mismatch
from gpt.data.files import atomic_write
from gpt.errors import UserError

__all__ = ["ENTRIES", "STANDARD_LIBRARY", "Entry", "cache_folder", "entries", "get", "standard_library"]

STANDARD_LIBRARY = "python-stdlib"
_BOOK = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/"


@dataclass(frozen=True)
class Entry:
    """A data set. `size` (bytes) and `sha256` are of the file itself, for a zip of the `member` that is taken out.

    The built-in entry has no addresses, and neither size nor SHA-256, which depend on the Python that runs.
    """

    name: str
    file: str
    description: str
    licence: str
    urls: tuple[str, ...] = ()
    size: int | None = None
    sha256: str | None = None
    member: str | None = None


ENTRIES = {
    entry.name: entry
    for entry in (
        Entry(
            name="the-verdict",
            file="the-verdict.txt",
            description="short story by Edith Wharton (1908), the book's pretraining text",
            licence="public domain",
            urls=(_BOOK + "ch02/01_main-chapter-code/the-verdict.txt",),
            size=20_479,
            sha256="b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f",
        ),
        Entry(
            name="tiny-shakespeare",
            file="tiny-shakespeare.txt",
            description="1.1 million characters of Shakespeare's plays",
            licence="public domain",
            urls=("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",),
            size=1_115_393,
            sha256="53493bf304b639aba6a47400da75c58ce32372b378fd2cd9d16ee987aeb12e4e",
        ),
        Entry(
            name="instruction-data",
            file="instruction-data.json",
            description="1,100 instructions with inputs and outputs, for finetuning",
            licence="Apache-2.0",
            urls=(_BOOK + "ch07/01_main-chapter-code/instruction-data.json",),
            size=203_524,
            sha256="7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944",
        ),
        Entry(
            name="instruction-data-with-preference",
            file="instruction-data-with-preference.json",
            description="the same with chosen and rejected answers, for preference losses",
            licence="Apache-2.0",
            urls=(_BOOK + "ch07/04_preference-tuning-with-dpo/instruction-data-with-preference.json",),
            size=386_968,
            sha256="305315abf14f65fa42c01a0877572f832606571c2a7d49f152ac1d758b16756e",
        ),
        Entry(
            name="sms-spam",
            file="SMSSpamCollection.tsv",
            description="5,574 text messages labelled ham or spam, for classification",
            licence="CC BY 4.0",
            urls=("https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",),
            size=477_907,
            sha256="7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d",
            member="SMSSpamCollection",
        ),
        Entry(
            name=STANDARD_LIBRARY,
            file=f"python-stdlib-{platform.python_version()}.txt",
            description="source text of this Python's standard library; built in, needs no network",
            licence="PSF-2.0",
        ),
    )
}


def entries() -> tuple[Entry, ...]:
    """All entries, in the order of the catalogue."""
    return tuple(ENTRIES.values())


def get(name: str) -> Path:
    """Path of the verified file of an entry, downloaded if need be.

    UserError for an unknown name, a file in TWINGRAD_DATA that is not the one expected, or a failed download.
    """
    if name not in ENTRIES:
        raise UserError(f"{name!r} is not {unknown_name(name)}")
    entry = ENTRIES[name]
    own = _in_data_folder(entry)
    if own is not None:
        return own
    target = cache_folder() / entry.file
    if not entry.urls:
        with atomic_write(target) as file:
            file.write(standard_library().encode("utf-8"))
    elif not target.is_file() or mismatch(target, entry.size, entry.sha256):
        try:
            _download(entry, target)
        except DownloadError as error:
            raise UserError(f"{error}; or put {entry.file} into a folder and name it in TWINGRAD_DATA") from error
    return target


def cache_folder() -> Path:
    """TWINGRAD_CACHE, or twingrad in the user's cache folder (XDG_CACHE_HOME or ~/.cache; LOCALAPPDATA on Windows)."""
    if own := os.environ.get("TWINGRAD_CACHE"):
        return Path(own)
    base = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "twingrad"


def unknown_name(name: str) -> str:
    """The end of a message about a name that is not in the catalogue: what is in it, and which one was meant."""
    near = difflib.get_close_matches(name.lower().replace("_", "-"), ENTRIES, n=1)
    return f"a data set ({', '.join(ENTRIES)})" + (f": did you mean {near[0]!r}?" if near else "")


def standard_library(max_characters: int | None = 1_000_000) -> str:
    """Source text of Python's standard library, module after module in the order of their paths, cut at a length.

    Without installed packages, tests, build settings (which name paths of the machine) and files that are not UTF-8;
    the same for the same installation. UserError if there is no source, as in a stripped Python.
    """
    root = sysconfig.get_path("stdlib")
    texts: list[str] = []
    length = 0
    for path in sorted(_library_files(root)):
        if max_characters is not None and length >= max_characters:
            break
        try:
            texts.append(Path(root, path).read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
        length += len(texts[-1])
    if not texts:
        raise UserError(f"this Python has no source of its standard library in {root}")
    return "".join(texts)[:max_characters]


def _library_files(root: str) -> Iterator[str]:
    """Paths below root, with / between folders on every system, so that they sort alike."""
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in left_out]
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield Path(folder, name).relative_to(root).as_posix()


def _in_data_folder(entry: Entry) -> Path | None:
    folder = os.environ.get("TWINGRAD_DATA")
    if not folder:
        return None
    if not Path(folder).is_dir():
        raise UserError(f"TWINGRAD_DATA names {folder!r}, which is not a folder")
    path = Path(folder) / entry.file
    if not path.is_file():
        return None
    if problem := mismatch(path, entry.size, entry.sha256):
        raise UserError(f"{path} is not the {entry.name} that the catalogue knows: it has {problem}")
    return path


def _download(entry: Entry, target: Path) -> None:
    if entry.member is None:
        download(entry.urls, target, entry.size, entry.sha256)
        return
    archive = target.with_name(target.name + ".zip")
    download(entry.urls, archive)
    try:
        with zipfile.ZipFile(archive) as opened:
            data = opened.read(entry.member)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DownloadError(f"what {entry.urls[0]} gave is not the archive expected: {error}") from error
    finally:
        archive.unlink()
    with atomic_write(target) as file:
        file.write(data)
        file.flush()
        if problem := mismatch(Path(file.name), entry.size, entry.sha256):
            raise DownloadError(f"{entry.member} in the archive has {problem}")
