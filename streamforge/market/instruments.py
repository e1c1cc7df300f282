"""Names of instruments: `BASE-QUOTE.VENUE`, and what a venue's own symbol says of them."""

from __future__ import annotations

from streamforge.errors import ConfigurationError

# Longest first where one ends with another, so that BTCFDUSD is not a coin against USD.
_QUOTES = ("FDUSD", "USDT", "USDC", "BUSD", "TUSD", "BTC", "ETH", "BNB", "EUR", "USD")


def split_symbol(symbol: str) -> tuple[str, str]:
    """Return base and quote of a symbol that has no separator, such as BTCUSDT.

    Raises:
        ConfigurationError: it does not end in a known quote currency.
    """
    for quote in _QUOTES:
        base = symbol.removesuffix(quote)
        if base != symbol and base.isalnum() and base.isupper():
            return base, quote
    msg = (
        f"cannot tell base and quote of {symbol!r}: expected capital letters and digits that end in one of "
        f"{', '.join(_QUOTES)}"
    )
    raise ConfigurationError(msg)


def instrument_of(base: str, quote: str, venue: str) -> str:
    """Return the instrument's name."""
    return f"{base}-{quote}.{venue}"
