"""Models and data sets by name: what is compressed, and what says how good the result is."""
