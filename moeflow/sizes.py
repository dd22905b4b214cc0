"""Sizes in words. Standard library only."""

from math import ceil


def bytes_text(n: float, *, up: bool = False) -> str:
    """`n` bytes as text for people: 1536 is "1.5 KiB". `up`: a size that is no less, for budgets that somebody may ask for."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{_at(n, 1, up):.0f} {unit}" if unit == "bytes" else f"{_at(n, 10, up):.1f} {unit}"
        n /= 1024
    return f"{_at(n, 10, up):.1f} TiB"


def _at(n: float, parts: int, up: bool) -> float:
    return ceil(n * parts) / parts if up else n
