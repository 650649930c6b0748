"""Estimates of memory and time, without torch."""
