"""Tokenizers and data sets that the tests of finetuning share."""

import os
from pathlib import Path

import pytest

from gpt import tokenizers


@pytest.fixture(scope="session")
def data_folder():
    if "TWINGRAD_DATA" not in os.environ:
        pytest.skip("TWINGRAD_DATA names no folder with the data sets")
    return Path(os.environ["TWINGRAD_DATA"])


@pytest.fixture(scope="session")
def gpt2():
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("TIKTOKEN_CACHE_DIR names no folder with GPT-2's vocabulary")
    return tokenizers.load("gpt2")


@pytest.fixture(scope="session")
def bytes_tokenizer():
    return tokenizers.load("bytes")
