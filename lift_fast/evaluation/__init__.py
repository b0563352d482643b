"""Evaluation of dense features: methods that are compared, published protocols, results with their provenance."""
