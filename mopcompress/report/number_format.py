"""Numbers and names as text. Nothing is clipped: a huge number is written out, an infinite one is `inf`."""

import math

MINUS = "\N{MINUS SIGN}"
NARROW = "\N{NO-BREAK SPACE}"
ABSENT = "-"
UNKNOWN = "not recorded"


def number(value: float) -> str:
    """Show four significant digits below 1000, thousands separators above, an exponent from 10^15 on."""
    if not math.isfinite(value):
        return _sign(str(float(value)))
    size = abs(value)
    if size >= 1e15:
        return _sign(f"{value:.3e}")
    if size >= 999.95:
        return _sign(f"{value:,.0f}")
    decimals = next(digits for digits, limit in ((3, 9.9995), (2, 99.995), (1, math.inf)) if size < limit)
    return _sign(f"{value:.{decimals}f}")


def percent(fraction: float, *, decimals: int = 1) -> str:
    """Show 0.853 as `85.3 %`."""
    return _sign(f"{100 * fraction:.{decimals}f}") + NARROW + "%"


def hundredths(value: float) -> str:
    """Show 0.4137 as `41.4`, the usual form of ROUGE-L: 100 for identical words."""
    return _sign(f"{100 * value:.1f}")


def hundredths_with_interval(estimate: float, low: float, high: float) -> str:
    """Show a difference of ROUGE-L as `+3.2 [+1.1, +5.3]`, in hundredths, or `+3.2` without known ends."""
    middle, left, right = (_sign(f"{100 * value:+.1f}") for value in (estimate, low, high))
    return f"{middle} [{left}, {right}]" if math.isfinite(low) and math.isfinite(high) else middle


def ratio(value: float) -> str:
    """Show 0.8534 as `0.85`."""
    return _sign(f"{value:.2f}")


def change(nats: float) -> str:
    """Show a difference of log perplexity as the change of perplexity: log(0.88) as `-12 %`."""
    return _percents([nats])[0] + NARROW + "%" if math.isfinite(nats) else "n/a"


def change_range(low: float, high: float) -> str:
    """Show two differences of log perplexity as `-12 % to +3 %`."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return "n/a"
    return " to ".join(f"{number}{NARROW}%" for number in _percents([low, high]))


def change_with_interval(estimate: float, low: float, high: float) -> str:
    """Show a change and its interval as `-12 % [-15, -9]`, with decimals when an end is close to 0 or to -100."""
    if not all(map(math.isfinite, (estimate, low, high))):
        return "n/a"
    middle, left, right = _percents([estimate, low, high])
    return f"{middle}{NARROW}% [{left}, {right}]"


def size_in_bytes(value: float) -> str:
    """Show 1,234,567 as `1.23 MB`, in powers of 1000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return (
                f"{value / scale:.3g}{NARROW}{unit}" if value < 999.5 * scale else f"{value / scale:,.0f}{NARROW}{unit}"
            )
    return f"{value:.0f}{NARROW}B"


def duration(seconds: float) -> str:
    """Show seconds as `0.42 s`, `12.3 s`, `4 min 05 s` or `1 h 02 min`."""
    if not seconds:
        return f"0{NARROW}s"
    if seconds < 59.95:
        return f"{seconds:.2f}{NARROW}s" if seconds < 1 else f"{seconds:.1f}{NARROW}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NARROW}min{NARROW}{rest:02d}{NARROW}s"
    return f"{minutes // 60}{NARROW}h{NARROW}{minutes % 60:02d}{NARROW}min"


def shortened(name: str, length: int) -> str:
    """Put a name on one line, replace unprintable characters, and cut it to `length` with an ellipsis."""
    name = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in " ".join(name.split()))
    return name if len(name) <= length else name[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _percents(differences: list[float]) -> list[str]:
    """Show differences of log perplexity as percentages with common decimals."""
    values = [100 * math.expm1(nats) if nats < 700 else math.inf for nats in differences]
    smallest = min((min(abs(value), abs(100 + value)) for value in values if value), default=1.0)
    decimals = 0 if smallest >= 2 else 1 if smallest >= 0.1 else 2
    return [_sign(f"{value:+,.{decimals}f}" if abs(value) < 1e15 else f"{value:+.2e}") for value in values]


def _sign(text: str) -> str:
    """Write a number with a proper minus sign, and a zero without a sign."""
    is_zero = not any(char in text for char in "123456789ina")
    return text.lstrip("+-") if is_zero else text.replace("-", MINUS, 1) if text.startswith("-") else text
