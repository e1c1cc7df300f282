"""Spark: the way past one machine. Sessions on our catalog, replays of large ranges, compaction."""
