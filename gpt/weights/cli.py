"""`twingrad weights`: published weights, downloads, conversions, and what is in a file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from gpt.errors import UserError
from gpt.options import Parser, run_command
from gpt.weights import huggingface, load, native, registry


def list_entries(argv: list[str]) -> None:
    """List the registry: name, size, licence, description."""
    Parser(prog="twingrad weights list", description=list_entries.__doc__).parse_args(argv)
    width = max(map(len, registry.ENTRIES))
    for entry in registry.entries():
        size = sum(file.size or 0 for file in entry.files)
        here = "  (here)" if registry.find(entry.name) else ""
        print(f"{entry.name:<{width}}  {size / 1e9:5.2f} GB  {entry.licence}  {entry.description}{here}")
    print("\nand any repository of Hugging Face with a model of a supported kind: twingrad weights get OWNER/NAME")


def get(argv: list[str]) -> None:
    """Download weights, verify them, convert them where needed, and print where they are."""
    parser = Parser(prog="twingrad weights get", description=get.__doc__)
    parser.add_argument("name", nargs="+", help="names of the registry, or OWNER/NAME of a Hugging Face repository")
    for name in parser.parse_args(argv).name:
        print(load.find(name))


def convert(argv: list[str]) -> None:
    """Write a model in another format: twingrad's one file, or a folder that transformers loads."""
    parser = Parser(prog="twingrad weights convert", description=convert.__doc__)
    parser.add_argument("source", help="a run's folder, a folder or file of weights, or a name (weights list)")
    parser.add_argument("target", type=Path, help="what to write: NAME.safetensors, or a new folder")
    parser.add_argument("--to", choices=("twingrad", "huggingface"), help="the format [by the target's name]")
    parser.add_argument("--shard_size", type=float, default=5.0, metavar="GB", help="most of a file of a folder [5]")
    arguments = parser.parse_args(argv)
    if not arguments.shard_size > 0:
        raise UserError(f"shard_size: expected a positive number of GB, got {arguments.shard_size}")
    if arguments.target.suffix in load.PICKLES:
        raise UserError(f"{arguments.target}: expected a folder, or a name that ends in .safetensors")
    is_file = arguments.target.suffix == ".safetensors"
    to = arguments.to or ("twingrad" if is_file else "huggingface")
    if is_file != (to == "twingrad"):
        expected = "a folder" if is_file else "a name that ends in .safetensors"
        raise UserError(f"{arguments.target}: expected {expected} for {to}")
    model = load.load(arguments.source)
    if to == "twingrad":
        if arguments.target.exists():
            raise UserError(f"{arguments.target}: exists; nothing was written")
        native.save_model(arguments.target, *model)
    else:
        huggingface.save_folder(arguments.target, model, int(arguments.shard_size * 1e9))
    print(f"{arguments.target}: {model.config.n_parameters:,} parameters")


def show(argv: list[str]) -> None:
    """Show every tensor of a file or folder: name, shape, type in the file, and a fingerprint of its numbers."""
    parser = Parser(prog="twingrad weights show", description=show.__doc__)
    parser.add_argument("source", help="a run's folder, a folder or file of weights, or a name (weights list)")
    tensors = load.tensors(parser.parse_args(argv).source)
    width = max(map(len, tensors), default=0)
    total = 0
    for name, tensor in tensors.items():
        shape = " x ".join(map(str, tensor.shape)) or "scalar"
        array = np.asarray(tensor)
        broken = (
            f"  {np.count_nonzero(np.isnan(array))} NaN" if array.dtype.kind == "f" and np.isnan(array).any() else ""
        )
        print(f"{name:<{width}}  {tensor.kind:<8}  {shape:<14}  {fingerprint(array)}{broken}")
        total += array.size
    print(f"{len(tensors)} tensors, {total:,} numbers")


def fingerprint(array: np.ndarray) -> str:
    """The first digits of the SHA-256 of an array's numbers, in rows, little-endian: alike in every format."""
    rows = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return hashlib.sha256(rows.data if rows.size else b"").hexdigest()[:16]


def main(argv: list[str]) -> int:
    """Run one of the commands list, get, convert and show."""
    commands = {"list": list_entries, "get": get, "convert": convert, "show": show}
    return run_command("twingrad weights", commands, argv)
