"""Sizes in words. Standard library only."""


def bytes_text(n: float) -> str:
    """`n` bytes as text for people: 1536 is "1.5 KiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"
