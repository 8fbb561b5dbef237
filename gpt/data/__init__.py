"""Data: text from the catalogue or a path, token files, and the loaders that hand out batches."""

from gpt.data.loader import Loader
from gpt.data.order import BatchOrder
from gpt.data.preparation import prepare
from gpt.data.random_batches import RandomBatches
from gpt.data.text import load_text, split_text, split_tokens
from gpt.data.tokenfile import TokenFile, is_token_file, open_tokens
from gpt.data.windows import WindowLoader

__all__ = [
    "BatchOrder",
    "Loader",
    "RandomBatches",
    "TokenFile",
    "WindowLoader",
    "is_token_file",
    "load_text",
    "open_tokens",
    "prepare",
    "split_text",
    "split_tokens",
]
