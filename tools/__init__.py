"""How the bundled data and the tiny base were made."""
