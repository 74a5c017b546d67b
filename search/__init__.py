"""The search: samplers, executors, the loop, and the run around it."""
