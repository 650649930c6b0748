"""Proximal policy optimisation of a chat policy against reward models (Llama 2 section 3.2.3)."""
