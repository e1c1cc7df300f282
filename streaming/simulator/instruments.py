"""Instruments of the simulated market and exact decimal text for their integer prices and sizes."""

from __future__ import annotations

from dataclasses import dataclass

from streamforge.errors import ConfigurationError
from streamforge.market.instruments import split_symbol

VENUE_DECIMALS = 8
"""The venue writes every price and size with eight decimals."""

_MAX_CACHED_TEXTS = 50_000

# Symbol's base, start price in ticks, decimals of the tick, decimals of the lot.
_KNOWN = (
    ("BTC", 6_172_000, 2, 5),
    ("ETH", 268_000, 2, 4),
    ("BNB", 52_000, 2, 3),
    ("SOL", 15_600, 2, 3),
    ("XRP", 6_120, 4, 1),
    ("DOGE", 10_700, 5, 0),
    ("ADA", 3_560, 4, 1),
    ("LINK", 1_050, 2, 2),
    ("AVAX", 2_240, 2, 2),
    ("LTC", 6_180, 2, 3),
    ("DOT", 4_760, 3, 2),
    ("BCH", 35_100, 1, 3),
)


@dataclass(frozen=True, slots=True)
class InstrumentSpec:
    """One listed instrument; prices are whole ticks and sizes whole lots.

    Args:
        symbol: the venue's name, base and quote asset without a separator.
        start_price_ticks: price at the start of the market.
        price_decimals: a tick is 10 to the power of minus this.
        lot_decimals: a lot is 10 to the power of minus this.
    """

    symbol: str
    base: str
    quote: str
    start_price_ticks: int
    price_decimals: int
    lot_decimals: int


class DecimalText(dict[int, str]):
    """Text of `number * 10**-decimals` with the venue's eight decimals; remembers what it wrote."""

    def __init__(self, decimals: int) -> None:
        super().__init__()
        self._scale = 10**decimals
        self._decimals = decimals
        self._zeros = "0" * (VENUE_DECIMALS - decimals)

    def __missing__(self, number: int) -> str:
        if len(self) >= _MAX_CACHED_TEXTS:
            self.clear()
        whole, fraction = divmod(number, self._scale)
        digits = f"{fraction:0{self._decimals}d}" if self._decimals else ""
        text = self[number] = f"{whole}.{digits}{self._zeros}"
        return text


def product_text(number: int, decimals: int) -> str:
    """Return `number * 10**-decimals` with eight decimals, cut off as the venue does in quote amounts."""
    if decimals > VENUE_DECIMALS:
        number //= 10 ** (decimals - VENUE_DECIMALS)
        decimals = VENUE_DECIMALS
    return DecimalText(decimals)[number]


def default_instruments(count: int) -> list[InstrumentSpec]:
    """Return `count` instruments: well-known coins first, then invented ones."""
    if count < 1:
        msg = f"a market needs at least one instrument, found {count}. Set --instruments to 1 or more"
        raise ConfigurationError(msg)
    known = [InstrumentSpec(f"{base}USDT", base, "USDT", *numbers) for base, *numbers in _KNOWN[:count]]
    invented = [new_listing(f"SIM{number:03d}USDT") for number in range(len(known), count)]
    return known + invented


def known_instrument(symbol: str) -> InstrumentSpec:
    """Return the instrument of a symbol; one that is not well known gets the finest tick and lot."""
    for spec in default_instruments(len(_KNOWN)):
        if spec.symbol == symbol:
            return spec
    listing = new_listing(symbol)
    return InstrumentSpec(symbol, listing.base, listing.quote, 1, VENUE_DECIMALS, VENUE_DECIMALS)


def new_listing(symbol: str) -> InstrumentSpec:
    """Return an instrument for a symbol that was not listed until now.

    Raises:
        ConfigurationError: the symbol does not end in a known quote asset.
    """
    base, quote = split_symbol(symbol)
    return InstrumentSpec(symbol, base, quote, 10_000, 4, 1)
