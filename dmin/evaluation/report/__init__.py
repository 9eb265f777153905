"""What a benchmark found: tables, plots, conclusions, one page."""
