"""The demo: the whole line on a home of its own, and a report of what became of every message."""
