"""WHAT exists: streams and tables as Dagster assets, each made from its contract."""
