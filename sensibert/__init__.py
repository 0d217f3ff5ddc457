"""Sensitivity-driven trimming of BERT-family models while fine-tuning."""
