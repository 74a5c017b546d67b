"""What a search found: its database, its Pareto front, its reports and its files."""
