"""Reads logs in other forms and writes them as records."""
