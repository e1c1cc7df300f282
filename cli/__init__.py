"""The `streamforge` command."""
