"""What both engines share: models, data, training, generation, parity checks and the command line. Imports no torch."""

__version__ = "0.1.0"
