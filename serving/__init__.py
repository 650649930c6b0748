"""Serving: chat with a policy, sample and score answers in files, and export models."""
