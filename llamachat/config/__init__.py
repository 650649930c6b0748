"""Configuration: frozen sections, YAML files that may extend each other, dotted overrides, one report of all problems."""
