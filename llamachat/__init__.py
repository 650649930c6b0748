"""Llama-2 base model to chat model by the recipe of the Llama 2 paper (arXiv:2307.09288): the library the stages share."""

__version__ = "0.1.0"
