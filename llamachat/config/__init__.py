"""Configuration: frozen sections, YAML files with one level of `extends`, dotted overrides, one report of all problems."""
