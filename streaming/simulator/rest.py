"""The REST server of the simulated venue: the market data routes of `/api/v3`, their weights and their errors."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from itertools import islice
from typing import Any

import msgspec
from aiohttp import web

from streamforge.errors import ConfigurationError
from streaming.simulator.protocol import Formatter, exchange_symbol
from streaming.simulator.settings import SimulatorSettings
from streaming.simulator.source import MarketSource
from streaming.simulator.weights import Verdict, WeightLimiter, request_weight

INTERVALS_MS: Mapping[str, int] = {
    "1m": 60_000,
    "3m": 180_000,
    "5m": 300_000,
    "15m": 900_000,
    "30m": 1_800_000,
    "1h": 3_600_000,
    "2h": 7_200_000,
    "4h": 14_400_000,
    "6h": 21_600_000,
    "8h": 28_800_000,
    "12h": 43_200_000,
    "1d": 86_400_000,
}
"""Kline intervals served; the venue also has `1s`, `3d`, `1w` and `1M`."""

_NS_PER_MS = 1_000_000
_SYMBOL = re.compile(r"^[A-Z0-9-_.]{1,20}$")
_INTEGER = re.compile(r"^[0-9]{1,20}$")
_MAX_ITEMS = 1000
_MAX_DEPTH = 5000
_DEFAULT_ITEMS = 500
_DEFAULT_DEPTH = 100

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ApiError(Exception):
    """A request that is answered with the venue's error object."""

    def __init__(self, code: int, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.status = status


class RestServer:
    """Serve what a market remembers.

    Args:
        source: the market; it is moved by the WebSocket server.
        settings: address and weight limits.
        clock_ns: venue time.
    """

    def __init__(self, source: MarketSource, settings: SimulatorSettings, clock_ns: Callable[[], int]) -> None:
        self.port = 0
        self._source = source
        self._settings = settings
        self._clock_ns = clock_ns
        self._limiter = WeightLimiter(
            settings.simulator_weight_limit, settings.simulator_ban_after, settings.simulator_ban_s, clock_ns
        )
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Begin to listen; `port` is known afterwards.

        Raises:
            ConfigurationError: the port is taken.
        """
        app = web.Application(middlewares=[self._guard])
        for path, handler in self._routes().items():
            app.router.add_get(path, handler)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        host, port = self._settings.simulator_host, self._settings.simulator_rest_port
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError as error:
            await self._runner.cleanup()
            msg = f"cannot listen on {host}:{port}: {error.strerror}. Choose another --rest-port, or 0 for a free one"
            raise ConfigurationError(msg) from error
        self.port = self._runner.addresses[0][1]

    async def close(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()

    # -- every request --------------------------------------------------------------------------------------

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        weight = request_weight(request.path, request.query.get("limit"))
        verdict = self._limiter.admit(request.remote or "", weight)
        try:
            response = await handler(request) if verdict.status == web.HTTPOk.status_code else self._refuse(verdict)
        except ApiError as error:
            response = _json({"code": error.code, "msg": error.text}, error.status)
        except web.HTTPException as error:
            response = web.Response(status=error.status, text=error.reason)
        response.headers["X-MBX-USED-WEIGHT"] = response.headers["X-MBX-USED-WEIGHT-1M"] = str(verdict.used_weight)
        return response

    def _refuse(self, verdict: Verdict) -> web.Response:
        hint = "Please use WebSocket Streams for live updates to avoid polling the API."
        limit = self._settings.simulator_weight_limit
        text = f"Too much request weight used; current limit is {limit} request weight per 1 MINUTE. {hint}"
        if verdict.banned_until_ms:
            text = f"Way too much request weight used; IP banned until {verdict.banned_until_ms}. {hint}"
        response = _json({"code": -1003, "msg": text}, verdict.status)
        response.headers["Retry-After"] = str(verdict.retry_after_s)
        return response

    # -- routes ---------------------------------------------------------------------------------------------

    def _routes(self) -> dict[str, Handler]:
        return {
            "/api/v3/ping": self._ping,
            "/api/v3/time": self._time,
            "/api/v3/exchangeInfo": self._exchange_info,
            "/api/v3/depth": self._depth,
            "/api/v3/trades": self._trades,
            "/api/v3/historicalTrades": self._historical_trades,
            "/api/v3/aggTrades": self._aggregate_trades,
            "/api/v3/klines": self._klines,
        }

    async def _ping(self, request: web.Request) -> web.Response:
        _Query(request)
        return _json({})

    async def _time(self, request: web.Request) -> web.Response:
        _Query(request)
        return _json({"serverTime": self._clock_ns() // _NS_PER_MS})

    async def _exchange_info(self, request: web.Request) -> web.Response:
        query = _Query(request, "symbol", "symbols")
        listed = {spec.symbol: spec for spec in self._source.instruments()}
        wanted = list(listed)
        if query.has("symbols"):
            wanted = _symbol_list(query.text("symbols"))
        elif query.has("symbol"):
            wanted = [query.symbol()]
        if any(symbol not in listed for symbol in wanted):
            raise ApiError(-1121, "Invalid symbol.")
        return _json(
            {
                "timezone": "UTC",
                "serverTime": self._clock_ns() // _NS_PER_MS,
                "rateLimits": [
                    {
                        "rateLimitType": "REQUEST_WEIGHT",
                        "interval": "MINUTE",
                        "intervalNum": 1,
                        "limit": self._settings.simulator_weight_limit,
                    }
                ],
                "exchangeFilters": [],
                "symbols": [exchange_symbol(listed[symbol]) for symbol in wanted],
            }
        )

    async def _depth(self, request: web.Request) -> web.Response:
        query = _Query(request, "symbol", "limit")
        symbol = self._listed(query)
        limit = min(query.integer("limit", _DEFAULT_DEPTH), _MAX_DEPTH)
        if limit == 0:
            raise _not_valid("limit")
        book = self._source.depth(symbol, limit)
        return _json({"lastUpdateId": book.last_update_id, "bids": book.bids, "asks": book.asks})

    async def _trades(self, request: web.Request) -> web.Response:
        query = _Query(request, "symbol", "limit")
        symbol = self._listed(query)
        found = self._source.history(symbol).trades(query.item_limit())
        return _json([self._format(symbol).rest_trade(trade) for trade in found])

    async def _historical_trades(self, request: web.Request) -> web.Response:
        query = _Query(request, "symbol", "limit", "fromId")
        symbol = self._listed(query)
        from_id = query.integer("fromId", None)
        found = self._source.history(symbol).trades(query.item_limit(), from_id)
        return _json([self._format(symbol).rest_trade(trade) for trade in found])

    async def _aggregate_trades(self, request: web.Request) -> web.Response:
        query = _Query(request, "symbol", "limit", "fromId", "startTime", "endTime")
        symbol = self._listed(query)
        start_ms, end_ms = query.integer("startTime", None), query.integer("endTime", None)
        from_id = query.integer("fromId", None)
        if from_id is not None and (start_ms is not None or end_ms is not None):
            raise ApiError(-1128, "Combination of optional parameters invalid.")
        found = self._source.history(symbol).aggregates(
            query.item_limit(), from_id=from_id, start_ms=start_ms, end_ms=end_ms
        )
        return _json([self._format(symbol).rest_aggregate(trade) for trade in found])

    async def _klines(self, request: web.Request) -> web.Response:
        query = _Query(request, "symbol", "interval", "limit", "startTime", "endTime", "timeZone")
        symbol = self._listed(query)
        interval_ms = INTERVALS_MS.get(query.text("interval"))
        if interval_ms is None:
            raise ApiError(-1120, "Invalid interval.")
        limit = query.item_limit()
        start_ms = query.integer("startTime", None)
        klines = self._source.history(symbol).klines(
            interval_ms, start_ms=start_ms or 0, end_ms=query.integer("endTime", None)
        )
        found = list(klines)[-limit:] if start_ms is None else list(islice(klines, limit))
        return _json([self._format(symbol).rest_kline(kline) for kline in found])

    def _listed(self, query: _Query) -> str:
        symbol = query.symbol()
        if all(spec.symbol != symbol for spec in self._source.instruments()):
            raise ApiError(-1121, "Invalid symbol.")
        return symbol

    def _format(self, symbol: str) -> Formatter:
        return Formatter(next(spec for spec in self._source.instruments() if spec.symbol == symbol))


class _Query:
    """Parameters of one request, checked as the venue does."""

    def __init__(self, request: web.Request, *known: str) -> None:
        self._values = request.query
        unknown = [name for name in self._values if name not in known]
        if unknown:
            raise ApiError(-1101, f"Too many parameters; expected '{len(known)}' and received '{len(self._values)}'.")

    def has(self, name: str) -> bool:
        return name in self._values

    def text(self, name: str) -> str:
        value = self._values.get(name)
        if not value:
            raise ApiError(-1102, f"Mandatory parameter '{name}' was not sent, was empty/null, or malformed.")
        return value

    def symbol(self) -> str:
        value = self.text("symbol")
        if not _SYMBOL.match(value):
            raise _illegal("symbol", _SYMBOL)
        return value

    def integer(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        if value is None:
            return default
        if value == "":
            raise ApiError(-1105, f"Parameter '{name}' was empty.")
        if not _INTEGER.match(value):
            raise _illegal(name, _INTEGER)
        return int(value)

    def item_limit(self) -> int:
        limit: int = self.integer("limit", _DEFAULT_ITEMS)
        if limit == 0:
            raise _not_valid("limit")
        return min(limit, _MAX_ITEMS)


def _symbol_list(text: str) -> list[str]:
    try:
        return msgspec.json.decode(text, type=list[str])
    except msgspec.MsgspecError as error:
        pattern = r"^\[(\"[A-Z0-9-_.]{1,20}\"(,\"[A-Z0-9-_.]{1,20}\"){0,}){0,1}\]$"
        msg = f"Illegal characters found in parameter 'symbols'; legal range is '{pattern}'."
        raise ApiError(-1100, msg) from error


def _illegal(name: str, pattern: re.Pattern[str]) -> ApiError:
    return ApiError(-1100, f"Illegal characters found in parameter '{name}'; legal range is '{pattern.pattern}'.")


def _not_valid(name: str) -> ApiError:
    return ApiError(-1130, f"Data sent for parameter '{name}' is not valid.")


def _json(body: Any, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json")
