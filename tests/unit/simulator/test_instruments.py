from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamforge.errors import ConfigurationError
from streaming.simulator.instruments import DecimalText, default_instruments, new_listing, product_text


@given(st.integers(0, 10**18), st.integers(0, 8))
def test_decimal_text_any_number_is_exact_with_eight_decimals(number: int, decimals: int) -> None:
    text = DecimalText(decimals)[number]
    assert Decimal(text) == Decimal(number).scaleb(-decimals)
    assert len(text.partition(".")[2]) == 8


@given(st.integers(0, 10**20), st.integers(0, 16))
def test_product_text_any_number_is_cut_off_at_eight_decimals(number: int, decimals: int) -> None:
    exact = Decimal(number).scaleb(-decimals)
    found = Decimal(product_text(number, decimals))
    assert 0 <= exact - found < Decimal("1e-8")


def test_default_instruments_names_are_unique_beyond_the_known_ones() -> None:
    specs = default_instruments(40)
    assert len({spec.symbol for spec in specs}) == 40
    assert all(spec.symbol == spec.base + spec.quote for spec in specs)
    assert [spec.symbol for spec in specs[:2]] == ["BTCUSDT", "ETHUSDT"]


def test_default_instruments_none_says_what_to_do() -> None:
    with pytest.raises(ConfigurationError, match="--instruments"):
        default_instruments(0)


def test_new_listing_good_symbol_is_split() -> None:
    spec = new_listing("PEPE2USDC")
    assert (spec.base, spec.quote) == ("PEPE2", "USDC")


@pytest.mark.parametrize("symbol", ["", "USDT", "newusdt", "NEWXYZ", "A B USDT"])
def test_new_listing_bad_symbol_is_refused(symbol: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot tell base and quote"):
        new_listing(symbol)
