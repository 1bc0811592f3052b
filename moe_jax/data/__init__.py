"""Tokenizers, text, problems and packing: from files to batches of token ids."""


class DataError(ValueError):
    """Data that cannot be used: the message names the file (and line), what is wrong, and the remedy."""
