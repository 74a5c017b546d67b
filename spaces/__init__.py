"""What may be chosen: stock spaces, each a function of the trial that returns a plan."""

from .stock import PruneQuantize, stock_space

__all__ = ["PruneQuantize", "stock_space"]
