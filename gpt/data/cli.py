"""`twingrad data`: the catalogue of texts, downloads, and token files."""

from __future__ import annotations

from pathlib import Path

from gpt import tokenizers
from gpt.data import catalogue, prepare
from gpt.data.documents import PATTERNS, find_files, has_lines
from gpt.data.progress import create_progress
from gpt.data.workers import cores
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


def prepare_tokens(argv: list[str]) -> None:
    """Encode texts, JSON lines and folders of them as a token file that `twingrad train --data` reads piece by piece.

    Interrupted, even killed, it goes on where it was when it is begun again with the same arguments. The result is the
    same for any number of processes.
    """
    parser = Parser(prog="twingrad data prepare", description=prepare_tokens.__doc__)
    parser.add_argument(
        "source", type=Path, nargs="+", help="files and folders; .jsonl has a document a line, .gz is gzipped"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the token file to write")
    parser.add_argument(
        "--tokenizer", default="gpt2", metavar="NAME", help="gpt2, bytes, or a file .model or .json [gpt2]"
    )
    parser.add_argument("--field", metavar="NAME", help="which field of a JSON line is the document [text]")
    parser.add_argument("--pattern", help=f"which files of a folder [{' '.join(PATTERNS)}]")
    parser.add_argument("--processes", type=int, default=cores(), metavar="N", help="that encode at once [%(default)s]")
    parser.add_argument("--seed", type=int, metavar="N", help="shuffle the documents; none: keep their order")
    arguments = parser.parse_args(argv)
    if arguments.processes < 1:
        raise UserError(f"--processes: expected at least 1, got {arguments.processes}")
    if arguments.out.exists():
        raise UserError(f"--out: {arguments.out} exists already: remove it, or give another name")
    files = find_files(arguments.source, arguments.pattern)
    if arguments.field is not None and not any(has_lines(path) for path, _ in files):
        raise UserError(f"--field {arguments.field}: there are no JSON lines, files .jsonl or .jsonl.gz, to have it")
    made = prepare(
        arguments.source,
        arguments.out,
        tokenizers.load(arguments.tokenizer),
        arguments.pattern,
        field=arguments.field or "text",
        processes=arguments.processes,
        seed=arguments.seed,
        progress=create_progress(),
    )
    print(f"{made.path}: {len(made.ids):,} tokens of {made.n_vocab:,} from {len(made.sources)} files")


def main(argv: list[str]) -> int:
    """Run one of the commands list, get and prepare."""
    return run_command("twingrad data", {"list": list_entries, "get": get, "prepare": prepare_tokens}, argv)
