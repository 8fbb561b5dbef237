"""`twingrad data`: the catalogue of texts, downloads, and token files."""

from __future__ import annotations

from pathlib import Path

from gpt import tokenizers
from gpt.data import catalogue, prepare
from gpt.errors import UserError
from gpt.options import Parser, run_command


def list_entries(argv: list[str]) -> None:
    """List the catalogue: name, size, licence, description."""
    Parser(prog="twingrad data list", description=list_entries.__doc__).parse_args(argv)
    width = max(len(entry.name) for entry in catalogue.entries())
    for entry in catalogue.entries():
        size = f"{entry.size:>11,}" if entry.size else f"{'built in':>11}"
        print(f"{entry.name:<{width}}  {size}  {entry.licence:<10}  {entry.description}")


def get(argv: list[str]) -> None:
    """Download texts of the catalogue, verify them, and print where they are."""
    parser = Parser(prog="twingrad data get", description=get.__doc__)
    parser.add_argument("name", nargs="+", help="names in the catalogue, see twingrad data list")
    for name in parser.parse_args(argv).name:
        print(catalogue.get(name))


def encode(argv: list[str]) -> None:
    """Encode a text file, or a folder of them, as a token file that `twingrad train --data` reads piece by piece."""
    parser = Parser(prog="twingrad data encode", description=encode.__doc__)
    parser.add_argument("source", type=Path, help="a text file or a folder")
    parser.add_argument("target", type=Path, help="the token file to write")
    parser.add_argument(
        "--tokenizer", default="gpt2", metavar="NAME", help="gpt2, bytes, or a file .model or .json [gpt2]"
    )
    parser.add_argument("--pattern", default="*.txt", help="which files of the folder [*.txt]")
    arguments = parser.parse_args(argv)
    if not arguments.source.exists():
        raise UserError(f"{arguments.source}: no such file or folder")
    made = prepare(arguments.source, arguments.target, tokenizers.load(arguments.tokenizer), arguments.pattern)
    print(f"{made.path}: {len(made.ids):,} tokens of {made.n_vocab:,} from {len(made.sources)} files")


def main(argv: list[str]) -> int:
    """Run one of the commands list, get and encode."""
    return run_command("twingrad data", {"list": list_entries, "get": get, "encode": encode}, argv)
