"""The graph model of volatility: bars -> panel -> features and graphs -> model -> evaluation -> registry.

    panel.py       bars of many instruments on one grid of intervals; floats begin here
    features.py    what is known of each instrument at the end of an interval, and the label after it
    graph.py       who moves with whom: rolling correlation, past data only
    network.py     the GATv2 network (imports torch; nothing that Dagster loads imports it)
    training.py    fit, fixed seeds, scaling from the training part; save and load
    baselines.py   last value, HAR, linear and LightGBM
    evaluation.py  walk-forward with purge and embargo, the comparison, the promotion rule
    drift.py       are recent features still those of the training
    history.py     adapter: which table, which snapshot, the latest revisions
    registry.py    adapter: MLflow, aliases, Iceberg tags

The volatility of an interval is Parkinson's: `sqrt(ln(high / low)^2 / (4 ln 2))`, a fraction of the price over
one interval. Models predict its logarithm, which is close to normal, one interval ahead.
"""
