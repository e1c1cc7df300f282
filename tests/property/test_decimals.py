"""Any decimal that fits decimal(38,18) survives JSON, struct and Arrow unchanged; any other is refused."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Context, Decimal
from fractions import Fraction

import msgspec
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streamforge.errors import DecodeError
from streamforge.market.binance import parse_trades
from streamforge.market.decimals import positive_decimal, quotient, rounded
from streamforge.market.records import Trade
from tests.pipeline_support import make_trade, trade_frame

ARROW = pa.decimal128(38, 18)
FITTING = st.tuples(st.integers(0, 10**20 - 1), st.integers(0, 10**18 - 1), st.integers(0, 18)).map(
    lambda parts: f"{parts[0]}.{parts[1]:018d}"[: None if parts[2] == 18 else -(18 - parts[2])].rstrip(".")
)
POSITIVE = FITTING.filter(lambda text: Decimal(text) > 0)
BTC = "BTC-USDT.SIM"


@given(POSITIVE)
@example("99999999999999999999.999999999999999999")
@example("0.000000000000000001")
@example("00012.5000")
def test_decimal_that_fits_survives_frame_struct_json_and_arrow(text: str) -> None:
    [event] = parse_trades(trade_frame(BTC, 1, price=text, size=text)) or []
    assert Decimal(event.price) == Decimal(text)
    trade = msgspec.structs.replace(make_trade(BTC, 1, 1_700_000_000_000), price=event.price, size=event.size)
    back = msgspec.json.decode(msgspec.json.encode(trade), type=Trade)
    assert back == trade
    arrow = pa.array([Decimal(back.price)], ARROW)
    assert arrow[0].as_py() == Decimal(text)
    assert positive_decimal(format(arrow[0].as_py(), "f")) == event.price


@given(POSITIVE)
def test_canonical_text_is_the_same_for_equal_numbers(text: str) -> None:
    spelled = f"00{text}{'000' if '.' in text else '.000'}"
    assert positive_decimal(spelled) == positive_decimal(text)
    assert positive_decimal(positive_decimal(text)) == positive_decimal(text)


@given(st.text(max_size=50))
@example("NaN")
@example("sNaN")
@example("Infinity")
@example("1e400")
@example("1E5")
@example("-0")
@example("-1")
@example("+1")
@example("")
@example(" 1")
@example("1 ")
@example("1\n")
@example("1_000")
@example(".5")
@example("5.")
@example("1.2.3")
@example("0x10")
@example("\u0661\u0662")
@example("\uff11\uff12")
@example("1,5")
@example("0")
@example("0.000")
@example("100000000000000000000")
@example("0.0000000000000000001")
@example("1.0000000000000000005")
@example("9" * 5_000)
@example("0." + "0" * 5_000 + "1")
def test_any_text_is_exact_or_refused(text: str) -> None:
    if not _fits(text):
        with pytest.raises(DecodeError, match=r"bad_decimal|out_of_range"):
            positive_decimal(text)
        return
    canonical = positive_decimal(text)
    assert Decimal(canonical) == Decimal(text)
    assert pa.array([Decimal(canonical)], ARROW)[0].as_py() == Decimal(text)


@given(st.decimals(allow_nan=True, allow_infinity=True).map(str))
def test_any_number_text_is_exact_or_a_dead_letter(text: str) -> None:
    frame = trade_frame(BTC, 1, price=text)
    if _fits(text):
        [event] = parse_trades(frame) or []
        assert Decimal(event.price) == Decimal(text)
    else:
        with pytest.raises(DecodeError):
            parse_trades(frame)


@given(POSITIVE, POSITIVE)
def test_quotient_is_rounded_half_even_once(dividend: str, divisor: str) -> None:
    exact = Fraction(Decimal(dividend)) / Fraction(Decimal(divisor)) * 10**18
    assert Fraction(quotient(Decimal(dividend), Decimal(divisor))) == Fraction(round(exact), 10**18)


@given(st.integers(0, 10**50))
def test_rounded_is_half_even_to_18_places(units: int) -> None:
    value = Decimal(units).scaleb(-30, context=Context(prec=80))
    context = Context(prec=80, rounding=ROUND_HALF_EVEN)
    assert rounded(value) == value.quantize(Decimal("1e-18"), context=context)


def _fits(text: str) -> bool:
    """Return whether text is a plain decimal above zero that decimal(38,18) holds; a second way to say it."""
    if not text or not set(text) <= set("0123456789.") or text.count(".") > 1 or text[0] == "." or text[-1] == ".":
        return False
    scaled = Fraction(Decimal(text)) * 10**18
    return scaled.denominator == 1 and 0 < scaled < 10**38
