"""From a candidate to its figures: the pipeline, the objectives and their limits."""
