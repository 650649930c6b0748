"""Serving: talk with a policy, and sample its answers to a file of prompts."""
