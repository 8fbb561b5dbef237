"""How fast the engines are: what is timed, against whom, and the results."""

import gpt  # noqa: F401  # before NumPy, as in the command: it says how long threads wait for a product
