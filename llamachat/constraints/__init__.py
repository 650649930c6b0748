"""Constraints on answers, and instructions that consist of them (Ghost Attention, Llama 2 section 3.3)."""
