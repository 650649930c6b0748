"""The `llamachat` command."""
