"""Benchmarks: every number in the README has its command here. Each prints one JSON object."""
