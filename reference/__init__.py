"""Every layer of a GPT in NumPy, each with its gradient derived and written by hand.

A layer is a module with two pure functions::

    y, saved = layer.forward(x, ...)
    dx, ...  = layer.backward(dy, saved)

`forward` returns its result and what the gradient will need; `backward` returns one gradient for each differentiable
input, in the order of the inputs. Only `cached_attention`, which is for generating text, has no gradient. Nothing here
imports anything but NumPy.
"""

from reference.config import PRESETS, GPTConfig
from reference.model import GPT

__all__ = ["GPT", "PRESETS", "GPTConfig"]
