"""liar-opt: make a trained transformer smaller without training it."""

__version__ = "0.1.0"
