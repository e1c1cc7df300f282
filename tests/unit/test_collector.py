"""The collector of an always-on process is calm, and still there."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import gc, weakref
from streamforge.collector import calm_collector
class Node: pass
calm_collector()
assert gc.isenabled() and gc.get_freeze_count() > 0
before = gc.get_stats()[0]["collections"]
made = [[n] for n in range(50_000)]
assert gc.get_stats()[0]["collections"] == before, "fifty thousand live lists woke it up"
node = Node(); node.me = node; seen = weakref.ref(node); del node
kept = [[n] for n in range(200_000)]
assert seen() is None, "a cycle stayed"
"""


def test_collector_leaves_a_fetch_alone_and_still_ends_cycles() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
