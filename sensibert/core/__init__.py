"""What knows no model: the grid, layouts, budgets, costs, artifacts, settings and files."""
