"""A market that speaks the Binance spot protocol: synthetic or recorded, with faults and an exact ledger."""
