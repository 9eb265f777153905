"""The report of a benchmark: tables, plots, conclusions, one page."""
