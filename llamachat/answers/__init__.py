"""Sampled answers: sampled by a rollout engine, scored by the reward models, compared between two policies."""
