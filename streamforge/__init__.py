"""StreamForge: the core that every room shares (types, contracts, protocol, plumbing)."""

__version__ = "0.1.0"
