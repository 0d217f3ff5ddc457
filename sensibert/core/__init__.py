"""Grids, layouts, budgets, costs, artifacts, settings and files: everything that needs no model."""
