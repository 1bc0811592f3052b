"""How byte-level vocabularies write bytes."""


def byte_characters() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where printable, else a character from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
