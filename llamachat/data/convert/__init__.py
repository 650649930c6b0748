"""Converts logs in other formats to records."""
