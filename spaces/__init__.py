"""What may be chosen: stock spaces, each a function of the trial that returns a plan."""

from .stock import StockSpace, stock_space

__all__ = ["StockSpace", "stock_space"]
