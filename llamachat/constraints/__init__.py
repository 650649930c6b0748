"""Constraints that an answer keeps or breaks, and instructions made of them (Ghost Attention, Llama 2 section 3.3)."""
