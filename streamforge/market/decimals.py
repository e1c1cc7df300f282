"""Decimals as text: what fits decimal(38,18) exactly, checked without any float and never rounded.

The canonical text has no sign, no exponent, no leading zeros and no zeros at the end of the fraction, so
equal numbers have equal text. The venue's own spelling stays in raw.
"""

from __future__ import annotations

import re
from decimal import ROUND_HALF_EVEN, Context, Decimal, Inexact, InvalidOperation
from functools import lru_cache

from streamforge.errors import DecodeError

PRECISION = 38
SCALE = 18
_INTEGER_DIGITS = PRECISION - SCALE
_CACHED_TEXTS = 65_536
_SHOWN_CHARACTERS = 60
_PLAIN = re.compile(r"([0-9]+)(?:\.([0-9]+))?")
_STEP = Decimal(1).scaleb(-SCALE)

# Enough digits for any sum of products of two decimal(38,18) that a bar can hold; a result that would be
# rounded all the same is an error and not a wrong number.
EXACT = Context(prec=160, traps=[Inexact, InvalidOperation])
_ROUNDING = Context(prec=160, rounding=ROUND_HALF_EVEN, traps=[InvalidOperation])


@lru_cache(maxsize=_CACHED_TEXTS)
def positive_decimal(text: str) -> str:
    """Return the canonical text of a decimal greater than zero that fits decimal(38,18).

    Raises:
        DecodeError: `bad_decimal` where it is not a plain decimal (sign, exponent, NaN, blank, other
            digits than 0 to 9), `out_of_range` where it is zero or would have to be rounded.
    """
    match = _PLAIN.fullmatch(text)
    if match is None:
        raise DecodeError("bad_decimal", f"expected a plain decimal like 61837.63, found {_shown(text)}")
    whole = match[1].lstrip("0")
    fraction = (match[2] or "").rstrip("0")
    if len(whole) > _INTEGER_DIGITS or len(fraction) > SCALE:
        detail = (
            f"expected at most {_INTEGER_DIGITS} digits before and {SCALE} behind the point, "
            f"found {len(whole)} and {len(fraction)} in {_shown(text)}"
        )
        raise DecodeError("out_of_range", detail)
    if not whole and not fraction:
        raise DecodeError("out_of_range", f"expected a number greater than zero, found {_shown(text)}")
    return f"{whole or '0'}.{fraction}" if fraction else whole


def plain_text(value: Decimal) -> str:
    """Return the canonical text of a decimal that is not negative.

    Raises:
        DecodeError: `out_of_range` where it does not fit decimal(38,18) exactly.
    """
    if value.is_zero():
        return "0"
    return positive_decimal(format(value, "f"))


def rounded(value: Decimal) -> Decimal:
    """Return `value` rounded half to even to 18 places."""
    return value.quantize(_STEP, context=_ROUNDING)


def quotient(dividend: Decimal, divisor: Decimal) -> Decimal:
    """Return `dividend / divisor` rounded half to even to 18 places, rounded once.

    A quotient cut to the context's digits and then rounded would be rounded twice; so it is taken exactly,
    as whole steps and a remainder.
    """
    steps, remainder = EXACT.divmod(dividend.scaleb(SCALE, context=EXACT), divisor)
    twice = EXACT.compare(EXACT.multiply(remainder, Decimal(2)), divisor)
    if twice > 0 or (twice == 0 and int(steps) % 2):
        steps = EXACT.add(steps, Decimal(1))
    return steps.scaleb(-SCALE, context=EXACT)


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}...")
